"""Auto-PGD against closed forms, and point by point against pyautoattack from the same starts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustkit.attacks import apgd, apgd_targeted
from robustkit.data import load
from robustkit.device import Prepared, attackable, seeded
from robustkit.errors import RobustkitError
from robustkit.losses import Loss, cross_entropy, dlr, dlr_targeted, margin, towards
from robustkit.models import pretrained
from robustkit.threat import NORMS, Ball
from tests.oracle import DUAL, Linear, everywhere, interior, linear, margins, strongest

MODULE = import_module("robustkit.attacks.apgd")

each_norm = pytest.mark.parametrize("norm", NORMS)
EPS = {"Linf": 0.05, "L2": 0.15, "L1": 0.25}
LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr}


def broken(model: Callable[[Tensor], Tensor], candidates: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(candidates).argmax(1) != y


# --- closed forms ----------------------------------------------------------------------------------


@each_norm
def test_apgd_breaks_exactly_what_the_closed_form_says(norm):
    x = interior(n=400)
    model = linear()
    y = model(x).argmax(1)
    ball = Ball(norm, EPS[norm])
    limit = EPS[norm] * np.linalg.norm(model.w.detach().double().numpy(), ord=DUAL[norm])
    m = margins(model, x, y)
    fooled = margins(model, apgd(model, x, y, ball, steps=50, generator=seeded(0)), y) < 0
    assert not (fooled & (m > limit * 1.0001)).any()
    # An L1 step never moves fewer than two coordinates, and the optimum lies along one.
    assert (fooled | (m > limit * (0.75 if norm == "L1" else 0.999))).all()
    assert 40 < fooled.sum() < 360


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_what_resists_is_left_at_the_closed_form_optimum(norm, loss):
    x = everywhere() if norm == "Linf" else interior()
    model = linear()
    y = model(x).argmax(1)
    ball = Ball(norm, EPS[norm])
    found = apgd(model, x, y, ball, loss=loss, generator=seeded(0))
    resisting = ~broken(model, found, y).numpy()
    assert resisting.sum() > 20
    np.testing.assert_allclose(
        found.numpy()[resisting],
        strongest(model, x, y, ball)[resisting],
        atol=1e-6 if norm == "Linf" else 1e-3,
    )


# --- pyautoattack as the referee -------------------------------------------------------------------


@pytest.fixture(scope="module")
def curved() -> tuple[nn.Module, Tensor, Tensor]:
    """A smooth network: without kinks, rounding cannot turn into another sign of a gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 6)).eval()
        for parameter in model.parameters():
            parameter.data.mul_(3)
    x = (1.4 * torch.rand(60, 3, 4, 4, generator=seeded(0)) - 0.2).clamp(0, 1)
    return model, x, model(x).argmax(1)


SIZES = {"Linf": 0.04, "L2": 0.25, "L1": 0.7}  # less than half of the points are broken
Run = tuple[Tensor, Tensor, Tensor]


