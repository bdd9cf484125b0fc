"""Attacks of other libraries: what those libraries compute, and ours where they should agree, under our rules."""

from __future__ import annotations

import builtins
import logging
import pickle
import random
import sys
from functools import partial
from typing import Any

import eagerpy
import foolbox
import numpy as np
import pytest
import torch
from art.utils import random_sphere
from pyautoattack import AutoAttack
from torch import nn

from robustkit.attacks import (
    Attack,
    fgsm,
    noise,
    patch_pgd,
    pgd,
    spatial_grid,
    spatial_random,
    square,
    transfer,
)
from robustkit.attacks import library as peers
from robustkit.attacks.library import AUTOATTACK_PARTS, LIBRARY
from robustkit.device import Prepared, seeded
from robustkit.errors import RobustkitError
from robustkit.evaluate import find_attacks
from robustkit.threat import Ball, Patch, RotationTranslation


def trained(classes: int = 10, n: int = 12) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small convolutional net that fits its 120 points, and `n` of them: some robust, some not."""
    x = torch.rand(120, 1, 8, 8, generator=seeded("points"))
    centres = torch.rand(classes, 1, 8, 8, generator=seeded("centres"))
    y = torch.arange(120) % classes
    x = (0.4 * centres[y] + 0.6 * x).clamp(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, classes)
        )
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    optimiser.zero_grad()
    return model.eval(), x[:n], y[:n]


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    return trained()


def right(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x).argmax(1) == y


def drawn_seed(*key: int) -> int:
    """The seed that an adapter draws from `seeded(*key)`."""
    return int(torch.randint(2**31, (), generator=seeded(*key)))


SIZES = {"Linf": 0.06, "L2": 0.35}  # about half of the small model's points break


# --- AutoAttack ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "norm"), [*((part, "Linf") for part in AUTOATTACK_PARTS), ("apgd-ce", "L2"), ("fab-t", "L2")]
)
def test_a_part_of_autoattack_is_that_part_of_the_standard_protocol(small, part, norm):
    model, x, y = small
    with torch.random.fork_rng(devices=[]):
        whole = AutoAttack(model, norm=norm, eps=SIZES[norm], seed=drawn_seed(7), version="standard")
        whole.attacks_to_run = [part]
        theirs, _ = whole.run_standard_evaluation(x, y)
    ours = LIBRARY[f"autoattack-{part}"](model, x, y, Ball(norm, SIZES[norm]), generator=seeded(7))
    broken = ~right(model, theirs, y)
    assert 0 < int(broken.sum()) < len(x)
    assert torch.equal(~right(model, ours, y), broken)
    torch.testing.assert_close(ours[broken], theirs[broken], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.08)])
def test_the_four_parts_in_turn_are_the_whole_protocol(small, norm, eps):
    """As `evaluate` runs them: each on the survivors of those before."""
    model, x, y = small
    ball = Ball(norm, eps)
    with torch.random.fork_rng(devices=[]):
        theirs, _ = AutoAttack(model, norm=norm, eps=eps, seed=drawn_seed(1)).run_standard_evaluation(x, y)
    parts, broken = x.clone(), {}
    for part in AUTOATTACK_PARTS:
        left = right(model, parts, y)
        parts[left] = LIBRARY[f"autoattack-{part}"](model, x[left], y[left], ball, generator=seeded(1))
        broken[part] = int((left & ~right(model, parts, y)).sum())
    survivors = right(model, theirs, y)
    assert 0 < int(survivors.sum()) < len(x)
    assert broken["apgd-ce"] > 0
    torch.testing.assert_close(parts[~survivors], theirs[~survivors], atol=1e-6, rtol=0)
    assert torch.equal(right(model, parts, y), survivors)


def test_the_whole_protocol_is_pyautoattacks_own(small):
    model, x, y = small
    ball = Ball("Linf", 0.12)  # everything breaks, so that this is quick
    with torch.random.fork_rng(devices=[]):
        theirs, _ = AutoAttack(model, eps=ball.eps, seed=drawn_seed(1)).run_standard_evaluation(x, y)
    assert torch.equal(LIBRARY["autoattack"](model, x, y, ball, generator=seeded(1)), theirs)
    assert not right(model, theirs, y).any()


def test_autoattack_takes_models_of_few_classes_as_far_as_its_losses_go():
    """pyautoattack alone stops with an IndexError below ten classes."""
    for classes in (2, 3, 5):
        model, x, y = trained(classes, 4)
        for part in AUTOATTACK_PARTS[:3]:
            attack = LIBRARY[f"autoattack-{part}"]
            if part == "apgd-t" and classes < 4:
                with pytest.raises(RobustkitError, match=f"the model has {classes}. Use autoattack-apgd-ce"):
                    attack(model, x, y, Ball("Linf", 0.2))
            else:
                assert not right(model, attack(model, x, y, Ball("Linf", 0.4), generator=seeded(0)), y).any()
    with pytest.raises(
        RobustkitError, match="'fab' is unknown; choose one of apgd-ce, apgd-t, fab-t, square"
    ):
        peers.autoattack_part(model, x, y, Ball("Linf", 0.2), part="fab")
    with pytest.raises(RobustkitError, match="square changes squares of images"):
        LIBRARY["autoattack-square"](nn.Flatten(), x.flatten(1), y, Ball("Linf", 0.2))


# --- our FGSM and PGD on the same points and from the same starts -----------------------------------

EPS, STEPS, STEP = 0.1, 7, 0.03


def ours_from(curved, norm: str, start: torch.Tensor) -> torch.Tensor:
    model, x, y = curved
    found = pgd(model, x, y, Ball(norm, EPS), steps=STEPS, step_size=STEP, start=start)
    one_step = pgd(model, x, y, Ball(norm, EPS), steps=1, step_size=STEP, start=start)
    assert not torch.allclose(found, one_step, atol=1e-3)
    return found


# No other peer takes the steepest L1 step: ART and Foolbox scale the gradient to L1 length one.
@pytest.mark.parametrize(
    ("peer", "norm"),
    [
        *((f"{name}-fgsm", norm) for name in ("cleverhans", "art", "foolbox") for norm in ("Linf", "L2")),
        ("cleverhans-fgsm", "L1"),
    ],
)
def test_fgsm_agrees_with_its_peers(curved, peer, norm):
    model, x, y = curved
    ours = fgsm(model, x, y, Ball(norm, EPS))
    assert ((ours - x).flatten(1).abs().amax(1) > 0).all()
    # ART divides by the gradient's norm plus 1e-7.
    torch.testing.assert_close(ours, LIBRARY[peer](model, x, y, Ball(norm, EPS)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("peer", [peers.cleverhans_pgd, peers.art_pgd, peers.foolbox_pgd])
def test_pgd_from_the_image_agrees_with_its_peers(curved, norm, peer):
    model, x, y = curved
    theirs = peer(model, x, y, Ball(norm, EPS), steps=STEPS, step_size=STEP, random_start=False)
    torch.testing.assert_close(ours_from(curved, norm, x), theirs, atol=1e-5, rtol=0)


def cleverhans_start(x: torch.Tensor, norm: str, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return Ball(norm, EPS).candidates(x, torch.zeros_like(x).uniform_(-EPS, EPS))


def art_start(x: torch.Tensor, norm: str, seed: int) -> torch.Tensor:
    np.random.seed(seed)  # noqa: NPY002  what ART draws from
    drawn = random_sphere(len(x), x[0].numel(), EPS, {"Linf": np.inf, "L2": 2}[norm])
    return x + torch.from_numpy(drawn.astype(np.float32)).view_as(x)


def foolbox_start(x: torch.Tensor, norm: str, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    kind = {"Linf": foolbox.attacks.LinfPGD, "L2": foolbox.attacks.L2PGD}[norm]
    return kind().get_random_start(eagerpy.astensor(x), EPS).raw


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(
    ("peer", "its_start"),
    [
        (peers.cleverhans_pgd, cleverhans_start),
        (peers.art_pgd, art_start),
        (peers.foolbox_pgd, foolbox_start),
    ],
)
def test_pgd_agrees_with_its_peers_from_their_own_random_starts(curved, norm, peer, its_start):
    """Which also shows that a peer's start follows from the generator."""
    model, x, y = curved
    numpys = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        start = its_start(x, norm, drawn_seed(4))
    np.random.set_state(numpys)  # noqa: NPY002
    assert not torch.allclose(start, x, atol=0.01)
    theirs = peer(model, x, y, Ball(norm, EPS), steps=STEPS, step_size=STEP, generator=seeded(4))
    torch.testing.assert_close(ours_from(curved, norm, start), theirs, atol=1e-5, rtol=0)
    assert not torch.allclose(ours_from(curved, norm, x), theirs, atol=1e-3)


