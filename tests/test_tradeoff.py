"""Lesson 5's facts, each against something that the contracts did not compute: geometry, bootstrap, bounds."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from robustkit.certify.bounds import ibp_margins, proved
from robustkit.contracts.tradeoff import (
    _FLOOR,
    _OFFERS,
    ADMISSIBLE,
    COST,
    COVERS,
    PAIRED,
    ROUTE,
    SANDWICH,
    Record,
    _expected,
    _records,
)
from robustkit.device import seeded
from robustkit.results import Interval
from robustkit.threat import Ball
from tests.alternatives import ALTERNATIVES

SEEDS = range(20)


def right_answer(contract):
    return next(a.subject for a in ALTERNATIVES if a.contract == contract)


# --- the cases tell mistakes apart --------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_case_of_records_holds_every_kind_of_image(seed):
    case = SANDWICH.draw(seed)
    records, eps = _records(case), float(case["eps"])
    clean, empirical, certified, flagged = right_answer("sandwich")(records, eps)
    assert len(records) > clean > empirical > certified > len(flagged) > 5
    assert case["size"].max() <= eps
    assert np.flatnonzero(case["impossible"]).tolist() == flagged
    assert all(isinstance(record, Record) for record in records)


@pytest.mark.parametrize("seed", SEEDS)
def test_balls_on_both_sides_of_every_threshold(seed):
    rows = COVERS.draw(seed)["rows"]
    covers = right_answer("covers")
    for norms in itertools.product((0, 1), repeat=2):
        pairs = [row for row in rows.tolist() if (row[0], row[2]) == norms]
        names = [("Linf", "L2")[norm] for norm in norms]
        verdicts = {covers(Ball(names[0], a), Ball(names[1], b), int(d)) for _, a, _, b, d in pairs}
        assert verdicts == {True, False}


@pytest.mark.parametrize("seed", SEEDS)
def test_paired_and_unpaired_intervals_are_far_apart(seed):
    case = PAIRED.draw(seed)
    for name in ("first", "second", "third"):
        a, b = case[f"{name}_a"], case[f"{name}_b"]
        _, error, p = _expected(a, b)
        unpaired = math.sqrt(sum(share * (1 - share) / len(a) for share in (a.mean(), b.mean())))
        assert unpaired > 1.4 * error
        assert p == pytest.approx(stats.binomtest(int((a & ~b).sum()), int((a != b).sum())).pvalue)
        assert 1e-5 < p < 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_costs_meet_between_two_whole_numbers(seed):
    case = COST.draw(seed)
    for (train_a, run_a), (train_b, run_b), meet in zip(case["a"], case["b"], case["meet"], strict=True):
        assert train_a + meet * run_a < train_b + meet * run_b
        assert train_a + (meet - 1) * run_a > train_b + (meet - 1) * run_b


def test_offers_differ_in_the_bound_where_they_agree_in_the_estimate():
    shares = {
        Interval(round(500 * value), 500)
        for _, clean, claims, *_ in _OFFERS
        for value in (clean, *(c[2] for c in claims))
    }
    assert {share.share for share in shares if share.low < _FLOOR < share.share} == {0.82}
    assert {share.share for share in shares if share.low == _FLOOR} == {0.836}
    assert not any(0 < abs(share.low - _FLOOR) < 0.01 for share in shares)


@pytest.mark.parametrize("contract", [ROUTE, ADMISSIBLE])
def test_the_order_of_a_case_is_drawn(contract):
    assert len({tuple(contract.draw(seed)["order"].tolist()) for seed in SEEDS}) > 10


# --- the theorems behind the exercises -----------------------------------------------------------------


@pytest.mark.parametrize("given", ["Linf", "L2"])
@pytest.mark.parametrize("wanted", ["Linf", "L2"])
def test_a_ball_that_covers_holds_every_point_of_the_other(given, wanted):
    """And one that does not cover misses the farthest of them: a corner, or a point on an axis."""
    d, covers = 64, right_answer("covers")
    needed = Ball(wanted, 0.25)
    points = needed.random(torch.zeros(500, d), seeded(0, "points"))
    extreme = torch.full((1, d), needed.eps) if wanted == "Linf" else needed.eps * torch.eye(d)[:1]
    points = torch.cat([points, extreme])
    for eps in (0.1, 0.2, 0.25, 0.3, 1.9, 2.0, 2.1):
        claimed = Ball(given, eps)
        assert covers(claimed, needed, d) == bool((claimed.size(points) <= eps + 1e-6).all()), eps


def test_the_paired_error_is_that_of_resampled_images():
    case = PAIRED.draw(0)
    a, b = case["first_a"], case["first_b"]
    difference, error, _ = _expected(a, b)
    draws = np.random.default_rng(0).integers(0, len(a), (20_000, len(a)))
    resampled = a[draws].mean(1) - b[draws].mean(1)
    assert resampled.mean() == pytest.approx(difference, abs=5e-4)
    assert resampled.std() == pytest.approx(error, rel=0.03)


def test_twice_the_radius_keeps_an_image_in_the_certified_lane():
    """Interval bounds over a box hold over every box inside it: so says lesson 5, and so do they."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    generator, eps = seeded(0, "boxes"), 0.02
    x = torch.rand(400, 1, 4, 4, generator=generator).double()
    y = model(x).argmax(1)

    def holds(points, radius):
        return proved(ibp_margins(model, points, y, Ball("Linf", radius)), y)

    twice, once = holds(x, 2 * eps), holds(x, eps)
    assert 20 < twice.sum() < once.sum() < len(x)
    lost = torch.zeros(len(x), dtype=torch.bool)
    for _ in range(50):
        moved = (x + eps * torch.where(torch.rand(x.shape, generator=generator) < 0.5, -1.0, 1.0)).clamp(0, 1)
        kept = holds(moved, eps)
        assert kept[twice].all()
        lost |= ~kept
    assert (lost & once).any()  # with less than twice the radius an attacker can push an image out


def test_on_a_linear_model_no_less_than_twice_the_radius_will_do():
    """There the radius is the distance to the boundary, and the attacker walks straight towards it."""
    _, guaranteed = right_answer("route")
    random = np.random.default_rng(0)
    w, x, eps = random.normal(size=20), random.normal(size=(500, 20)), 0.2
    score = x @ w
    radius = np.abs(score) / np.linalg.norm(w)
    towards = x - eps * np.sign(score)[:, None] * w / np.linalg.norm(w)
    arriving = (towards @ w) * np.sign(score) / np.linalg.norm(w)  # negative: another class
    y = torch.from_numpy((score > 0).astype(np.int64))
    certificates = [(int(label), float(r)) for label, r in zip(y, radius, strict=True)]
    assert guaranteed(certificates, y, eps) == (arriving >= eps).sum()