def referee(curved, ball: Ball, loss: str, steps: int, *, mended: bool = True, target=None) -> Run:
    """(start, broken, highest loss) of pyautoattack's own run, over all points at once.

    Mended, it counts the first step as a rise when the loss exceeds the start's, as the paper has it. As it
    is, the loss is compared with zero: the place where it looks for the start's is not filled yet.
    """
    from pyautoattack import autopgd_base

    model, x, y = curved
    kind = autopgd_base.APGDAttack if target is None else autopgd_base.APGDAttack_targeted

    class Mended(kind):
        def check_oscillation(self, losses, last, count, best, k3):
            if last == count - 1:
                losses = torch.cat([losses[: last + 1], first[None]])  # where index -1 points to
            return super().check_oscillation(losses, last, count, best, k3)

    attack = (Mended if mended else kind)(model, n_iter=steps, norm=ball.norm, eps=ball.eps, device="cpu")
    attack.loss, attack.y_target = loss, target
    attack.init_hyperparam(x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if ball.norm == "Linf":
            delta = ball.eps * attack.normalize(2 * torch.rand(x.shape) - 1)
        elif ball.norm == "L2":
            delta = ball.eps * attack.normalize(torch.randn(x.shape))
        else:
            delta = torch.randn(x.shape)
            delta = delta + autopgd_base.L1_projection(x, delta, ball.eps)
        start = ball.candidates(x, delta)
        with torch.no_grad():
            logits = model((x + delta).clamp(0, 1))
            first = LOSSES[loss](logits, y) if target is None else dlr_targeted(logits, y, target)
        torch.manual_seed(3)
        _, right, highest, _ = attack.attack_single_run(x, y)
    return start, ~right.bool(), highest


def check_parity(curved, norm: str, loss: str, steps: int = 30, ours: Loss | None = None) -> None:
    """The same points broken, and the same highest loss on the others."""
    model, x, y = curved
    ball = Ball(norm, SIZES[norm])
    start, theirs, highest = referee(curved, ball, loss, steps)
    found = apgd(model, x, y, ball, steps=steps, start=start, loss=ours or LOSSES[loss])
    assert torch.equal(broken(model, found, y), theirs)
    assert 0 < int(theirs.sum()) < 35
    with torch.no_grad():
        apart = (LOSSES[loss](model(found), y) - highest).abs()[~theirs]
    # Rounding decides which L1 coordinates are exactly unchanged, and so, rarely, how many a step moves.
    forks = 2 if norm == "L1" else 0
    assert int((apart > 1e-5).sum()) <= forks
    assert apart.max() <= 0.1


@each_norm
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_apgd_agrees_with_pyautoattack_point_by_point(curved, norm, loss, steps, monkeypatch):
    from pyautoattack import autopgd_base

    # Its L1 steps leave residues of rounding in pixels they do not change, which it then counts as changed.
    monkeypatch.setattr(autopgd_base, "L0_norm", lambda delta: (delta.abs() > 1e-6).flatten(1).sum(1))
    check_parity(curved, norm, loss, steps)


@each_norm
@pytest.mark.parametrize("loss", LOSSES)
def test_apgd_and_pyautoattack_as_it_is_break_the_same_points(curved, norm, loss):
    model, x, y = curved
    ball = Ball(norm, SIZES[norm])
    start, theirs, highest = referee(curved, ball, loss, 30, mended=False)
    found = apgd(model, x, y, ball, steps=30, start=start, loss=LOSSES[loss])
    assert torch.equal(broken(model, found, y), theirs)
    with torch.no_grad():
        apart = (LOSSES[loss](model(found), y) - highest).abs()[~theirs]
    assert apart.max() <= 0.1
    assert apart.median() <= 1e-5


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_targeted_apgd_agrees_with_pyautoattack_point_by_point(curved, norm):
    model, x, y = curved
    ball = Ball(norm, SIZES[norm])
    with torch.no_grad():
        second = model(x).argsort(1)[:, -2]
    start, theirs, highest = referee(curved, ball, "dlr-targeted", 30, target=second)
    found = apgd_targeted(model, x, y, ball, steps=30, targets=1, start=start)
    assert torch.equal(broken(model, found, y), theirs)
    with torch.no_grad():
        apart = (dlr_targeted(model(found), y, second) - highest).abs()[~theirs]
    assert apart.max() <= 1e-5


def test_all_targets_together_break_what_pyautoattacks_do(curved):
    from pyautoattack.autopgd_base import APGDAttack_targeted

    model, x, y = curved
    ball = Ball("Linf", SIZES["Linf"])
    peer = APGDAttack_targeted(model, n_iter=30, norm="Linf", eps=ball.eps, device="cpu", n_target_classes=5)
    with torch.random.fork_rng(devices=[]):
        theirs = broken(model, peer.perturb(x, y), y)
    ours = broken(model, apgd_targeted(model, x, y, ball, steps=30, generator=seeded(0)), y)
    one = broken(model, apgd_targeted(model, x, y, ball, steps=30, targets=1, generator=seeded(0)), y)
    assert int((ours != theirs).sum()) <= 1  # the starts differ
    assert int(ours.sum()) >= int(one.sum())


def resisting_l1(steps: int = 30) -> tuple[int, int, int]:
    """Digits that resist APGD in L1: of ours, of pyautoattack's schedule of balls, of ours in the ball alone."""
    from pyautoattack.autopgd_base import APGDAttack

    model, digits, ball = pretrained("mnist-pgd"), load("digits", "test", limit=60), Ball("L1", 6)
    right = ~broken(model, digits.x, digits.y)
    x, y = digits.x[right], digits.y[right]
    peer = APGDAttack(model, n_iter=steps, norm="L1", eps=ball.eps, device="cpu", use_largereps=True)
    peer.loss = "ce"
    with torch.random.fork_rng(devices=[]), attackable(model):
        theirs = peer.perturb(x, y)
    start = ball.candidates(x, ball.random(x, seeded(0)))
    ours = apgd(model, x, y, ball, steps=steps, generator=seeded(0))
    alone = apgd(model, x, y, ball, steps=steps, start=start)
    assert ball.contains(x, ours).all()
    return tuple(int((~broken(model, found, y)).sum()) for found in (ours, theirs, alone))


def check_larger_balls() -> None:
    ours, theirs, alone = resisting_l1()
    assert abs(ours - theirs) <= 4
    assert ours + 6 <= alone


def test_larger_balls_first_break_more_in_l1_as_pyautoattacks_do():
    check_larger_balls()


@pytest.mark.parametrize("larger", [(), (1, 1), (3, 3)])
def test_other_balls_break_less(larger, monkeypatch):
    monkeypatch.setattr(MODULE, "LARGER", larger)
    with pytest.raises(AssertionError):
        check_larger_balls()


# --- wrong programs, which the checks above must refuse --------------------------------------------


def no_halving(patch):
    patch.setattr(MODULE._Halving, "adapt", lambda self, interval: None)


def no_momentum(patch):
    patch.setattr(MODULE, "MOMENTUM", 0.0)


def no_return_to_the_best_point(patch):
    patch.setattr(MODULE._Course, "back_to_best", lambda self, chosen: None)


def halved_at_other_checkpoints(patch):
    patch.setattr(
        MODULE._Halving, "checkpoints", staticmethod(lambda steps: dict.fromkeys(range(2, steps, 2), 2))
    )


def box_before_ball(patch):
    patch.setattr(Ball, "candidates", lambda ball, x, d: x + ball.project((x + d).clamp(0, 1) - x))


def ball_then_box_in_l1(patch):
    patch.setattr(Ball, "candidates", lambda ball, x, d: (x + ball.project(d)).clamp(0, 1))


def fixed_sparsity(patch):
    patch.setattr(MODULE._Sparse, "adapt", lambda self, interval: None)


@pytest.mark.parametrize(
    ("mutate", "norm", "loss"),
    [
        (no_halving, "Linf", "dlr"),
        (no_halving, "L2", "dlr"),
        (no_momentum, "Linf", "dlr"),
        (no_momentum, "L2", "dlr"),
        (no_return_to_the_best_point, "Linf", "dlr"),
        (no_return_to_the_best_point, "L2", "ce"),
        (halved_at_other_checkpoints, "L2", "ce"),
        (box_before_ball, "L2", "ce"),
        (ball_then_box_in_l1, "L1", "ce"),
        (fixed_sparsity, "L1", "ce"),
    ],
)
def test_a_wrong_program_does_not_agree_with_pyautoattack(curved, mutate, norm, loss, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check_parity(curved, norm, loss)


def test_a_loss_without_the_ratio_does_not_agree_with_pyautoattack(curved):
    with pytest.raises(AssertionError):
        check_parity(curved, "L2", "dlr", ours=margin)


# --- leaving the batch -----------------------------------------------------------------------------


@each_norm
def test_those_that_leave_change_nothing_for_the_others(curved, norm):
    model, x, y = curved
    ball = Ball(norm, SIZES[norm])
    start = ball.candidates(x, ball.random(x, seeded(1)))
    together = apgd(model, x, y, ball, steps=20, start=start)
    left = broken(model, together, y)
    assert 5 < int(left.sum()) < 50
    alone = apgd(model, x[~left], y[~left], ball, steps=20, start=start[~left])
    torch.testing.assert_close(together[~left], alone, atol=1e-5, rtol=0)


def check_leaving(curved, norm: str) -> None:
    """Three groups leave, at some step each: the others end where they end without them.

    In float64, or rounding in batches of another size would grow. The loss is that of no label, so that nobody
    leaves by being fooled, and by then examples differ in their steps, their progress and their best points.
    """
    model, x, _ = curved
    x = x.double().clone()
    x.view(60, -1)[:, :3] = torch.eye(4, dtype=torch.float64)[:, :3].repeat(15, 1)  # who leaves when
    model, y = copy.deepcopy(model).double(), torch.full((60,), 6)
    ball = Ball(norm, {"Linf": 0.3, "L2": 0.45, "L1": 0.48}[norm])
    start = ball.candidates(x, ball.random(x, seeded(1)))
    stay = torch.arange(60) % 4 == 3
    steps, leave = (30, (8, 15, 22)) if norm == "Linf" else (75, (14, 31, 44))

    def run(rows: Tensor) -> Tensor:
        calls = []

        def leaving(images: Tensor) -> Tensor:
            calls.append(len(images))
            sure = torch.full((len(images), 1), 1e3, dtype=torch.float64)
            if len(calls) - 1 in leave:
                sure[images.flatten(1)[:, leave.index(len(calls) - 1)] > 0.5] = -1e3
            return torch.cat([model(images), sure], 1)

        found = apgd(leaving, x[rows], y[rows], ball, steps=steps, start=start[rows], loss=of_no_label)
        assert len(set(calls)) == (4 if len(found) == 60 else 1)
        return found

    torch.testing.assert_close(run(torch.arange(60))[stay], run(stay.nonzero()[:, 0]), atol=1e-6, rtol=0)


def of_no_label(logits: Tensor, y: Tensor) -> Tensor:
    return logits[:, :6].logsumexp(1)


@each_norm
def test_those_that_leave_take_all_of_theirs_along(curved, norm):
    check_leaving(curved, norm)


KEPT = ("row", "clean", "points", "best", "gradient", "best_gradient", "highest", "step")
KEPT_HALVING = (*KEPT, "previous", "losses", "rises", "halved", "highest_before")
KEPT_SPARSE = (*KEPT, "share", "changed")


@pytest.mark.parametrize(
    ("norm", "name"),
    [(norm, name) for norm in NORMS for name in (KEPT_SPARSE if norm == "L1" else KEPT_HALVING)],
)
def test_a_tensor_out_of_step_is_noticed(curved, norm, name, monkeypatch):
    def keep(self, stay: Tensor) -> None:
        for own, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, own, value[: int(stay.sum())] if own == name else value[stay])

    monkeypatch.setattr(MODULE._Course, "keep", keep)
    with pytest.raises(AssertionError):
        check_leaving(curved, norm)


def test_passes_are_spent_on_those_that_resist(curved):
    model, x, y = curved
    sizes: list[int] = []

    def counting(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return model(images)

    found = apgd(counting, x, y, Ball("Linf", SIZES["Linf"]), steps=20, generator=seeded(0))
    resisting = int((~broken(model, found, y)).sum())
    assert len(sizes) == 21  # one gradient a step, and the look at the last point
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (len(x), resisting)


def shifted(model: Linear, by: float) -> Prepared:
    """A search model that takes class 1 to be fooled too early, in front of the real one."""
    search = Linear(model.w.detach(), float(model.b.detach()) - by).eval()
    return Prepared(search, model)


def fooled_within_reach(norm: str) -> bool:
    """Whether everything that can be broken is, when the search model claims too much."""
    x, model = interior(n=300), linear()
    y = model(x).argmax(1)
    ball = Ball(norm, EPS[norm])
    found = apgd(shifted(model, 0.4), x, y, ball, steps=40, generator=seeded(0))
    limit = ball.eps * np.linalg.norm(model.w.detach().double().numpy(), ord=DUAL[norm])
    return bool((margins(model, found, y) < 0)[margins(model, x, y) < 0.99 * limit].all())


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_claim_that_the_model_refuses_stays_in_the_batch(norm, monkeypatch):
    assert fooled_within_reach(norm)
    # The wrong program: whatever the search model claims is believed.
    monkeypatch.setattr(MODULE, "confirmed", lambda model, points, y, claimed: claimed)
    assert not fooled_within_reach(norm)


# --- manners ---------------------------------------------------------------------------------------


@each_norm
@pytest.mark.parametrize("attack", [apgd, apgd_targeted])
def test_candidates_stay_in_ball_and_box_at_the_walls(curved, norm, attack):
    model, _, _ = curved
    x = everywhere(n=80).view(20, 3, 4, 4)
    y = torch.randint(6, (20,), generator=seeded(2))
    ball = Ball(norm, 10 * SIZES[norm])
    found = attack(model, x, y, ball, steps=8, generator=seeded(0))
    assert ball.contains(x, found).all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("attack", [apgd, apgd_targeted])
def test_random_starts_come_from_the_generator_alone(curved, attack):
    model, x, y = curved

    def run(seed: int) -> Tensor:
        return attack(model, x, y, Ball("L2", 0.2), steps=3, generator=seeded(seed))

    state = torch.random.get_rng_state()
    first = run(1)
    assert torch.equal(run(1), first)
    assert not torch.equal(run(2), first)
    assert torch.equal(state, torch.random.get_rng_state())


def test_restarts_break_more_and_are_spent_on_survivors_alone():
    """Two loss maxima, the lower one nearer: one run falls into either, restarts find the higher."""

    def model(x: Tensor) -> Tensor:
        z = x.flatten(1)[:, :1]
        score = 4 * (z - 0.5) ** 2 * (1 + 2 * (z - 0.5)) - 0.18
        return torch.cat([-score, score], 1)

    x, y = torch.full((200, 1), 0.5), torch.zeros(200, dtype=torch.int64)

    def count(restarts: int) -> int:
        found = apgd(model, x, y, Ball("Linf", 0.2), steps=1, restarts=restarts, generator=seeded(0))
        return int(broken(model, found, y).sum())

    assert 60 <= count(1) <= 140
    assert count(12) == 200


@pytest.mark.parametrize("calls", [0, 2, 6])
@pytest.mark.parametrize("attack", [apgd, apgd_targeted])
def test_nan_logits_are_refused_whenever_they_come(curved, attack, calls):
    model, x, y = curved
    seen = []

    def failing(images: Tensor) -> Tensor:
        seen.append(len(images))
        return model(images) * (torch.nan if len(seen) > calls else 1.0)

    with pytest.raises(RobustkitError, match="NaN"):
        attack(failing, x, y, Ball("Linf", 0.01), steps=6, generator=seeded(0))


@pytest.mark.parametrize(
    ("attack", "settings", "words"),
    [
        (apgd, {"steps": 0}, "at least 1; got 0 and 1"),
        (apgd, {"restarts": 0}, "at least 1; got 100 and 0"),
        (apgd, {"start": torch.zeros(200, 3, 2, 2)}, "start must lie within Linf eps=0.15"),
        (apgd, {"start": interior(), "restarts": 2}, "are the same run"),
        (apgd, {"loss": dlr}, "dlr needs at least 3 classes; the model has 2. Use margin"),
        (apgd_targeted, {}, "dlr_targeted needs at least 4 classes"),
        (apgd_targeted, {"targets": 0}, "targets must be at least 1; got 0"),
        (apgd_targeted, {"steps": 0}, "at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(attack, settings, words):
    x, model = interior(), linear()
    y = model(x).argmax(1)
    with pytest.raises(RobustkitError, match=words):
        attack(model, x, y, Ball("Linf", 0.15), **settings)


def test_targeted_apgd_tries_every_class_of_a_model_with_few_and_never_the_true_one():
    x, model = interior(n=30), linear()
    y = 1 - model(x).argmax(1)  # all misclassified: the likeliest class is not the true one
    aims: list[Tensor] = []

    def noting(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        aims.append((labels != target).all())
        return towards(margin)(logits, labels, target)

    still = Prepared(lambda images: -model(images), model)  # nothing the search claims is confirmed at first
    apgd_targeted(still, x, y, Ball("Linf", 1e-6), steps=2, loss=noting, generator=seeded(0))
    assert aims
    assert all(aims)


@each_norm
@pytest.mark.parametrize("attack", [apgd, apgd_targeted])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_candidates_have_the_dtype_of_the_images(curved, norm, attack, dtype):
    model, x, y = curved
    other = Prepared(lambda images: model(images.float()).to(dtype), lambda images: model(images.float()))
    found = attack(other, x.to(dtype), y, Ball(norm, SIZES[norm]), steps=4, generator=seeded(0))
    assert found.dtype == dtype
    assert found.shape == x.shape
