"""Results as frozen dataclasses that survive a round trip through JSON.

A robustness figure cannot be built without its threat model, sample size, interval, seed, data
provenance, hardware and tier. Totals are always derived from the per-example record.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

from robustkit.errors import RobustkitError
from robustkit.threat import ThreatModel

CLEAN = "clean"  # the value of `broken_by` for an example that is misclassified before any attack
VERDICTS = ("passed", "flagged", "not run")

R = TypeVar("R")  # the type of a result


@dataclass(frozen=True)
class Interval:
    """A share k/n with its 95 % Wilson score interval.

    Source: Wilson 1927, JASA 22:209-212. Unlike the normal interval it stays inside [0, 1] and
    keeps its coverage near 0 % and 100 %, where robust accuracies often are.
    Raises: RobustkitError unless 0 <= k <= n and n >= 1.

    >>> print(Interval(9, 10))
    90.0 % [59.6, 98.2] (n=10)
    """

    k: int
    n: int

    def __post_init__(self) -> None:
        if not (self.n >= 1 and 0 <= self.k <= self.n):
            raise RobustkitError(f"a share needs 0 <= k <= n and n >= 1; got k={self.k}, n={self.n}.")

    @property
    def share(self) -> float:
        return self.k / self.n

    @property
    def bounds(self) -> tuple[float, float]:
        z = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution
        p, n = self.share, self.n
        centre = p + z * z / (2 * n)
        spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        # Rounding can carry the ends of 0/n and n/n past 0 and 1 by 1e-17.
        return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)

    @property
    def low(self) -> float:
        return self.bounds[0]

    @property
    def high(self) -> float:
        return self.bounds[1]

    def record(self) -> dict[str, float]:
        """What JSON readers want of it."""
        return {"share": self.share, "k": self.k, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] (n={self.n})"


@dataclass(frozen=True)
class Provenance:
    """Where the images came from, precisely enough that nobody can take one data set for another.

    `dataset` is the name to print beside every figure ("MNIST", "CIFAR-10 (JPEG mirror)", ...);
    `source` says how it was had: "ROBUSTKIT_DATA", "cache", "download" or "embedded";
    `sha256` is the hash of the whole split's images and labels as uint8 (before any subset);
    `exact` is True when the pixels are those of the published data set.
    """

    dataset: str
    split: str
    source: str
    sha256: str
    exact: bool
    note: str = ""

    def __str__(self) -> str:
        exact = "" if self.exact else ", NOT the published pixels"
        return f"{self.dataset} {self.split} ({self.source}, sha256 {self.sha256[:12]}{exact})"


@dataclass(frozen=True)
class Hardware:
    """The machine and the versions that a figure was measured with."""

    device: str
    cpu: str
    threads: int
    python: str
    torch: str
    robustkit: str

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.device}, {self.cpu}, {threads}, torch {self.torch}"


@dataclass(frozen=True)
class AttackRun:
    """One attack of an evaluation: its name, its parameters, and the seconds it took."""

    name: str
    parameters: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Worst-case robustness of one model over a list of attacks, example by example.

    `broken_by[i]` is None when example i survived everything, "clean" when it was misclassified
    untouched, otherwise the name of the first attack whose candidate fooled the model.
    """

    model: str
    threat: ThreatModel
    data: Provenance
    indices: tuple[int, ...]
    attacks: tuple[AttackRun, ...]
    broken_by: tuple[str | None, ...]
    seed: int
    tier: str
    hardware: Hardware
    created: str
    notes: tuple[str, ...] = ()
    protocol: str | None = None  # the name of the list of attacks, where it is one of evaluate.PROTOCOLS

    def __post_init__(self) -> None:
        if not self.broken_by:
            raise RobustkitError("an evaluation needs at least one example; got none.")
        if len(self.indices) != len(self.broken_by):
            raise RobustkitError(
                f"an evaluation needs one verdict per example; got {len(self.broken_by)} for {len(self.indices)}."
            )
        names = [CLEAN, *(run.name for run in self.attacks)]
        if len(set(names)) < len(names):
            raise RobustkitError(
                f"the attacks of an evaluation need different names, none of them {CLEAN!r}; got {names[1:]}."
            )
        known = {None, *names}
        unknown = {name for name in self.broken_by if name not in known}
        if unknown:
            raise RobustkitError(
                f"broken_by names attacks that were not run: {', '.join(sorted(map(str, unknown)))}."
            )

    @property
    def n(self) -> int:
        return len(self.broken_by)

    @property
    def clean(self) -> Interval:
        return Interval(sum(name != CLEAN for name in self.broken_by), self.n)

    @property
    def robust(self) -> Interval:
        return Interval(sum(name is None for name in self.broken_by), self.n)

    def robust_after(self, count: int) -> Interval:
        """Robust accuracy against the first `count` attacks alone."""
        later = {run.name for run in self.attacks[count:]}
        return Interval(sum(name is None or name in later for name in self.broken_by), self.n)

    def to_json(self) -> str:
        return dumps(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        result: Self = from_json(cls, text, "robustkit evaluate")
        return result


@dataclass(frozen=True)
class Outcome:
    """One check of an audit: what it measured against which threshold, and the evidence.

    `measured` is None exactly where the verdict is "not run"; `flag` says on which side of the threshold
    a finding lies; `repair` is what to try when there is one.
    """

    check: str
    verdict: str
    measured: float | None
    flag: str
    threshold: float
    unit: str
    evidence: str
    repair: str

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise RobustkitError(
                f"verdict {self.verdict!r} is unknown; it is one of {', '.join(map(repr, VERDICTS))}."
            )
        if (self.measured is None) != (self.verdict == "not run"):
            raise RobustkitError(
                f"check {self.check!r} is {self.verdict!r} with measured={self.measured}; "
                "a check has a measured value exactly when it was run."
            )


@dataclass(frozen=True)
class Audit:
    """What every check of an audit measured on one model; `findings` are the outcomes that are flagged."""

    model: str
    threat: ThreatModel
    data: Provenance
    indices: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    seed: int
    tier: str
    hardware: Hardware
    created: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.indices or not self.outcomes:
            raise RobustkitError("an audit needs at least one example and one check; got none.")

    @property
    def n(self) -> int:
        return len(self.indices)

    @property
    def findings(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.verdict == "flagged")

    def to_json(self) -> str:
        return dumps(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        result: Self = from_json(cls, text, "robustkit audit")
        return result


def dumps(result: Any) -> str:
    """JSON of a result dataclass, with the totals that a reader wants beside the record they come from."""
    record: dict[str, Any] = {"type": type(result).__name__, **asdict(result)}
    if isinstance(result, Evaluation):
        record["summary"] = {
            "n": result.n,
            "clean": result.clean.record(),
            "robust": result.robust.record(),
        }
    if isinstance(result, Audit):
        record["summary"] = {"n": result.n, "findings": [outcome.check for outcome in result.findings]}
    return json.dumps(record, indent=2, allow_nan=False)


def from_json(cls: Any, text: str, command: str) -> Any:
    """The result of type `cls` in `text`, which `command` wrote. Raises: RobustkitError when it is not one."""
    record = _parse(text, cls.__name__)
    try:
        return _build(cls, record, cls.__name__)
    except (KeyError, TypeError, OverflowError) as error:
        raise RobustkitError(
            f"this JSON is not a complete {cls.__name__} record ({error}); make it again with `{command}`."
        ) from error


def _parse(text: str, expected: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise RobustkitError(
            f"the result is not JSON (line {error.lineno}: {error.msg}); was the file cut?"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        raise RobustkitError(
            "the JSON is not one that robustkit wrote; pass a file written by it."
        ) from error
    if not isinstance(record, dict) or record.get("type") != expected:
        found = record.get("type") if isinstance(record, dict) else type(record).__name__
        raise RobustkitError(f"the JSON holds {found!r}, not {expected!r}; pass a file written by robustkit.")
    return record


def _build(kind: Any, value: Any, name: str) -> Any:
    """`value`, parsed from JSON, as the annotated type `kind`: what a result holds is what it declares.

    Raises: KeyError for a missing field, TypeError for one of another type, RobustkitError from the
    dataclasses themselves.
    """
    if is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        made: Any = kind
        return made(
            **{
                part.name: _build(hints[part.name], value[part.name], part.name)
                for part in fields(kind)
                if part.name in value
                or part.default is MISSING  # what has a default came with a later version
            }
        )
    arguments = get_args(kind)
    if get_origin(kind) is tuple and isinstance(value, list):
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
        if len(kinds) == len(value):
            return tuple(_build(each, part, name) for each, part in zip(kinds, value, strict=True))
    elif get_origin(kind) is dict and isinstance(value, dict):
        return value
    elif get_origin(kind) is UnionType:
        if value is None and NoneType in arguments:
            return None
        # Which of several dataclasses a record is, its field names say.
        names = set(value) if isinstance(value, dict) else set()
        same = [c for c in arguments if is_dataclass(c) and {part.name for part in fields(c)} == names]
        return _build((same or arguments)[0], value, name)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif type(value) is kind:
        return value
    raise TypeError(f"{name} cannot be {json.dumps(value)[:60]}")


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation stored at `path`. Raises: RobustkitError, naming the file, when it is missing or not one."""
    return read(Evaluation, path, "robustkit evaluate")


def is_stored(cls: type[R], path: Path) -> bool:
    """Whether the JSON at `path` says that it is a `cls`; what cannot be read is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and record.get("type") == cls.__name__


def read(cls: type[R], path: Path, command: str) -> R:
    """The result of type `cls` that `command` stored at `path`. Raises: RobustkitError, naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RobustkitError(f"{path} cannot be read ({error.strerror}); run `{command}` first.") from error
    except UnicodeDecodeError as error:
        raise RobustkitError(f"{path} is not a text file; pass the JSON that `{command}` wrote.") from error
    try:
        result: R = from_json(cls, text, command)
        return result
    except RobustkitError as error:
        raise RobustkitError(f"{path}: {error}") from error
