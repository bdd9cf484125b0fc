"""Quarantine: what is sealed, who may fill it, when it ends; the answers kept for exact duplicates."""

import hashlib
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sqlalchemy import func, select

from robustkit.errors import RobustkitError
from robustkit.serve.cache import Answers, digest
from robustkit.serve.quarantine import Quarantine
from robustkit.serve.server import running
from robustkit.serve.store import metadata
from tests.serving import settings

KEY = bytes(range(32))
SEALED = 12 + 12 + 8 * 8 * 3 + 16  # nonce, shape, pixels, tag


def image(seed=0, shape=(8, 8, 3)):
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


@pytest.fixture
def quarantine(engine, tmp_path):
    return Quarantine(engine, tmp_path / "q", KEY, per_account=3 * SEALED, total=5 * SEALED, lasting=100)


def files(quarantine):
    return sorted(path for path in quarantine._folder.glob("*/*") if path.is_file())


# --- The quarantine -----------------------------------------------------------------------------------


def test_an_image_comes_back_under_the_digest_of_its_content(quarantine):
    name = quarantine.put("alice", image(), "fingerprints", 10.0)
    assert name == hashlib.sha256(b"(8, 8, 3)" + image().tobytes()).hexdigest()
    assert np.array_equal(quarantine.read(name), image())
    (item,) = quarantine.items()
    assert (item.account, item.reason, item.at, item.expires) == ("alice", "fingerprints", 10.0, 110.0)


def test_images_of_other_shapes_and_the_same_bytes_are_other_images(quarantine):
    flat = image(shape=(4, 16, 3))
    names = {quarantine.put("a", picture, "r", 0.0) for picture in (flat, flat.reshape(16, 4, 3))}
    assert len(names) == 2
    assert {quarantine.read(name).shape for name in names} == {(4, 16, 3), (16, 4, 3)}


def test_nothing_on_the_disk_shows_the_picture_or_the_account(quarantine):
    black = np.zeros((8, 8, 3), np.uint8)
    for account in ("alice", "bob"):
        quarantine.put(account, black, "r", 0.0)
    (path,) = files(quarantine)  # one file for one content
    sealed = path.read_bytes()
    assert len(sealed) == SEALED
    assert len(set(sealed[12:])) > 100  # 220 bytes of a black picture would be one value
    assert b"alice" not in sealed
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(quarantine._folder.stat().st_mode) == 0o700


def test_the_same_picture_sealed_twice_never_repeats_a_nonce(engine, tmp_path):
    seen = set()
    for i in range(20):
        q = Quarantine(engine, tmp_path / f"q{i}", KEY)
        q.put(f"account {i}", image(), "r", 0.0)
        seen.add(files(q)[0].read_bytes()[:12])
    assert len(seen) == 20


@pytest.mark.parametrize("damage", ["flipped", "short", "gone", "another key", "another's bytes"])
def test_what_was_changed_cannot_be_read(quarantine, engine, damage):
    name, other = (quarantine.put("a", image(seed), "r", 0.0) for seed in (0, 1))
    path = quarantine._folder / name[:2] / name
    sealed = bytearray(path.read_bytes())
    sealed[40] ^= 1
    reader = quarantine
    if damage == "flipped":
        path.write_bytes(sealed)
    elif damage == "short":
        path.write_bytes(sealed[:5])
    elif damage == "gone":
        path.unlink()
    elif damage == "another key":
        reader = Quarantine(engine, quarantine._folder, KEY[::-1])
    else:
        path.write_bytes((quarantine._folder / other[:2] / other).read_bytes())
    with pytest.raises(RobustkitError, match="cannot be opened"):
        reader.read(name)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "f" * 64])
def test_a_name_that_is_not_kept_is_refused_before_any_path_is_made_of_it(quarantine, name):
    with pytest.raises(RobustkitError, match="holds no"):
        quarantine.read(name)


def test_one_account_cannot_fill_it_and_all_together_cannot_either(quarantine):
    assert [quarantine.put("flood", image(i), "r", 0.0) is not None for i in range(5)] == [True] * 3 + [
        False
    ] * 2
    assert [quarantine.put("other", image(i), "r", 0.0) is not None for i in range(9, 12)] == [
        True,
        True,
        False,
    ]
    assert quarantine.usage() == (5 * SEALED, 3)
    assert quarantine.put("flood", image(0), "again", 50.0) == digest(image(0))  # kept already: no refusal
    assert quarantine.usage() == (5 * SEALED, 3)
    assert len(quarantine.items(account="flood")) == 3


