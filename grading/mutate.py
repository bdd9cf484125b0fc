"""Mutation testing of the grading itself: does a solution with one mistake lose points?

Every mutant goes the whole way of a submission: notebook, sandboxed kernel, evidence, judge, score. To start a
kernel for each would take hours. Two things make it cheaper, and neither changes what is graded:

- A submission hands in only the cells that its exercises need (the others come back as released stubs, as in any
  submission with cells deleted), so that no figure is drawn and no model trained for an exercise without one.
- A submission carries one mutant of each exercise. Verdicts are separate by exercise, and after a mutant's check
  cell the reference is defined again for the exercises that build on it. Where a kernel dies or runs out of time,
  each mutant of that submission is graded alone.

That the reference itself earns everything in such a submission is graded first, and told when it does not.
"""

# nbformat is not annotated.
# mypy: allow-untyped-calls

from __future__ import annotations

import ast
import json
import multiprocessing
import random
import symtable
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from itertools import zip_longest
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from tqdm import tqdm

from grading import judge, notebooks, records, run
from grading.mutants import Mutant, equivalent, mutants
from grading.score import ExerciseScore, score
from grading.workspace import DEMO_SECRET, ROOT, Workspace
from robustkit.errors import RobustkitError
from robustkit.lessons import Exercise, Lesson
from robustkit.results import Interval

LEAST = 0.95  # the share of a lesson's mutants, equivalent ones left out, that must lose points
LIMITS = run.Limits(cell=300, notebook=900)

# What takes minutes to compute and decides nothing in an exercise that uses it: by lesson and name, a cell that
# makes something of the same kind.
STAND_INS = {
    "01-mnist-fgsm": {
        "evaluations": 'evaluations = {"PGD-AT": evaluate(build("mnist_cnn"), few.take(range(50)), BALL, '
        'find_attacks("pgd-40"), model_name="PGD-AT", tier=TIER, progress=False)}'
    }
}

Batch = dict[str, Mutant]  # by exercise


@dataclass(frozen=True)
class Verdict:
    """One mutant and what it was given. `reason` says why it is no mistake, where a reviewer found so."""

    exercise: str
    operator: str
    diff: str
    points: float
    maximum: float
    codes: tuple[str, ...]
    reason: str = ""

    @property
    def killed(self) -> bool:
        return self.points < self.maximum

    @property
    def survived(self) -> bool:
        """Whether grading missed a mistake."""
        return not self.killed and not self.reason


@dataclass(frozen=True)
class Kills:
    """How many mutants of an exercise, or of a lesson, lost points."""

    name: str
    killed: int
    survived: int
    equivalent: int

    @property
    def share(self) -> Interval:
        return Interval(self.killed, self.killed + self.survived)

    @property
    def shown(self) -> str:
        return str(self.share) if self.killed + self.survived else "no mutants"

    def __str__(self) -> str:
        return f"{self.name}: {self.shown} killed, {self.survived} survived, {self.equivalent} equivalent"


def mutate(
    workspace: Workspace,
    lesson: Lesson,
    journal: Path,
    *,
    exercises: Sequence[str] = (),
    sample: int | None = None,
    seed: int = 0,
    jobs: int = 1,
    sandbox: str = "auto",
) -> list[Verdict]:
    """The verdict on every mutant of a lesson's reference solution, or of some exercises, or on `sample` of them.

    What `journal` already has is not graded again; it is begun anew when code or solution changed.
    Randomness: which mutants are sampled, from `seed`.
    Raises: RobustkitError for an unknown exercise, and when the reference loses points.
    """
    solution = notebooks.read_release(workspace.source(lesson.id))
    reasons = equivalent()
    asked = [lesson.exercise(name) for name in exercises] or lesson.exercises
    found = [mutants(exercise.id, _source(solution, exercise)) for exercise in asked]
    chosen = _sampled(found, sample, seed)
    known = _read(journal, _fingerprint(workspace, lesson))
    batches = _batches([m for m in chosen if (m.exercise, m.diff) not in known])
    grade = partial(grade_batch, workspace, lesson, sandbox=sandbox)
    if batches:
        _check_reference(grade(references(solution, lesson, {m.exercise for m in chosen})), sandbox)
    with (
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool,
        tqdm(
            total=len(chosen),
            initial=len(chosen) - sum(map(len, batches)),
            desc=lesson.id,
            unit="mutant",
            file=sys.stderr,
        ) as bar,
        journal.open("a", encoding="utf-8") as file,
    ):
        for done in as_completed([pool.submit(grade, batch) for batch in batches]):
            for verdict in done.result():
                known[verdict.exercise, verdict.diff] = verdict
                file.write(json.dumps(asdict(verdict)) + "\n")
                file.flush()
                bar.update()
    return [_with_reason(known[m.exercise, m.diff], reasons.get((m.exercise, m.diff), "")) for m in chosen]


def kills(verdicts: Sequence[Verdict], name: str) -> Kills:
    return Kills(
        name,
        sum(v.killed and not v.reason for v in verdicts),
        sum(v.survived for v in verdicts),
        sum(bool(v.reason) for v in verdicts),
    )


