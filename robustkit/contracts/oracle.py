"""A model on which every attack has a closed-form answer.

Logits (-z, z) with z = <w, x - 0.5> + b. On it an L-inf attack of size eps can break a point exactly
when |z| / ||w||_1 < eps (inside the box), the steepest direction for label y is -sign(w) for y = 1 and
sign(w) for y = 0, and the true L2 radius is |z| / ||w||_2.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.contracts.base import Array, Arrays
from robustkit.device import seeded

SHAPE = (1, 6, 6)
_FLIPPED = 8  # examples whose given label is not the model's: an attack must use the given one


class LinearOracle(nn.Module):
    """The linear model above; it notes the mode of every forward pass.

    Dropout makes train mode a different, random model.
    """

    def __init__(self, w: Tensor, b: float, dropout: float = 0.5) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())
        self.b = nn.Parameter(torch.tensor(b))
        self.drop = nn.Dropout(dropout)
        self.forwards: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.append(self.drop.training)
        z = self.drop(x - 0.5).flatten(1) @ self.w + self.b
        return torch.stack([-z, z], 1)


class ValleyOracle(LinearOracle):
    """z = <|w|, |x - 0.5|> + b: its gradient turns where a pixel crosses 0.5.

    On the linear model the gradient is the same everywhere; here it tells where it was taken.
    """

    def __init__(self, w: Tensor, b: float) -> None:
        super().__init__(w.abs(), b)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(0.5 + (x - 0.5).abs())


class ForkOracle(nn.Module):
    """z = 1 - max(1.5 u, -0.5 u), where u is the change of the first pixel from 0.5, in units of `eps`.

    From a start above 0.5 ascent of the loss of label 1 fools the model, from one below it never does: half
    of all random starts fail, whatever follows.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        u = (x[:, 0, 0, 0] - 0.5) / self.eps
        z = 1 - torch.maximum(1.5 * u, -0.5 * u)
        return torch.stack([-z, z], 1)


def uniform(generator: torch.Generator, low: float, high: float, n: int) -> Array:
    """Numbers in float64, uniform between `low` and `high`."""
    values = low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)
    return np.asarray(values.numpy())


def draw_linear(seed: int) -> Arrays:
    """Weights, an eps, and three batches: margins spread around eps, corners of the box, near 0.5."""
    generator = seeded(seed, "linear oracle")
    eps = round(0.06 + 0.06 * torch.rand((), generator=generator).item(), 3)
    dimension = int(np.prod(SHAPE))
    magnitude = 0.05 + 0.2 * torch.rand(dimension, generator=generator)
    w = magnitude * torch.where(torch.rand(dimension, generator=generator) < 0.5, -1.0, 1.0)
    b = 0.05 * torch.randn((), generator=generator)
    n = 64
    along = 0.2 * (2 * torch.rand(n, 1, generator=generator) - 1)
    noise = 0.1 * (2 * torch.rand(n, dimension, generator=generator) - 1)
    x = 0.5 + along * w.sign() + noise
    y = ((x - 0.5) @ w + b > 0).long()
    y[:_FLIPPED] = 1 - y[:_FLIPPED]
    corners = (torch.rand(16, dimension, generator=generator) < 0.5).float()
    corner_labels = ((corners - 0.5) @ w + b > 0).long()
    valley = 0.5 + 0.2 * eps * (2 * torch.rand(16, dimension, generator=generator) - 1)
    return {
        "w": w.numpy(),
        "b": np.float32(b.item()),
        "eps": np.float64(eps),
        "x": x.view(n, *SHAPE).numpy(),
        "y": y.numpy(),
        "corner_x": corners.view(-1, *SHAPE).numpy(),
        "corner_y": corner_labels.numpy(),
        "valley_x": valley.view(-1, *SHAPE).numpy(),
        "valley_y": np.arange(16) % 2,
    }


def oracle(case: Arrays, dropout: float = 0.5) -> LinearOracle:
    return LinearOracle(torch.from_numpy(case["w"]), float(case["b"]), dropout)


def valley_oracle(case: Arrays) -> ValleyOracle:
    return ValleyOracle(torch.from_numpy(case["w"]), float(case["b"]))


def flat_oracle(case: Arrays) -> LinearOracle:
    """A model without a gradient: an attack stays where it started."""
    return LinearOracle(torch.zeros_like(torch.from_numpy(case["w"])), float(case["b"]))


def z(case: Arrays, x: Array) -> Array:
    """The oracle's z in float64, from its definition."""
    flat = x.reshape(len(x), -1).astype(np.float64)
    return np.asarray((flat - 0.5) @ case["w"].astype(np.float64) + float(case["b"]))


def ascent(case: Arrays, y: Array) -> Array:
    """The sign of the loss's gradient: the direction that lowers z for label 1 and raises it for 0."""
    towards = np.where(y == 1, -1.0, 1.0)[:, None] * np.sign(case["w"])[None, :]
    return np.asarray(towards.reshape(len(y), *SHAPE))


def breakable(case: Arrays, x: Array, y: Array, eps: float) -> Array:
    """1 where an L-inf attack of size eps must fool the model, 0 where it cannot, -1 too close to call."""
    value = z(case, x)
    margin = np.where(y == 1, value, -value) / np.abs(case["w"].astype(np.float64)).sum()
    verdict = np.where(margin < eps, 1, 0)
    verdict[np.abs(margin - eps) < 1e-4] = -1
    return np.asarray(verdict)


def adversarial_cross_entropy(case: Arrays, candidate: Array) -> tuple[float, Tensor, Tensor]:
    """The mean cross-entropy at `candidate` and its exact gradients for w and b."""
    w = torch.from_numpy(case["w"]).double().requires_grad_()
    b = torch.tensor(float(case["b"]), dtype=torch.float64, requires_grad=True)
    flat = torch.from_numpy(candidate.reshape(len(candidate), -1)).double()
    score = (flat - 0.5) @ w + b
    loss = F.cross_entropy(torch.stack([-score, score], 1), torch.from_numpy(case["y"]))
    gradient_w, gradient_b = torch.autograd.grad(loss, [w, b])
    return loss.item(), gradient_w, gradient_b
