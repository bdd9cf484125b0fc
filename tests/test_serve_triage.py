"""Triage: what was done to real images by real attacks, named from the images alone."""

import dataclasses
import functools
import json
import math
import re

import numpy as np
import pytest
import torch
from scipy import ndimage

from robustkit import data, models
from robustkit.device import seeded
from robustkit.errors import RobustkitError
from robustkit.serve import replay, triage
from robustkit.serve.quarantine import Quarantine
from robustkit.serve.triage import Stream
from robustkit.threat import Ball, Patch, RotationTranslation


@pytest.fixture(scope="module")
def images():
    return data.load("mnist", "test", limit=220, seed=3)


@pytest.fixture(scope="module")
def recorded(images):
    """Attackers on images that they asked about untouched first."""
    return replay.record(
        models.pretrained("mnist-pgd"), images, replay.attackers(28), each=5, benign=150, seed=1
    )


@pytest.fixture(scope="module")
def unseen(images):
    """The same on images that nobody else ever saw."""
    return replay.record(
        models.pretrained("mnist-pgd"), images, replay.attackers(28), each=5, benign=150, seen=0.0, seed=1
    )


@pytest.fixture(autouse=True)
def measured_once(monkeypatch):
    """The measures of one stream are the same in every test; what is made of them is not."""
    monkeypatch.setattr(triage, "measure", measured)


@functools.cache
def known(images, held):
    return {}


def measured(stream, rows, _before=triage.measure):
    kept = known(stream.images.tobytes(), stream.held.tobytes())
    if tuple(rows) not in kept:
        kept[tuple(rows)] = _before(stream, rows)
    return kept[tuple(rows)]


def named(stream, truth):
    """Attacker -> the families that its accounts were given, by the largest group of each."""
    groups, found = triage.triage(stream).groups, {}
    for account, attacker in truth.items():
        own = [group for group in groups if group.account == account]
        found.setdefault(attacker, []).append(max(own, key=lambda group: len(group.inputs)).family)
    return found


def expect_right(recorded):
    """At least nine of ten accounts of each attacker, and of all benign ones, get their name."""
    stream, truth = recorded
    attackers = replay.attackers(28)
    for attacker, families in named(stream, truth).items():
        right = {triage.REPEATED, triage.UNRELATED} if attacker == "benign" else {attackers[attacker].family}
        if attacker == "square":  # one that is done after a handful of queries is no sequence
            right.add(triage.LP)
        assert sum(family in right for family in families) >= 0.8 * len(families), (attacker, families)


def expect_restraint(unseen):
    """One input whose original nobody has seen is not explained."""
    stream, truth = unseen
    attackers = replay.attackers(28)
    for attacker, families in named(stream, truth).items():
        if attacker != "benign" and not attackers[attacker].searching:
            assert families.count(triage.UNRELATED) >= 0.8 * len(families), (attacker, families)


def expect_everything(recorded, unseen):
    expect_right(recorded)
    expect_restraint(unseen)


def test_families_are_named_where_the_original_was_seen(recorded):
    expect_right(recorded)


def test_what_nobody_has_seen_is_called_unrelated(unseen):
    expect_restraint(unseen)


def test_a_search_by_turning_is_found_without_the_original(unseen):
    """Its own first query is the reference; the family is the perturbation, not the number of queries."""
    stream, _ = unseen
    groups = [group for group in triage.triage(stream).groups if group.account.startswith("turn-search")]
    long = [group for group in groups if group.queries >= 3]
    assert long
    assert triage.SPATIAL in {group.family for group in long}


def without(field, value):
    """A triage that does not look at one measure."""
    before = triage.family_of
    return lambda measures: before(dataclasses.replace(measures, **{field: value}))


