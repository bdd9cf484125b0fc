"""Submission -> evidence: execute a notebook and collect what its functions do on hidden cases.

The only hop that touches learners' code. It records and judges nothing; whatever the notebook does, the
result is a run.json that says how far it came. The kernel is confined by `grading.sandbox`, unless the
instructor asks for a plain one by name; both are functions from a folder to a kernel manager.
"""

# nbformat and nbgrader are not annotated.
# mypy: allow-untyped-calls

from __future__ import annotations

import io
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionComplete, DeadKernelError
from nbformat import NotebookNode

from grading import evidence, notebooks, records, sandbox
from grading.files import blank_plain
from grading.fresh import Told, unheard
from grading.records import COLLECTED, CRASHED, NOT_REACHED, TAMPERED, TIMED_OUT, Collected, Run
from grading.sandbox import leftovers
from grading.workspace import ONE_THREAD, case_seed
from robustkit import __version__
from robustkit.contracts import CONTRACTS, Arrays
from robustkit.device import TIERS
from robustkit.errors import RobustkitError
from robustkit.files import write_atomically
from robustkit.lessons import Exercise, Lesson, save_arrays

KernelFactory = Callable[[Path], AsyncKernelManager]

_log = logging.getLogger("grading.run")
_log.addHandler(logging.NullHandler())  # what nbclient reports is in the Run; a batch prints one line each

# What a learner's kernel may know of the grader's environment.
_PASSED_ON = (
    *("PATH", "LANG", "LC_ALL", "TZ", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "CUDA_VISIBLE_DEVICES"),
    "ROBUSTKIT_OFFLINE",
)
_SHOWN = ("text/plain", "image/png", "image/jpeg")  # output types that cannot act in a marker's browser
_TIMED_OUT = {
    "ename": "CellTimeout",
    "evalue": "the cell ran too long",
    "traceback": ["the cell ran too long"],
}

_PROBE = """\
def _robustkit_probe(exercise, case, evidence):
    from numpy import load
    from robustkit.lessons import collect, find_exercise, save_arrays
    with load(case, allow_pickle=False) as arrays:
        save_arrays(evidence, collect(find_exercise(exercise), globals(), dict(arrays)))
try:
    _robustkit_probe({exercise!r}, {case!r}, {evidence!r})
finally:
    del _robustkit_probe
"""


@dataclass(frozen=True)
class Limits:
    """How long a notebook may run, in seconds, and how much it may print."""

    cell: float = 300
    notebook: float = 900
    output_bytes: int = 5 * 2**20


def plain_kernel(folder: Path) -> AsyncKernelManager:
    """An ordinary kernel of this Python, unconfined: for submissions that the instructor trusts to be tame.

    `folder` is for its sockets; it talks over ipc where the path is short enough for one.
    """
    manager = AsyncKernelManager(kernel_name="python3", connection_file=str(folder / "kernel.json"))
    if len(str(folder)) < 80:  # a socket's path has at most 107 bytes
        manager.transport = "ipc"
    return manager


def kernel_in(tier: str, limits: Limits) -> KernelFactory:
    """The kernels of a sandbox tier ("auto": the strongest that works here; "none": a plain kernel).

    Raises: RobustkitError when the tier cannot be had here.
    """
    chosen = sandbox.choose(tier)
    return (
        plain_kernel
        if chosen == sandbox.UNCONFINED
        else sandbox.confined(chosen, seconds=limits.notebook + 60, readable=tuple(_data_places().values()))
    )


def run_submission(
    path: Path,
    lesson: Lesson,
    release: Path,
    into: Path,
    *,
    student: str,
    secret: bytes,
    tier: str = "smoke",
    limits: Limits | None = None,
    confinement: str = "auto",
    told: Told = unheard,
) -> Run:
    """Check the notebook at `path`, rebuild it on the lesson's `release`, execute it, write evidence into `into`.

    `told` gets a line for each exercise that it comes to.

    Raises: RobustkitError when the notebook cannot be graded at all, or the sandbox `confinement` cannot be
    had; anything that goes wrong while it runs is in the result instead.
    """
    limits = limits or Limits()
    kernel = kernel_in(confinement, limits)
    submitted, digest = notebooks.read_submission(path)
    notebook, restored = notebooks.restore(submitted, notebooks.read_release(release))
    job = Job(lesson, student, digest, restored, tier)
    return execute(notebook, job, into, secret=secret, limits=limits, kernel=kernel, told=told)


@dataclass(frozen=True)
class Job:
    """What the runner must know of a submission besides its cells."""

    lesson: Lesson
    student: str
    submission: str
    restored: tuple[str, ...]
    tier: str

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise RobustkitError(f"the tier {self.tier!r} is unknown; choose one of {', '.join(TIERS)}.")


