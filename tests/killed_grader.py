"""Graders that are killed: as a process of its own, or at each point at which a grader writes.

    python -m tests.killed_grader grade WORKSPACE JOBS       grades a small class in plain kernels
    python -m tests.killed_grader points WORKSPACE POINTS    kills a grader at so many points; prints what came of it
    python -m tests.killed_grader forgetful WORKSPACE POINTS the same with a grader that does not note what is done

In the second one the verdicts are there already: the crew hands them out, and counts how often it is asked.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

from sqlalchemy import event
from sqlalchemy.engine import Engine

from grading import grade, pipeline
from grading.crew import Crew
from grading.pipeline import Files, Settings, Task
from grading.run import Limits
from grading.workspace import Workspace
from tests.fixtures import small_course as small

SETTINGS = Settings(limits=Limits(cell=300, notebook=600), sandbox="none")
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree", "shutil.copyfile"}


def contents(workspace: Workspace) -> dict[str, list[object]]:
    """All that was graded: every grade in the database, every record, every scorecard."""
    ask = (
        "SELECT student_id, base_cell.name, grade.auto_score, grade.manual_score, grade.needs_manual_grade FROM grade "
        "JOIN base_cell ON base_cell.id = grade.cell_id "
        "JOIN submitted_notebook ON submitted_notebook.id = grade.notebook_id "
        "JOIN submitted_assignment ON submitted_assignment.id = submitted_notebook.assignment_id ORDER BY 1, 2"
    )
    with sqlite3.connect(workspace.gradebook) as book:
        found: dict[str, list[object]] = {"gradebook": [list(row) for row in book.execute(ask)]}
    book.close()
    for name in ("records.json", "scorecard.json"):
        paths = sorted(workspace.records.glob(f"*/*/{name}"))
        # The notebooks of two classes name different folders.
        found[name] = [json.loads(path.read_text()) | {"submission": ""} for path in paths]
    return found


def kept(workspace: Workspace) -> dict[str, Files]:
    """The files of every submission that was graded in the workspace."""
    found = {}
    for folder in workspace.records.glob(f"*/{small.LESSON}"):
        paths = [folder / "records.json", *sorted((folder / "evidence").iterdir())]
        found[folder.parent.name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return found


def graded(workspace: Workspace, files: dict[str, Files], asked: Path, kill_at: int) -> int:
    """In a child: grade with verdicts that are there; die by SIGKILL at the write `kill_at`. How many there were."""
    ready, write = os.pipe()
    if child := os.fork():
        os.close(write)
        with os.fdopen(ready, "rb") as lines:
            writes = len(lines.read())
        os.waitpid(child, 0)
        return writes
    count = 0

    def wrote(*_: object) -> None:
        nonlocal count
        count += 1
        os.write(write, b".")
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def seen(name: str, arguments: tuple[object, ...]) -> None:
        if name in WRITES or (
            name == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
        ):
            wrote()

    def submit(task: Task, told: object) -> Future[Files]:
        with asked.open("a") as file:
            file.write(f"{task.student}\n")
        future: Future[Files] = Future()
        future.set_result(files[task.student])
        return future

    sys.addaudithook(seen)
    event.listen(Engine, "commit", wrote)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    grade.grade(workspace, [small.LESSON], SETTINGS, Crew(1, submit))
    os._exit(0)


def points(workspace: Workspace, number: int) -> list[dict[str, object]]:
    """Kill a grader of the same class at `number` points, spread over all its writes, and let another one go on."""
    files, expected = kept(workspace), contents(workspace)
    fresh = workspace.private.parent / "again"
    again = Workspace(workspace.solutions, workspace.course, workspace.submitted, fresh)
    asked = workspace.private.parent / "asked"

    def start(kill_at: int) -> int:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        shutil.copy(workspace.secret, again.secret)
        asked.unlink(missing_ok=True)
        return graded(again, files, asked, kill_at)

    whole = start(0)
    found: list[dict[str, object]] = [{"writes": whole, "same": contents(again) == expected}]
    for i in range(number):
        at = 1 + i * (whole - 1) // (number - 1)
        died = start(at) == at
        entered = {path.parts[-3] for path in again.records.glob("*/*/scorecard.json")}
        before = Counter(asked.read_text().split()) if asked.exists() else Counter()
        graded(again, files, asked, 0)
        after = Counter(asked.read_text().split())
        found.append(
            {
                "at": at,
                "died": died,
                "same": contents(again) == expected,
                "twice": sorted(student for student in entered if after[student] != before[student]),
                "lost": sorted(set(files) - set(after)),
                "left": sorted(path.name for path in fresh.glob("rk-*")),
            }
        )
    return found


def never_stamps(workspace: Workspace, task: Task, stage: str) -> None:
    """A wrong `stamp`: never says that a submission is graded."""


def main(what: str, folder: str, number: str) -> None:
    workspace = small.workspace_in(Path(folder))
    if what == "grade":
        small.graded(workspace, [small.LESSON], SETTINGS, int(number))
        return
    if what == "forgetful":
        pipeline.stamp = never_stamps
    print(json.dumps(points(workspace, int(number))))


if __name__ == "__main__":
    main(*sys.argv[1:])