# --- what no peer is compared with: it does its work ------------------------------------------------

# Settings with which an attack takes a moment, and still breaks something.
QUICK: dict[str, dict[str, Any]] = {
    "cleverhans-pgd": {"steps": 10},
    "cleverhans-cw-l2": {"steps": 40, "searches": 3, "step_size": 0.04},
    "cleverhans-spsa": {"steps": 10},
    "cleverhans-hop-skip-jump": {"steps": 6},
    "art-pgd": {"steps": 10},
    "art-square": {"queries": 60},
    "art-hop-skip-jump": {"steps": 4},
    "foolbox-pgd": {"steps": 10},
    "foolbox-ddn": {"steps": 40},
    "foolbox-boundary": {"steps": 400},
}
L2_ALONE = {"cleverhans-cw-l2", "cleverhans-hop-skip-jump", "foolbox-ddn", "foolbox-boundary"}
BLIND = {
    "cleverhans-spsa",
    "art-square",
    "foolbox-boundary",
    *(f"{n}-hop-skip-jump" for n in ("cleverhans", "art")),
}
SLOW = {"autoattack", "autoattack-apgd-t", "autoattack-fab-t", "autoattack-square"}
PEERS = {
    name: (partial(attack, **QUICK.get(name, {})), Ball("L2" if name in L2_ALONE else "Linf", 0.1))
    for name, attack in LIBRARY.items()
    if name not in SLOW
}
SURROGATE = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)
OURS: dict[str, tuple[Attack, Any]] = {
    "square": (partial(square, queries=40), Ball("Linf", 0.1)),
    "square, L2": (partial(square, queries=40), Ball("L2", 0.5)),
    "square, L1": (partial(square, queries=40), Ball("L1", 2.0)),
    "noise": (partial(noise, draws=10), Ball("L2", 0.5)),
    "transfer": (transfer(SURROGATE, pgd), Ball("Linf", 0.1)),
    "spatial-random": (spatial_random, RotationTranslation(30, 2)),
    "spatial-grid": (spatial_grid, RotationTranslation(30, 2)),
    "patch": (partial(patch_pgd, steps=3), Patch(3)),
}
EVERY = PEERS | OURS
each_attack = pytest.mark.parametrize(("attack", "ball"), EVERY.values(), ids=EVERY)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_breaks_what_is_near_the_boundary(small, name):
    model, x, y = small
    attack, ball = PEERS[name]
    large = Ball(ball.norm, {"Linf": 0.15, "L2": 2.0}[ball.norm])
    found = attack(model, x, y, large, generator=seeded(0))
    # The attacks by labels or scores alone are cut short here, long before they are done.
    assert int((~right(model, found, y)).sum()) >= (3 if name in BLIND else 10)
    # ... and does not do it by luck: at a tenth of the size most points stand.
    little = Ball(ball.norm, {"Linf": 0.01, "L2": 0.05}[ball.norm])
    assert int(right(model, attack(model, x, y, little, generator=seeded(0)), y).sum()) >= 10


