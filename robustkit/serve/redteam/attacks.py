"""Black-box attacks that ask an oracle, and how they adapt to its rejections.

    attack(oracle, x, y, threat, *, generator) -> Tensor      x (1, c, h, w), y (1,)

The kit's and other libraries' attacks are used as they are; what is written here is what they lack. An attack
adapts by one number, a `Dial`: how far a query lies from the one before. It rises when a query is rejected and falls
slowly while they pass, so that it settles where about one query in ten is rejected.
Source of the idea: Feng et al., Stateful defenses for machine learning models are not yet secure against black-box
attacks (CCS 2023, arXiv 2303.06280), who tune step and noise beforehand and redraw what is rejected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from robustkit.attacks import pgd, spatial_random, square
from robustkit.attacks.library import LIBRARY, art_hop_skip_jump
from robustkit.attacks.search import random_search
from robustkit.attacks.transfer import on_surrogate
from robustkit.device import Model
from robustkit.errors import RobustkitError
from robustkit.losses import margin
from robustkit.serve.redteam.oracle import Oracle
from robustkit.threat import Ball, PerturbationSet

SPATIAL = "rotation-translation"

# What an attack needs to be told: scores, labels alone, or nothing while it searches.
KNOWLEDGE = {
    "square": "score-based",
    "simba": "score-based",
    "nes": "score-based",
    "linear-bandit": "score-based",
    "hop-skip-jump": "label-only",
    "transfer-pgd": "transfer",
    SPATIAL: "label-only",
    "art-square": "score-based",
}

RESAMPLED = (
    "simba",
    "hop-skip-jump",
    "art-square",
)  # these know nothing of rejections: the oracle redraws for them

_NOISE = 0.03  # what a linear model misses of log-scores, as a share of what a perturbation may do to them

_GRAIN = 4  # blocks to a side of the image: coarse enough for a detector that blurs to see a change


class QueryAttack(Protocol):
    """What a campaign calls for one image; what it returns is one more query."""

    def __call__(
        self, oracle: Oracle, x: Tensor, y: Tensor, threat: Any, *, generator: torch.Generator
    ) -> Tensor: ...


@dataclass
class Dial:
    """A number in (0, 1] that follows the rejections; with `rise` and `fall` of 1 it stays where it is."""

    value: float
    rise: float = 1.3
    fall: float = 0.97
    least: float = 0.02

    def up(self) -> None:
        self.value = min(1.0, self.value * self.rise)

    def down(self) -> None:
        self.value = max(self.least, self.value * self.fall)

    def told(self, answered: bool) -> None:
        """Follow one answer."""
        self.down() if answered else self.up()


def check(names: Sequence[str], surrogate: Model | None) -> None:
    """Raises: RobustkitError for an unknown name, a library that is not installed, or transfer without a surrogate."""
    if unknown := [name for name in names if name not in KNOWLEDGE]:
        raise RobustkitError(f"attack {unknown[0]!r} is unknown; choose of {', '.join(KNOWLEDGE)}.")
    if "transfer-pgd" in names and surrogate is None:
        raise RobustkitError("transfer-pgd needs a model of the attacker's own; name one with --surrogate.")
    if {"hop-skip-jump", "art-square"} & set(names) and find_spec("art") is None:
        raise RobustkitError(
            "hop-skip-jump and art-square are ART's, which is not installed; pip install 'robustkit[peers]', or leave "
            "them out."
        )


def chosen(
    names: Sequence[str],
    ball: Ball,
    others: tuple[Tensor, Tensor],
    *,
    adaptive: bool = False,
    surrogate: Model | None = None,
) -> dict[str, QueryAttack]:
    """Attacks by name. `others` are the attacker's other images and their classes, to start from.

    An attack keeps its dial from one image to the next. Raises: as `check`.
    """
    check(names, surrogate)
    dial = Dial(0.25) if adaptive else Dial(0.25, 1, 1)
    known: dict[str, QueryAttack] = {
        "square": partial(block_search, dial=dial) if adaptive else _square,
        "simba": simba,
        "nes": partial(nes, dial=dial),
        "linear-bandit": partial(linear_bandit, dial=dial),
        "hop-skip-jump": partial(_hop_skip_jump, *others),
        SPATIAL: _spatial,
        "art-square": _art_square,
    }
    if surrogate is not None:
        known["transfer-pgd"] = partial(_transfer, surrogate)
    return {name: known[name] for name in names}


# --- attacks that stand elsewhere -------------------------------------------------------------------


def _square(oracle: Oracle, x: Tensor, y: Tensor, threat: Ball, *, generator: torch.Generator) -> Tensor:
    return square(oracle, x, y, threat, queries=oracle.budget, generator=generator)


def _art_square(oracle: Oracle, x: Tensor, y: Tensor, threat: Ball, *, generator: torch.Generator) -> Tensor:
    found: Tensor = LIBRARY["art-square"](oracle, x, y, threat, generator=generator)
    return found


def _spatial(
    oracle: Oracle, x: Tensor, y: Tensor, threat: PerturbationSet, *, generator: torch.Generator
) -> Tensor:
    return spatial_random(oracle, x, y, threat, draws=oracle.budget, generator=generator)


def _transfer(
    surrogate: Model, oracle: Oracle, x: Tensor, y: Tensor, threat: Ball, *, generator: torch.Generator
) -> Tensor:
    return on_surrogate(surrogate, pgd, oracle, x, y, threat, generator=generator)


def _hop_skip_jump(
    images: Tensor,
    classes: Tensor,
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    threat: Ball,
    *,
    generator: torch.Generator,
) -> Tensor:
    """From the nearest of the attacker's images that the service puts into another class."""
    other = images[classes != y]
    if not len(other):
        return x
    nearest = (other - x).flatten(1).norm(dim=1).argmin()
    return art_hop_skip_jump(oracle, x, y, threat, start=other[nearest][None].clone(), generator=generator)