def execute(
    notebook: NotebookNode,
    job: Job,
    into: Path,
    *,
    secret: bytes,
    limits: Limits,
    kernel: KernelFactory,
    told: Told = unheard,
) -> Run:
    """Execute a rebuilt notebook in a folder of its own; write evidence, run.json and executed.ipynb into `into`.

    `notebook` gets its outputs. Each exercise is collected right after its check cell, so that a kernel
    that dies later loses only what comes later.
    """
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    started = time.monotonic()
    with leftovers.run_folder() as private:
        work, sockets = private / "work", private / "k"
        work.mkdir()
        sockets.mkdir(mode=0o700)
        for name in (sandbox.EXCHANGE_IN, sandbox.EXCHANGE_OUT):
            blank_plain(
                work / name
            )  # there before the kernel: a sandbox mounts these two files, and no folder
        session = _Session(notebook, kernel(sockets), work, limits)
        with session.running(_environment(work, job.tier)):
            collected = _walk(session, job, secret, into, told)
    result = Run(
        job.student,
        job.lesson.id,
        job.tier,
        job.submission,
        __version__,
        job.restored,
        session.errors,
        round(time.monotonic() - started, 1),
        tuple(collected[exercise.id] for exercise in job.lesson.exercises),
    )
    write_atomically(into / "executed.ipynb", nbformat.writes(notebook).encode())
    records.write(into / "run.json", result)
    return result


def _walk(session: _Session, job: Job, secret: bytes, into: Path, told: Told) -> dict[str, Collected]:
    """Run every cell; after each check cell collect its exercise. One entry per exercise, whatever happens."""
    exercises = {exercise.id: exercise for exercise in job.lesson.exercises}
    collected: dict[str, Collected] = {}
    slow = False  # whether a cell since the last check cell ran too long
    for index, cell in enumerate(session.client.nb.cells):
        status = session.run_cell(index)
        slow = slow or status == TIMED_OUT
        exercise = exercises.get(notebooks.grade_id(cell))
        if status != CRASHED and exercise and exercise.id not in collected:
            contract = CONTRACTS[exercise.contract]
            case = contract.draw(case_seed(secret, job.student, job.lesson.id, exercise.id))
            entry = _collect(session, exercise, contract.given(case), into)
            if slow and entry.outcome == COLLECTED:
                entry = Collected(
                    entry.exercise, TIMED_OUT, entry.evidence, "a cell before the check ran too long"
                )
            collected[exercise.id], slow = entry, False
            told(f"{exercise.id} {entry.outcome}")
        if session.dead:
            break
    # The exercise that was under way when the kernel died is the one that crashed.
    for position, exercise in enumerate(e for e in job.lesson.exercises if e.id not in collected):
        outcome = session.dead if session.dead and position == 0 else NOT_REACHED
        collected[exercise.id] = Collected(
            exercise.id, outcome, "", "the notebook stopped before the check cell"
        )
    return collected


def _collect(session: _Session, exercise: Exercise, case: Arrays, into: Path) -> Collected:
    """The evidence for one exercise, copied out of the kernel's folder unread."""
    given, left = session.work / sandbox.EXCHANGE_IN, session.work / sandbox.EXCHANGE_OUT
    blank_plain(left)  # what a learner's cell may have put there
    written = io.BytesIO()
    save_arrays(written, case)
    blank_plain(given, written.getvalue())
    status = session.run_probe(
        _PROBE.format(exercise=exercise.id, case=sandbox.EXCHANGE_IN, evidence=sandbox.EXCHANGE_OUT)
    )
    blank_plain(given)
    if status in (CRASHED, TIMED_OUT):
        return Collected(exercise.id, status, "", "the check did not come to an end")
    try:
        data = evidence.take(left)
    except RobustkitError as error:
        return Collected(exercise.id, TAMPERED, "", str(error))
    if not data:
        return Collected(exercise.id, CRASHED, "", "the check ended without a result")
    write_atomically(into / f"{exercise.id}.npz", data)
    return Collected(exercise.id, COLLECTED, records.sha256(data), "")


def _data_places() -> dict[str, str]:
    """Where a kernel finds data, by the real paths, which are those that a sandbox lets it see; a URL stays one."""
    places = {
        "ROBUSTKIT_CACHE": os.environ.get("ROBUSTKIT_CACHE")
        or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "robustkit")
    }
    if os.environ.get("ROBUSTKIT_DATA"):
        places["ROBUSTKIT_DATA"] = os.environ["ROBUSTKIT_DATA"]
    return {
        name: place if "://" in place else str(Path(place).expanduser().resolve())
        for name, place in places.items()
    }