@pytest.mark.parametrize("name", sorted(L2_ALONE))
def test_a_minimum_norm_point_is_on_the_way_to_the_boundary(small, name):
    """In a large ball it is the peer's own point; in a small one, the projection of that point."""
    model, x, y = small
    attack, _ = PEERS[name]
    whole = attack(model, x, y, Ball("L2", 50.0), generator=seeded(2))
    distance = (whole - x).flatten(1).norm(dim=1)
    assert (~right(model, whole, y)).all()
    assert 0.05 < distance.median() < 2  # noise is 3 away
    part = attack(model, x, y, Ball("L2", 0.02), generator=seeded(2))
    torch.testing.assert_close(part, Ball("L2", 0.02).candidates(x, whole - x))


# --- manners, of theirs and of ours ----------------------------------------------------------------


@each_attack
def test_candidates_stay_where_they_may(small, attack, ball):
    model, x, y = small
    x = (1.6 * x - 0.3).clamp(0, 1)  # up to the walls
    for dtype in (torch.float32, torch.float64):
        points = x.to(dtype)
        aimed = SURROGATE if isinstance(attack, partial) and SURROGATE in attack.args else model
        aimed.to(dtype)
        try:
            found = attack(model.to(dtype), points, y, ball, generator=seeded(0))
        finally:
            model.float()
            aimed.float()
        assert found.shape == x.shape
        assert found.dtype == dtype
        assert not found.requires_grad
        assert found.data_ptr() != points.data_ptr()
        assert ball.contains(points, found).all()
        assert found.min() >= 0
        assert found.max() <= 1


