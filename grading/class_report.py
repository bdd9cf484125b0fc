"""Scorecards -> one static page on a class: who stands where, which exercise failed to teach, whose model holds.

Every figure is a function of plain data, and every plotted series is a table too.
"""

from __future__ import annotations

import base64
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grading import feedback
from grading.records import (
    CRASHED,
    MISSING,
    NOT_IMPLEMENTED,
    NOT_REACHED,
    PASSED,
    REFUSED,
    TAMPERED,
    TIMED_OUT,
    Mark,
)
from grading.score import ExerciseScore, Scorecard
from robustkit.figures import COLOURS, HATCHES, MARKERS, png
from robustkit.files import write_atomically
from robustkit.results import Interval

MOST_CODES = 12
_TROUBLE = {
    REFUSED: "refused: nothing could be run",
    CRASHED: "the kernel died",
    TIMED_OUT: "ran too long",
    TAMPERED: "evidence that cannot be read",
    "restored": "had changed what is locked; it was put back",
}
_OMITTED = (NOT_IMPLEMENTED, MISSING, NOT_REACHED)
_PLAIN = {"NOT_ROBUST"}  # a model that is only weak is ranked; one under any other code is not
FEW = 10  # submissions, below which a correlation says nothing
WEAK = 0.2  # a correlation below this is worth a look


@dataclass(frozen=True)
class Share:
    """How much of what could be earned was earned, over the submissions that were run."""

    title: str
    earned: float
    possible: float

    @property
    def share(self) -> float:
        return self.earned / self.possible if self.possible else 0.0


@dataclass(frozen=True)
class Item:
    """How one exercise worked as a question, over the submissions that were run.

    Source: classical test theory (Lord & Novick 1968). `difficulty` is the mean share of its points that was
    earned; `discrimination` the correlation of its points with those of all other exercises, None where one of
    the two is the same for everybody; `omitted` how many left it as it was, or were stopped before it.
    """

    title: str
    n: int
    difficulty: float
    discrimination: float | None
    omitted: int
    code: str  # the most frequent one, with the number of submissions that met it

    @property
    def remark(self) -> str:
        """What an instructor should look at first, if anything."""
        if self.n >= FEW and self.discrimination is not None and self.discrimination < WEAK:
            return "those who did well elsewhere did not do well here: read its check and its text"
        if 2 * self.omitted > self.n:
            return "more than half left it out: too long, or stopped before it"
        return ""


@dataclass(frozen=True)
class Standing:
    """One submitted model: what the judge measured of it."""

    student: str
    clean: Interval
    robust: Interval
    doubt: str  # the code for which it is not ranked; empty where it is


@dataclass(frozen=True)
class LessonReport:
    """One lesson's part of the page, as plain data."""

    id: str
    title: str
    cards: tuple[Scorecard, ...]
    bins: tuple[tuple[str, int], ...]  # tenths of the autograded points -> submissions
    spread: str  # the distribution in one sentence
    exercises: tuple[Share, ...]
    items: tuple[Item, ...]
    standings: tuple[Standing, ...]  # the most robust first, those that are not ranked last
    criteria: tuple[tuple[str, Share], ...]  # exercise title, criterion
    codes: tuple[tuple[str, int], ...]  # code -> submissions that met it, most frequent first
    trouble: tuple[tuple[str, tuple[str, ...]], ...]  # what happened -> to whom


@dataclass(frozen=True)
class Picture:
    """A figure ready for a page."""

    data: str  # PNG, base64
    alt: str


def summarise(cards: Sequence[Scorecard]) -> tuple[LessonReport, ...]:
    """The page's data, lesson by lesson. A refused submission counts as a submission, not as answers."""
    lessons = dict.fromkeys(card.lesson for card in cards)
    return tuple(_lesson(tuple(card for card in cards if card.lesson == lesson)) for lesson in lessons)


