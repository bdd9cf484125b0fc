"""nbgrader behind a few functions: its settings for a workspace, its generator, its autograder, its database."""

# nbformat and nbgrader are not annotated.
# mypy: allow-untyped-calls

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import nbgrader
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.apps.api import NbGraderAPI
from sqlalchemy import create_engine, inspect
from sqlalchemy.exc import SAWarning, SQLAlchemyError
from traitlets.config import Config

from grading import notebooks
from grading.pipeline import Settings
from grading.sandbox import leftovers
from grading.workspace import Workspace
from robustkit.errors import RobustkitError
from robustkit.lessons import LESSONS

COURSE_ID = "robustkit"

_EXECUTES = "grading.preprocessors.JudgedExecute"
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
    c.CourseDirectory.db_url = workspace.gradebook_url
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
        _EXECUTES,
        f"{ours}.HarmlessOutputs",
        f"{theirs}.LimitOutput",
        f"{ours}.SaveJudgedGrades",
        *(f"{theirs}.{name}" for name in ("AssignLatePenalties", "CheckCellMetadata")),
    ]
    c.AssignLatePenalties.plugin_class = f"{ours}.LatePolicy"
    c.LatePolicy.per_day = _late_per_day()
    c.Autograde.exporter_class = f"{ours}.CheckedSubmissions"
    c.GenerateAssignment.exporter_class = f"{ours}.SafeRelease"
    c.HTMLExporter.filters = {"markdown2html": "grading.harmless.markdown"}  # what formgrader shows
    c.GenerateFeedback.exporter_class = f"{ours}.FeedbackPage"
    c.GenerateFeedback.preprocessors = []
    c.RestoreCells.course = str(workspace.course.resolve())
    for name in ("ShowJudged", "FeedbackPage", "SafeRelease"):
        for folder in ("solutions", "course", "submitted", "private"):
            c[name][folder] = str(getattr(workspace, folder).resolve())
    c.JudgedExecute.tier = how.tier
    c.JudgedExecute.cell_seconds = float(how.limits.cell)
    c.JudgedExecute.notebook_seconds = float(how.limits.notebook)
    c.JudgedExecute.sandbox = how.sandbox
    return c


