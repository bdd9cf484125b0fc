"""Notebooks before they run: read what was submitted, and put the locked cells back.

A submission is read once, checked, and rebuilt on the release: its own are the sources of its solution
cells and of the cells that it added, everything else comes from the instructor's copy.
"""

# nbformat and nbgrader are not annotated.
# mypy: allow-untyped-calls

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from grading.files import read_plain
from grading.records import sha256
from robustkit.errors import RobustkitError
from robustkit.lessons import LESSONS, Lesson

MOST_BYTES = 20 * 2**20
MOST_CELLS = 2000


def read_submission(path: Path) -> tuple[NotebookNode, str]:
    """A submitted notebook and the sha256 of its file.

    Raises: RobustkitError when it is missing, a link, too large, not JSON or not a notebook.
    """
    data = read_plain(path, MOST_BYTES)
    return parse_submission(data, path.name), sha256(data)


def parse_submission(data: bytes, name: str) -> NotebookNode:
    """The notebook in the bytes of the file `name`.

    Raises: RobustkitError when it is not JSON, not a notebook, or has too many cells.
    """
    try:
        notebook = _current(json.loads(data))
        nbformat.validate(notebook)
    except RecursionError as error:
        raise RobustkitError(
            f"{name} is nested too deeply; submit the notebook as Jupyter saves it."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RobustkitError(
            f"{name} is not JSON ({error}); submit the notebook as Jupyter saves it."
        ) from error
    except Exception as error:  # nbformat raises many kinds; all mean the same to a learner
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise RobustkitError(
            f"{name} is not a notebook of format 4 ({reason}); save it in Jupyter and submit it again."
        ) from error
    if len(notebook.cells) > MOST_CELLS:
        raise RobustkitError(
            f"{name} has {len(notebook.cells)} cells, at most {MOST_CELLS} are graded; remove some."
        )
    return notebook


def _current(content: Any) -> NotebookNode:
    """The notebook in format 4.5, with cell ids of ours; anything but format 4 is refused."""
    if not isinstance(content, dict) or content.get("nbformat") != 4:
        raise ValueError("nbformat is not 4")
    notebook: NotebookNode = nbformat.v4.to_notebook(content)
    notebook.nbformat_minor = 5  # the one change since 4.0 that matters here: cells have ids
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    return notebook


def grade_id(cell: NotebookNode) -> str:
    """The cell's nbgrader id, "" where it has none."""
    metadata = cell.metadata.get("nbgrader")
    name = metadata.get("grade_id") if isinstance(metadata, dict) else None
    return name if isinstance(name, str) else ""


def is_solution(cell: NotebookNode) -> bool:
    """Whether a release cell is the learner's to edit."""
    return bool(cell.metadata.get("nbgrader", {}).get("solution"))


def lesson_of(notebook: NotebookNode) -> Lesson:
    """The lesson whose cells the notebook has. Raises: RobustkitError when it has none of any."""
    found = {grade_id(cell) for cell in notebook.cells} - {""}
    shares = {
        lesson.id: sum(
            name in found for exercise in lesson.exercises for name in (exercise.id, solution_id(exercise.id))
        )
        for lesson in LESSONS.values()
    }
    best = max(shares, key=lambda lesson_id: shares[lesson_id])
    if not shares[best]:
        raise RobustkitError(
            "the notebook has none of the cells of a lesson; start from a released notebook and keep its cells."
        )
    return LESSONS[best]


def solution_id(exercise_id: str) -> str:
    """The grade_id of the cell that the learner fills in."""
    return exercise_id.removesuffix("_check")


def restore(submitted: NotebookNode, release: NotebookNode) -> tuple[NotebookNode, tuple[str, ...]]:
    """The submission rebuilt on the release, and the ids of the cells of which something had to be put back.

    Cells that the learner added stay where they stand, without metadata. A solution cell that was deleted
    comes back as the release has it. Raises: RobustkitError when a released cell occurs twice or none occurs.
    """
    reference = {grade_id(cell): cell for cell in release.cells if grade_id(cell)}
    seen = [grade_id(cell) for cell in submitted.cells if grade_id(cell) in reference]
    if twice := sorted({name for name in seen if seen.count(name) > 1}):
        raise RobustkitError(
            f"the notebook has the cell {twice[0]} {seen.count(twice[0])} times; keep one of them and submit it again."
        )
    if not seen:
        raise RobustkitError(
            "the notebook has none of the lesson's cells; start from the released notebook and keep them."
        )
    restored, cells = [], []
    for cell in submitted.cells:
        name = grade_id(cell)
        if name not in reference:
            cells.append(_own(cell))
            continue
        original = copy.deepcopy(reference[name])
        if cell.metadata["nbgrader"] != original.metadata["nbgrader"]:
            restored.append(name)  # its points, its flags or its checksum
        if is_solution(original):
            original.source = cell.source
        elif cell.source != original.source or cell.cell_type != original.cell_type:
            restored.append(name)
        cells.append(original)
    for name in (name for name in reference if name not in seen):
        cells.insert(_place(cells, list(reference), name), copy.deepcopy(reference[name]))
        if not is_solution(reference[name]):
            restored.append(name)
    for i, cell in enumerate(cells):
        cell.id = f"cell-{i}"
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    result = nbformat.v4.new_notebook(cells=cells, metadata=copy.deepcopy(release.metadata))
    return result, tuple(name for name in reference if name in restored)


def _own(cell: NotebookNode) -> Any:
    """A cell of the learner's own: its source, and nothing that a tool might read."""
    if cell.cell_type == "code":
        return nbformat.v4.new_code_cell(cell.source)
    return nbformat.v4.new_markdown_cell(cell.source)


def _place(cells: list[NotebookNode], order: list[str], name: str) -> int:
    """Where a missing cell goes: after the last of its predecessors that is there, else at the start."""
    before = set(order[: order.index(name)])
    places = [i for i, cell in enumerate(cells) if grade_id(cell) in before]
    return max(places, default=-1) + 1


def read_release(path: Path) -> NotebookNode:
    """A notebook of the instructor's own. Raises: RobustkitError when it is not there."""
    if not path.is_file():
        raise RobustkitError(f"{path} does not exist; make the course first: python -m grading build.")
    notebook, _ = read_submission(path)
    return notebook
