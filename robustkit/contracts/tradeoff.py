"""Contracts of choosing a defence: three accuracies on the same points, covering balls, costs, paired
comparisons, requirements, and certified and empirical defences combined.

To abstain is to answer None, as in `certify`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import bdtr  # type: ignore[import-untyped]

from robustkit.contracts.base import Array, Arrays, Contract, Finding, numbers, shaped
from robustkit.contracts.oracle import uniform
from robustkit.device import seeded
from robustkit.results import Interval
from robustkit.threat import Ball

_NONE = -1  # None, among numbers


class Record(NamedTuple):
    """What is known of one image under one attack: the classes answered, and the certificate.

    `clean` is the class answered on the image as it is, `attacked` that on the worst candidate found, whose
    perturbation has the size `size`; None is an abstention. `certificate` is None or (class, radius), the
    radius in the norm of the attack.
    """

    label: int
    clean: int | None
    attacked: int | None
    size: float
    certificate: tuple[int, float] | None


class Claim(NamedTuple):
    """A robust accuracy that somebody states: how it was had ("empirical", "certified"), where, how much."""

    kind: str
    ball: Ball
    share: Interval


class Offer(NamedTuple):
    """A defence to choose: its clean accuracy, its claims, and the seconds that one decision takes."""

    name: str
    clean: Interval
    claims: tuple[Claim, ...]
    seconds: float


class Need(NamedTuple):
    """What a deployment requires: accuracies at least, in a ball, proved or not, seconds at most."""

    clean: float
    robust: float
    ball: Ball
    guarantee: bool
    seconds: float


def _order(generator: torch.Generator, n: int) -> Array:
    return np.asarray(torch.randperm(n, generator=generator).numpy())


def _optional(value: Any) -> Array:
    """A number, or the mark of None."""
    return numbers(_NONE if value is None else value)


# --- the sandwich: certified <= true <= empirical ---------------------------------------------------

_SANDWICH = ("empirical", "certified", "contradictions")
_T, _A, _B = 0, 1, 2  # an image's true class, and two wrong ones, in the rows below

# (how many, clean, attacked, size, certified class, radius, impossible), sizes and radii in eps. Impossible is
# what no sound system can show.
_ROWS = (
    (9, _T, _T, 0.9, _T, 1.4, False),
    (5, _T, _T, 0.9, _T, 1.0, False),  # a certificate of just this radius holds at this radius
    (4, _T, _T, 0.9, _T, 0.6, False),
    (3, _T, _A, 0.9, _T, 0.6, False),  # broken, and outside its radius: as it should be
    (1, _T, _A, 0.6, _T, 0.6, False),  # broken at just its radius: no candidate is nearer
    (2, _T, _A, 0.5, _T, 0.8, True),  # broken inside a radius that does not reach eps
    (3, _T, _A, 0.7, _T, 1.3, True),
    (1, _T, None, 0.7, _T, 1.3, False),  # to abstain is no other class
    (2, _A, _A, 0.0, _A, 1.2, False),  # certified, and wrong
    (1, _A, _T, 0.8, _A, 1.5, True),  # carried to the right class, where no other class should be
    (1, _A, _T, 0.8, None, 0.0, False),
    (2, _A, _T, 0.0, _T, 1.1, True),  # another class without any perturbation
    (1, None, _T, 0.4, _T, 1.2, False),
    (4, _T, _T, 0.9, None, 0.0, False),
    (3, _T, _A, 0.6, None, 0.0, False),
    (2, _T, None, 0.6, None, 0.0, False),
    (1, _A, _B, 0.3, None, 0.0, False),
)


def _draw_records(seed: int) -> Arrays:
    generator = seeded(seed, "records")
    rows = [row for row in _ROWS for _ in range(row[0])]
    rows = [rows[i] for i in _order(generator, len(rows))]
    label = torch.randint(0, 10, (len(rows),), generator=generator).tolist()
    eps = uniform(generator, 0.3, 1.2, 1).item()

    def classes(column: int) -> Array:
        """True and wrong classes by name as the classes of these images."""
        pairs = zip(label, (row[column] for row in rows), strict=True)
        return np.array([_NONE if role is None else (y + 3 * role) % 10 for y, role in pairs])

    return {
        "label": np.array(label),
        "clean": classes(1),
        "attacked": classes(2),
        "size": eps * np.array([row[3] for row in rows]),
        "certified": classes(4),
        "radius": np.array([eps if row[5] == 1.0 else eps * row[5] for row in rows]),
        "impossible": np.array([row[6] for row in rows]),
        "eps": np.float64(eps),
    }


def _records(case: Arrays) -> list[Record]:
    columns = (case[name].tolist() for name in ("label", "clean", "attacked", "size", "certified", "radius"))
    return [
        Record(
            label,
            None if clean == _NONE else clean,
            None if attacked == _NONE else attacked,
            size,
            None if certified == _NONE else (certified, radius),
        )
        for label, clean, attacked, size, certified, radius in zip(*columns, strict=True)
    ]


def _observe_sandwich(sandwich: Any, case: Arrays) -> Arrays:
    clean, empirical, certified, contradictions = sandwich(_records(case), float(case["eps"]))
    flagged = np.zeros(len(case["label"]), dtype=bool)
    flagged[[int(position) for position in contradictions]] = True
    return {"counts": np.stack([numbers(clean), numbers(empirical), numbers(certified)]), "flagged": flagged}


def _judge_sandwich(case: Arrays, evidence: Arrays) -> list[Finding]:
    y, eps = case["label"], float(case["eps"])
    shaped(evidence, {"counts": (3,), "flagged": (len(y),)})
    clean, empirical, certified = evidence["counts"]
    right, kept, proved = case["clean"] == y, case["attacked"] == y, case["certified"] == y
    reaches = case["radius"] >= eps
    found = []
    if (
        np.abs(
            evidence["counts"] * len(y) - [right.sum(), (right & kept).sum(), (proved & reaches).sum()]
        ).max()
        < 1e-6
    ):
        hint = "these are shares; return counts, because an interval needs k and n"
        return [Finding(criterion, "SHARES_NOT_COUNTS", hint) for criterion in _SANDWICH]
    if clean != right.sum() or empirical != (right & kept).sum():
        code, hint = (
            "WRONG_COUNT",
            f"{clean:g} right untouched and {empirical:g} right under attack is not what the records say",
        )
        if empirical == kept.sum():
            code, hint = (
                "CLEAN_ERRORS_COUNTED",
                "an image that is misclassified untouched is counted as robust",
            )
        elif empirical == (right & (kept | (case["attacked"] == _NONE))).sum():
            code, hint = (
                "ABSTENTION_COUNTED",
                "a system that abstains under attack has not given the right answer",
            )
        found.append(Finding("empirical", code, hint))
    if certified != (proved & reaches).sum():
        code, hint = "WRONG_COUNT", f"{certified:g} is not the number certified at eps for the true class"
        if certified == ((case["certified"] != _NONE) & reaches).sum():
            code, hint = (
                "CLEAN_ERRORS_COUNTED",
                "a certificate for the wrong class, however large, is no robust success",
            )
        elif certified == (proved & (case["radius"] > eps)).sum():
            code, hint = "TIES_DROPPED", "a certificate of just this radius holds at this radius"
        elif certified == proved.sum():
            code, hint = "RADIUS_IGNORED", "some of these certificates do not reach eps"
        found.append(Finding("certified", code, hint))
    for code, wrong in (
        ("CONTRADICTION_MISSED", case["impossible"] & ~evidence["flagged"].astype(bool)),
        ("FALSE_CONTRADICTION", ~case["impossible"] & evidence["flagged"].astype(bool)),
    ):
        if wrong.any():
            record = _records(case)[int(np.flatnonzero(wrong)[0])]
            found.append(Finding("contradictions", code, f"at eps {eps:.3f}: {_shown(record)}"))
    return found


def _shown(record: Record) -> str:
    held = "no certificate"
    if record.certificate is not None:
        held = f"class {record.certificate[0]} certified within {record.certificate[1]:.3f}"
    return f"{held}; answers {record.clean} untouched, {record.attacked} at distance {record.size:.3f}"


SANDWICH = Contract(_SANDWICH, _draw_records, _observe_sandwich, _judge_sandwich, hidden=("impossible",))


# --- one ball inside another ------------------------------------------------------------------------

_COVERS = ("same_norm", "across_norms")
_NORMS = ("Linf", "L2")


def _draw_balls(seed: int) -> Arrays:
    """Pairs of balls on either side of every threshold, in dimensions where a root is an integer or not."""
    generator = seeded(seed, "balls")
    rows = []
    for claimed in (0, 1):
        for needed in (0, 1):
            for ratio in (0.5, 0.9, 1.0, 1.1, 2.0):
                d = int(torch.randint(20, 4000, (), generator=generator))
                eps = 2.0 ** -int(torch.randint(1, 5, (), generator=generator))
                if ratio == 1.0:
                    d = (16, 64, 256, 1024)[d % 4]  # its root is exact in floats
                least = eps * math.sqrt(d) if claimed > needed else eps
                rows.append((claimed, ratio * least, needed, eps, d))
    # An Linf ball that the root of d would refuse, and that holds the L2 ball of its own radius.
    rows += [(0, 0.6, 1, 0.5, 784), (0, 0.1, 1, 2.0, 784), (1, 0.5, 0, 0.1, 784)]
    return {"rows": np.array(rows)[_order(generator, len(rows))]}


def _observe_covers(covers: Any, case: Arrays) -> Arrays:
    answers = [
        bool(covers(Ball(_NORMS[int(a)], claimed), Ball(_NORMS[int(b)], needed), int(d)))
        for a, claimed, b, needed, d in case["rows"].tolist()
    ]
    return {"answers": np.array(answers)}


def _judge_covers(case: Arrays, evidence: Arrays) -> list[Finding]:
    claimed, claimed_eps, needed, needed_eps, d = case["rows"].T
    shaped(evidence, {"answers": claimed.shape})
    least = np.where(claimed > needed, needed_eps * np.sqrt(d), needed_eps)
    right = claimed_eps >= least
    answers = evidence["answers"].astype(bool)
    found = []
    for criterion, part in zip(_COVERS, (claimed == needed, claimed != needed), strict=True):
        # A cover that is none is the worse mistake, and named first.
        for code, does, wrong in (
            ("FALSE_COVER", "is not all", part & answers & ~right),
            ("COVER_MISSED", "is all", part & ~answers & right),
        ):
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                ball = f"{_NORMS[int(claimed[row])]} {claimed_eps[row]:.3g}"
                other = f"{_NORMS[int(needed[row])]} {needed_eps[row]:.3g} in {int(d[row])} dimensions"
                found.append(Finding(criterion, code, f"{other} {does} within {ball}"))
                break
    return found


COVERS = Contract(_COVERS, _draw_balls, _observe_covers, _judge_covers)


# --- cost per decision, and where two costs meet ------------------------------------------------------

_COST = ("amortised", "crossing", "edges")
# (training, seconds per decision) of a and b, and the answer: cheaper all along, equal, or never.
_COST_EDGES = (
    ((10.0, 0.1), (20.0, 0.2), 0),
    ((20.0, 0.2), (10.0, 0.1), _NONE),
    ((10.0, 0.2), (20.0, 0.1), _NONE),
    ((10.0, 0.1), (10.0, 0.1), 0),
    ((20.0, 0.1), (10.0, 0.1), _NONE),
    ((10.0, 0.1), (10.0, 0.2), 0),
)


def _draw_costs(seed: int) -> Arrays:
    generator = seeded(seed, "costs")
    cheap, dear = uniform(generator, 1e-4, 1e-3, 6), uniform(generator, 5e-3, 5e-1, 6)
    low = uniform(generator, 10, 100, 6)
    # Between two whole numbers of decisions, so that no rounding decides.
    meet = torch.randint(50, 5000, (6,), generator=generator).numpy() + 0.3
    return {
        "training": uniform(generator, 50, 5000, 6),
        "passes": torch.randint(1, 2000, (6,), generator=generator).numpy(),
        "per_pass": uniform(generator, 1e-5, 1e-3, 6),
        "decisions": torch.randint(10, 10_000, (6,), generator=generator).numpy(),
        "a": np.stack([low + meet * (dear - cheap), cheap], 1),
        "b": np.stack([low, dear], 1),
        "meet": np.ceil(meet),
    }


def _observe_costs(subject: Any, case: Arrays) -> Arrays:
    cost, break_even = subject
    columns = (case[name].tolist() for name in ("training", "passes", "per_pass", "decisions"))
    pairs = zip(case["a"].tolist(), case["b"].tolist(), strict=True)
    return {
        "cost": np.stack([numbers(cost(*row)) for row in zip(*columns, strict=True)]),
        "meet": np.stack([_optional(break_even(tuple(a), tuple(b))) for a, b in pairs]),
        "edges": np.stack([_edge(break_even, a, b) for a, b, _ in _COST_EDGES]),
    }


def _edge(break_even: Any, a: tuple[float, float], b: tuple[float, float]) -> Array:
    """The answer at an edge, where an exception or infinity costs the edges and not everything."""
    try:
        answer = _optional(break_even(a, b))
    except ZeroDivisionError:
        return numbers(-2)
    return np.where(np.isfinite(answer), answer, -2.0)


def _judge_costs(case: Arrays, evidence: Arrays) -> list[Finding]:
    n = len(case["training"])
    if evidence["cost"].shape != (n,) or evidence["meet"].shape != (n,):
        raise ValueError("one number for each call")
    shaped(evidence, {"edges": (len(_COST_EDGES),)})
    running = case["passes"] * case["per_pass"]
    expected, got, found = case["training"] / case["decisions"] + running, evidence["cost"], []

    def near(values: Array) -> bool:
        return bool(np.allclose(got, values, rtol=1e-6, atol=0))

    if not near(expected):
        code, hint = "WRONG_COST", f"{got[0]:.4g} s is not what one of {case['decisions'][0]} decisions costs"
        if near(running):
            code, hint = (
                "TRAINING_IGNORED",
                "somebody paid for the training; what is its share in a decision?",
            )
        elif near(case["training"] + running):
            code, hint = (
                "TRAINING_NOT_SHARED",
                "the training serves every decision, and each is charged all of it",
            )
        elif near(expected * case["decisions"]):
            code, hint = "TOTAL_NOT_SHARE", "this is the cost of all decisions together"
        found.append(Finding("amortised", code, hint))
    meet = evidence["meet"]
    if (meet != case["meet"]).any():
        row = int(np.flatnonzero(meet != case["meet"])[0])
        after = "None" if meet[row] == _NONE else f"{meet[row]:g}"
        code, hint = (
            "WRONG_CROSSING",
            f"{after} is not the first number of decisions at which a costs no more",
        )
        if (np.abs(meet - case["meet"]) <= 1).all():
            code, hint = "NOT_WHOLE", "decisions are whole, and the first that suffices is asked for"
        found.append(Finding("crossing", code, hint))
    for (a, b, right), answer in zip(_COST_EDGES, evidence["edges"].tolist(), strict=True):
        if answer != right:
            said = f"a trains {a[0]:g} s and decides in {a[1]:g} s, b {b[0]:g} s and {b[1]:g} s"
            found.append(
                Finding("edges", "EDGE_CASES", f"{said}: who is cheaper in the long run, and from when?")
            )
            break
    return found


COST = Contract(_COST, _draw_costs, _observe_costs, _judge_costs, hidden=("meet",))


# --- a paired comparison ------------------------------------------------------------------------------

_PAIRED = ("difference", "interval", "p_value")
_PAIRS = ("first", "second", "third", "far", "same")


def _draw_verdicts(seed: int) -> Arrays:
    """Verdicts of two defences that mostly fail on the same images; far apart; and the same on every image."""
    generator = seeded(seed, "verdicts")
    case: Arrays = {}
    for name in _PAIRS[:-1]:
        both, only_a = (int(torch.randint(*ends, (), generator=generator)) for ends in ((200, 280), (22, 40)))
        only_b = only_a - int(torch.randint(8, 18, (), generator=generator))
        if name == "far":  # so that the square of the difference has its weight in the interval
            both, only_a, only_b = both - 180, only_a + 180, only_b + 10
        kinds = np.repeat([3, 1, 2, 0], [both, only_a, only_b, 400 - both - only_a - only_b])
        kinds = kinds[_order(generator, 400)]
        case[f"{name}_a"], case[f"{name}_b"] = (kinds & 1).astype(bool), (kinds & 2).astype(bool)
    case["same_a"] = case["same_b"] = case["first_a"]
    return case


def _observe_paired(paired: Any, case: Arrays) -> Arrays:
    rows = []
    for name in _PAIRS:
        a, b = (torch.from_numpy(case[f"{name}_{side}"].copy()) for side in "ab")
        row = np.stack([numbers(value) for value in paired(a, b)])
        # With no image to tell the two apart a test may divide by zero: it costs its criterion alone.
        rows.append(np.where(np.isnan(row), -1.0, row) if name == "same" else row)
    return {"rows": np.stack(rows)}


def _expected(a: Array, b: Array) -> tuple[float, float, float]:
    """The difference, the paired standard error, and McNemar's exact p."""
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    difference = (only_a - only_b) / n
    error = math.sqrt((only_a + only_b) / n - difference**2) / math.sqrt(n)
    p = min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))
    return difference, error, p