# --- written here --------------------------------------------------------------------------------------


def simba(oracle: Oracle, x: Tensor, y: Tensor, threat: Ball, *, generator: torch.Generator) -> Tensor:
    """Along one low-frequency direction after the other, a step up or else down, kept where the margin rises.

    Source: Guo et al. 2019 (arXiv 1905.07121), algorithm 1 with the DCT basis of an eighth to a quarter of the
    frequencies; the step is half of eps in the ball's norm, and the sum is projected onto the ball.
    Shapes: x (1, c, h, w), y (1,) -> as x. Randomness: `generator`. Raises: what the oracle raises.
    """
    _, channels, height, width = x.shape
    side = max(min(height, width) // 4, 1)
    best, highest = x, margin(oracle(x), y)
    while True:
        for place in torch.randperm(channels * side * side, generator=generator).tolist():
            channel, row, column = place // side**2, place % side**2 // side, place % side
            direction = torch.zeros_like(x)
            direction[0, channel] = torch.outer(_cosine(height, row), _cosine(width, column)).to(x)
            step = threat.eps / 2 * direction / threat.size(direction)
            for signed in (step, -step):
                point = threat.candidates(x, best + signed - x)
                rise = margin(oracle(point), y)
                if rise > highest:
                    best, highest = point, rise
                    break


def _cosine(length: int, frequency: int) -> Tensor:
    return torch.cos(math.pi * (torch.arange(length, dtype=torch.float64) + 0.5) * frequency / length)


def nes(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    threat: Ball,
    *,
    generator: torch.Generator,
    dial: Dial,
    pairs: int = 5,
) -> Tensor:
    """Projected ascent along a gradient that pairs of noisy queries estimate; rejected pairs are left out.

    Source: Ilyas et al. 2018 (arXiv 1804.08598), antithetic sampling, with the momentum of their code. Differences: the
    noise is of random signs in blocks and of a size that 8 bits can hold (`dial` of eps); the best point is drawn back
    by as much, so that each query lies in the ball and may be the one that succeeds; 5 pairs a step, of half of eps,
    since a budget is of hundreds of queries here, not of ten thousands.
    Shapes: x (1, c, h, w), y (1,) -> as x. Randomness: `generator`. Raises: what the oracle raises.
    """
    best, gradient = x, torch.zeros_like(x)
    while True:
        gradient = 0.9 * gradient
        for _ in range(pairs):
            noise, size = threat.steepest(_blocks(x, _GRAIN, generator)), dial.value
            centre, apart = (1 - size) * (best - x), size * threat.eps * noise
            points = threat.candidates(x, torch.cat([centre + apart, centre - apart]))
            up, down = margin(oracle(points), y.expand(2)).tolist()
            for answered in oracle.answered.tolist():
                dial.told(answered)
            if oracle.answered.all():
                gradient += (up - down) / size * noise
        best = threat.candidates(x, best + threat.eps / 2 * threat.steepest(gradient) - x)
        oracle(best)


def block_search(
    oracle: Oracle, x: Tensor, y: Tensor, threat: Ball, *, generator: torch.Generator, dial: Dial
) -> Tensor:
    """Square Attack's search, adapted: a share of all blocks is drawn anew at once, and the dial is that share.

    A small square, as Square's are late in its schedule, is what detectors of near-duplicates look for.
    Source: random search as in Andriushchenko et al. 2020 (arXiv 1912.00049).
    Shapes: x (1, c, h, w), y (1,) -> as x. Randomness: `generator`. Raises: what the oracle raises.
    """

    def propose(query: int, clean: Tensor, best: Tensor) -> Tensor:
        fresh = threat.eps * threat.steepest(_blocks(x, _GRAIN, generator))
        if query == 0:
            return threat.candidates(x, fresh)
        dial.told(bool(oracle.answered[-1]))
        kept = _blocks(x[:, :1], _GRAIN, generator, share=dial.value) == 0
        return threat.candidates(x, torch.where(kept, best - x, fresh))

    return random_search(oracle, x, y, oracle.budget, propose)


def linear_bandit(
    oracle: Oracle, x: Tensor, y: Tensor, threat: Ball, *, generator: torch.Generator, dial: Dial
) -> Tensor:
    """Asks where a linear model, drawn from what all answers leave possible, says that an image falls.

    A search keeps near its best point; here an answer tells as much wherever it was asked, so queries may lie as far
    apart as a detector wants. The log-scores of all classes are taken to be linear in the lowest 8x8 cosines of
    the perturbation in each channel, a Bayesian regression; the dial scales the doubt that a draw adds.
    Source: Thompson sampling for linear bandits, Agrawal & Goyal 2013 (arXiv 1209.3352), which keeps one reward where
    this keeps one for each class; Ilyas et al. 2019 (arXiv 1807.07978) for bandits with priors as attacks.
    Shapes: x (1, c, h, w), y (1,) -> as x. Randomness: `generator`. Raises: what the oracle raises.
    """
    _, channels, height, width = x.shape
    down, across = (_cosines(length, min(8, length)) for length in (height, width))
    rows, columns = torch.arange(len(down))[:, None], torch.arange(len(across))
    falling = 1 / (1 + (rows**2 + columns**2).sqrt())  # photos and what moves a model are smooth
    # A perturbation of the ball's size has features of norm 1 at most, whatever the norm.
    unit = threat.eps * float(threat.steepest(torch.randn(x.shape, generator=generator)).norm())

    def features(points: Tensor) -> Tensor:
        low = torch.einsum("nchw,ih,jw->ncij", (points - x).double().cpu(), down, across) * falling / unit
        return torch.cat([torch.ones(len(points), 1, dtype=torch.float64), low.flatten(1)], 1)

    size = 1 + channels * falling.numel()
    precision = _NOISE**2 * torch.eye(size, dtype=torch.float64)
    moments = torch.zeros(size, oracle.classes, dtype=torch.float64)
    point = x
    while True:
        told = oracle(point).double().cpu()
        dial.told(bool(oracle.answered.all()))
        if oracle.answered.all():
            seen = features(point)
            precision, moments = precision + seen.T @ seen, moments + seen.T @ told
        root = torch.linalg.cholesky(precision)
        doubt = torch.randn(moments.shape, generator=generator, dtype=torch.float64)
        doubt = torch.linalg.solve_triangular(root.T, doubt, upper=True)
        drawn = torch.cholesky_solve(moments, root) + 4 * dial.value * _NOISE * doubt
        leads = (drawn - drawn[:, y]).T  # of each class over the true one
        low = leads[:, 1:].view(-1, channels, *falling.shape) * falling
        steepest = threat.steepest(torch.einsum("ncij,ih,jw->nchw", low, down, across))
        points = threat.candidates(x, (threat.eps * steepest).to(x))
        promise = (features(points) * leads).sum(1)
        promise[y] = -torch.inf
        point = points[promise.argmax()][None]


def _cosines(length: int, kept: int) -> Tensor:
    """The lowest rows of the orthonormal DCT. Shapes: (kept, length) float64."""
    rows = torch.stack([_cosine(length, frequency) for frequency in range(kept)])
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def _blocks(x: Tensor, cells: int, generator: torch.Generator, share: float = 1.0) -> Tensor:
    """Random signs in blocks, `cells` to a side, shifted at random; zero but for a share of them. Shapes: as x."""
    n, channels, height, width = x.shape
    side = -(-max(height, width) // cells)
    grid = (n, channels, cells + 1, cells + 1)
    signs = 2.0 * torch.randint(2, grid, generator=generator) - 1
    signs = torch.where(torch.rand(grid, generator=generator) < share, signs, 0.0)
    down, right = torch.randint(side, (2,), generator=generator).tolist()
    whole = signs.repeat_interleave(side, 2).repeat_interleave(side, 3)
    return whole[:, :, down : down + height, right : right + width].to(x)


def resampled(
    x: Tensor, ball: Ball, dial: Dial, generator: torch.Generator, tries: int = 3
) -> Callable[[Tensor], Iterator[Tensor]]:
    """For any attack: a point that is rejected is asked about again under other noise, larger each time.

    What is told about the noisy point stands for the point. Noise is of random signs in blocks, `dial` of eps long; a
    point inside the ball stays inside. Shapes: x (1, c, h, w), points (c, h, w). Randomness: `generator`.
    """

    def forms(point: Tensor) -> Iterator[Tensor]:
        dial.down()
        yield point
        for _ in range(tries):
            dial.up()
            noisy = point[None] + ball.eps * dial.value * ball.steepest(_blocks(x, _GRAIN, generator))
            inside = bool(ball.contains(x, point[None]))
            yield (ball.candidates(x, noisy - x) if inside else noisy.clamp(0, 1))[0]

    return forms