def _environment(work: Path, tier: str) -> dict[str, str]:
    """The kernel's environment: made from nothing, with the private folder as its home."""
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    # One thread each, unless told otherwise: torch's threads spin while they wait, and notebooks that
    # run side by side with as many threads as cores then take many times as long.
    return (
        ONE_THREAD
        | kept
        | _data_places()
        | {
            "HOME": str(work),
            "USER": "student",
            "TMPDIR": str(work),
            "IPYTHONDIR": str(work / ".ipython"),
            "JUPYTER_CONFIG_DIR": str(work / ".jupyter"),
            "MPLCONFIGDIR": str(work / ".matplotlib"),
            "ROBUSTKIT_TIER": tier,
            "NBGRADER_EXECUTION": "autograde",
            # A numpy.py beside the notebook must not shadow the library.
            "PYTHONSAFEPATH": "1",
            "PYTHONNOUSERSITE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
    )


class _Client(NotebookClient):
    """An nbclient that keeps at most `budget` bytes of output, in types that are safe to show."""

    budget: int = 0

    def process_message(
        self, msg: dict[str, Any], cell: NotebookNode, cell_index: int
    ) -> NotebookNode | None:
        kind, content = msg["msg_type"], msg["content"]
        if kind in ("execute_result", "display_data", "update_display_data"):
            content["data"] = {
                mime: value for mime, value in content.get("data", {}).items() if mime in _SHOWN
            }
            content["metadata"] = {}
        if kind not in ("status", "execute_input", "execute_reply"):
            if kind.startswith("comm"):
                return None
            self.budget -= len(json.dumps(content, default=str))
            if self.budget < 0:
                return None
        return super().process_message(msg, cell, cell_index)


@dataclass
class _Session:
    """A running notebook: its kernel, its clock, and how it stands."""

    notebook: NotebookNode
    manager: AsyncKernelManager
    work: Path
    limits: Limits
    errors: int = 0
    dead: str = ""  # the outcome of whatever was under way when the kernel ended; empty while it lives
    client: _Client = field(init=False)
    _deadline: float = field(init=False)
    _reply: Mapping[str, Any] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.client = _Client(
            self.notebook,
            km=self.manager,
            allow_errors=True,
            interrupt_on_timeout=True,
            error_on_timeout=_TIMED_OUT,
            record_timing=False,
            coalesce_streams=True,
            store_widget_state=False,
            shutdown_kernel="immediate",
            startup_timeout=120,
            on_cell_executed=self._remember,
            log=_log,
        )
        self.client.budget = self.limits.output_bytes
        self._deadline = time.monotonic() + self.limits.notebook

    def _remember(self, cell: NotebookNode, cell_index: int, execute_reply: Mapping[str, Any]) -> None:
        self._reply = execute_reply

    @contextmanager
    def running(self, environment: dict[str, str]) -> Iterator[None]:
        """With the kernel up; it is killed at the end, with its process group."""
        self.client.reset_execution_trackers()
        with self.client.setup_kernel(cwd=str(self.work), env=environment, cleanup_kc=True):
            yield

    def run_cell(self, index: int) -> str:
        """Run one cell of the notebook: "", "crashed" or "timed_out"."""
        return self._run(self.notebook.cells[index], index)

    def run_probe(self, source: str) -> str:
        """Run the grader's own code, and leave no trace of it in the notebook."""
        probe = nbformat.v4.new_code_cell(source)
        self.notebook.cells.append(probe)
        try:
            return self._run(probe, len(self.notebook.cells) - 1)
        finally:
            self.notebook.cells.pop()

    def _run(self, cell: NotebookNode, index: int) -> str:
        if cell.cell_type != "code" or not cell.source.strip():
            return ""
        left = self._deadline - time.monotonic()
        if left <= 0:
            self.dead = TIMED_OUT
            return TIMED_OUT
        self.client.timeout = math.ceil(min(self.limits.cell, left))
        self._reply = None
        try:
            self.client.execute_cell(cell, index)
        except DeadKernelError:
            self.dead = CRASHED
            return CRASHED
        except CellExecutionComplete:
            return ""
        except Exception:
            # A kernel may send anything: unsigned, malformed, with missing parts; nbclient raises as many
            # kinds. Nothing that it says from here on can be believed.
            self.dead = TAMPERED
            return CRASHED
        content: Mapping[str, Any] = self._reply["content"] if self._reply else {}
        if content.get("status") != "error":
            return ""
        if content == {**_TIMED_OUT, "status": "error"}:  # nbclient's own reply; a kernel's has more fields
            return TIMED_OUT
        self.errors += 1
        return ""
