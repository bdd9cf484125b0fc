"""Attacks without gradients: square, noise, transfer, and the search that they share."""

from __future__ import annotations

import itertools
import math
import pickle
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import nn

from robustkit.attacks import Attack, fgsm, noise, pgd, square, transfer
from robustkit.attacks.library import LIBRARY
from robustkit.attacks.search import random_search
from robustkit.attacks.square import HALVINGS, ORDER, _bump, _cells, _repaint, _side, _turned
from robustkit.device import Prepared, attackable, seeded
from robustkit.errors import RobustkitError
from robustkit.evaluate import evaluate, strongest_knowledge
from robustkit.losses import margin
from robustkit.threat import Ball, RotationTranslation
from tests.oracle import DUAL, Linear, dataset, interior, linear, margins, strongest
from tests.test_library import right, trained

MODULE = import_module("robustkit.attacks.square")
SIZES = {"Linf": 0.06, "L2": 0.35, "L1": 1.5}
each_norm = pytest.mark.parametrize("norm", SIZES)


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    return trained(n=40)


class Counting(nn.Module):
    """How often each example was asked about, known by a pixel that no attack of size 0 can change."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.sizes = model, []
        self.asked_for_gradients = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        self.asked_for_gradients |= x.requires_grad or torch.is_grad_enabled()
        return self.model(x)


# --- square ----------------------------------------------------------------------------------------


@each_norm
def test_square_breaks_as_much_as_pyautoattacks(small, norm):
    """Success over eight seeds: apart by no more than noise.

    Theirs never places a square in the last row or column, which on images of 8 by 8 costs it points: mended.
    """
    model, x, y = small
    ball, ours, theirs = Ball(norm, SIZES[norm]), [], []
    for seed in range(8):
        found = square(model, x, y, ball, queries=150, generator=seeded(seed))
        ours.append((~right(model, found, y)).double().mean().item())
        with torch.random.fork_rng(devices=[]), attackable(model):
            peer = SquareAttack(model, norm=norm, eps=ball.eps, n_queries=149, seed=seed, resc_schedule=True)
            peer.random_int = lambda low, high, of=peer.random_int: of(low, high + 1)
            found = peer.perturb(x, y)
        theirs.append((~right(model, found, y)).double().mean().item())
    assert 0.1 < np.mean(theirs) < 0.9
    error = math.hypot(np.std(ours), np.std(theirs)) / math.sqrt(8)
    assert abs(np.mean(ours) - np.mean(theirs)) < 3 * error + 0.01


@each_norm
def test_square_spends_its_queries_and_no_gradient(small, norm):
    model, x, y = small
    counting = Counting(model)
    found = square(counting, x, y, Ball(norm, SIZES[norm]), queries=60, generator=seeded(0))
    assert not counting.asked_for_gradients
    assert len(counting.sizes) == 60
    survivors = int(right(model, found, y).sum())
    assert 0 < survivors <= counting.sizes[-1] < len(x)
    # A point leaves once it is fooled: the batch never grows, and starts whole.
    assert counting.sizes[0] == len(x)
    assert counting.sizes == sorted(counting.sizes, reverse=True)


def test_square_stops_when_all_are_fooled(small):
    model, x, y = small
    counting = Counting(model)
    square(counting, x, y, Ball("Linf", 0.5), queries=5000, generator=seeded(0))
    assert len(counting.sizes) < 500


def test_the_share_is_halved_at_the_papers_marks_rescaled():
    """Table of the paper: after 10, 50, ... of 10,000 queries the share is half, a quarter, ..."""
    x = torch.zeros(1, 3, 224, 224)
    area = 224 * 224
    for queries in (5000, 10_000):
        for halvings, mark in enumerate(HALVINGS):
            at = mark / 10_000
            before = math.sqrt(0.8 / 2**halvings * area)
            assert _side(at, 0.8, x, 1) == round(before)
            assert _side(at + 1 / queries, 0.8, x, 1) == round(before / math.sqrt(2))
    assert HALVINGS == (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
    assert _side(1.0, 0.8, torch.zeros(1, 1, 8, 8), 1) == 1
    assert _side(1.0, 0.8, torch.zeros(1, 1, 8, 8), 3) == 3
    assert _side(0.0, 1.0, torch.zeros(1, 1, 8, 20), 1) == 8  # no larger than the shorter side


class Yielding:
    """Right about everything, and less sure at every call, so each proposal is accepted: steps can be read off."""

    def __init__(self) -> None:
        self.asked: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.asked.append(x.clone())
        wrong = torch.full((len(x),), -5000.0 + len(self.asked))
        return torch.stack([torch.zeros(len(x)), wrong], 1)


def steps(norm: str, queries: int, shape: tuple[int, ...], eps: float = 0.1):
    """Every perturbation that square asks about for images in the middle of the box."""
    x, model = torch.full(shape, 0.5), Yielding()
    y = torch.zeros(len(x), dtype=torch.int64)
    square(model, x, y, Ball(norm, eps), queries=queries, generator=seeded(5))
    assert len(model.asked) == queries
    return [point - x for point in model.asked]


def check_steps(norm: str, monkeypatch) -> None:
    """Each of 199 steps is the one that pyautoattack takes with the places, signs and directions that ours drew."""
    drawn: dict[str, list[torch.Tensor]] = {"_cells": [], "_signs": [], "_turned": []}

    def logged(of, log, *arguments):
        log.append(of(*arguments))
        return log[-1]

    for name, log in drawn.items():
        monkeypatch.setattr(MODULE, name, partial(logged, getattr(MODULE, name), log))
    x = (1.4 * torch.rand((1, 3, 22, 22), generator=seeded("x")) - 0.2).clamp(0, 1)
    y, ours, theirs = torch.zeros(1, dtype=torch.int64), Yielding(), Yielding()

    def answering(points: torch.Tensor) -> torch.Tensor:
        logits = theirs(points)
        points.copy_(ours.asked[len(theirs.asked) - 1])  # goes on from our point: rounding does not add up
        return logits

    square(ours, x, y, Ball(norm, PEER_SIZES[norm]), queries=200, generator=seeded(0))
    peer = SquareAttack(answering, norm=norm, eps=PEER_SIZES[norm], n_queries=200)
    peer.init_hyperparam(x)
    corners = [edge for cells in drawn["_cells"] for edge in divmod(int(cells[0, 0, 0]), 22)]
    signs = [one for drawn_at_once in drawn["_signs"] for one in per_tile(drawn_at_once)]
    bumps = [one for drawn_at_once in drawn["_turned"] for one in drawn_at_once.flatten(0, -3)]
    peer.random_int = lambda low, high: corners.pop(0)
    peer.random_choice = lambda shape: signs.pop(0).view(shape)
    peer.eta = lambda side: bumps.pop(0)
    with pytest.raises(IndexError):  # its start is no query: it looks for one place more
        peer.attack_single_run(x, y)
    for one, other in zip(ours.asked, theirs.asked, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)


PEER_SIZES = {"Linf": 0.06, "L2": 0.5, "L1": 12.0}


def per_tile(signs: torch.Tensor) -> list[torch.Tensor]:
    """The signs of the start are drawn at once by ours, tile by tile by theirs."""
    return [*signs[:, :, :, :, 0, 0].flatten(2).unbind(2)] if signs.dim() == 6 else [signs]


@each_norm
def test_a_step_is_pyautoattacks(norm, monkeypatch):
    check_steps(norm, monkeypatch)


def test_linf_starts_from_stripes_and_then_paints_squares_of_one_sign():
    deltas = steps("Linf", 40, (3, 2, 12, 10))
    np.testing.assert_allclose(deltas[0].abs().numpy(), 0.1, atol=1e-6)
    assert torch.equal(deltas[0], deltas[0][:, :, :1].expand_as(deltas[0]))  # vertical
    assert len({tuple(row.tolist()) for row in deltas[0][:, :, 0].flatten(0, 1).sign()}) > 3
    corners = set()
    for number, (before, after) in enumerate(itertools.pairwise(deltas)):
        np.testing.assert_allclose(after.abs().numpy(), 0.1, atol=1e-6)
        side = _side(number / 40, 0.8, torch.zeros(1, 2, 12, 10), 1)
        for example in range(3):
            changed = (after - before)[example].abs() > 1e-6
            for channel, where in enumerate(changed):
                rows, columns = where.nonzero().unbind(1)
                if len(rows):
                    assert int(rows.max() - rows.min()) < side
                    assert int(columns.max() - columns.min()) < side
                    signs = after[example, channel][where].sign()
                    assert (signs == signs[0]).all()
            rows, columns = changed.any(0).nonzero().unbind(1)
            if len(rows):
                corners.add((example, int(rows.min()), int(columns.min())))
    assert {corner[0] for corner in corners} == {0, 1, 2}


def test_each_example_draws_its_own_square_from_every_position():
    cells = _cells(torch.zeros(2000, 2, 6, 5), 3, seeded(0))
    assert torch.equal(cells[:, 0], cells[:, 1])  # one place for all channels
    corners = [divmod(int(corner), 5) for corner in cells[:, 0, 0]]
    assert set(corners) == {(row, column) for row in range(4) for column in range(3)}
    offsets = (cells[:, 0] - cells[:, 0, :1]).unique(dim=0)
    assert offsets.tolist() == [[0, 1, 2, 5, 6, 7, 10, 11, 12]]


def test_each_channel_of_a_square_has_a_sign_of_its_own():
    x = torch.full((200, 2, 4, 4), 0.5)
    signs = (_repaint(x, x, Ball("Linf", 0.1), 4, seeded(0)) - x).sign()
    assert torch.equal(signs, signs[:, :, :1, :1].expand_as(signs))
    apart = int((signs[:, 0, 0, 0] != signs[:, 1, 0, 0]).sum())
    assert 70 < apart < 130


def test_every_pixel_can_be_painted():
    deltas = steps("Linf", 3000, (1, 1, 6, 5))
    late = torch.stack(deltas[2500:])
    assert (late.amax(0) > late.amin(0)).all()


@pytest.mark.parametrize("norm", ORDER)
def test_bumps_use_all_of_eps(norm):
    for delta in steps(norm, 60, (2, 3, 15, 15)):
        np.testing.assert_allclose(Ball(norm, 0.1).size(delta).numpy(), 0.1, rtol=1e-4)


def test_bumps_lie_and_stand():
    """Half of the tiles of a start run from top to bottom, the others from left to right."""
    tiles = _turned(torch.zeros(1, 1, 9, 9), 6, 2, (400,), seeded(0))
    upright = (tiles == _bump(6, 2)).flatten(1).all(1)
    assert (upright ^ (tiles == _bump(6, 2).T).flatten(1).all(1)).all()
    assert 150 < int(upright.sum()) < 250


def test_an_l2_step_changes_two_windows():
    deltas = steps("L2", 60, (2, 3, 15, 15))
    first = deltas[0]
    assert (first.abs() > 0).any(1).all()  # tiles all over
    side = _side(58 / 60, 0.8, torch.zeros(1, 3, 15, 15), 3)
    before, after = deltas[-2], deltas[-1]
    for example in range(2):
        # The rescaling at the end touches every pixel by one factor; what remains are the windows.
        ratio = after[example].norm() / before[example].norm()
        changed = ((after - before * ratio)[example].abs() > 1e-5).any(0)
        assert 0 < int(changed.sum()) <= 2 * side * side


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 7, 12, 25])
@pytest.mark.parametrize("norm", ORDER)
def test_a_bump_is_pyautoattacks(side, norm):
    found = _bump(side, ORDER[norm])
    assert found.flatten().norm(ORDER[norm]).item() == pytest.approx(1)
    if side > 1:  # theirs divides by zero
        peer = SquareAttack(None, norm=norm, eps=1.0, device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            theirs = peer.eta(side)
        either = min((found - theirs).abs().max(), (found.T - theirs).abs().max())
        assert either < 1e-6


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 3, 9, 14), (1, 1, 14, 9), (3, 2, 1, 1)])
@each_norm
def test_square_takes_any_image(norm, shape):
    w = torch.randn(math.prod(shape[1:]), generator=seeded("w"))
    x = torch.rand(shape, generator=seeded("x"))
    found = square(
        Linear(w).eval(),
        x,
        torch.zeros(len(x), dtype=torch.int64),
        Ball(norm, 0.1),
        queries=30,
        generator=seeded(0),
    )
    assert Ball(norm, 0.1).contains(x, found).all()
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"queries": 0}, "at least 1 query"),
        ({"p_init": 0.0}, r"share of the pixels, in \(0, 1\]; got 0"),
        ({"p_init": 1.5}, "got 1.5"),
    ],
)
def test_square_refuses_settings_that_mean_nothing(settings, words):
    x = interior(n=4)
    with pytest.raises(RobustkitError, match=words):
        square(linear(), x, torch.zeros(4, dtype=torch.int64), Ball("Linf", 0.1), **settings)


def test_square_needs_images_and_a_ball():
    y = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RobustkitError, match=r"images of shape .* got \(4, 12\)"):
        square(linear(), torch.rand(4, 12), y, Ball("Linf", 0.1))
    with pytest.raises(RobustkitError, match="square has no rotation-translation form"):
        square(linear(), interior(n=4), y, RotationTranslation(30, 3))


# --- the search that they share --------------------------------------------------------------------


def test_the_search_keeps_the_highest_margin_and_the_first_point_that_fools():
    """Proposals of known margin for four examples of four classes: two are never fooled, two leave."""
    script = torch.tensor(
        [[1.0, 5.0, 5.0, 5.0], [-3.0, -1.0, -2.0, -1.5], [-2.0, -4.0, 0.5, 9.0], [-0.5, -4.0, -3.0, -2.5]]
    )
    y = torch.tensor([2, 0, 3, 1])
    x = torch.stack([torch.arange(4) / 8, torch.zeros(4)], 1)  # which example, and what was proposed for it

    def propose(query: int, clean: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        rows = (clean[:, 0] * 8).round().long()
        return torch.stack([clean[:, 0], script[rows, query] / 20 + 0.5], 1)

    def model(points: torch.Tensor) -> torch.Tensor:
        labels = y[(points[:, 0] * 8).round().long()]
        return torch.zeros(len(points), 4).scatter(1, labels[:, None], (0.5 - points[:, 1:]) * 20)

    found = random_search(model, x, y, 4, propose)
    torch.testing.assert_close((found[:, 1] - 0.5) * 20, torch.tensor([1.0, -1.0, 0.5, -0.5]))
    assert torch.equal(found[:, 0], x[:, 0])


def test_a_point_that_fools_only_the_quick_half_of_a_prepared_model_stays():
    """The quick copy is fooled at once; the strict model only by larger points."""

    def quick(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.1 - x, x - 0.1], 1)

    def strict(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.85 - x, x - 0.85], 1)

    def propose(query: int, clean: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        return torch.full_like(clean, 0.2 + 0.1 * query)

    x, y = torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)
    found = random_search(Prepared(quick, strict), x, y, 9, propose)
    torch.testing.assert_close(found, torch.full((3, 1), 0.9))
    torch.testing.assert_close(random_search(quick, x, y, 9, propose), torch.full((3, 1), 0.2))


def test_a_confirmed_success_is_kept_whatever_was_claimed_before():
    """What the quick copy claims falls while what the model says rises."""

    def quick(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x - 1, 1 - x], 1)

    def strict(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.45 - x, x - 0.45], 1)

    def propose(query: int, clean: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        return torch.full_like(clean, 0.2 + 0.1 * query)

    x, y = torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)
    found = random_search(Prepared(quick, strict), x, y, 6, propose)
    torch.testing.assert_close(found, torch.full((3, 1), 0.5))


def test_claims_wait_and_are_looked_at_together():
    """A quick copy that is always fooled, and a model that never is: one pass of it for ten queries."""
    asked: list[int] = []

    def strict(x: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        return torch.cat([1 - 0 * x, 0 * x], 1)

    def quick(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([0 * x, 1 - 0 * x], 1)

    x, y = torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)
    random_search(Prepared(quick, strict), x, y, 24, lambda query, clean, best: clean)
    assert asked == [30, 30, 12]
    asked.clear()
    random_search(strict, x, y, 24, lambda query, clean, best: clean)
    assert asked == [3] * 24


# --- noise -----------------------------------------------------------------------------------------


@each_norm
def test_noise_is_the_worst_of_uniform_points(norm):
    """Against the closed form: on the linear model a Linf point's margin is a sum of uniform variables."""
    x, model = interior(n=300), linear()
    with torch.no_grad():
        y = model(x).argmax(1)
    ball = Ball(norm, 0.02)
    one = margins(model, x, y) - margins(model, noise(model, x, y, ball, draws=1, generator=seeded(0)), y)
    many = margins(model, x, y) - margins(model, noise(model, x, y, ball, draws=64, generator=seeded(0)), y)
    w = model.w.detach().double().numpy()
    # Variance per coordinate, in units of eps^2: of the cube, and of the L2 and L1 balls in d dimensions.
    d = len(w)
    variance = {"Linf": 1 / 3, "L2": 1 / (d + 2), "L1": 2 / ((d + 1) * (d + 2))}[norm]
    scale = 0.02 * np.linalg.norm(w) * math.sqrt(variance)
    assert abs(one.mean()) < 4 * scale / math.sqrt(300)
    assert one.std() == pytest.approx(scale, rel=0.15)
    assert many.mean() > 1.5 * scale  # the mean of the largest of 64 normal draws is 2.4
    assert many.max() < 0.02 * np.linalg.norm(w, ord=DUAL[norm])


