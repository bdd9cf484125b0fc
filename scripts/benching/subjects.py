"""The models and images that everything is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.data import load
from robustkit.device import attackable, pick_device, seeded
from robustkit.models import Normalize, PreActResNet, pretrained
from robustkit.threat import Ball

SEED = 0


@dataclass(frozen=True)
class Subject:
    """A model, images with labels, and the balls to attack in."""

    name: str
    about: str
    model: nn.Module
    x: Tensor
    y: Tensor
    balls: dict[str, Ball]


def mnist(n: int) -> Subject:
    """The course's PGD-trained CNN on MNIST test images (on scikit-learn's digits where MNIST cannot be had)."""
    device = pick_device()
    data = load("mnist", "test", limit=n, seed=SEED, device=device)
    return Subject(
        "mnist",
        f"`pretrained('mnist-pgd')` on {data.provenance}",
        pretrained("mnist-pgd").to(device),
        data.x,
        data.y,
        {"Linf": Ball("Linf", 0.3), "L2": Ball("L2", 2.0)},
    )


def resnet20(n: int) -> Subject:
    """A pre-activation ResNet-20 with random weights, for speed alone: robust accuracy says nothing about it.

    Its labels are its own answers, and the ball is small enough that most of them survive.
    """
    device = pick_device()
    generator = seeded(SEED, "resnet20")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = PreActResNet((3, 3, 3), 16)
    model = nn.Sequential(Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)), net)
    x = torch.rand(n, 3, 32, 32, generator=generator)
    with torch.no_grad():
        for _ in range(50):  # running statistics as after training, or eval mode would be another network
            model(x[torch.randint(n, (64,), generator=generator)])
    model = model.to(device).eval()
    with torch.no_grad(), attackable(model):
        y = torch.cat([model(part).argmax(1) for part in x.to(device).split(64)])
    return Subject(
        "resnet20",
        "pre-activation ResNet-20 (SiLU, width 16, 32 x 32), random weights and images: speed alone",
        model,
        x.to(device),
        y,
        {"Linf": Ball("Linf", 0.02 / 255)},
    )


SUBJECTS: dict[str, Callable[[int], Subject]] = {"mnist": mnist, "resnet20": resnet20}