def test_the_cap_is_exact_when_many_put_at_once(quarantine):
    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(lambda i: quarantine.put(f"account {i}", image(i), "r", 0.0), range(24)))
    assert sum(name is not None for name in kept) == 5
    assert quarantine.usage() == (5 * SEALED, 19)
    assert len(files(quarantine)) == 5


def test_a_full_disk_turns_away_and_loses_nothing(quarantine, monkeypatch):
    kept = quarantine.put("a", image(0), "r", 0.0)

    def full(*_):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr("robustkit.serve.quarantine.write_atomically", full)
        assert quarantine.put("a", image(1), "r", 0.0) is None
    assert quarantine.usage() == (SEALED, 1)
    assert np.array_equal(quarantine.read(kept), image(0))
    assert quarantine.put("a", image(1), "r", 0.0) is not None


def test_its_time_ends_for_rows_files_and_totals_and_orphans_are_swept(quarantine):
    old, shared = (quarantine.put("a", image(seed), "r", 0.0) for seed in (0, 1))
    quarantine.put("b", image(1), "r", 60.0)
    orphan = quarantine._folder / "ab" / ("ab" + "0" * 62)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"left by a killed process")
    assert quarantine.expire(99.0) == 0
    assert not orphan.exists()
    assert quarantine.expire(100.0) == 2
    assert [path.name for path in files(quarantine)] == [shared]  # the other account's time is not over
    assert quarantine.usage() == (SEALED, 0)
    with pytest.raises(RobustkitError, match="holds no"):
        quarantine.read(old)


def test_a_key_of_another_length_is_refused(engine, tmp_path):
    with pytest.raises(RobustkitError, match="32 bytes; got 16"):
        Quarantine(engine, tmp_path, KEY[:16])


# --- Answers for exact duplicates ---------------------------------------------------------------------


def told(engine, answers, *query):
    with engine.connect() as connection:
        return answers.get(connection, *query)


def test_an_answer_is_for_one_account_one_image_one_model_and_a_time(engine):
    answers = Answers(engine, lasting=100)
    answers.put("alice", "d", "m", {"label": "cat", "scores": {"cat": 0.25}}, 0.0)
    assert told(engine, answers, "alice", "d", "m", 99.0) == {"label": "cat", "scores": {"cat": 0.25}}
    for account, name, model, now in (
        ("bob", "d", "m", 1.0),
        ("alice", "e", "m", 1.0),
        ("alice", "d", "n", 1.0),
        ("alice", "d", "m", 100.0),
    ):
        assert told(engine, answers, account, name, model, now) is None
    assert (answers.repeats("alice"), answers.repeats("bob")) == (1, 0)
    answers.put("alice", "d", "m", {"label": "dog"}, 200.0)
    assert told(engine, answers, "alice", "d", "m", 201.0) == {"label": "dog"}


def test_an_account_keeps_its_newest_answers_and_leaves_the_others_alone(engine):
    answers = Answers(engine, per_account=4)
    answers.put("other", "d0", "m", {}, -1.0)
    for i in range(10):
        answers.put("a", f"d{i}", "m", {"i": i}, float(i))
    kept = [i for i in range(10) if told(engine, answers, "a", f"d{i}", "m", 10.0)]
    assert kept == [6, 7, 8, 9]
    assert told(engine, answers, "other", "d0", "m", 10.0) == {}
    assert answers.expire(3600.0 + 7) == 3  # two of "a" and the one of "other"


def test_the_digest_tells_images_apart_as_their_bytes_and_shapes_do():
    assert digest(image()) == digest(image().copy(order="F"))
    changed = image()
    changed[0, 0, 0] ^= 1
    assert len({digest(image()), digest(changed), digest(image().reshape(4, 16, 3))}) == 3


# --- In the running service ---------------------------------------------------------------------------


def test_the_service_lets_go_of_what_is_past_its_time(tmp_path):
    with running(settings(tmp_path, tidy_seconds=0.05)) as here:
        pipeline = here.replica.plane.pipeline
        pipeline.quarantine.put("a", image(), "long ago", 0.0)
        pipeline.answers.put("a", "d", "m", {}, 0.0)
        for seed in range(2):
            pipeline.detectors[0].observe("a", image(seed), 0.0)
        end = time.monotonic() + 20
        while pipeline.quarantine.items() or rows(here.replica.engine, "answers", "sightings") > 1:
            assert time.monotonic() < end
            time.sleep(0.02)
    assert not list((tmp_path / "quarantine").glob("*/*"))


def rows(engine, *tables):
    with engine.connect() as connection:
        return sum(
            connection.scalar(select(func.count()).select_from(metadata.tables[name])) for name in tables
        )
