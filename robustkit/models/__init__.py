"""Models of the course: normalisation inside, so that attacks and radii are in input units."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from robustkit.errors import RobustkitError
from robustkit.models import zoo
from robustkit.models.files import load_weights, save_weights
from robustkit.models.preact_resnet import PreActResNet

__all__ = [
    "MODELS",
    "Normalize",
    "PreActResNet",
    "build",
    "load_weights",
    "mnist_cnn",
    "preact_resnet18",
    "pretrained",
    "save_weights",
]


class Normalize(nn.Module):
    """(x - mean) / std, channel by channel, as the first layer of a model.

    Inside the model, and not in the data pipeline, because eps is stated for images in [0, 1]: an
    attack on normalised tensors is larger than it says by the factor 1 / std.
    Shapes: (n, c, h, w) -> the same. Raises: RobustkitError unless every std is positive, and for
    images of another number of channels, which broadcasting would make up in silence.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise RobustkitError(
                f"Normalize needs one mean and one positive std per channel; got {mean} and {std}."
            )
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.mean.shape[1]:
            raise RobustkitError(
                f"this model takes images of {self.mean.shape[1]} channels, shape (n, c, h, w); got shape "
                f"{tuple(x.shape)}. Choose the model that fits the data."
            )
        return (x - self.mean) / self.std


def mnist_cnn() -> nn.Sequential:
    """The small CNN of scenario 1: two strided convolutions, two linear layers, 166,406 parameters.

    Source: the MNIST network of Wong, Rice & Kolter 2020 (arXiv 2001.03994): small enough to be
    trained against PGD on a laptop. Shapes: (n, 1, 28, 28) -> (n, 10).
    Randomness: the initial weights, from torch's global generator.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def preact_resnet18(width: int = 64) -> nn.Sequential:
    """The pre-activation ResNet-18 of scenario 2, for 32 x 32 colour images, normalisation inside.

    Source: He et al. 2016 (arXiv 1603.05027) with SiLU in place of ReLU. Shapes: (n, 3, 32, 32) -> (n, 10).
    """
    return _preact_resnet((2, 2, 2, 2), width)


def preact_resnet10(width: int) -> nn.Sequential:
    """The same with one block a stage: for a CPU, with `width` 16 and 0.3 instead of 11.2 million parameters."""
    return _preact_resnet((1, 1, 1, 1), width)


def _preact_resnet(blocks: tuple[int, ...], width: int) -> nn.Sequential:
    cifar10 = Normalize((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
    return nn.Sequential(cifar10, PreActResNet(blocks, width))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mnist_cnn": mnist_cnn,
    "preact_resnet18": preact_resnet18,
    "preact_resnet10_w16": partial(preact_resnet10, 16),
    "preact_resnet10_w4": partial(preact_resnet10, 4),  # learns little, for smoke runs
}


def build(name: str, *, seed: int = 0) -> nn.Module:
    """A freshly initialised model of the course by name.

    Randomness: the initial weights, from `seed`; torch's global generator is left as it was.
    Raises: RobustkitError for an unknown name.
    """
    if name not in MODELS:
        raise RobustkitError(f"model {name!r} is unknown; choose one of {', '.join(MODELS)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]()


def pretrained(name: str) -> nn.Module:
    """A trained model that comes with the package, in eval mode: mnist-pgd, mnist-clean, ...

    Weights are stored in half precision and computed with in float32; `zoo.card(name)` is the record of
    recipe, data, threat model and measured accuracies. Raises: RobustkitError for an unknown name, and for
    weights whose sha256 is not that of the card.
    """
    return zoo.load(name, build)
