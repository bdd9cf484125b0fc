"""Devices, precision and module state: what an attack or an evaluation must set, and put back."""

from __future__ import annotations

import copy
import hashlib
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from robustkit import __version__, surgery
from robustkit.errors import RobustkitError
from robustkit.losses import margin
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


def digest(tensors: Iterable[Tensor]) -> str:
    """The sha256 of the tensors' types, shapes and bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


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


def _float32_arithmetic() -> list[Any]:
    """Where torch keeps how each library multiplies float32, one operation at a time.

    torch.set_float32_matmul_precision writes to some of them, torch.backends.fp32_precision stands behind all.
    """
    by: Any = torch.backends  # not annotated
    return [by.cuda.matmul, by.cudnn.conv, by.cudnn.rnn, by.mkldnn.matmul, by.mkldnn.conv, by.mkldnn.rnn]


@contextmanager
def strict_fp32() -> Iterator[None]:
    """Full float32 arithmetic inside: no TF32, no bfloat16, no autocast. Verdicts are given here."""
    operations = _float32_arithmetic()
    outside = [operation.fp32_precision for operation in operations]
    for operation in operations:
        operation.fp32_precision = "ieee"
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for operation, precision in zip(operations, outside, strict=True):
            operation.fp32_precision = precision


# --- ready to be attacked ---------------------------------------------------------------------------


class Prepared(nn.Module):
    """A model made ready to be attacked: calling it is quick, `strict` gives the verdicts.

    `search` is a frozen copy in the layout and precision that are fastest here; its logits guide an
    attack. `strict` is the model itself. An attack that drops a point once it is fooled must ask
    `confirmed` first: what fools the copy does not always fool the model.
    As a module it is the copy alone: what a caller does to its modes, parameters or device leaves
    `strict` as it is, so it can be handed to any library that takes an nn.Module.
    """

    def __init__(self, search: Model, strict: Model) -> None:
        super().__init__()
        self.search = search
        self._strict = (strict,)  # in a tuple, which nn.Module does not look into
        self.eval()

    @property
    def strict(self) -> Model:
        return self._strict[0]

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whose arithmetic the copy is made of."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.search(x)


class _Search(nn.Module):
    """A simplified copy that takes images and gives logits in their own type, whatever is used inside."""

    def __init__(self, model: nn.Module, layout: torch.memory_format, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.layout, self.dtype = model, layout, dtype

    def forward(self, x: Tensor) -> Tensor:
        images = x.contiguous(memory_format=self.layout)
        if self.dtype == torch.float32:
            logits: Tensor = self.model(images)
        else:
            with torch.autocast(x.device.type, self.dtype):
                logits = self.model(images)
        return logits.to(x.dtype)


SAMPLE = 16  # images on which a copy must agree with its model

# How far a copy may be from its model: logits by their largest size, input gradients by their norm.
AGREEMENT = {torch.float32: (1e-4, 0.02), torch.bfloat16: (0.05, 0.3)}


def prepare(model: Model, x: Tensor, *, precision: torch.dtype | None = None) -> Model:
    """`model`, ready to be attacked on images like `x`: a `Prepared`, or `model` itself where none is safe.

    The search copy has frozen parameters, is in eval mode, and does the same work in less time:
    BatchNorm folded, a strided first convolution as a matrix product, channels last (`surgery.py`), and
    bfloat16 where the processor multiplies matrices in it. `precision` (float32 or bfloat16) overrides
    the last. Nothing is timed and nothing is compiled: the copy follows from the model and the machine
    alone, so that a resumed run gets the same one, and nobody waits for a compiler.
    On the first images the copy's logits and input gradients must agree with the model's. The model itself
    comes back when they do not, and when it is no nn.Module, cannot be copied or run, has no input
    gradient, answers the same images differently, or is prepared already.
    Call it before threads start: torch.fx changes nn.Module for a moment while it traces.
    Shapes: x (n, c, h, w); for other shapes the parameters are frozen and the precision chosen.
    Randomness: none; the global random state is put back.
    """
    if not isinstance(model, nn.Module) or isinstance(model, Prepared):
        return model
    sample = x[:SAMPLE].detach()
    devices = [sample.device] if sample.device.type == "cuda" else []
    for dtype in (fastest(sample.device), torch.float32) if precision is None else (precision,):
        # A stranger's model may raise anything when it is copied, traced or called: it is then left alone.
        with suppress(Exception), torch.random.fork_rng(devices=devices):
            search = _search_copy(model, sample.shape[1:], dtype)
            if _agree(search, model, sample, *AGREEMENT[dtype]):
                return Prepared(search, model)
    return model


def fastest(device: torch.device) -> torch.dtype:
    """The precision in which this device searches fastest: bfloat16 where its matrix units take it.

    Emulated bfloat16 (AVX-512 without the BF16 extension, GPUs before Ampere) is slower than float32.
    """
    if device.type == "cuda":
        able = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        able = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if able else torch.float32


def _search_copy(model: nn.Module, image: torch.Size, dtype: torch.dtype) -> nn.Module:
    copied = copy.deepcopy(model).eval()
    surgery.simplify(copied, image)
    convolutional = len(image) == 3 and any(isinstance(layer, nn.Conv2d) for layer in copied.modules())
    layout = torch.channels_last if convolutional else torch.contiguous_format
    copied = copied.to(memory_format=layout)  # type: ignore[call-overload]
    if dtype != torch.float32:
        for layer in copied.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):  # what autocast would convert at every call
                layer.to(dtype)
    return _Search(copied, layout, dtype).eval().requires_grad_(False)


def _agree(search: Model, model: Model, x: Tensor, of_logits: float, of_gradients: float) -> bool:
    """Whether a copy stands for its model on `x`, and the model for itself when it is asked again."""
    with strict_fp32(), attackable(model):
        logits, gradient = _answers(model, x)
        repeated, _ = _answers(model, x)
    found, leading = _answers(search, x)
    return bool(
        (repeated - logits).abs().max() <= 1e-5 * logits.abs().max()
        and (found - logits).abs().max() <= of_logits * logits.abs().max()
        and (leading - gradient).norm() <= of_gradients * gradient.norm()
    )


def _answers(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the input gradient of the margin between the first two: unlike cross-entropy's, it is large."""
    with torch.enable_grad():
        x = x.clone().requires_grad_(True)
        logits = model(x)
        (gradient,) = torch.autograd.grad(margin(logits, logits.detach().argmax(1)).sum(), x)
    return logits.detach(), gradient


