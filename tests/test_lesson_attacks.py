"""Lesson 2: wrong answers through the released notebook, sandbox and judge; the facts that its text states."""

from __future__ import annotations

import pytest
import torch

from robustkit import leaderboard
from robustkit.contracts.masking import BALL, LEFT, suspects
from robustkit.data import load
from robustkit.lessons import LESSONS
from robustkit.results import Interval
from robustkit.threat import Ball
from tests import judged

LESSON = LESSONS["02-attacks-and-evaluation"]
IMPORTS = """
import torch
from robustkit.attacks.gradient import input_gradient
from robustkit.contracts.masking import BALL, N_SUSPECTS, suspects
from robustkit.data import load
from robustkit.device import attackable, seeded, tier
from robustkit.evaluate import predict
from robustkit.lessons import check
from robustkit.losses import cross_entropy
from robustkit.results import Interval
digits = load("mnist", "test").take(range(N_SUSPECTS[tier()]))
x, y, models = digits.x, digits.y, suspects()
"""
# What a learner may write, and the criteria that it costs, each with the code that is told.
WRONG = {
    "s2_project": (
        """
def project(x, candidate, norm, eps):
    delta = candidate - x
    if norm == "Linf":
        return (x + delta.clamp(-eps, eps)).clamp(0, 1)
    length = delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return (x + eps * delta / length).clamp(0, 1)
""",
        {"inside": "INTERIOR_MOVED"},
    ),
    "s2_start": (
        """
def random_start(x, norm, eps, generator):
    delta = eps * (2 * torch.rand(x.shape, generator=generator) - 1)
    return project(x, x + delta, norm, eps)
""",
        {"l2": "START_NOT_UNIFORM"},
    ),
    "s2_margin": (
        """
def margin(logits, y):
    return logits.amax(1) - logits.gather(1, y[:, None]).squeeze(1)
""",
        {"value": "WRONG_MARGIN", "gradient": "WRONG_GRADIENT"},
    ),
    "s2_pgd": (
        """
def pgd(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    with attackable(model):
        for _ in range(restarts):
            points = random_start(x, norm, eps, generator)
            for _ in range(steps):
                _, _, gradient = input_gradient(model, points, loss, y)
                points = project(x, points + step_size * gradient.sign(), norm, eps)
    return points
""",
        {"l2": "NOT_STEEPEST", "restarts": "RESTARTS_WASTED"},
    ),
    "s2_survives": (
        """
def survives(model, x, y, candidates, norm, eps):
    return torch.stack([predict(model, batch, y) for batch in [x, *candidates]]).all(0)
""",
        {"valid": "BALL_NOT_CHECKED"},
    ),
    "s2_diagnose": (
        """
def diagnose(model, x, y):
    with attackable(model):
        _, _, gradient = input_gradient(model, x, cross_entropy, y)
    return "honest" if gradient.any() else "shattered"
""",
        {"saturated": "WRONG_DIAGNOSIS", "random": "WRONG_DIAGNOSIS"},
    ),
    "s2_eot": (
        """
def eot(model, draws):
    return lambda x: torch.stack([model(x)] * draws).mean(0)
""",
        {"mean": "NOT_COUNTED", "fresh": "WRONG_DRAWS", "gradient": "WRONG_GRADIENT"},
    ),
    "s2_bpda": (
        """
def bpda(part, model):
    return lambda x: model(part(x))
""",
        {"value": "NOT_COUNTED", "gradient": "NO_GRADIENT"},
    ),
    "s2_standing": (
        """
def standing(k, n, entries):
    share = Interval(k, n)
    return tuple(1 + sum(e.robust > 100 * s for e in entries) for s in (share.low, share.share, share.high))
""",
        {"comparable": "INCOMPARABLE_COUNTED", "interval": "RANKS_SWAPPED"},
    ),
}


@pytest.mark.slow
def test_wrong_answers_lose_what_they_must_and_a_stub_loses_all(tmp_path):
    answers = {cell: source for cell, (source, _) in WRONG.items()}
    lost = judged.lost(LESSON.id, judged.answered(LESSON.id, answers, IMPORTS), tmp_path)
    untouched = dict.fromkeys("ABC", "NOT_BROKEN")
    assert lost == {exercise: costs for exercise, (_, costs) in WRONG.items()} | {"s2_break": untouched}


def test_numbers_that_the_text_and_the_mark_scheme_state():
    assert 0.999**784 < 0.5 < 0.9992**784  # half of the volume lies beyond 0.999 eps
    assert (round(Interval(82, 100).low, 2), round(Interval(82, 100).high, 2)) == (0.73, 0.88)
    points = Ball("L2", 1.0).random(torch.zeros(4000, 1, 28, 28), torch.Generator().manual_seed(0))
    assert 0.4 < (points.flatten(1).norm(dim=1) > 0.999).float().mean() < 0.6


def test_the_leaderboard_rows_that_the_lesson_argues_with():
    board = leaderboard.load("cifar10", "Linf")
    fell = {entry.id: entry for entry in leaderboard.fallen(board.entries, 10)}
    resnet = fell["JinRinard2020Manifold"]
    assert (resnet.architecture, resnet.reported, resnet.robust) == ("ResNet-18", 71.22, 1.35)
    assert (fell["ZhangXu2020Adversarial"].reported, fell["ZhangXu2020Adversarial"].robust) == (68.7, 36.45)
    assert "k-Winners-Take-All" in fell["Xiao2020Enhancing"].title
    assert fell["Xiao2020Enhancing"].unreliable
    assert board.select().entries[0].robust < resnet.reported - 12


def test_every_suspect_but_the_last_is_the_clean_network_in_disguise():
    data, models = load("mnist", "test").take(range(40)), suspects()
    clean = models["A"].network
    with torch.no_grad():
        expected = clean(data.x).argmax(1)
        for name in "ABC":
            torch.manual_seed(0)
            assert (models[name](data.x).argmax(1) == expected).float().mean() > 0.9, name
        assert not torch.equal(models["B"](data.x), models["B"](data.x))
    assert torch.equal(models["C"].part(torch.tensor([0.0, 0.07, 0.08, 1.0])), torch.tensor([0, 0, 1 / 7, 1]))
    assert Ball("L2", 2.5) == BALL  # as the text of the lesson has it, and the mark
    assert LEFT == 0.3
