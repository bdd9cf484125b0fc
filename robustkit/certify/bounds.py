"""Deterministic Linf certificates: lower bounds on every margin of a ReLU network over a whole box.

A margin is the true class's logit less another's. Where every lower bound is positive, no perturbation in
the ball changes the class: a proof, not a test. The bounds hold for `nn.Sequential` models of the layers
in `LAYERS` that end in a linear one, and their gradients train such models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.data import Dataset
from robustkit.errors import RobustkitError
from robustkit.models import Normalize
from robustkit.results import Interval
from robustkit.threat import Ball, check_batch

LAYERS = (nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten, Normalize)
ROUNDING = 1e-4  # a margin that a float32 forward pass could round away is no proof

Margins = Callable[[nn.Module, Tensor, Tensor, Ball], Tensor]


def ibp_margins(model: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Lower bounds on the margins by interval arithmetic, the last layer merged with the difference of logits.

    Source: Gowal et al. 2018 (arXiv 1810.12715), equations 6 and 7 and the elision of section 3. The box
    is cut at [0, 1], where every attack ends as well.
    Shapes: x (n, ...), y (n,) -> (n, classes), 0 in the true class's column. Units: logits.
    Raises: RobustkitError for a ball that is not Linf, or a layer without a bound.
    """
    layers = _layers(model)
    lower, upper = _box(x, ball)
    for layer in layers[:-1]:
        lower, upper = _interval(layer, lower, upper)
    weight, bias = _differences(layers[-1], y)
    return _lowest(weight, lower, upper) + bias