BUDGET = 64 * 2**20  # bytes that a batch keeps for its backward pass on a CPU: more of them gain nothing


def batch_size(model: Model, x: Tensor) -> int:
    """How many images like `x` to attack at once: a power of two from 16 to 128 on a CPU, to 4096 on a GPU.

    On a CPU the smallest batch that runs at full speed: fewer images waste time on overhead, more only
    take memory. On a GPU what fits into half of the free memory.
    Randomness: none; the global random state is put back.
    """
    sample, kept = x[:SAMPLE], 0

    def weigh(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with (
        torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []),
        attackable(model),
        torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor),
    ):
        model(sample.detach().clone().requires_grad_(True))
    if x.device.type == "cuda":
        budget, most = torch.cuda.mem_get_info(x.device)[0] // 2, 4096
    else:
        budget, most = BUDGET, 128
    fitting = budget * len(sample) // max(kept, 1)
    return max(16, min(most, 1 << max(fitting.bit_length() - 1, 0)))


def confirmed(model: Model, points: Tensor, y: Tensor, claimed: Tensor) -> Tensor:
    """Which of the claimed successes (bool, (n,)) hold in strict float32.

    Costs nothing for a plain model, and one forward pass of the claimed points for a prepared one.
    """
    if not isinstance(model, Prepared) or not claimed.any():
        return claimed
    held = claimed.clone()
    with torch.no_grad(), strict_fp32(), attackable(model.strict):
        held[claimed] = margin(model.strict(points[claimed]), y[claimed]) >= 0  # as `evaluate.predict`
    return held