class Dropped(nn.Module):
    """The model behind dropout, in mixed modes and with one frozen layer: all of it must stay so."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.early, self.model, self.late = nn.Dropout(0.3), model, nn.Dropout(0.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.late(self.model(self.early(x)))


@each_attack
def test_an_attack_leaves_everything_as_it_was(small, capfd, attack, ball):
    bare, x, y = small
    model = Dropped(pickle.loads(pickle.dumps(bare))).train()
    model.late.eval()
    model.model[0].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    kept, labels = x.clone(), y.clone()
    states = torch.random.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    levels = [logging.getLogger(name).level for name in ("auto-attack", "art")]
    trace = sys.gettrace()
    found = attack(model, x, y, ball, generator=seeded(0))
    assert torch.equal(attack(bare, x, y, ball, generator=seeded(0)), found)  # aimed at eval mode
    assert torch.equal(x, kept)
    assert torch.equal(y, labels)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert all(np.array_equal(a, b) for a, b in zip(states[1], np.random.get_state(), strict=True))  # noqa: NPY002
    assert states[2] == random.getstate()
    assert levels == [logging.getLogger(name).level for name in ("auto-attack", "art")]
    assert sys.gettrace() is trace
    assert capfd.readouterr() == ("", "")


@each_attack
def test_randomness_comes_from_the_generator_alone(small, attack, ball):
    model, x, y = small

    def run(seed: int) -> torch.Tensor:
        return attack(model, x, y, ball, generator=seeded(seed))

    first = run(1)
    states = torch.random.get_rng_state(), np.random.get_state()  # noqa: NPY002
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    with torch.no_grad():
        again = run(1)
    torch.random.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    assert torch.equal(again, first)
    steady = {"fgsm", "cw-l2", "ddn", "spatial-grid"}
    name = next(name for name, of in EVERY.items() if of[0] is attack)
    assert torch.equal(run(2), first) == any(name.endswith(end) for end in steady)


@each_attack
def test_any_callable_can_be_attacked(small, attack, ball):
    model, x, y = small
    found = attack(model, x[:3], y[:3], ball, generator=seeded(0))
    assert torch.equal(attack(lambda x: model(x), x[:3], y[:3], ball, generator=seeded(0)), found)


@each_attack
def test_bad_batches_are_refused_in_a_sentence(small, attack, ball):
    model, x, y = small
    bad = [(x - 2, y), (x * torch.nan, y), (x[:0], y[:0]), (x, y[:-1]), (x, y + 20), (x, y - 20)]
    for images, labels in bad[: 4 if SURROGATE in getattr(attack, "args", ()) else 6]:
        with pytest.raises(RobustkitError):
            attack(model, images, labels, ball, generator=seeded(0))
    other = Ball("Linf", 0.1) if isinstance(ball, RotationTranslation) else RotationTranslation(30, 2)
    with pytest.raises(
        RobustkitError, match=r"no Lp ball|no rotation-translation form|needs a Rotation|needs a Patch"
    ):
        attack(model, x, y, other, generator=seeded(0))


@pytest.mark.parametrize("name", ["cleverhans-pgd", "art-pgd", "foolbox-pgd", "autoattack-apgd-ce"])
def test_what_fools_only_the_quick_half_of_a_prepared_model_goes_back(small, name):
    """The quick half calls everything wrong: without a second look nothing would be attacked at all."""
    model, x, y = small
    attack, _ = PEERS[name]
    ball = Ball("Linf", 0.15)

    def quick(points: torch.Tensor) -> torch.Tensor:
        return -model(points)

    found = attack(Prepared(quick, model), x, y, ball, generator=seeded(0))
    honest = attack(model, x, y, ball, generator=seeded(0))
    assert torch.equal(right(model, found, y), right(model, honest, y))
    assert int(right(model, found, y).sum()) <= 2


# --- refusals, and names ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LIBRARY if name in L2_ALONE])
def test_a_norm_that_a_peer_lacks_is_refused(small, name):
    model, x, y = small
    with pytest.raises(RobustkitError, match=f"{name} has no Linf form; give it a Ball with L2"):
        LIBRARY[name](model, x, y, Ball("Linf", 0.1))


@pytest.mark.parametrize("name", ["cleverhans-fgsm", "art-fgsm", "foolbox-fgsm", "autoattack-apgd-ce"])
def test_a_missing_library_is_one_sentence_with_the_remedy(small, monkeypatch, name):
    model, x, y = small
    package = {"autoattack": "pyautoattack"}.get(name.split("-")[0], name.split("-")[0])
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    real = builtins.__import__
    finder = type("Absent", (), {"find_spec": staticmethod(lambda wanted, *_: absent(wanted))})

    def absent(wanted: str) -> None:
        if wanted.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {wanted!r}")

    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    with pytest.raises(
        RobustkitError, match=rf"^{package} is not installed .*pip install 'robustkit\[peers\]'"
    ):
        LIBRARY[name](model, x, y, Ball("Linf", 0.1))
    assert builtins.__import__ is real


def test_steps_that_a_peer_would_stumble_over_are_refused(small):
    model, x, y = small
    with pytest.raises(RobustkitError, match=r"no step longer than eps; got 0.2 for Linf eps=0.1"):
        peers.cleverhans_pgd(model, x, y, Ball("Linf", 0.1), step_size=0.2)
    for attack in (peers.cleverhans_pgd, peers.art_pgd, peers.foolbox_pgd):
        with pytest.raises(RobustkitError, match="at least 1; got 0"):
            attack(model, x, y, Ball("Linf", 0.1), steps=0)


def test_points_without_another_class_in_reach_are_left_alone(small):
    """A model of one class: no start exists, which CleverHans and Foolbox alone answer with errors."""
    _, x, _ = small

    def constant(points: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1.0, 0.0]).repeat(len(points), 1) + 0 * points.flatten(1)[:, :2]

    for name in ("cleverhans-hop-skip-jump", "foolbox-boundary", "art-hop-skip-jump"):
        attack, _ = PEERS[name]
        found = attack(constant, x[:2], torch.zeros(2, dtype=torch.int64), Ball("L2", 0.5))
        assert torch.equal(found, x[:2])


def test_peers_can_be_named_and_sent_to_workers():
    assert list(find_attacks("cleverhans-pgd, autoattack-square")) == ["cleverhans-pgd", "autoattack-square"]
    for name, attack in LIBRARY.items():
        again = pickle.loads(pickle.dumps(attack))
        assert getattr(again, "keywords", None) == getattr(attack, "keywords", None), name