@contextmanager
def opened(workspace: Workspace) -> Iterator[Gradebook]:
    """The gradebook; made where there is none yet.

    Raises: RobustkitError when there is no database at its URL, or one that this nbgrader cannot use.
    """
    _find_alembic()
    try:
        revision, used = _schema(workspace.gradebook_url)
        if used and revision != _head():
            raise RobustkitError(
                f"the gradebook has the tables of another nbgrader ({revision}, this one uses {_head()}); "
                "back it up, then run: nbgrader db upgrade."
            )
        book = Gradebook(workspace.gradebook_url, COURSE_ID)
    except (SQLAlchemyError, ModuleNotFoundError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise RobustkitError(
            f"the gradebook cannot be opened ({reason}); start its database, or correct ROBUSTKIT_GRADEBOOK, "
            "such as postgresql://user:password@host/name."
        ) from error
    with book:
        yield book


def _schema(url: str) -> tuple[str | None, bool]:
    """The revision of the tables at `url`, and whether there are any. Nothing is changed there."""
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision(), bool(
                inspect(connection).get_table_names()
            )
    finally:
        engine.dispose()


@cache
def _head() -> str | None:
    """The revision that the installed nbgrader uses."""
    return ScriptDirectory(str(Path(nbgrader.__file__).parent / "alembic")).get_current_head()


def generate(workspace: Workspace, lesson: str, release: Path, database: str | None) -> Path:
    """nbgrader's generator: the lesson's source into the folder `release`, its cells into `database`, if any.

    Raises: RobustkitError with nbgrader's reason, or when the gradebook cannot be opened.
    """
    if not workspace.source(lesson).is_file():
        raise RobustkitError(
            f"{workspace.source(lesson)} does not exist; choose a lesson that stands in solutions/."
        )
    release.mkdir(parents=True, exist_ok=True)
    aside = replace(workspace, course=release)
    config = settings(aside)
    del config.GenerateAssignment.exporter_class  # this is the rehearsal
    if database is None:
        config.GenerateAssignment.no_database = True
        config.GenerateAssignment.preprocessors.remove(_SAVES_CELLS)
    else:
        config.CourseDirectory.db_url = database
        with opened(replace(workspace, database=database)):
            pass  # said here in one sentence, in nbgrader's log otherwise
    result = _api(aside, config).generate_assignment(lesson, force=True, create=True)
    if not result["success"]:
        raise RobustkitError(
            f"nbgrader cannot generate {lesson} ({_reason(result)}); correct solutions/{lesson}."
        )
    return release / lesson / f"{lesson}.ipynb"


def rehearse(workspace: Workspace, lesson: str) -> None:
    """Generate the lesson aside, and compare its cells with the gradebook's; nothing is kept.

    Raises: RobustkitError when nbgrader would fail to generate it.
    """
    with leftovers.run_folder() as aside:
        made = notebooks.read_release(generate(workspace, lesson, aside, None))
    names = {notebooks.grade_id(cell) for cell in made.cells} - {""}
    if not _made(workspace):
        return
    with opened(workspace) as book:
        try:
            known = book.find_notebook(lesson, lesson)
        except MissingEntry:
            return
        kinds = (known.grade_cells, known.solution_cells, known.task_cells, known.source_cells)
        if known.submissions and names != {str(cell.name) for cells in kinds for cell in cells}:
            raise RobustkitError(
                f"Cannot add or remove cells of {lesson}: submissions to it are in the gradebook; "
                "release the new one as a lesson of its own."
            )


def register(workspace: Workspace, lesson: str) -> None:
    """Put the lesson's cells into the gradebook; the release stays as it is."""
    workspace.private.mkdir(parents=True, exist_ok=True)
    with leftovers.run_folder(workspace.private) as aside:
        generate(workspace, lesson, aside, workspace.gradebook_url)


def enter(workspace: Workspace, lesson: str, student: str) -> None:
    """nbgrader's autograder for one submission that was judged; nothing is run.

    Raises: RobustkitError with the reason.
    """
    config = settings(workspace)
    ours = config.Autograde.autograde_preprocessors
    ours[ours.index(_EXECUTES)] = "grading.preprocessors.ShowJudged"
    with warnings.catch_warnings():
        # nbgrader 0.9.6 adds its rows in an order that SQLAlchemy 2.1 remarks on; they are all stored.
        warnings.filterwarnings("ignore", "Object of type .* not in session", SAWarning)
        result = _api(workspace, config).autograde(lesson, student, force=True, create=True)
    if not result["success"]:
        raise RobustkitError(_reason(result))


def record_refusal(workspace: Workspace, lesson: str, student: str) -> None:
    """Zero for every cell of a submission that could not be run; a marker's points stay."""
    with opened(workspace) as book:
        book.update_or_create_student(student)
        submission = book.update_or_create_submission(lesson, student)
        for notebook in submission.notebooks:
            for grade in notebook.grades:
                grade.auto_score, grade.needs_manual_grade = 0.0, False
        book.db.commit()


def manual_marks(workspace: Workspace, student: str, lesson: str) -> Mapping[str, float]:
    """The points that a marker gave in formgrader, by grade_id; 0 for a written answer that was left empty."""
    if not _made(workspace):
        return {}
    with opened(workspace) as book:
        try:
            submission = book.find_submission(lesson, student)
        except MissingEntry:
            return {}
        grades = [grade for notebook in submission.notebooks for grade in notebook.grades]
        written = {answer.id for answer in LESSONS[lesson].written}
        empty = {grade.name: 0.0 for grade in grades if grade.name in written and grade.auto_score == 0}
        given = {grade.name: float(grade.manual_score) for grade in grades if grade.manual_score is not None}
        return empty | given


def submissions(workspace: Workspace) -> set[tuple[str, str]]:
    """Lesson and student of every submission that the gradebook has."""
    return {(row.lesson, row.student) for row in rows(workspace)}


def rows(workspace: Workspace) -> list[Row]:
    """Every graded submission in the gradebook, by lesson and student."""
    if not _made(workspace):
        return []
    with opened(workspace) as book:
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


def _made(workspace: Workspace) -> bool:
    """Whether anything can be in the gradebook: to ask is not to make one."""
    return bool(workspace.database) or workspace.gradebook.exists()


def _late_per_day() -> float:
    """ROBUSTKIT_LATE_PER_DAY. Raises: RobustkitError when it is no share."""
    given = os.environ.get("ROBUSTKIT_LATE_PER_DAY", "0")
    try:
        share = float(given)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise RobustkitError(
            f"ROBUSTKIT_LATE_PER_DAY is {given!r}; it is the share of the points that a late day costs, such as 0.1."
        )
    return share


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