def _judge_paired(case: Arrays, evidence: Arrays) -> list[Finding]:
    rows = evidence["rows"]
    if rows.shape != (len(_PAIRS), 4):
        hint = "expected four numbers: the difference, the two ends of its interval, and p"
        return [Finding(criterion, "WRONG_SHAPE", hint) for criterion in _PAIRED]
    expected = np.array([_expected(case[f"{name}_a"], case[f"{name}_b"]) for name in _PAIRS])
    difference, error, p = expected.T
    found = []
    if np.abs(rows[:, 0] - difference).max() > 1e-6:
        code, hint = (
            "WRONG_DIFFERENCE",
            f"a is right on {difference[0]:+.1%} more of the images than b; got {rows[0, 0]:+.4f}",
        )
        if np.abs(rows[:, 0] + difference).max() <= 1e-6:
            code, hint = "SIGN_REVERSED", "the difference is a's accuracy less b's"
        found.append(Finding("difference", code, hint))
    half = 1.96 * error
    # A bootstrap's ends are as coarse as one image and its draws; 5,000 draws stay well inside of this.
    slack = 0.13 * half + 1e-6
    ends = np.stack([difference - half, difference + half], 1)
    if (np.abs(rows[:, 1:3] - ends) > slack[:, None]).any():
        shares = [(case[f"{name}_a"].mean(), case[f"{name}_b"].mean()) for name in _PAIRS[:-1]]
        unpaired = 1.96 * np.array([math.sqrt((s * (1 - s) + t * (1 - t)) / 400) for s, t in shares])
        width = (rows[:-1, 2] - rows[:-1, 1]) / 2
        code, hint = (
            "WRONG_INTERVAL",
            f"[{rows[0, 1]:+.3f}, {rows[0, 2]:+.3f}] is not the paired 95 % interval of the difference",
        )
        if (np.abs(width - unpaired) < 0.1 * unpaired).all():
            code, hint = (
                "UNPAIRED_INTERVAL",
                "this is the interval for two different sets of images; yours are the same",
            )
        found.append(Finding("interval", code, hint))
    if np.abs(rows[:, 3] - p).max() > 1e-4:
        code, hint = "WRONG_P", f"p = {rows[0, 3]:.4f} is not McNemar's exact, two-sided p"
        if np.abs(rows[:-1, 3] - p[:-1] / 2).max() <= 1e-4:
            code, hint = "ONE_SIDED_TEST", "nobody said beforehand which defence would win"
        elif np.abs(rows[:-1, 3] - p[:-1]).max() <= 1e-4:
            code, hint = "EDGE_CASES", "two defences that are right on the very same images do not differ"
        found.append(Finding("p_value", code, hint))
    return found


