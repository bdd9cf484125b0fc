"""A child process that evaluates the linear oracle with a journal, and is killed in the midst of it.

    python -m tests.killed JOURNAL RESULT FORWARD

It ends by SIGKILL at the given forward pass of the model, or writes the result if there are not so many.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path

from torch import Tensor

from robustkit.attacks import pgd, rs_fgsm
from robustkit.evaluate import evaluate
from robustkit.results import Evaluation
from robustkit.threat import Ball
from tests.oracle import Linear, linear, linear_data

# Two attacks that draw at random and leave survivors to each other.
ATTACKS = {
    "rs-fgsm": partial(rs_fgsm, step_size=0.3),
    "pgd-2": partial(pgd, steps=2, step_size=0.015, restarts=2),
}


def measured(model: Linear, journal: Path | None, **changes) -> Evaluation:
    """A small evaluation with several batches for each of its attacks."""
    settings = {
        "data": linear_data(linear(), n=100),
        "ball": Ball("Linf", 0.05),
        "attacks": ATTACKS,
        "model_name": "linear",
        "tier": "smoke",
        "seed": 1,
        "batch_size": 20,
        "progress": False,
    } | changes
    return evaluate(model, journal=journal, **settings)


class Mortal(Linear):
    """The linear model, whose process is killed at its last forward pass, its copies' passes counted in."""

    left = sys.maxsize

    def forward(self, x: Tensor) -> Tensor:
        Mortal.left -= 1
        if Mortal.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def main(journal: str, result: str, forward: str) -> None:
    model = Mortal(linear().w.detach(), float(linear().b.detach())).eval()
    Mortal.left = int(forward)
    Path(result).write_text(measured(model, Path(journal)).to_json())


if __name__ == "__main__":
    main(*sys.argv[1:])
