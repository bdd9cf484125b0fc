"""nbgrader behind a few functions: its settings for a workspace, its generator, its autograder, its database."""

# nbformat and nbgrader are not annotated.
# mypy: allow-untyped-calls

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nbgrader.api import Gradebook, MissingEntry
from nbgrader.apps.api import NbGraderAPI
from sqlalchemy.exc import SAWarning
from traitlets.config import Config

from grading.pipeline import Settings
from grading.workspace import Workspace
from robustkit.errors import RobustkitError
from robustkit.lessons import LESSONS

COURSE_ID = "robustkit"

_SAVES_CELLS = "nbgrader.preprocessors.SaveCells"  # the one preprocessor that needs the database


@dataclass(frozen=True)
class Row:
    """The gradebook's line for one submission."""

    student: str
    last_name: str
    first_name: str
    lesson: str
    auto: float
    manual: float  # points that a marker gave, in place of or beside the judge's
    penalty: float
    points: float
    maximum: float
    needs_marking: bool


def settings(workspace: Workspace, how: Settings | None = None) -> Config:
    """nbgrader's configuration for `workspace`; the same one serves the command, formgrader and `grade`."""
    how = how or Settings()
    _find_alembic()
    folders = [workspace.solutions, workspace.course, workspace.submitted, workspace.private]
    root = Path(os.path.commonpath([str(folder.resolve()) for folder in folders]))
    c = Config()
    c.CourseDirectory.root = str(root)
    c.CourseDirectory.course_id = COURSE_ID
    c.CourseDirectory.source_directory = _below(root, workspace.solutions)
    c.CourseDirectory.release_directory = _below(root, workspace.course)
    c.CourseDirectory.submitted_directory = _below(root, workspace.submitted)
    c.CourseDirectory.autograded_directory = _below(root, workspace.autograded)
    c.CourseDirectory.feedback_directory = _below(root, workspace.feedback)
    c.CourseDirectory.db_url = _url(workspace.gradebook)
    # A learner's numpy.py must not travel with her notebook.
    c.CourseDirectory.ignore = [".ipynb_checkpoints", "*.pyc", "__pycache__", ".pytest_cache", "*.py"]
    c.Exchange.root = str(workspace.private.resolve() / "exchange")
    ours = "grading.preprocessors"
    c.ExchangeFactory.collect = f"{ours}.CheckedCollect"
    theirs = "nbgrader.preprocessors"
    c.GenerateAssignment.preprocessors = [
        f"{ours}.ForLearners",
        *(
            f"{theirs}.{name}"
            for name in (
                *("IncludeHeaderFooter", "LockCells", "ClearSolutions", "ClearOutput", "CheckCellMetadata"),
                *("ComputeChecksums", "SaveCells", "ClearHiddenTests", "ClearMarkScheme"),
                *("ComputeChecksums", "CheckCellMetadata"),
            )
        ),
    ]
    c.Autograde.sanitize_preprocessors = [
        f"{ours}.RestoreCells",
        *(f"{theirs}.{name}" for name in ("OverwriteKernelspec", "OverwriteCells", "CheckCellMetadata")),
    ]
    c.Autograde.autograde_preprocessors = [
        f"{ours}.JudgedExecute",
        f"{theirs}.LimitOutput",
        f"{ours}.SaveJudgedGrades",
        *(f"{theirs}.{name}" for name in ("AssignLatePenalties", "CheckCellMetadata")),
    ]
    c.Autograde.exporter_class = f"{ours}.CheckedSubmissions"
    c.GenerateFeedback.exporter_class = f"{ours}.FeedbackPage"
    c.GenerateFeedback.preprocessors = []
    c.RestoreCells.course = str(workspace.course.resolve())
    for name in ("JudgedExecute", "FeedbackPage"):
        for folder in ("solutions", "course", "submitted", "private"):
            c[name][folder] = str(getattr(workspace, folder).resolve())
    c.JudgedExecute.tier = how.tier
    c.JudgedExecute.cell_seconds = float(how.limits.cell)
    c.JudgedExecute.notebook_seconds = float(how.limits.notebook)
    c.JudgedExecute.sandbox = how.sandbox
    return c


def generate(workspace: Workspace, lesson: str, release: Path, database: Path | None) -> Path:
    """nbgrader's generator: the lesson's source into the folder `release`, its cells into `database`, if any.

    Raises: RobustkitError with nbgrader's reason.
    """
    if not workspace.source(lesson).is_file():
        raise RobustkitError(
            f"{workspace.source(lesson)} does not exist; choose a lesson that stands in solutions/."
        )
    release.mkdir(parents=True, exist_ok=True)
    aside = replace(workspace, course=release)
    config = settings(aside)
    if database is None:
        config.GenerateAssignment.no_database = True
        config.GenerateAssignment.preprocessors.remove(_SAVES_CELLS)
    else:
        config.CourseDirectory.db_url = _url(database)
    result = _api(aside, config).generate_assignment(lesson, force=True, create=True)
    if not result["success"]:
        raise RobustkitError(
            f"nbgrader cannot generate {lesson} ({_reason(result)}); correct solutions/{lesson}."
        )
    return release / lesson / f"{lesson}.ipynb"


