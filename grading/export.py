"""The gradebook as CSV that survives commas, quotes, line breaks, and spreadsheets that run formulas."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from grading.gradebook import Row
from robustkit.files import write_atomically

COLUMNS = (
    *("lesson", "student", "last_name", "first_name", "points", "maximum"),
    *("auto", "manual", "penalty", "needs_marking"),
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def to_csv(rows: Sequence[Row]) -> str:
    """One line per submission, every cell quoted. A text that a spreadsheet would run gets an apostrophe first."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_cell(getattr(row, column)) for column in COLUMNS])
    return buffer.getvalue()


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Raises: OSError when `path` cannot be written; nothing half-written is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The mark in front tells spreadsheets that the file is UTF-8.
    write_atomically(path, to_csv(rows).encode("utf-8-sig"))


def _cell(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return f"'{value}" if value.startswith(_FORMULA) else value
