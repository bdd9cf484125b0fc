"""Square Attack: random search over squares, by scores alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustkit.attacks.search import random_search
from robustkit.device import Model
from robustkit.errors import RobustkitError
from robustkit.threat import NORMS, Ball

# The queries of 10,000 after which the share of pixels that a square covers is halved.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
ORDER = {"L2": 2, "L1": 1}


def square(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    queries: int = 5000,
    p_init: float = 0.8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random squares that shrink, each kept where it raises the margin loss.

    Source: Andriushchenko et al. 2020 (arXiv 1912.00049), algorithms 1 to 3: stripes of +-eps and then
    squares of one sign a channel for Linf; bumps and moved mass for L2. Croce & Hein 2021 (arXiv
    2103.01208) for L1: steeper bumps, more mass than the ball has room for, and the nearest point of ball
    and box. The schedule of the share `p_init` is the paper's, rescaled to `queries`. Differences from
    pyautoattack: each example draws its own square, not the batch one, and squares reach the last row and
    column, as in the paper; the start counts as a query. The steps themselves are its, to 1e-6.
    Shapes: x (n, channels, height, width), y (n,) -> as x. Units: inputs in [0, 1]; at most `queries`
    model evaluations per example, no gradient. Randomness: `generator` alone.
    Raises: RobustkitError for what is no Lp ball, x that does not hold images in [0, 1], fewer than one
    query, p_init outside (0, 1], or unusable logits.
    """
    if ball.norm not in NORMS:
        raise RobustkitError(f"square has no {ball.norm} form; give it a Ball with {', '.join(NORMS)}.")
    if x.dim() != 4:
        raise RobustkitError(
            f"square needs images of shape (n, channels, height, width); got {tuple(x.shape)}."
        )
    if not 0 < p_init <= 1:
        raise RobustkitError(f"p_init is a share of the pixels, in (0, 1]; got {p_init}.")
    start, move, smallest = (_stripes, _repaint, 1) if ball.norm == "Linf" else (_bumps, _move_mass, 3)

    def propose(query: int, clean: Tensor, best: Tensor) -> Tensor:
        if query == 0:
            return start(clean, ball, generator)
        return move(clean, best, ball, _side((query - 1) / queries, p_init, clean, smallest), generator)

    return random_search(model, x, y, queries, propose)


def _side(done: float, p_init: float, x: Tensor, smallest: int) -> int:
    """The side of the square when the share `done` of the budget is spent; bumps need a middle: odd."""
    height, width = x.shape[2:]
    share = p_init / 2 ** sum(done * 10_000 > mark for mark in HALVINGS)
    side = max(round(math.sqrt(share * height * width)), smallest)
    if smallest > 1:
        side += 1 - side % 2
    return min(side, height, width)


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return 2 * torch.randint(2, shape, generator=generator, device=like.device).to(like.dtype) - 1


def _cells(x: Tensor, side: int, generator: torch.Generator | None) -> Tensor:
    """A random square for each example, as positions in its flattened channels: (n, channels, side^2)."""
    (n, channels, height, width), steps = x.shape, torch.arange(side, device=x.device)
    top = torch.randint(height - side + 1, (n, 1, 1), generator=generator, device=x.device)
    left = torch.randint(width - side + 1, (n, 1, 1), generator=generator, device=x.device)
    cells = (top + steps[:, None]) * width + left + steps
    return cells.view(n, 1, -1).expand(n, channels, -1)


# --- Linf: algorithm 2 -----------------------------------------------------------------------------


def _stripes(x: Tensor, ball: Ball, generator: torch.Generator | None) -> Tensor:
    n, channels, _, width = x.shape
    return ball.candidates(x, ball.eps * _signs((n, channels, 1, width), x, generator).expand_as(x))