PAIRED = Contract(_PAIRED, _draw_verdicts, _observe_paired, _judge_paired)


# --- which defences meet a requirement ----------------------------------------------------------------

_ADMISSIBLE = ("floors", "guarantee", "latency")
_N = 500
# Shares of 500: above the floor, with the lower bound just on it, above it in the estimate alone, below.
_GOOD, _JUST, _THIN, _LOW = 0.9, 0.836, 0.82, 0.5
_FLOOR = Interval(round(_JUST * _N), _N).low
# (criterion, clean, claims of (kind, eps in the needed eps, share), seconds in those allowed, fit with proof,
# fit without)
_OFFERS = (
    ("floors", _GOOD, (("certified", 1.0, _GOOD),), 0.5, True, True),
    ("floors", _GOOD, (("certified", 1.5, _GOOD), ("certified", 3.0, _LOW)), 0.5, True, True),
    ("floors", _JUST, (("certified", 1.0, _JUST),), 0.5, True, True),
    ("floors", _THIN, (("certified", 1.0, _GOOD),), 0.5, False, False),
    ("floors", _GOOD, (("certified", 1.0, _THIN),), 0.5, False, False),
    ("floors", _LOW, (("certified", 1.0, _GOOD),), 0.5, False, False),
    ("floors", _GOOD, (("certified", 1.0, _LOW),), 0.5, False, False),
    ("floors", _GOOD, (("certified", 0.5, _GOOD),), 0.5, False, False),
    ("guarantee", _GOOD, (("empirical", 1.0, _GOOD),), 0.5, False, True),
    ("guarantee", _GOOD, (("empirical", 1.0, _GOOD), ("certified", 1.0, _LOW)), 0.5, False, True),
    ("guarantee", _GOOD, (("empirical", 2.0, _GOOD), ("certified", 0.5, _GOOD)), 0.5, False, True),
    ("latency", _GOOD, (("certified", 1.0, _GOOD),), 1.5, False, False),
    ("latency", _GOOD, (("certified", 1.0, _GOOD),), 1.0, True, True),
)


