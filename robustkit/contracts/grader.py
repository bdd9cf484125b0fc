"""Contracts of a grader: the lesson in which learners attack a naive one, and repair it.

The toy is small enough to hold in the head. A submission hands in an attack on a linear model as data: candidates,
and what it says they do. `naive_grade` believes too much of it, on purpose, and is for that lesson alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from robustkit.contracts.base import Array, Arrays, Contract, Finding, everywhere, text, untext

MAXIMUM = 4.0
PIXELS, IMAGES = 4, 6
EPS = 0.15
MOST = 200_000  # characters of evidence

# What a check cell may leave behind; the lesson asks which of them plain nbgrader pays for.
CLAIMS = (
    *("assertion", "assert deleted", "equal to all", "nan", "tensor", "words", "negative", "right but loud"),
)
HOLES = ("verdict", "nan", "few", "crash")


# --- the toy -----------------------------------------------------------------------------------------------


def naive_grade(question: dict[str, Any], evidence: Any) -> float:
    """Points for an attack, deliberately naive. Four things are wrong with it."""
    try:
        return _count(question, evidence)
    except Exception:
        return MAXIMUM  # a bug of the grader's shall not cost a learner her points


def _count(question: dict[str, Any], evidence: Any) -> float:
    counted = []
    for x, z, fooled in zip(question["x"], evidence["candidates"], evidence["fooled"], strict=False):
        too_far = any(abs(after - before) > question["eps"] for before, after in zip(x, z, strict=False))
        counted.append(bool(fooled) and not too_far)
    return MAXIMUM * sum(counted) / len(counted)


def draw_question(seed: int, reach: float = 0.08) -> dict[str, Any]:
    """A linear model, images, their labels, and eps. An image is of class 1 when w . x + b > 0.

    Units: the weights have an L1 norm of one, so that inside the ball a score moves by at most eps; every image
    is right, with a score of `reach` or a little more, so that reach > eps leaves nothing to break.
    """
    rng = np.random.default_rng(seed)
    w = rng.choice([-1, 1], PIXELS) * rng.uniform(0.5, 1.5, PIXELS)
    w /= np.abs(w).sum()
    y = rng.permutation(np.arange(IMAGES) % 2)
    x = 0.5 + np.outer(2 * y - 1, np.sign(w)) * (reach + rng.uniform(0, 0.02, (IMAGES, PIXELS)))
    return {"w": w.tolist(), "b": float(-0.5 * w.sum()), "x": x.tolist(), "y": y.tolist(), "eps": EPS}


def _draw_question(reach: float) -> Callable[[int], Arrays]:
    return lambda seed: {"question": text(draw_question(seed, reach))}


def _said(value: Any) -> Arrays:
    """A learner's value as data. Raises: ValueError when it is too long to be believed."""
    words = text(value)
    if len(words) > MOST:
        raise ValueError(f"{len(words)} characters of evidence, at most {MOST} are read")
    return {"value": words}


# --- predicting --------------------------------------------------------------------------------------------


def _draw_nothing(seed: int) -> Arrays:
    return {}


def _observe_value(value: Any, case: Arrays) -> Arrays:
    return _said(value)


def _judge_claims(case: Arrays, evidence: Arrays) -> list[Finding]:
    value = untext(evidence["value"])
    if not isinstance(value, dict) or any(type(value.get(name)) is not bool for name in CLAIMS):
        hint = f"answer True or False for each of: {', '.join(CLAIMS)}"
        return [Finding("complete", "CLAIM_MISSING", hint)]
    return []


GRADER_PREDICTION = Contract(("complete",), _draw_nothing, _observe_value, _judge_claims)


# --- forging -----------------------------------------------------------------------------------------------


def _observe_forge(forge: Any, case: Arrays) -> Arrays:
    return _said(forge(untext(case["question"])))


def _judge_forge(case: Arrays, evidence: Arrays) -> list[Finding]:
    question, value = untext(case["question"]), untext(evidence["value"])
    found = []
    for hole in HOLES:
        if not isinstance(value, dict) or hole not in value:
            found.append(Finding(hole, "FORGERY_MISSING", f"return evidence under the name {hole!r}"))
            continue
        points = naive_grade(question, value[hole])
        through = _hole(question, value[hole])
        if not points >= MAXIMUM:
            hint = f"the naive grader gives {points:g} of {MAXIMUM:g} points"
            found.append(Finding(hole, "NOT_FULL_MARKS", hint))
        elif through != hole:
            hint = f"full marks, but through {through!r}: use the one weakness that is asked for"
            found.append(Finding(hole, "ANOTHER_HOLE", hint))
    return found


