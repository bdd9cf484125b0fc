"""Lesson 3: wrong answers through the released notebook, sandbox and judge; the facts that its text states."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from robustkit import leaderboard, records
from robustkit.contracts import examine, models, training
from robustkit.data import load
from robustkit.device import seeded
from robustkit.lessons import LESSONS
from robustkit.models import pretrained
from robustkit.results import Interval
from robustkit.threat import Ball
from tests import judged

LESSON = LESSONS["03-cifar-pgd"]
REAL = Path(os.environ.get("ROBUSTKIT_DATA") or "unset")
needs_photographs = pytest.mark.skipif(
    not (REAL / "cifar10-lossless-4k.npz").is_file(), reason="ROBUSTKIT_DATA names no folder with CIFAR-10"
)
IMPORTS = """
import copy
import torch
import torch.nn.functional as F
from robustkit.contracts.training import STRENGTH
from robustkit.device import attackable, seeded
from robustkit.lessons import check
from robustkit.models import build, pretrained
shipped = pretrained("cifar10-l2-w16")
"""
# What a learner may write, and the criteria that it costs, each with the code that is told.
WRONG = {
    "s3_verdict": (
        """
def verdict(figure, claim):
    if figure.ball.norm != claim.ball.norm:
        return "other"
    if figure.robust.low >= claim.share:
        return "yes"
    return "no" if figure.robust.high < claim.share else "open"
""",
        {"open": "NOT_DECIDED_BY_IT", "other": "NOT_COMPARABLE"},
    ),
    "s3_step": (
        """
def training_step(model, optimizer, x, y, attack):
    optimizer.zero_grad()
    model.eval()
    candidates = attack(model, x, y)
    model.train()
    loss = F.cross_entropy(model(candidates), y)
    loss.backward()
    optimizer.step()
    return loss
""",
        {
            **{"modes": "FROZEN_LAYER_THAWED", "update": "ATTACK_GRADIENTS", "loss": "GRAPH_KEPT"},
            "attack": "NOT_COUNTED",
        },
    ),
    "s3_trades": (
        """
def trades_loss(model, x, candidates, y, beta):
    natural, attacked = model(x), model(candidates)
    apart = F.kl_div(natural.log_softmax(1), attacked.softmax(1), reduction="batchmean")
    return F.cross_entropy(natural, y) + beta * apart
""",
        {"divergence": "KL_REVERSED", "gradient": "KL_REVERSED", "natural": "NOT_COUNTED"},
    ),
    "s3_faults": (
        """
def faults(recipe, models, x, y):
    found = set()
    points = recipe.attack(models[-1].eval(), x, y, seeded(0, "probe"))
    again = recipe.attack(models[-1], x, y, seeded(1, "probe"))
    if points.min() < 0 or points.max() > 1:
        found.add("outside")
    elif (recipe.ball.size(points - x) > recipe.ball.eps + 1e-5).any():
        found.add("units")
    if (points - again).abs().max() < 1e-3:
        found.add("start")
    if recipe.selected_by & recipe.reported_on:
        found.add("splits")
    return found
""",
        {
            **{"train_mode": "FAULT_MISSED", "leak": "FAULT_MISSED", "statistics": "FAULT_MISSED"},
            **{"start": "FALSE_ALARM", "splits": "FAULT_MISSED", "quiet": "FALSE_ALARM"},
        },
    ),
    "s3_weights": (
        "submitted = copy.deepcopy(shipped)",
        dict.fromkeys(("clean", "robust_half", "robust_full"), "SHIPPED_WEIGHTS"),
    ),
}


@needs_photographs
@pytest.mark.slow
def test_wrong_answers_lose_what_they_must_and_a_stub_loses_all(tmp_path):
    answers = {cell: source for cell, (source, _) in WRONG.items()}
    lost = judged.lost(LESSON.id, judged.answered(LESSON.id, answers, IMPORTS), tmp_path)
    stub = dict.fromkeys(LESSON.exercise("s3_selection_check").points, "NOT_IMPLEMENTED")
    assert lost == {exercise: costs for exercise, (_, costs) in WRONG.items()} | {"s3_selection": stub}


# --- weights that the judge attacks --------------------------------------------------------------------


@pytest.fixture
def lossless(monkeypatch):
    """The judge on originals, in the smoke tier: nothing to decode."""
    monkeypatch.setenv("ROBUSTKIT_TIER", "smoke")
    monkeypatch.setattr(models, "CIFAR_SOURCES", (("cifar10-lossless-4k", "report"),))


def trained_on(attacked: bool, steps: int = 6):
    """The kit's network, trained on for a few steps of 32 originals, with random starts of the ball or without."""
    model, data = (
        pretrained("cifar10-l2-w16").train(),
        load("cifar10-lossless-4k", "select", limit=32 * steps),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    ball = Ball("L2", 0.5 if attacked else 0.0)
    for rows in torch.arange(len(data)).split(32):
        x = ball.candidates(data.x[rows], ball.random(data.x[rows], seeded(0, int(rows[0]))))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), data.y[rows]).backward()
        optimizer.step()
    return model.eval()


