"""The hops of one submission in a row: run, judge, score, feedback. Files stay between them."""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from grading import feedback, judge, records
from grading.fresh import Server, Told, unheard
from grading.run import Limits
from grading.sandbox import leftovers
from grading.score import Scorecard, score, write_scorecard
from grading.workspace import Workspace
from robustkit import __version__
from robustkit.errors import RobustkitError
from robustkit.files import write_atomically
from robustkit.lessons import Lesson

ATTEMPTS = 3  # at a submission whose run or judge fails
Files = Mapping[str, bytes]  # evidence and records, by their path in the folder of one submission
JUDGED, ENTERED = "judged", "entered"  # stages of a task; the gradebook is the last
_STAMP = "graded.json"


@dataclass(frozen=True)
class Settings:
    """How submissions are run."""

    tier: str = "smoke"
    limits: Limits = field(default_factory=Limits)
    sandbox: str = "auto"  # a tier of grading.sandbox; "none" for submissions that the instructor trusts


@dataclass(frozen=True)
class Task:
    """One submission with all that it takes to run and judge it, on whatever machine."""

    student: str
    lesson: str
    settings: Settings
    notebook: bytes
    release: bytes
    secret: bytes = field(repr=False)

    @property
    def identity(self) -> str:
        """The same for two tasks that have the same verdicts, chance and the machine aside."""
        about = [self.student, self.lesson, asdict(self.settings), __version__]
        parts = [json.dumps(about).encode(), self.notebook, self.release]
        digests = b"".join(hashlib.sha256(part).digest() for part in parts)
        return hmac.digest(self.secret, digests, hashlib.sha256).hex()


def assess(
    notebook: Path,
    lesson: str,
    release: Path,
    into: Path,
    student: str,
    secret: Path,
    settings: Settings,
    server: Server,
    told: Told = unheard,
) -> records.Records:
    """Run and judge one notebook, each in a fresh process; evidence and records.json are written into `into`.

    Raises: RobustkitError when the notebook cannot be graded at all.
    """
    into = into.resolve()
    limits = settings.limits
    unstamp(into)
    (into / "records.json").unlink(missing_ok=True)
    server.hop(
        "run",
        *(notebook.resolve(), "-o", into / "evidence"),
        *(f"--student={student}", "--lesson", lesson),
        *("--release", release.resolve(), "--secret", secret.resolve()),
        *("--tier", settings.tier, "--sandbox", settings.sandbox),
        *("--cell-seconds", str(limits.cell), "--notebook-seconds", str(limits.notebook)),
        *("--output-bytes", str(limits.output_bytes)),
        told=told,
    )
    told("judging")
    server.hop("judge", into / "evidence", "-o", into / "records.json", "--secret", secret.resolve())
    return records.read_records(into / "records.json")


def carry_out(task: Task, server: Server, told: Told = unheard) -> Files:
    """Assess a task in a folder that passes; what the folder then holds.

    Whatever a learner's code does is in the verdicts. What fails beyond that, a process that is killed, is tried
    again. Raises: RobustkitError when it failed `ATTEMPTS` times.
    """
    for _ in range(ATTEMPTS):
        with leftovers.run_folder() as folder:
            given = {"notebook": task.notebook, "release": task.release, "secret": task.secret}
            for name, content in given.items():
                (folder / name).touch(mode=0o600)
                (folder / name).write_bytes(content)
            try:
                told("starting")
                assess(
                    folder / "notebook",
                    task.lesson,
                    folder / "release",
                    folder / "hop",
                    task.student,
                    folder / "secret",
                    task.settings,
                    server,
                    told,
                )
            except RobustkitError as error:
                reason = error
                continue
            return {
                path.relative_to(folder / "hop").as_posix(): path.read_bytes()
                for path in sorted((folder / "hop").rglob("*"))
                if path.is_file()
            }
    raise RobustkitError(f"{reason} It was tried {ATTEMPTS} times.")


def keep(workspace: Workspace, task: Task, files: Files) -> None:
    """Write what a task has come to into its folder, in place of what an earlier one had."""
    folder = workspace.hop(task.student, task.lesson)
    unstamp(folder)
    shutil.rmtree(folder / "evidence", ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, content)
    stamp(workspace, task, JUDGED)


def stamp(workspace: Workspace, task: Task, stage: str) -> None:
    """Note that what lies in the task's folder is whole, is this task's, and how far it has come."""
    content = json.dumps({"task": task.identity, "stage": stage}).encode()
    write_atomically(workspace.hop(task.student, task.lesson) / _STAMP, content)


def stage(workspace: Workspace, task: Task) -> str | None:
    """How far the task has come before: `JUDGED`, `ENTERED`, or None where nothing whole of it is there."""
    try:
        found = json.loads((workspace.hop(task.student, task.lesson) / _STAMP).read_bytes())
    except (OSError, ValueError):
        return None
    return str(found["stage"]) if found["task"] == task.identity else None


def unstamp(folder: Path) -> None:
    """What lies in the folder may be half of something from here on."""
    (folder / _STAMP).unlink(missing_ok=True)


def conclude(workspace: Workspace, verdicts: records.Records, manual: Mapping[str, float]) -> Scorecard:
    """Score the verdicts; write scorecard.json and the feedback page."""
    card = score(verdicts, manual)
    write_scorecard(workspace.hop(card.student, card.lesson) / "scorecard.json", card)
    feedback.write_page(card, workspace.page(card.student, card.lesson))
    return card


def refuse(workspace: Workspace, student: str, lesson: Lesson, tier: str, reason: str) -> Scorecard:
    """The zero of a submission that could not be run, with the reason on every page."""
    unstamp(workspace.hop(student, lesson.id))
    verdicts = judge.refused(student, lesson, tier, reason)
    records.write(workspace.hop(student, lesson.id) / "records.json", verdicts)
    return conclude(workspace, verdicts, {})
