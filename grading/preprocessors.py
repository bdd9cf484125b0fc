"""What nbgrader's converters do differently here; `gradebook.settings` names these classes.

nbgrader keeps the cells, the gradebook and the marking page. It does not decide points: the judge's
validated float is written in their place, because a notebook can print whatever it likes.
"""

# nbformat and nbgrader are not annotated.
# mypy: allow-untyped-calls

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter, NotebookExporter
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.converters import Autograde, GenerateAssignment
from nbgrader.converters.base import NbGraderException
from nbgrader.exchange.default import ExchangeCollect
from nbgrader.plugins import LateSubmissionPlugin
from nbgrader.preprocessors import SaveAutoGrades
from nbgrader.preprocessors.base import NbGraderPreprocessor
from nbgrader.utils import is_solution, is_task
from traitlets import Float, HasTraits, Unicode
from traitlets.config import Config

from grading import feedback, gradebook, harmless, intake, notebooks, pipeline
from grading.fresh import Server
from grading.judge import find_lesson
from grading.records import read_records
from grading.run import Limits
from grading.score import Scorecard, score
from grading.workspace import Workspace
from robustkit.errors import RobustkitError

Resources = Any  # nbconvert's dictionary
CANARY_KEY = "robustkit_canary"


class InCourse(HasTraits):
    """What a converter of ours is told of the course's places."""

    solutions = Unicode(help="Folder of the source lessons").tag(config=True)
    course = Unicode(help="Folder of the released lessons").tag(config=True)
    submitted = Unicode(help="Folder of the submissions").tag(config=True)
    private = Unicode(help="Folder of the records, the feedback and the course secret").tag(config=True)

    def workspace(self, database: str) -> Workspace:
        """The course, with the gradebook at the URL that nbgrader uses."""
        return Workspace(
            Path(self.solutions), Path(self.course), Path(self.submitted), Path(self.private), database
        )


class ForLearners(NbGraderPreprocessor):
    """Takes out of a source notebook what a release must not carry: its canary, times, versions."""

    def preprocess(self, nb: NotebookNode, resources: Resources) -> tuple[NotebookNode, Resources]:
        nb.metadata.pop(CANARY_KEY, None)
        nb.metadata.get("language_info", {}).pop("version", None)
        for cell in nb.cells:
            cell.metadata.pop("execution", None)
        return nb, resources


class SafeRelease(InCourse, NotebookExporter):
    """Lets nbgrader's own generator run when it will succeed: it removes the old release first.

    `build` goes aside and swaps; the command `nbgrader generate_assignment` and formgrader's button do not.
    """

    def __init__(self, parent: GenerateAssignment, config: Config) -> None:
        super().__init__(config=config, parent=parent)
        places = parent.coursedir
        workspace = self.workspace(places.db_url if places else "")
        for folder in parent.assignments:
            try:
                gradebook.rehearse(workspace, Path(folder).name)
            except RobustkitError as error:
                raise NbGraderException(str(error)) from error


class CheckedSubmissions(NotebookExporter):
    """Takes the submissions that `intake.preflight` refuses off the autograder's list.

    nbgrader makes its exporter once it has that list, and before it copies the first folder, following links;
    it has no other place to stop a copy: it goes on when its pre-convert hook fails.
    """

    def __init__(self, parent: Autograde, config: Config) -> None:
        super().__init__(config=config, parent=parent)
        refused = {}
        for folder in parent.assignments:
            try:
                intake.preflight(Path(folder))
            except RobustkitError as error:
                refused[folder] = error
                parent.log.error("%s is not graded: %s", folder, error)
        parent.assignments = {
            folder: found for folder, found in parent.assignments.items() if folder not in refused
        }
        if not parent.assignments:
            raise NbGraderException("; ".join(map(str, refused.values())))


class CheckedCollect(ExchangeCollect):
    """Collects from the exchange what `intake.preflight` accepts. The exchange is the learners' to write to: by a
    link there, nbgrader would hand in somebody else's notebook, or a file of the grader's.
    """

    def do_copy(self, src: str, dest: str, log: object = None) -> None:
        with tempfile.TemporaryDirectory() as aside:
            copy = Path(aside, "submission")
            try:
                intake.copy_plain(Path(src), copy)
            except RobustkitError as error:
                self.log.error("%s is not collected: %s", src, error)
                return
            super().do_copy(str(copy), dest, log)


class RestoreCells(NbGraderPreprocessor):
    """Rebuilds a submission on the release before nbgrader looks at it.

    nbgrader alone stops the whole batch at a duplicated cell, and fails on missing metadata.
    """

    course = Unicode(help="Folder of the released lessons").tag(config=True)

    def preprocess(self, nb: NotebookNode, resources: Resources) -> tuple[NotebookNode, Resources]:
        name = resources["nbgrader"]["assignment"]
        release = notebooks.read_release(Path(self.course, name, f"{name}.ipynb"))
        restored, _ = notebooks.restore(nb, release)
        return restored, resources


