"""solutions/ -> course/: what learners get, and the proof that it is right and gives nothing away."""

# nbformat and nbgrader are not annotated.
# mypy: allow-untyped-calls

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from tqdm import tqdm

from grading import gradebook, leaks, notebooks, pipeline
from grading.fresh import Server
from grading.preprocessors import CANARY_KEY
from grading.records import Mark, Note, Records
from grading.score import score
from grading.workspace import DEMO_SECRET, ONE_THREAD, Workspace
from robustkit.errors import RobustkitError
from robustkit.files import write_atomically
from robustkit.lessons import LESSONS, Lesson


def standing(workspace: Workspace) -> list[str]:
    """The lessons of the table that have a source."""
    return [lesson for lesson in LESSONS if workspace.source(lesson).is_file()]


def build(workspace: Workspace, lessons: Iterable[str]) -> list[Path]:
    """Generate the releases of `lessons`, and enter their cells in the gradebook.

    All are made aside first: when one fails, course/ stays as it was. Unchanged files are not touched.
    Raises: RobustkitError when nbgrader cannot generate one, or when a lesson whose submissions are in
    the gradebook gained or lost cells.
    """
    workspace.private.mkdir(parents=True, exist_ok=True)
    workspace.course.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=workspace.private) as folder:
        aside = Path(folder)
        made = [gradebook.generate(workspace, lesson, aside, workspace.gradebook_url) for lesson in lessons]
        for notebook in made:
            _replace_folder(notebook.parent, workspace.course / notebook.stem)
    return [workspace.release(notebook.stem) for notebook in made]