@needs_photographs
@pytest.mark.slow
def test_weights_trained_on_are_no_longer_those_of_the_kit_and_get_full_marks(lossless):
    model = trained_on(attacked=True)
    assert examine(models.CIFAR_WEIGHTS, model, 0) == []
    # Large logits are no fault, only no defence.
    with torch.no_grad():
        for value in model[1].head.parameters():
            value *= 1e3
    assert examine(models.CIFAR_WEIGHTS, model, 0) == []


def test_without_images_nothing_is_earned_and_the_reason_is_told(offline):
    found = examine(models.CIFAR_WEIGHTS, pretrained("cifar10-l2-w16"), 0)
    assert {finding.code for finding in found} == {"NO_IMAGES"}
    assert all("nothing to judge on: CIFAR-10 is not in" in finding.hint for finding in found)


# --- cases that tell right from wrong --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_histories_have_another_leader_for_every_wrong_reason(seed):
    counts = training._draw_histories(seed)["counts"]
    best = counts.argmax(1)
    assert (counts[:, :, 1].max(1) == 255).all()
    for column in (0, 2, 3):
        assert (best[:, column] != best[:, 1]).all()
    last = counts[:, -1, 1]
    apart = [Interval(int(k), 500).high < Interval(255, 500).low for k in last]
    assert 1 <= sum(apart) < len(apart) - 1


@pytest.mark.parametrize("seed", range(20))
def test_figures_and_recipes_of_every_kind_are_drawn(seed):
    case = training._draw_figures(seed)
    right = [training._right_verdict(figure, training._claim(case)) for figure in training._figures(case)]
    assert {word: right.count(word) >= 3 for word in training.VERDICTS} == dict.fromkeys(
        training.VERDICTS, True
    )
    faults = training._draw_procedures(seed)["faults"]
    assert (faults.sum(0) >= 3).all()
    assert (faults.sum(1) == 0).sum() >= 4
    assert not (faults[:, 1] & faults[:, 2]).any()


@pytest.mark.parametrize("seed", range(3))
def test_an_honest_recipe_is_honest_and_a_fault_leaves_its_trace(seed):
    """Measured here without any learner's function: sizes, boxes, index sets."""
    case = training._draw_procedures(seed)
    x, y = torch.from_numpy(case["x"]), torch.from_numpy(case["y"])
    for i, present in enumerate(case["faults"]):
        fault = dict(zip(training.FAULTS, present.tolist(), strict=True))
        recipe = training._procedure(case, i)
        points = recipe.attack(training._snapshots(case)[0].eval(), x, y, seeded(0))
        assert bool((points < 0).any() or (points > 1).any()) == fault["outside"]
        if not fault["outside"]:
            assert bool((recipe.ball.size(points - x) > recipe.ball.eps + 1e-5).any()) == fault["units"]
        together = recipe.trained_on | recipe.selected_by | recipe.reported_on
        parts = (recipe.trained_on, recipe.selected_by, recipe.reported_on)
        assert (sum(map(len, parts)) > len(together)) == fault["splits"]


# --- what the text states ------------------------------------------------------------------------------


def test_numbers_that_the_text_states():
    assert round(10 ** (-30 / 20) * math.sqrt(3 * 32 * 32), 2) == 1.75  # PSNR of 30 dB, as an L2 distance
    linf = {entry.id: entry for entry in leaderboard.load("cifar10", "Linf").entries}
    assert (linf["JinRinard2020Manifold"].reported, linf["JinRinard2020Manifold"].robust) == (71.22, 1.35)
    small = [e for e in leaderboard.load("cifar10", "Linf").select().entries if "ResNet-18" in e.architecture]
    assert max(entry.robust for entry in small) == pytest.approx(52.48)
    l2 = [e for e in leaderboard.load("cifar10", "L2").select().entries if "ResNet-18" in e.architecture]
    assert max(entry.robust for entry in l2) == pytest.approx(67.68)
    assert Interval(7031, 10_000).low < 0.70 < Interval(7269, 10_000).low


def test_the_shipped_curves_show_what_the_text_and_the_mark_scheme_say():
    record = records.training()
    assert record["data"]["train"]["dataset"] == "CIFAR-10 (JPEG mirror)"
    assert record["data"]["held_out"]["exact"]
    first, *_, last = record["overfitting"]["rows"]
    shares = {
        (row["epoch"], part): Interval(*row[part]["robust"])
        for row in (first, last)
        for part in ("train", "held_out")
    }
    assert shares[0, "train"].share == pytest.approx(0.45)
    assert shares[last["epoch"], "train"].share > 0.99
    assert (shares[0, "held_out"].k, shares[last["epoch"], "held_out"].k) == (148, 91)
    eighth = next(row for row in record["overfitting"]["rows"] if row["epoch"] == 8)
    assert Interval(*eighth["held_out"]["robust"]).high < shares[0, "held_out"].low
    by_size = {(row["width"], row["defence"]): row["held_out"] for row in record["capacity"]["rows"]}
    assert {width for width, _ in by_size} == {4, 8, 16}
    for width in (4, 8, 16):
        ordinary, adversarial = (by_size[width, name] for name in ("clean", "one-step-l2-at"))
        assert ordinary["clean"][0] > adversarial["clean"][0]
        assert Interval(*ordinary["robust"]).high < Interval(*adversarial["robust"]).low
    assert json.dumps(record)  # numbers and words alone
    assert np.isfinite(record["cpu_minutes"])
