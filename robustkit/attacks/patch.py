"""A patch: one square of each image, its place drawn and its pixels found by ascent."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.attacks.gradient import checked, input_gradient, score, worst_case
from robustkit.device import Model, attackable, confirmed
from robustkit.errors import RobustkitError
from robustkit.losses import cross_entropy
from robustkit.threat import Patch, PerturbationSet, check_batch


def patch_pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: PerturbationSet,
    *,
    steps: int = 20,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`steps` signed steps on the pixels of one square, at a drawn place; the worst of `restarts` places.

    A square that a model withstands at these places may fool it at others: an upper bound, as every
    attack gives.
    Source: Brown et al. 2017 (arXiv 1712.09665) for the patch; PGD as in Madry et al. 2018. Steps of 2.5 /
    `steps`, so that any grey level can be reached.
    Shapes: x (n, channels, height, width), y (n,) -> as x. Units: inputs in [0, 1].
    Randomness: places and first pixels, from `generator` alone.
    Raises: RobustkitError unless `ball` is a Patch no larger than the images in [0, 1], on steps or restarts
    below 1, and on unusable logits.
    """
    check_batch(x, y)
    if not isinstance(ball, Patch):
        raise RobustkitError(f"a patch attack needs a Patch; got {ball}. Give Patch(side=8).")
    if steps < 1 or restarts < 1:
        raise RobustkitError(f"steps and restarts must be at least 1; got {steps} and {restarts}.")
    if x.dim() != 4 or min(x.shape[2:]) < ball.side:
        raise RobustkitError(
            f"{ball} needs images of shape (n, channels, height, width) no smaller than it; got {tuple(x.shape)}."
        )

    def run(rows: Tensor) -> Tensor:
        clean, labels = x[rows], y[rows]
        where = _squares(clean, ball.side, generator)
        start = torch.rand(clean.shape, generator=generator, device=x.device, dtype=x.dtype)
        points = torch.where(where, start, clean)
        for i in range(steps):
            measure = checked(cross_entropy) if i in (0, steps - 1) else cross_entropy
            _, _, gradient = input_gradient(model, points, measure, labels)
            points = torch.where(where, (points + 2.5 / steps * gradient.sign()).clamp(0, 1), clean)
        return points

    def attempt(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        points = run(rows)
        logits, losses = score(model, points, checked(cross_entropy), y[rows])
        return points, losses, confirmed(model, points, y[rows], logits.argmax(1) != y[rows])

    with attackable(model):
        if restarts == 1:
            return run(torch.arange(len(x), device=x.device))
        return worst_case(x, [attempt] * restarts)


def _squares(x: Tensor, side: int, generator: torch.Generator | None) -> Tensor:
    """One square for each image, uniformly over its places. Shapes: -> bool (n, 1, height, width)."""
    masks = []
    for length in x.shape[2:]:
        first = torch.randint(length - side + 1, (len(x), 1), generator=generator, device=x.device)
        place = torch.arange(length, device=x.device)
        masks.append((place >= first) & (place < first + side))
    return (masks[0][:, :, None] & masks[1][:, None, :])[:, None]
