"""Mutants of reading a certification log."""

from __future__ import annotations

import numpy as np
from scipy import stats

from robustkit.contracts.logs import FAULTS
from tests.mutants import declare, mutant


def _possible(sigma, n, alpha):
    k = np.arange(1, n + 1)
    bounds = stats.beta.ppf(alpha, k, n - k + 1)
    return sigma * stats.norm.ppf(bounds[bounds > 0.5])


def _read(rows, sigma, n, alpha, leave_out=(), tolerance=1e-5, grid=None):
    possible, faults, seen = _possible(sigma, n, alpha), {}, set()
    grid = possible if grid is None else grid
    for i, (index, label, prediction, radius, correct) in enumerate(rows):
        tests = {
            "bound": radius > possible[-1] + tolerance,
            "votes": prediction != -1 and np.abs(grid - radius).min() > tolerance,
            "abstained": prediction == -1 and (radius > 0 or correct),
            "verdict": prediction != -1 and (prediction == label) != correct,
            "repeated": index in seen,
        }
        seen.add(index)
        found = [fault for fault, holds in tests.items() if holds and fault not in leave_out]
        if found:
            faults[i] = found[0]
    return faults


@mutant("certification_log", bound="FAULT_MISSED", votes="FAULT_MISNAMED")
def bound_not_known(rows, sigma, n, alpha):
    """A radius that is too large is none that votes give, either."""
    return _read(rows, sigma, n, alpha, ["bound"])


@mutant("certification_log", bound="FAULT_MISSED")
def bound_of_other_settings(rows, sigma, n, alpha):
    """3.81 sigma is the bound at n 100,000 and alpha 0.001, and far above this log's."""
    faults = _read(rows, sigma, n, alpha).items()
    return {i: fault for i, fault in faults if fault != "bound" or rows[i][3] > 3.81 * sigma}


@mutant("certification_log", votes="FAULT_MISSED")
def any_radius_below_the_bound_will_do(rows, sigma, n, alpha):
    return _read(rows, sigma, n, alpha, ["votes"])


@mutant("certification_log", votes="FAULT_MISSED")
def a_tenth_of_sigma_forgiven(rows, sigma, n, alpha):
    near = _read(rows, sigma, n, alpha, tolerance=sigma / 10)
    return near | {i: f for i, f in _read(rows, sigma, n, alpha).items() if f == "bound"}


@mutant("certification_log", quiet="FALSE_ACCUSATION")
def bound_itself_is_too_large(rows, sigma, n, alpha):
    largest = _possible(sigma, n, alpha)[-1]
    return {i: "bound" for i, row in enumerate(rows) if row[3] > largest - 1e-5} | _read(
        rows, sigma, n, alpha
    )


@mutant("certification_log", quiet="FALSE_ACCUSATION")
def an_abstention_is_a_fault(rows, sigma, n, alpha):
    return {i: "abstained" for i, row in enumerate(rows) if row[2] == -1} | _read(rows, sigma, n, alpha)


@mutant("certification_log", quiet="FALSE_ACCUSATION")
def abstentions_are_no_whole_vote(rows, sigma, n, alpha):
    return {i: "votes" for i, row in enumerate(rows) if row[3] == 0} | _read(rows, sigma, n, alpha)


@mutant("certification_log", quiet="FALSE_ACCUSATION")
def a_wrong_class_is_a_fault(rows, sigma, n, alpha):
    wrong = {i: "verdict" for i, row in enumerate(rows) if row[2] not in (-1, row[1])}
    return wrong | _read(rows, sigma, n, alpha)


@mutant("certification_log", abstained="FAULT_MISSED")
def abstentions_with_a_radius_pass(rows, sigma, n, alpha):
    faults = _read(rows, sigma, n, alpha, ["abstained"])
    return faults | {i: "abstained" for i, row in enumerate(rows) if row[2] == -1 and row[4]}


@mutant("certification_log", abstained="FAULT_MISSED", verdict="FAULT_MISNAMED")
def abstention_counted_as_a_wrong_verdict(rows, sigma, n, alpha):
    faults = _read(rows, sigma, n, alpha)
    return faults | {i: "verdict" for i, row in enumerate(rows) if row[2] == -1 and row[4]}


@mutant("certification_log", verdict="FAULT_MISSED")
def only_verdicts_that_flatter(rows, sigma, n, alpha):
    faults = _read(rows, sigma, n, alpha, ["verdict"])
    return faults | {i: "verdict" for i, row in enumerate(rows) if row[2] not in (-1, row[1]) and row[4]}


@mutant("certification_log", repeated="FAULT_MISSED")
def neighbours_alone_are_compared(rows, sigma, n, alpha):
    faults = _read(rows, sigma, n, alpha, ["repeated"])
    return faults | {i: "repeated" for i in range(1, len(rows)) if rows[i] == rows[i - 1]}


@mutant("certification_log", quiet="FALSE_ACCUSATION")
def both_copies_accused(rows, sigma, n, alpha):
    indices = [row[0] for row in rows]
    copied = {i: "repeated" for i, index in enumerate(indices) if indices.count(index) > 1}
    return copied | _read(rows, sigma, n, alpha)


@mutant("certification_log", repeated="FAULT_MISSED", quiet="FALSE_ACCUSATION")
def first_copy_accused(rows, sigma, n, alpha):
    indices = [row[0] for row in rows]
    faults = _read(rows, sigma, n, alpha, ["repeated"])
    return faults | {i: "repeated" for i, index in enumerate(indices) if index in indices[i + 1 :]}


@mutant(
    "certification_log",
    bound="FAULT_MISNAMED",
    votes="FAULT_MISSED",
    abstained="FAULT_MISSED",
    verdict="FAULT_MISSED",
    repeated="FAULT_MISSED",
    quiet="FALSE_ACCUSATION",
)
def every_row_accused(rows, sigma, n, alpha):
    return dict.fromkeys(range(len(rows)), "bound")


@mutant("certification_log", **dict.fromkeys(FAULTS, "FAULT_MISSED"), quiet="NOT_COUNTED")
def nobody_accused(rows, sigma, n, alpha):
    return {}


@mutant("certification_log", quiet="UNKNOWN_FAULT", repeated="FAULT_MISSED")
def words_of_ones_own(rows, sigma, n, alpha):
    faults = _read(rows, sigma, n, alpha)
    return {i: "duplicate" if fault == "repeated" else fault for i, fault in faults.items()}


@mutant("certification_log", everywhere="WRONG_SHAPE")
def image_indices_for_row_numbers(rows, sigma, n, alpha):
    return {rows[i][0] + 100: fault for i, fault in _read(rows, sigma, n, alpha).items()}


declare(
    "certification_log",
    "list_of_rows",
    lambda rows, sigma, n, alpha: sorted(_read(rows, sigma, n, alpha)),
    everywhere="WRONG_SHAPE",
)


# Votes of other settings: honest radii are then radii that no votes give.
_OTHERS = {
    "alpha_of_two_sides": lambda sigma, n, alpha: _possible(sigma, n, alpha / 2),
    "selection_samples_counted_too": lambda sigma, n, alpha: _possible(sigma, n + 100, alpha),
}
for _name, _grid in _OTHERS.items():
    declare(
        "certification_log",
        _name,
        lambda rows, *stated, _grid=_grid: _read(rows, *stated, grid=_grid(*stated)) | _read(rows, *stated),
        quiet="FALSE_ACCUSATION",
    )
