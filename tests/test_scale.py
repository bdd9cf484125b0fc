"""Two processes make what one makes, and no process waits for one that is gone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import robustkit
from robustkit import cli, scale
from robustkit.evaluate import Job
from robustkit.models import pretrained
from tests.ranked import measured, trained

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "--",
)
SECONDS = 120  # far more than any of these needs, far less than a rank's patience


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Embedded digits, one thread, no torchrun around the tests."""
    for name in ("ROBUSTKIT_DATA", "ROBUSTKIT_TIER", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ROBUSTKIT_OFFLINE", "1")
    monkeypatch.setenv("ROBUSTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def timeless(text: str) -> dict:
    """An evaluation's JSON without what the clock decides."""
    record = json.loads(text)
    del record["created"]
    for attack in record["attacks"]:
        del attack["seconds"]
    record["hardware"].pop("threads")  # the test's own process may have more than one
    return record


@contextmanager
def one_thread() -> Iterator[None]:
    """As torchrun has it: another number of threads may round sums otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)


def two_ranks(*arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """Two ranks without torchrun, which would end the second when the first fails: they must do so themselves."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.ranked", *map(str, arguments)]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | address | {"RANK": str(rank)},
            text=True,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=SECONDS)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(command, process.returncode, stderr=text)
        for process, text in zip(started, said, strict=True)
    ]


def test_a_process_alone_is_rank_0_of_1_and_does_every_job():
    jobs = [Job("pgd", (row,)) for row in range(5)]
    with scale.joined():
        assert (scale.rank(), scale.world()) == (0, 1)
        assert list(scale.ranks(lambda job: list(job.rows), jobs)) == [(job, list(job.rows)) for job in jobs]


@pytest.mark.slow
def test_two_ranks_evaluate_to_what_one_process_does(tmp_path, capsys):
    weights = tmp_path / "model.safetensors"
    robustkit.save_weights(pretrained("mnist-clean"), weights)
    command = ["evaluate", weights, "--data", "digits", "--split", "train", "--n", "600", "--eps", "0.1"]
    command += ["--attacks", "fgsm,pgd-10", "--json"]
    done = torchrun("robustkit", *command, "--out", tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("pgd-10 (2/2):   0%") == 1  # a progress bar on rank 0 alone
    assert cli.main([*map(str, command), "--out", str(tmp_path / "one.json")]) == 0
    found = timeless(done.stdout)
    assert found == timeless(capsys.readouterr().out)
    assert found["broken_by"].count("clean") < 300  # several batches of 250 to attack
    assert timeless((tmp_path / "two.json").read_text()) == timeless((tmp_path / "one.json").read_text())


@pytest.mark.slow
def test_every_rank_has_the_whole_result_and_one_without_memory_makes_all_batches_smaller(tmp_path):
    expected = measured()
    assert {"clean", "rs-fgsm", "last", None} == set(expected.broken_by)
    for done in two_ranks(tmp_path, "whole", "memory"):
        assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert timeless((tmp_path / f"whole-{rank}.json").read_text()) == timeless(expected.to_json())
    first, second = (timeless((tmp_path / f"memory-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["notes"] == ["out of memory: batches went down from 9 to 4 images"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        ("raise", 1, "robustkit: rank 1 stopped: the second batch is a bad one; leave it out.\n"),
        ("kill", -9, "robustkit: another rank has ended or has not answered; see its last words above"),
    ],
    ids=["raises", "killed"],
)
def test_a_rank_that_fails_stops_the_others_at_once(how, status, words, tmp_path):
    first, second = two_ranks(tmp_path, how)
    assert second.returncode == status
    assert first.returncode == 1
    assert words in first.stderr
    assert "Traceback" not in first.stderr
    assert list(tmp_path.glob("*.json")) == []


# --- training --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_train_the_weights_of_one_process(tmp_path):
    command = ["train", "mnist-clean", "--tier", "smoke", "--shards", "2", "--out"]
    done = torchrun("robustkit", *command, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 1
    with one_thread():
        assert cli.main([*command, str(tmp_path / "one")]) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert records[0]["schedule"] == records[1]["schedule"]
    assert [{**epoch, "seconds": 0} for epoch in records[0]["history"]] == [
        {**epoch, "seconds": 0} for epoch in records[1]["history"]
    ]


@pytest.mark.slow
def test_ranks_go_on_after_one_was_killed_to_the_weights_of_one_process(tmp_path):
    with one_thread():
        trained(tmp_path / "alone")
    first, second = two_ranks(tmp_path, "train-kill")
    assert second.returncode == -9
    assert first.returncode == 1
    assert "robustkit: another rank has ended" in first.stderr
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    for done in two_ranks(tmp_path, "train"):
        assert done.returncode == 0, done.stderr
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "run")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_ranks_that_cannot_share_the_shards_evenly_are_told_so(tmp_path):
    for done in two_ranks(tmp_path, "uneven"):
        assert done.returncode == 1
        assert "robustkit: 3 shards cannot be shared evenly among 2 ranks" in done.stderr
    assert list(tmp_path.iterdir()) == []
