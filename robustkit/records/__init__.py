"""Measurements that take longer than a lesson has: counts, with hardware, seed and data. Made by scripts/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def training() -> dict[str, Any]:
    """Robust overfitting, and accuracy by size of network, on CIFAR-10: what scripts/bench_training.py measured."""
    path = Path(__file__).with_name("cifar10-training.json")
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read