def _draw_offers(seed: int) -> Arrays:
    """The norm, eps and seconds of the requirement, and the order of the offers."""
    generator = seeded(seed, "offers")
    return {
        "norm": np.int64(torch.randint(0, 2, (), generator=generator)),
        "eps": np.float64(2.0 ** -int(torch.randint(0, 4, (), generator=generator))),
        "seconds": uniform(generator, 0.05, 2.0, 1)[0],
        "order": _order(generator, len(_OFFERS)),
    }


def _offers(case: Arrays) -> list[Offer]:
    ball, eps, seconds = _NORMS[int(case["norm"])], float(case["eps"]), float(case["seconds"])

    def share(value: float) -> Interval:
        return Interval(round(value * _N), _N)

    return [
        Offer(
            f"defence {i}",
            share(clean),
            tuple(Claim(kind, Ball(ball, times * eps), share(value)) for kind, times, value in claims),
            part * seconds,
        )
        for i, (_, clean, claims, part, _, _) in ((i, _OFFERS[i]) for i in case["order"].tolist())
    ]


def _observe_admissible(admissible: Any, case: Arrays) -> Arrays:
    offers, seen = _offers(case), []
    ball = Ball(_NORMS[int(case["norm"])], float(case["eps"]))
    for guarantee in (True, False):
        need = Need(_FLOOR, _FLOOR, ball, guarantee, float(case["seconds"]))
        names = {str(name) for name in admissible(need, list(offers), 784)}
        if unknown := names - {offer.name for offer in offers}:
            raise ValueError(f"{min(unknown)!r} was not offered; return names of the offers")
        seen.append([f"defence {i}" in names for i in range(len(_OFFERS))])
    return {"chosen": np.array(seen)}


