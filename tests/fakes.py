"""Defences that fool the attacker and not the adversary: each wraps a model and is no more robust than it.

Every fake maps images in [0, 1] to what its author calls logits. `ROUNDING` and `RANDOM` are repaired by
BPDA and by EOT.
"""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class LargeLogits(Wrapper):
    """Logits times 100: in float32 the softmax of a sure model is exactly one, and cross-entropy is flat."""

    def forward(self, x: Tensor) -> Tensor:
        return 100 * self.model(x)


def quantise(x: Tensor) -> Tensor:
    """Eight grey levels: a staircase, whose derivative is zero."""
    return (7 * x).round() / 7


class Quantised(Wrapper):
    """A 3-bit quantiser in front of the model."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(quantise(x))


def jpeg(x: Tensor, quality: int = 50) -> Tensor:
    """Each grey image through Pillow's JPEG encoder and decoder: no gradient comes back."""
    decoded = []
    for image in (255 * x.detach()).round().byte().cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image[0]).save(file, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(file), dtype=np.float32)[None] / 255)
    return torch.from_numpy(np.stack(decoded)).to(x.device)


class Compressed(Wrapper):
    """JPEG in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(jpeg(x))


class DropoutOn(Wrapper):
    """Dropout that nobody switched off: eval mode does not reach it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(F.dropout(x, 0.5, training=True))


class Resized(Wrapper):
    """Each call shrinks the batch to a random size and pads it at a random place."""

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1]
        size = int(torch.randint(side - 6, side, ()))
        left, top = torch.randint(0, side - size + 1, (2,)).tolist()
        small = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
        return self.model(F.pad(small, (left, side - size - left, top, side - size - top)))


class Sharpened(Wrapper):
    """Almost the one-hot vector of the prediction: a softmax at a temperature of 1/1,000."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(1_000 * self.model(x), dim=1)


class Probabilities(Wrapper):
    """The softmax left in the model: every loss applies another one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.model(x), dim=1)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


class ZeroGradient(Wrapper):
    """The identity, whose backward pass returns zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(_NoGradient.apply(x))


class Detector(Wrapper):
    """Answers images that look rough, as noise does, with the same logits whatever they show."""

    def forward(self, x: Tensor) -> Tensor:
        rough = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3)) > 0.12
        constant = torch.zeros(10, device=x.device)
        return torch.where(rough[:, None], constant, self.model(x))


class Purified(Wrapper):
    """Moves each image towards the model's own confidence by gradient steps before it answers."""

    def forward(self, x: Tensor) -> Tensor:
        purified = x.detach()
        with torch.enable_grad():
            for _ in range(3):
                purified = purified.requires_grad_(True)
                sure = self.model(purified).logsumexp(1).sum()
                (gradient,) = torch.autograd.grad(sure, purified)
                purified = (purified + 0.03 * gradient.sign()).clamp(0, 1).detach()
        return self.model(purified)


class Smoothed(Wrapper):
    """No fake: the mean logits over noise drawn once and for all (fixed draws make it deterministic)."""

    noise: Tensor

    def __init__(self, model: nn.Module, shape: tuple[int, ...], sigma: float = 0.25, draws: int = 8) -> None:
        super().__init__(model)
        noise = sigma * torch.randn(draws, *shape, generator=torch.Generator().manual_seed(0))
        self.register_buffer("noise", noise)

    def forward(self, x: Tensor) -> Tensor:
        noisy = (x[:, None] + self.noise).flatten(0, 1)
        return self.model(noisy).unflatten(0, (len(x), len(self.noise))).mean(1)
