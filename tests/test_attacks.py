"""Attacks against closed forms on a linear model; against other libraries: tests/test_library.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robustkit.attacks import apgd, apgd_targeted, early_stopped_pgd, fab_targeted, fgsm, pgd, rs_fgsm
from robustkit.device import seeded
from robustkit.errors import RobustkitError
from robustkit.losses import cross_entropy, margin, towards
from robustkit.models import build
from robustkit.threat import NORMS, Ball
from tests.oracle import DUAL, ORDER, Linear, everywhere, interior, linear, margins, strongest

EPS = 0.15
ATTACKS = {
    "fgsm": fgsm,
    "rs_fgsm": rs_fgsm,
    "pgd": lambda *args, **kwargs: pgd(*args, steps=10, **kwargs),
    "pgd, restarts": lambda *args, **kwargs: pgd(*args, steps=10, restarts=3, **kwargs),
    "early-stopped pgd": lambda *args, **kwargs: early_stopped_pgd(*args, steps=10, restarts=2, **kwargs),
    "apgd": lambda *args, **kwargs: apgd(*args, steps=20, **kwargs),
    "apgd, targeted": lambda *args, **kwargs: apgd_targeted(*args, steps=20, loss=towards(margin), **kwargs),
    "fab, targeted": lambda *args, **kwargs: fab_targeted(*args, steps=20, **kwargs),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
each_norm = pytest.mark.parametrize("norm", NORMS)


def labelled(x: torch.Tensor) -> tuple[Linear, torch.Tensor]:
    """The linear model and labels that are mostly its own; the wrong ones must be attacked as given."""
    model = linear()
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::7] = 1 - y[::7]
    return model, y


# --- closed forms ----------------------------------------------------------------------------------


@each_norm
def test_fgsm_is_the_closed_form_optimum(norm):
    x = everywhere() if norm == "Linf" else interior()
    model, y = labelled(x)
    ball = Ball(norm, EPS)
    np.testing.assert_allclose(fgsm(model, x, y, ball).numpy(), strongest(model, x, y, ball), atol=2e-7)


@each_norm
@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_pgd_reaches_the_closed_form_optimum_from_any_start(norm, loss):
    x = everywhere() if norm == "Linf" else interior()
    model, y = labelled(x)
    ball = Ball(norm, EPS)
    found = pgd(
        model,
        x,
        y,
        ball,
        steps=60,
        step_size=0.1 * EPS if norm == "Linf" else EPS,
        loss=loss,
        generator=seeded(0),
    )
    # An L2 start may hold some distance across the gradient: steps of eps wear it down.
    np.testing.assert_allclose(
        found.numpy(), strongest(model, x, y, ball), atol=1e-6 if norm == "Linf" else 1e-4
    )


@each_norm
@each_attack
def test_an_attack_breaks_exactly_what_the_closed_form_says(norm, attack):
    x = interior(n=400)
    model, y = labelled(x)
    eps = {"Linf": 0.05, "L2": 0.15, "L1": 0.25}[norm]  # reaches some points and not others
    ball = Ball(norm, eps)
    limit = eps * np.linalg.norm(model.w.detach().double().numpy(), ord=DUAL[norm])
    m = margins(model, x, y)
    candidates = attack(model, x, y, ball, generator=seeded(0))
    broken = margins(model, candidates, y) < 0
    # Nothing outside its reach is broken, whatever the attack; FGSM and PGD break all inside it.
    assert not (broken & (m > limit * 1.0001)).any()
    assert (m > limit).any()
    assert ((m > 0) & (m < limit)).any()
    if attack is not ATTACKS["rs_fgsm"]:
        slack = 0.9999 if norm == "Linf" or attack is fgsm else 0.9
        if norm == "L1" and attack in (ATTACKS["apgd"], ATTACKS["apgd, targeted"]):
            slack = 0.75  # its steps never move fewer than two coordinates, and the optimum lies along one
        assert (broken | (m > limit * slack)).all()


@each_norm
def test_pgd_takes_exactly_its_steps(norm):
    """Three short steps from x along a constant gradient are one step of three times the length."""
    x = interior()
    model, y = labelled(x)
    expected = strongest(model, x, y, Ball(norm, 0.3 * EPS))
    found = pgd(model, x, y, Ball(norm, EPS), steps=3, step_size=0.1 * EPS, start=x)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_rs_fgsm_is_a_clipped_step_from_a_uniform_start():
    x = interior()
    model, y = labelled(x)
    ball = Ball("Linf", EPS)
    found = (rs_fgsm(model, x, y, ball, generator=seeded(3)) - x).numpy()
    towards = np.sign(strongest(model, x, y, ball) - x.numpy())
    # u uniform in [-eps, eps] plus 1.25 eps, cut at eps: at the surface unless u < -eps / 4.
    along = found * towards
    assert along.min() >= 0.25 * EPS - 1e-6
    assert along.max() <= EPS + 1e-6
    share = (along > EPS - 1e-6).mean()
    assert share == pytest.approx(0.625, abs=4 * (0.625 * 0.375 / found.size) ** 0.5)
    # A short step cannot hide its start: what is left of it must be uniform.
    short = (rs_fgsm(model, x, y, ball, step_size=0.0, generator=seeded(3)) - x).numpy() / EPS
    assert short.mean() == pytest.approx(0, abs=4 * (1 / 3 / short.size) ** 0.5)
    assert (short**2).mean() == pytest.approx(1 / 3, abs=0.03)


def test_pgd_keeps_the_worst_of_its_restarts():
    """Two loss maxima, the lower one nearer: one run falls into either, restarts find the higher."""

    def model(x: torch.Tensor) -> torch.Tensor:
        z = x.flatten(1)[:, :1]
        # Margin of the true class 0: positive around 0.5, negative only beyond 0.68.
        score = 4 * (z - 0.5) ** 2 * (1 + 2 * (z - 0.5)) - 0.18
        return torch.cat([-score, score], 1)

    x, y = torch.full((200, 1), 0.5), torch.zeros(200, dtype=torch.int64)
    ball = Ball("Linf", 0.2)

    def broken(restarts: int) -> int:
        found = pgd(model, x, y, ball, steps=10, restarts=restarts, generator=seeded(0))
        return int((model(found).argmax(1) != y).sum())

    assert 60 <= broken(1) <= 140  # about half of the starts lie on the better side
    assert broken(12) == 200


def test_restarts_never_lose_what_an_earlier_one_found():
    model, x = build("mnist_cnn", seed=1).eval(), torch.rand(32, 1, 28, 28, generator=seeded(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    ball = Ball("Linf", 0.02)

    def result(restarts: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = pgd(model, x, y, ball, steps=2, restarts=restarts, generator=seeded(2))
        with torch.no_grad():
            return margin(model(found), y), cross_entropy(model(found), y)

    (one, low), (three, high) = result(1), result(3)
    assert ((one > 0) <= (three > 0)).all()
    # Among failures the highest loss is kept, not the last.
    failed = three <= 0
    assert 0 < int(failed.sum()) < 32
    assert (high[failed] >= low[failed] - 1e-6).all()


def test_restarts_are_spent_on_survivors_alone():
    x = interior()
    model, y = labelled(x)
    sizes = []

    def counting(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return model(images)

    ball = Ball("Linf", 0.05)
    found = pgd(counting, x, y, ball, steps=4, step_size=0.05, restarts=2, generator=seeded(0))
    survivors = int((margins(model, found, y) > 0).sum())
    assert 0 < survivors < len(x)
    assert sizes == [len(x)] * 5 + [survivors] * 5


# --- manners ---------------------------------------------------------------------------------------


@each_norm
@each_attack
def test_candidates_stay_in_ball_and_box_at_the_walls(norm, attack):
    x = everywhere()
    model, y = labelled(x)
    found = attack(model, x, y, Ball(norm, 0.6), generator=seeded(0))
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found.min() == 0 and found.max() == 1) or norm != "Linf"
    distance = np.linalg.norm((found.double() - x.double()).flatten(1).numpy(), ord=ORDER[norm], axis=1)
    assert distance.max() <= 0.6 + 1e-6


@each_attack
def test_an_attack_leaves_everything_as_it_was(attack):
    x = interior()
    model, y = labelled(x)
    model.train()
    model.drop.eval()  # mixed modes: restoring the root's alone is not enough
    model.b.requires_grad_(False)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    kept, labels, random_state = x.clone(), y.clone(), torch.random.get_rng_state()
    found = attack(model, x, y, Ball("Linf", EPS), generator=seeded(0))
    assert torch.equal(x, kept)
    assert torch.equal(y, labels)
    assert found.data_ptr() != x.data_ptr()
    assert not found.requires_grad
    assert not x.requires_grad
    assert model.training
    assert not model.drop.training
    assert (model.w.requires_grad, model.b.requires_grad) == (True, False)
    assert model.w.grad is None
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(random_state, torch.random.get_rng_state())


@each_attack
def test_an_attack_aims_at_the_deployed_model_not_at_dropout(attack):
    x = interior()
    model, y = labelled(x)
    deployed = attack(model.eval(), x, y, Ball("Linf", EPS), generator=seeded(0))
    assert torch.equal(attack(model.train(), x, y, Ball("Linf", EPS), generator=seeded(0)), deployed)


@each_attack
def test_an_attack_works_where_gradients_are_switched_off_and_on_frozen_models(attack):
    x = interior()
    model, y = labelled(x)
    expected = attack(model, x, y, Ball("Linf", EPS), generator=seeded(0))
    with torch.no_grad():
        assert torch.equal(attack(model, x, y, Ball("Linf", EPS), generator=seeded(0)), expected)
    model.requires_grad_(False)
    assert torch.equal(attack(model, x, y, Ball("Linf", EPS), generator=seeded(0)), expected)


@pytest.mark.parametrize("name", ["rs_fgsm", "pgd", "pgd, restarts"])
def test_random_starts_come_from_the_generator_alone(name):
    model, x = build("mnist_cnn", seed=1).eval(), torch.rand(8, 1, 28, 28, generator=seeded(1))
    y = torch.arange(8)

    def run(seed: int) -> torch.Tensor:
        return ATTACKS[name](model, x, y, Ball("Linf", 0.1), generator=seeded(seed))

    first = run(1)
    torch.manual_seed(99)
    assert torch.equal(run(1), first)
    assert not torch.equal(run(2), first)


@each_attack
def test_a_ball_of_size_zero_changes_nothing(attack):
    x = interior()
    model, y = labelled(x)
    assert torch.equal(attack(model, x, y, Ball("Linf", 0.0), generator=seeded(0)), x)


def test_an_attack_on_one_example_does_not_depend_on_its_neighbours():
    """A norm taken over the batch, or a mean of the losses that rounds to zero, would show here."""
    x = interior(n=5)
    model, y = labelled(x)
    ball = Ball("L2", EPS)
    alone = torch.cat([fgsm(model, x[i : i + 1], y[i : i + 1], ball) for i in range(5)])
    torch.testing.assert_close(fgsm(model, x, y, ball), alone)


# --- refusals --------------------------------------------------------------------------------------


@each_attack
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (x - 2, y), r"must lie in \[0, 1\]"),
        (lambda x, y: (x * torch.nan, y), "NaN"),
        (lambda x, y: (x[:0], y[:0]), "non-empty"),
        (lambda x, y: (x, y[:-1]), "one label per example"),
        (lambda x, y: (x, y + 2), "label 3 is out of range: the model has 2 classes"),
        (lambda x, y: (x, y - 2), "negative"),
    ],
    ids=["range", "nan", "empty", "labels missing", "label too large", "label negative"],
)
def test_bad_batches_are_refused(attack, change, words):
    x = interior()
    model, y = labelled(x)
    y[0] = 1
    with pytest.raises(RobustkitError, match=words):
        attack(model, *change(x, y), Ball("Linf", EPS), generator=seeded(0))


def test_the_model_is_put_back_after_a_refusal_in_the_middle():
    x = interior()
    model, y = labelled(x)
    model.train()
    with pytest.raises(RobustkitError):
        pgd(model, x, y + 2, Ball("Linf", EPS))
    assert model.training
    assert model.w.requires_grad


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "at least 1; got 0 and 1"),
        ({"restarts": 0}, "at least 1; got 40 and 0"),
        ({"start": interior() + 0.2}, "start must lie within Linf eps=0.15"),
        ({"start": interior(), "restarts": 2}, "are the same run"),
    ],
)
def test_pgd_refuses_settings_that_mean_nothing(settings, words):
    x = interior()
    model, y = labelled(x)
    with pytest.raises(RobustkitError, match=words):
        pgd(model, x, y, Ball("Linf", EPS), **settings)
