"""Query detectors and telemetry: what they must see, what they cannot see, and what they may cost."""

import threading
import time

import numpy as np
import pytest
import torch
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from robustkit import data
from robustkit.errors import RobustkitError
from robustkit.serve.cache import Answers, digest
from robustkit.serve.detectors import Fingerprints, LowFrequency, observe
from robustkit.serve.store import metadata, open_store
from robustkit.serve.telemetry import fewer_bits, roughness, smoothed, squeezing
from robustkit.threat import RotationTranslation

KEY = b"the service's key"
TABLE = metadata.tables["sightings"]
BOTH = pytest.mark.parametrize("kind", [Fingerprints, LowFrequency], ids=["fingerprints", "low-frequency"])


@pytest.fixture
def sqlite(tmp_path):
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    metadata.create_all(store)
    yield store
    store.dispose()


def pictures(n, seed=0, shape=(32, 32, 3)):
    """Random smooth pictures: no two alike."""
    draw = np.random.default_rng(seed)
    height, width, channels = shape
    coarse = draw.integers(256, size=(n, height // 4, width // 4, channels), dtype=np.uint8)
    return np.repeat(np.repeat(coarse, 4, axis=1), 4, axis=2)


def noisy(image, size, seed=0):
    """Noise, uniform and independent in every pixel. Units: grey levels."""
    drawn = np.random.default_rng(seed).integers(-size, size + 1, image.shape)
    return np.clip(image + drawn, 0, 255).astype(np.uint8)


def dotted(image, seed=0):
    """The same picture with one other pixel."""
    changed = image.copy()
    changed[tuple(np.random.default_rng(seed).integers(image.shape[:2]))] ^= 255
    return changed


def photographs(n):
    """Real images: CIFAR-10's originals, else MNIST or what stands in for it."""
    try:
        found = data.load("cifar10-lossless-4k", "train", limit=n, dtype=torch.uint8)
    except RobustkitError:
        found = data.load("mnist", "test", limit=n, dtype=torch.uint8)
    return np.ascontiguousarray(found.x.numpy().transpose(0, 2, 3, 1))


# --- What they see ------------------------------------------------------------------------------------


@BOTH
def test_the_second_of_two_near_duplicates_is_flagged_and_only_within_an_account(engine, kind):
    detector = kind(engine, KEY)
    image = pictures(1)[0]
    first = detector.observe("alice", image, 0.0)
    assert (first.score, first.flagged) == (0.0, False)
    assert not detector.observe("bob", dotted(image), 1.0).flagged
    seen = detector.observe("alice", dotted(image), 2.0)
    assert seen.flagged
    assert 0.5 <= seen.score <= 1.0


@BOTH
def test_replicas_and_a_restarted_one_share_what_they_saw(engine, kind):
    image = pictures(1)[0]
    here, there = kind(engine, KEY), kind(engine, KEY)
    here.observe("a", image, 0.0)
    assert there.observe("a", dotted(image), 1.0).flagged
    assert here.observe("a", dotted(image, seed=1), 2.0).flagged
    assert kind(engine, KEY).observe("a", dotted(image, seed=2), 3.0).flagged


@BOTH
def test_replicas_that_observe_at_once_lose_nothing_and_number_without_gaps(engine, kind):
    replicas = [kind(engine, KEY) for _ in range(3)]
    images = pictures(60)

    def work(i):
        for image in images[i::3]:
            replicas[i].observe("a", image, 0.0)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with engine.connect() as connection:
        ordinals = list(connection.scalars(select(TABLE.c.ordinal).order_by("ordinal")))
    assert ordinals == list(range(1, 61))
    assert all(replicas[0].observe("a", dotted(image), 1.0).flagged for image in images)


def numbers(engine, detector):
    wanted = select(TABLE.c.ordinal).where(TABLE.c.detector == detector).order_by(TABLE.c.ordinal)
    with engine.connect() as connection:
        return list(connection.scalars(wanted))


def test_what_is_observed_together_is_remembered_together_whoever_else_observes(engine):
    """Two replicas with both detectors and one with the second alone: whoever loses a number repeats both."""
    replicas = [[Fingerprints(engine, KEY), LowFrequency(engine, KEY)] for _ in range(2)]
    replicas.append([LowFrequency(engine, KEY)])
    images = pictures(60)

    def work(i):
        for image in images[i::3]:
            with engine.connect() as connection:
                assert len(observe(connection, replicas[i], "a", image, 0.0)) == len(replicas[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers(engine, "fingerprints") == list(range(1, 41))
    assert numbers(engine, "low-frequency") == list(range(1, 61))
    with engine.connect() as connection:
        for i, image in enumerate(images):
            seen = observe(connection, replicas[0], "a", dotted(image), 1.0)
            assert seen["low-frequency"].flagged
            assert seen["fingerprints"].flagged == (i % 3 < 2)


def test_when_the_store_fails_in_the_middle_nobody_remembers(sqlite):
    """Neither the store nor the memory keeps the half: a customer who tries again is not flagged."""
    both, image = [Fingerprints(sqlite, KEY), LowFrequency(sqlite, KEY)], pictures(1)[0]
    with sqlite.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER full BEFORE INSERT ON sightings WHEN NEW.detector = 'low-frequency' "
            "BEGIN SELECT RAISE(ABORT, 'no room'); END"
        )
    with pytest.raises(SQLAlchemyError, match="no room"), sqlite.connect() as connection:
        observe(connection, both, "a", image, 0.0)
    with sqlite.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER full")
    assert numbers(sqlite, "fingerprints") == []
    with sqlite.connect() as connection:
        assert not any(v.flagged for v in observe(connection, both, "a", dotted(image), 1.0).values())
        assert all(v.flagged for v in observe(connection, both, "a", image, 2.0).values())
    assert numbers(sqlite, "fingerprints") == numbers(sqlite, "low-frequency") == [1, 2]


def test_a_fingerprint_shares_what_the_windows_share(sqlite):
    """Against windows compared as bytes, by brute force: hashing neither loses nor invents a match."""
    detector = Fingerprints(sqlite, KEY)
    one, other = pictures(2)
    other[8:] = one[8:]

    def windows(image):
        levels = bytes((image // 50).ravel())
        found = {levels[i : i + 20] for i in range(len(levels) - 19)}
        return {window for window in found if len(set(window)) > 1}

    def everything(image):
        kept, detector._KEPT = detector._KEPT, 10_000
        hashes = set(detector.feature(image).tolist())
        detector._KEPT = kept
        return hashes

    assert len(everything(one)) == len(windows(one))
    assert len(everything(one) & everything(other)) == len(windows(one) & windows(other))
    detector.observe("a", one, 0.0)
    jaccard = len(windows(one) & windows(other)) / len(windows(one) | windows(other))
    assert detector.observe("a", other, 0.0).score == pytest.approx(jaccard, abs=0.25)


def test_low_frequency_distances_are_those_of_the_blurred_images(sqlite):
    """A grey level added everywhere moves the feature by just that much, on average over keys."""
    image = np.full((32, 32, 3), 100, np.uint8)
    moved = []
    for i in range(60):
        detector = LowFrequency(sqlite, KEY + bytes([i]))
        apart = detector.feature(image + np.uint8(10)) - detector.feature(image)
        moved.append(np.square(apart).sum() / (10 / 255) ** 2)
    # Each is a chi-square of 32 degrees over 32: mean 1, standard deviation 0.25.
    assert np.mean(moved) == pytest.approx(1, abs=4 * 0.25 / np.sqrt(60))
    chessboard = image + (np.indices((32, 32)).sum(0) % 2 * 40).astype(np.uint8)[:, :, None]
    mean_only = image + np.uint8(20)
    assert np.linalg.norm(detector.feature(chessboard) - detector.feature(mean_only)) < 0.005


# --- What they cannot see -----------------------------------------------------------------------------


@BOTH
def test_neither_sees_rotations_on_a_grid(sqlite, kind):
    """The textbook's detector is blind to the textbook's spatial attack: seven queries, none like another."""
    family = RotationTranslation(degrees=30, pixels=3)
    images = photographs(20)
    detector = kind(sqlite, KEY)
    flags = 0
    for i, image in enumerate(images):
        x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        turns = torch.tensor([(degrees, 0.0, 0.0) for degrees in range(-30, 31, 10)])
        turned = family.transformed(x.expand(len(turns), *x.shape), turns)
        for picture in (turned.permute(0, 2, 3, 1) * 255).round().byte().numpy():
            flags += detector.observe(f"attacker {i}", picture, 0.0).flagged
    assert flags <= 0.05 * 20 * len(turns)


def test_noise_in_every_pixel_blinds_fingerprints_and_not_the_blurred_view(sqlite):
    images = photographs(20)
    for detector, seen in ((Fingerprints(sqlite, KEY), 4), (LowFrequency(sqlite, KEY), 20)):
        flags = []
        for i, image in enumerate(images):
            detector.observe(f"account {i}", image, 0.0)
            flags.append(detector.observe(f"account {i}", noisy(image, 10), 0.0).flagged)
        assert abs(sum(flags) - seen) <= 4


# --- Benign traffic -----------------------------------------------------------------------------------


def flagged(detector, answers, stream, store):
    """How many of a stream are flagged, exact duplicates answered from `answers` first if there are any."""
    count = 0
    for now, image in enumerate(stream):
        if answers is not None:
            with store.connect() as connection:
                told = answers.get(connection, "customer", digest(image), "m", now)
            if told is not None:
                continue
            answers.put("customer", digest(image), "m", {"label": "cat"}, now)
        count += detector.observe("customer", image, now).flagged
    return count


@BOTH
def test_at_most_one_real_image_in_200_is_flagged_sent_once_or_again_and_again(sqlite, kind):
    images = photographs(1000)
    once = flagged(kind(sqlite, KEY), None, images, sqlite)
    assert once <= 0.005 * len(images)
    draw = np.random.default_rng(0)
    again = [images[i if draw.random() < 0.7 else draw.integers(i + 1)] for i in range(300)]
    metadata.drop_all(sqlite)
    metadata.create_all(sqlite)
    answers = Answers(sqlite, per_account=1000)
    assert flagged(kind(sqlite, KEY), answers, again, sqlite) <= 0.005 * len(again)
    assert answers.repeats("customer") > 50
    # Without the answers kept for duplicates, retries alone look like an attack: the check above is sharp.
    metadata.drop_all(sqlite)
    metadata.create_all(sqlite)
    assert flagged(kind(sqlite, KEY), None, again, sqlite) > 50


# --- Bounds -------------------------------------------------------------------------------------------


@BOTH
def test_rows_and_memory_of_an_account_are_bounded_and_the_newest_stay(engine, kind):
    detector = kind(engine, KEY, capacity=64)
    images = pictures(300)
    detector.observe("a", images[0], 0.0)
    memory = detector._memories["a"]
    held = {name: value.nbytes for name, value in vars(memory).items() if isinstance(value, np.ndarray)}
    for image in images[1:]:
        detector.observe("a", image, 0.0)
    with engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(TABLE)) <= 64 + 64
    assert held == {name: getattr(memory, name).nbytes for name in held}
    fresh = kind(engine, KEY, capacity=64)
    assert all(fresh.observe("a", dotted(image), 1.0).flagged for image in images[-20:])
    assert not fresh.observe("a", dotted(images[0]), 1.0).flagged


@BOTH
def test_accounts_in_memory_are_bounded_and_come_back_from_the_store(sqlite, kind):
    detector = kind(sqlite, KEY, accounts=3)
    images = pictures(10)
    for i, image in enumerate(images):
        detector.observe(f"account {i}", image, 0.0)
    assert list(detector._memories) == ["account 7", "account 8", "account 9"]
    assert detector.observe("account 0", dotted(images[0]), 1.0).flagged


@BOTH
def test_what_is_too_old_is_forgotten_and_counting_goes_on(engine, kind):
    detector, other = kind(engine, KEY, lasting=100), kind(engine, KEY, lasting=100)
    image, *others = pictures(4)
    detector.observe("a", image, 0.0)
    for i, picture in enumerate(others):
        detector.observe("a", picture, 50.0 + i)
    assert not detector.observe("a", dotted(image), 100.0).flagged
    assert detector.expire(200.0) == 4  # all but the newest, whose number the next one follows
    assert other.observe("a", image, 201.0).flagged is False
    assert detector.observe("a", dotted(image), 202.0).flagged  # sees what the other replica added
    assert detector.observe("a", image, 5.0).flagged  # and a clock that was put back forgets nothing


def median_time(detector, images, account):
    took = []
    for image in images:
        start = time.perf_counter()
        detector.observe(account, image, 1e6)
        took.append(time.perf_counter() - start)
    return float(np.median(took))


@BOTH
def test_an_observation_costs_the_same_behind_100_000_others(sqlite, kind):
    images = pictures(200)
    few = kind(sqlite, KEY)
    few.observe("a", images[0], 1e6)
    alone = median_time(few, images, "a")
    # 1,000 of "a" and 99,000 of others, near-duplicates all: features of one picture again and again.
    feature = few.feature(images[0]).tobytes()
    rows = [
        {
            "detector": few.name,
            "account": f"account {i}" if i else "a",
            "ordinal": 1000 + j,
            "at": 1e6,
            "feature": feature,
        }
        for i in range(100)
        for j in range(1000)
    ]
    with sqlite.begin() as connection:
        connection.execute(TABLE.insert(), rows)
    many = kind(sqlite, KEY)
    many.observe("a", images[0], 1e6)  # reads the store once
    assert median_time(many, images, "a") < 3 * alone  # a scan of all would cost a hundred times as much


# --- Telemetry ----------------------------------------------------------------------------------------


def test_squeezing_moves_noise_and_leaves_flat_pictures_alone():
    flat = np.full((2, 8, 8, 1), 255, np.uint8)
    speckled = flat.copy()
    speckled[1, ::2, ::2] = 0

    def brightness(images):
        bright = images.mean((1, 2, 3)) / 255
        return np.stack([bright, 1 - bright], axis=1)

    moved = squeezing(brightness, np.concatenate([flat[:1], speckled[1:]]))
    assert moved[0] == 0
    assert moved[1] > 0.2
    assert np.array_equal(roughness(flat), [0, 0])
    assert roughness(speckled)[1] == pytest.approx(0.5)


def test_squeezers_do_what_they_are_called():
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert len(np.unique(fewer_bits(ramp, 3))) == 8
    assert np.array_equal(fewer_bits(ramp, 8), ramp)
    assert abs(fewer_bits(ramp, 5).astype(int) - ramp).max() <= 255 / 31 / 2 + 0.5
    spot = np.zeros((1, 8, 8, 1), np.uint8)
    spot[0, 4, 4] = 255
    assert smoothed(spot).max() <= 128 / 2
    assert smoothed(spot).shape == spot.shape
