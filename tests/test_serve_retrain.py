"""Retraining against a mixed threat model, and the gate: who meets which attack, and what is let through."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from robustkit import data, models
from robustkit.attacks import patch_pgd
from robustkit.device import seeded
from robustkit.errors import RobustkitError
from robustkit.evaluate import evaluate
from robustkit.results import Interval
from robustkit.serve import retrain
from robustkit.serve.retrain import FAMILIES, Bar, Floors, Gate, gate, mixed, worst_case
from robustkit.threat import Ball, Patch, RotationTranslation
from robustkit.train import Schedule

MNIST = FAMILIES["mnist"]
NOTHING = Floors(0.0, 0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def champion():
    return models.pretrained("mnist-pgd")


@pytest.fixture(scope="module")
def images():
    return data.load("mnist", "test", limit=60, seed=5)


# --- patches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "side", "inside"),
    [((3, 3, 7, 7), 4, True), ((3, 3, 8, 7), 4, False), ((0, 0, 1, 1), 1, True), ((0, 0, 28, 28), 28, True)],
)
def test_a_patch_holds_what_fits_its_square(box, side, inside):
    top, left, bottom, right = box
    x = torch.full((2, 3, 28, 28), 0.5)
    candidate = x.clone()
    candidate[1, 2, top:bottom, left:right] = 1.0
    assert Patch(side).contains(x, candidate).tolist() == [True, inside]


def test_two_far_pixels_are_no_patch():
    x = torch.zeros(1, 1, 28, 28)
    candidate = x.clone()
    candidate[0, 0, 0, 0] = candidate[0, 0, 27, 27] = 1.0
    assert not Patch(8).contains(x, candidate)


@pytest.mark.parametrize("refused", [Ball("Linf", 0.1), RotationTranslation(30, 3), Patch(29)])
def test_a_patch_attack_refuses_what_is_no_patch_on_these_images(champion, images, refused):
    with pytest.raises(RobustkitError):
        patch_pgd(champion, images.x, images.y, refused, generator=seeded(0))
    with pytest.raises(RobustkitError, match="no Lp ball"):
        Patch(3).project(images.x)


def test_more_places_break_more_and_stay_in_one_square(champion, images):
    once = patch_pgd(champion, images.x, images.y, Patch(8), steps=10, generator=seeded(0))
    often = patch_pgd(champion, images.x, images.y, Patch(8), steps=10, restarts=6, generator=seeded(0))
    assert Patch(8).contains(images.x, once).all()
    assert Patch(8).contains(images.x, often).all()
    with torch.no_grad():
        fooled = [(champion(found).argmax(1) != images.y).sum() for found in (images.x, once, often)]
    assert fooled[0] < fooled[1] < fooled[2]


# --- the mixed threat model --------------------------------------------------------------------------


def test_every_image_of_a_batch_meets_one_family_or_none(champion, images):
    """The share of each family comes out of its attack; nobody is left out and nobody counts twice."""
    met = []

    def attack(name):
        def recorded(model, x, y, threat, *, generator=None):
            met.append((name, threat, len(x)))
            return x / 2

        return recorded

    families = [
        dataclasses.replace(MNIST[name], training=attack(name)) for name in ("Linf", "rotation-translation")
    ]
    x, y = images.batch(torch.arange(32))
    found = mixed(families)(champion, x, y, Ball("Linf", 0.1), seeded(0))
    assert met == [
        (family.name, family.threat, count) for family, count in zip(families, (11, 10), strict=True)
    ]
    expected = torch.cat([x[:11], x[11:] / 2])
    assert found == F.cross_entropy(champion(expected), y)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_training_attacks_stay_in_the_threat_they_name(name):
    side, channels = (28, 1) if name == "mnist" else (32, 3)
    x = torch.rand(6, channels, side, side, generator=seeded(1))
    y = torch.arange(6)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x[0].numel(), 10)).eval()
    for family in FAMILIES[name].values():
        candidates = family.training(model, x, y, family.threat, generator=seeded(2))
        assert family.threat.contains(x, candidates).all()
        assert not torch.equal(candidates, x)


def test_no_family_is_no_threat_model():
    with pytest.raises(RobustkitError, match="at least one family"):
        mixed([])


def robust(model, images, family):
    return evaluate(
        model, images, family.threat, family.judging, model_name="m", tier="smoke", progress=False
    ).robust.k


@pytest.mark.slow
def test_retraining_with_the_new_family_helps_against_it_and_spares_the_champion(champion, images):
    before = copy.deepcopy(champion.state_dict())
    train = data.load("mnist", "train", limit=1500, seed=0)
    spatial = MNIST["rotation-translation"]
    model, run = retrain.retrain(champion, train, [MNIST["Linf"], spatial], Schedule(4, 64), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in champion.state_dict().items())
    assert run.recipe == "mixed: Linf+rotation-translation"
    assert robust(model, images, spatial) >= robust(champion, images, spatial) + 5
    assert robust(model, images, MNIST["Linf"]) >= robust(champion, images, MNIST["Linf"]) - 20


# --- the gate ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(champion, images):
    families = [MNIST["Linf"], MNIST["rotation-translation"]]
    return gate(champion, images, families, MNIST["patch"], NOTHING, model_name="mnist-pgd", progress=False)


def test_the_gate_counts_what_the_evaluations_say(judged):
    linf, spatial, patch, *adaptive = judged.evaluations
    assert [one.threat.ball.norm for one in (linf, spatial, patch, *adaptive)] == [
        *("Linf", "rotation-translation", "patch"),
        *("Linf", "rotation-translation"),
    ]
    kept = [
        {i for i, verdict in enumerate(one.broken_by) if verdict is None}
        for one in (linf, spatial, *adaptive)
    ]
    clean, worst, held_out, attacked = (bar.share for bar in judged.bars)
    assert clean == linf.clean
    assert worst.k == len(kept[0] & kept[1])
    assert held_out == patch.robust
    assert attacked.k == len(set.intersection(*kept))
    assert attacked.k <= worst.k <= min(linf.robust.k, spatial.robust.k)
    assert Gate.from_json(judged.to_json()) == judged


def with_floor(judged, floor):
    return dataclasses.replace(
        judged, bars=tuple(dataclasses.replace(bar, floor=floor) for bar in judged.bars[:1])
    )


def expect_the_lower_end(judged):
    clean = judged.bars[0].share
    assert with_floor(judged, clean.low).passed
    assert not with_floor(judged, clean.share).passed
    assert with_floor(judged, clean.share).failed == ("clean",)


def test_a_bar_is_passed_by_the_lower_end_of_its_interval(judged):
    expect_the_lower_end(judged)


def test_mutant_that_compares_the_share(judged, monkeypatch):
    monkeypatch.setattr(Bar, "passed", property(lambda self: self.share.share >= self.floor))
    with pytest.raises(AssertionError):
        expect_the_lower_end(judged)


def test_one_failed_bar_stops_a_candidate(judged):
    for i in range(4):
        bars = tuple(
            dataclasses.replace(bar, floor=1.0 if k == i else 0.0) for k, bar in enumerate(judged.bars)
        )
        stopped = dataclasses.replace(judged, bars=bars)
        assert not stopped.passed
        assert stopped.failed == (judged.bars[i].name,)


def test_the_worst_case_is_image_by_image(judged):
    """Two families that break different images leave fewer than either: no minimum of shares, no average."""
    linf = judged.evaluations[0]
    halves = [
        dataclasses.replace(
            linf, broken_by=tuple(linf.attacks[0].name if i % 2 == side else None for i in range(linf.n))
        )
        for side in (0, 1)
    ]
    assert [half.robust.k for half in halves] == [30, 30]
    assert worst_case(halves) == Interval(0, 60)
    other = dataclasses.replace(linf, indices=tuple(i + 1 for i in linf.indices))
    with pytest.raises(RobustkitError, match="of the same images"):
        worst_case([linf, other])
    with pytest.raises(RobustkitError, match="of the same images"):
        worst_case([])


def test_what_was_trained_cannot_be_held_out(champion, images):
    for families in ([MNIST["patch"]], []):
        with pytest.raises(RobustkitError, match="held-out family must not be trained"):
            gate(champion, images, families, MNIST["patch"], NOTHING, model_name="m", progress=False)


def test_the_control_plane_reads_what_the_gate_found(engine, judged):
    """A candidate that failed is known by its digest; one that passed, or was judged again and passed, is not."""
    from robustkit.serve.admin import _failed

    sound = dataclasses.replace(
        judged, bars=tuple(dataclasses.replace(bar, floor=0.0) for bar in judged.bars)
    )
    stopped = with_floor(judged, 1.0)
    digests = "a" * 64, "b" * 64
    retrain.enter(engine, sound, digests[0], actor="gate", now=1.0)
    event = retrain.enter(engine, stopped, digests[1], actor="gate", now=2.0)
    assert event.body["bars"]["clean"] == [judged.bars[0].share.k, judged.bars[0].share.n, 1.0]
    assert [_failed(engine, digest) for digest in digests] == [False, True]