def _repaint(x: Tensor, best: Tensor, ball: Ball, side: int, generator: torch.Generator | None) -> Tensor:
    """The best point with one square at +-eps from the image, one sign for each channel."""
    cells = _cells(x, side, generator)
    signs = _signs((*x.shape[:2], 1), x, generator)
    painted = ball.candidates(x.flatten(2).gather(2, cells), (ball.eps * signs).expand_as(cells))
    points: Tensor = best.flatten(2).scatter(2, cells, painted).view_as(x)
    return points


# --- L2 and L1: algorithm 3 ------------------------------------------------------------------------


def _hill(rows: int, columns: int, order: int) -> Tensor:
    """Concentric rectangles that rise towards the middle, of norm 1; in L1 steeply, where few pixels count."""
    away = torch.maximum(
        (torch.arange(rows) - rows // 2).abs()[:, None], (torch.arange(columns) - columns // 2).abs()
    )
    rises = 1 / torch.arange(1, max(rows, columns) // 2 + 2) ** (4 // order)
    hill: Tensor = rises.flip(0).cumsum(0).flip(0)[away]
    size: Tensor = hill.flatten().norm(order)
    return hill / size


def _bump(side: int, order: int) -> Tensor:
    """A hill above a valley, of norm 1: (side, side)."""
    both = torch.cat([_hill(side // 2, side, order), -_hill(side - side // 2, side, order)])
    size: Tensor = both.flatten().norm(order)
    return both / size


def _turned(
    x: Tensor, side: int, order: int, places: tuple[int, ...], generator: torch.Generator | None
) -> Tensor:
    """A bump for each place, upright or on its side: (*places, side, side)."""
    bump = _bump(side, order).to(x)
    upright = torch.rand((*places, 1, 1), generator=generator, device=x.device) < 0.5
    return torch.where(upright, bump, bump.T)


def _bumps(x: Tensor, ball: Ball, generator: torch.Generator | None) -> Tensor:
    """Tiles of bumps, a fifth of the side each, with random signs and directions."""
    (n, channels, height, width), side = x.shape, max(min(x.shape[2:]) // 5, 1)
    rows, columns = height // side, width // side
    tiles = _turned(x, side, ORDER[ball.norm], (n, 1, rows, columns), generator)
    tiles = tiles * _signs((n, channels, rows, columns, 1, 1), x, generator)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    delta = torch.zeros_like(x)
    delta[:, :, top : top + rows * side, left : left + columns * side] = tiles.transpose(3, 4).reshape(
        n, channels, rows * side, columns * side
    )
    return ball.candidates(x, delta)


def _move_mass(x: Tensor, best: Tensor, ball: Ball, side: int, generator: torch.Generator | None) -> Tensor:
    """A bump added in one window, with what is unused of eps and what a second window loses."""
    order, delta = ORDER[ball.norm], (best - x).flatten(2)
    here, there = _cells(x, side, generator), _cells(x, side, generator)
    window, rest = delta.gather(2, here), delta.scatter(2, here, 0.0)
    freed = _mass(window, order) + _mass(rest.gather(2, there), order)
    unused = (ball.eps**order - _mass(delta, order).sum(1, keepdim=True)).clamp_min(0)
    bump = _turned(x, side, order, (len(x), 1), generator).flatten(2)
    added = bump * _signs((*x.shape[:2], 1), x, generator)
    room = unused / x.shape[1] + freed
    # In L1 every channel asks for all that is unused: projecting then leaves fewer, larger pixels.
    size = room.sqrt() if order == 2 else room * x.shape[1]
    mixed = size * _unit(added + _unit(window, order), order)
    moved = rest.scatter(2, there, 0.0).scatter(2, here, mixed).view_as(x)
    return ball.candidates(x, moved)


def _mass(channels: Tensor, order: int) -> Tensor:
    """What adds up over disjoint windows, each channel on its own: the norm to its own power."""
    return channels.abs().pow(order).sum(2, keepdim=True)


def _unit(channels: Tensor, order: int) -> Tensor:
    """Each channel on its own, at norm 1: (n, channels, cells)."""
    sizes: Tensor = channels.norm(order, dim=2, keepdim=True)
    return channels / sizes.clamp_min(1e-12)
