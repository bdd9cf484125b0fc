"""Targeted FAB: projections against solvers, distances against closed forms and against pyautoattack's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from robustkit.attacks import fab_targeted
from robustkit.device import Prepared, seeded
from robustkit.errors import RobustkitError
from robustkit.threat import NORMS, Ball
from tests.oracle import DUAL, ORDER, Linear, everywhere, interior, linear, margins
from tests.test_apgd import broken
from tests.test_evaluate_mutants import Mutant, built, source

FAB = import_module("robustkit.attacks.fab")

each_norm = pytest.mark.parametrize("norm", NORMS)


@pytest.fixture(scope="module")
def curved() -> tuple[nn.Module, Tensor, Tensor]:
    """A smooth network on images of which a quarter of the pixels is at a wall."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 6)).eval()
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    x = (1.6 * torch.rand(40, 3, 4, 4, generator=seeded(0)) - 0.3).clamp(0, 1)
    return model, x, model(x).argmax(1)


# --- the projection --------------------------------------------------------------------------------


def smallest(x: np.ndarray, gap: float, normal: np.ndarray, norm: str) -> float | None:
    """The size of the smallest step by a general solver; None where the box does not reach the plane."""
    d = len(x)
    if norm == "L2":
        found = minimize(
            lambda s: s @ s,
            np.zeros(d),
            jac=lambda s: 2 * s,
            bounds=list(zip(-x, 1 - x, strict=True)),
            constraints={"type": "eq", "fun": lambda s: gap + normal @ s, "jac": lambda s: normal},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        return float(np.linalg.norm(found.x)) if found.success else None
    if norm == "Linf":  # the last variable bounds all the others
        one, bound = np.eye(d), -np.ones((d, 1))
        found = linprog(
            np.append(np.zeros(d), 1),
            A_ub=np.block([[one, bound], [-one, bound]]),
            b_ub=np.zeros(2 * d),
            A_eq=[np.append(normal, 0)],
            b_eq=[-gap],
            bounds=[*zip(-x, 1 - x, strict=True), (0, None)],
        )
    else:  # up and down apart, so that their sum is the size
        found = linprog(
            np.ones(2 * d),
            A_eq=[np.append(normal, -normal)],
            b_eq=[-gap],
            bounds=[(0, room) for room in np.append(1 - x, x)],
        )
    return float(found.fun) if found.success else None


def check_projection(fab: ModuleType, norm: str) -> None:
    generator = seeded("planes")
    x = everywhere(n=30).flatten(1).double()
    normal = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    normal[:, 3] = 0
    gap = 2 * torch.randn(30, generator=generator, dtype=torch.float64)
    step = fab.onto_hyperplane(x, gap, normal, norm)
    assert (x + step).min() >= -1e-12
    assert (x + step).max() <= 1 + 1e-12
    left = (gap + (normal * step).sum(1)).abs()
    reached = 0
    for i in range(30):
        size = smallest(x[i].numpy(), float(gap[i]), normal[i].numpy(), norm)
        if size is None:  # every pixel goes as far as it can
            best = torch.where(-gap[i] * normal[i] > 0, 1 - x[i], -x[i])
            assert float(left[i]) == pytest.approx(float((gap[i] + normal[i] @ best).abs()))
        else:
            reached += 1
            assert left[i] < 1e-5
            assert np.linalg.norm(step[i].numpy(), ORDER[norm]) == pytest.approx(size, abs=1e-5)
    assert 20 < reached < 30
    assert not fab.onto_hyperplane(x, gap, 0 * normal, norm).any()  # no gradient, no step
    twice = fab.onto_hyperplane(torch.stack([x, x]), torch.stack([gap, -gap]), normal, norm)
    torch.testing.assert_close(twice[0], step)


@each_norm
def test_a_projection_is_the_smallest_step_in_the_box(norm):
    check_projection(FAB, norm)


# --- distances -------------------------------------------------------------------------------------


def distances(fab: ModuleType, model: nn.Module, x: Tensor, y: Tensor, target: Tensor, norm: str) -> Tensor:
    """Of the nearest points that fool the model, from a walk that never ends early."""
    _, minus, inside = fab._run(model, x, torch.stack([y, target], 1), Ball(norm, 0.0), 100)
    assert not inside.any()
    return -minus


def check_closed_form(fab: ModuleType, norm: str) -> None:
    """On a linear model, away from the walls, the nearest point is |z| / ||w|| away."""
    model, x = linear().requires_grad_(False), interior(n=60)
    y = model(x).argmax(1)
    found = distances(fab, model, x, y, 1 - y, norm).numpy()
    exact = margins(model, x, y) / np.linalg.norm(model.w.double().numpy(), ord=DUAL[norm])
    near = exact < {"Linf": 0.3, "L2": 0.3, "L1": 0.3}[norm]  # within the room that all pixels have
    assert near.sum() > 30
    assert (found >= exact * (1 - 1e-4))[near].all()
    assert (found <= exact * 1.01 + 1e-6)[near].all()


@each_norm
def test_distances_on_a_linear_model_are_the_exact_ones(norm):
    check_closed_form(FAB, norm)


def check_parity(fab: ModuleType, curved, norm: str) -> None:
    """pyautoattack's distances, towards the likeliest wrong class.

    Rounding decides which side of the boundary a step ends on, and so when it goes back: distances may differ
    by a little, and whether a class is found at all on a point where it nearly is not.
    """
    from pyautoattack.fab_pt import FABAttack_PT

    model, x, y = curved
    peer = FABAttack_PT(model, norm=norm, n_iter=100, eps=1.0, targeted=True, device="cpu")
    peer.target_class = 2
    with torch.no_grad():
        target = model(x).argsort(1)[:, -2]
        theirs = Ball(norm, 1.0).size(peer.attack_single_run(x, y, is_targeted=True) - x)
    ours = distances(fab, model, x, y, target, norm)
    assert ((ours / theirs - 1).abs() < 1e-3).float().mean() > 0.85
    assert ((ours / theirs - 1).abs() < 0.02).all()


@each_norm
def test_distances_are_pyautoattacks(curved, norm):
    check_parity(FAB, curved, norm)


# --- inside the ball -------------------------------------------------------------------------------

SIZES = {"Linf": 0.04, "L2": 0.25, "L1": 1.2}


def check_inside(fab: ModuleType, curved, norm: str) -> None:
    """Exactly those are broken whose nearest point is in the ball, in whichever company they are attacked."""
    model, x, y = curved
    ball = Ball(norm, SIZES[norm])
    with torch.no_grad():
        wrong = model(x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :5]
    nearest = torch.stack([distances(fab, model, x, y, target, norm) for target in wrong.unbind(1)])
    sizes: list[int] = []

    def counting(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return model(images)

    found = fab.fab_targeted(counting, x, y, ball)
    assert ball.contains(x, found).all()
    assert found.min() >= 0
    assert found.max() <= 1
    fooled = broken(model, found, y)
    certain = (nearest.amin(0) - ball.eps).abs() > 1e-3 * ball.eps
    assert torch.equal(fooled[certain], (nearest.amin(0) <= ball.eps)[certain])
    assert 8 < int(fooled.sum()) < 32
    assert sizes[0] == len(x)
    assert sizes[-1] == len(x) - int(fooled.sum())  # the others have left
    # Those that resist are taken to the surface towards the nearest point that fooled.
    resisting = ~fooled & nearest.amin(0).isfinite()
    assert (ball.size(found - x)[resisting] > 0.9 * ball.eps).all()


@each_norm
def test_what_is_near_enough_is_broken_and_leaves(curved, norm):
    check_inside(FAB, curved, norm)


def check_company(fab: ModuleType, curved, norm: str) -> None:
    """Those that leave change nothing for the others."""
    model, x, y = curved
    together = fab.fab_targeted(model, x, y, Ball(norm, SIZES[norm]))
    left = broken(model, together, y)
    alone = fab.fab_targeted(model, x[~left], y[~left], Ball(norm, SIZES[norm]))
    assert ((together[~left] - alone).flatten(1).abs().amax(1) < 1e-3).float().mean() > 0.8


@each_norm
def test_those_that_leave_take_all_of_theirs_along(curved, norm):
    check_company(FAB, curved, norm)


def check_claims(fab: ModuleType, norm: str) -> None:
    """A search model that sees the boundary too early, in front of the real one: its claims are not believed."""
    x, model = interior(n=100), linear().requires_grad_(False)
    y = model(x).argmax(1)
    early = Linear(model.w.detach(), float(model.b.detach()) - 0.4).eval().requires_grad_(False)
    ball = Ball(norm, {"Linf": 0.08, "L2": 0.25, "L1": 0.4}[norm])
    seen = margins(early, x, y) > 0  # the others are fooled, for the search model, where they are
    found, _, said = fab._run(Prepared(early, model), x[seen], torch.stack([y, 1 - y], 1)[seen], ball, 30)
    assert said.any()
    assert not said.all()
    assert broken(model, found, y[seen])[said].all()


@each_norm
def test_a_claim_counts_once_the_model_itself_confirms_it(norm):
    check_claims(FAB, norm)


def test_misclassified_images_are_left_as_they_are(curved):
    model, x, y = curved
    found = fab_targeted(model, x, (y + 1) % 6, Ball("Linf", 0.1), steps=3)
    assert torch.equal(found, x)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"targets": 0}])
