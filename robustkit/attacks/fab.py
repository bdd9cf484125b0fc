"""Fast adaptive boundary attack, targeted: the nearest point that fools the model, not the worst in a ball."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from robustkit.attacks.gradient import Attempt, check_schedule, input_gradient, likeliest, worst_case
from robustkit.device import Model, attackable, confirmed
from robustkit.threat import Ball, check_batch, check_logits, per_example

ETA, BETA, ALPHA_MAX = 1.05, 0.9, 0.1  # beyond the boundary, back towards the image, pull of the image


def fab_targeted(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 100,
    targets: int = 9,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Along the boundary with each of the `targets` likeliest wrong classes, to where it is nearest to the image.

    Each step goes to the hyperplane that stands for the boundary here, between its points that are nearest
    to the present point and to the image, and a little beyond; a point that fools the model goes a tenth of
    the way back. As no loss is climbed, it looks where gradients are too small to climb by.
    Source: Croce & Hein 2020 (arXiv 1907.02044), algorithm 1 with one class, and that paper's and AutoAttack's
    parameters; without random restarts and final search, as in AutoAttack. Differences: a point that is
    confirmed to fool the model inside the ball leaves the batch, since nearer ones count no more; projections
    search the zero of a concave function where the authors' code sorts.
    Shapes: x (n, ...), y (n,) -> (n, ...): the point that fools the model inside the ball, else the nearest that
    fooled it outside, projected into the ball. Units: inputs in [0, 1]. Randomness: none.
    Raises: RobustkitError on a batch outside [0, 1], steps or targets below 1, or unusable logits.
    """
    check_batch(x, y)
    check_schedule(x, ball, steps, 1, None)

    def attempt(target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _run(model, x[rows], torch.stack([y[rows], target[rows]], 1), ball, steps)

    with attackable(model):
        attempts: list[Attempt] = [partial(attempt, target) for target in likeliest(model, x, y, targets)]
        return worst_case(x, attempts)


def lead(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """How far the target's logit is above the true one. Shapes: (n, classes), (n,), (n,) -> (n,)."""
    chosen = logits.gather(1, torch.stack([y, target], 1))
    return chosen[:, 1] - chosen[:, 0]


def _run(model: Model, x: Tensor, labels: Tensor, ball: Ball, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """One walk from the images: candidates, minus their distance, and whether they fool inside the ball."""
    nearest, distance = x.clone(), torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)
    broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    row = torch.arange(len(x), device=x.device)
    clean = points = x
    for step in range(steps + 1):
        y = labels[:, 0]
        with torch.no_grad():
            logits = model(points)
        if step in (0, steps):
            check_logits(logits, y)
        fooled, size = logits.argmax(1) != y, ball.size(points - clean)
        inside = confirmed(model, points, y, fooled & (size <= ball.eps))
        better = inside | (fooled & (size < distance[row]))
        nearest[row[better]], distance[row[better]] = points[better], size[better]
        if inside.any():
            broken[row[inside]] = True
            row, clean, points, labels, fooled = (
                kept[~inside] for kept in (row, clean, points, labels, fooled)
            )
        if step == steps or len(row) == 0:
            break
        share = torch.where(fooled, BETA, 1.0).to(x.dtype)
        points = torch.lerp(clean, points, per_example(share, x))
        _, gap, gradient = input_gradient(model, points, lead, *labels.unbind(1))
        points = _step(points, clean, gap, gradient, ball)
    candidates = torch.where(per_example(broken, x), nearest, ball.candidates(x, nearest - x))
    return candidates, -distance, broken


def _step(points: Tensor, clean: Tensor, gap: Tensor, gradient: Tensor, ball: Ball) -> Tensor:
    """Onto the hyperplane where the lead would be zero, from the point and from the image, mixed."""
    bases, normal = torch.stack([points, clean]).flatten(2), gradient.flatten(1)
    gaps = torch.stack([gap, gap + ((clean - points).flatten(1) * normal).sum(1)])
    steps = onto_hyperplane(bases, gaps, normal, ball.norm)
    from_point, from_clean = (ball.size(step).clamp_min(1e-8) for step in steps)
    alpha = (from_point / (from_point + from_clean)).clamp_max(ALPHA_MAX)
    ahead, anew = (bases + ETA * steps).unbind()
    return torch.lerp(ahead, anew, alpha[:, None]).clamp_(0, 1).view_as(points)


def onto_hyperplane(x: Tensor, gap: Tensor, normal: Tensor, norm: str) -> Tensor:
    """The smallest step from `x` to the hyperplane gap + <normal, step> = 0 that stays in the box [0, 1].

    Where the box does not reach the hyperplane, the step that comes nearest to it.
    Source: Croce & Hein 2020 (arXiv 1907.02044), section 2.2. Coordinates move by a common amount (Linf), by one
    in proportion to the normal (L2), or one after the other from the largest of it (L1), as far as the wall.
    Shapes: x (..., n, d), gap (..., n), normal (n, d) -> as x.
    """
    towards, need = -gap.sign()[..., None] * normal.sign(), gap.abs()[..., None]
    weight, wall = normal.abs(), torch.gt(towards, 0, out=torch.empty_like(x))
    room = (wall - x).abs()
    if norm == "L1":
        weight, order = weight.expand_as(x).sort(-1, descending=True)
        gain = weight * room.gather(-1, order)
        left = (need - gain.cumsum(-1) + gain).clamp_min(0)
        size = torch.empty_like(x).scatter(-1, order, left / weight.clamp_min(1e-30)).minimum(room)
    elif norm == "L2":
        weight = weight.clamp_min(1e-15)  # its square must not underflow
        size = weight * _common(room / weight, weight.square(), need)
    else:
        size = _common(room, weight, need)
    return towards * size


def _common(limit: Tensor, pull: Tensor, need: Tensor) -> Tensor:
    """`limit`, cut at the one amount with which sum(pull * limit) is as large as `need`.

    Newton's method on a function that is concave and piecewise linear: from zero it never overshoots, and
    ends on the piece that holds the answer. Shapes: limit (..., n, d), pull (n, d), need (..., n, 1) -> as limit.
    """
    reach, amount, free = pull * limit, torch.zeros_like(need), torch.empty_like(limit)
    for _ in range(limit.shape[-1] + 1):
        torch.gt(limit, amount, out=free)
        short = need - (reach - free * reach).sum(-1, keepdim=True)
        further = short / (free * pull).sum(-1, keepdim=True).clamp_min(1e-30)
        if (further <= amount * (1 + 1e-6)).all():
            break
        amount = amount.maximum(further)
    return limit.minimum(amount)
