"""Rotation and translation: the whole lattice, or the worst of some random points of it."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.attacks.search import random_search
from robustkit.device import Model
from robustkit.errors import RobustkitError
from robustkit.threat import PerturbationSet, RotationTranslation


def spatial_grid(
    model: Model, x: Tensor, y: Tensor, ball: PerturbationSet, *, generator: torch.Generator | None = None
) -> Tensor:
    """Every transform of the lattice: what it does not break, no transform of the lattice breaks.

    Source: Engstrom et al. 2019 (arXiv 1712.02779), section 3.2, grid search; 775 queries per example.
    Shapes: x (n, channels, height, width), y (n,) -> as x. Units: `ball` in degrees and pixels.
    Randomness: none; `generator` is there so that every attack is called alike.
    Raises: RobustkitError unless `ball` is a RotationTranslation and x holds images in [0, 1], or on
    unusable logits.
    """
    threat = _spatial(ball)
    lattice = threat.transforms().to(x)

    def propose(query: int, clean: Tensor, best: Tensor) -> Tensor:
        return threat.transformed(clean, lattice[query].expand(len(clean), 3))

    return random_search(model, x, y, len(lattice), propose)


def spatial_random(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: PerturbationSet,
    *,
    draws: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The worst of `draws` transforms, drawn uniformly from the lattice for each example on its own.

    Source: Engstrom et al. 2019 (arXiv 1712.02779), section 3.2, worst-of-k with k = 10.
    Shapes, units: as `spatial_grid`. Randomness: `generator` alone. Raises: as `spatial_grid`, and for
    fewer than one draw.
    """
    threat = _spatial(ball)
    lattice = threat.transforms().to(x)

    def propose(query: int, clean: Tensor, best: Tensor) -> Tensor:
        rows = torch.randint(len(lattice), (len(clean),), generator=generator, device=clean.device)
        return threat.transformed(clean, lattice[rows])

    return random_search(model, x, y, draws, propose)


def _spatial(ball: PerturbationSet) -> RotationTranslation:
    if not isinstance(ball, RotationTranslation):
        raise RobustkitError(
            f"a spatial attack needs a RotationTranslation; got a ball, {ball}. "
            "Give RotationTranslation(degrees=30, pixels=3)."
        )
    return ball
