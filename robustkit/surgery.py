"""The same function in fewer operations: exact rewritings of a network that is evaluated, not trained.

Each changes a model in place, and rounding apart changes nothing that it computes in eval mode. They are
for copies: a rewritten model can no longer be trained, nor read the weights file of its architecture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

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
    flatten_channels_last(model, image)
    rows_as_products(model, image)


# --- Layers that follow each other -----------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Traces through a model as far as modules without submodules, of whichever package."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None or super().is_leaf_module(m, module_qualified_name)


def _pairs(
    model: nn.Module, fit: Callable[[nn.Module, nn.Module], bool]
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Every two layers that fit, of which the first one's output goes into the second and nowhere else.

    Where control flow hinders tracing a module as a whole, its submodules are traced one by one.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception:  # tracing runs the model's own code on stand-ins, which may raise anything
        for child in model.children():
            yield from _pairs(child, fit)
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
        first, second = model.get_submodule(before.target), model.get_submodule(node.target)
        if fit(first, second):
            yield first, second


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    new.train(old.training)
    for parent in list(model.modules()):  # as they are now: the new one may hold the old one
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


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


def fold_batchnorm(model: nn.Module) -> None:
    """Multiply each BatchNorm that directly follows a convolution into its weights.

    Source: Jacob et al. 2018 (arXiv 1712.05877), section 3.2. torch.fx finds the pairs; the model's own
    code still runs, with an identity in the BatchNorm's place.
    """
    # The exact type: a parametrised convolution (weight_norm, ...) has a class of its own.
    for conv, norm in list(_pairs(model, lambda conv, norm: type(conv) is nn.Conv2d and _running(norm))):
        assert isinstance(conv, nn.Conv2d)  # by the line above, as is the norm
        assert isinstance(norm, nn.BatchNorm2d)
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


# --- From images to vectors ------------------------------------------------------------------------


class FlattenChannelsLast(nn.Module):
    """Flattens pixel by pixel, all channels of one after the other, as a channels-last tensor lies in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def flatten_channels_last(model: nn.Module, image: torch.Size) -> None:
    """Flatten in the order of memory, with the columns of the linear layer behind in that order too.

    The usual order costs a copy, and worse: the gradient that comes back lies channel by channel, and the
    layers before take up to thirty times as long on tensors of two layouts.
    """

    def fit(flatten: nn.Module, linear: nn.Module) -> bool:
        whole = isinstance(flatten, nn.Flatten) and (flatten.start_dim, flatten.end_dim) == (1, -1)
        return whole and type(linear) is nn.Linear

    shapes: dict[nn.Module, torch.Size] = {}
    pairs = list(_pairs(model, fit))
    hooks = [
        flatten.register_forward_hook(lambda layer, given, _: shapes.update({layer: given[0].shape[1:]}))
        for flatten, _ in pairs
    ]
    if pairs:
        with torch.no_grad():
            model(torch.zeros(1, *image, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    for flatten, linear in pairs:
        shape = shapes[flatten]
        if len(shape) != 3 or shape == image:
            continue
        assert isinstance(linear, nn.Linear)  # by `fit`
        columns = linear.weight.detach().unflatten(1, (shape[0], -1)).transpose(1, 2)
        linear.weight = nn.Parameter(columns.flatten(1))
        _replace(model, flatten, FlattenChannelsLast())


# --- Strided convolutions on images ----------------------------------------------------------------

WASTE = 16  # how many times the multiplications of a convolution its products may have


class OnRows(nn.Module):
    """A convolution, and the same as one matrix product for when a gradient will be asked for.

    A row of the output is a product of the rows of the image that it looks at, which lie side by side in
    memory, and a matrix that is mostly zero.
    """

    def __init__(self, conv: nn.Conv2d, image: torch.Size) -> None:
        super().__init__()
        self.plain, self.image = conv, image
        (channels, height, width), (above, beside) = image, (int(side) for side in conv.padding)
        self.stride, kernel = conv.stride[0], conv.kernel_size[0]
        self.seen = -(-kernel // self.stride)  # blocks of `stride` rows that a row of the output looks at
        self.high = (height + 2 * above - kernel) // self.stride + 1
        self.around = above, (self.high - 1 + self.seen) * self.stride - height - above
        # What each pixel of these rows contributes to a row of the output.
        rows, weight = self.seen * self.stride, conv.weight.detach()
        pixels = torch.eye(rows * width * channels, device=weight.device, dtype=weight.dtype)
        pixels = pixels.view(-1, rows, width, channels).permute(0, 3, 1, 2)
        row = nn.functional.conv2d(pixels, weight, None, conv.stride, (0, beside))[:, :, 0]
        self.product = nn.Linear(len(pixels), row[0].numel(), bias=conv.bias is not None)
        self.product.weight = nn.Parameter(row.permute(2, 1, 0).flatten(0, 1).contiguous())
        if conv.bias is not None:
            self.product.bias = nn.Parameter(conv.bias.detach().repeat(row.shape[2]))

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad) or x.shape[1:] != self.image:
            plain: Tensor = self.plain(x)
            return plain
        rows = x.to(self.product.weight.dtype).permute(0, 2, 3, 1).flatten(2)
        blocks = nn.functional.pad(rows, (0, 0, *self.around)).unflatten(1, (-1, self.stride)).flatten(2)
        seen = torch.cat([blocks[:, i : i + self.high] for i in range(self.seen)], 2)
        made: Tensor = self.product(seen).unflatten(2, (-1, self.plain.out_channels)).permute(0, 3, 1, 2)
        return made


def rows_as_products(model: nn.Module, image: torch.Size) -> None:
    """Turn a strided convolution on the image into one matrix product.

    With few channels, the backward pass of a strided convolution is slow on a CPU: on a 28 x 28 image with
    stride 2 it takes ten times as long as this one, which has seven times the multiplications. A forward
    pass alone gains nothing, and keeps the convolution as it was.
    """
    for conv in [module for module in model.modules() if type(module) is nn.Conv2d]:
        if _wasteless(conv, image):
            _replace(model, conv, OnRows(conv, image))


def _wasteless(conv: nn.Conv2d, image: torch.Size) -> bool:
    """Whether a convolution is of the kind that gains, on an image that is narrow enough."""
    (stride, _), (kernel, width) = conv.stride, conv.kernel_size
    plain = conv.padding_mode == "zeros" and conv.groups == 1 and conv.dilation == (1, 1)
    if len(image) != 3 or conv.in_channels != image[0] or isinstance(conv.padding, str) or not plain:
        return False
    return stride > 1 and -(-kernel // stride) * stride * image[2] <= WASTE * kernel * width
