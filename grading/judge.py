"""Evidence -> records: every verdict recomputed, in a process that imports nothing a learner wrote.

The case is drawn again from the course secret, so that nothing the kernel could reach decides a point.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from grading import evidence, records
from grading.records import (
    COLLECTED,
    CRASHED,
    FAILED,
    MISSING,
    NOT_IMPLEMENTED,
    NOT_REACHED,
    PASSED,
    REFUSED,
    TAMPERED,
    TIMED_OUT,
    Collected,
    Mark,
    Note,
    Records,
    Run,
)
from grading.workspace import case_seed
from robustkit import __version__
from robustkit.contracts import CONTRACTS, Finding, judge_safely
from robustkit.contracts.base import measuring, untext
from robustkit.errors import RobustkitError
from robustkit.lessons import LESSONS, Exercise, Lesson, award

MOST_HINT = 300  # characters; a hint may quote what the learner's code returned

_NO_VERDICT = {
    CRASHED: Note(
        "CRASHED", "the notebook's kernel stopped here; restart the kernel and run all cells to see where"
    ),
    TIMED_OUT: Note("TIMED_OUT", "a cell ran longer than it may here; look for a loop that does not end"),
    NOT_REACHED: Note("NOT_REACHED", "an earlier cell stopped the notebook before this exercise"),
    TAMPERED: Note(
        "EVIDENCE_MALFORMED", "what came back from the notebook was not what the exercise returns"
    ),
}
_OUTCOMES = {"NOT_IMPLEMENTED": NOT_IMPLEMENTED, "NOT_FOUND": MISSING, "EVIDENCE_MALFORMED": TAMPERED}


def judge(folder: Path, secret: bytes) -> Records:
    """The verdicts on the evidence in `folder`, one per criterion of the lesson.

    Fail closed: an exercise without readable, untouched evidence earns nothing. Raises: RobustkitError
    when the folder holds no run, or one of an unknown lesson.
    """
    run = records.read_run(folder / "run.json")
    lesson = find_lesson(run.lesson)
    collected = {entry.exercise: entry for entry in run.exercises}
    marks: list[Mark] = []
    with _tier(run.tier):
        for exercise in lesson.exercises:
            entry = collected.get(exercise.id, Collected(exercise.id, NOT_REACHED, "", ""))
            marks += _judge_exercise(folder, run, exercise, entry, secret)
    return Records(
        run.student, lesson.id, run.tier, run.submission, __version__, "", run.restored, tuple(marks)
    )


def refused(student: str, lesson: Lesson, tier: str, reason: str) -> Records:
    """The records of a submission that could not be run: no points, and the reason."""
    note = Note("REFUSED", reason)
    marks = [
        Mark(exercise.id, criterion, 0.0, float(points), REFUSED, (note,), "")
        for exercise in lesson.exercises
        for criterion, points in exercise.points.items()
    ]
    return Records(student, lesson.id, tier, "", __version__, reason, (), tuple(marks))


def find_lesson(lesson_id: str) -> Lesson:
    """Raises: RobustkitError when there is no such lesson."""
    if lesson_id not in LESSONS:
        raise RobustkitError(f"the lesson {lesson_id!r} is unknown; choose one of {', '.join(LESSONS)}.")
    return LESSONS[lesson_id]


def _judge_exercise(
    folder: Path, run: Run, exercise: Exercise, entry: Collected, secret: bytes
) -> list[Mark]:
    if not entry.evidence:
        return _everywhere(exercise, entry.outcome, _NO_VERDICT.get(entry.outcome, _NO_VERDICT[TAMPERED]))
    contract = CONTRACTS[exercise.contract]
    try:
        data = evidence.take(folder / f"{exercise.id}.npz")
        if records.sha256(data) != entry.evidence:
            raise RobustkitError("the evidence is not what the run recorded.")
        arrays = evidence.parse(data)
    except RobustkitError:
        return _everywhere(exercise, TAMPERED, _NO_VERDICT[TAMPERED])
    case = contract.draw(case_seed(secret, run.student, run.lesson, exercise.id))
    if "error" in arrays:
        note = _reported(arrays["error"])
        if entry.outcome == TIMED_OUT and note.code == "NOT_FOUND":
            return _everywhere(exercise, TIMED_OUT, _NO_VERDICT[TIMED_OUT])
        return _everywhere(exercise, _OUTCOMES.get(note.code, FAILED), note)
    with measuring() as shares:
        findings = judge_safely(contract, case, arrays)
    points = award(exercise, findings)
    return [
        replace(
            _mark(
                exercise,
                criterion,
                points[criterion],
                [f for f in findings if f.criterion == criterion],
                entry,
            ),
            measured=shares.get(criterion),
        )
        for criterion in exercise.points
    ]


def _mark(
    exercise: Exercise, criterion: str, points: float, findings: list[Finding], entry: Collected
) -> Mark:
    notes = tuple(dict.fromkeys(Note(f.code, _plain(f.hint)) for f in findings))
    outcome = PASSED if not notes else _OUTCOMES.get(notes[0].code, FAILED)
    return Mark(
        exercise.id, criterion, points, float(exercise.points[criterion]), outcome, notes, entry.evidence
    )


def _everywhere(exercise: Exercise, outcome: str, note: Note) -> list[Mark]:
    """The same verdict on every criterion: nothing was earned."""
    outcome = TAMPERED if outcome == COLLECTED else outcome
    return [
        Mark(exercise.id, criterion, 0.0, float(points), outcome, (note,), "")
        for criterion, points in exercise.points.items()
    ]


def _reported(error: object) -> Note:
    """The reason that the kernel gave for having no evidence, in words of our own.

    An exception's message is the learner's to choose and could carry a hidden case out; only the name of
    a built-in exception passes.
    """
    try:
        code, hint = untext(error)  # type: ignore[arg-type]
        words = str(hint).split()
    except (ValueError, TypeError, AttributeError):
        return _NO_VERDICT[TAMPERED]
    if code == "NOT_IMPLEMENTED":
        return Note(code, "the exercise is still a stub; replace the raise with your code")
    if code == "NOT_FOUND":
        return Note(code, "the notebook defines nothing of the name that the exercise asks for")
    if code == "RAISED":
        named = [word.rstrip(":") for word in words if word.endswith(":")][:1]
        kind = getattr(builtins, named[0], None) if named else None
        is_exception = isinstance(kind, type) and issubclass(kind, Exception)
        return Note(
            code, f"your code raised {named[0] if is_exception else 'an exception'} on the grader's inputs"
        )
    return _NO_VERDICT[TAMPERED]


def _plain(text: str) -> str:
    """One printable line of bounded length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= MOST_HINT else line[: MOST_HINT - 1] + "…"


@contextmanager
def _tier(name: str) -> Iterator[None]:
    """Contracts read the tier from the environment, as they do in a learner's kernel."""
    before = os.environ.get("ROBUSTKIT_TIER")
    os.environ["ROBUSTKIT_TIER"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["ROBUSTKIT_TIER"]
        else:
            os.environ["ROBUSTKIT_TIER"] = before
