"""Two processes make what one makes, and no process waits for one that is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

import robustkit
from robustkit import cli, scale
from robustkit.errors import RobustkitError
from robustkit.evaluate import Job
from robustkit.models import pretrained
from tests.ranked import Watched, measured, trained

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
def threads(number: int) -> Iterator[None]:
    """One as torchrun has it: another number may round sums otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
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


# --- forks -----------------------------------------------------------------------------------------


def test_forks_evaluate_side_by_side_to_what_one_thread_does(tmp_path):
    with threads(1):
        expected = measured()
    with threads(3):
        with scale.forks() as runner:
            found = measured(Watched(tmp_path), runner)
        assert torch.get_num_threads() == 3
    assert found.broken_by == expected.broken_by
    workers = {int(path.name.split("-")[0]) for path in tmp_path.glob("*-begun")}
    assert len(workers) == 3
    assert os.getpid() not in workers
    assert not any(psutil.pid_exists(worker) for worker in workers)


def children() -> set[psutil.Process]:
    """Of this process; earlier tests may have left some, which may end meanwhile."""
    return set(psutil.Process().children())


def shared_out(work: Callable[[Job], list[int]], number: int) -> list[tuple[Job, list[int]]]:
    """`number` jobs of one row each, through forks of their own."""
    with scale.forks() as runner:
        return list(runner(work, [Job("pgd", (row,)) for row in range(number)]))


def test_each_fork_has_one_thread():
    with threads(2):
        assert [found for _, found in shared_out(lambda job: [torch.get_num_threads()], 4)] == [[1]] * 4


@pytest.mark.parametrize(("number", "rows"), [(1, 5), (4, 1)], ids=["one thread", "one job"])
def test_where_there_is_nothing_to_share_the_work_is_done_here(number, rows):
    with threads(number):
        done = shared_out(lambda job: [os.getpid()], rows)
    assert {pid for _, (pid,) in done} == {os.getpid()}
    assert [job.rows[0] for job, _ in done] == list(range(rows))


def test_forks_stay_for_the_same_work_and_make_room_for_other():
    def one(job: Job) -> list[int]:
        return [1, os.getpid()]

    def other(job: Job) -> list[int]:
        return [2, os.getpid()]

    before, jobs = children(), [Job("pgd", (row,)) for row in range(8)]
    with threads(2), scale.forks() as runner:
        first, second, third = (list(runner(work, jobs)) for work in (one, one, other))
        assert len(children() - before) == 2
    kinds, workers = (
        [{found[of] for _, found in done} for done in (first, second, third)] for of in range(2)
    )
    assert kinds == [{1}, {1}, {2}]
    assert workers[0] | workers[1] == workers[0]
    assert not workers[0] & workers[2]


def raising(error: Exception) -> Callable[[Job], list[int]]:
    def work(job: Job) -> list[int]:
        if job.rows == (3,):
            raise error
        time.sleep(0.05)
        return list(job.rows)

    return work


@pytest.mark.parametrize(
    "error", [RobustkitError("leave it out."), torch.OutOfMemoryError("too many")], ids=repr
)
def test_what_a_job_raises_is_raised_here_and_the_next_jobs_meet_no_old_answers(error):
    before, work, jobs = children(), raising(error), [Job("pgd", (row,)) for row in range(9)]
    with threads(2), scale.forks() as runner:
        with pytest.raises(type(error), match=str(error)):
            list(runner(work, jobs))
        assert sorted(runner(work, jobs[4:]), key=str) == [(job, list(job.rows)) for job in jobs[4:]]
    assert children() <= before


def test_a_fork_that_is_killed_ends_the_evaluation_with_a_sentence():
    def work(job: Job) -> list[int]:
        if job.rows == (3,):
            os.kill(os.getpid(), signal.SIGKILL)
        return list(job.rows)

    before = children()
    with threads(2), pytest.raises(RobustkitError, match="was killed; see whether the machine has enough"):
        shared_out(work, 6)
    assert children() <= before


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_forks_end_with_their_parent_and_what_they_did_is_kept(how, tmp_path):
    weights, out = tmp_path / "model.safetensors", tmp_path / "cut.json"
    robustkit.save_weights(pretrained("mnist-clean"), weights)
    # What a shell starts in the background inherits that Ctrl-C is ignored; a terminal's own does not.
    command = [
        "env",
        "--default-signal=INT",
        sys.executable,
        "-m",
        "robustkit",
        "evaluate",
        weights,
        "--out",
        out,
    ]
    command += [
        "--data",
        "digits",
        "--split",
        "train",
        "--n",
        "1000",
        "--eps",
        "0.1",
        "--attacks",
        "pgd-100x10",
    ]
    journal, limit = out.with_name("cut.json.partial"), time.monotonic() + SECONDS
    started = subprocess.Popen(
        [*map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with started:
        while time.monotonic() < limit:
            if journal.exists() and b"pgd-100x10" in journal.read_bytes().partition(b"\n")[2]:
                break
            time.sleep(0.01)
        workers = psutil.Process(started.pid).children()
        if how == signal.SIGINT:
            os.killpg(started.pid, how)  # as a terminal does
        else:
            started.kill()
        _, said = started.communicate(timeout=30)
    assert len(workers) == 2
    assert started.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in said
    psutil.wait_procs(workers, timeout=30)
    assert not any(worker.is_running() for worker in workers)
    assert not out.exists()
    assert journal.exists()


@pytest.mark.parametrize(
    ("old", "new", "noticed_by"),
    [
        ("    torch.set_num_threads(1)", "    pass", lambda folder: test_each_fork_has_one_thread()),
        ("if not safe or", "if True or", test_forks_evaluate_side_by_side_to_what_one_thread_does),
        (
            "number < 2 or len(jobs) < 2",
            "False",
            lambda folder: test_where_there_is_nothing_to_share_the_work_is_done_here(4, 1),
        ),
        (
            "        if any(fork.work is not work for fork in crew):\n            end()\n",
            "",
            lambda folder: test_forks_stay_for_the_same_work_and_make_room_for_other(),
        ),
        (
            "            if error is not None:\n                raise error\n",
            "",
            lambda folder: test_what_a_job_raises_is_raised_here_and_the_next_jobs_meet_no_old_answers(
                RobustkitError("no.")
            ),
        ),
        (
            "whole = False",
            "whole = True",
            lambda folder: test_what_a_job_raises_is_raised_here_and_the_next_jobs_meet_no_old_answers(
                RobustkitError("no.")
            ),
        ),
    ],
    ids=[
        "all cores in each fork",
        "no forks",
        "a fork for one job",
        "forks that go on with other work",
        "what a job raises is lost",
        "answers to jobs of before",
    ],
)
def test_wrong_forks_are_noticed(old, new, noticed_by, monkeypatch, tmp_path):
    source = Path(scale.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, "the mutant has lost its place in the source"
    mutant = types.ModuleType(scale.__name__)
    exec(compile(source.replace(old, new), "<mutant of scale>", "exec"), vars(mutant))
    monkeypatch.setattr(scale, "forks", mutant.forks)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        noticed_by(tmp_path)


# --- training --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_train_the_weights_of_one_process(tmp_path):
    command = ["train", "mnist-clean", "--tier", "smoke", "--shards", "2", "--out"]
    done = torchrun("robustkit", *command, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 1
    with threads(1):
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
    with threads(1):
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
