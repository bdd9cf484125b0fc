"""Attack losses: one value per example; a larger value favours the attacker.

Shapes: logits (n, classes), y (n,) -> (n,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


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
