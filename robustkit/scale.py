"""Beyond one process: forks of it share an evaluation, the ranks of a torchrun evaluation and training.

    torchrun --standalone --nproc-per-node 2 -m -- robustkit evaluate ...

Forks come and go by themselves, where torch has several threads. Every rank runs the same command; `rank` tells
them apart, and only rank 0 writes files and shows progress. Sums are taken in an order that the ranks do not
change, so that what they make together is bit for bit what one process makes with as many threads (torchrun sets
OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import ctypes
import datetime
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from robustkit.errors import RobustkitError
from robustkit.evaluate import Job, Runner, in_turn

T = TypeVar("T")

PATIENCE = datetime.timedelta(minutes=30)  # the longest that a rank waits for another's batch
_PR_SET_PDEATHSIG = 1


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one rank of its torchrun; where there is none, nothing changes.

    Ranks talk by gloo, on GPUs tensors go by NCCL, and each rank of a machine gets a GPU of its own.
    Raises: RobustkitError when the ranks do not find each other or outnumber the machine's GPUs.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    if torch.cuda.is_available():
        gpu, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if gpu >= gpus:
            raise RobustkitError(
                f"rank {gpu} of this machine has no GPU of its own, there are {gpus}; start torchrun with "
                f"--nproc-per-node {gpus}, or set CUDA_VISIBLE_DEVICES= to use the processor."
            )
        torch.cuda.set_device(gpu)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE
        )
    except (ValueError, RuntimeError) as error:
        raise RobustkitError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the ranks do not find each other ({error}); start them "
            "by torchrun, or unset WORLD_SIZE."
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process among those of its torchrun; 0 for a process alone."""
    return dist.get_rank() if _together() else 0


def world() -> int:
    """How many processes its torchrun has; 1 for a process alone."""
    return dist.get_world_size() if _together() else 1


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def shared(task: Callable[[], T]) -> list[T]:
    """What `task` returned on each rank, in their order, on every rank.

    Raises: what it raised here; on the other ranks torch.OutOfMemoryError for the same, so that all of them
    make their batches smaller, and RobustkitError for anything else, a rank that is gone included.
    """
    result, error = None, None
    try:
        result = task()
    except Exception as caught:
        error = caught
    complaint = str(error) if isinstance(error, RobustkitError) else repr(error)
    kind = None if error is None else "memory" if isinstance(error, torch.OutOfMemoryError) else "other"
    answers: list[tuple[T | None, str | None, str]] = [(result, kind, complaint)] * world()
    if world() > 1:
        with _listening():
            dist.all_gather_object(answers, answers[0])
    if error is not None:
        raise error
    for number, (_, kind, complaint) in enumerate(answers):
        if kind is not None:
            raised = torch.OutOfMemoryError if kind == "memory" else RobustkitError
            raise raised(f"rank {number} stopped: {complaint}")
    return [result for result, _, _ in answers]  # type: ignore[misc]  # who has no complaint has a result


def gathered(vector: Tensor) -> list[Tensor]:
    """The vectors of all ranks, in their order, on every rank. Raises: RobustkitError when one is gone."""
    if world() == 1:
        return [vector]
    vectors = [torch.empty_like(vector) for _ in range(world())]
    with _listening():
        dist.all_gather(vectors, vector)
    return vectors


@contextmanager
def journal_of_rank(path: Path) -> Iterator[Path]:
    """The journal at `path` on rank 0, a passing copy of it elsewhere: all go on from the same place, one writes.

    No rank begins to write before every rank has come here.
    """
    there = shared(lambda: path.read_bytes() if path.exists() else b"")[0]
    if rank() == 0:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(there)
        yield copy


@contextmanager
def _listening() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RobustkitError(
            "another rank has ended or has not answered; see its last words above, then start again, with "
            "--resume where there is something to go on from."
        ) from error


def ranks(work: Callable[[Job], list[int]], jobs: Sequence[Job]) -> Iterator[tuple[Job, list[int]]]:
    """The runner under torchrun: each rank does every world-size-th job, and every rank gets all pairs.

    Raises: RobustkitError on every rank when one of them fails.
    """
    for first in range(0, len(jobs), world()):
        mine = jobs[first : first + world()][rank() : rank() + 1]  # none, when the last round is short
        answers: list[list[tuple[Job, list[int]]]] = shared(partial(list, in_turn(work, mine)))
        for pairs in answers:
            yield from pairs


@contextmanager
def forks() -> Iterator[Runner]:
    """The runner of several cores: a fork of this process for each of torch's threads, and one thread in each.

    Batches side by side wait for nobody, while the threads of one batch meet after every operation; small
    networks gain most. As forks start from what this process has, models need not be importable; they stay until
    the end of the block, for the same work. In turn, here, where there is one thread, at first one job, or forking
    is not safe: off Linux, and for work on a GPU.
    Raises: RobustkitError when a fork is killed, and what a job raises.
    """
    crew: list[_Fork] = []

    def end() -> None:
        for fork in crew:
            fork.process.kill()
            fork.process.join()
        crew.clear()

    def run(work: Callable[[Job], list[int]], jobs: Sequence[Job]) -> Iterator[tuple[Job, list[int]]]:
        number, safe = torch.get_num_threads(), sys.platform == "linux" and not torch.cuda.is_initialized()
        if not safe or number < 2 or len(jobs) < 2:
            yield from in_turn(work, jobs)
            return
        if any(fork.work is not work for fork in crew):
            end()
        crew.extend(_forked(work) for _ in range(len(crew), min(number, len(jobs))))
        whole = False
        try:
            yield from _shared_out(crew, jobs)
            whole = True
        finally:
            if not whole:  # some are still at a job of which nobody will hear
                end()

    try:
        yield run
    finally:
        end()


@dataclass(frozen=True)
class _Fork:
    process: BaseProcess
    asked: Connection
    work: Callable[[Job], list[int]]


def _shared_out(crew: Sequence[_Fork], jobs: Sequence[Job]) -> Iterator[tuple[Job, list[int]]]:
    """Each job to whichever fork is free."""
    waiting, busy = iter(jobs), dict[Any, Job]()  # by the connection to a fork what it is doing
    for fork, job in zip(crew, waiting, strict=False):
        fork.asked.send(job)
        busy[fork.asked] = job
    while busy:
        for ready in wait(list(busy)):
            asked: Any = ready  # wait() is annotated for sockets as well
            job = busy.pop(asked)
            try:
                broken, error = asked.recv()
                for following in islice(waiting, 1):
                    asked.send(following)
                    busy[asked] = following
            except (EOFError, OSError) as gone:
                raise RobustkitError(
                    "a process of the evaluation was killed; see whether the machine has enough memory, or set "
                    "OMP_NUM_THREADS=1 for one process alone, and go on by --resume."
                ) from gone
            if error is not None:
                raise error
            yield job, broken


def _forked(work: Callable[[Job], list[int]]) -> _Fork:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_do_jobs, args=(work, theirs, os.getpid()), daemon=True)
    with warnings.catch_warnings():
        # Python 3.12 warns that another thread may hold a lock: torch's own are idle between two batches.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()
    return _Fork(process, ours, work)


def _do_jobs(work: Callable[[Job], list[int]], asked: Connection, parent: int) -> None:
    """In a fork: jobs until it is killed, by its parent or because that one has ended, in whatever way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who ends this
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    torch.set_num_threads(1)  # and no more: OpenMP would wait for threads that were not forked along
    while True:
        job, broken, error = asked.recv(), None, None
        try:
            broken = work(job)
        except Exception as caught:
            error = caught
        asked.send((broken, error))
