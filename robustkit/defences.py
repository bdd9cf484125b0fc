"""Defences: functions from a batch to the loss that training minimises.

Signature: (model, images, labels, ball, generator) -> scalar. The attack inside looks at the model in
eval mode, the deployed one; the loss is taken in train mode. The measured figures stand in the table of
README.md, with n, intervals and provenance; `make demo` and lesson 1 reproduce them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.attacks import fgsm, pgd, rs_fgsm
from robustkit.attacks.gradient import input_gradient
from robustkit.certify.training import consistency, crown_ibp, gaussian, ibp, smooth_adv
from robustkit.device import attackable
from robustkit.losses import cross_entropy
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


def rs_fgsm_at(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    generator: torch.Generator,
    *,
    step_size: float = 1.25,
) -> Tensor:
    """Adversarial training against one step from a random start: nearly as cheap, usually honest.

    Source: Wong, Rice & Kolter 2020 (arXiv 2001.03994), algorithm 3, step 1.25 eps; in L2 Rice, Wong &
    Kolter 2020 (arXiv 2002.11569) take 0.875 eps.
    """
    candidates = rs_fgsm(model, x, y, ball, step_size=step_size, generator=generator)
    return F.cross_entropy(model(candidates), y)


def n_fgsm_at(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """Adversarial training on noise of twice the ball's size and one step on top, projected onto the box alone.

    The points it trains on lie outside the ball, which is what keeps it from catastrophic overfitting: this
    is no attack of the threat model.
    Source: de Jorge et al. 2022 (arXiv 2202.01181), algorithm 1, noise 2 eps, step eps.
    """
    noisy = (x + Ball(ball.norm, 2 * ball.eps).random(x, generator)).clamp(0, 1)
    with attackable(model):
        _, _, gradient = input_gradient(model, noisy, cross_entropy, y)
    return F.cross_entropy(model((noisy + ball.eps * ball.steepest(gradient)).clamp(0, 1)), y)


def pgd_at(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    generator: torch.Generator,
    *,
    steps: int,
    step_size: float,
    label_smoothing: float = 0.0,
    awp: float = 0.0,
) -> Tensor:
    """Adversarial training against PGD, the standard empirical defence; `step_size` in units of eps.

    With `awp` the weights are attacked as well, see `worst_weights`.
    Source: Madry et al. 2018 (arXiv 1706.06083), section 2.1.
    """
    candidates = pgd(model, x, y, ball, steps=steps, step_size=step_size * ball.eps, generator=generator)
    return worst_weights(
        model, lambda m: F.cross_entropy(m(candidates), y, label_smoothing=label_smoothing), awp
    )


def trades(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    generator: torch.Generator,
    *,
    steps: int,
    step_size: float,
    beta: float = 6.0,
    awp: float = 0.0,
) -> Tensor:
    """Cross-entropy on the images, plus `beta` times how far the worst candidate's prediction is from theirs.

    Source: Zhang et al. 2019 (arXiv 1901.08573), equation 5 with the Kullback-Leibler divergence, from a
    Gaussian start of 0.001. Differences: images and candidates pass in one batch, so that BatchNorm sees
    their mixture; `step_size` in units of eps; `awp` as in `pgd_at`.
    """
    with attackable(model), torch.no_grad():
        untouched = F.softmax(model(x), 1)

    def divergence(logits: Tensor, _: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(logits, 1), untouched, reduction="none").sum(1)

    start = ball.candidates(x, 0.001 * torch.empty_like(x).normal_(generator=generator))
    candidates = pgd(
        model, x, y, ball, steps=steps, step_size=step_size * ball.eps, start=start, loss=divergence
    )

    def loss(m: Callable[[Tensor], Tensor]) -> Tensor:
        natural, attacked = m(torch.cat([x, candidates])).chunk(2)
        apart = F.kl_div(F.log_softmax(attacked, 1), F.softmax(natural, 1), reduction="batchmean")
        return F.cross_entropy(natural, y) + beta * apart

    return worst_weights(model, loss, awp)


def worst_weights(
    model: nn.Module, loss: Callable[[Callable[[Tensor], Tensor]], Tensor], gamma: float
) -> Tensor:
    """`loss` of the model at nearby weights where it is larger; its gradient there is that of the weights.

    Adversarial weight perturbation: each weight tensor moves along its gradient by `gamma` times its own
    norm. BatchNorm's running statistics see the second pass alone. With `gamma` 0 the loss at the weights.
    Source: Wu, Xia & Wang 2020 (arXiv 2004.05884), equations 8 to 10, one step; like its authors' code,
    biases and norms' scales stay.
    """
    if gamma == 0:
        return loss(model)
    weights = {name: value for name, value in model.named_parameters() if value.dim() > 1}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with torch.enable_grad():
        here = loss(partial(_call, model, buffers))
        gradients = torch.autograd.grad(here, list(weights.values()))
    moved = {
        name: value + gamma * value.detach().norm() / gradient.norm().clamp_min(1e-12) * gradient
        for (name, value), gradient in zip(weights.items(), gradients, strict=True)
    }
    return loss(partial(_call, model, moved))


def _call(model: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """The model at `x` with some of its parameters and buffers replaced."""
    logits: Tensor = torch.func.functional_call(model, tensors, (x,))
    return logits


DEFENCES: dict[str, Defence] = {
    "clean": clean,
    "fgsm-at": fgsm_at,
    "rs-fgsm-at": rs_fgsm_at,
    "one-step-l2-at": partial(rs_fgsm_at, step_size=0.875),
    "n-fgsm-at": n_fgsm_at,
    "pgd-at": partial(pgd_at, steps=5, step_size=0.4),
    "pgd-2-at": partial(pgd_at, steps=2, step_size=0.7, label_smoothing=0.1),
    "pgd-10-l2-at": partial(pgd_at, steps=10, step_size=15 / 128, label_smoothing=0.1),
    "pgd-10-l2-awp": partial(pgd_at, steps=10, step_size=15 / 128, label_smoothing=0.1, awp=0.005),
    "pgd-10-linf-awp": partial(pgd_at, steps=10, step_size=0.25, label_smoothing=0.1, awp=0.005),
    "trades": partial(trades, steps=10, step_size=0.25),
    "trades-awp": partial(trades, steps=10, step_size=0.25, awp=0.005),
    "gaussian-0.25": partial(gaussian, sigma=0.25),
    "gaussian-0.5": partial(gaussian, sigma=0.5),
    "consistency-0.25": partial(consistency, sigma=0.25, weight=10.0),
    "consistency-0.5": partial(consistency, sigma=0.5, weight=5.0),
    "smoothadv-0.25": partial(smooth_adv, sigma=0.25),
    "ibp-0.1": partial(ibp, full_eps=0.1),
    "crown-ibp-0.1": partial(crown_ibp, full_eps=0.1),
}