def _judge_admissible(case: Arrays, evidence: Arrays) -> list[Finding]:
    shaped(evidence, {"chosen": (2, len(_OFFERS))})
    chosen, found = evidence["chosen"].astype(bool), []
    if not chosen.any():
        return [
            Finding(criterion, "NOTHING_ADMITTED", "some of these offers do meet the need")
            for criterion in _ADMISSIBLE
        ]
    for criterion in _ADMISSIBLE:
        for column, proof in ((0, "a proof is needed"), (1, "no proof is needed")):
            wrong = [
                i
                for i, offer in enumerate(_OFFERS)
                if offer[0] == criterion and chosen[column, i] != offer[4 + column]
            ]
            if wrong:
                _, clean, claims, part, _, _ = _OFFERS[wrong[0]]
                stated = ", ".join(f"{kind} {value:.1%} at {times:g} eps" for kind, times, value in claims)
                code = "WRONGLY_ADMITTED" if chosen[column, wrong[0]] else "WRONGLY_REFUSED"
                offered = f"clean {clean:.1%}, {stated} (n={_N}), {part:g} of the time allowed"
                hint = f"{proof}, floors {_FLOOR:.1%}: {offered}"
                found.append(Finding(criterion, code, hint))
                break
    return found


ADMISSIBLE = Contract(_ADMISSIBLE, _draw_offers, _observe_admissible, _judge_admissible)


