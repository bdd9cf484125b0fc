"""Attacks: functions from a batch to candidates, one file each.

    attack(model, x, y, ball, *, generator=None, ...) -> Tensor

`model` maps images in [0, 1] to logits. `x` goes in, candidates come out; an attack never says
whether it succeeded, the evaluator does. Gradients are taken for the input alone; parameters, modes,
`x` and the global random state are left as they were. Randomness comes from `generator` alone.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from robustkit.device import Model


class Attack(Protocol):
    """What `evaluate` and the adversarial-training losses call.

    `ball` is a `Ball` for most, a `RotationTranslation` for the spatial ones, a `Patch` for `patch_pgd`; each
    refuses the others'.
    """

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, ball: Any, *, generator: torch.Generator | None = None
    ) -> Tensor: ...


from robustkit.attacks.apgd import apgd, apgd_targeted  # noqa: E402
from robustkit.attacks.fab import fab_targeted  # noqa: E402
from robustkit.attacks.fgsm import fgsm, rs_fgsm  # noqa: E402
from robustkit.attacks.noise import noise  # noqa: E402
from robustkit.attacks.patch import patch_pgd  # noqa: E402
from robustkit.attacks.pgd import early_stopped_pgd, pgd  # noqa: E402
from robustkit.attacks.spatial import spatial_grid, spatial_random  # noqa: E402
from robustkit.attacks.square import square  # noqa: E402
from robustkit.attacks.transfer import transfer  # noqa: E402

__all__ = [
    "Attack",
    "apgd",
    "apgd_targeted",
    "early_stopped_pgd",
    "fab_targeted",
    "fgsm",
    "noise",
    "patch_pgd",
    "pgd",
    "rs_fgsm",
    "spatial_grid",
    "spatial_random",
    "square",
    "transfer",
]
