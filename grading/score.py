"""Records -> scorecard: pure, so that regrading is replaying records.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from grading import records
from grading.judge import find_lesson
from grading.records import NOT_REACHED, TAMPERED, Mark, Note, Records
from robustkit.errors import RobustkitError
from robustkit.lessons import Exercise


@dataclass(frozen=True)
class ExerciseScore:
    """One exercise: a mark for each criterion, and the marker's own points where she gave some."""

    id: str
    title: str
    marks: tuple[Mark, ...]
    manual: float | None

    @property
    def judged(self) -> float:
        return sum(mark.points for mark in self.marks)

    @property
    def points(self) -> float:
        return self.judged if self.manual is None else self.manual

    @property
    def maximum(self) -> float:
        return sum(mark.maximum for mark in self.marks)

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(note.code for mark in self.marks for note in mark.notes))


@dataclass(frozen=True)
class WrittenScore:
    """One hand-marked answer; `points` is None until it is marked."""

    id: str
    title: str
    points: float | None
    maximum: float


@dataclass(frozen=True)
class Scorecard:
    """What one submission earned, and why."""

    student: str
    lesson: str
    title: str
    tier: str
    submission: str
    robustkit: str
    refused: str
    restored: tuple[str, ...]
    exercises: tuple[ExerciseScore, ...]
    written: tuple[WrittenScore, ...]

    @property
    def autograded(self) -> float:
        return sum(exercise.points for exercise in self.exercises)

    @property
    def autograded_maximum(self) -> float:
        return sum(exercise.maximum for exercise in self.exercises)

    @property
    def points(self) -> float:
        """Everything so far: an answer that nobody marked yet counts nothing."""
        return self.autograded + sum(answer.points or 0.0 for answer in self.written)

    @property
    def maximum(self) -> float:
        return self.autograded_maximum + sum(answer.maximum for answer in self.written)

    @property
    def pending(self) -> tuple[WrittenScore, ...]:
        return tuple(answer for answer in self.written if answer.points is None)

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(code for exercise in self.exercises for code in exercise.codes))


def score(verdicts: Records, manual: Mapping[str, float]) -> Scorecard:
    """The scorecard of `verdicts` and of the marker's points, by id of exercise or written answer.

    Fail closed: a criterion without exactly one mark, or with points outside its range, earns nothing.
    Raises: RobustkitError for an unknown lesson, or a marker's points that are negative or not finite.
    """
    lesson = find_lesson(verdicts.lesson)
    for name, points in manual.items():
        if not (math.isfinite(points) and points >= 0):
            raise RobustkitError(f"{name} is marked {points}; points are 0 or more.")
    refused = bool(verdicts.refused)
    return Scorecard(
        verdicts.student,
        lesson.id,
        lesson.title,
        verdicts.tier,
        verdicts.submission,
        verdicts.robustkit,
        verdicts.refused,
        verdicts.restored,
        tuple(
            ExerciseScore(
                exercise.id, exercise.title, _marks(exercise, verdicts.marks), manual.get(exercise.id)
            )
            for exercise in lesson.exercises
        ),
        tuple(
            WrittenScore(
                answer.id, answer.title, manual.get(answer.id, 0.0 if refused else None), answer.points
            )
            for answer in lesson.written
        ),
    )


def _marks(exercise: Exercise, marks: tuple[Mark, ...]) -> tuple[Mark, ...]:
    """Exactly one mark for each criterion of the table, worth what the table says."""
    chosen = []
    for criterion, maximum in exercise.points.items():
        found = [mark for mark in marks if (mark.exercise, mark.criterion) == (exercise.id, criterion)]
        if len(found) == 1 and found[0].maximum == maximum and 0 <= found[0].points <= maximum:
            chosen.append(found[0])
        else:
            outcome = TAMPERED if found else NOT_REACHED
            note = Note(
                "NO_VALID_RECORD", "there is no valid verdict on this criterion; tell your instructor"
            )
            chosen.append(Mark(exercise.id, criterion, 0.0, float(maximum), outcome, (note,), ""))
    return tuple(chosen)


def read_marks(path: Path) -> dict[str, float]:
    """Points given by hand, from a JSON object of numbers. Raises: RobustkitError when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(points) for name, points in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RobustkitError(f'{path} holds no marks ({error}); write {{"s1_judgement": 7.5}}.') from error


def write_scorecard(path: Path, card: Scorecard) -> None:
    summary = {
        "points": card.points,
        "maximum": card.maximum,
        "pending": [answer.id for answer in card.pending],
        "codes": card.codes,
    }
    records.write(path, card, summary)


def read_scorecard(path: Path) -> Scorecard:
    """Raises: RobustkitError when `path` does not hold one."""
    try:
        fields = records.read_fields(path, "Scorecard")
        fields["restored"] = tuple(fields["restored"])
        fields["exercises"] = tuple(
            ExerciseScore(**{**entry, "marks": tuple(records.read_mark(mark) for mark in entry["marks"])})
            for entry in fields["exercises"]
        )
        fields["written"] = tuple(WrittenScore(**entry) for entry in fields["written"])
        return Scorecard(**fields)
    except (KeyError, TypeError) as error:
        raise records.incomplete(path, error) from error