def _replace_folder(new: Path, old: Path) -> None:
    """Bring `old` to the files of `new`, each atomically: no moment without a release."""
    files = _contents(new)
    for name, data in files.items():
        path = old / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data)
    for name in _contents(old).keys() - files.keys():
        (old / name).unlink()


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` but editors' checkpoints, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".ipynb_checkpoints" not in path.parts
    }


# --- the proof -------------------------------------------------------------------------------------


def check(
    workspace: Workspace, lessons: Iterable[str], wheel: Callable[[Path], Path] = leaks.build_wheel
) -> list[str]:
    """Everything that is wrong with the course, one sentence each; an empty list when it may be released.

    Reads the clone and writes nothing in it. The reference solutions and the untouched releases go
    through the same run and judge as submissions do, in the smoke tier. `wheel` builds what learners
    install into a folder.
    """
    with tempfile.TemporaryDirectory(prefix="rk-check-") as folder:
        aside = replace(
            workspace, course=Path(folder, "course"), private=Path(folder, "private"), database=""
        )
        problems, sound = check_files(workspace, lessons, aside, wheel)
        return problems + check_runs(aside, sound)


def check_files(
    workspace: Workspace, lessons: Iterable[str], aside: Workspace, wheel: Callable[[Path], Path]
) -> tuple[list[str], list[Lesson]]:
    """The half of `check` that runs no notebook, and the lessons whose release it could make in `aside`."""
    aside.private.mkdir(parents=True)
    problems: list[str] = []
    sources, sound = [], []
    for lesson in (LESSONS[name] for name in lessons):
        source, found = _check_source(workspace, lesson)
        problems += found
        if source is None:
            continue
        sources.append(source)
        try:
            gradebook.generate(workspace, lesson.id, aside.course, None)
        except RobustkitError as error:
            problems.append(str(error))
            continue
        problems += _check_stale(workspace.course / lesson.id, aside.course / lesson.id)
        sound.append(lesson)
    problems += [
        f"course/{path.name} has no source in solutions/; remove it."
        for path in sorted(workspace.course.glob("*"))
        if path.is_dir() and path.name not in standing(workspace)
    ]
    leaked = [*leaks.in_course(aside.course, sources), *leaks.in_course(workspace.course, sources)]
    try:
        leaked += leaks.in_wheel(wheel(aside.private), sources)
    except RuntimeError as error:
        problems.append(f"the wheel cannot be built ({error}).")
    return problems + list(dict.fromkeys(leaked)), sound


def _check_source(workspace: Workspace, lesson: Lesson) -> tuple[NotebookNode | None, list[str]]:
    """The source notebook, and what is wrong with it as it lies there."""
    path = workspace.source(lesson.id)
    name = f"solutions/{lesson.id}"
    try:
        source = notebooks.read_release(path)
    except RobustkitError as error:
        return None, [str(error)]
    stored = nbformat.read(path, as_version=4)
    problems = []
    if not leaks.CANARY.fullmatch(str(source.metadata.get(CANARY_KEY, ""))):
        problems.append(
            f'{name} has no canary; put "{CANARY_KEY}": "rk-canary-<16 or more of 0-9a-z>" '
            "into the notebook's metadata."
        )
    ran = [cell for cell in stored.cells if cell.cell_type == "code" and cell.source.strip()]
    stripped = sum(cell.execution_count is None for cell in ran)
    silent = [
        notebooks.grade_id(cell)
        for cell in ran
        if notebooks.grade_id(cell).endswith("_check") and not cell.outputs
    ]
    if stripped or silent:
        problems.append(
            f"{name} was saved without its outputs ({stripped} cells never ran, {len(silent)} checks print nothing); "
            "execute the whole notebook and save it."
        )
    failed = [
        cell.id
        for cell in ran
        if any(output.output_type == "error" for output in cell.outputs)
        and "raises-exception" not in cell.metadata.get("tags", [])
    ]
    if failed:
        problems.append(
            f"{name} was saved with an error in cell {failed[0]}; execute it until it runs through."
        )
    return source, problems + _check_table(source, lesson)


def _check_table(source: NotebookNode, lesson: Lesson) -> list[str]:
    """Do the notebook's cells and the lesson's table say the same?"""
    cells = {
        notebooks.grade_id(cell): cell.metadata["nbgrader"]
        for cell in source.cells
        if notebooks.grade_id(cell)
    }
    name, problems = f"solutions/{lesson.id}", []
    expected: dict[str, tuple[float, dict[str, bool]]] = {}
    for exercise in lesson.exercises:
        expected[notebooks.solution_id(exercise.id)] = 0, {"grade": False, "solution": True, "locked": False}
        expected[exercise.id] = exercise.total, {"grade": True, "solution": False, "locked": True}
    for answer in lesson.written:
        expected[answer.id] = answer.points, {}
    for cell_id, (points, flags) in expected.items():
        if cell_id not in cells:
            problems.append(f"{name} has no cell {cell_id}, which the lesson's table names.")
            continue
        metadata = cells[cell_id]
        if float(metadata.get("points", 0)) != points:
            problems.append(
                f"{name}: {cell_id} is worth {metadata.get('points', 0):g} points, the table says {points:g}."
            )
        wrong = [flag for flag, value in flags.items() if bool(metadata.get(flag)) != value]
        if wrong:
            problems.append(
                f"{name}: {cell_id} must have {', '.join(f'{flag}: {str(flags[flag]).lower()}' for flag in wrong)}."
            )
    for cell_id, metadata in cells.items():
        if cell_id not in expected and float(metadata.get("points", 0)):
            problems.append(f"{name}: {cell_id} is worth points, but the lesson's table does not name it.")
    order = [cell_id for cell_id in cells if cell_id in expected]
    if not problems and order != list(expected):
        problems.append(f"{name}: its exercise cells are not in the order of the lesson's table.")
    return problems


def _check_stale(released: Path, made: Path) -> list[str]:
    """Is the release in course/ byte for byte what its source generates?"""
    old, new = _contents(released) if released.is_dir() else {}, _contents(made)
    remedy = "run python -m grading build"
    problems = [
        f"course/{released.name}/{name} is missing; {remedy}." for name in sorted(new.keys() - old.keys())
    ]
    problems += [
        f"course/{released.name}/{name} is not generated from solutions/; remove it, or {remedy}."
        for name in sorted(old.keys() - new.keys())
    ]
    return problems + [
        f"course/{released.name}/{name} is stale or was edited by hand ({_difference(old[name], new[name])}); "
        f"edit solutions/ instead, then {remedy}."
        for name in sorted(old.keys() & new.keys())
        if old[name] != new[name]
    ]


def _difference(old: bytes, new: bytes) -> str:
    """Where two versions first differ, for a person."""
    before, after = old.decode(errors="replace").splitlines(), new.decode(errors="replace").splitlines()
    for i, (left, right) in enumerate(zip(before, after, strict=False), start=1):
        if left != right:
            return f"line {i}: {left.strip()[:60]!r} for {right.strip()[:60]!r}"
    return f"{len(before)} lines for {len(after)}"


def check_runs(aside: Workspace, lessons: list[Lesson]) -> list[str]:
    """The half of `check` that runs notebooks: reference solutions and untouched releases, two at a time."""
    aside.secret.write_bytes(DEMO_SECRET)
    checks = (_check_reference, _check_untouched, _check_invert)
    jobs = [(each, lesson) for each in checks for lesson in lessons]

    def problems(job: tuple[Callable[[Workspace, Lesson, Server], list[str]], Lesson]) -> list[str]:
        try:
            return job[0](aside, job[1], server)
        except RobustkitError as error:
            return [f"{job[1].id}: {error}"]

    with Server() as server, ThreadPoolExecutor(2) as pool:
        results = pool.map(problems, jobs)
        return [line for found in tqdm(results, total=len(jobs), desc="run and judge") for line in found]


def _check_reference(aside: Workspace, lesson: Lesson, server: Server) -> list[str]:
    verdicts = _assess(aside, lesson, aside.source(lesson.id), "reference", server)
    for exercise, why in sorted(
        {(mark.exercise, note.hint) for mark in verdicts.marks for note in _unjudged(mark)}
    ):
        print(f"robustkit: {lesson.id} {exercise} could not be checked here: {why}", file=sys.stderr)
    return [
        f"solutions/{lesson.id} loses {mark.maximum - mark.points:g} points on {mark.exercise} {mark.criterion} "
        f"({', '.join(f'{note.code}: {note.hint}' for note in mark.notes)})."
        for mark in verdicts.marks
        if mark.points < mark.maximum and not _unjudged(mark)
    ]


def _unjudged(mark: Mark) -> list[Note]:
    """Why a machine that lacks an exercise's images cannot judge it; nothing where it can."""
    return [note for note in mark.notes if note.code == "NO_IMAGES"]


def _check_untouched(aside: Workspace, lesson: Lesson, server: Server) -> list[str]:
    card = score(_assess(aside, lesson, aside.release(lesson.id), "untouched", server), {})
    return [
        f"course/{lesson.id} earns {exercise.points:g} points on {exercise.id} without a line written."
        for exercise in card.exercises
        if exercise.points > 0
    ]


def _assess(aside: Workspace, lesson: Lesson, notebook: Path, student: str, server: Server) -> Records:
    folder, release = aside.hop(student, lesson.id), aside.release(lesson.id)
    return pipeline.assess(
        notebook, lesson.id, release, folder, student, aside.secret, pipeline.Settings(), server
    )


def _check_invert(aside: Workspace, lesson: Lesson, _: Server) -> list[str]:
    """nbgrader's own view of the untouched release: every check cell must fail."""
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", "validate", "--invert", str(aside.release(lesson.id))],
        cwd=aside.course,
        env=ONE_THREAD | os.environ | {"ROBUSTKIT_TIER": "smoke"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0 and "Success" in done.stdout:
        return []
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return [f"nbgrader validate --invert does not accept course/{lesson.id} ({' '.join(said)[:200]})."]
