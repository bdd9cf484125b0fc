"""What the hops hand to each other as JSON: run.json, records.json, scorecard.json."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from robustkit.errors import RobustkitError
from robustkit.files import write_atomically

PASSED, FAILED, MISSING, NOT_IMPLEMENTED = "passed", "failed", "missing", "not_implemented"
CRASHED, TIMED_OUT, NOT_REACHED = "crashed", "timed_out", "not_reached"
TAMPERED, REFUSED = "tampered", "refused"
COLLECTED = "collected"  # of a run only: there is evidence to judge


@dataclass(frozen=True)
class Collected:
    """What a run has for one exercise. `evidence` is the sha256 of its .npz, empty where there is none."""

    exercise: str
    outcome: str  # collected, crashed, timed_out, not_reached or tampered
    evidence: str
    note: str


@dataclass(frozen=True)
class Run:
    """One execution of one submission, as the runner saw it."""

    student: str
    lesson: str
    tier: str
    submission: str  # the sha256 of the submitted notebook
    robustkit: str
    restored: tuple[str, ...]  # cells of which what is locked had been changed or deleted
    errors: int  # cells that raised
    seconds: float
    exercises: tuple[Collected, ...]


@dataclass(frozen=True)
class Note:
    """A stable code and a hint that is not the answer."""

    code: str
    hint: str


@dataclass(frozen=True)
class Mark:
    """The verdict on one criterion of one exercise."""

    exercise: str
    criterion: str
    points: float
    maximum: float
    outcome: str
    notes: tuple[Note, ...]
    evidence: str
    measured: tuple[int, int] | None = None  # k of n, where the judge measured a share


@dataclass(frozen=True)
class Records:
    """Every verdict on one submission. Scoring it again gives the same points."""

    student: str
    lesson: str
    tier: str
    submission: str
    robustkit: str
    refused: str  # why nothing was run; empty otherwise
    restored: tuple[str, ...]
    marks: tuple[Mark, ...]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write(path: Path, record: Any, summary: dict[str, Any] | None = None) -> None:
    """A record as JSON, whole or not at all; `summary` is for readers and is not read back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"type": type(record).__name__, **({"summary": summary} if summary else {}), **asdict(record)}
    text = json.dumps(content, indent=1, allow_nan=False)
    write_atomically(path, text.encode() + b"\n")


def read_run(path: Path) -> Run:
    """Raises: RobustkitError when `path` does not hold one."""
    try:
        fields = read_fields(path, "Run")
        fields["exercises"] = tuple(Collected(**entry) for entry in fields["exercises"])
        fields["restored"] = tuple(fields["restored"])
        return Run(**fields)
    except (KeyError, TypeError) as error:
        raise incomplete(path, error) from error


def read_records(path: Path) -> Records:
    """Raises: RobustkitError when `path` does not hold them."""
    try:
        fields = read_fields(path, "Records")
        fields["marks"] = tuple(read_mark(entry) for entry in fields["marks"])
        fields["restored"] = tuple(fields["restored"])
        return Records(**fields)
    except (KeyError, TypeError) as error:
        raise incomplete(path, error) from error


def read_mark(entry: dict[str, Any]) -> Mark:
    notes = tuple(Note(**note) for note in entry["notes"])
    measured = entry.get("measured")
    return Mark(**{**entry, "notes": notes, "measured": measured and tuple(measured)})


def read_fields(path: Path, kind: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RobustkitError(
            f"{path} cannot be read ({error.strerror}); run the hop before this one."
        ) from error
    except ValueError as error:
        raise RobustkitError(f"{path} is not JSON; write it again with the hop before this one.") from error
    if not isinstance(record, dict) or record.pop("type", None) != kind:
        raise RobustkitError(
            f"{path} does not hold a {kind}; pass the file that the hop before this one wrote."
        )
    record.pop("summary", None)
    return record


def incomplete(path: Path, error: Exception) -> RobustkitError:
    return RobustkitError(f"{path} is incomplete ({error}); write it again with the hop before this one.")
