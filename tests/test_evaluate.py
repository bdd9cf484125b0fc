"""Evaluation: verdicts are given here, whatever an attack says or does."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustkit.attacks import fgsm, pgd, rs_fgsm
from robustkit.errors import RobustkitError
from robustkit.evaluate import ATTACKS, check_candidates, evaluate, find_attacks, predict
from robustkit.results import CLEAN, Evaluation
from robustkit.threat import NORMS, Ball
from tests.oracle import DUAL, PROVENANCE, dataset, interior, linear, linear_data, margins, strongest

BALL = Ball("Linf", 0.05)
measure = partial(evaluate, model_name="linear", tier="smoke", progress=False)


def nothing(model, x: Tensor, y: Tensor, ball: Ball, *, generator=None) -> Tensor:
    return x.clone()


# --- closed forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ["fgsm", "pgd-40"])
def test_accuracies_are_those_of_the_closed_form(norm, attack):
    model, ball = linear(), Ball(norm, {"Linf": 0.05, "L2": 0.15, "L1": 0.25}[norm])
    data = linear_data(model, n=400)
    found = measure(model, data, ball, {attack: ATTACKS[attack]})
    m = margins(model, data.x, data.y)
    reach = ball.eps * np.linalg.norm(model.w.detach().double().numpy(), ord=DUAL[norm])
    assert found.clean.k == (m > 0).sum() == 360
    # PGD ends within 2 % of the L2 optimum; rounding alone blurs the others.
    blur = 0.02 if (norm, attack) == ("L2", "pgd-40") else 1e-4
    close = int((abs(m - reach) < blur * reach).sum())
    assert close < 10
    assert abs(found.robust.k - (m > reach).sum()) <= close
    assert 40 < found.robust.k < 320
    expected = [CLEAN if value <= 0 else attack if value < reach else None for value in m]
    assert sum(a != b for a, b in zip(found.broken_by, expected, strict=True)) <= close


def test_an_evaluation_carries_its_threat_model_data_and_settings():
    model = linear()
    data = linear_data(model).subset(50, seed=3)
    attacks = {"fgsm": fgsm, "short": partial(pgd, steps=3, restarts=2)}
    found = measure(model, data, BALL, attacks, seed=7)
    assert found.threat.ball == BALL
    assert found.threat.knowledge == "white-box"
    assert found.data == PROVENANCE
    assert found.indices == data.indices
    assert (found.seed, found.tier, found.model, found.n) == (7, "smoke", "linear", 50)
    assert [(run.name, run.parameters) for run in found.attacks] == [
        ("fgsm", {}),
        ("short", {"steps": 3, "restarts": 2}),
    ]
    assert Evaluation.from_json(found.to_json()) == found


def test_later_attacks_meet_survivors_only_and_the_worst_case_counts():
    model = linear()
    data = linear_data(model)
    met: dict[str, int] = {}

    def on_half(name: str, side: int):
        """Moves only the images whose first pixel is on one side: each half is broken by one attack."""

        def attack(model, x: Tensor, y: Tensor, ball: Ball, *, generator=None) -> Tensor:
            met[name] = met.get(name, 0) + len(x)
            moved = torch.from_numpy(strongest(linear(), x, y, ball)).float()
            chosen = (x[:, 0, 0, 0] > 0.5) == bool(side)
            return torch.where(chosen[:, None, None, None], moved, x)

        return attack

    found = measure(model, data, BALL, {"left": on_half("left", 0), "right": on_half("right", 1)})
    both = measure(model, data, BALL, {"fgsm": fgsm})
    assert met["left"] == found.clean.k
    assert met["right"] == found.robust_after(1).k < met["left"]
    assert found.robust.k == both.robust.k < found.robust_after(1).k
    assert {CLEAN, "left", "right", None} == set(found.broken_by)


def test_the_batch_size_changes_nothing_for_a_deterministic_attack():
    model = linear()
    data = linear_data(model)
    found = [measure(model, data, BALL, {"fgsm": fgsm}, batch_size=size).broken_by for size in (1000, 7)]
    assert found[0] == found[1]


def test_randomness_follows_from_the_seed_alone():
    model = linear()
    data = linear_data(model, n=400)
    attacks = {"rs-fgsm": partial(rs_fgsm, step_size=0.3)}
    torch.manual_seed(1)
    first = measure(model, data, BALL, attacks, seed=1)
    torch.manual_seed(2)
    assert measure(model, data, BALL, attacks, seed=1).broken_by == first.broken_by
    assert measure(model, data, BALL, attacks, seed=2).broken_by != first.broken_by


def test_when_everything_is_broken_the_remaining_attacks_have_nothing_to_do():
    model = linear()
    data = linear_data(model)
    found = measure(model, data, Ball("Linf", 0.5), {"fgsm": fgsm, "pgd-10": ATTACKS["pgd-10"]})
    assert found.robust.k == 0
    assert "pgd-10" not in found.broken_by


# --- prediction ------------------------------------------------------------------------------------


def test_a_tie_counts_against_the_model():
    x, y = torch.full((3, 4), 0.5), torch.tensor([0, 1, 2])

    def constant(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 3)

    assert predict(constant, x, y).tolist() == [False, False, False]


def test_predictions_are_made_in_eval_mode_and_the_mode_comes_back():
    model = linear()
    data = linear_data(model)
    model.train()
    right = predict(model, data.x, data.y)
    assert model.training
    assert model.drop.training
    assert (right.numpy() == (margins(model, data.x, data.y) > 0)).all()


def test_predictions_are_made_in_full_float32_inside_autocast():
    """Two logits that bfloat16 cannot tell apart."""
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0], [1.001]])
    x, y = torch.full((1, 1), 0.9), torch.tensor([1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).unique().numel() == 1
        assert predict(layer, x, y).all()


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (torch.full((4, 2), torch.nan), "NaN logits"),
        (torch.zeros(4, 1), "label 1 is out of range: the model has 1 classes"),
        (torch.zeros(4), "must return logits"),
        (torch.zeros(3, 2), "must return logits"),
    ],
)
def test_unusable_logits_are_refused(logits, words):
    with pytest.raises(RobustkitError, match=words):
        predict(lambda x: logits, torch.full((4, 2), 0.5), torch.tensor([0, 1, 0, 1]))


# --- what is refused -------------------------------------------------------------------------------


def returning(change):
    def attack(model, x: Tensor, y: Tensor, ball: Ball, *, generator=None):
        return change(x, ball)

    return attack


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda x, ball: x + 1.01 * ball.eps,
            "left its ball on .* of .* images: Linf distance 0.0505, allowed 0.05",
        ),
        (lambda x, ball: x - 1.01 * ball.eps, "left its ball"),
        (lambda x, ball: torch.cat([x[:-1], x[-1:] + 2 * ball.eps]), "left its ball on 1 of"),
        (lambda x, ball: x.mul_(0).add_(0.5), "left its ball"),  # in place: measured from the kept original
        (lambda x, ball: x * torch.nan, "NaN or infinite"),
        (lambda x, ball: x[:-1], "one candidate per image"),
        (lambda x, ball: x.flatten(1), "one candidate per image"),
        (lambda x, ball: x.double(), "torch.float64 for images of torch.float32"),
        (lambda x, ball: x.numpy(), "returned ndarray"),
        (lambda x, ball: None, "returned NoneType"),
    ],
)
def test_an_attack_that_breaks_the_rules_is_refused_by_name(change, words):
    model = linear()
    with pytest.raises(RobustkitError, match=words) as caught:
        measure(model, linear_data(model), BALL, {"fgsm": fgsm, "rogue": returning(change)})
    assert "attack 'rogue'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_attack_that_leaves_the_box_is_refused_even_inside_its_ball():
    x = torch.tensor([[0.01, 0.5]])
    with pytest.raises(RobustkitError, match=r"left the box \[0, 1\]: pixels in \[-0.02, 0.5\]; clamp them"):
        check_candidates("rogue", x, x - torch.tensor([[0.03, 0.0]]), Ball("Linf", 0.05))


def test_an_attack_that_swaps_images_cannot_pass_them_off_as_perturbed():
    model = linear()
    with pytest.raises(RobustkitError, match="left its ball"):
        measure(model, linear_data(model), BALL, {"rogue": returning(lambda x, ball: x.flip(0))})


def test_an_attack_cannot_talk_its_way_to_success():
    """Labels changed in place by the attack are not the labels that decide."""

    def relabel(model, x: Tensor, y: Tensor, ball: Ball, *, generator=None) -> Tensor:
        y.copy_(1 - y)
        return x

    model = linear()
    found = measure(model, linear_data(model), BALL, {"relabel": relabel})
    assert found.robust == found.clean


def test_an_attack_that_does_nothing_breaks_nothing():
    model = linear()
    found = measure(model, linear_data(model), BALL, {"nothing": nothing})
    assert found.robust == found.clean
    assert found.clean.k == 180


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (interior() + 1, None, r"must lie in \[0, 1\]"),
        (interior() * torch.nan, None, "NaN"),
        (interior()[:0], None, "non-empty"),
        (interior(), torch.full((200,), 5), "label 5 is out of range"),
        (interior(), torch.full((200,), -1), "negative"),
        (interior(), torch.zeros(200), "int64"),
    ],
)
def test_data_that_cannot_be_evaluated_are_refused(x, y, words):
    with pytest.raises(RobustkitError, match=words):
        measure(
            linear(),
            dataset(x, torch.zeros(len(x), dtype=torch.int64) if y is None else y),
            BALL,
            {"fgsm": fgsm},
        )


def test_an_evaluation_without_an_attack_is_refused():
    model = linear()
    with pytest.raises(RobustkitError, match="at least one attack"):
        measure(model, linear_data(model), BALL, {})


def test_attacks_are_found_by_name_in_the_order_given():
    assert list(find_attacks("pgd-40, fgsm")) == ["pgd-40", "fgsm"]
    with pytest.raises(RobustkitError, match="'apgd' is unknown; choose from fgsm"):
        find_attacks("fgsm,apgd")
    assert find_attacks("") == {}