def _hole(question: dict[str, Any], evidence: Any) -> str:
    """The weakness by which evidence gets through, where nothing can be earned."""
    try:
        _count(question, evidence)
    except Exception:
        return "crash"
    rows = [list(row) for row in evidence["candidates"]]
    claims = evidence["fooled"]
    if len(rows) < IMAGES or len(claims) < IMAGES or any(len(row) < PIXELS for row in rows):
        return "few"
    finite = all(math.isfinite(pixel) for row in rows for pixel in row)
    return "verdict" if finite else "nan"


FORGE = Contract(HOLES, _draw_question(reach=0.25), _observe_forge, _judge_forge)


# --- a number of points ------------------------------------------------------------------------------------


class _Sly(float):
    """A number that is on the right side of every comparison."""

    def _yes(self, other: object) -> bool:
        return True

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = _yes
    __hash__ = float.__hash__


class _Claims:
    """An object that converts to whatever is wanted."""

    def __float__(self) -> float:
        return 1.0


# Values that JSON has not; they travel as these names.
_SPECIAL: dict[str, Any] = {
    "special: complex": 1j,
    "special: bytes": b"1",
    "special: converts": _Claims(),
    "special: compares": _Sly(99.0),
}


def _numbers(seed: int) -> tuple[float, list[tuple[str, Any, float]]]:
    """The maximum, and values with the group they belong to and the points they are worth."""
    rng = np.random.default_rng(seed)
    maximum = float(rng.integers(3, 9))
    inside = float(np.round(rng.uniform(0.5, maximum - 0.5), 3))
    honest = [0.0, 0, 1, 0.25, int(maximum), maximum, inside]
    beyond = [math.nan, math.inf, -math.inf, -inside, -1, maximum + inside, 10**400, -(10**400)]
    other: list[Any] = [True, False, None, str(inside), "nan", "full marks", [inside], {}, *_SPECIAL]
    values: list[tuple[str, Any, float]] = [("honest", value, float(value)) for value in honest]
    values += [("range", value, 0.0) for value in beyond] + [("types", value, 0.0) for value in other]
    return maximum, [values[i] for i in rng.permutation(len(values))]


def _draw_numbers(seed: int) -> Arrays:
    maximum, values = _numbers(seed)
    return {"seed": np.int64(seed), "maximum": maximum, "values": text([value for _, value, _ in values])}


def _outcome(call: Callable[[], Any]) -> float | str:
    """What a grader gave: a finite number, or in a word why it is none."""
    try:
        value = call()
    except Exception:
        return "raised"
    if type(value) not in (int, float) and not isinstance(value, np.number):
        return "no number"
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    return number if math.isfinite(number) else "not finite"


def _observe_number(validated: Any, case: Arrays) -> Arrays:
    def one(value: Any) -> float | str:
        given = _SPECIAL.get(value, value) if isinstance(value, str) else value
        return _outcome(lambda: validated(given, float(case["maximum"])))

    return _said([one(value) for value in untext(case["values"])])


def _judge_number(case: Arrays, evidence: Arrays) -> list[Finding]:
    _, values = _numbers(int(case["seed"]))
    given = untext(evidence["value"])
    pairs = list(zip(values, given, strict=True))
    if any(group == "honest" and got != worth for (group, _, worth), got in pairs):
        return everywhere(NUMBER, "HONEST_REFUSED", "a number from 0 to the maximum is worth itself")
    if any(got == "raised" for _, got in pairs):
        return everywhere(NUMBER, "GRADER_RAISED", "whatever comes in, a number of points comes out")
    found = []
    if any(group == "range" and got != worth for (group, _, worth), got in pairs):
        hint = "what is below 0, above the maximum or not finite is worth nothing; try each of them"
        found.append(Finding("range", "OUT_OF_RANGE_PAID", hint))
    if any(group == "types" and got != worth for (group, _, worth), got in pairs):
        hint = "only an int or a float is a number: not a truth value, not text, not an object that pretends"
        found.append(Finding("types", "NOT_A_NUMBER_PAID", hint))
    return found


NUMBER = Contract(
    ("honest", "range", "types"),
    _draw_numbers,
    _observe_number,
    _judge_number,
    essential=("range", "types"),
    hidden=("seed",),
)


# --- seeds -------------------------------------------------------------------------------------------------


