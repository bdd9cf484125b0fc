"""The journal: an evaluation that is killed anywhere goes on, and ends where it would have ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from robustkit.attacks import fgsm, pgd
from robustkit.errors import RobustkitError
from robustkit.evaluate import Job
from robustkit.results import Evaluation
from robustkit.threat import Ball
from tests.killed import ATTACKS, measured
from tests.oracle import dataset, interior, linear, linear_data


def timeless(found: Evaluation) -> Evaluation:
    """Everything but the clock."""
    return replace(found, created="", attacks=tuple(replace(run, seconds=0.0) for run in found.attacks))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[bytes, Evaluation]:
    """The journal of an evaluation from beginning to end, and its result."""
    path = tmp_path_factory.mktemp("journal") / "whole.partial"
    found = measured(linear(), path)
    return path.read_bytes(), found


def test_the_evaluation_under_test_has_something_to_lose(whole):
    lines = [json.loads(line) for line in whole[0].splitlines()[1:]]
    assert [line["attack"] for line in lines] == ["clean"] * 5 + ["rs-fgsm"] * 5 + ["pgd-2"] * 4
    assert all(line["broken"] for line in lines[5:])
    # The result says what the lines say, and a seed decides it.
    for run in whole[1].attacks:
        rows = sorted(row for line in lines if line["attack"] == run.name for row in line["broken"])
        assert rows == [row for row, name in enumerate(whole[1].broken_by) if name == run.name]
    assert measured(linear(), None, seed=2).broken_by != whole[1].broken_by


def test_a_journal_changes_nothing_in_the_result(whole):
    assert timeless(measured(linear(), None)) == timeless(whole[1])


def test_a_kill_at_any_byte_of_the_journal_resumes_to_the_same_result(whole, tmp_path):
    """What a kill leaves is a beginning of the file: every whole number of lines, and lines cut anywhere."""
    journal, found = whole
    path = tmp_path / "cut.partial"
    ends = [i + 1 for i, byte in enumerate(journal) if byte == ord("\n")]
    cuts = {
        0,
        1,
        *ends,
        *(end - 1 for end in ends),
        *(end + 1 for end in ends[:-1]),
        *range(0, len(journal), 97),
    }
    for cut in sorted(cuts):
        path.write_bytes(journal[:cut])
        resumed = measured(linear(), path)
        assert timeless(resumed) == timeless(found), cut
        lines, before = (
            path.read_bytes().splitlines(),
            journal[:cut].splitlines()[: journal[:cut].count(b"\n")],
        )
        assert lines[: len(before)] == before, cut  # what was done is neither done nor written again
        assert [line.split(b', "seconds"')[0] for line in lines[1:]] == [
            line.split(b', "seconds"')[0] for line in journal.splitlines()[1:]
        ], cut
        if before:
            assert resumed.created == found.created


def test_seconds_are_summed_over_the_interruptions(whole, tmp_path):
    path = tmp_path / "slow.partial"
    header, *lines = whole[0].decode().splitlines()
    slow = [json.dumps(json.loads(line) | {"seconds": 1000.0}) for line in lines[:7]]
    path.write_text("\n".join([header, *slow, ""]))
    first, second = measured(linear(), path).attacks
    assert 2000 < first.seconds < 2100  # two of the seven lines; the clean ones belong to no attack
    assert second.seconds < 100


@pytest.mark.slow
def test_a_process_killed_again_and_again_gets_there(whole, tmp_path):
    """SIGKILL before the first batch, within the clean pass, after it, and within an attack."""
    journal, result = tmp_path / "deep" / "eval.json.partial", tmp_path / "eval.json"
    finished = []
    for forward in (1, 9, 13, 21, 10_000):
        command = [sys.executable, "-m", "tests.killed", str(journal), str(result), str(forward)]
        status = subprocess.run(command, cwd=Path(__file__).parents[1], check=False).returncode
        assert status == (0 if forward == 10_000 else -signal.SIGKILL)
        finished.append(journal.read_bytes().count(b"\n") if journal.exists() else 0)
    assert finished == sorted(set(finished))
    assert finished[0] == 0
    assert 1 < finished[1] < 6 <= finished[2] < finished[3] < finished[4] == len(whole[0].splitlines())
    assert timeless(Evaluation.from_json(result.read_text())) == timeless(whole[1])


def test_jobs_may_come_back_in_any_order_and_be_killed_in_it(whole, tmp_path):
    """As under Dask: the journal then has later batches without the earlier ones."""

    def backwards(work, jobs: list[Job]):
        for done, job in enumerate(reversed(jobs)):
            if path.exists() and path.read_bytes().count(b"\n") == stop:
                raise KeyboardInterrupt
            yield job, work(job)
            assert done < len(jobs)

    path = tmp_path / "eval.json.partial"
    for stop in (3, 8, 12):
        with pytest.raises(KeyboardInterrupt):
            measured(linear(), path, runner=backwards)
        assert path.read_bytes().count(b"\n") == stop
    assert timeless(measured(linear(), path)) == timeless(whole[1])


# --- whose journal ---------------------------------------------------------------------------------


def other_weights():
    model = linear()
    with torch.no_grad():
        model.w[0] += 1e-5  # too little for the logits to tell
    return model


def swapped(x):
    return linear()(x).flip(1)


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        (linear(), {"seed": 2}, "seed 1 there, 2 here"),
        (linear(), {"tier": "full"}, "tier smoke there, full here"),
        (linear(), {"ball": Ball("Linf", 0.0500001)}, r"ball .*eps=0.05\) there, .*eps=0.0500001\) here"),
        (linear(), {"ball": Ball("L2", 0.05)}, "ball"),
        (linear(), {"model_name": "another"}, "model linear there, another here"),
        (linear(), {"attacks": {"rs-fgsm": ATTACKS["rs-fgsm"]}}, "another attacks"),
        (linear(), {"attacks": dict(reversed(ATTACKS.items()))}, "another attacks"),
        (linear(), {"attacks": ATTACKS | {"rs-fgsm": fgsm}}, "another attacks"),
        (linear(), {"attacks": ATTACKS | {"pgd-2": partial(pgd, steps=3)}}, "another attacks"),
        (
            linear(),
            {"data": linear_data(linear(), seed=3, n=100)},
            "images [0-9a-f]{64} there",
        ),
        (linear(), {"data": linear_data(linear(), n=99)}, "images"),
        (other_weights(), {}, "weights [0-9a-f]{64} there"),
        (linear(seed=5), {}, "weights .*; another logits"),
        (swapped, {}, "another logits"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_the_journal_of_another_evaluation_is_refused_and_kept(model, changes, words, whole, tmp_path):
    path = tmp_path / "eval.json.partial"
    path.write_bytes(whole[0][:-400])
    with pytest.raises(RobustkitError, match=words) as caught:
        measured(model, path, **changes)
    assert f"{path} is the journal of another evaluation (" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == whole[0][:-400]


def test_another_batch_size_or_source_of_the_same_images_is_no_other_evaluation(whole, tmp_path):
    """The batches follow from free memory, the source from what is in the cache by now."""
    path = tmp_path / "eval.json.partial"
    path.write_bytes(b"".join(whole[0].splitlines(keepends=True)[:8]))
    data = linear_data(linear(), n=100)
    cached = replace(data, provenance=replace(data.provenance, source="cache"))
    assert timeless(measured(linear(), path, batch_size=7, data=cached)) == timeless(whole[1])


def test_rounding_of_another_machine_is_no_other_model(whole, tmp_path):
    path = tmp_path / "eval.json.partial"
    header, rest = whole[0].split(b"\n", 1)
    record = json.loads(header)
    record["identity"]["logits"] = [logit + 2e-4 for logit in record["identity"]["logits"]]
    record["hardware"]["cpu"] = "another processor"
    path.write_bytes(json.dumps(record).encode() + b"\n" + rest)
    found = measured(linear(), path)
    assert found.broken_by == whole[1].broken_by
    assert "begun on CPU, another processor" in found.notes[0]
    record["identity"]["logits"][0] += 0.1
    path.write_bytes(json.dumps(record).encode() + b"\n" + rest)
    with pytest.raises(RobustkitError, match="another logits"):
        measured(linear(), path)


def test_a_plain_callable_is_known_by_its_logits(tmp_path):
    path = tmp_path / "eval.json.partial"
    measured(lambda x: linear()(x), path)
    assert measured(lambda x: linear()(x), path).broken_by == measured(linear(), None).broken_by
    with pytest.raises(RobustkitError, match="another logits"):
        measured(lambda x: 100 * linear()(x), path)


def test_settings_are_told_without_addresses_in_memory(tmp_path):
    """Two processes have the same function at different places."""
    path = tmp_path / "eval.json.partial"
    x = interior(n=20)
    attacks = {"pgd": partial(pgd, steps=2, loss=lambda z, y: -z[:, 0], start=x)}
    found = measured(linear(), path, attacks=attacks, data=dataset(x, linear()(x).argmax(1)))
    assert " at 0x" not in path.read_text()
    assert found.attacks[0].parameters["loss"] == "<lambda>"
    assert found.attacks[0].parameters["start"].startswith("tensor (20, 3, 2, 2), sha256 ")


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [b"not a journal", *lines[1:]],
        lambda lines: [b"[]", *lines[1:]],
        lambda lines: [b'{"type": "Evaluation"}', *lines[1:]],
        lambda lines: [lines[0].replace(b'"format": 1', b'"format": 2'), *lines[1:]],
        lambda lines: [*lines[:3], lines[3][:20], *lines[4:]],
        lambda lines: [*lines[:3], b"\xff\xfe", *lines[4:]],
        lambda lines: [*lines[:3], b'{"attack": "clean"}', *lines[4:]],
        lambda lines: [
            *lines[:3],
            b'{"attack": "clean", "rows": 3, "broken": [], "seconds": 1, "batch_size": 1}',
        ],
    ],
)
def test_a_damaged_journal_is_refused_and_kept(change, whole, tmp_path):
    path = tmp_path / "eval.json.partial"
    damaged = b"\n".join([*change(whole[0].splitlines()), b""])
    path.write_bytes(damaged)
    with pytest.raises(RobustkitError, match="is not a readable journal of an evaluation; delete it"):
        measured(linear(), path)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:8], lines[7], *lines[8:]],  # a batch done twice, as by two processes at once
        lambda lines: [*lines[:6], *(line.replace(b'"rs-fgsm"', b'"pgd-2"') for line in lines[6:])],
        lambda lines: [line.replace(b'"clean"', b'"nobody"') for line in lines],
        lambda lines: [*lines[:-1], lines[-1].replace(b'"broken": [', b'"broken": [0, ')],
        lambda lines: [*lines[:4], lines[4].replace(b'"rows": [', b'"rows": [1000, ')],
        lambda lines: [*lines[:6], *lines[11:]],  # a later attack without the earlier one
        lambda lines: [*lines, lines[-1].replace(b'"pgd-2"', b'"another"')],
    ],
    ids=["twice", "wrong attack", "unknown attack", "not attacked", "no such image", "hole", "trailer"],
)
def test_a_journal_that_cannot_be_true_is_refused(change, whole, tmp_path):
    path = tmp_path / "eval.json.partial"
    path.write_bytes(b"\n".join([*change(whole[0].splitlines()), b""]))
    with pytest.raises(RobustkitError, match="delete it"):
        measured(linear(), path)