MUTANTS = {
    "no registration": without("explained", 0.0),
    "everything turned": without("explained", 1.0),
    "no window": without("window", 1.0),
    "ratio of its own": without("ratio", 0.0),
    "repeated ones not seen": without("linf", 1.0),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_triage_that_overlooks_a_measure_is_found_out(mutant, recorded, unseen, monkeypatch):
    monkeypatch.setattr(triage, "family_of", MUTANTS[mutant])
    with pytest.raises(AssertionError):
        expect_everything(recorded, unseen)


def test_a_search_is_a_sequence_and_a_single_query_is_not(recorded, monkeypatch):
    stream, _ = recorded
    groups = {group.account: group for group in triage.triage(stream).groups}
    long = [group for name, group in groups.items() if name.startswith("square") and group.queries >= 5]
    assert long
    assert {group.family for group in long} == {triage.SEQUENCE}
    assert all(group.queries == 1 for name, group in groups.items() if name.startswith("pgd"))
    monkeypatch.setattr(triage, "SEQUENCE_LENGTH", 1)  # mutant
    again = {group.account: group for group in triage.triage(stream).groups}
    assert again["pgd-linf-000"].family == triage.SEQUENCE


def test_outside_the_trained_threat_model(recorded):
    stream, _ = recorded
    trained = {"linf": Ball("Linf", 0.3), "small": Ball("Linf", 0.1), "turned": RotationTranslation(30, 3)}

    def outside(*names):
        found = triage.triage(stream, [trained[name] for name in names])
        return {
            group.account.rsplit("-", 1)[0]: group.outside
            for group in found.groups
            if group.outside is not None
        }

    linf, small, both = outside("linf"), outside("small"), outside("linf", "turned")
    assert not linf["pgd-linf"]
    assert not linf["square"]
    assert linf["turn-search"]
    assert linf["patch"]
    assert small["pgd-linf"]  # a larger budget than was trained is outside too
    assert not both["turn-search"]
    assert not both["turn-once"]
    found = triage.triage(stream)
    assert found.outside is None
    assert {group.outside for group in found.groups} == {None}


def test_a_square_is_inside_a_patch_as_large():
    measures = triage.Measures(0, 0.1, 4.0, 1.0, 0.5, 8 / 28, 0.0, 0.0, 0.0, 0.0, 0.5, 1.0)
    image = torch.zeros(1, 28, 28)
    assert triage.family_of(measures) == triage.PATCH
    assert triage._inside(measures, Patch(8), image)
    assert not triage._inside(measures, Patch(6), image)


def test_registration_against_another_library(images):
    """SciPy turns and shifts with splines of its own; the angle and the shift must come back."""
    x = images.x[:12]
    draw = np.random.default_rng(0)
    expected, moved = [], []
    for image in x[:, 0].numpy():
        angle, right, down = draw.uniform(-28, 28), *draw.uniform(-2.5, 2.5, 2)
        # ndimage counts angles the other way than the rows of an image run.
        turned = ndimage.shift(ndimage.rotate(image, angle, reshape=False, order=1), (down, right), order=1)
        expected.append((angle, right, down))
        moved.append(turned)
    inputs = torch.from_numpy(np.stack(moved))[:, None].float().clamp(0, 1)
    found, plain, registered = triage.register(inputs, x)
    apart = (found - torch.tensor(expected)).abs()
    assert (apart[:, 0] < 4).float().mean() >= 0.75  # a one or a zero looks much the same turned otherwise
    assert apart[:, 0].median() < 1.5
    assert apart[:, 1:].median() < 0.4
    assert (registered < 0.4 * plain).all()


def test_windows_against_a_count_by_hand():
    energy = torch.zeros(3, 12, 12)
    energy[0, 3:7, 5:9] = 1.0
    energy[1] = torch.rand(12, 12, generator=seeded(0)) + 1
    energy[2, 0, 0] = 0.0
    assert triage._windows(energy).tolist() == pytest.approx([4 / 12, 1.0, 0.0])


def test_norms_and_frequencies_of_residuals():
    board = torch.tensor([[(-1.0) ** (i + j) for j in range(16)] for i in range(16)])[None] * 0.1
    l0, l2, linf, high = triage._shape(board)
    assert (l0, linf, high) == pytest.approx((1.0, 0.1, 1.0))
    assert l2 == pytest.approx(1.6)
    slow = torch.sin(torch.arange(16) * 2 * math.pi / 16).expand(1, 16, 16)
    assert triage._shape(slow)[3] < 1e-6


@pytest.mark.slow
def test_work_is_bounded_however_much_is_held(images):
    """5,000 inputs of one account, and one of another: both are looked at, and few."""
    x = replay.stored(images.x[:100])
    noise = np.random.default_rng(0).integers(0, 20, (5000, 28, 28, 1))
    flood = np.clip(x[0].astype(int) + noise, 0, 255).astype(np.uint8)
    stream = Stream(
        np.concatenate([x, flood, x[50:51] // 2]),
        np.array(["user"] * 100 + ["flood"] * 5000 + ["quiet"]),
        np.arange(5101.0),
        np.arange(5101) >= 100,
    )
    found = triage.triage(stream)
    assert found.held == 5001
    assert found.looked_at <= triage.MOST_HELD
    assert {group.account for group in found.groups} == {"flood", "quiet"}
    assert next(group for group in found.groups if group.account == "flood").family == triage.SEQUENCE


# --- streams -----------------------------------------------------------------------------------------


def test_a_stream_survives_the_disk(recorded, tmp_path):
    stream, _ = recorded
    triage.write_stream(tmp_path / "incident", stream)
    again = triage.read_stream(tmp_path / "incident")
    for field in ("images", "account", "at", "held"):
        assert np.array_equal(getattr(again, field), getattr(stream, field))


def pickled(path):
    np.savez(
        path, images=np.array([{}], dtype=object), account=np.array([""]), at=np.zeros(1), held=np.ones(1)
    )


DAMAGED = {
    "nothing": lambda path: None,
    "no archive": lambda path: path.write_bytes(b"PK"),
    "pickles": pickled,
    "one array": lambda path: np.savez(path, images=np.zeros((1, 8, 8, 1), np.uint8)),
    "floats": lambda path: np.savez(
        path, images=np.zeros((1, 8, 8, 1)), account=np.array(["a"]), at=np.zeros(1), held=np.ones(1, bool)
    ),
    "lengths": lambda path: np.savez(
        path,
        images=np.zeros((2, 8, 8, 1), np.uint8),
        account=np.array(["a"]),
        at=np.zeros(1),
        held=np.ones(1, bool),
    ),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_stream_is_a_sentence(how, tmp_path, run):
    DAMAGED[how](tmp_path / "stream.npz")
    status, out, err = run("triage", tmp_path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("robustkit: ")


def test_nothing_held_and_nothing_to_compare_with():
    one = Stream(np.zeros((1, 28, 28, 1), np.uint8), np.array(["a"]), np.zeros(1), np.array([False]))
    with pytest.raises(RobustkitError, match="nothing of this stream is in quarantine"):
        triage.triage(one)
    with pytest.raises(RobustkitError, match="nothing to compare with"):
        triage.triage(dataclasses.replace(one, held=np.array([True])))


def test_triage_of_a_real_quarantine(engine, images, tmp_path):
    kept = Quarantine(engine, tmp_path / "kept", b"k" * 32)
    attacker = replay.attackers(28)["turn-once"]
    model = models.pretrained("mnist-pgd")
    benign = list(replay.stored(images.x[:60]))
    for i in range(6):
        turned = replay.queries(attacker, model, images.x[i], images.y[i], seeded(i))
        kept.put(f"account-{i}", replay.stored(turned)[0], "rejected", 100.0 + i)
    found = triage.triage(triage.collected(kept, benign), [Ball("Linf", 0.3)])
    assert found.family == triage.SPATIAL
    assert found.share(triage.SPATIAL).k >= 5
    assert found.outside.k >= 5
    with pytest.raises(RobustkitError, match="benign images of one shape"):
        triage.collected(kept, [])


def test_the_command_names_the_family(recorded, tmp_path, run):
    stream, _ = recorded
    chosen = np.array(
        [not held or name.startswith("turn") for held, name in zip(stream.held, stream.account, strict=True)]
    )
    spatial = Stream(*(getattr(stream, field.name)[chosen] for field in dataclasses.fields(Stream)))
    triage.write_stream(tmp_path / "incident", spatial)
    page = tmp_path / "page.html"
    status, out, err = run("triage", tmp_path / "incident", "--model", "mnist-pgd", "--report", page)
    assert (status, err) == (0, "")
    assert re.search(
        r"^family: rotation-translation, 100\.0 % .* of the groups that are attacks$", out, re.MULTILINE
    )
    assert re.search(r"^outside the trained threat models \(Linf eps=0\.3\): 100\.0 %", out, re.MULTILINE)
    assert "Triage of the quarantine" in page.read_text()
    record = json.loads(run("triage", tmp_path / "incident", "--json")[1])
    assert record["family"] == "rotation-translation"
    assert record["outside"] is None


@pytest.mark.slow
def test_cifar10_images_of_three_channels():
    try:
        images = data.load("cifar10-lossless-4k", "report", limit=140)
    except RobustkitError:
        pytest.skip("CIFAR-10 is not on this machine")
    stream, truth = replay.record(
        models.pretrained("cifar10-l2-w16"), images, replay.attackers(32), each=4, benign=100, seed=2
    )
    expect_right((stream, truth))