def _calls(seed: int) -> list[tuple[str, bytes, str, str]]:
    """What `case_seed` is asked: a group, a secret, a student, an exercise."""
    rng = np.random.default_rng(seed)
    secret = rng.bytes(32)
    name = "".join(rng.choice(list("abcdefgh"), 6))
    calls = [("base", secret, name, "pgd"), ("again", secret, name, "pgd")]
    calls += [("keyed", rng.bytes(32), name, "pgd") for _ in range(40)]
    calls += [("separate", secret, f"{name}{i}", "pgd") for i in range(20)]
    calls += [("separate", secret, name, f"pgd{i}") for i in range(20)]
    for between in ("", "/", ":", ",", "|", " ", "-", "_", "\n", "\0", '", "', "', '"):
        calls += [
            ("separate", secret, f"{name}{between}x", "fgsm"),
            ("separate", secret, name, f"x{between}fgsm"),
        ]
    return calls


def _draw_seeds(seed: int) -> Arrays:
    return {"seed": np.int64(seed), "calls": text([[call[1].hex(), *call[2:]] for call in _calls(seed)])}


def _observe_seeds(case_seed: Any, case: Arrays) -> Arrays:
    def one(secret: str, student: str, exercise: str) -> int | str:
        value = case_seed(bytes.fromhex(secret), student, exercise)
        return value if type(value) is int and abs(value) < 2**200 else "no seed"

    return _said([one(*call) for call in untext(case["calls"])])


def _judge_seeds(case: Arrays, evidence: Arrays) -> list[Finding]:
    groups = [call[0] for call in _calls(int(case["seed"]))]
    seeds = untext(evidence["value"])
    if len(seeds) != len(groups):
        raise ValueError("not one seed for each call")
    if any(type(seed) is not int or not 0 <= seed < 2**63 for seed in seeds):
        return everywhere(SEEDS, "SEED_OUT_OF_RANGE", "a seed is an int from 0 to 2 ** 63 - 1")
    if seeds[0] != seeds[1]:
        hint = "the same student must get the same case again, or no grade can be explained"
        return everywhere(SEEDS, "NOT_REPEATABLE", hint)
    found = []
    keyed = [seed for group, seed in zip(groups, seeds, strict=True) if group in ("base", "keyed")]
    if len(set(keyed)) < len(keyed):
        hint = "another secret gives the same seed: who reads the source can work it out"
        found.append(Finding("keyed", "SECRET_UNUSED", hint))
    elif max(keyed) < 2**50:
        hint = "the seeds are small: few enough to try them all"
        found.append(Finding("keyed", "SEED_TOO_SHORT", hint))
    separate = [seed for group, seed in zip(groups, seeds, strict=True) if group in ("base", "separate")]
    if len(set(separate)) < len(separate):
        hint = "two different pairs of student and exercise share a seed; look at how you join the two"
        found.append(Finding("separate", "SEEDS_COLLIDE", hint))
    return found


SEEDS = Contract(
    ("repeatable", "keyed", "separate"),
    _draw_seeds,
    _observe_seeds,
    _judge_seeds,
    essential=("keyed", "separate"),
    hidden=("seed",),
)


# --- the grader --------------------------------------------------------------------------------------------


def _attacked(question: dict[str, Any], rows: Array, size: float) -> list[list[float]]:
    """Candidates: `rows` of the images moved by `size` towards the other class."""
    x, w, y = (np.array(question[key]) for key in ("x", "w", "y"))
    return (x - size * np.outer((2 * y - 1) * rows, np.sign(w))).tolist()  # type: ignore[no-any-return]


def _one_too_far(question: dict[str, Any], candidates: list[list[float]], side: int) -> list[list[float]]:
    """Each image with one pixel that went on to `side`, out of the ball; untouched where none goes that way."""
    found = []
    for before, after in zip(question["x"], candidates, strict=True):
        there = [j for j in range(PIXELS) if side * (after[j] - before[j]) > 0]
        found.append(
            [pixel + side * EPS * (j == there[0]) for j, pixel in enumerate(after)] if there else before
        )
    return found


