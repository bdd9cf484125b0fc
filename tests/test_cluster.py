"""Dask workers make what one process makes, one of them killed in the middle; nobody without a key joins in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import robustkit
from robustkit import cli, cluster, device
from robustkit.errors import RobustkitError
from robustkit.models import pretrained
from robustkit.results import Evaluation
from tests.ranked import Watched, measured
from tests.test_scale import ROOT, SECONDS, timeless


@dataclass
class Cluster:
    """A scheduler and two workers by TLS, each a process of its own without a nanny to restart it."""

    address: str
    certificate: Path
    key: Path
    processes: list[subprocess.Popen[bytes]]

    @property
    def files(self) -> dict[str, Path]:
        return {"ca_file": self.certificate, "cert": self.certificate, "key": self.key}


def wait_for(pattern: str, log: Path) -> re.Match[str]:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if found := re.search(pattern, log.read_text()):
            return found
        time.sleep(0.1)
    raise TimeoutError(log.read_text())


@pytest.fixture(scope="module")
def dask(tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    certificate, key = cluster.certificates(folder)
    tls = ["--tls-ca-file", certificate, "--tls-cert", certificate, "--tls-key", key, "--no-dashboard"]
    processes = []

    def start(name: str, *arguments: object) -> Path:
        log = folder / f"{name}.log"
        command = [sys.executable, "-m", "dask", name.partition("-")[0]]
        with log.open("wb") as file:
            processes.append(
                subprocess.Popen(
                    [*command, *map(str, [*tls, *arguments])],
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    cwd=ROOT,  # `python -m` finds the clone in it
                    stdout=file,
                    stderr=file,
                )
            )
        return log

    try:
        log = start("scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0")
        address = wait_for(r"Scheduler at: +(tls://127\.0\.0\.1:\d+)", log)[1]
        for name in ("worker-1", "worker-2"):
            start(name, address, "--no-nanny", "--nthreads", "1", "--local-directory", folder)
        wait_for(r"(?s)(Starting worker compute stream.*){2}", log)
        yield Cluster(address, certificate, key, processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_the_key_is_the_owners_alone_and_never_replaced(tmp_path, capsys):
    assert cli.main(["tls-certificates", str(tmp_path / "tls")]) == 0
    told = capsys.readouterr().out
    certificate, key = tmp_path / "tls" / "certificate.pem", tmp_path / "tls" / "key.pem"
    assert f"--tls-cert {certificate} --tls-key {key}" in told
    assert key.stat().st_mode & 0o077 == 0
    before = key.read_bytes()
    assert cli.main(["tls-certificates", str(tmp_path / "tls")]) == 2
    assert "File exists" in capsys.readouterr().err
    assert key.read_bytes() == before


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:8786", "127.0.0.1:8786", "inproc://1/2/3"])
def test_an_address_without_tls_is_refused(address):
    with pytest.raises(RobustkitError, match="is not a tls:// address"), cluster.connected(address):
        pass


@pytest.mark.slow
def test_the_scheduler_listens_to_no_one_without_its_key(dask, tmp_path):
    certificate, key = cluster.certificates(tmp_path)
    for authority in (certificate, dask.certificate):
        client = cluster.connected(dask.address, ca_file=authority, cert=certificate, key=key)
        with pytest.raises(RobustkitError, match=r"no scheduler answers at tls://.*--tls-ca-file"), client:
            pass


def failing(model, x, y, ball, *, generator=None):
    raise RobustkitError("this batch is a bad one; leave it out.")


def kill_at_work(workers: list[subprocess.Popen[bytes]], folder: Path, killed: list[int]) -> None:
    """SIGKILL for the first worker that begins with a batch. Which one that is, Dask decides: all are held."""
    until = time.monotonic() + SECONDS
    while not (begun := {int(path.name.split("-")[0]) for path in folder.glob("[0-9]*-begun")}):
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    for worker in workers:
        if worker.pid in begun and not killed:
            worker.kill()
            worker.wait()
            killed.append(worker.pid)
    for hold in folder.glob("hold-*"):
        hold.unlink()


@pytest.mark.slow
def test_the_result_names_the_machine_of_the_workers(dask, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_cpu_name", lambda: "the client's")
    robustkit.save_weights(pretrained("mnist-pgd"), tmp_path / "model.safetensors")
    command = [tmp_path / "model.safetensors", "--data", "digits", "--n", "8", "--attacks", "fgsm"]
    command += ["--dask", dask.address, "--tls-ca-file", dask.certificate]
    command += ["--tls-cert", dask.certificate, "--tls-key", dask.key]
    assert cli.main(["evaluate", *map(str, command)]) == 0
    found = Evaluation.from_json((tmp_path / "eval.json").read_text())
    assert device.hardware().cpu == "the client's"
    monkeypatch.undo()
    assert found.hardware == replace(device.hardware(), threads=1)


@pytest.mark.slow
def test_workers_evaluate_to_what_one_process_does_although_one_is_killed(dask, tmp_path):
    expected = measured(Watched(tmp_path))
    alone = {path.name.split("-", 1)[1] for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        path.unlink()
    with cluster.connected(dask.address, **dask.files) as client:
        with pytest.raises(RobustkitError, match=r"^this batch is a bad one; leave it out\.$"):
            measured(failing, cluster.workers(client))

        run, crew, killed = cluster.workers(client), dask.processes[1:], []

        def killing(work, jobs):
            if jobs[0].attack == "last":
                for worker in crew:
                    (tmp_path / f"hold-{worker.pid}").touch()
                threading.Thread(target=kill_at_work, args=(crew, tmp_path, killed)).start()
            yield from run(work, jobs)

        found = measured(Watched(tmp_path), killing)
    assert timeless(found.to_json()) == timeless(expected.to_json())
    assert {"clean", "rs-fgsm", "last", None} == set(found.broken_by)

    seen = [path.name.split("-") for path in tmp_path.iterdir()]
    assert {pid for pid, *_ in seen} == {str(worker.pid) for worker in dask.processes[1:]}  # none here
    assert {
        f"{batch}-{event}" for _, batch, event in seen
    } == alone  # every batch done, that of the victim too
    lost = {batch for pid, batch, event in seen if event == "begun" and [pid, batch, "done"] not in seen}
    assert len(lost) == 1
    (survivor,) = {str(worker.pid) for worker in crew} - {str(killed[0])}
    assert {batch for pid, batch, event in seen if pid == survivor and event == "done"} >= lost


@pytest.mark.slow
def test_the_end_of_the_scheduler_is_told_in_a_sentence(dask, tmp_path):  # the last test: it ends the cluster
    robustkit.save_weights(pretrained("mnist-pgd"), tmp_path / "model.safetensors")
    command = ["evaluate", tmp_path / "model.safetensors", "--data", "digits", "--attacks", "pgd-100x10"]
    command += ["--dask", dask.address, "--tls-ca-file", dask.certificate]
    command += ["--tls-cert", dask.certificate, "--tls-key", dask.key]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ROBUSTKIT_OFFLINE": "1"}
    with (tmp_path / "log").open("wb") as file:
        evaluation = subprocess.Popen(
            [sys.executable, "-m", "robustkit", *map(str, command)],
            env=os.environ | environment,
            cwd=tmp_path,
            stderr=file,
        )
    try:
        wait_for(r"pgd-100x10 \(1/1\): +0%", tmp_path / "log")
        time.sleep(0.5)
        dask.processes[0].kill()
        assert evaluation.wait(SECONDS) == 2
    finally:
        evaluation.kill()
        evaluation.wait()
    said = (tmp_path / "log").read_text()
    assert said.splitlines()[-1].startswith("robustkit: the scheduler has ended")
    assert "Traceback" not in said
