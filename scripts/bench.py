"""How far from the floor: PGD against the forward and backward passes that no PGD can do without.

The floor of `steps` steps is `steps` forward and backward passes with respect to the input, on the same
batch, with nothing else done: no projection, no random start, no checks. Both are timed in turn, so that a
busy machine slows both. Figures go to stdout as one JSON object, their meaning to stderr.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from robustkit.attacks.pgd import pgd
from robustkit.models import mnist_cnn
from robustkit.threat import Ball

STEPS, BATCH, ROUNDS = 10, 256, 30


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call; a GPU is waited for."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Time both, and print the ratio of the medians with the spread of the single ratios."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = mnist_cnn().to(device).eval().requires_grad_(False)
    x = torch.rand(BATCH, 1, 28, 28, device=device)
    y = torch.randint(10, (BATCH,), device=device)
    generator = torch.Generator(device).manual_seed(0)

    def floor() -> None:
        images = x.clone().requires_grad_(True)
        for _ in range(STEPS):
            torch.autograd.grad(cross_entropy(model(images), y, reduction="sum"), images)

    def attack() -> None:
        pgd(model, x, y, Ball("Linf", 0.3), steps=STEPS, generator=generator)

    for _ in range(3):  # the first calls pay for allocation and kernel selection
        seconds(floor, device), seconds(attack, device)
    pairs = [(seconds(floor, device), seconds(attack, device)) for _ in range(ROUNDS)]
    ratios = sorted(taken / least for least, taken in pairs)
    figures = {
        "floor_ms": round(1000 * statistics.median(least for least, _ in pairs), 2),
        "pgd_ms": round(1000 * statistics.median(taken for _, taken in pairs), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_middle_half": [round(ratios[ROUNDS // 4], 3), round(ratios[-1 - ROUNDS // 4], 3)],
        "rounds": ROUNDS,
        "steps": STEPS,
        "batch": BATCH,
        "model": "mnist_cnn",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "seed": 0,
    }
    print(json.dumps(figures, indent=2))
    print(
        f"PGD-{STEPS} takes {figures['ratio']} times its {STEPS} forward and backward passes "
        f"(median of {ROUNDS} rounds; images and weights are random, which costs the same).",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