def report(verdicts: Sequence[Verdict], lesson: Lesson) -> list[str]:
    """A line for each exercise and for the lesson, then every survivor as a diff."""
    survivors = [f"\nsurvived in {v.exercise} ({v.operator}):\n{v.diff}" for v in verdicts if v.survived]
    return [*map(str, _by_exercise(verdicts, lesson)), str(kills(verdicts, lesson.id)), *survivors]


def table(graded: Sequence[tuple[Lesson, Sequence[Verdict]]]) -> str:
    """The same of several lessons as a page of Markdown."""
    verdicts = [verdict for _, found in graded for verdict in found]
    whole = kills(verdicts, "all lessons")
    lines = [
        "# Mutants of the reference solutions",
        "",
        f"Written by `make mutate` on {date.today()}: {len(verdicts)} solutions with one change each, graded the whole "
        f"way of a submission in the smoke tier. {whole.equivalent} of them change nothing that the exercise asks for; "
        "they stand with their reasons in [grading/equivalent.toml](../grading/equivalent.toml). Of the others "
        f"{whole.shown} lost points.",
        "",
        "| lesson | exercise | killed, 95 % interval | survived | equivalent |",
        "| --- | --- | --- | --- | --- |",
    ]
    for lesson, found in graded:
        for row in (*_by_exercise(found, lesson), kills(found, "**all**")):
            lines.append(f"| {lesson.id} | {row.name} | {row.shown} | {row.survived} | {row.equivalent} |")
    for verdict in verdicts:
        if verdict.survived:
            lines += ["", f"Survived in `{verdict.exercise}`:", "", "```diff", verdict.diff.strip(), "```"]
    return "\n".join(lines) + "\n"


def _by_exercise(verdicts: Sequence[Verdict], lesson: Lesson) -> list[Kills]:
    return [
        kills(own, exercise.title)
        for exercise in lesson.exercises
        if (own := [v for v in verdicts if v.exercise == exercise.id])
    ]


# --- submissions ----------------------------------------------------------------------------------------


def references(solution: NotebookNode, lesson: Lesson, exercises: set[str]) -> Batch:
    """The reference itself, as if it were a mutant of each of these exercises."""
    return {
        exercise.id: Mutant(exercise.id, "reference", _source(solution, exercise), "")
        for exercise in lesson.exercises
        if exercise.id in exercises
    }


def submission(solution: NotebookNode, lesson: Lesson, batch: Batch) -> NotebookNode:
    """A notebook to hand in: the mutants of the batch, and of the reference what their exercises need."""
    cells = _with_stand_ins(solution, lesson)
    places = {notebooks.grade_id(cell): i for i, cell in enumerate(cells) if notebooks.grade_id(cell)}
    mutated = {places[notebooks.solution_id(name)]: name for name in batch}
    needs = {i: _needs(cells, i) for i in mutated}
    needed = set().union(*needs.values())
    handed_in = []
    for i, cell in enumerate(cells):
        if i in mutated:
            handed_in += [_as(cell, batch[mutated[i]].source), cells[places[mutated[i]]]]
            if i in needed:
                handed_in.append(nbformat.v4.new_code_cell(cell.source))
        elif i in needed:
            handed_in.append(cell)
    handed: NotebookNode = nbformat.v4.new_notebook(cells=handed_in, metadata=solution.metadata)
    return handed


def grade_batch(workspace: Workspace, lesson: Lesson, batch: Batch, *, sandbox: str) -> list[Verdict]:
    """Hand the batch in, and what each of its mutants earned."""
    solution = notebooks.read_release(workspace.source(lesson.id))
    with tempfile.TemporaryDirectory(prefix="rk-mutants-") as folder:
        path, evidence = Path(folder, "submission.ipynb"), Path(folder, "evidence")
        nbformat.write(submission(solution, lesson, batch), path)
        run.run_submission(
            path,
            lesson,
            workspace.release(lesson.id),
            evidence,
            student="mutant",
            secret=DEMO_SECRET,
            limits=LIMITS,
            confinement=sandbox,
        )
        card = score(judge.judge(evidence, DEMO_SECRET), {})
    scores = {exercise.id: exercise for exercise in card.exercises if exercise.id in batch}
    if len(batch) > 1 and any(_stopped(one) for one in scores.values()):
        alone = [grade_batch(workspace, lesson, {name: m}, sandbox=sandbox) for name, m in batch.items()]
        return [verdict for verdicts in alone for verdict in verdicts]
    return [
        Verdict(name, m.operator, m.diff, scores[name].points, scores[name].maximum, scores[name].codes)
        for name, m in batch.items()
    ]


def _stopped(exercise: ExerciseScore) -> bool:
    """Whether the notebook came to an end there, or may have run out of time: then other verdicts are not their own."""
    unreliable = {records.CRASHED, records.TIMED_OUT, records.NOT_REACHED}
    return any(mark.outcome in unreliable for mark in exercise.marks)