def test_noise_is_weaker_than_the_gradient():
    x, model = interior(n=400), linear()
    with torch.no_grad():
        y = model(x).argmax(1)
    ball = Ball("Linf", 0.05)
    by_noise = margins(model, noise(model, x, y, ball, generator=seeded(0)), y) < 0
    by_gradient = margins(model, fgsm(model, x, y, ball), y) < 0
    assert 0 < by_noise.sum() < by_gradient.sum()
    assert (by_noise <= by_gradient).all()


# --- transfer --------------------------------------------------------------------------------------


def untouchable(x: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the judged model was asked")


def test_transfer_asks_the_surrogate_alone_and_returns_its_candidates():
    x, model = interior(), linear()
    with torch.no_grad():
        y = model(x).argmax(1)
    ball = Ball("Linf", 0.1)
    found = transfer(model, fgsm)(untouchable, x, y, ball, generator=seeded(0))
    np.testing.assert_allclose(found.numpy(), strongest(model, x, y, ball), atol=1e-6)
    with_restarts = transfer(model, pgd)(untouchable, x, y, ball, generator=seeded(3))
    assert torch.equal(with_restarts, pgd(model, x, y, ball, generator=seeded(3)))


def test_a_transfer_attack_can_be_sent_to_a_worker():
    x, model = interior(n=4), linear()
    y = torch.zeros(4, dtype=torch.int64)
    again = pickle.loads(pickle.dumps(transfer(model, fgsm)))
    ball = Ball("Linf", 0.1)
    assert torch.equal(again(untouchable, x, y, ball), transfer(model, fgsm)(untouchable, x, y, ball))


def test_what_an_attack_knows_is_in_the_result():
    x, model = interior(n=10), linear()
    with torch.no_grad():
        data = dataset(x, model(x).argmax(1))

    def knowledge(**attacks: Attack) -> str:
        ball = Ball("Linf", 0.01)
        return evaluate(
            model, data, ball, attacks, model_name="linear", tier="smoke", progress=False
        ).threat.knowledge

    score = partial(square, queries=5)
    assert knowledge(square=score, noise=noise) == "score-based"
    assert knowledge(transfer=transfer(linear(1), fgsm)) == "transfer"
    assert strongest_knowledge({"boundary": LIBRARY["foolbox-boundary"]}) == "label-only"
    assert strongest_knowledge({"hop": LIBRARY["art-hop-skip-jump"]}) == "label-only"
    assert strongest_knowledge({"spsa": LIBRARY["cleverhans-spsa"]}) == "score-based"
    assert strongest_knowledge({"pgd": LIBRARY["cleverhans-pgd"]}) == "white-box"
    assert knowledge(square=score, fgsm=fgsm) == "white-box"


def test_margin_is_what_square_raises(small):
    """More queries never lower the margin of a survivor."""
    model, x, y = small
    low, high = (
        square(model, x, y, Ball("Linf", 0.02), queries=queries, generator=seeded(1)) for queries in (1, 80)
    )
    with torch.no_grad():
        gain = margin(model(high), y) - margin(model(low), y)
    assert gain.mean() > 0
    assert (gain >= 0).float().mean() > 0.95
