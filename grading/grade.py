"""Grade a class: every submission through the hops and into the gradebook, whatever some of them do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from grading import gradebook, intake, judge, notebooks, pipeline, records
from grading.pipeline import Settings
from grading.score import Scorecard, read_scorecard
from grading.workspace import Workspace, check_student
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


def grade(workspace: Workspace, lessons: Sequence[str], settings: Settings) -> list[Graded]:
    """Grade every submission to `lessons`: scorecards, feedback pages, gradebook. One progress line each.

    A submission that cannot be run gets zero points and one sentence, and the others are graded.
    Raises: RobustkitError when a lesson has no release or cannot be entered in the gradebook.
    """
    todo = [(lesson, student) for lesson in lessons for student in students(workspace, lesson)]
    for lesson in lessons:
        notebooks.read_release(workspace.release(lesson))
        gradebook.register(workspace, lesson)
    graded = []
    with tqdm(todo, desc="grading", unit="submission") as progress:
        for lesson, student in progress:
            graded.append(grade_one(workspace, lesson, student, settings))
            progress.write(str(graded[-1]), file=progress.fp)
    return graded


def grade_one(workspace: Workspace, lesson_id: str, student: str, settings: Settings) -> Graded:
    """Grade one submission; never raises RobustkitError, so that a batch goes on."""
    lesson = LESSONS[lesson_id]
    try:
        check_student(student)
    except RobustkitError as error:
        return Graded(student, lesson_id, None, str(error))
    notebook = workspace.submission(student, lesson_id)
    try:
        intake.preflight(notebook.parent)
        submitted, _ = notebooks.read_submission(notebook)
        notebooks.restore(submitted, notebooks.read_release(workspace.release(lesson_id)))
    except RobustkitError as error:
        card = pipeline.refuse(workspace, student, lesson, settings.tier, str(error))
        gradebook.record_refusal(workspace, lesson_id, student)
        return Graded(student, lesson_id, card, str(error))
    try:
        gradebook.autograde(workspace, lesson_id, student, settings)
        verdicts = records.read_records(workspace.hop(student, lesson_id) / "records.json")
        # Only now does the gradebook know which written answers were left empty.
        marks = gradebook.manual_marks(workspace, student, lesson_id)
        return Graded(student, lesson_id, pipeline.conclude(workspace, verdicts, marks), "")
    except RobustkitError as error:  # ours, not the learner's: no points are written, nothing is lost
        return Graded(student, lesson_id, None, f"{error} Grade it again.")


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
            f"{workspace.records} holds no scorecard; grade something first: python -m grading grade."
        )
    return sorted(cards, key=lambda card: (card.lesson, card.student))


def _records(workspace: Workspace) -> list[Path]:
    return sorted(workspace.records.glob("*/*/records.json"))