# --- certified and empirical, combined ----------------------------------------------------------------

_ROUTE = ("certified", "unproved", "guarantee")
_LANES = ("certified", "checked", "review")
# (certified class or None, radius in eps, the empirical model's class, the answer, the lane)
_ROUTES = (
    (3, 1.5, 3, 3, "certified"),
    (3, 1.5, 5, 3, "certified"),  # a proof is not put to the vote
    (3, 1.5, None, 3, "certified"),
    (3, 1.0, 3, 3, "certified"),
    (0, 1.2, 4, 0, "certified"),  # class 0 is a class
    (3, 0.5, 3, 3, "checked"),
    (0, 0.5, 0, 0, "checked"),
    (3, 0.0, 3, 3, "checked"),
    (3, 0.5, 5, None, "review"),
    (3, 0.9, None, None, "review"),
    (None, 0.0, 5, None, "review"),
    (None, 0.0, None, None, "review"),
)


def _draw_routes(seed: int) -> Arrays:
    generator = seeded(seed, "routes")
    n = 60
    y = torch.randint(0, 10, (n,), generator=generator).numpy()
    kind = np.arange(n)[_order(generator, n)]
    eps = 2.0 ** -int(torch.randint(0, 4, (), generator=generator))
    radius = eps * np.select([kind < 12, kind < 20, kind < 36], [2.5, 2.0, 1.5], 0.5)
    radius[kind >= 52] = 2.5 * eps
    certified = np.where(kind >= 56, _NONE, np.where(kind >= 52, (y + 1) % 10, y))  # four are certified wrong
    return {
        "eps": np.float64(eps),
        "order": _order(generator, len(_ROUTES)),
        "y": y,
        "certified": certified,
        "radius": radius,
    }


