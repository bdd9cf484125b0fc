"""Defences: one function per recipe, from a batch to the scalar loss that training minimises.

    defence(model, x, y, ball, generator) -> Tensor

`train` calls it with the model in train mode. Candidates are made in eval mode by the attack, which
puts the modes back; the loss is computed in train mode. The measured figures stand in the table of
README.md, with n, intervals and provenance; `make demo` and lesson 1 reproduce them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.attacks import fgsm, pgd, rs_fgsm
from robustkit.certify.training import consistency, crown_ibp, gaussian, ibp, smooth_adv
from robustkit.threat import Ball

Defence = Callable[[nn.Module, Tensor, Tensor, Ball, torch.Generator], Tensor]


def clean(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """No defence: cross-entropy on the images as they are. The ball is ignored."""
    return F.cross_entropy(model(x), y)


def fgsm_at(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """Adversarial training against FGSM from the image itself: fast, and not to be trusted.

    Source: Goodfellow et al. 2015 (arXiv 1412.6572), section 6, here without the clean half of the
    loss. It learns to mask its gradient (catastrophic overfitting, label leaking): its FGSM accuracy
    says nothing. Lesson 1 measures this over seeds.
    """
    return F.cross_entropy(model(fgsm(model, x, y, ball)), y)


def rs_fgsm_at(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """Adversarial training against one step from a random start: nearly as cheap, usually honest.

    Source: Wong, Rice & Kolter 2020 (arXiv 2001.03994), algorithm 3, step 1.25 eps.
    """
    return F.cross_entropy(model(rs_fgsm(model, x, y, ball, generator=generator)), y)


def pgd_at(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    generator: torch.Generator,
    *,
    steps: int,
    step_size: float,
) -> Tensor:
    """Adversarial training against PGD, the standard empirical defence; `step_size` in units of eps.

    Source: Madry et al. 2018 (arXiv 1706.06083), section 2.1.
    """
    candidates = pgd(model, x, y, ball, steps=steps, step_size=step_size * ball.eps, generator=generator)
    return F.cross_entropy(model(candidates), y)


DEFENCES: dict[str, Defence] = {
    "clean": clean,
    "fgsm-at": fgsm_at,
    "rs-fgsm-at": rs_fgsm_at,
    "pgd-at": partial(pgd_at, steps=5, step_size=0.4),
    "gaussian-0.25": partial(gaussian, sigma=0.25),
    "gaussian-0.5": partial(gaussian, sigma=0.5),
    "consistency-0.25": partial(consistency, sigma=0.25, weight=10.0),
    "consistency-0.5": partial(consistency, sigma=0.5, weight=5.0),
    "smoothadv-0.25": partial(smooth_adv, sigma=0.25),
    "ibp-0.1": partial(ibp, full_eps=0.1),
    "crown-ibp-0.1": partial(crown_ibp, full_eps=0.1),
}
