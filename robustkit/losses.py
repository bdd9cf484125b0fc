"""Attack losses: one value per example; a larger value favours the attacker.

Shapes: logits (n, classes), y (n,) -> (n,); a targeted loss takes the target labels (n,) as well. Labels are
arguments, never closed over, so that an attack which drops rows of its batch drops theirs with them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.errors import RobustkitError

Loss = Callable[[Tensor, Tensor], Tensor]
TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Minus the log-probability of the true class; its gradient vanishes when the model is very sure.

    Source: Goodfellow et al. 2015 (arXiv 1412.6572), the loss of FGSM.
    """
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best wrong logit minus the true one: positive exactly when the example is misclassified.

    Source: Carlini & Wagner 2017 (arXiv 1608.04644), f6 without confidence. Unlike cross-entropy it
    does not saturate, so scaling the logits cannot hide the gradient.
    """
    true = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - true


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """The margin in units of the spread of the three largest logits: blind to their shift and scale.

    Source: Croce & Hein 2020 (arXiv 2003.01690), section 4.
    Raises: RobustkitError for fewer than three classes, where the ratio is constant.
    """
    _check_classes(logits, 3, "dlr")
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2]).clamp_min(1e-12)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The target's logit minus the true one, in units of the spread of the four largest.

    Source: Croce & Hein 2020 (arXiv 2003.01690), section 4.
    Raises: RobustkitError for fewer than four classes, where the ratio can be constant.
    """
    _check_classes(logits, 4, "dlr_targeted")
    top = logits.topk(4, dim=1).values
    chosen = logits.gather(1, torch.stack([y, target], 1))
    spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    return (chosen[:, 1] - chosen[:, 0]) / spread.clamp_min(1e-12)


def towards(loss: Loss) -> TargetedLoss:
    """The targeted form of a loss: how near the attacker is to the target class, whatever the true one is.

    Cross-entropy becomes the target's log-probability, the margin its lead over all other classes.
    """

    def towards_target(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return -loss(logits, target)

    return towards_target


def _check_classes(logits: Tensor, least: int, name: str) -> None:
    if logits.shape[1] < least:
        raise RobustkitError(
            f"the loss {name} needs at least {least} classes; the model has {logits.shape[1]}. Use margin."
        )
