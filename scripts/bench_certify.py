"""What certification costs beyond its forward passes, beside the published algorithm, and what stages save.

Three programs certify one image in turn, so that a busy machine slows all of them: the forward passes alone
(the floor), `robustkit.certify`, and a plain transcription of the algorithm as published. Then the staged
test answers "certified at this radius?" for images for which the fixed test of 100,000 samples answers too.
Figures go to stdout as one JSON object, their meaning to stderr.

CPU seconds stand beside wall-clock ones: with one torch thread they hardly depend on what else the machine does.
With `--threads 1` on two cores, noise is drawn on the one while the model works on the other; with more torch
threads than that, the two share cores. The record says how many there were.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from scipy.stats import beta, norm  # type: ignore[import-untyped]
from torch import Tensor, nn

from robustkit import data, models
from robustkit.certify.certificates import ABSTAIN, Smoothing
from robustkit.certify.smoothing import BLOCK, certificate, certified_at, precision_of
from robustkit.device import prepare, seeded, strict_fp32

ALPHA, N0 = 0.001, 100
PUBLISHED_BATCH = 1_000  # the default of the published program


def published(model: nn.Module, image: Tensor, sigma: float, n: int) -> tuple[int, float]:
    """CERTIFY as published: Cohen, Rosenfeld & Kolter 2019 (arXiv 1902.02918), figure 1, line by line."""

    def sample(count: int) -> list[int]:
        counts = [0] * 10
        with torch.no_grad():
            while count > 0:
                size = min(PUBLISHED_BATCH, count)
                batch = image.repeat((size, 1, 1, 1))
                noise = torch.randn_like(batch) * sigma
                for label in model(batch + noise).argmax(1).cpu().numpy():
                    counts[label] += 1
                count -= size
        return counts

    selection = sample(N0)
    chosen = selection.index(max(selection))
    k = sample(n)[chosen]
    share = float(beta.ppf(ALPHA, k, n - k + 1)) if k else 0.0
    return (ABSTAIN, 0.0) if share < 0.5 else (chosen, sigma * float(norm.ppf(share)))


def seconds(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall-clock and CPU time of one call; a GPU is waited for."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def race(model: nn.Module, image: Tensor, sigma: float, n: int, rounds: int) -> dict[str, Any]:
    """The three programs on one image, in turn: medians, and the ratios of each round."""
    device, base = image.device, prepare(model, image[None])
    smoothing = Smoothing(sigma, N0, n, ALPHA)
    batch = image + sigma * torch.randn(BLOCK, *image.shape, device=device)
    sizes = [N0, *[BLOCK] * (n // BLOCK), n % BLOCK]

    def floor() -> None:
        with torch.no_grad(), strict_fp32():
            for size in filter(None, sizes):
                base(batch[:size])

    programs: dict[str, Callable[[], object]] = {
        "floor": floor,
        "ours": lambda: certificate(base, image, smoothing, seeded(0, "bench", device=device)),
        "published": lambda: published(model, image, sigma, n),
    }
    for work in programs.values():  # the first calls pay for allocation and kernel selection
        seconds(work, device)
    times = [{name: seconds(work, device) for name, work in programs.items()} for _ in range(rounds)]
    clocks = {"wall": 0, "cpu": 1}
    figures: dict[str, Any] = {
        "n": n,
        "n0": N0,
        "sigma": sigma,
        "alpha": ALPHA,
        "rounds": rounds,
        "precision": precision_of(base),
    }
    for clock, i in clocks.items():
        for name in programs:
            figures[f"{name}_{clock}_ms"] = round(1000 * statistics.median(t[name][i] for t in times), 1)
        for name, over, under in (("to_floor", "ours", "floor"), ("speedup", "published", "ours")):
            ratios = sorted(t[over][i] / t[under][i] for t in times)
            figures[f"{name}_{clock}"] = round(statistics.median(ratios), 3)
            figures[f"{name}_{clock}_middle_half"] = [
                round(ratios[rounds // 4], 3),
                round(ratios[-1 - rounds // 4], 3),
            ]
    return figures


def stages(
    model: nn.Module, images: data.Dataset, sigma: float, radii: list[float], n: int
) -> dict[str, Any]:
    """Samples and decisions of the staged test, beside the fixed test of `n` samples on the same images."""
    base, fixed = prepare(model, images.x[:BLOCK]), Smoothing(sigma, N0, n, ALPHA)
    device = images.x.device
    radius_of = [
        certificate(base, image, fixed, seeded(0, "fixed", i, device=device))[1]
        for i, image in enumerate(images.x)
    ]
    figures: dict[str, Any] = {
        "images": len(images),
        "data": str(images.provenance),
        "sigma": sigma,
        "n": n,
        "alpha": ALPHA,
        "beta": ALPHA,
    }
    for radius in radii:
        found = [
            certified_at(
                base,
                image,
                radius,
                sigma,
                seeded(0, "staged", i, device=device),
                n0=N0,
                alpha=ALPHA,
                beta=ALPHA,
            )
            for i, image in enumerate(images.x)
        ]
        samples = [one.samples for one in found]
        figures[f"radius {radius:g}"] = {
            "certified_fixed": sum(known >= radius for known in radius_of),
            "certified_staged": sum(one.certified for one in found),
            "decided_alike": sum(
                one.certified == (known >= radius) for one, known in zip(found, radius_of, strict=True)
            ),
            "samples_mean": round(statistics.mean(samples)),
            "samples_median": statistics.median(samples),
            "times_fewer": round((n + N0) * len(samples) / sum(samples), 1),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the race (default 15)")
    parser.add_argument("--images", type=int, default=50, help="images for the staged test (default 50)")
    parser.add_argument("--n", type=int, default=10_000, help="samples of a certificate (default 10,000)")
    parser.add_argument("--threads", type=int, default=1, help="of torch's operations (default 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digits = data.load("mnist", "test", limit=options.images, device=device)
    small = models.pretrained("mnist-clean").to(device).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        resnet = models.preact_resnet18(width=16).to(device).eval()
    colours = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    figures = {
        "mnist_cnn": race(small, digits.x[0], 0.25, options.n, options.rounds),
        "preact_resnet18 width 16": race(
            resnet, colours, 0.25, math.ceil(options.n / 10), max(options.rounds // 3, 4)
        ),
        "staged": stages(small, digits, 0.25, [0.25, 0.5, 0.75], 100_000),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "seed": 0,
    }
    print(json.dumps(figures, indent=2))
    print(
        "to_floor: certification over its bare forward passes; speedup: the published algorithm over ours, same n; "
        "times_fewer: samples of the fixed test over those of the staged one. The ResNet's weights are random, "
        "which costs the same.",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