def _certificate(label: int | None, radius: float) -> tuple[int, float] | None:
    return None if label is None or label == _NONE else (label, radius)


def _observe_route(subject: Any, case: Arrays) -> Arrays:
    route, guaranteed = subject
    eps, answers, lanes = float(case["eps"]), [], []
    for i in case["order"].tolist():
        label, radius, other, _, _ = _ROUTES[i]
        answer, lane = route(_certificate(label, radius * eps), other, eps)
        answers.append(_optional(answer))
        lanes.append(_LANES.index(str(lane)) if str(lane) in _LANES else _NONE)
    pairs = zip(case["certified"].tolist(), case["radius"].tolist(), strict=True)
    certificates = [_certificate(label, radius) for label, radius in pairs]
    return {
        "answers": np.stack(answers),
        "lanes": np.array(lanes),
        "guaranteed": numbers(guaranteed(certificates, torch.from_numpy(case["y"].copy()), eps)),
    }


def _judge_route(case: Arrays, evidence: Arrays) -> list[Finding]:
    n = (len(_ROUTES),)
    shaped(evidence, {"answers": n, "lanes": n, "guaranteed": ()})
    found = {}
    rows = zip(case["order"].tolist(), evidence["answers"].tolist(), evidence["lanes"].tolist(), strict=True)
    for i, answer, lane in rows:
        label, radius, other, right, right_lane = _ROUTES[i]
        if answer == (_NONE if right is None else right) and lane == _LANES.index(right_lane):
            continue
        held = "no certificate" if label is None else f"class {label} certified within {radius:g} eps"
        shown = f"{held}, the other model says {other}: "
        shown += (
            "no lane of the three"
            if lane == _NONE
            else f"you answer {'None' if answer == _NONE else f'{answer:g}'}, {_LANES[int(lane)]}"
        )
        criterion = "certified" if right_lane == "certified" else "unproved"
        code = "WRONG_ANSWER" if lane == _LANES.index(right_lane) else "WRONG_LANE"
        found[criterion] = Finding(criterion, code, shown)
    right = case["certified"] == case["y"]
    ratio = case["radius"] / float(case["eps"])
    got = float(evidence["guaranteed"])
    if got != (right & (ratio >= 2)).sum():
        code, hint = (
            "WRONG_COUNT",
            f"{got:g} is not the number of images that no attacker can take out of the lane",
        )
        if got == (right & (ratio >= 1)).sum():
            code, hint = (
                "DOWNGRADE_MISSED",
                "the attacker moves the image first and the certificate is computed then: what is left of it?",
            )
        elif got == ((case["certified"] != _NONE) & (ratio >= 2)).sum():
            code, hint = "CLEAN_ERRORS_COUNTED", "a certificate for the wrong class guarantees a mistake"
        elif got == (right & (ratio > 2)).sum():
            code, hint = "TIES_DROPPED", "just enough is enough"
        found["guarantee"] = Finding("guarantee", code, hint)
    return list(found.values())


ROUTE = Contract(_ROUTE, _draw_routes, _observe_route, _judge_route)