def _check_reference(verdicts: Sequence[Verdict], sandbox: str) -> None:
    for verdict in verdicts:
        if verdict.killed:
            raise RobustkitError(
                f"the reference solution of {verdict.exercise} earns {verdict.points:g} of {verdict.maximum:g} "
                f"({', '.join(verdict.codes)}) with sandbox {sandbox}; mend it first, or what it stands on."
            )


def _as(cell: NotebookNode, source: str) -> NotebookNode:
    """The same cell with another source."""
    other: NotebookNode = NotebookNode({**cell, "source": source})
    return other


def _source(solution: NotebookNode, exercise: Exercise) -> str:
    wanted = notebooks.solution_id(exercise.id)
    return next(str(cell.source) for cell in solution.cells if notebooks.grade_id(cell) == wanted)


# --- which cells a cell needs -----------------------------------------------------------------------------


def _with_stand_ins(solution: NotebookNode, lesson: Lesson) -> list[NotebookNode]:
    """The code cells; where a name has a stand-in, the cell that makes it is that."""
    stand_ins = STAND_INS.get(lesson.id, {})
    cells = [cell for cell in solution.cells if cell.cell_type == "code"]
    return [
        next(
            (nbformat.v4.new_code_cell(made) for name, made in stand_ins.items() if name in _binds(cell)),
            cell,
        )
        for cell in cells
    ]


def _needs(cells: Sequence[NotebookNode], i: int) -> set[int]:
    """The earlier cells that define what cell `i` uses, and what those use in turn."""
    found: set[int] = set()
    wanted = [i]
    while wanted:
        here = wanted.pop()
        for name in _uses(cells[here]):
            makers = [j for j in range(here) if name in _binds(cells[j])]
            if makers and makers[-1] not in found:
                found.add(makers[-1])
                wanted.append(makers[-1])
    return found


def _tables(cell: NotebookNode) -> Iterator[symtable.SymbolTable]:
    """The cell's own table of names, then those of its functions; none where it is not plain Python."""
    try:
        ast.parse(cell.source)
    except SyntaxError:  # a shell command, say
        return
    waiting = [symtable.symtable(cell.source, "cell", "exec")]
    while waiting:
        table = waiting.pop()
        yield table
        waiting += table.get_children()


def _binds(cell: NotebookNode) -> set[str]:
    top = next(_tables(cell), None)
    return {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()} if top else set()


def _uses(cell: NotebookNode) -> set[str]:
    """The names that a cell takes from outside itself."""
    used: set[str] = set()
    for i, table in enumerate(_tables(cell)):
        used |= {s.get_name() for s in table.get_symbols() if (i == 0 or s.is_global()) and s.is_referenced()}
    return used - _binds(cell)


# --- which mutants, and what is known of them ---------------------------------------------------------------


def _sampled(found: Sequence[list[Mutant]], sample: int | None, seed: int) -> list[Mutant]:
    """All of them, or as many of each exercise as of the others, as far as they go."""
    if sample is None:
        return [mutant for own in found for mutant in own]
    generator = random.Random(seed)
    shuffled = [generator.sample(own, len(own)) for own in found]
    in_turn = [mutant for row in zip_longest(*shuffled) for mutant in row if mutant is not None]
    return in_turn[:sample]


def _batches(todo: Sequence[Mutant]) -> list[Batch]:
    """One mutant of each exercise a batch."""
    batches: list[Batch] = []
    for mutant in todo:
        free = next((batch for batch in batches if mutant.exercise not in batch), None)
        if free is None:
            batches.append(free := {})
        free[mutant.exercise] = mutant
    return batches


def _fingerprint(workspace: Workspace, lesson: Lesson) -> str:
    """What a verdict depends on: the solution, and the code that runs and judges it."""
    files = [workspace.source(lesson.id), workspace.release(lesson.id)]
    files += sorted(path for package in ("robustkit", "grading") for path in (ROOT / package).rglob("*.py"))
    return records.sha256(b"".join(records.sha256(path.read_bytes()).encode() for path in files))


def _read(journal: Path, fingerprint: str) -> dict[tuple[str, str], Verdict]:
    """The verdicts in the journal; of another fingerprint none, and a line cut short by a kill is dropped."""
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []
    known: dict[tuple[str, str], Verdict] = {}
    if lines and lines[0] == fingerprint:
        for line in lines[1:]:
            try:
                fields = json.loads(line)
            except ValueError:
                continue
            verdict = Verdict(**{**fields, "codes": tuple(fields["codes"])})
            known[verdict.exercise, verdict.diff] = verdict
    journal.parent.mkdir(parents=True, exist_ok=True)
    kept = [json.dumps(asdict(verdict)) for verdict in known.values()]
    journal.write_text("\n".join([fingerprint, *kept]) + "\n", encoding="utf-8")
    return known


def _with_reason(verdict: Verdict, reason: str) -> Verdict:
    return Verdict(**{**asdict(verdict), "codes": verdict.codes, "reason": "" if verdict.killed else reason})
