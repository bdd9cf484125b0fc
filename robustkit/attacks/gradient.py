"""The input gradient: the one piece that all gradient attacks share."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.device import Model
from robustkit.losses import Loss
from robustkit.threat import check_logits


def input_gradient(model: Model, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Each example's loss at `x`, and its gradient there: one forward and one backward pass.

    Summing the losses, not averaging them, keeps an example's gradient independent of the batch size.
    Shapes: x (n, ...) -> losses (n,), gradient (n, ...). Raises: RobustkitError on unusable logits.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        check_logits(logits.detach(), y)
        losses = loss(logits, y)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    return losses.detach(), gradient
