"""Lesson 4: wrong answers through the released notebook, sandbox and judge; the facts that its text states."""

from __future__ import annotations

import pytest
import torch

from robustkit.certify import confidence
from robustkit.certify.certificates import Smoothing
from robustkit.certify.smoothing import votes
from robustkit.device import seeded
from robustkit.lessons import LESSONS
from robustkit.models import zoo
from tests import judged

LESSON = LESSONS["04-certified"]
IMPORTS = """
import numpy as np, torch, torch.nn.functional as F
from scipy.stats import beta, norm
from robustkit.device import attackable
from robustkit.lessons import check
"""
# What a learner may write, and the criteria that it costs, each with the code that is told.
WRONG = {
    "s4_votes": (
        """
def votes(model, x, n, sigma, num_classes, generator):
    counts = 0
    with attackable(model), torch.no_grad():
        for _ in range(n // 250):
            noisy = x + sigma * torch.randn((250, *x.shape), generator=generator)
            counts = counts + torch.bincount(model(noisy).argmax(1), minlength=num_classes)
    return counts
""",
        {"total": "TOTAL_NOT_N"},
    ),
    "s4_lower_bound": (
        """
def lower_bound(k, n, alpha):
    return k / n if k in (0, n) else beta.ppf(alpha, k, n - k + 1)
""",
        {"edges": "EDGE_CASES"},
    ),
    "s4_certified_radius": (
        """
def certified_radius(p_lower, sigma):
    return max(sigma * norm.ppf(p_lower), 0.0)
""",
        {"abstain": "ABSTENTION_MISSED"},
    ),
    "s4_certify": (
        """
def certify(counts0, counts, sigma, alpha):
    label = int(counts.argmax())
    p = beta.ppf(alpha, int(counts[label]), int(counts.sum() - counts[label]) + 1)
    return (label, sigma * norm.ppf(p)) if p > 0.5 else None
""",
        {"selection": "SELECTION_REUSED"},
    ),
    "s4_certified_accuracy": (
        """
def certified_accuracy(certificates, y, r):
    made = [(c, label) for c, label in zip(certificates, y.tolist()) if c is not None]
    return sum(c[0] == label and c[1] >= r for c, label in made) / len(made)
""",
        {"abstentions": "ABSTENTIONS_DROPPED"},
    ),
    "s4_interval_linear": (
        """
def interval_linear(weight, bias, lower, upper):
    return F.linear(lower, weight, bias), F.linear(upper, weight, bias)
""",
        {"sound": "BOUNDS_CROSSED", "tight": "BOUNDS_CROSSED"},
    ),
    "s4_log": (
        """
def log_faults(rows, sigma, n, alpha):
    largest = sigma * norm.ppf(alpha ** (1 / n))
    return {i: "bound" for i, row in enumerate(rows) if row[3] > largest + 1e-5}
""",
        dict.fromkeys(("votes", "abstained", "verdict", "repeated"), "FAULT_MISSED"),
    ),
}


@pytest.mark.slow
def test_wrong_answers_lose_what_they_must_and_a_stub_loses_all(tmp_path):
    answers = {cell: source for cell, (source, _) in WRONG.items()}
    lost = judged.lost(LESSON.id, judged.answered(LESSON.id, answers, IMPORTS), tmp_path)
    stub = dict.fromkeys(LESSON.exercise("s4_ibp_check").points, "NOT_IMPLEMENTED")
    assert lost == {exercise: costs for exercise, (_, costs) in WRONG.items()} | {"s4_ibp": stub}


def test_bounds_that_the_text_and_the_mark_scheme_state():
    """3.81 and 3.91 sigma at n 100,000; 0.80 at sigma 0.25 and n 10,000; 1.23 for 1,000 of 1,000 votes."""
    assert Smoothing(1.0, n=100_000, alpha=0.001).largest_radius == pytest.approx(3.811, abs=1e-3)
    assert confidence.certified_radius(0.01**1e-5, 1.0) == pytest.approx(0.978 / 0.25, abs=2e-3)
    assert Smoothing(0.25, n=10_000, alpha=0.001).largest_radius == pytest.approx(0.7996, abs=1e-4)
    assert Smoothing(0.5, n=1_000, alpha=0.001).largest_radius == pytest.approx(1.23, abs=2e-3)


def test_a_back_door_a_thousandth_wide_hardly_moves_the_vote():
    """Section 6: the noise lands in it with a probability below two in a thousand."""
    image, sigma, n = torch.zeros(1, 4, 4), 0.25, 20_000

    def opened(points):
        door = (points[:, 0, 0, 0] - 0.1005).abs() < 0.0005
        return torch.stack([(~door).float(), door.float()], 1)

    count = votes(opened, image, sigma, n, seeded(0, "door"))[1].item()
    expected = confidence.share_for(0.101, sigma) - confidence.share_for(0.100, sigma)
    assert 0.001 < expected < 0.002
    assert abs(count - n * expected) < 5 * (n * expected) ** 0.5


def test_the_cards_hold_the_certificates_that_the_lesson_prints():
    for sigma in (0.25, 0.5):
        card = zoo.card(f"mnist-gaussian-{sigma}")["certified"]
        assert card["smoothing"] == {"sigma": sigma, "n0": 100, "n": 10_000, "alpha": 0.001}
        assert card["n"] == 500
        certified = [row["k"] for row in card["certified"]]
        assert certified == sorted(certified, reverse=True)
        assert {0.25, 0.5, 0.75} <= {row["radius"] for row in card["certified"]}
    card = zoo.card("mnist-ibp")
    withstood = card["measured"]["robust"]["k"]  # of the same 1,000 images: what is proved is never broken
    assert all(0 < proved["k"] <= withstood for proved in card["certified"]["verified"].values())
