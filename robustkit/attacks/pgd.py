"""Projected gradient descent: the standard first-order attack, and its form for evaluations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustkit.attacks.gradient import (
    check_schedule,
    check_target,
    checked,
    input_gradient,
    score,
    worst_case,
)
from robustkit.device import Model, attackable, confirmed
from robustkit.losses import Loss, cross_entropy, towards
from robustkit.threat import Ball, check_batch, check_logits


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 1,
    start: Tensor | None = None,
    target: Tensor | None = None,
    loss: Loss = cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`steps` projected steepest-ascent steps from a random start; the worst of `restarts` runs.

    Source: Madry et al. 2018 (arXiv 1706.06083), section 2.1. Differences: a restart is spent only on
    examples that no earlier one fooled, and among failures the candidate of highest loss is kept.
    With `target`, a class for each example, the loss of that class is descended instead. What counts
    stays the same, any mistake: robustness is to all of them, and a target is a direction to look in.
    Shapes: x (n, ...), y (n,), target (n,) -> (n, ...). Units: inputs in [0, 1]; `step_size` in input
    units, 2.5 * eps / steps where it is not given, so that any point of the ball can be reached.
    Randomness: the starts, from `generator` alone; `start` replaces them by given images.
    Raises: RobustkitError on a batch outside [0, 1], steps or restarts below 1, a start outside the
    ball, restarts from one given start, a target that is the true class, or unusable logits.
    """
    return _pgd(model, x, y, ball, steps, step_size, restarts, start, target, loss, generator, _nobody)


def early_stopped_pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 1,
    start: Tensor | None = None,
    target: Tensor | None = None,
    loss: Loss = cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:
    """PGD for evaluations: an example leaves the batch with the first point that fools the model.

    At least as strong as `pgd` from the same starts, whose last point may have lost what an earlier one
    had, and it costs only the passes of those that still resist. Not for training, which wants every
    example's last point. The others' course is the same with and without those that left.
    A success on a prepared model counts once the model itself confirms it.
    Source, shapes, units, randomness, raises: as `pgd`.
    """
    return _pgd(model, x, y, ball, steps, step_size, restarts, start, target, loss, generator, _fooled)


# Says which examples may leave the batch, given the model, their points, labels and logits.
Leaving = Callable[[Model, Tensor, Tensor, Tensor], Tensor | None]


def _nobody(model: Model, points: Tensor, y: Tensor, logits: Tensor) -> None:
    return None


def _fooled(model: Model, points: Tensor, y: Tensor, logits: Tensor) -> Tensor | None:
    claimed = logits.argmax(1) != y
    if not claimed.any():
        return None
    check_logits(logits[claimed], y[claimed])  # the largest of NaN logits is whichever comes first
    return confirmed(model, points, y, claimed)


def _pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    steps: int,
    step_size: float | None,
    restarts: int,
    start: Tensor | None,
    target: Tensor | None,
    loss: Loss,
    generator: torch.Generator | None,
    leaving: Leaving,
) -> Tensor:
    check_batch(x, y)
    check_schedule(x, ball, steps, restarts, start)
    goal: tuple[Callable[..., Tensor], tuple[Tensor, ...]] = (loss, (y,))
    if target is not None:
        check_target(y, target)
        goal = (towards(loss), (y, target))
    objective, labels_of_all = goal
    step = 2.5 * ball.eps / steps if step_size is None else step_size

    def run(rows: Tensor) -> Tensor:
        """The points of one run: each example's last one, or the one with which it left."""
        clean, labels = x[rows], tuple(label[rows] for label in labels_of_all)
        points = ball.candidates(clean, ball.random(clean, generator)) if start is None else start
        left_with, row = points.clone(), torch.arange(len(rows), device=x.device)
        for i in range(steps):
            measure = checked(objective) if i in (0, steps - 1) else objective
            logits, _, gradient = input_gradient(model, points, measure, *labels)
            gone = leaving(model, points, labels[0], logits)
            if gone is not None and gone.any():
                left_with[row[gone]] = points[gone]
                row, clean, points, gradient = (kept[~gone] for kept in (row, clean, points, gradient))
                labels = tuple(label[~gone] for label in labels)
                if len(row) == 0:
                    break
            delta = (points - clean).add_(ball.steepest(gradient), alpha=step)
            points = ball.candidates(clean, delta)
        left_with[row] = points
        return left_with

    def attempt(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        points = run(rows)
        logits, losses = score(model, points, checked(objective), *(label[rows] for label in labels_of_all))
        return points, losses, confirmed(model, points, y[rows], logits.argmax(1) != y[rows])

    with attackable(model):
        if restarts == 1:  # nothing to compare with: the verdict is the evaluator's
            return run(torch.arange(len(x), device=x.device))
        return worst_case(x, [attempt] * restarts)
