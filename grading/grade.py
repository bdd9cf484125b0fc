"""Grade a class: every submission through the hops and into the gradebook, whatever some of them do."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from grading import gradebook, intake, judge, notebooks, pipeline, records, sandbox
from grading.crew import Crew, results
from grading.files import read_plain
from grading.pipeline import Settings, Task
from grading.progress import Table
from grading.sandbox import leftovers
from grading.score import Scorecard, read_scorecard
from grading.workspace import Workspace, check_student, course_secret
from robustkit.errors import RobustkitError
from robustkit.lessons import LESSONS


@dataclass(frozen=True)
class Graded:
    """What became of one submission: its scorecard, and what was wrong with it, if anything."""

    student: str
    lesson: str
    card: Scorecard | None
    problem: str

    def __str__(self) -> str:
        points = f"{self.card.points:g} of {self.card.maximum:g} points" if self.card else "not graded"
        return f"{self.student}, {self.lesson}: {points}" + (f"; {self.problem}" if self.problem else "")


def lessons_in(workspace: Workspace, lesson: str | None) -> list[str]:
    """The one lesson asked for, or all that anything was submitted to.

    Raises: RobustkitError when it is unknown, or there is nothing to grade.
    """
    chosen = [judge.find_lesson(lesson).id] if lesson else list(LESSONS)
    found = [name for name in chosen if students(workspace, name)]
    if not found:
        raise RobustkitError(
            f"{workspace.submitted} holds no submission to {', '.join(chosen)}; "
            "put notebooks into STUDENT/LESSON/LESSON.ipynb there."
        )
    return found


def students(workspace: Workspace, lesson: str) -> list[str]:
    """Who handed in a folder for the lesson."""
    return sorted(path.parent.name for path in workspace.submitted.glob(f"*/{lesson}") if path.is_dir())


def grade(workspace: Workspace, lessons: Sequence[str], settings: Settings, crew: Crew) -> list[Graded]:
    """Grade every submission to `lessons`: the crew runs and judges them, this process alone writes scorecards,
    feedback pages and the gradebook.

    A submission that cannot be run gets zero points and one sentence, and the others are graded. One that was
    graded before, from the same notebook with the same release, secret and settings, is not run again: a killed
    class goes on where it was, and late submissions cost only themselves; `forget` has all of them graded again.
    Raises: RobustkitError when a lesson has no release or cannot be entered in the gradebook, when another
    grader is at this class, and when the crew is gone.
    """
    todo = [(lesson, student) for lesson in lessons for student in students(workspace, lesson)]
    graded: dict[tuple[str, str], Graded] = {}
    with _alone(workspace), Table(len(todo)) as table:
        sandbox.sweep()
        leftovers.sweep_folders(workspace.private)
        for lesson in lessons:
            notebooks.read_release(workspace.release(lesson))
            gradebook.register(workspace, lesson)
        there = gradebook.submissions(workspace)

        def finish(outcome: Graded) -> None:
            graded[outcome.lesson, outcome.student] = outcome
            table.finished(outcome.student, outcome.lesson, str(outcome))

        def tasks() -> Iterator[Task]:
            for lesson, student in todo:
                task = _admit(workspace, lesson, student, settings)
                if isinstance(task, Graded):
                    finish(task)
                elif (stage := pipeline.stage(workspace, task)) is None:
                    yield task
                elif stage == pipeline.ENTERED and (lesson, student) in there:
                    finish(_conclude(workspace, task))
                else:
                    finish(_enter(workspace, task))

        def told(task: Task, line: str) -> None:
            table.told(task.student, task.lesson, line)

        for task, files in results(crew, tasks(), told, table.draw):
            if isinstance(
                files, RobustkitError
            ):  # ours, not the learner's: no points are written, nothing is lost
                finish(Graded(task.student, task.lesson, None, f"{files} Grade it again."))
            else:
                pipeline.keep(workspace, task, files)
                finish(_enter(workspace, task))
    return [graded[each] for each in todo]


def forget(workspace: Workspace, lessons: Sequence[str]) -> None:
    """Have every submission to `lessons` run again by the next `grade`; until then its records stay."""
    for lesson in lessons:
        for student in students(workspace, lesson):
            pipeline.unstamp(workspace.hop(student, lesson))


def _admit(workspace: Workspace, lesson: str, student: str, settings: Settings) -> Task | Graded:
    """The task that a submission is, or, where it cannot be run, its zero."""
    try:
        check_student(student)
    except RobustkitError as error:
        return Graded(student, lesson, None, str(error))
    path = workspace.submission(student, lesson)
    try:
        intake.preflight(path.parent)
        content = read_plain(path, notebooks.MOST_BYTES)
        submitted = notebooks.parse_submission(content, path.name)
        notebooks.restore(submitted, notebooks.read_release(workspace.release(lesson)))
    except RobustkitError as error:
        card = pipeline.refuse(workspace, student, LESSONS[lesson], settings.tier, str(error))
        gradebook.record_refusal(workspace, lesson, student)
        return Graded(student, lesson, card, str(error))
    release, secret = workspace.release(lesson).read_bytes(), course_secret(workspace.secret)
    return Task(student, lesson, settings, content, release, secret)


def _enter(workspace: Workspace, task: Task) -> Graded:
    """Put a judged submission into the gradebook."""
    try:
        gradebook.enter(workspace, task.lesson, task.student)
        # Only now does the gradebook know which written answers were left empty.
        graded = _conclude(workspace, task)
        pipeline.stamp(workspace, task, pipeline.ENTERED)
        return graded
    except RobustkitError as error:
        return Graded(task.student, task.lesson, None, f"{error} Grade it again.")


def _conclude(workspace: Workspace, task: Task) -> Graded:
    """Score a submission that is in the gradebook, with the marks given by now."""
    verdicts = records.read_records(workspace.hop(task.student, task.lesson) / "records.json")
    marks = gradebook.manual_marks(workspace, task.student, task.lesson)
    return Graded(task.student, task.lesson, pipeline.conclude(workspace, verdicts, marks), "")


@contextmanager
def _alone(workspace: Workspace) -> Iterator[None]:
    """No second grader at the same class: two would enter the same submissions. The lock ends with the process.

    Raises: RobustkitError when there is one.
    """
    workspace.records.mkdir(parents=True, exist_ok=True)
    with (workspace.records / ".lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RobustkitError(
                f"another grader is at work in {workspace.records}; wait for it, or stop it first."
            ) from error
        yield


def regrade(workspace: Workspace) -> list[Graded]:
    """Replay every records.json with the marks that formgrader has by now. Runs no notebook."""
    graded = []
    for path in _records(workspace):
        try:
            verdicts = records.read_records(path)
            marks = gradebook.manual_marks(workspace, verdicts.student, verdicts.lesson)
            graded.append(
                Graded(verdicts.student, verdicts.lesson, pipeline.conclude(workspace, verdicts, marks), "")
            )
        except RobustkitError as error:
            graded.append(Graded(path.parent.parent.name, path.parent.name, None, str(error)))
    return graded


def scorecards(workspace: Workspace) -> list[Scorecard]:
    """Every stored scorecard, by lesson and student.

    Raises: RobustkitError when there is none, or one is unreadable.
    """
    cards = [read_scorecard(path.with_name("scorecard.json")) for path in _records(workspace)]
    if not cards:
        raise RobustkitError(
            f"{workspace.records} holds no scorecard; grade something first: python -m grading class grade."
        )
    return sorted(cards, key=lambda card: (card.lesson, card.student))


def _records(workspace: Workspace) -> list[Path]:
    return sorted(workspace.records.glob("*/*/records.json"))
