"""Exact binomial confidence bounds, the radii that they certify, and the staged test. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.special import betainccinv, betaincinv, ndtr, ndtri  # type: ignore[import-untyped]

from robustkit.errors import RobustkitError

STAGES = (100, 1_000, 10_000, 100_000)


def lower_bound(k: int, n: int, alpha: float) -> float:
    """A bound that lies above the true share in at most `alpha` of samples, from k successes in n.

    Source: Clopper & Pearson 1934, one-sided: the `alpha` quantile of Beta(k, n - k + 1), the value of
    scipy.stats.beta.ppf without its overhead.
    """
    return 0.0 if k == 0 else float(betaincinv(k, n - k + 1, alpha))


def upper_bound(k: int, n: int, alpha: float) -> float:
    """A bound that lies below the true share in at most `alpha` of samples. Source: as `lower_bound`."""
    return 1.0 if k == n else float(betainccinv(k + 1, n - k, alpha))


def certified_radius(share: float, sigma: float) -> float:
    """sigma * Phi^-1(share): the L2 radius within which a class of at least this share stays on top.

    Source: Cohen, Rosenfeld & Kolter 2019 (arXiv 1902.02918), equation 3 with p_B = 1 - p_A.
    Units: input units, those of sigma. Negative for a share under one half: nothing is certified.
    """
    return sigma * float(ndtri(share))


def share_for(radius: float, sigma: float) -> float:
    """Phi(radius / sigma): the share that certifies this radius; the inverse of `certified_radius`."""
    return float(ndtr(radius / sigma))


def least_samples(alpha: float) -> int:
    """The least n from which a radius above zero can follow at all: alpha^(1/n) > 1/2."""
    return math.floor(math.log2(1 / alpha)) + 1


@dataclass(frozen=True)
class Stage:
    """After `n` samples in all: certified with `yes` votes or more, given up with `no` or fewer."""

    n: int
    yes: int
    no: int


def staged_test(
    share: float, alpha: float, beta: float = 0.001, sizes: Sequence[int] = STAGES
) -> tuple[Stage, ...]:
    """Stopping rules for the question "is the class's share at least `share`?".

    A stage of n samples says yes when the Clopper-Pearson lower bound reaches `share`, no when the upper
    bound is below it. Each stage spends an equal part of both budgets, so by the union bound
    "yes" is wrong with probability at most `alpha`; "no" is given early to a class that would deserve
    "yes" with probability at most `beta`. The last stage says no to what is still open.
    Raises: RobustkitError unless the sizes rise, and when no vote at all could reach `share`.
    """
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise RobustkitError(f"stages must be rising sample sizes from 1; got {tuple(sizes)}.")
    each, most = alpha / len(sizes), sizes[-1]
    if not 0 < share <= lower_bound(most, most, each):
        raise RobustkitError(
            f"{most:,} samples at alpha {each:g} a stage certify a share of at most "
            f"{lower_bound(most, most, each):.6f}, and the radius asked for needs {share:.6f}; "
            "choose a smaller radius or more samples."
        )
    return tuple(_stage(n, share, each, beta / len(sizes)) for n in sizes)


def _stage(n: int, share: float, alpha: float, beta: float) -> Stage:
    yes = _least(n + 1, lambda k: lower_bound(k, n, alpha) >= share)
    no = _least(n + 1, lambda k: upper_bound(k, n, beta) >= share) - 1
    return Stage(n, yes, no)


def _least(top: int, holds: Callable[[int], bool]) -> int:
    """The least k below `top` at which a condition holds that, once true, stays true; else `top`."""
    low, high = 0, top
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def decide(stages: Sequence[Stage], votes: Callable[[int], int]) -> tuple[bool, int]:
    """Run a staged test: the verdict, and the samples it took. `votes(n)` draws n more and counts successes."""
    count = drawn = 0
    for stage in stages:
        count += votes(stage.n - drawn)
        drawn = stage.n
        if count >= stage.yes:
            return True, drawn
        if count <= stage.no:
            break
    return False, drawn
