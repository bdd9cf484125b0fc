"""The fast gradient sign method, from the example itself and from a random start."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.attacks.gradient import checked, input_gradient
from robustkit.device import Model, attackable
from robustkit.losses import Loss, cross_entropy
from robustkit.threat import Ball, check_batch


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    loss: Loss = cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One full step of size eps along the steepest direction of the loss, then back into the box.

    Source: Goodfellow, Shlens & Szegedy 2015 (arXiv 1412.6572), section 4. With an L2 ball this is
    the fast gradient method: the direction is the normalised gradient.
    Shapes: x (n, ...), y (n,) -> (n, ...). Units: inputs in [0, 1].
    Randomness: none; `generator` is there so that every attack is called alike.
    Raises: RobustkitError on a batch outside [0, 1] or unusable logits.
    """
    check_batch(x, y)
    with attackable(model):
        _, _, gradient = input_gradient(model, x, checked(loss), y)
    return ball.candidates(x, ball.eps * ball.steepest(gradient))


def rs_fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    step_size: float = 1.25,
    loss: Loss = cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A uniform random start in the ball, then one FGSM step of `step_size` * eps, projected.

    Source: Wong, Rice & Kolter 2020 (arXiv 2001.03994), algorithm 3, which uses 1.25 eps. As there, the
    start is not clamped into the box before the step: on images with many black pixels that would undo
    half of the randomness, and with it the defence that trains on this attack. Not R+FGSM (Tramer et
    al. 2018), which starts with a random sign step of eps / 2.
    Shapes, units: as `fgsm`; `step_size` is in units of eps.
    Randomness: the start, from `generator` alone.
    Raises: RobustkitError on a batch outside [0, 1] or unusable logits.
    """
    check_batch(x, y)
    start = ball.random(x, generator)
    with attackable(model):
        _, _, gradient = input_gradient(model, x + start, checked(loss), y)
    return ball.candidates(x, start + step_size * ball.eps * ball.steepest(gradient))
