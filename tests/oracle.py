"""Models on which the right answer is known in closed form, and the small records that tests are made of.

On the linear model, logits (-z, z) with z = <w, x> + b, an attack of size eps away from the box's walls
breaks a point of margin m = (2y - 1) z exactly when m < eps * ||w||_q, with q dual to the ball's norm:
1 for Linf, 2 for L2, infinity for L1. The strongest point is the same for every increasing loss.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from robustkit.data import Dataset
from robustkit.results import AttackRun, Evaluation, Hardware, Provenance
from robustkit.threat import Ball, white_box

DIMENSION = 12
ORDER = {"Linf": np.inf, "L2": 2, "L1": 1}  # the norms, as NumPy calls them
DUAL = {"Linf": 1, "L2": 2, "L1": np.inf}
HARDWARE = Hardware("CPU", "a processor", 1, "3.11.0", "2.13.0", "0.1.0")
PROVENANCE = Provenance("synthetic", "test", "made by a test", "0" * 64, True)


class Linear(nn.Module):
    """The linear model; dropout makes train mode another, random model."""

    def __init__(self, w: Tensor, b: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())
        self.b = nn.Parameter(torch.tensor(b))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.drop(x).flatten(1) @ self.w + self.b
        return torch.stack([-z, z], 1)


def linear(seed: int = 0) -> Linear:
    """A linear model in eval mode whose boundary goes through the middle of the box."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(DIMENSION, generator=generator)
    return Linear(w, -0.5 * float(w.sum())).eval()


def interior(seed: int = 0, n: int = 200) -> Tensor:
    """Images of shape (n, 3, 2, 2) in [0.3, 0.7]: a ball of size 0.2 meets no wall of the box."""
    generator = torch.Generator().manual_seed(seed)
    return (0.3 + 0.4 * torch.rand(n, DIMENSION, generator=generator)).view(n, 3, 2, 2)


def everywhere(seed: int = 0, n: int = 200) -> Tensor:
    """Images up to the walls of the box, a quarter of the pixels exactly on one."""
    generator = torch.Generator().manual_seed(seed)
    x = (2 * torch.rand(n, DIMENSION, generator=generator) - 0.5).clamp(0, 1)
    return x.view(n, 3, 2, 2)


def margins(model: Linear, x: Tensor, y: Tensor) -> np.ndarray:
    """(2y - 1) z in float64: positive where the model is right."""
    w = model.w.detach().double().numpy()
    z = x.double().flatten(1).numpy() @ w + float(model.b.detach())
    return np.asarray((2 * y.numpy() - 1) * z)


def strongest(model: Linear, x: Tensor, y: Tensor, ball: Ball) -> np.ndarray:
    """The optimum of the attack: exact for Linf with or without the walls, for L2 and L1 away from them."""
    w = model.w.detach().double().numpy()
    one = np.arange(len(w)) == np.abs(w).argmax()
    direction = {"Linf": np.sign(w), "L2": w / np.linalg.norm(w), "L1": np.sign(w) * one}[ball.norm]
    towards = -(2 * y.numpy() - 1)[:, None] * direction
    found = np.clip(x.double().flatten(1).numpy() + ball.eps * towards, 0, 1)
    return np.asarray(found.reshape(x.shape))


def dataset(x: Tensor, y: Tensor, classes: int = 2) -> Dataset:
    return Dataset(x, y, tuple(range(len(x))), PROVENANCE, tuple(map(str, range(classes))))


def linear_data(model: Linear, seed: int = 0, n: int = 200) -> Dataset:
    """Interior images under the model's own labels, but for every tenth, which is mislabelled."""
    x = interior(seed, n)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::10] = 1 - y[::10]
    return dataset(x, y)


def evaluation(
    broken_by: tuple[str | None, ...] = ("clean", "fgsm", None, None),
    *,
    ball: Ball | None = None,
    model: str = "a model",
    data: Provenance = PROVENANCE,
    attacks: tuple[str, ...] = ("fgsm", "pgd-40"),
    seed: int = 0,
    notes: tuple[str, ...] = (),
) -> Evaluation:
    return Evaluation(
        model=model,
        threat=white_box(ball or Ball("Linf", 0.3)),
        data=data,
        indices=tuple(range(len(broken_by))),
        attacks=tuple(AttackRun(name, {"steps": 40}, 1.25) for name in attacks),
        broken_by=broken_by,
        seed=seed,
        tier="smoke",
        hardware=HARDWARE,
        created="2026-01-02T03:04:05+00:00",
        notes=notes,
    )