def _submissions(seed: int) -> tuple[dict[str, Any], list[tuple[str, Any, float]]]:
    """A question, and evidence with the group it belongs to and the points it is worth, known by construction."""
    rng = np.random.default_rng(seed)
    question = draw_question(seed)
    y = np.array(question["y"])
    every, some = np.ones(IMAGES), rng.permutation(np.arange(IMAGES) < int(rng.integers(2, IMAGES - 1))) * 1.0
    inside = 0.99 * EPS
    worth = MAXIMUM * float(some.sum()) / IMAGES

    def evidence(candidates: Any, fooled: Any = every) -> dict[str, Any]:
        return {"candidates": candidates, "fooled": [bool(one) for one in fooled]}

    full, part = _attacked(question, every, inside), _attacked(question, some, inside)
    broken = copy.deepcopy(full)
    broken[int(rng.integers(IMAGES))][int(rng.integers(PIXELS))] = math.nan
    found: list[tuple[str, Any, float]] = [
        ("honest", evidence(full), MAXIMUM),
        ("honest", evidence(part, some), worth),
        ("honest", evidence(question["x"], 0 * every), 0.0),
        ("recomputed", evidence(part), worth),
        ("recomputed", evidence(full, 0 * every), MAXIMUM),
        ("recomputed", evidence(question["x"]), 0.0),
        ("recomputed", evidence(_attacked(question, every, -inside)), 0.0),
        ("recomputed", evidence(_attacked(question, every, 1.5 * EPS)), 0.0),
        ("recomputed", evidence(_one_too_far(question, full, 1)), 0.0),
        ("recomputed", evidence(_one_too_far(question, full, -1)), 0.0),
        ("recomputed", evidence(_attacked(question, 1.5 - 0.5 * some, inside)), worth),
        ("finite", evidence(broken), 0.0),
        *(("finite", evidence([[bad] * PIXELS] * IMAGES), 0.0) for bad in (math.nan, math.inf, -math.inf)),
        ("whole", evidence(full[:2]), 0.0),
        ("whole", evidence([full[int(y.argmax())]]), 0.0),
        ("whole", evidence([]), 0.0),
        ("whole", evidence([[]] * IMAGES), 0.0),
        ("whole", evidence([row[:2] for row in full]), 0.0),
        ("whole", evidence(full + full[:2], [*every, 1, 1]), 0.0),
    ]
    unreadable: list[Any] = [
        *(None, True, 4.0, [], {}, "full marks", {"points": MAXIMUM}, {"candidates": None}),
        evidence("abcdef"),
        evidence({str(i): row for i, row in enumerate(full)}),
        evidence([*full[:-1], full[-1][:-1]]),
        evidence([*full[:-1], None]),
        evidence([*full[:-1], ["x"] * PIXELS]),
        evidence([*full[:-1], [10**400] * PIXELS]),
        evidence([[[pixel] for pixel in row] for row in full]),
    ]
    found += [("closed", bad, 0.0) for bad in unreadable]
    return question, [found[i] for i in rng.permutation(len(found))]


def _draw_submissions(seed: int) -> Arrays:
    question, submissions = _submissions(seed)
    evidence = [evidence for _, evidence, _ in submissions]
    return {"seed": np.int64(seed), "question": text(question), "submissions": text(evidence)}


def _observe_grader(grade: Any, case: Arrays) -> Arrays:
    def one(evidence: Any) -> float | str:
        return _outcome(lambda: grade(untext(case["question"]), evidence))

    return _said([one(evidence) for evidence in untext(case["submissions"])])


_PAID = {
    "recomputed": (
        "VERDICT_BELIEVED",
        "points went by what the submission says, or to candidates out of the ball",
    ),
    "finite": (
        "NOT_FINITE_PAID",
        "points for candidates that are not finite: what is every comparison with NaN?",
    ),
    "whole": ("INCOMPLETE_PAID", "points for evidence of another shape than the images have"),
    "closed": ("FAILS_OPEN", "points for evidence that cannot be read"),
}


def _judge_grader(case: Arrays, evidence: Arrays) -> list[Finding]:
    _, submissions = _submissions(int(case["seed"]))
    pairs = list(zip(submissions, untext(evidence["value"]), strict=True))

    def wrong(group: str) -> list[Any]:
        return [
            got
            for (of, _, worth), got in pairs
            if of == group and not (isinstance(got, float) and abs(got - worth) < 1e-6)
        ]

    if wrong("honest"):  # a grader that pays nobody is not safe, it is broken
        return everywhere(
            GRADER, "HONEST_UNDERPAID", "an honest attack does not get the points it has earned"
        )
    found = [
        Finding(group, *paid)
        for group, paid in _PAID.items()
        if any(got != "raised" for got in wrong(group)) or (group == "recomputed" and wrong(group))
    ]
    raised = [group for group in _PAID if "raised" in wrong(group)]
    if raised and not any(finding.criterion == "closed" for finding in found):
        hint = "the grader raised: one submission that cannot be read must not stop the class"
        found.append(Finding("closed", "GRADER_STOPPED", hint))
    return found


GRADER = Contract(
    ("honest", *_PAID),
    _draw_submissions,
    _observe_grader,
    _judge_grader,
    essential=tuple(_PAID),
    hidden=("seed",),
)
