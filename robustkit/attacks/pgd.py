"""Projected gradient descent: the standard first-order attack."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.attacks.gradient import input_gradient
from robustkit.device import Model, attackable
from robustkit.errors import RobustkitError
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
    if steps < 1 or restarts < 1:
        raise RobustkitError(f"steps and restarts must be at least 1; got {steps} and {restarts}.")
    if start is not None and restarts > 1:
        raise RobustkitError(f"{restarts} restarts from one given start are the same run; leave `start` out.")
    if start is not None and not ball.contains(x, start).all():
        raise RobustkitError(f"start must lie within {ball} of x; project it with Ball.candidates first.")
    step = 2.5 * ball.eps / steps if step_size is None else step_size
    best, highest = x.clone(), torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)
    left = torch.arange(len(x), device=x.device)
    with attackable(model):
        for _ in range(restarts):
            clean, labels = x[left], y[left]
            points = ball.candidates(clean, ball.random(clean, generator)) if start is None else start
            for _ in range(steps):
                _, gradient = input_gradient(model, points, labels, loss)
                points = ball.candidates(clean, points - clean + step * ball.steepest(gradient))
            with torch.no_grad():
                logits = model(points)
                losses, fooled = loss(logits, labels), logits.argmax(1) != labels
            better = fooled | (losses > highest[left])
            best[left[better]], highest[left[better]] = points[better], losses[better]
            left = left[~fooled]
            if len(left) == 0:
                break
    return best