def crown_ibp_margins(model: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Lower bounds on the margins by linear relaxation, carried back from the logits to the pixels.

    Source: Zhang et al. 2020 (arXiv 1906.06316), section 3.2: intervals bound the inner activations,
    CROWN (Zhang et al. 2018, arXiv 1811.00866) bounds the margins. An unstable ReLU is bounded below by the
    identity or by zero, whichever leaves the smaller area, and above by its chord.
    Shapes, units, raises: as `ibp_margins`; about as many times its cost as there are classes.
    """
    layers = _layers(model)
    boxes = [_box(x, ball)]
    for layer in layers[:-1]:
        boxes.append(_interval(layer, *boxes[-1]))
    coefficients, constant = _differences(layers[-1], y)
    for layer, (lower, upper) in zip(reversed(layers[:-1]), reversed(boxes[:-1]), strict=True):
        coefficients, shift = _back(layer, coefficients, lower, upper)
        constant = constant + shift
    lower, upper = (side.flatten(1) for side in boxes[0])
    return _lowest(coefficients.flatten(2), lower, upper) + constant


def proved(margins: Tensor, y: Tensor) -> Tensor:
    """Which examples no perturbation in the ball can move to another class. Shapes: (n, classes), (n,) -> (n,)."""
    return margins.scatter(1, y[:, None], torch.inf).amin(1) > ROUNDING


def verified_accuracy(
    model: nn.Module, data: Dataset, ball: Ball, margins: Margins = crown_ibp_margins, batch_size: int = 250
) -> Interval:
    """The share of the images on which the model is right and cannot be made wrong within the ball.

    The bounds are computed in float64, on a copy of the model, so that their own rounding proves nothing.
    Raises: RobustkitError as `ibp_margins`, and on images outside [0, 1].
    """
    check_batch(data.x, data.y)
    exact = copy.deepcopy(model).double().eval()
    count = 0
    with torch.no_grad():
        for rows in torch.arange(len(data), device=data.x.device).split(batch_size):
            y = data.y[rows]
            count += int(proved(margins(exact, data.x[rows].double(), y, ball), y).sum())
    return Interval(count, len(data))


# --- layers ------------------------------------------------------------------------------------------


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers in order. Raises: RobustkitError for one that has no bound here."""
    found = _flat(model)
    for layer in found:
        if not isinstance(layer, LAYERS) or getattr(layer, "padding_mode", "zeros") != "zeros":
            names = ", ".join(kind.__name__ for kind in LAYERS)
            raise RobustkitError(
                f"no bound is known for {type(layer).__name__}; certify an nn.Sequential of {names}."
            )
    if not found or not isinstance(found[-1], nn.Linear):
        raise RobustkitError("the last layer must be nn.Linear, which gives the logits; rearrange the model.")
    return found


def _flat(model: nn.Module) -> list[nn.Module]:
    if not isinstance(model, nn.Sequential):
        return [model]
    return [layer for part in model for layer in _flat(part)]


def _box(x: Tensor, ball: Ball) -> tuple[Tensor, Tensor]:
    if ball.norm != "Linf":
        raise RobustkitError(f"interval bounds are for Linf balls; got {ball}. Smoothing certifies L2.")
    return (x - ball.eps).clamp(0, 1), (x + ball.eps).clamp(0, 1)


def _interval(layer: nn.Module, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest box that holds a layer's outputs over a box of inputs."""
    if isinstance(layer, nn.ReLU | nn.Flatten | Normalize):  # each output rises with one input
        return layer(lower), layer(upper)
    centre, radius = layer((lower + upper) / 2), (upper - lower) / 2
    if isinstance(layer, nn.Conv2d):
        spread = F.conv2d(
            radius,
            layer.weight.abs(),
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )
    else:
        assert isinstance(layer, nn.Linear)
        spread = F.linear(radius, layer.weight.abs())
    return centre - spread, centre + spread


def _differences(layer: nn.Module, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (n, classes, features) and biases (n, classes) of the margins, by the last layer's inputs."""
    assert isinstance(layer, nn.Linear)
    bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
    return layer.weight[y][:, None] - layer.weight, bias[y][:, None] - bias


def _lowest(weight: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The minimum over a box of linear functions. Shapes: (n, k, d), (n, d), (n, d) -> (n, k)."""
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    return (weight @ centre[:, :, None] - weight.abs() @ radius[:, :, None]).squeeze(2)


def _back(layer: nn.Module, weight: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Linear lower bounds in a layer's outputs as ones in its inputs, and what is added to their constants.

    Shapes: weight (n, k, *outputs), the box of inputs (n, *inputs) -> (n, k, *inputs), (n, k).
    """
    n, k = weight.shape[:2]
    if isinstance(layer, nn.Flatten):
        return weight.view(n, k, *lower.shape[1:]), weight.new_zeros(n, k)
    if isinstance(layer, Normalize):
        return weight / layer.std, -(weight * layer.mean / layer.std).flatten(2).sum(2)
    if isinstance(layer, nn.Linear):
        shift = weight.new_zeros(n, k) if layer.bias is None else weight @ layer.bias
        return weight @ layer.weight, shift
    if isinstance(layer, nn.Conv2d):
        shift = weight.new_zeros(n, k) if layer.bias is None else weight.sum((-1, -2)) @ layer.bias
        back = F.conv_transpose2d(
            weight.flatten(0, 1),
            layer.weight,
            None,
            layer.stride,
            _padding(layer),
            _rest(layer, lower, weight),
            layer.groups,
            layer.dilation,
        )
        return back.unflatten(0, (n, k)), shift
    below, above, intercept = (line[:, None] for line in relaxation(lower, upper))
    positive, negative = weight.clamp_min(0), weight.clamp_max(0)
    return positive * below + negative * above, (negative * intercept).flatten(2).sum(2)


def relaxation(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lines around ReLU on [lower, upper]: `below` * z <= relu(z) <= `above` * z + `intercept`."""
    unstable = (lower < 0) & (upper > 0)
    chord = upper / (upper - lower).clamp_min(1e-12)
    active = (lower >= 0).to(lower.dtype)
    above = torch.where(unstable, chord, active)
    below = torch.where(unstable, (upper > -lower).to(lower.dtype), active)
    return below, above, torch.where(unstable, -chord * lower, torch.zeros_like(lower))


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    if isinstance(layer.padding, str):
        raise RobustkitError(f"padding {layer.padding!r} has no bound here; give its size in pixels.")
    return layer.padding


def _rest(layer: nn.Conv2d, inputs: Tensor, outputs: Tensor) -> list[int]:
    """The rows and columns that a strided convolution left unread at the end of its input."""
    return [
        inputs.shape[-2 + i]
        - (outputs.shape[-2 + i] - 1) * layer.stride[i]
        + 2 * _padding(layer)[i]
        - layer.dilation[i] * (layer.kernel_size[i] - 1)
        - 1
        for i in (0, 1)
    ]
