"""Defences whose point is the certificate: for smoothing, and for interval bounds.

Functions in the form of `robustkit.defences`, registered there under the names that recipes use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.certify.bounds import crown_ibp_margins, ibp_margins
from robustkit.device import attackable
from robustkit.threat import Ball

# --- for smoothing -----------------------------------------------------------------------------------


def gaussian(
    model: nn.Module, x: Tensor, y: Tensor, ball: Ball, generator: torch.Generator, *, sigma: float
) -> Tensor:
    """Cross-entropy on one noisy copy of each image: the least that a base classifier needs. The ball is ignored.

    Source: Cohen, Rosenfeld & Kolter 2019 (arXiv 1902.02918), section 3.3.
    """
    return F.cross_entropy(model(x + _noise(x, sigma, generator)), y)


def consistency(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    generator: torch.Generator,
    *,
    sigma: float,
    weight: float,
    copies: int = 2,
    entropy: float = 0.5,
) -> Tensor:
    """Gaussian training that also asks noisy copies of an image to agree. The ball is ignored.

    Source: Jeong & Shin 2020 (arXiv 2006.04062), equation 9: cross-entropy, plus `weight` times the mean
    divergence of the copies from their mean prediction, plus `entropy` times that mean's entropy.
    """
    noisy = torch.cat([x + _noise(x, sigma, generator) for _ in range(copies)])
    logits = model(noisy)
    log_each = F.log_softmax(logits, 1).view(copies, len(x), -1)
    mean = log_each.exp().mean(0).clamp_min(1e-20)
    divergence = (mean * (mean.log() - log_each)).sum(2).mean()
    spread = -(mean * mean.log()).sum(1).mean()
    return F.cross_entropy(logits, y.repeat(copies)) + weight * divergence + entropy * spread


def smooth_adv(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    generator: torch.Generator,
    *,
    sigma: float,
    copies: int = 2,
    steps: int = 2,
) -> Tensor:
    """Adversarial training of the smoothed classifier: PGD on the mean probability over noisy copies.

    Source: Salman et al. 2019 (arXiv 1906.04584), SmoothAdv-PGD with m = `copies` and the same noise in
    the attack's steps and in the update; steps of 2 eps / `steps`.
    """
    noise = [_noise(x, sigma, generator) for _ in range(copies)]
    delta = torch.zeros_like(x)
    with attackable(model), torch.enable_grad():
        for _ in range(steps):
            delta.requires_grad_(True)
            each = [F.softmax(model(x + delta + one), 1) for one in noise]
            loss = -torch.stack(each).mean(0).gather(1, y[:, None]).clamp_min(1e-20).log().sum()
            (gradient,) = torch.autograd.grad(loss, delta)
            moved = delta.detach() + 2 * ball.eps / steps * ball.steepest(gradient)
            delta = ball.candidates(x, moved) - x
    return F.cross_entropy(model(torch.cat([x + delta + one for one in noise])), y.repeat(copies))


def _noise(x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    return torch.empty_like(x).normal_(0.0, sigma, generator=generator)


# --- for interval bounds -----------------------------------------------------------------------------


def ibp(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    generator: torch.Generator,
    *,
    full_eps: float,
    kappa: float = 0.5,
) -> Tensor:
    """Cross-entropy on the worst logits that intervals allow, mixed with the clean one.

    Source: Gowal et al. 2018 (arXiv 1810.12715), equation 10. The clean loss's share falls from 1 to
    `kappa` while the schedule raises eps from zero to `full_eps`.
    """
    return _mixed(model, x, y, ibp_margins(model, x, y, ball), kappa, min(ball.eps / full_eps, 1.0))


def crown_ibp(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    generator: torch.Generator,
    *,
    full_eps: float,
    kappa: float = 0.5,
) -> Tensor:
    """As `ibp`, on bounds that begin as CROWN-IBP's, which are tight for small eps, and end as IBP's.

    Source: Zhang et al. 2020 (arXiv 1906.06316), equation 11: beta falls from 1 to 0 as eps rises.
    """
    reached = min(ball.eps / full_eps, 1.0)
    margins = ibp_margins(model, x, y, ball)
    if reached < 1:
        margins = reached * margins + (1 - reached) * crown_ibp_margins(model, x, y, ball)
    return _mixed(model, x, y, margins, kappa, reached)


def _mixed(model: nn.Module, x: Tensor, y: Tensor, margins: Tensor, kappa: float, reached: float) -> Tensor:
    """Clean and worst-case cross-entropy; the clean share falls to `kappa` as eps has `reached` its full size."""
    clean = 1 - (1 - kappa) * reached
    return clean * F.cross_entropy(model(x), y) + (1 - clean) * F.cross_entropy(-margins, y)
