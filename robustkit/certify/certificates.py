"""Certificates as records: one row an image, a file that grows by flushed lines, totals. Needs no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from robustkit.certify.confidence import certified_radius, least_samples, lower_bound
from robustkit.errors import RobustkitError
from robustkit.results import Hardware, Interval, Provenance, from_json, read

ABSTAIN = -1  # the prediction of a smoothed classifier whose votes do not decide
COLLAPSE = 0.2  # accuracy that a base classifier may lose to the noise before we doubt it was trained on it

HEADER = "index\tlabel\tprediction\tradius\tcorrect\tseconds"
PUBLISHED = "idx\tlabel\tpredict\tradius\tcorrect\ttime"


@dataclass(frozen=True)
class Smoothing:
    """What a certificate by smoothing is made with: noise, samples to choose a class and to bound it, error.

    Units: `sigma` is the noise's standard deviation in input units, where images lie in [0, 1].
    Raises: RobustkitError for a sigma that is not positive, an alpha outside (0, 1), and sample sizes
    from which no radius above zero could follow.
    """

    sigma: float
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise RobustkitError(
                f"sigma must be a finite number above zero; got {self.sigma}. Without noise nothing is smoothed: "
                "give the sigma that the model was trained with, e.g. 0.25."
            )
        if not 0 < self.alpha < 1:
            raise RobustkitError(f"alpha must lie between 0 and 1; got {self.alpha}. 0.001 is usual.")
        if self.n0 < 1:
            raise RobustkitError(f"n0 must be at least 1; got {self.n0}. 100 is usual.")
        if self.n < (least := least_samples(self.alpha)):
            raise RobustkitError(
                f"n={self.n} samples can certify no radius at alpha {self.alpha:g}, even if all agree; "
                f"{least} is the least n that can, and 10,000 or more is usual."
            )

    def __str__(self) -> str:
        return f"sigma={self.sigma:g}, n0={self.n0:,}, n={self.n:,}, alpha={self.alpha:g}"

    @property
    def largest_radius(self) -> float:
        """sigma * Phi^-1(alpha^(1/n)): the radius when every sample agrees. No certificate can claim more."""
        return certified_radius(lower_bound(self.n, self.n, self.alpha), self.sigma)


@dataclass(frozen=True)
class Row:
    """The certificate of one image; `prediction` is ABSTAIN, with radius 0, where the votes do not decide."""

    index: int
    label: int
    prediction: int
    radius: float
    correct: bool
    seconds: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.radius) and self.radius >= 0):
            raise RobustkitError(f"a radius must be a finite number, zero or larger; got {self.radius}.")
        if self.correct and self.prediction != self.label:
            raise RobustkitError(
                f"prediction {self.prediction} for label {self.label} is not correct, and the row says it is."
            )


@dataclass(frozen=True)
class Base:
    """The classifier whose votes are counted: its arithmetic, and its accuracy without and with the noise.

    A certificate is about this network in this precision and about no other. `noisy` is measured
    with one draw of the noise for each image.
    """

    precision: str
    clean: Interval
    noisy: Interval

    @property
    def warning(self) -> str | None:
        """Why these certificates say little, if the model was evidently not trained for the noise."""
        if self.clean.share - self.noisy.share <= COLLAPSE:
            return None
        return (
            f"the base classifier is right on {self.clean.share:.0%} of the images and on {self.noisy.share:.0%} "
            "under the noise: it was not trained for this sigma, and its radii say little about what smoothing can do"
        )


@dataclass(frozen=True)
class Certification:
    """L2 certificates of one smoothed model, image by image; every total is derived from the rows.

    Each certificate holds against every L2 perturbation smaller than its radius, whoever makes it and
    however, but with probability 1 - alpha over the noise that was drawn, and for the base classifier
    and precision named here.
    Raises: RobustkitError when there is no row, or a radius is larger than the samples can prove.
    """

    model: str
    base: Base
    smoothing: Smoothing
    norm: str
    data: Provenance
    rows: tuple[Row, ...]
    seed: int
    tier: str
    hardware: Hardware
    created: str
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.rows:
            raise RobustkitError("a certification needs at least one row; got none.")
        if self.norm != "L2":
            raise RobustkitError(f"Gaussian smoothing certifies L2 balls; got norm {self.norm!r}.")
        if beyond := beyond_bound(self.rows, self.smoothing):
            raise RobustkitError(
                f"image {beyond[0].index} claims radius {beyond[0].radius:.4f}, and {self.smoothing} can prove "
                f"{self.smoothing.largest_radius:.4f} at most; certify again with the settings that are stated."
            )

    @property
    def threat(self) -> str:
        return (
            "every L2 perturbation smaller than the image's radius, inputs in [0, 1]; "
            f"each certificate with probability {1 - self.smoothing.alpha:g}"
        )

    def to_json(self) -> str:
        record = {"type": type(self).__name__, **asdict(self), "summary": self.summary()}
        return json.dumps(record, indent=2, allow_nan=False)

    def summary(self) -> dict[str, Any]:
        """The totals that a reader wants beside the rows."""
        return {"threat": self.threat, **totals(self.rows)}

    @classmethod
    def from_json(cls, text: str) -> Self:
        result: Self = from_json(cls, text, "robustkit certify")
        return result


# --- totals ------------------------------------------------------------------------------------------


def certified_accuracy(rows: Sequence[Row], radius: float) -> Interval:
    """The share of images that are classified right with a certificate of at least this radius."""
    return Interval(sum(row.correct and row.radius >= radius for row in rows), len(rows))


def average_radius(rows: Sequence[Row]) -> float:
    """The average certified radius, where an image that is wrong or abstained on counts zero.

    Source: Zhai et al. 2020 (arXiv 2001.02378), ACR.
    """
    return sum(row.radius for row in rows if row.correct) / len(rows)


def curve(rows: Sequence[Row], step: float = 0.25) -> list[tuple[float, Interval]]:
    """Certified accuracy at 0, `step`, ... up to the first radius that no image reaches."""
    largest = max((row.radius for row in rows if row.correct), default=0.0)
    return [
        (i * step, certified_accuracy(rows, i * step)) for i in range(math.floor(largest / step + 1e-9) + 2)
    ]


def totals(rows: Sequence[Row]) -> dict[str, Any]:
    """What a table of certificates says, for programs."""
    return {
        "n": len(rows),
        "abstained": sum(row.prediction == ABSTAIN for row in rows),
        "average_certified_radius": average_radius(rows),
        "certified": [{"radius": radius, **share.record()} for radius, share in curve(rows)],
    }


def beyond_bound(rows: Sequence[Row], smoothing: Smoothing) -> tuple[Row, ...]:
    """The rows whose radius no sample of this size could prove: the log's settings are not those stated.

    Published radii carry three digits, hence half a unit of the third decimal is forgiven.
    """
    return tuple(row for row in rows if row.radius > smoothing.largest_radius + 0.0005)


# --- files -------------------------------------------------------------------------------------------


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a log: ours, or the published tab-separated form of locuslab/smoothing.

    Raises: RobustkitError, naming the file and the line, when it is not one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RobustkitError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    except UnicodeDecodeError as error:
        raise RobustkitError(f"{path} is not a text file; pass a certification log.") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if not line.startswith("#")]
    if not numbered or numbered[0][1] not in (HEADER, PUBLISHED):
        found = numbered[0][1][:60] if numbered else "an empty file"
        raise RobustkitError(
            f"{path} is not a certification log: it begins with {found!r}, not {HEADER!r} or {PUBLISHED!r}, by tabs."
        )
    rows = tuple(_row(line, f"{path}, line {number}") for number, line in numbered[1:])
    if not rows:
        raise RobustkitError(f"{path} holds a header and no row; wait until an image is certified.")
    return rows


@contextmanager
def rows_file(
    path: Path | None, settings: dict[str, Any]
) -> Iterator[tuple[list[Row], Callable[[Row], None]]]:
    """The rows that a log already holds, and a function that appends one flushed line.

    The first line holds `settings`, so that nothing is appended to the log of another run; a last line
    that was cut short is dropped. Without a path the rows go nowhere.
    Raises: RobustkitError when the file is the log of something else.
    """
    if path is None:
        yield [], lambda row: None
        return
    head = f"# {json.dumps(settings, sort_keys=True)}\n{HEADER}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    # A byte that is no UTF-8 makes the text differ from the settings, and the file is then refused.
    with path.open("a+", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.seek(0)
        text = file.read()
        whole = text[: text.rfind("\n") + 1]
        if not head.startswith(whole) and not whole.startswith(head):
            raise RobustkitError(
                f"{path} belongs to a certification with other settings; choose another file or delete it."
            )
        if len(whole) < len(head):
            file.truncate(0)
            file.write(head)
            file.flush()
        elif whole != text:
            file.truncate(len(whole.encode()))
        lines = enumerate(whole.removeprefix(head).splitlines() if len(whole) > len(head) else [], 3)

        def append(row: Row) -> None:
            file.write(_line(row))
            file.flush()

        yield [_row(line, f"{path}, line {number}") for number, line in lines], append


def _line(row: Row) -> str:
    return f"{row.index}\t{row.label}\t{row.prediction}\t{row.radius!r}\t{row.correct:d}\t{row.seconds:.3f}\n"


def _row(line: str, where: str) -> Row:
    try:
        index, label, prediction, radius, correct, seconds = line.split("\t")
        if correct not in ("0", "1"):
            raise ValueError(f"correct must be 0 or 1, and is {correct}")
        return Row(int(index), int(label), int(prediction), float(radius), correct == "1", _seconds(seconds))
    except ValueError as error:  # a RobustkitError is one
        reason = str(error).rstrip(".")
        raise RobustkitError(f"{where} is not a row of six numbers ({reason}): {line[:80]!r}.") from error


def _seconds(text: str) -> float:
    """15.4 or 0:00:13.7, both of which published logs hold."""
    if not re.fullmatch(r"(\d+:\d{1,2}:)?\d+(\.\d*)?", text):
        raise ValueError(f"{text} is no time")
    total = 0.0
    for part in text.split(":"):
        total = 60 * total + float(part)
    return total


def read_certification(path: Path) -> Certification:
    """The certification stored at `path`. Raises: RobustkitError, naming the file."""
    return read(Certification, path, "robustkit certify")
