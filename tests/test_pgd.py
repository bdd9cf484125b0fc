"""PGD's targets and its early-stopping form; what all attacks have in common is in tests/test_attacks.py."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch

from robustkit.attacks import early_stopped_pgd, pgd
from robustkit.device import Prepared, seeded
from robustkit.errors import RobustkitError
from robustkit.losses import cross_entropy, dlr, margin
from robustkit.threat import NORMS, Ball
from tests.oracle import ORDER, Linear, interior, linear, margins

each_norm = pytest.mark.parametrize("norm", NORMS)
PEER_EPS, PEER_STEPS, PEER_STEP = 0.1, 7, 0.03


@each_norm
def test_early_stopping_loses_nothing_and_leaves_the_others_course_alone(curved, norm):
    model, x, y = curved
    y = model(x).argmax(1)
    ball = Ball(norm, {"Linf": 0.03, "L2": 0.15, "L1": 0.4}[norm])
    start = ball.candidates(x, ball.random(x, seeded(1)))
    settings = {"steps": 12, "step_size": ball.eps / 3, "start": start}
    last, first = pgd(model, x, y, ball, **settings), early_stopped_pgd(model, x, y, ball, **settings)
    with torch.no_grad():
        broken_last, broken_first = model(last).argmax(1) != y, model(first).argmax(1) != y
    assert (broken_first >= broken_last).all()
    assert 3 <= int(broken_first.sum()) <= 13
    torch.testing.assert_close(first[~broken_first], last[~broken_first], atol=1e-5, rtol=0)
    assert not torch.allclose(first[broken_first], last[broken_first], atol=1e-3)


def test_early_stopping_keeps_what_the_last_step_would_lose():
    """A step too long for the valley: every other point is fooled, and the last one is not."""

    def model(x: torch.Tensor) -> torch.Tensor:
        score = 0.3 - (x.flatten(1)[:, :1] - 0.5).abs()
        return torch.cat([score * 0, 10 * (score - 0.25)], 1)

    x, y = torch.full((1, 1), 0.4), torch.zeros(1, dtype=torch.int64)
    settings = {"steps": 2, "step_size": 0.1, "start": x, "loss": margin}
    ball = Ball("Linf", 0.2)
    with torch.no_grad():
        assert model(early_stopped_pgd(model, x, y, ball, **settings)).argmax(1) != y
        assert model(pgd(model, x, y, ball, **(settings | {"steps": 4, "step_size": 0.15}))).argmax(1) == y


def test_pgd_costs_its_steps_and_early_stopping_only_those_that_resist():
    x = interior()
    model = linear()
    with torch.no_grad():
        y = model(x).argmax(1)
    sizes: list[int] = []

    def counting(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return model(images)

    ball = Ball("Linf", 0.05)
    pgd(counting, x, y, ball, steps=6, generator=seeded(0))
    assert sizes == [len(x)] * 6
    sizes.clear()
    found = early_stopped_pgd(counting, x, y, ball, steps=6, generator=seeded(0))
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 6
    assert int((margins(model, found, y) > 0).sum()) <= sizes[-1] < sizes[0]


def claims_too_much(model: Linear) -> Prepared:
    """A search model that takes class 1 to be fooled too early, in front of the real one."""
    return Prepared(Linear(model.w.detach(), float(model.b.detach()) - 0.4).eval(), model)


@pytest.mark.parametrize("attack", [pgd, early_stopped_pgd])
@pytest.mark.parametrize("believing", [False, True])
def test_a_claim_that_the_model_refuses_is_not_a_success(attack, believing, monkeypatch):
    if believing:  # the wrong program
        module = import_module("robustkit.attacks.pgd")
        monkeypatch.setattr(module, "confirmed", lambda model, points, y, claimed: claimed)
    x, model = interior(n=300), linear()
    y = model(x).argmax(1)
    ball = Ball("Linf", 0.05)
    limit = ball.eps * np.linalg.norm(model.w.detach().double().numpy(), ord=1)
    # Where the last point counts, one short step: what is left to restarts shows.
    steps = {"steps": 1, "step_size": 0.4 * ball.eps} if attack is pgd else {"steps": 30}
    found = attack(claims_too_much(model), x, y, ball, restarts=12, generator=seeded(0), **steps)
    broken = margins(model, found, y) < 0
    within = margins(model, x, y) < (0.4 if attack is pgd else 0.99) * limit
    assert bool(broken[within].all()) != believing


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_targeted_pgd_agrees_with_cleverhans(curved, norm):
    from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent

    model, x, y = curved
    target = (y + 2) % 5
    ours = pgd(
        model, x, y, Ball(norm, PEER_EPS), steps=PEER_STEPS, step_size=PEER_STEP, start=x, target=target
    )
    theirs = projected_gradient_descent(
        *(model, x, PEER_EPS, PEER_STEP, PEER_STEPS, ORDER[norm]),
        **{"clip_min": 0.0, "clip_max": 1.0, "y": target, "targeted": True, "rand_init": False},
    ).detach()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert (model(ours).argmax(1) == target).sum() > (model(x).argmax(1) == target).sum()


@pytest.mark.parametrize("loss", [cross_entropy, margin, dlr])
def test_rows_and_their_targets_leave_together(curved, loss):
    """Each example alone, with its own target, goes where it goes in the batch."""
    model, x, y = curved
    y = model(x).argmax(1)
    target, ball = (y + 1) % 5, Ball("L2", 0.15)
    settings = {"steps": 8, "step_size": 0.05, "loss": loss}
    together = early_stopped_pgd(model, x, y, ball, start=x, target=target, **settings)
    alone = [
        early_stopped_pgd(
            model, x[i : i + 1], y[i : i + 1], ball, start=x[i : i + 1], target=target[i : i + 1], **settings
        )
        for i in range(len(x))
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    with torch.no_grad():
        assert 0 < int((model(together).argmax(1) != y).sum()) < len(x)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.zeros(16, dtype=torch.int64), "other than the true one"),
        (-torch.ones(16, dtype=torch.int64), "0 or larger"),
        (torch.zeros(15, dtype=torch.int64), "one int64 class for each example"),
        (torch.zeros(16), "got torch.float32"),
        (torch.full((16,), 9), "label 9 is out of range"),
    ],
)
def test_targets_that_mean_nothing_are_refused(curved, target, words):
    model, x, y = curved
    with pytest.raises(RobustkitError, match=words):
        pgd(model, x, y, Ball("Linf", 0.1), target=target)


@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("attack", [pgd, early_stopped_pgd])
@pytest.mark.parametrize("restarts", [1, 2])
def test_nan_logits_are_refused_whenever_they_come(curved, attack, calls, restarts):
    model, x, _ = curved
    seen = []

    def failing(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return model(images) * (torch.nan if len(seen) > calls else 1.0)

    with pytest.raises(RobustkitError, match="NaN"):
        attack(
            failing,
            x,
            model(x).argmax(1),
            Ball("Linf", 0.01),
            steps=5,
            restarts=restarts,
            generator=seeded(0),
        )