def register(workspace: Workspace, lesson: str) -> None:
    """Put the lesson's cells into the gradebook; the release stays as it is."""
    workspace.private.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rk-", dir=workspace.private) as aside:
        generate(workspace, lesson, Path(aside), workspace.gradebook)


def autograde(workspace: Workspace, lesson: str, student: str, how: Settings) -> None:
    """nbgrader's autograder for one student, with our preprocessors. Raises: RobustkitError with the reason."""
    with warnings.catch_warnings():
        # nbgrader 0.9.6 adds its rows in an order that SQLAlchemy 2.1 remarks on; they are all stored.
        warnings.filterwarnings("ignore", "Object of type .* not in session", SAWarning)
        result = _api(workspace, settings(workspace, how)).autograde(lesson, student, force=True, create=True)
    if not result["success"]:
        raise RobustkitError(_reason(result))


def record_refusal(workspace: Workspace, lesson: str, student: str) -> None:
    """Zero for every cell of a submission that could not be run; a marker's points stay."""
    with Gradebook(_url(workspace.gradebook), COURSE_ID) as book:
        book.update_or_create_student(student)
        submission = book.update_or_create_submission(lesson, student)
        for notebook in submission.notebooks:
            for grade in notebook.grades:
                grade.auto_score, grade.needs_manual_grade = 0.0, False
        book.db.commit()


def manual_marks(workspace: Workspace, student: str, lesson: str) -> Mapping[str, float]:
    """The points that a marker gave in formgrader, by grade_id; 0 for a written answer that was left empty."""
    if not workspace.gradebook.exists():
        return {}
    with Gradebook(_url(workspace.gradebook), COURSE_ID) as book:
        try:
            submission = book.find_submission(lesson, student)
        except MissingEntry:
            return {}
        grades = [grade for notebook in submission.notebooks for grade in notebook.grades]
        written = {answer.id for answer in LESSONS[lesson].written}
        empty = {grade.name: 0.0 for grade in grades if grade.name in written and grade.auto_score == 0}
        given = {grade.name: float(grade.manual_score) for grade in grades if grade.manual_score is not None}
        return empty | given


def rows(workspace: Workspace) -> list[Row]:
    """Every graded submission in the gradebook, by lesson and student."""
    if not workspace.gradebook.exists():
        return []
    with Gradebook(_url(workspace.gradebook), COURSE_ID) as book:
        found = [
            Row(
                submission.student.id,
                submission.student.last_name or "",
                submission.student.first_name or "",
                str(assignment.name),
                sum(
                    grade.auto_score or 0.0 for notebook in submission.notebooks for grade in notebook.grades
                ),
                sum(
                    grade.manual_score or 0.0
                    for notebook in submission.notebooks
                    for grade in notebook.grades
                ),
                float(submission.late_submission_penalty or 0.0),
                float(submission.score) - float(submission.late_submission_penalty or 0.0),
                float(submission.max_score),
                bool(submission.needs_manual_grade),
            )
            for assignment in book.assignments
            for submission in assignment.submissions
        ]
    return sorted(found, key=lambda row: (row.lesson, row.student))


def _find_alembic() -> None:
    """nbgrader starts `alembic` by name for a new database: make it found in an environment nobody activated."""
    tools = str(Path(sys.executable).parent)
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([tools, os.environ.get("PATH", os.defpath)])


def _api(workspace: Workspace, config: Config) -> NbGraderAPI:
    (workspace.private / "exchange").mkdir(
        parents=True, exist_ok=True
    )  # nbgrader complains when there is none
    return NbGraderAPI(config=config, log_level=logging.ERROR)


def _reason(result: Mapping[str, str]) -> str:
    """The sentence in nbgrader's log or traceback that says what was wrong."""
    lines = [line.strip() for line in f"{result.get('log', '')}\n{result.get('error', '')}".splitlines()]
    raised = [
        line.split(": ", 1)[1]
        for line in lines
        if ": " in line and line.split(": ", 1)[0].endswith(("Error", "Exception"))
    ]
    own = [line for line in raised if not line.startswith("Please see the")]
    return (own or raised or ["no reason given"])[0][:300]


def _below(root: Path, folder: Path) -> str:
    """A folder as nbgrader wants it: relative, so that its patterns hold, unless nothing is in common."""
    return str(folder.resolve()) if root == Path(root.anchor) else os.path.relpath(folder.resolve(), root)


def _url(database: Path) -> str:
    return f"sqlite:///{database.resolve()}"