def test_settings_that_mean_nothing_are_refused(curved, settings):
    with pytest.raises(RobustkitError, match="must be at least 1"):
        fab_targeted(*curved, Ball("L2", 0.1), **settings)


# --- wrong programs, which the checks above must refuse --------------------------------------------


def mutant(mistake: str, old: str, new: str, check: Callable[..., None], norm: str) -> Mutant:
    return Mutant(f"{mistake}, {norm}", FAB, old, new, partial(check, norm=norm))


MUTANTS = [
    mutant("the box is forgotten", "_common(room, w", "_common(room + 9, w", check_projection, "Linf"),
    mutant("the box is forgotten", "_common(room / weight,", "_common(9 / weight,", check_projection, "L2"),
    mutant("the box is forgotten", ".minimum(room)", "", check_projection, "L1"),
    mutant("the nearer wall", "room = (wall - x)", "room = (1 - wall - x)", check_projection, "L2"),
    mutant("not in proportion", "size = weight * _common(", "size = _common(", check_projection, "L2"),
    mutant("the smallest slope first", "descending=True", "descending=False", check_projection, "L1"),
    mutant("one step of Newton's", "range(limit.shape[-1] + 1)", "range(1)", check_projection, "Linf"),
    mutant("away from the plane", "towards, need = -gap", "towards, need = gap", check_projection, "Linf"),
    mutant("one gap for both", "gap + ((clean - points)", "gap + 0 * ((clean - points)", check_parity, "L2"),
    mutant("no overshoot", "(bases + ETA * steps)", "(bases + steps)", check_parity, "Linf"),
    mutant("no step back", "(fooled, BETA, 1.0)", "(fooled, 1.0, 1.0)", check_parity, "L2"),
    mutant("no pull of the image", ".clamp_max(ALPHA_MAX)", ".clamp_max(0)", check_parity, "L2"),
    mutant(
        "the pulls are swapped", "(from_point / (from_point", "(from_clean / (from_point", check_parity, "L2"
    ),
    mutant("the last one is kept", "(fooled & (size < distance[row]))", "fooled", check_parity, "L2"),
    mutant("nobody leaves", "if inside.any():", "if False:", check_inside, "Linf"),
    mutant("whoever fools leaves", "fooled & (size <= ball.eps))", "fooled)", check_inside, "L2"),
    mutant("the quick half is believed", "confirmed(model, points, y, ", "(", check_claims, "Linf"),
    mutant(
        "labels out of step",
        "points, labels, fooled)",
        "points, labels.flip(0), fooled)",
        check_company,
        "L2",
    ),
    mutant("images out of step", "(row, clean, points", "(row, clean.flip(0), points", check_company, "Linf"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mistake)
def test_the_mistake_is_noticed(mutant, monkeypatch, curved):
    text = source(FAB)
    assert text.count(mutant.old) == 1, "the mutant has lost its place in the source"
    wrong = built(FAB.__name__, text.replace(mutant.old, mutant.new), monkeypatch)
    given = {"curved": curved} if "curved" in mutant.noticed_by.func.__code__.co_varnames else {}
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        mutant.noticed_by(wrong, **given)
