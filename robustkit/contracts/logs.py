"""The contract of reading a certification log: which rows cannot be what an honest run wrote, and why.

A log states sigma, n and alpha. Its rows are (index, label, prediction, radius, correct), prediction -1 where
it abstained, radii to six decimals. A faulty row has one fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri  # type: ignore[import-untyped]

from robustkit.certify import confidence
from robustkit.certify.certificates import ABSTAIN
from robustkit.contracts.base import Array, Arrays, Contract, Finding, everywhere
from robustkit.device import seeded

FAULTS = ("bound", "votes", "abstained", "verdict", "repeated")
TOLERANCE = 1e-5  # of a radius; the grid of possible ones is ten times as coarse, and more
_ROWS, _EACH = 48, 3  # rows, and how many of them have each fault
_UNKNOWN = -1
_QUESTIONS = {
    "bound": "how large can a radius be when every vote agrees?",
    "votes": "which radii can a whole number of n votes give?",
    "abstained": "what may a row say that certifies nothing?",
    "verdict": "who says whether a row is correct?",
    "repeated": "is every row an image of its own?",
}


def _possible(n: int, sigma: float, alpha: float) -> Array:
    """The radii that 0, 1, ... n votes of n certify; those that certify nothing left out."""
    bounds = np.array([confidence.lower_bound(k, n, alpha) for k in range(n + 1)])
    return np.asarray(sigma * ndtri(bounds[bounds > 0.5]))


def _draw_log(seed: int) -> Arrays:
    generator = seeded(seed, "log")

    def chosen(low: int, high: int, size: int = _ROWS) -> Array:
        return torch.randint(low, high, (size,), generator=generator).numpy()

    n, alpha = int(chosen(400, 900, 1)[0]), float(np.array([0.01, 0.001])[chosen(0, 2, 1)[0]])
    sigma = 0.12 + 0.7 * torch.rand((), generator=generator, dtype=torch.float64).item()
    possible = _possible(n, sigma, alpha)
    index = torch.randperm(10_000, generator=generator)[:_ROWS].numpy()
    label = chosen(0, 10)
    prediction, radius = label.copy(), possible[chosen(len(possible) // 3, len(possible))]
    # The first half is honest, and holds what only looks odd: a wrong class with a large radius, an honest
    # abstention, a radius at the bound, radii that rounding moved by less than the tolerance. Copies of its
    # rows are repeated in the second half.
    prediction[:3] = (label[:3] + 1) % 10
    prediction[3:6], radius[3:6], radius[6:9] = ABSTAIN, 0.0, possible[-1]
    radius[8:10] += 0.7 * TOLERANCE
    correct = (prediction == label).astype(np.int64)
    order = torch.randperm(_ROWS // 2, generator=generator).numpy()
    for values in (prediction, radius, correct, label):
        values[: _ROWS // 2] = values[: _ROWS // 2][order]
    faulty = _ROWS // 2 + torch.randperm(_ROWS // 2, generator=generator).numpy()[: _EACH * len(FAULTS)]
    bound, votes, abstained, verdict, repeated = faulty.reshape(len(FAULTS), _EACH)
    radius[bound] = possible[-1] * np.array([1.01, 1.2, 1.0]) + np.array([0, 0, 1.5 * TOLERANCE])
    steps = chosen(len(possible) // 3, len(possible) - 1, _EACH)
    radius[votes] = possible[steps] + 0.4 * (possible[steps + 1] - possible[steps])
    radius[votes[0]] = possible[steps[0]] + 1.5 * TOLERANCE
    prediction[abstained] = ABSTAIN
    radius[abstained[0]], correct[abstained] = 0.0, (1, 0, 1)
    correct[verdict[0]], prediction[verdict[1:]] = 0, (label[verdict[1:]] + 1) % 10
    copied = chosen(0, _ROWS // 2, _EACH)
    for values in (index, label, prediction, radius, correct):
        values[repeated] = values[copied]
    return {
        **{"index": index, "label": label, "prediction": prediction, "correct": correct},
        **{"radius": radius.round(6), "sigma": np.float64(sigma)},
        **{"n": np.int64(n), "alpha": np.float64(alpha)},
    }


def _observe_log(log_faults: Any, case: Arrays) -> Arrays:
    columns = ("index", "label", "prediction", "radius")
    correct = case["correct"].astype(bool).tolist()
    rows = list(zip(*(case[column].tolist() for column in columns), correct, strict=True))
    named = log_faults(rows, float(case["sigma"]), int(case["n"]), float(case["alpha"]))
    if not isinstance(named, Mapping) or not all(row in range(len(rows)) for row in named):
        return {"named": np.zeros(0, dtype=np.int64)}
    codes = np.zeros(len(rows), dtype=np.int64)
    for row, fault in named.items():
        codes[int(row)] = FAULTS.index(fault) + 1 if fault in FAULTS else _UNKNOWN
    return {"named": codes}


def _faults(case: Arrays) -> Array:
    """The number of each row's fault, counted from 1 as in FAULTS; 0 where it has none."""
    radius, abstains = case["radius"], case["prediction"] == ABSTAIN
    possible = _possible(int(case["n"]), float(case["sigma"]), float(case["alpha"]))
    first = np.unique(case["index"], return_index=True)[1]
    conditions = (
        radius > possible[-1] + TOLERANCE,
        ~abstains & (np.abs(radius[:, None] - possible).min(1) > TOLERANCE),
        abstains & ((radius > 0) | (case["correct"] == 1)),
        ~abstains & ((case["prediction"] == case["label"]) != (case["correct"] == 1)),
        ~np.isin(np.arange(len(radius)), first),
    )
    return np.select(conditions, np.arange(1, len(FAULTS) + 1))


def _judge_log(case: Arrays, evidence: Arrays) -> list[Finding]:
    named, faults = evidence["named"], _faults(case)
    if named.shape != faults.shape:
        hint = "expected a dictionary from row numbers, counted from 0, to faults"
        return everywhere(CERTIFICATION_LOG, "WRONG_SHAPE", hint)
    found = []
    for number, fault in enumerate(FAULTS, 1):
        right, called = faults == number, named == number
        if not called[right].all():
            hint = (
                f"{called[right].sum()} of {right.sum()} rows with this fault are named; {_QUESTIONS[fault]}"
            )
            found.append(Finding(fault, "FAULT_MISSED", hint))
        elif called[(faults != 0) & ~right].any():
            hint = f"a row with another fault is called {fault!r}; {_QUESTIONS[fault]}"
            found.append(Finding(fault, "FAULT_MISNAMED", hint))
    if (named == _UNKNOWN).any():
        hint = f"a fault is one of {', '.join(FAULTS)}, and you have a word of your own"
        found.append(Finding("quiet", "UNKNOWN_FAULT", hint))
    elif named[faults == 0].any():
        row = int(np.flatnonzero((faults == 0) & (named != 0))[0])
        shown = f"prediction {case['prediction'][row]}, radius {case['radius'][row]:g}"
        hint = (
            f"row {row} ({shown}) is what an honest run can write, and you call it {FAULTS[named[row] - 1]!r}"
        )
        found.append(Finding("quiet", "FALSE_ACCUSATION", hint))
    return found


CERTIFICATION_LOG = Contract((*FAULTS, "quiet"), _draw_log, _observe_log, _judge_log, essential=FAULTS)
