"""Transfer: candidates found on another model."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from robustkit.attacks import Attack
from robustkit.device import Model
from robustkit.threat import PerturbationSet


def transfer(surrogate: Model, attack: Attack) -> Attack:
    """An attack that runs `attack` on `surrogate` and never asks the model that is judged.

    Source: Papernot, McDaniel & Goodfellow 2016 (arXiv 1605.07277). The attacker's knowledge is
    "transfer". With the judged model itself, wrapped, as the surrogate (`robustkit.wrappers`) it is an
    adaptive attack, and the knowledge is "white-box": `transfer(EOT(model, 20), pgd)` searches on the
    average and is judged on the model.
    Shapes, units, randomness, raises: those of `attack`.
    """
    return partial(on_surrogate, surrogate, attack)


def on_surrogate(
    surrogate: Model,
    attack: Attack,
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: PerturbationSet,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What `transfer` calls: at the top level, so that a transfer attack can be sent to a worker."""
    return attack(surrogate, x, y, ball, generator=generator)
