"""The whole path in one command: build lesson 1, check its reference solution, grade four submissions, report."""

# nbformat is not annotated.
# mypy: allow-untyped-calls

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from grading import build, class_report, crew, export, grade, gradebook, notebooks, pipeline
from grading.fresh import Server
from grading.pipeline import Settings
from grading.score import score
from grading.workspace import DEMO_SECRET, ROOT, Workspace
from robustkit.errors import RobustkitError
from robustkit.lessons import LESSONS

LESSON = "01-mnist-fgsm"
REFERENCE = "reference solution"

_MARKER = ".robustkit-demo"
EXAMPLES = Path(__file__).parent / "examples"
_CELL = re.compile(r"^## (\w+)\n+```(?:python|markdown)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Line:
    """One line of the demo's table."""

    submission: str
    points: float
    maximum: float
    to_mark: float  # points that wait for a marker
    missed: str


def demo(out: Path) -> list[Line]:
    """Run the demo in the folder `out`, which is the demo's own; the instructor's files stay as they are.

    The cases are drawn from a fixed secret, so that the table is the same everywhere. Raises:
    RobustkitError when `out` is something else's folder, or the lesson cannot be built.
    """
    _claim(out)
    workspace = Workspace(ROOT / "solutions", out / "course", out / "submitted", out)
    workspace.secret.write_bytes(DEMO_SECRET)
    lesson = LESSONS[LESSON]
    _say(f"1/4 building {LESSON} for learners")
    build.build(workspace, [LESSON])
    for student, notebook in submissions(workspace).items():
        path = workspace.submission(student, LESSON)
        path.parent.mkdir(parents=True)
        nbformat.write(notebook, path)
    _say("2/4 executing and judging the reference solution, meanwhile")
    _say("3/4 grading four submissions")
    with Server() as server, crew.here(server, 1) as one, ThreadPoolExecutor(1) as meanwhile:
        source, release, aside = workspace.source(LESSON), workspace.release(LESSON), out / "reference"
        checked = meanwhile.submit(
            pipeline.assess, source, LESSON, release, aside, REFERENCE, workspace.secret, Settings(), server
        )
        graded = grade.grade(workspace, [LESSON], Settings(), one)
        reference = score(checked.result(), {})
    _say("4/4 writing the class report and the grades")
    class_report.write_page(grade.scorecards(workspace), out / "class.html")
    export.write_csv(gradebook.rows(workspace), out / "grades.csv")
    cards = [reference, *(outcome.card for outcome in graded if outcome.card)]
    lines = [
        Line(
            card.student,
            card.autograded,
            card.autograded_maximum,
            sum(answer.maximum for answer in card.pending),
            class_report.missed(card),
        )
        for card in cards
    ]
    return lines + [Line(o.student, 0.0, lesson.autograded, 0.0, o.problem) for o in graded if o.card is None]


def submissions(workspace: Workspace) -> dict[str, NotebookNode]:
    """The four example submissions, made from the release as it is now, so that they cannot go stale."""
    source = notebooks.read_release(workspace.source(LESSON))
    own = {notebooks.grade_id(cell): cell.source for cell in source.cells if notebooks.is_solution(cell)}
    filled = {
        "full-marks": own,
        "partly-right": read_example("partly-right"),
        "untouched": {},
        "wrong-but-plausible": read_example("wrong-but-plausible"),
    }
    return {
        name: fill(notebooks.read_release(workspace.release(LESSON)), cells) for name, cells in filled.items()
    }


def read_example(name: str) -> dict[str, str]:
    """The cells of an example: a Markdown page with one `## grade_id` and one code block for each."""
    text = (EXAMPLES / LESSON / f"{name}.md").read_text(encoding="utf-8")
    return {cell: source.rstrip("\n") for cell, source in _CELL.findall(text)}


def fill(release: NotebookNode, cells: Mapping[str, str]) -> NotebookNode:
    """The release with some of its solution cells written. Raises: RobustkitError when it lacks one of them."""
    there = {notebooks.grade_id(cell): cell for cell in release.cells if notebooks.is_solution(cell)}
    for name, source in cells.items():
        if name not in there:
            raise RobustkitError(
                f"the release has no solution cell {name}; correct grading/examples/{LESSON}."
            )
        there[name].source = source
    return release


def table(lines: Sequence[Line], out: Path) -> list[str]:
    """The demo's lines for a terminal."""
    width = max(len(line.submission) for line in lines)
    rows = [f"{'submission':{width}}  {'points':>9}  missed"]
    for line in lines:
        points = f"{line.points:g} of {line.maximum:g}"
        rows.append(f"{line.submission:{width}}  {points:>9}  {line.missed}")
    waiting = max(line.to_mark for line in lines)
    return [
        *rows,
        "",
        f"{waiting:g} more points per submission wait for a marker in formgrader.",
        f"Look at {out / 'class.html'}, {out / 'grades.csv'} and the learners' pages in {out / 'feedback'}.",
    ]


def _claim(out: Path) -> None:
    """An empty folder for the demo. Only a folder that an earlier demo made is emptied."""
    if out.exists() and any(out.iterdir()) and not (out / _MARKER).exists():
        raise RobustkitError(
            f"{out} holds something else than a demo; name an empty or a new folder with --out."
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARKER).touch()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
