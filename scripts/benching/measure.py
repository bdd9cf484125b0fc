"""Seconds, passes, memory."""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benching.contestants import Run
from robustkit.device import Prepared
from robustkit.evaluate import predict
from robustkit.results import Interval


class Bar(Protocol):
    """What is asked of a progress bar."""

    def set_postfix_str(self, s: str) -> object: ...

    def update(self) -> object: ...


@dataclass(frozen=True)
class Timing:
    """One contestant: seconds of each round, and how many images of all rounds survived."""

    seconds: tuple[float, ...]
    robust: Interval


def _timed(run: Run, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """A GPU is waited for, before and after."""
    wait: Callable[[], Any] = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    found = run(x, y)
    wait()
    return time.perf_counter() - start, found.detach()


def interleaved(
    model: nn.Module, runs: Mapping[str, Run], x: Tensor, y: Tensor, rounds: int, seed: int, bar: Bar
) -> dict[str, Timing]:
    """Every contestant on the same part of the images, round after round, in an order drawn anew each time.

    What slows the machine for a while slows all of a round, and ratios are taken within rounds.
    """
    parts = list(zip(x.chunk(rounds), y.chunk(rounds), strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    survived: dict[str, int] = dict.fromkeys(runs, 0)
    shuffled = random.Random(seed)
    for name, run in runs.items():  # the first calls pay for allocation and kernel selection
        bar.set_postfix_str(f"{name}, warming up")
        run(parts[0][0][:32], parts[0][1][:32])
    for images, labels in parts:
        for name in shuffled.sample(list(runs), len(runs)):
            bar.set_postfix_str(name)
            taken, found = _timed(runs[name], images, labels)
            seconds[name].append(taken)
            survived[name] += int(predict(model, found, labels).sum())
            bar.update()
    return {name: Timing(tuple(seconds[name]), Interval(survived[name], len(x))) for name in runs}


def ratio(of: Timing, to: Timing) -> list[float]:
    """Lower quartile, median and upper quartile of the rounds' ratios."""
    ratios = [a / b for a, b in zip(of.seconds, to.seconds, strict=True)]
    return list(statistics.quantiles(ratios, n=4, method="inclusive")) if len(ratios) > 1 else ratios * 3


class Counting(nn.Module):
    """A model that counts the images that pass through it forwards and backwards."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits: Tensor = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._back)
        return logits

    def _back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def counted(model: Any) -> tuple[nn.Module, Callable[[], tuple[int, int]]]:
    """A model to count on, and what to ask afterwards; strict passes of a prepared model count as passes."""
    counters = [
        Counting(part) for part in ((model.search, model.strict) if isinstance(model, Prepared) else (model,))
    ]
    handed: nn.Module = Prepared(*counters) if len(counters) == 2 else counters[0]
    return handed, lambda: (sum(c.forwards for c in counters), sum(c.backwards for c in counters))


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that `work` takes beyond what was in use before it (on Linux, or a GPU)."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there to be used again
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")
