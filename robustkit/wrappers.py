"""Wrappers that make a masked model attackable: on the model, so that every attack can use them.

transfer(EOT(model, draws=20), pgd)        # search on the average, be judged on the model
nn.Sequential(BPDA(quantise), network)     # forward through the quantiser, backward around it
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustkit.device import Model
from robustkit.errors import RobustkitError


def identity(x: Tensor) -> Tensor:
    return x


class EOT(nn.Module):
    """Expectation over transformation: the mean logits of `draws` runs of a randomised model.

    Source: Athalye et al. 2018 (arXiv 1707.07397; 1802.00420, section 4.2). Logits are averaged, not
    probabilities or labels: the margin of the mean is the mean of the margins, so that the input gradient of a
    margin loss is exactly the mean gradient, a confident draw cannot saturate the others, and any loss
    of logits can follow.
    Units: `draws` forward passes for each call, and as many backward.
    Randomness: the model's own. Where `generator` is given, each call seeds the global state, from which
    models draw, from it and puts that state back; without, the model draws on as it would by itself. An
    attack puts a model in eval mode: noise that ends there, such as nn.Dropout, is no defence.
    Raises: RobustkitError for fewer than one draw.
    """

    def __init__(self, model: Model, draws: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if draws < 1:
            raise RobustkitError(f"draws must be at least 1; got {draws}.")
        self.model, self.draws, self.generator = model, draws, generator

    def forward(self, x: Tensor) -> Tensor:
        if self.generator is None:
            return self._mean(x)
        device = self.generator.device
        seed = int(torch.randint(2**31, (), generator=self.generator, device=device))
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            return self._mean(x)

    def _mean(self, x: Tensor) -> Tensor:
        return torch.stack([self.model(x) for _ in range(self.draws)]).mean(0)


class BPDA(nn.Module):
    """Backward pass differentiable approximation: `part` going forward, `replacement` going back.

    Source: Athalye, Carlini & Wagner 2018 (arXiv 1802.00420), section 4.1. The value is that of `part`,
    bit for bit; the gradient is that of `replacement`, the identity where none is given, which suits a
    preprocessing that leaves images nearly as they are (quantisation, JPEG, denoising).
    Shapes: `part` and `replacement` must agree.
    Raises: RobustkitError where they do not.
    """

    def __init__(
        self, part: Callable[[Tensor], Tensor], replacement: Callable[[Tensor], Tensor] = identity
    ) -> None:
        super().__init__()
        self.part, self.replacement = part, replacement

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            value: Tensor = self.part(x)
        smooth = self.replacement(x)
        if smooth.shape != value.shape:
            raise RobustkitError(
                f"the replacement gives shape {tuple(smooth.shape)} where the part gives {tuple(value.shape)}; "
                "give a replacement of the part's shape."
            )
        return value + (smooth - smooth.detach())
