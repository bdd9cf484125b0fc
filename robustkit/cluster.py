"""Evaluation over the workers of a Dask cluster, by TLS. Needs `pip install robustkit[cluster]`.

What Dask sends between machines are pickles: whoever may speak to the scheduler can run code on every
worker. Hence certificates on both sides, always.
"""

# mypy: allow-untyped-calls
# (the client of `distributed` carries no annotations)

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import dask
import torch
from distributed import Client, KilledWorker, as_completed
from distributed.client import FutureCancelledError
from distributed.comm.core import CommClosedError
from distributed.security import Security

from robustkit import __version__
from robustkit.device import hardware
from robustkit.errors import RobustkitError
from robustkit.evaluate import Job, Runner
from robustkit.results import Hardware

RETRIES = (
    2  # of a job that raises; a job whose worker dies goes elsewhere, as `allowed-failures` of Dask says
)
PATIENCE = 30  # seconds for the scheduler to answer and for a first worker to be there


def certificates(folder: Path) -> tuple[Path, Path]:
    """A new certificate, its own authority for a year, and its key, which only the owner can read.

    The same two files serve the scheduler, the workers and the client: whoever has the key belongs to
    the cluster. Raises: FileExistsError rather than replace one.
    """
    made = Security.temporary()
    folder.mkdir(parents=True, exist_ok=True)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    for path, text, mode in ((key, made.tls_client_key, 0o600), (certificate, made.tls_ca_file, 0o644)):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            file.write(text)
    return certificate, key


@contextmanager
def connected(
    address: str, *, ca_file: Path | None = None, cert: Path | None = None, key: Path | None = None
) -> Iterator[Client]:
    """A client of the scheduler at `address`; files not given are those that Dask's configuration names.

    Raises: RobustkitError for an address without TLS, when nobody answers there, when there is no worker,
    and for a worker with another robustkit or torch, whose results could differ.
    """
    if not address.startswith("tls://"):
        raise RobustkitError(
            f"{address} is not a tls:// address, and anyone could run code on such workers; start the scheduler "
            "and the workers with --tls-ca-file, --tls-cert and --tls-key, from `robustkit tls-certificates`."
        )
    files = {"tls_ca_file": ca_file, "tls_client_cert": cert, "tls_client_key": key}
    given = {name: str(path) for name, path in files.items() if path is not None}
    with _quiet():
        try:
            client = Client(address, security=Security(require_encryption=True, **given), timeout=PATIENCE)
        except (OSError, TypeError, ValueError) as error:
            raise RobustkitError(
                f"no scheduler answers at {address} ({error}); check the address and the three files given by "
                "--tls-ca-file, --tls-cert and --tls-key."
            ) from error
        try:
            _check_workers(client, address)
            yield client
        finally:
            with suppress(Exception):  # where the scheduler has gone, closing fails in several ways
                client.close()


def _check_workers(client: Client, address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
    except TimeoutError as error:
        raise RobustkitError(
            f"the scheduler at {address} has no worker; start some with `python -m dask worker {address}`."
        ) from error
    for worker, theirs in client.run(_versions).items():
        if theirs != _versions():
            raise RobustkitError(
                f"the worker at {worker} has {theirs}, here is {_versions()}; install the same on both."
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """No tracebacks in Dask's log: what goes wrong is raised, and told in a sentence."""
    logger = logging.getLogger("distributed.client")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _versions() -> str:
    return f"robustkit {__version__} and torch {torch.__version__}"


def machines(client: Client) -> list[Hardware]:
    """The kinds of machine that the workers run on, the most frequent first."""
    return [kind for kind, _ in Counter(client.run(hardware).values()).most_common()]


def workers(client: Client) -> Runner:
    """The runner that gives each job to whichever worker is free.

    A job whose worker dies is done by another. The work is sent as the result of a task and not
    scattered, because Dask makes a lost result again, and scattered data not.
    Raises: RobustkitError when a job kills one worker after the other, and when the scheduler is gone.
    """

    def run(work: Callable[[Job], list[int]], jobs: Sequence[Job]) -> Iterator[tuple[Job, list[int]]]:
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):  # images are large
            attacker = client.submit(_itself, work, pure=False)
        futures = {client.submit(_one, attacker, job, pure=False, retries=RETRIES): job for job in jobs}
        try:
            for future in as_completed(futures):
                job = futures.pop(future)  # what nobody holds is not made again when its worker dies
                yield job, future.result()
        except KilledWorker as error:
            raise RobustkitError(
                f"a batch killed {error.allowed_failures + 1} workers, one after the other; give them more memory, "
                "or make the batches smaller."
            ) from error
        except (FutureCancelledError, CommClosedError) as error:
            raise RobustkitError(
                "the scheduler has ended and its jobs with it; start it and the evaluation again."
            ) from error
        finally:
            for future in futures:
                future.release()

    return run


def _itself(work: Callable[[Job], list[int]]) -> Callable[[Job], list[int]]:
    return work


_TURN = threading.Lock()


def _one(work: Callable[[Job], list[int]], job: Job) -> list[int]:
    """One job at a time in a worker: a model's modes and torch's precision are shared by its threads."""
    with _TURN:
        return work(job)
