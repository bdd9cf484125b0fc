"""Projected gradient descent: the standard first-order attack."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.attacks.gradient import check_schedule, checked, input_gradient, score, worst_case
from robustkit.device import Model, attackable, confirmed
from robustkit.losses import Loss, cross_entropy
from robustkit.threat import Ball, check_batch


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
    loss: Loss = cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`steps` projected steepest-ascent steps from a random start; the worst of `restarts` runs.

    Source: Madry et al. 2018 (arXiv 1706.06083), section 2.1. Differences: a restart is spent only on
    examples that no earlier one fooled, and among failures the candidate of highest loss is kept.
    Shapes: x (n, ...), y (n,) -> (n, ...). Units: inputs in [0, 1]; `step_size` in input units,
    2.5 * eps / steps where it is not given, so that any point of the ball can be reached.
    Randomness: the starts, from `generator` alone; `start` replaces them by given images.
    Raises: RobustkitError on a batch outside [0, 1], steps or restarts below 1, a start outside the
    ball, restarts from one given start, or unusable logits.
    """
    check_batch(x, y)
    check_schedule(x, ball, steps, restarts, start)
    step = 2.5 * ball.eps / steps if step_size is None else step_size

    def attempt(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        clean, labels = x[rows], y[rows]
        points = ball.candidates(clean, ball.random(clean, generator)) if start is None else start
        for i in range(steps):
            _, _, gradient = input_gradient(model, points, checked(loss) if i == 0 else loss, labels)
            points = ball.candidates(clean, points - clean + step * ball.steepest(gradient))
        logits, losses = score(model, points, checked(loss), labels)
        return points, losses, confirmed(model, points, labels, logits.argmax(1) != labels)

    with attackable(model):
        return worst_case(x, [attempt] * restarts)