def _lesson(cards: tuple[Scorecard, ...]) -> LessonReport:
    ran = [card for card in cards if not card.refused]
    tenths = Counter(min(9, int(10 * card.autograded / card.autograded_maximum)) for card in cards)
    exercises, criteria = [], []
    for position, first in enumerate(cards[0].exercises):
        scores = [card.exercises[position] for card in ran]
        exercises.append(Share(first.title, sum(s.points for s in scores), sum(s.maximum for s in scores)))
        for i, mark in enumerate(first.marks):
            marks = [score.marks[i] for score in scores]
            asked = Share(mark.criterion, sum(m.points for m in marks), sum(m.maximum for m in marks))
            criteria.append((first.title, asked))
    codes = Counter(code for card in ran for code in card.codes)
    return LessonReport(
        cards[0].lesson,
        cards[0].title,
        cards,
        tuple((f"{10 * i} to {10 * i + 10} %", tenths[i]) for i in range(10)),
        _spread([100 * card.autograded / card.autograded_maximum for card in cards]),
        tuple(exercises),
        tuple(_item(ran, position) for position in range(len(cards[0].exercises))) if ran else (),
        standings(ran),
        tuple(criteria),
        tuple(sorted(codes.items(), key=lambda item: (-item[1], item[0]))[:MOST_CODES]),
        tuple((text, who) for kind, text in _TROUBLE.items() if (who := _who(cards, kind))),
    )


def _spread(percents: Sequence[float]) -> str:
    text = f"n = {len(percents)}, mean {statistics.mean(percents):.0f} %, median {statistics.median(percents):.0f} %"
    return text + (f", standard deviation {statistics.stdev(percents):.0f} points" if percents[1:] else "")


def _item(cards: Sequence[Scorecard], position: int) -> Item:
    scores = [card.exercises[position] for card in cards]
    points = [score.points for score in scores]
    rest = [card.autograded - own for card, own in zip(cards, points, strict=True)]
    met = Counter(code for score in scores for code in score.codes)
    code, count = min(met.items(), key=lambda entry: (-entry[1], entry[0]), default=("", 0))
    return Item(
        scores[0].title,
        len(scores),
        statistics.mean(points) / scores[0].maximum,
        statistics.correlation(points, rest) if min(len(set(points)), len(set(rest))) > 1 else None,
        sum(all(mark.outcome in _OMITTED for mark in score.marks) for score in scores),
        f"{code} ({count})" if code else "",
    )


def standings(cards: Sequence[Scorecard]) -> tuple[Standing, ...]:
    """The models that were handed in, by what the judge measured: the share that survives its attacks.

    A model that the audit doubts has a figure, and no rank: its attacks may be what failed.
    """
    found = []
    for card in cards:
        for exercise in card.exercises:
            measured = _measured(exercise)
            if measured:
                robust = measured[-1]
                doubts = [note.code for note in robust.notes if note.code not in _PLAIN]
                shares = [Interval(*mark.measured) for mark in measured if mark.measured]
                found.append(Standing(card.student, shares[0], shares[-1], doubts[0] if doubts else ""))
    return tuple(sorted(found, key=lambda one: (bool(one.doubt), -one.robust.share, one.student)))


def _measured(exercise: ExerciseScore) -> list[Mark]:
    """Its marks with a measured share: the clean accuracy first, the robust accuracy last."""
    marks = [mark for mark in exercise.marks if mark.measured]
    return marks if len(marks) > 1 else []


def _who(cards: Sequence[Scorecard], kind: str) -> tuple[str, ...]:
    """The students whose submission met this kind of trouble."""
    if kind == "restored":
        return tuple(card.student for card in cards if card.restored)
    marks = ((card, mark) for card in cards for exercise in card.exercises for mark in exercise.marks)
    return tuple(dict.fromkeys(card.student for card, mark in marks if mark.outcome == kind))


def missed(card: Scorecard) -> str:
    """What a submission lost points for, in codes: the most telling first."""
    if card.refused:
        return "REFUSED"
    lost = [mark for exercise in card.exercises for mark in exercise.marks if mark.outcome != PASSED]
    lost.sort(key=lambda mark: mark.outcome == NOT_REACHED)
    return ", ".join(dict.fromkeys(note.code for mark in lost for note in mark.notes)) or "nothing"


# --- figures ---------------------------------------------------------------------------------------


def distribution(bins: Sequence[tuple[str, int]]) -> Figure:
    """How many submissions earned which tenth of the autograded points."""
    figure = Figure(figsize=(8, 3.2))
    axes = figure.subplots()
    bars = axes.bar(range(len(bins)), [count for _, count in bins], color=COLOURS[2], edgecolor=COLOURS[0])
    axes.bar_label(bars, labels=[str(count) if count else "" for _, count in bins])
    axes.set_xticks(range(len(bins)), [name.replace(" to ", "-").replace(" %", "") for name, _ in bins])
    axes.set_xlabel("share of the autograded points, in %")
    axes.set_ylabel("submissions")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.15)
    return figure