class ShowJudged(InCourse, NbGraderPreprocessor):
    """Takes the verdicts and the outputs of a submission that the hops have been through."""

    def preprocess(self, nb: NotebookNode, resources: Resources) -> tuple[NotebookNode, Resources]:
        workspace = self.workspace(resources["nbgrader"]["db_url"])
        student, lesson = resources["nbgrader"]["student"], resources["nbgrader"]["assignment"]
        folder = workspace.hop(student, lesson)
        resources["scorecard"] = pipeline.conclude(
            workspace,
            read_records(folder / "records.json"),
            gradebook.manual_marks(workspace, student, lesson),
        )
        executed = nbformat.read(folder / "evidence" / "executed.ipynb", as_version=4)
        for cell, shown in zip(nb.cells, executed.cells, strict=True):
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = shown.outputs, shown.execution_count
        return nb, resources


class JudgedExecute(ShowJudged):
    """In place of nbgrader's Execute: runs the submission through the hops first."""

    tier = Unicode("smoke", help="Tier that submissions run in").tag(config=True)
    cell_seconds = Float(Limits.cell, help="Longest that a cell may run").tag(config=True)
    notebook_seconds = Float(Limits.notebook, help="Longest that a notebook may run").tag(config=True)
    sandbox = Unicode("auto", help="auto, bwrap, landlock, or none for submissions that you trust").tag(
        config=True
    )

    def preprocess(self, nb: NotebookNode, resources: Resources) -> tuple[NotebookNode, Resources]:
        workspace = self.workspace(resources["nbgrader"]["db_url"])
        student, lesson = (
            resources["nbgrader"]["student"],
            find_lesson(resources["nbgrader"]["assignment"]).id,
        )
        limits = Limits(self.cell_seconds, self.notebook_seconds)
        with Server() as server:
            pipeline.assess(
                workspace.submission(student, lesson),
                lesson,
                workspace.release(lesson),
                workspace.hop(student, lesson),
                student,
                workspace.secret,
                pipeline.Settings(self.tier, limits, self.sandbox),
                server,
            )
        return super().preprocess(nb, resources)


class HarmlessOutputs(NbGraderPreprocessor):
    """Leaves of what a submission printed what cannot act in a marker's browser."""

    def preprocess(self, nb: NotebookNode, resources: Resources) -> tuple[NotebookNode, Resources]:
        harmless.clean_outputs(nb)
        return nb, resources


class SaveJudgedGrades(SaveAutoGrades):
    """Writes the judge's points. A check cell without a verdict earns nothing."""

    gradebook: Gradebook

    def _add_score(self, cell: NotebookNode, resources: Resources) -> None:
        metadata = cell.metadata["nbgrader"]
        if is_solution(cell):
            super()._add_score(
                cell, resources
            )  # a written answer: nbgrader asks for a marker, or sees no response
            return
        card: Scorecard = resources["scorecard"]
        judged = {exercise.id: exercise.judged for exercise in card.exercises}
        self._settle(
            metadata["grade_id"], min(judged.get(metadata["grade_id"], 0.0), float(metadata["points"]))
        )

    def preprocess_cell(
        self, cell: NotebookNode, resources: Resources, cell_index: int
    ) -> tuple[NotebookNode, Resources]:
        if is_task(cell) and not cell.metadata["nbgrader"]["points"]:
            self._settle(cell.metadata["nbgrader"]["grade_id"], 0.0)  # a rubric: nothing to mark
        return super().preprocess_cell(cell, resources, cell_index)

    def _settle(self, grade_id: str, points: float) -> None:
        """Points that need no marker; a marker's own stay, and are looked at again as nbgrader does."""
        grade = self.gradebook.find_grade(grade_id, self.notebook_id, self.assignment_id, self.student_id)
        grade.auto_score = points  # type: ignore[assignment]  # a SQLAlchemy column
        grade.needs_manual_grade = grade.manual_score is not None  # type: ignore[assignment]
        self.gradebook.db.commit()


class LatePolicy(LateSubmissionPlugin):
    """Takes a share of the points for each day that was begun after the due date.

    Due dates and extensions are nbgrader's: set them in formgrader.
    """

    per_day = Float(0.0, help="Share of the points that a late day costs").tag(config=True)

    def late_submission_penalty(self, student_id: str, score: float, total_seconds_late: float) -> float:
        return min(1.0, self.per_day * math.ceil(total_seconds_late / 86_400)) * score


class FeedbackPage(InCourse, HTMLExporter):
    """What formgrader's "Generate feedback" makes: the learner's page of `feedback`, with the marks given by now.

    nbgrader's own page is the autograded notebook, mark schemes and all.
    """

    def from_filename(  # type: ignore[override]  # nbconvert: text for this kind of exporter
        self, filename: str, resources: Resources = None, **_: object
    ) -> tuple[str, Resources]:
        workspace = self.workspace(resources["nbgrader"]["db_url"])
        student, lesson = resources["nbgrader"]["student"], resources["nbgrader"]["assignment"]
        verdicts = read_records(workspace.hop(student, lesson) / "records.json")
        card = score(verdicts, gradebook.manual_marks(workspace, student, lesson))
        return feedback.render(card), {**resources, "output_extension": ".html"}
