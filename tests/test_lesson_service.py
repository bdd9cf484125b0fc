"""Lesson 6: wrong answers through the released notebook, sandbox and judge; the facts that its text states."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta

from robustkit.contracts import service
from robustkit.lessons import LESSONS
from tests import judged

LESSON = LESSONS["06-secure-the-api"]
IMPORTS = """
import copy
import numpy as np
from robustkit.lessons import check
from robustkit.results import Interval
"""
# What a learner may write, and the criteria that it costs, each with the code that is told.
WRONG = {
    "s6_achieved": (
        """
def achieved(attempts, eps, budget):
    attacked = [a for a in attempts if a.before == a.label]
    queries = [a.queries for a in attacked if a.after != a.label and a.size <= eps and a.queries <= budget]
    return len(queries), len(attacked), float(np.median(queries)) if queries else None
""",
        {"verified": "NOT_VERIFIED"},
    ),
    "s6_detector": (
        """
def flagged(memory, account, image, capacity):
    kept = memory.setdefault(account, [])
    point = image.astype(float)
    near = any(np.sqrt(np.mean((point - old) ** 2)) < 15 for old in kept)
    kept.append(point)
    return near
""",
        {"repeats": "RETRY_FLAGGED", "bounded": "NOT_BOUNDED"},
    ),
    "s6_benign": (
        """
def benign_rate(flags, repeats, rate):
    k, n = int((flags & ~repeats).sum()), int((~repeats).sum())
    share = k / n if n else 0.0
    return k, n, share, share <= rate
""",
        {"upper": "NO_BOUND", "edges": "EDGE_CASES", "claim": "CLAIM_FROM_ESTIMATE"},
    ),
    "s6_evasion": (
        """
def least_passing(passes, low, high, queries):
    for _ in range(queries):
        middle = (low + high) / 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high
""",
        {"hopeless": "NONE_EXPECTED"},
    ),
    "s6_canary": (
        """
def decide(counts, bounds):
    if any(n == 0 for k, n in counts.values()):
        return "wait"
    shares = {name: Interval(k, n) for name, (k, n) in counts.items()}
    if any(shares[name].low > bounds[name] for name in shares):
        return "rollback"
    return "promote" if all(shares[name].high <= bounds[name] for name in shares) else "wait"
""",
        {"rollback": "HARM_NOT_STOPPED"},
    ),
}


@pytest.mark.slow
def test_wrong_answers_lose_what_they_must_and_a_stub_loses_all(tmp_path):
    answers = {cell: source for cell, (source, _) in WRONG.items()}
    lost = judged.lost(LESSON.id, judged.answered(LESSON.id, answers, IMPORTS), tmp_path)
    stub = dict.fromkeys(LESSON.exercise("s6_pod_check").points, "NOT_IMPLEMENTED")
    assert lost == {exercise: costs for exercise, (_, costs) in WRONG.items()} | {"s6_pod": stub}


def test_how_many_quiet_pictures_a_claim_needs():
    """598 without a flag for 0.5 %, at 95 %; 300 allow 1.0 %."""
    quiet = np.arange(1, 1000)
    assert quiet[beta.ppf(0.95, 1, quiet) <= 0.005][0] == 598
    assert beta.ppf(0.95, 1, 300) == pytest.approx(0.0099, abs=1e-4)


def test_the_judge_of_pods_and_the_checker_of_manifests_agree_on_every_mistake():
    """Two readings of the same rules, written apart: what the one lets pass, the other must too."""
    manifests = pytest.importorskip("robustkit.serve.manifests")
    digest = "0" * 64

    def verdicts(pod):
        checked = {finding.rule for finding in manifests.check([pod])} - {"network-policy"}
        return bool(service._faults(pod, digest)), bool(checked)

    assert verdicts(service._hardened(digest)) == (False, False)
    for i in range(len(service._mistakes(service._hardened(digest)))):
        pod = service._hardened(digest)
        where, key, value = service._mistakes(pod)[i]
        if value is None:
            del where[key]
        else:
            where[key] = value
        assert verdicts(pod) == (True, True), (key, value)