def shares(entries: Sequence[Share]) -> Figure:
    """The share earned of each exercise; below one half the bar is hatched as well as recoloured."""
    figure = Figure(figsize=(8, 0.8 + 0.38 * len(entries)))
    axes = figure.subplots()
    for row, entry in enumerate(entries):
        weak = entry.share < 0.5
        axes.barh(
            row,
            100 * entry.share,
            color=COLOURS[1 if weak else 2],
            hatch=HATCHES[1 if weak else 0],
            edgecolor=COLOURS[0],
        )
        axes.text(100 * entry.share + 1, row, f"{100 * entry.share:.0f} %", va="center")
    axes.set_yticks(range(len(entries)), [entry.title for entry in entries])
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xlabel("share of the points earned, in % (hatched: less than half)")
    return figure


def frequencies(codes: Sequence[tuple[str, int]]) -> Figure:
    """In how many submissions each code occurs."""
    figure = Figure(figsize=(8, 0.8 + 0.34 * len(codes)))
    axes = figure.subplots()
    bars = axes.barh(range(len(codes)), [count for _, count in codes], color=COLOURS[3], edgecolor=COLOURS[0])
    axes.bar_label(bars, padding=3)
    axes.set_yticks(range(len(codes)), [code for code, _ in codes], family="monospace", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("submissions")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.1)
    return figure


def intervals(entries: Sequence[Standing]) -> Figure:
    """Robust accuracy with its interval, model by model; those that are not ranked have a hollow square."""
    figure = Figure(figsize=(8, 0.9 + 0.34 * len(entries)))
    axes = figure.subplots()
    for row, entry in enumerate(entries):
        low, high, at = 100 * entry.robust.low, 100 * entry.robust.high, 100 * entry.robust.share
        axes.plot([low, high], [row, row], color=COLOURS[0], linewidth=1.2)
        axes.plot(
            [at],
            [row],
            marker=MARKERS[1 if entry.doubt else 0],
            color=COLOURS[5 if entry.doubt else 2],
            fillstyle="none" if entry.doubt else "full",
        )
    axes.set_yticks(range(len(entries)), [entry.student for entry in entries])
    axes.invert_yaxis()
    axes.set_xlim(-2, 102)
    axes.set_xlabel("robust accuracy, in %, with its 95 % interval (hollow square: not ranked)")
    return figure


def _pictures(lesson: LessonReport) -> dict[str, Picture]:
    full = max(lesson.bins, key=lambda entry: entry[1])
    found = {
        "distribution": _picture(
            distribution(lesson.bins),
            f"Bar chart of {len(lesson.cards)} submissions by share of the points; most, {full[1]}, earned {full[0]}.",
        )
    }
    if any(entry.possible for entry in lesson.exercises):
        weakest = min(lesson.exercises, key=lambda entry: entry.share)
        alt = f"Bar chart of the share earned by exercise; the least is {weakest.title} with {weakest.share:.0%}."
        found["shares"] = _picture(shares(lesson.exercises), alt)
    if lesson.standings:
        best = lesson.standings[0]
        first = f"the first is {best.student} with {best.robust}" if not best.doubt else "none is ranked"
        alt = f"Robust accuracy of {len(lesson.standings)} models with 95 % intervals; {first}."
        found["standings"] = _picture(intervals(lesson.standings), alt)
    if lesson.codes:
        code, count = lesson.codes[0]
        alt = f"Bar chart of the most frequent codes; the first is {code}, in {count} submissions."
        found["codes"] = _picture(frequencies(lesson.codes), alt)
    return found


def _picture(figure: Figure, alt: str) -> Picture:
    return Picture(base64.b64encode(png(figure)).decode("ascii"), alt)


# --- the page --------------------------------------------------------------------------------------


def render(cards: Sequence[Scorecard]) -> str:
    """The page: it opens offline, runs no script, and names every figure's finding in words."""
    lessons = summarise(cards)
    return feedback.page("class.html.j2").render(
        lessons=[(lesson, _pictures(lesson)) for lesson in lessons],
        submissions=len(cards),
        number=feedback.number,
        missed=missed,
        few=FEW,
    )


def write_page(cards: Sequence[Scorecard], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(cards).encode())
