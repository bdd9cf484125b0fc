"""What the tests of `robustkit.scale` run in processes of their own: one rank of two.

python -m tests.ranked FOLDER (whole|memory|raise|kill|train|train-kill|uneven)...
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch

from robustkit import scale
from robustkit import train as training
from robustkit.attacks import pgd, rs_fgsm
from robustkit.defences import rs_fgsm_at
from robustkit.errors import RobustkitError
from robustkit.evaluate import evaluate, in_turn
from robustkit.results import Evaluation
from robustkit.threat import Ball
from robustkit.train import Schedule
from tests.oracle import linear, linear_data
from tests.test_train import restless


class Failing:
    """PGD, but the second batch that rank 1 meets is its last."""

    def __init__(self, how: str) -> None:
        self.how, self.met = how, 0

    def __call__(self, model, x, y, ball, *, generator=None):
        self.met += 1
        if scale.rank() == 1 and self.met == 2:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "memory":
                raise torch.OutOfMemoryError("no room for so many images")
            raise RobustkitError("the second batch is a bad one; leave it out.")
        return pgd(model, x, y, ball, steps=3, generator=generator)


@dataclass(frozen=True)
class Watched:
    """PGD that takes its time, and leaves a file when it begins with a batch and another when it is done.

    A process for which there is a file `hold-PID` stays in its batch for as long.
    """

    folder: Path

    def __call__(self, model, x, y, ball, *, generator=None):
        name = f"{os.getpid()}-{int(x.sum() * 1e6)}"
        (self.folder / f"{name}-begun").touch()
        time.sleep(0.15)
        while (self.folder / f"hold-{os.getpid()}").exists():
            time.sleep(0.01)
        candidates = pgd(model, x, y, ball, steps=3, generator=generator)
        (self.folder / f"{name}-done").touch()
        return candidates


def measured(last=pgd, runner=in_turn) -> Evaluation:
    """Two attacks over batches of 9 images: an odd number of jobs, the last one short."""
    model = linear()
    attacks = {"rs-fgsm": rs_fgsm, "last": partial(last, steps=3) if last is pgd else last}
    settings = {"model_name": "linear", "tier": "smoke", "batch_size": 9, "progress": False}
    return evaluate(model, linear_data(model, n=100), Ball("Linf", 0.02), attacks, runner=runner, **settings)


def trained(run_dir: Path, *, shards: int = 4, last_step: int = -1) -> None:
    """Batch statistics, dropout, a random start, averaged weights; rank 1 dies in `last_step`."""
    steps = count()

    def defence(model, x, y, ball, generator):
        if scale.rank() == 1 and next(steps) == last_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return rs_fgsm_at(model, x, y, ball, generator)

    model, data = restless(), linear_data(linear(), n=66)
    schedule = Schedule(2, 22, eps_warmup=0.5, shards=shards, ema=0.9)  # 22 images are 6, 6, 5 and 5
    held_out = linear_data(linear(), seed=1, n=40)
    training.train(
        model, data, defence, Ball("Linf", 0.05), schedule, held_out=held_out, run_dir=run_dir, progress=False
    )


def main(folder: Path, how: str) -> None:
    training.CHECKPOINT_SECONDS = -1.0
    if how == "uneven":
        trained(folder / "run", shards=3)
    elif how.startswith("train"):
        trained(
            folder / "run", last_step=10 if how == "train-kill" else -1
        )  # two shards a step, three batches to settle the average by: in the fourth step
    else:
        found = measured(pgd if how == "whole" else Failing(how), scale.ranks)
        (folder / f"{how}-{scale.rank()}.json").write_text(found.to_json())


if __name__ == "__main__":
    try:
        with (
            scale.joined()
        ):  # once: to meet again at the same port, one rank may find what the other is about to leave
            for how in sys.argv[2:]:
                main(Path(sys.argv[1]), how)
    except RobustkitError as error:
        sys.exit(f"robustkit: {error}")
