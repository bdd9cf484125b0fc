"""What adversarial training does to a small network: robust overfitting, capacity, the price in clean accuracy.

    python scripts/bench_training.py --out robustkit/records/cifar10-training.json

Lesson 3 shows these curves where a learner has no half hour to spare. L2, eps 0.5 (trained at 128/255), one-step
training, PGD-10 with one random start, seed 0; images for training from the JPEG mirror, held-out ones lossless.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.data import Dataset, load
from robustkit.defences import DEFENCES, Defence
from robustkit.device import hardware
from robustkit.evaluate import ATTACKS, evaluate
from robustkit.files import write_atomically
from robustkit.models import preact_resnet10, pretrained
from robustkit.threat import Ball
from robustkit.train import Schedule, train

TRAINED, REPORTED = Ball("L2", 128 / 255), Ball("L2", 0.5)
PGD = {"pgd-10": ATTACKS["pgd-10"]}


def shares(model: nn.Module, images: Dataset) -> dict[str, list[int]]:
    """k and n, untouched and under PGD-10."""
    found = evaluate(model, images, REPORTED, PGD, model_name="?", tier="standard", progress=False)
    return {"clean": [found.clean.k, found.clean.n], "robust": [found.robust.k, found.robust.n]}


def overfitting(images: Dataset, held_out: Dataset, epochs: int) -> dict[str, Any]:
    """The shipped network, trained on for many epochs on few images, looked at before every other epoch."""
    kept: list[nn.Module] = []
    every = 2 * (len(images) // 100)

    def watching(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
        if watching.calls % every == 0:  # type: ignore[attr-defined]
            kept.append(copy.deepcopy(model).eval())
        watching.calls += 1  # type: ignore[attr-defined]
        return DEFENCES["one-step-l2-at"](model, x, y, ball, generator)

    watching.calls = 0  # type: ignore[attr-defined]
    model = pretrained("cifar10-l2-w16")
    schedule = Schedule(epochs, 100, 0.05, optimizer="sgd", rise=0.1, bf16=True, watched=1)
    train(model, images, watching, TRAINED, schedule, seed=0, recipe="overfitting")
    kept.append(model)
    seen = images.take(range(len(held_out)))
    rows = [
        {"epoch": 2 * i, "train": shares(one, seen), "held_out": shares(one, held_out)}
        for i, one in enumerate(kept)
    ]
    return {"schedule": asdict(schedule), "images": len(images), "rows": rows}


def capacity(images: Dataset, held_out: Dataset, epochs: int) -> dict[str, Any]:
    """Networks of three widths from scratch, with and without the attack in training."""
    schedule = Schedule(epochs, 100, 0.1, optimizer="sgd", rise=0.3, bf16=True, watched=1)
    rows = []
    for width in (4, 8, 16):
        for name in ("clean", "one-step-l2-at"):
            defence: Defence = DEFENCES[name]
            torch.manual_seed(0)
            model = preact_resnet10(width)
            started = time.process_time()
            train(model, images, defence, TRAINED, schedule, seed=0, recipe=f"{name}, width {width}")
            seconds = time.process_time() - started
            parameters = sum(value.numel() for value in model.parameters())
            row = {"width": width, "parameters": parameters, "defence": name, "cpu_seconds": round(seconds)}
            rows.append(row | {"train": shares(model, images.take(range(len(held_out))))})
            rows[-1] |= {"held_out": shares(model, held_out)}
    return {"schedule": asdict(schedule), "images": len(images), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    images = load("cifar10-jpeg", "train", limit=10_000, seed=0)
    held_out = load("cifar10-lossless-4k", "report", limit=options.held_out, seed=0)
    record: dict[str, Any] = {
        "threat": f"{REPORTED} on inputs in [0, 1], white-box, untargeted; PGD-10, one start; trained at 128/255",
        "seed": 0,
        "hardware": asdict(hardware()),
        "data": {"train": asdict(images.provenance), "held_out": asdict(held_out.provenance)},
    }
    started = time.process_time()
    parts = {
        "overfitting": partial(overfitting, images.take(range(1_000)), held_out, 24),
        "capacity": partial(capacity, images, held_out, 8),
    }
    for name, make in parts.items():
        record[name] = make()
        record["cpu_minutes"] = round((time.process_time() - started) / 60, 1)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
