"""Devices, precision and module state: what an attack or an evaluation must set, and put back."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from robustkit import __version__
from robustkit.errors import RobustkitError
from robustkit.results import Hardware

Model = Callable[[Tensor], Tensor]  # images in [0, 1] to logits; an nn.Module or any other callable

TIERS = ("smoke", "standard", "full")


def tier() -> str:
    """The tier of this run, from ROBUSTKIT_TIER; "standard" where it is not set.

    Raises: RobustkitError for any other name.
    """
    name = os.environ.get("ROBUSTKIT_TIER", "standard")
    if name not in TIERS:
        raise RobustkitError(f"ROBUSTKIT_TIER={name!r} is not a tier; set it to one of {', '.join(TIERS)}.")
    return name


def pick_device() -> torch.device:
    """CUDA when torch can use it, the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the platform module knows less, but something
    return platform.processor() or platform.machine()


def hardware(device: torch.device | None = None) -> Hardware:
    """The record of this machine that goes into every result."""
    device = pick_device() if device is None else device
    return Hardware(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        cpu=_cpu_name(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        robustkit=__version__,
    )


def seeded(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream depends on the whole key, e.g. (seed, "train", step).

    Deriving a stream for each step, instead of carrying one generator through a run, is what makes a
    resumed run identical: there is no generator state to save.
    """
    import hashlib

    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


@contextmanager
def modes_kept(model: Model) -> Iterator[None]:
    """Put back the train or eval mode of every submodule on the way out, however mixed it was."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training


@contextmanager
def attackable(model: Model) -> Iterator[None]:
    """Eval mode and frozen parameters inside; every mode and flag as it was outside.

    Frozen parameters keep weight gradients from being computed and from being left in `.grad`. Eval
    mode is the deployed model: dropout and batch statistics would make the attack aim at another one.
    """
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    flags = [parameter.requires_grad for parameter in parameters]
    with modes_kept(model):
        try:
            if isinstance(model, nn.Module):
                model.eval()
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)


@contextmanager
def strict_fp32() -> Iterator[None]:
    """Full float32 arithmetic inside: no TF32, no autocast. Verdicts are given here, never in bf16."""
    precision = torch.get_float32_matmul_precision()
    tf32 = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32


class Prepared(nn.Module):
    """A model made ready to be attacked: calling it is quick, `strict` gives the verdicts.

    `search` is a frozen copy in the layout and precision that are fastest here; its logits guide an
    attack. `strict` is the model itself. An attack that drops a point once it is fooled must ask
    `confirmed` first: what fools the copy does not always fool the model.
    """

    def __init__(self, search: Model, strict: Model) -> None:
        super().__init__()
        self.search, self.strict = search, strict

    def forward(self, x: Tensor) -> Tensor:
        return self.search(x)


def prepare(model: Model, x: Tensor) -> Model:
    """`model`, ready to be attacked on images like `x`."""
    return model


def confirmed(model: Model, points: Tensor, y: Tensor, claimed: Tensor) -> Tensor:
    """Which of the claimed successes (bool, (n,)) hold in strict float32.

    Costs nothing for a plain model, and one forward pass of the claimed points for a prepared one.
    """
    if not isinstance(model, Prepared) or not claimed.any():
        return claimed
    held = claimed.clone()
    with torch.no_grad(), strict_fp32(), attackable(model.strict):
        held[claimed] = model.strict(points[claimed]).argmax(1) != y[claimed]
    return held
