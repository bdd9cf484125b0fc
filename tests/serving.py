"""What tests of the service share: pictures that nobody sent before, and settings that take any free port."""

from __future__ import annotations

import io
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from robustkit.serve.server import Running
from robustkit.serve.settings import Settings

OPEN = {"account_rate": "1000000/minute", "address_rate": "1000000/minute"}


def picture(seed: int, size: int = 28) -> bytes:
    """A PNG of noise: to a detector unlike every other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    return png(pixels)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def settings(folder: Path, **changes: object) -> Settings:
    """A small model on free ports, without limits that a test would run into by accident."""
    usual = {"model": "mnist-clean", "port": 0, "admin_port": 0, "workers": 2, "refresh_seconds": 0.1, **OPEN}
    return Settings(folder, **(usual | changes))


def client(service: Running, key: str | None = None) -> httpx.Client:
    return httpx.Client(
        base_url=service.url, headers={"Authorization": f"Bearer {key or service.api_key}"}, timeout=30
    )


def operator(service: Running) -> httpx.Client:
    return httpx.Client(
        base_url=service.admin_url, headers={"Authorization": f"Bearer {service.admin}"}, timeout=30
    )


def metric(service: Running, name: str) -> float:
    """The sum over the labels of a metric, as Prometheus would read it."""
    headers = {"Authorization": f"Bearer {service.replica.credentials.metrics}"}
    text = httpx.get(f"{service.url}/metrics", headers=headers).text
    lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
