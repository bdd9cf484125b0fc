"""The journal of an evaluation: one line for each finished job, so that a killed one can go on. Needs no torch.

The first line says which evaluation this is; a journal never serves another one. A line is written and
flushed when its job is over, so a kill loses the running jobs and nothing else; a line that was cut by
the kill is dropped. Only the process that calls `evaluate` reads or writes the journal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from robustkit.errors import RobustkitError

FORMAT = 1
CLOSE = 1e-3  # one model's logits on two machines differ by rounding; another model's by more


@dataclass(frozen=True)
class Done:
    """A finished job: which images one attack was run on and which of them it broke, as rows of the data.

    `seconds` is the wall clock since the job before it; `batch_size` the size of the batches then.
    """

    attack: str
    rows: tuple[int, ...]
    broken: tuple[int, ...]
    seconds: float
    batch_size: int


@dataclass
class Journal:
    """What is done, in the order in which it was done; without a file it is kept in memory alone.

    `read` counts the lines that the running evaluation has taken up.
    """

    header: dict[str, Any]
    done: list[Done] = field(default_factory=list)
    read: int = 0
    file: BinaryIO | None = None

    def of(self, attack: str, rows: Sequence[int]) -> list[Done]:
        """What is done of the next attack, which is to meet `rows`.

        Raises: RobustkitError when it met others, or when a later attack began before it was over.
        """
        found = list(takewhile(lambda done: done.attack == attack, self.done[self.read :]))
        self.read += len(found)
        met = [row for done in found for row in done.rows]
        over = set(met) == set(rows)
        if len(set(met)) < len(met) or not set(met) <= set(rows) or not (over or self.read == len(self.done)):
            self.contradiction()
        return found

    def write(self, done: Done) -> None:
        self.done.append(done)
        self.read += 1
        if self.file is not None:
            _write_line(self.file, asdict(done))

    def contradiction(self) -> NoReturn:
        name = self.file.name if self.file else "the journal"
        raise RobustkitError(
            f"{name} cannot have been written by one evaluation (line {self.read + 1} and before); "
            "delete it to start again."
        )


@contextmanager
def opened(path: Path | None, header: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal at `path`, ready to be written on: begun with `header`, or gone on with if it is there.

    What is there must have the same `header["identity"]`; the rest of its header is kept.
    Raises: RobustkitError when the file is no journal, contradicts itself, or is that of another
    evaluation, naming what differs.
    """
    begun = Journal({"type": "Journal", "format": FORMAT, **header})
    if path is None:
        yield begun
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.read_bytes() if path.exists() else b""
    whole = there[: there.rfind(b"\n") + 1]  # what follows the last line break was cut by a kill
    try:
        journal = _parsed(whole) if whole else begun
    except (ValueError, KeyError, TypeError) as error:
        raise RobustkitError(
            f"{path} is not a readable journal of an evaluation; delete it to start again."
        ) from error
    different = _differences(journal.header["identity"], begun.header["identity"])
    if different:
        raise RobustkitError(
            f"{path} is the journal of another evaluation ({'; '.join(different)}); "
            "finish that one with its own settings, delete it, or write elsewhere."
        )
    with path.open("ab") as journal.file:
        journal.file.truncate(len(whole))
        if not whole:
            _write_line(journal.file, journal.header)
        yield journal
        if journal.read < len(journal.done):
            journal.contradiction()


def _write_line(file: BinaryIO, record: dict[str, Any]) -> None:
    file.write(f"{json.dumps(record, allow_nan=False)}\n".encode())
    file.flush()


def _parsed(whole: bytes) -> Journal:
    """Raises: ValueError, KeyError or TypeError for what `opened` did not write."""
    header, *lines = map(json.loads, whole.splitlines())
    if header["type"] != "Journal" or header["format"] != FORMAT:
        raise ValueError("another type or format")
    done = [
        Done(one["attack"], tuple(one["rows"]), tuple(one["broken"]), one["seconds"], one["batch_size"])
        for one in lines
    ]
    if any(not set(one.broken) <= set(one.rows) for one in done):
        raise ValueError("broken images that were not attacked")
    return Journal(header, done)


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between two identities, in words."""
    here = json.loads(json.dumps(here))  # tuples become lists, as they did there
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if "logits" in names and _close(there.get("logits"), here.get("logits")):
        names.remove("logits")
    return [
        f"{name} {there[name]} there, {here[name]} here"
        if all(isinstance(each.get(name), int | str) for each in (there, here))
        else f"another {name}"
        for name in names
    ]


def _close(there: Any, here: Any) -> bool:
    """Whether two lists of numbers differ by no more than two machines' rounding."""
    return (
        isinstance(there, list)
        and isinstance(here, list)
        and len(there) == len(here)
        and all(math.isclose(*pair, rel_tol=CLOSE, abs_tol=CLOSE) for pair in zip(there, here, strict=True))
    )
