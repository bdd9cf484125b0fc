"""A submission through the whole path, as a test of a lesson needs it: what its answers lost, and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from grading import notebooks, pipeline
from grading.demo import fill
from grading.fresh import Server
from grading.workspace import repository

# The cases follow from it: by which of several codes a wrong answer loses may hang on them, and must not change.
SECRET = b"a secret of the lessons' tests, 00"


def answered(lesson: str, answers: Mapping[str, str], imports: str) -> NotebookNode:
    """The released notebook with these answers, without the text and the measurements between the exercises.

    Those take minutes, and are not what is judged.
    """
    submission = fill(notebooks.read_release(repository().release(lesson)), dict(answers))
    submission.cells = [cell for cell in submission.cells if notebooks.grade_id(cell)]
    submission.cells.insert(0, nbformat.v4.new_code_cell(imports))
    return submission


def lost(lesson: str, submission: NotebookNode, folder: Path) -> dict[str, dict[str, str]]:
    """Exercise -> lost criterion -> the code that is told, after sandbox and judge."""
    nbformat.write(submission, folder / "submission.ipynb")
    (folder / "secret").write_bytes(SECRET)
    with Server() as server:
        records = pipeline.assess(
            folder / "submission.ipynb",
            lesson,
            repository().release(lesson),
            folder,
            "a student",
            folder / "secret",
            pipeline.Settings(),
            server,
        )
    found: dict[str, dict[str, str]] = {}
    for mark in records.marks:
        if mark.points < mark.maximum:
            found.setdefault(mark.exercise.removesuffix("_check"), {})[mark.criterion] = mark.notes[0].code
    return found
