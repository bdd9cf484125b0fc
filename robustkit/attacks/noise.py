"""Uniform noise: the baseline that every other attack must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.attacks.search import random_search
from robustkit.device import Model
from robustkit.threat import Ball


def noise(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    draws: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The worst of `draws` points drawn uniformly from the ball, clamped into the box.

    A point that noise breaks and a gradient attack does not is a sign of masked gradients (Carlini et
    al. 2019, arXiv 1902.06705, section 4).
    Shapes: x (n, ...), y (n,) -> (n, ...). Units: inputs in [0, 1].
    Randomness: `generator` alone.
    Raises: RobustkitError on a batch outside [0, 1], fewer than one draw, or unusable logits.
    """

    def propose(query: int, clean: Tensor, best: Tensor) -> Tensor:
        return ball.candidates(clean, ball.random(clean, generator))

    return random_search(model, x, y, draws, propose)
