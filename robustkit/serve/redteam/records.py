"""What a campaign measured, attack by attack and image by image. No torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from robustkit.errors import RobustkitError
from robustkit.results import Hardware, Interval, Provenance, from_json, read
from robustkit.threat import ThreatModel

COMMAND = "robustkit redteam"


@dataclass(frozen=True)
class Attempt:
    """One attack on one image.

    `before` and `after` are the classes told for the untouched image and, in a fresh query, for the bytes that the
    attack had sent; None: rejected, and for `after` also: nothing was found. `inside` and `size` were measured on those
    bytes; `size` is None outside Lp balls. `queries` are those of the attack, without these two.
    """

    image: int
    label: int
    before: int | None
    after: int | None
    inside: bool
    size: float | None
    queries: int
    rejected: int
    burnt: int
    throttled: int
    shed: int
    seconds: float

    @property
    def attacked(self) -> bool:
        """Whether there was something to break: the untouched image was classified right."""
        return self.before == self.label


@dataclass(frozen=True)
class Run:
    """One attack on all images. `skipped` says why it was not run, else it is empty."""

    attack: str
    threat: ThreatModel
    attempts: tuple[Attempt, ...]
    skipped: str = ""

    def succeeded(self, attempt: Attempt) -> bool:
        """A fresh query gave a wrong class on an image that was right, inside the threat model and the budget."""
        return (
            attempt.attacked
            and attempt.after is not None
            and attempt.after != attempt.label
            and attempt.inside
            and attempt.queries <= (self.threat.queries or 0)
        )

    @property
    def attacked(self) -> tuple[Attempt, ...]:
        return tuple(attempt for attempt in self.attempts if attempt.attacked)

    def success(self, queries: int | None = None) -> Interval | None:
        """The share of images that were right and fell within so many queries; None: there was none to attack."""
        if not self.attacked:
            return None
        won = [one.queries for one in self.attacked if self.succeeded(one)]
        return Interval(sum(queries is None or spent <= queries for spent in won), len(self.attacked))

    @property
    def median(self) -> float | None:
        """Of the queries of successes; None without any."""
        won = [one.queries for one in self.attacked if self.succeeded(one)]
        return statistics.median(won) if won else None

    @property
    def rejected(self) -> Interval | None:
        """The share of queries that were rejected; None: there was no query."""
        asked = sum(one.queries for one in self.attacked)
        return Interval(sum(one.rejected for one in self.attacked), asked) if asked else None

    @property
    def burnt(self) -> int:
        """Keys."""
        return sum(one.burnt for one in self.attacked)

    def marks(self) -> tuple[int, ...]:
        """Numbers of queries to tell the success at: 1, 2, 5, 10, ... up to the budget."""
        budget = self.threat.queries or 1
        round_ones = [lead * 10**zeros for zeros in range(7) for lead in (1, 2, 5)]
        return (*(mark for mark in round_ones if mark < budget), budget)

    def record(self) -> dict[str, Any]:
        """Totals, for programs."""
        success, rejected = self.success(), self.rejected
        return {
            "attack": self.attack,
            "skipped": self.skipped,
            "success": success.record() if success else None,
            "n": success.n if success else 0,
            "median_queries": self.median,
            "rejected": rejected.record() if rejected else None,
            "keys_burnt": self.burnt,
            "throttled": sum(one.throttled for one in self.attempts),
            "shed": sum(one.shed for one in self.attempts),
        }


@dataclass(frozen=True)
class Campaign:
    """Attacks on one service in one state of its defences: `name` says which, in the operator's words.

    `model` is what the service says that it serves, `output` what it tells: "scores" or "labels". `keys` is how many
    accounts the attacker began with; `stopped` why the campaign ended before its time, else empty.
    """

    name: str
    model: str
    output: str
    adaptive: bool
    keys: int
    data: Provenance
    indices: tuple[int, ...]
    runs: tuple[Run, ...]
    seed: int
    tier: str
    hardware: Hardware
    created: str
    notes: tuple[str, ...] = ()
    stopped: str = ""

    def __post_init__(self) -> None:
        if not self.indices or not self.runs:
            raise RobustkitError("a campaign needs at least one image and one attack; got none.")

    def to_json(self) -> str:
        record = {"type": type(self).__name__, **asdict(self), "summary": [run.record() for run in self.runs]}
        return json.dumps(record, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        result: Self = from_json(cls, text, COMMAND)
        return result


def read_campaign(path: Path) -> Campaign:
    """The campaign stored at `path`. Raises: RobustkitError, naming the file."""
    return read(Campaign, path, COMMAND)


def pooled(runs: Sequence[Run]) -> Run:
    """The same attack under several seeds as one."""
    return Run(
        runs[0].attack,
        runs[0].threat,
        tuple(attempt for run in runs for attempt in run.attempts),
        next((run.skipped for run in runs if run.skipped), ""),
    )
