"""How far a class is, on stderr: a table that is redrawn in place on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import TextIO

_UP_AND_CLEAR = "\x1b[{}F\x1b[J"
_COLUMNS = "{:24.24}  {:18.18}  {:32.32}  {:>7}"


class Table:
    """A line for each submission under way (student, lesson, exercise, elapsed), and one for the class."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._total, self._done, self._ran = total, 0, 0  # some need not run
        self._under_way: dict[tuple[str, str], tuple[float, str]] = {}  # since when, and how far
        self._began = time.monotonic()
        self._drawn = 0  # lines that stand there to be redrawn

    def __enter__(self) -> Table:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._under_way.clear()
        self.draw()

    def told(self, student: str, lesson: str, state: str) -> None:
        """How far a submission is. Called by the threads that grade; shown when the table is drawn next."""
        since, _ = self._under_way.get((student, lesson), (time.monotonic(), ""))
        self._under_way[student, lesson] = since, state

    def finished(self, student: str, lesson: str, line: str) -> None:
        """A submission is over: its line stays."""
        since, _ = self._under_way.pop((student, lesson), (None, ""))
        self._done += 1
        self._ran += since is not None
        took = "" if since is None else f" ({_clock(time.monotonic() - since)})"
        self._clear()
        print(f"{self._done} of {self._total}: {line}{took}", file=self._stream, flush=True)
        self.draw()

    def draw(self) -> None:
        """The table as it is now, in place of the last one; nothing where the stream is no terminal."""
        if not self._stream.isatty():
            return
        now, size = time.monotonic(), shutil.get_terminal_size()
        rows = [
            _COLUMNS.format(student, lesson, state, _clock(now - since))
            for (student, lesson), (since, state) in list(self._under_way.items())
        ]
        if len(rows) > size.lines - 3:  # what scrolls away cannot be redrawn
            rows[size.lines - 4 :] = [f"and {len(rows) - size.lines + 4} more"]
        if rows:
            rows.insert(0, _COLUMNS.format("student", "lesson", "exercise", "elapsed"))
        rows.append(f"{self._done} of {self._total} graded, {_clock(now - self._began)}{self._left(now)}")
        self._clear()
        self._stream.write("".join(f"{row[: size.columns - 1].rstrip()}\n" for row in rows))
        self._stream.flush()
        self._drawn = len(rows)

    def _left(self, now: float) -> str:
        left = self._total - self._done
        return f", about {_clock((now - self._began) / self._ran * left)} to go" if self._ran and left else ""

    def _clear(self) -> None:
        if self._drawn:
            self._stream.write(_UP_AND_CLEAR.format(self._drawn))
            self._drawn = 0


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
