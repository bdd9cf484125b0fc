"""Threat models: what the attacker may do.

All Lp geometry of the kit is in `Ball`, turning and shifting in `RotationTranslation`, squares in `Patch`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from robustkit.errors import RobustkitError

# Inside functions below, so that results and reports can name a threat model without importing torch.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from robustkit.device import Model

NORMS = ("Linf", "L2", "L1")
KNOWLEDGE = ("white-box", "score-based", "label-only", "transfer")
GOALS = ("untargeted", "targeted")

# How far float32 arithmetic alone can carry `x + delta` past eps: one rounding of a value in
# [0, 1] per coordinate for Linf, the root of a few thousand of them for L2, their sum for L1.
TOLERANCE = {"Linf": 1e-6, "L2": 1e-5, "L1": 1e-4}


def per_example(size: Tensor, like: Tensor) -> Tensor:
    """One value an example, shaped to multiply images. Shapes: (n,), (n, ...) -> (n, 1, ...)."""
    return size.view(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True)
class Ball:
    """The perturbations of norm at most `eps`, around each example on its own.

    Units: `eps` is in input units, where images lie in [0, 1]; 8/255 is 0.0314.
    Shapes: every tensor has the batch in dimension 0; each example is one vector.
    Raises: RobustkitError for an unknown norm, or an `eps` that is negative or not finite.

    >>> import torch
    >>> Ball("Linf", 0.25).project(torch.tensor([[0.5, -0.125]])).tolist()
    [[0.25, -0.125]]
    """

    norm: str
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise RobustkitError(f"norm {self.norm!r} is unknown; choose one of {', '.join(NORMS)}.")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise RobustkitError(
                f"eps must be a finite number, zero or larger; got {self.eps}. Give it in input units, e.g. 8/255."
            )

    def __str__(self) -> str:
        return f"{self.norm} eps={self.eps:.4g}"

    def size(self, delta: Tensor) -> Tensor:
        """The norm of each example's perturbation. Shapes: (n, ...) -> (n,)."""
        flat = delta.flatten(1)
        if self.norm == "Linf":
            return flat.abs().amax(1)
        return flat.norm(dim=1) if self.norm == "L2" else flat.abs().sum(1)

    def project(self, delta: Tensor) -> Tensor:
        """The nearest point of the ball: identity inside it, its surface outside it."""
        if self.norm == "Linf":
            return delta.clamp(-self.eps, self.eps)
        if self.norm == "L1":
            return _nearest_in_l1(delta, delta.abs(), self.eps)
        shrink = (self.eps / self.size(delta).clamp_min(1e-12)).clamp_max(1.0)
        return delta * per_example(shrink, delta)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The perturbation of norm 1 along which a loss with this gradient rises fastest.

        Source: Boyd & Vandenberghe, Convex Optimization, section 9.4 (steepest descent in a norm).
        A gradient of zero gives a step of zero. In L1 the step is along one coordinate, the steepest.
        """
        import torch

        if self.norm == "Linf":
            return gradient.sign()
        if self.norm == "L1":
            flat = gradient.flatten(1)
            steepest = flat.abs().argmax(1, keepdim=True)
            step = torch.zeros_like(flat).scatter(1, steepest, flat.gather(1, steepest).sign())
            return step.view_as(gradient)
        # Divide by the largest entry first: squares of small gradients underflow in float32.
        largest = gradient.flatten(1).abs().amax(1)
        scaled = gradient / per_example(largest.clamp_min(torch.finfo(gradient.dtype).tiny), gradient)
        return scaled / per_example(scaled.flatten(1).norm(dim=1).clamp_min(1e-12), gradient)

    def random(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A perturbation drawn uniformly from the ball's volume, one for each example.

        Randomness: `generator` alone (it must live on the device of `like`).
        """
        import torch

        if self.norm == "Linf":
            unit = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
            return (2 * unit - 1) * self.eps
        if self.norm == "L1":
            return self._random_l1(like, generator)
        normal = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        dimension = max(like[0].numel(), 1)
        uniform = torch.rand(len(like), generator=generator, device=like.device, dtype=like.dtype)
        radius = self.eps * uniform ** (1 / dimension)
        return self.steepest(normal) * per_example(radius, like)

    def _random_l1(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Exponentials divided by their sum and one more, with fair signs, fill the unit L1 ball uniformly.

        Source: Barthe, Guedon, Mendelson & Naor 2005 (arXiv math/0503650), for p = 1.
        """
        import torch

        size = (len(like), max(like[0].numel(), 1))
        uniform = torch.rand((2, *size), generator=generator, device=like.device, dtype=like.dtype)
        one_more = torch.rand(len(like), 1, generator=generator, device=like.device, dtype=like.dtype)
        exponential = -torch.log1p(-uniform[0])
        total = exponential.sum(1, keepdim=True) - torch.log1p(-one_more)
        signs = 1 - 2 * (uniform[1] < 0.5).to(like.dtype)
        return (self.eps * signs * exponential / total).view_as(like)

    def candidates(self, x: Tensor, delta: Tensor) -> Tensor:
        """`x + delta`, projected onto the ball and then onto the box [0, 1].

        The box is applied last: it moves every coordinate towards `x`, which lies in the box,
        so the result stays in the ball for every Lp norm. For L1 it is the nearest point of ball and box
        at once: what the walls cut off would otherwise be lost to the coordinates that have room.
        """
        if self.norm == "L1":
            import torch

            room = torch.where(delta > 0, 1 - x, x)
            return (x + _nearest_in_l1(delta, room, self.eps)).clamp_(0.0, 1.0)
        return (x + self.project(delta)).clamp_(0.0, 1.0)

    def contains(self, x: Tensor, candidate: Tensor) -> Tensor:
        """Whether each candidate lies in the ball around its example, up to float32 rounding."""
        return self.size(candidate - x) <= self.eps + TOLERANCE[self.norm]


def _nearest_in_l1(delta: Tensor, room: Tensor, eps: float) -> Tensor:
    """The nearest perturbation of L1 norm at most `eps` with no coordinate larger than its `room`.

    Every coordinate shrinks by the same amount, as far as zero, and is cut at its room. The amount is the
    zero of a piecewise linear function, found by sorting its kinks.
    Source: Duchi et al. 2008, Efficient projections onto the l1-ball, where room binds nowhere;
    Croce & Hein 2021 (arXiv 2103.01208), for the intersection with a box.
    """
    import torch

    # float64: where delta is large and eps small, rounding the amount would miss eps.
    size, room = delta.flatten(1).abs().double(), room.flatten(1).double()
    # As the amount falls past a coordinate's size it starts to count, past size - room it is full.
    kinks, order = torch.cat([size, size - room], 1).sort(1, descending=True)
    counting = torch.where(order < size.shape[1], 1, -1).cumsum(1)[:, :-1]
    total = (counting * (kinks[:, :-1] - kinks[:, 1:])).cumsum(1)  # the norm at each kink but the first
    last = (total < eps).sum(1, keepdim=True).clamp_max(total.shape[1] - 1)
    over = total.gather(1, last) - eps
    shrink = kinks.gather(1, last + 1) + over / counting.gather(1, last).clamp_min(1)
    shrink = torch.where(over >= 0, shrink, 0.0).clamp_min(0.0)  # zero where all of it fits
    nearest = (size - shrink).clamp_min(0.0).minimum(room).to(delta.dtype)
    return (nearest * delta.flatten(1).sign()).view_as(delta)


@dataclass(frozen=True)
class RotationTranslation:
    """Images turned by up to `degrees` and shifted by up to `pixels` each way, on a lattice.

    The set is finite, so that membership can be checked: 31 angles, evenly from -`degrees` to `degrees`
    (counter-clockwise), times 5 by 5 shifts, evenly from -`pixels` to `pixels` (right, down): 775
    transforms, the identity among them. Turning comes first, about the centre; pixels are interpolated
    linearly, and black comes in from outside.
    Source: Engstrom et al. 2019 (arXiv 1712.02779), section 3, whose grid this is; there 30 degrees and a
    tenth of the side. Difference: their random attack draws from the continuous box, ours from the lattice.
    Units: `norm` is "rotation-translation" and `eps`, the size to plot, is `degrees`.
    Shapes: images (n, channels, height, width).
    Raises: RobustkitError for degrees outside [0, 180], pixels that are negative or not finite, images of
    another shape, and where a method is asked for that only an Lp ball has.

    >>> len(RotationTranslation(30, 3).transforms())
    775
    """

    degrees: float
    pixels: float

    def __post_init__(self) -> None:
        if not 0 <= self.degrees <= 180:
            raise RobustkitError(
                f"degrees must lie in [0, 180]; got {self.degrees}. Half a turn is everything."
            )
        if not (math.isfinite(self.pixels) and self.pixels >= 0):
            raise RobustkitError(f"pixels must be a finite number, zero or larger; got {self.pixels}.")

    def __str__(self) -> str:
        return f"{self.norm} up to {self.degrees:g} degrees and {self.pixels:g} pixels"

    @property
    def norm(self) -> str:
        return "rotation-translation"

    @property
    def eps(self) -> float:
        return self.degrees

    def transforms(self) -> Tensor:
        """The lattice: one row (degrees, pixels to the right, pixels down) for each transform."""
        import torch

        # Counted from the middle, so that the identity is exactly among them.
        angles, shifts = torch.arange(-15, 16) / 15 * self.degrees, torch.arange(-2, 3) / 2 * self.pixels
        return torch.cartesian_prod(angles, shifts, shifts)

    def transformed(self, x: Tensor, transforms: Tensor) -> Tensor:
        """Each image under its own transform; the identity gives the image bit for bit.

        Shapes: x (n, channels, height, width), transforms (n, 3) -> as x.
        """
        import torch
        import torch.nn.functional as F

        if x.dim() != 4:
            raise RobustkitError(
                f"turning needs images of shape (n, channels, height, width); got {tuple(x.shape)}."
            )
        height, width = x.shape[2:]
        angle, right, down = transforms.to(x).unbind(1)
        cos, sin = angle.deg2rad().cos(), angle.deg2rad().sin()
        # Where an output pixel comes from, in coordinates that run from -1 to 1 along both sides.
        rows = (
            (cos, -sin * height / width, (sin * down - cos * right) * 2 / width),
            (sin * width / height, cos, -(sin * right + cos * down) * 2 / height),
        )
        matrices = torch.stack([torch.stack(row, 1) for row in rows], 1)
        grid = F.affine_grid(matrices, list(x.shape), align_corners=False)
        turned = F.grid_sample(x, grid, align_corners=False).clamp(0.0, 1.0)
        return torch.where(per_example(transforms.to(x).any(1), x), turned, x)

    def contains(self, x: Tensor, candidate: Tensor) -> Tensor:
        """Whether each candidate is its example under some transform, up to 1e-4 in every pixel.

        Source: direct comparison with the whole lattice. Float32 interpolation on another device
        differs by less than that; a grey level is 4e-3.
        """
        import torch

        inside = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for transform in self.transforms():
            left = (~inside).nonzero().squeeze(1)
            if len(left) == 0:
                break
            images = self.transformed(x[left], transform.expand(len(left), 3))
            inside[left] = (images - candidate[left]).flatten(1).abs().amax(1) <= 1e-4
        return inside

    def _no_ball(self, *_: object) -> NoReturn:
        raise RobustkitError(
            f"{self} is no Lp ball, which this attack needs; use spatial_grid or spatial_random, or a Ball."
        )

    project = steepest = random = candidates = _no_ball


@dataclass(frozen=True)
class Patch:
    """Images in which one square of `side` pixels, anywhere, shows whatever the attacker likes.

    Source: Brown et al. 2017 (arXiv 1712.09665), without their invariance to place, size and turn: it need
    fool the model on one image alone.
    Units: `norm` is "patch" and `eps`, the size to plot, is `side`. Shapes: images (n, channels, height, width).
    Raises: RobustkitError for a side below 1, and where a method is asked for that only an Lp ball has.
    """

    side: int

    def __post_init__(self) -> None:
        if self.side < 1:
            raise RobustkitError(f"a patch has a side of at least 1 pixel; got {self.side}.")

    def __str__(self) -> str:
        return f"patch of {self.side} x {self.side} pixels"

    @property
    def norm(self) -> str:
        return "patch"

    @property
    def eps(self) -> float:
        return float(self.side)

    def contains(self, x: Tensor, candidate: Tensor) -> Tensor:
        """Whether all pixels that changed lie in one such square. Shapes: (n, c, h, w) twice -> bool (n,)."""
        import torch

        changed = (candidate - x).abs().amax(1) > TOLERANCE["Linf"]
        inside = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for axis in (1, 2):
            line = changed.any(axis)
            place = torch.arange(line.shape[1], device=x.device)
            first = torch.where(line, place, line.shape[1]).amin(1)
            last = torch.where(line, place, -1).amax(1)
            inside &= last - first < self.side
        return inside

    def _no_ball(self, *_: object) -> NoReturn:
        raise RobustkitError(f"{self} is no Lp ball, which this attack needs; use patch_pgd, or a Ball.")

    project = steepest = random = candidates = _no_ball


PerturbationSet = Ball | RotationTranslation | Patch


@dataclass(frozen=True)
class ThreatModel:
    """What an attacker may change, know and spend: the sentence without which a figure means nothing.

    `queries` is the number of model evaluations allowed per example; None means unlimited.
    Raises: RobustkitError for an unknown knowledge or goal, or a budget below 1.
    """

    ball: PerturbationSet
    knowledge: str
    goal: str
    queries: int | None
    input_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.knowledge not in KNOWLEDGE:
            raise RobustkitError(
                f"knowledge {self.knowledge!r} is unknown; choose one of {', '.join(KNOWLEDGE)}."
            )
        if self.goal not in GOALS:
            raise RobustkitError(f"goal {self.goal!r} is unknown; choose one of {', '.join(GOALS)}.")
        if self.queries is not None and self.queries < 1:
            raise RobustkitError(f"queries must be at least 1, or None for no limit; got {self.queries}.")

    def __str__(self) -> str:
        budget = "no query limit" if self.queries is None else f"at most {self.queries} queries per example"
        low, high = self.input_range
        return f"{self.ball} on inputs in [{low:g}, {high:g}], {self.knowledge}, {self.goal}, {budget}"


def white_box(ball: PerturbationSet) -> ThreatModel:
    """The usual threat model of a robustness evaluation: full knowledge, untargeted, no query limit."""
    return ThreatModel(ball, knowledge="white-box", goal="untargeted", queries=None)


def check_batch(x: Tensor, y: Tensor) -> None:
    """Refuse a batch that no attack or evaluation can be trusted on.

    Raises: RobustkitError when `x` is empty, not floating point, not finite or outside [0, 1], or
    when `y` is not one non-negative integer label for each example.
    """
    import torch

    if x.dim() < 2 or len(x) == 0:
        raise RobustkitError(f"x must be a non-empty batch of shape (n, ...); got shape {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise RobustkitError(
            f"x must be floating point in [0, 1]; got {x.dtype}. Divide integer images by 255."
        )
    low, high = x.min().item(), x.max().item()
    if math.isnan(low) or math.isnan(high):
        raise RobustkitError(
            "x must be finite; got NaN. Find the image that holds it before attacking the rest."
        )
    if low < 0 or high > 1:
        raise RobustkitError(
            f"x must lie in [0, 1]; got [{low:.3g}, {high:.3g}]. "
            "Put normalisation inside the model: robustkit.models.Normalize."
        )
    if y.shape != (len(x),):
        raise RobustkitError(f"y must hold one label per example, shape ({len(x)},); got {tuple(y.shape)}.")
    if y.dtype != torch.int64:
        raise RobustkitError(f"y must hold class numbers as int64; got {y.dtype}. Convert it with y.long().")
    if y.min().item() < 0:
        raise RobustkitError(f"labels must not be negative; got {y.min().item()}.")


def check_units(ball: PerturbationSet, x: Tensor) -> None:
    """Refuse an eps that can only be meant in units of 0..255: beyond what images in [0, 1] can tell apart.

    The limit is the distance between the two farthest images, 1 for Linf and sqrt(pixels) for L2; for L1,
    where 12 * 255 still falls below it on CIFAR-10, half of it. Raises: RobustkitError above the limit.
    """
    if not isinstance(ball, Ball):
        return
    pixels = x[0].numel()
    limit = {"Linf": 1.0, "L2": math.sqrt(pixels), "L1": max(pixels / 2, 1.0)}[ball.norm]
    if ball.eps > limit:
        raise RobustkitError(
            f"eps {ball.eps:g} is larger than any {ball.norm} attack on {pixels} pixels in [0, 1] needs "
            f"({limit:.4g}); if it counts grey levels of 0..255, write {ball.eps:g}/255."
        )


def check_places(model: Model, x: Tensor, y: Tensor) -> None:
    """Refuse images, labels and a model that are on different devices. Raises: RobustkitError."""
    from torch import nn

    if y.device != x.device:
        raise RobustkitError(f"x is on {x.device} and y on {y.device}; move them to one device.")
    if not isinstance(model, nn.Module):
        return
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if places and x.device not in places:
        raise RobustkitError(
            f"the images are on {x.device}, the model on {', '.join(sorted(map(str, places)))}; "
            "move one to the other, e.g. model.to(x.device)."
        )


def check_logits(logits: Tensor, y: Tensor, *, classes: int | None = None) -> None:
    """Refuse model output that cannot be a logit for each class.

    Raises: RobustkitError when they are no tensor of shape (n, classes), a label is out of range, or a value
    is NaN.
    """
    import torch

    if not isinstance(logits, torch.Tensor):
        raise RobustkitError(f"the model must return a tensor of logits; got {type(logits).__name__}.")
    if logits.dim() != 2 or len(logits) != len(y):
        raise RobustkitError(
            f"the model must return logits of shape ({len(y)}, classes); got {tuple(logits.shape)}."
        )
    if y.max().item() >= logits.shape[1]:
        raise RobustkitError(
            f"label {y.max().item()} is out of range: the model has {logits.shape[1]} classes, numbered from 0."
        )
    if classes is not None and logits.shape[1] != classes:
        raise RobustkitError(
            f"the model has {logits.shape[1]} classes and the data have {classes}; "
            "evaluate it on the data that it was trained for."
        )
    if logits.isnan().any():
        raise RobustkitError(
            "the model returned NaN logits; a verdict on them would be arbitrary. Check its weights."
        )


def look_like_probabilities(logits: Tensor) -> Tensor:
    """Which rows lie in [0, 1] and sum to 1. Shapes: (n, classes) -> bool (n,)."""
    return ((logits >= 0) & (logits <= 1)).all(1) & ((logits.sum(1) - 1).abs() <= 1e-5)


def check_no_probabilities(logits: Tensor) -> None:
    """Refuse probabilities: on them cross-entropy and DLR mislead an attack, and robustness looks too good.

    Shapes: logits (n, classes). Raises: RobustkitError when every row lies in [0, 1] and sums to 1.
    """
    if look_like_probabilities(logits).all():
        raise RobustkitError(
            "the model returns probabilities (each row lies in [0, 1] and sums to 1); "
            "return logits: leave out the softmax."
        )
