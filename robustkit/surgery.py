"""The same function in fewer operations: exact rewritings of a network that is evaluated, not trained.

Each changes a model in place, and rounding apart changes nothing that it computes in eval mode. They are
for copies: a rewritten model can no longer be trained, nor read the weights file of its architecture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn


class Affine(nn.Module):
    """`scale * x + shift`, channel by channel. Shapes: (n, c, h, w) -> the same."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.view(1, -1, 1, 1))
        self.register_buffer("shift", shift.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


def simplify(model: nn.Module, image: torch.Size) -> None:
    """All rewritings, for a model of images of shape (c, h, w)."""
    fold_batchnorm(model)
    replace_batchnorm(model)
    space_to_depth(model, image)


# --- BatchNorm -------------------------------------------------------------------------------------


def _running(norm: nn.Module) -> bool:
    """Whether a layer is a BatchNorm that uses running statistics in eval mode.

    One that keeps none normalises by the batch, in eval mode too; a subclass may compute anything.
    """
    return type(norm) is nn.BatchNorm2d and norm.running_var is not None


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The scale and the shift that an eval-mode BatchNorm applies to each channel."""
    assert norm.running_mean is not None  # by _running
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -scale * norm.running_mean
    if norm.bias is not None:
        shift = shift + norm.bias
    return scale.detach(), shift.detach()


class _Tracer(fx.Tracer):
    """Traces through a model as far as modules without submodules, of whichever package."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None or super().is_leaf_module(m, module_qualified_name)


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Every convolution whose output goes into one BatchNorm and nowhere else.

    Where control flow hinders tracing a module as a whole, its submodules are traced one by one.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception:  # tracing runs the model's own code on stand-ins, which may raise anything
        for child in model.children():
            yield from _pairs(child)
        return
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        if node.op != "call_module" or len(node.all_input_nodes) != 1:
            continue
        before = node.all_input_nodes[0]
        if before.op != "call_module" or len(before.users) != 1:
            continue
        if calls[node.target] > 1 or calls[before.target] > 1:
            continue
        conv, norm = model.get_submodule(before.target), model.get_submodule(node.target)
        # The exact type: a parametrised convolution (weight_norm, ...) has a class of its own.
        if type(conv) is nn.Conv2d and _running(norm):
            yield conv, norm  # type: ignore[misc]  # _running has checked the type


def fold_batchnorm(model: nn.Module) -> None:
    """Multiply each BatchNorm that directly follows a convolution into its weights.

    Source: Jacob et al. 2018 (arXiv 1712.05877), section 3.2. torch.fx finds the pairs; the model's own
    code still runs, with an identity in the BatchNorm's place.
    """
    for conv, norm in list(_pairs(model)):
        scale, shift = _affine(norm)
        bias = shift if conv.bias is None else scale * conv.bias.detach() + shift
        # New parameters: the old ones may be shared with another layer.
        conv.weight = nn.Parameter(conv.weight.detach() * scale.view(-1, 1, 1, 1))
        conv.bias = nn.Parameter(bias)
        _replace(model, norm, nn.Identity())


def replace_batchnorm(model: nn.Module) -> None:
    """Turn every other BatchNorm into one multiplication and addition."""
    for norm in [module for module in model.modules() if _running(module)]:
        _replace(model, norm, Affine(*_affine(norm)))  # type: ignore[arg-type]


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    new.train(old.training)
    for parent in list(model.modules()):  # as they are now: the new one may hold the old one
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


# --- Strided convolutions on images ----------------------------------------------------------------


class OnBlocks(nn.Module):
    """A convolution, and the same on pixel blocks for when a gradient will be asked for."""

    def __init__(self, plain: nn.Conv2d, blocks: nn.Sequential) -> None:
        super().__init__()
        self.plain, self.blocks = plain, blocks

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.blocks if torch.is_grad_enabled() and x.requires_grad else self.plain
        convolved: Tensor = chosen(x)
        return convolved


def space_to_depth(model: nn.Module, image: torch.Size) -> None:
    """Turn a strided convolution on the image into one of stride 1 on the image's pixel blocks.

    With few channels, the backward pass of a strided convolution is slow on a CPU: on a 28 x 28 image with
    stride 2 it takes four times as long as this one, which has four times the channels. A forward pass
    alone gains nothing, and keeps the convolution as it was.
    """
    for conv in [module for module in model.modules() if type(module) is nn.Conv2d]:
        reach = _reach(conv, image)
        if reach is not None:
            _replace(model, conv, OnBlocks(conv, _unshuffled(conv, reach)))


def _reach(conv: nn.Conv2d, image: torch.Size) -> int | None:
    """How many blocks away the convolution looks; None where it is of another kind or size."""
    (stride, across), (kernel, width) = conv.stride, conv.kernel_size
    if isinstance(conv.padding, str):
        return None
    plain = conv.padding_mode == "zeros" and conv.groups == 1 and conv.dilation == (1, 1)
    square = stride == across and kernel == width and len(set(conv.padding)) == 1
    if len(image) != 3 or not (plain and square) or stride == 1 or conv.in_channels != image[0]:
        return None
    padding = conv.padding[0]
    if any(
        size % stride or (size + 2 * padding - kernel) // stride + 1 != size // stride for size in image[1:]
    ):
        return None
    return max(-(-padding // stride), (kernel - 1 - padding) // stride)


def _unshuffled(conv: nn.Conv2d, reach: int) -> nn.Sequential:
    """`conv` on blocks of stride x stride pixels, each of which becomes the channels of one pixel."""
    stride, size = conv.stride[0], 2 * reach + 1
    out, channels = conv.weight.shape[:2]
    # The kernel on the pixels of the (2 * reach + 1) ** 2 blocks around, zero where it does not look.
    before = reach * stride - int(conv.padding[0])
    after = size * stride - before - conv.kernel_size[0]
    spread = nn.functional.pad(conv.weight.detach(), (before, after, before, after))
    blocks = spread.view(out, channels, size, stride, size, stride).permute(0, 1, 3, 5, 2, 4)
    made = nn.Conv2d(channels * stride**2, out, size, padding=reach, bias=conv.bias is not None)
    made.weight = nn.Parameter(blocks.reshape(out, -1, size, size).contiguous())
    if conv.bias is not None:
        made.bias = nn.Parameter(conv.bias.detach())
    return nn.Sequential(nn.PixelUnshuffle(stride), made)
