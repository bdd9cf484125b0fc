"""Mutants of guarding a service: detectors, claims about them, attacks on them, pods, canaries."""

from __future__ import annotations

import copy
import math

import numpy as np
from scipy import stats

from robustkit.contracts.service import BOUNDS
from robustkit.results import Interval
from tests.mutants import declare, mutant

# --- detectors ----------------------------------------------------------------------------------------


def apart(a, b):
    return np.sqrt(np.mean((a.astype(float) - b) ** 2))


def detector(
    distance=apart,
    limit=20.0,
    exempt=True,
    keep_last=True,
    account_of=lambda account: account,
    look_back=10_000,
):
    def flagged(memory, account, image, capacity):
        kept = memory.setdefault(account_of(account), [])
        if exempt and any(np.array_equal(image, old) for old in kept):
            return False
        found = any(distance(image, old) < limit for old in kept[-look_back:])
        kept.append(image)
        if keep_last:
            del kept[:-capacity]
        return bool(found)

    return flagged


declare(
    "query_detector", "equal_pixels_only", detector(lambda a, b: (a != b).mean(), 0.3), near="NEAR_MISSED"
)
declare(
    "query_detector", "last_query_only", detector(look_back=1), near="NEAR_MISSED", bounded="NEWEST_FORGOTTEN"
)
declare(
    "query_detector",
    "everything_is_near",
    detector(limit=1e4),
    near="EVERYTHING_FLAGGED",
    quiet="FALSE_ALARM",
    accounts="ACCOUNTS_MIXED",
)
declare("query_detector", "retries_are_attacks", detector(exempt=False), repeats="RETRY_FLAGGED")
declare(
    "query_detector",
    "one_memory_for_all",
    detector(account_of=lambda account: "all"),
    accounts="ACCOUNTS_MIXED",
)
declare("query_detector", "never_forgets", detector(keep_last=False), bounded="NOT_BOUNDED")


@mutant("query_detector", bounded="NEWEST_FORGOTTEN")
def full_is_full(memory, account, image, capacity):
    kept = memory.setdefault(account, [])
    if any(np.array_equal(image, old) for old in kept):
        return False
    found = any(apart(image, old) < 20 for old in kept)
    if len(kept) < capacity:
        kept.append(image)
    return bool(found)


@mutant("query_detector", quiet="FALSE_ALARM")
def a_flood_is_an_attack(memory, account, image, capacity):
    kept = memory.setdefault(account, [])
    flood = len(kept) == capacity
    return detector()(memory, account, image, capacity) or flood


_HIDDEN_MEMORY = {}


@mutant("query_detector", bounded="NOTHING_KEPT")
def memory_elsewhere(memory, account, image, capacity):
    if not memory:
        _HIDDEN_MEMORY.clear()
        memory["started"] = []
    return detector()(_HIDDEN_MEMORY, account, image, capacity)


declare(
    "query_detector",
    "never",
    lambda memory, account, image, capacity: False,
    near="NEAR_MISSED",
    bounded="NOTHING_KEPT",
)
declare(
    "query_detector",
    "distance_returned",
    lambda memory, account, image, capacity: 3.5,
    everywhere="RAISED",
)

# --- benign streams -----------------------------------------------------------------------------------


def _exact(k, n, level=0.95):
    return 1.0 if k == n else stats.beta.ppf(level, k + 1, n - k)


def _seen(flags, repeats):
    return int(flags[~repeats].sum()), int((~repeats).sum())


@mutant("benign", counts="REPEATS_COUNTED", upper="WRONG_BOUND", edges="EDGE_CASES", claim="WRONG_CLAIM")
def repeats_are_queries_too(flags, repeats, rate):
    k, n = int(flags.sum()), len(flags)
    return k, n, _exact(k, n), _exact(k, n) <= rate


@mutant("benign", counts="WRONG_COUNT", upper="WRONG_BOUND", claim="WRONG_CLAIM", edges="EDGE_CASES")
def flags_of_repeats_kept(flags, repeats, rate):
    k, n = min(int(flags.sum()), int((~repeats).sum())), int((~repeats).sum())
    return k, n, 1.0 if n == 0 else _exact(k, n), False


@mutant("benign", upper="NO_BOUND", edges="EDGE_CASES", claim="CLAIM_FROM_ESTIMATE")
def the_estimate(flags, repeats, rate):
    k, n = _seen(flags, repeats)
    share = k / n if n else 0.0
    return k, n, share, share <= rate


@mutant("benign", upper="NORMAL_BOUND", edges="EDGE_CASES")
def normal_approximation(flags, repeats, rate):
    k, n = _seen(flags, repeats)
    share = k / n if n else 0.0
    upper = share + 1.6449 * math.sqrt(share * (1 - share) / max(n, 1))
    return k, n, upper, _exact(k, n) <= rate


@mutant("benign", upper="TWO_SIDED", edges="EDGE_CASES")
def two_sided(flags, repeats, rate):
    k, n = _seen(flags, repeats)
    return k, n, _exact(k, n, 0.975), _exact(k, n) <= rate


@mutant("benign", edges="EDGE_CASES")
def nothing_flagged_is_nothing_possible(flags, repeats, rate):
    k, n = _seen(flags, repeats)
    upper = _exact(k, n) if n != 40 else 0.0
    return k, n, upper, _exact(k, n) <= rate


@mutant("benign", claim="WRONG_CLAIM")
def claim_the_wrong_way_round(flags, repeats, rate):
    k, n = _seen(flags, repeats)
    return k, n, _exact(k, n), _exact(k, n) > rate


@mutant("benign", claim="CLAIM_FROM_ESTIMATE")
def claim_from_the_estimate(flags, repeats, rate):
    k, n = _seen(flags, repeats)
    return k, n, _exact(k, n), k <= rate * n


# --- what an attack achieved --------------------------------------------------------------------------


def _achieved(attempts, eps, budget, *, clean=True, verified=True, inside=True, limited=True, rejected=False):
    attacked = [one for one in attempts if not clean or one.before == one.label]
    broken = [
        one.queries
        for one in attacked
        if (not verified or ((one.after is not None or rejected) and one.after != one.label))
        and (not inside or one.size <= eps)
        and (not limited or one.queries <= budget)
    ]
    return len(broken), len(attacked), float(np.median(broken)) if broken else None


for _name, _left, _cost in (
    ("clean_errors_are_successes", {"clean": False}, {"attacked": "CLEAN_ERRORS_COUNTED"}),
    ("rejections_are_successes", {"rejected": True}, {"verified": "NOT_VERIFIED"}),
    ("any_size_will_do", {"inside": False}, {"threat_model": "OUTSIDE_THREAT_MODEL"}),
    ("any_number_of_queries", {"limited": False}, {"budget": "BUDGET_IGNORED"}),
):
    declare(
        "achieved",
        _name,
        lambda attempts, eps, budget, _left=_left: _achieved(attempts, eps, budget, **_left),
        **_cost,
    )


@mutant(
    "achieved",
    attacked="CLEAN_ERRORS_COUNTED",
    verified="NOT_VERIFIED",
    threat_model="OUTSIDE_THREAT_MODEL",
    budget="BUDGET_IGNORED",
    median="NO_SUCCESS_NO_MEDIAN",
)
def every_attempt_is_a_success(attempts, eps, budget):
    return _achieved(attempts, eps, budget, verified=False)


@mutant("achieved", median="WRONG_MEDIAN")
def mean_for_median(attempts, eps, budget):
    k, n, median = _achieved(attempts, eps, budget)
    return k, n, None if median is None else 0.1 + median


@mutant("achieved", median="NO_SUCCESS_NO_MEDIAN")
def zero_for_none(attempts, eps, budget):
    k, n, median = _achieved(attempts, eps, budget)
    return k, n, median or 0.0


# --- an adaptive attacker -----------------------------------------------------------------------------


def _halved(passes, low, high, queries):
    if not passes(high):
        return None
    for _ in range(queries - 1):
        middle = (low + high) / 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


@mutant("evasion", close="NOT_CLOSE")
def largest_size(passes, low, high, queries):
    return high if passes(high) else None


@mutant("evasion", close="NOT_CLOSE")
def every_twelfth(passes, low, high, queries):
    """A grid instead of halving, with what is left of the budget unused."""
    passing = [size for size in np.linspace(low, high, queries) if passes(size)]
    return min(passing, default=None)


@mutant("evasion", close="QUERIES_LEFT")
def one_query_fewer(passes, low, high, queries):
    return _halved(passes, low, high, queries - 1)


@mutant("evasion", passed="NOT_SEEN_TO_PASS")
def lower_end(passes, low, high, queries):
    """The largest size that was rejected."""
    if not passes(high):
        return None
    for _ in range(queries - 1):
        middle = (low + high) / 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return low


@mutant("evasion", budget="BUDGET_EXCEEDED")
def one_query_more(passes, low, high, queries):
    best = _halved(passes, low, high, queries)
    passes(high)
    return best


@mutant("evasion", hopeless="NONE_EXPECTED")
def hopeless_and_goes_on(passes, low, high, queries):
    return _halved(passes, low, high, queries) or high


declare(
    "evasion",
    "asks_nobody",
    lambda passes, low, high, queries: (low + high) / 2,
    close="NOT_CLOSE",
    passed="NOT_SEEN_TO_PASS",
    hopeless="NONE_EXPECTED",
)

# --- pods ---------------------------------------------------------------------------------------------


def _pod(pod, digest, leave_out=(), copied=True):
    pod = copy.deepcopy(pod) if copied else pod
    spec = pod["spec"]
    container = spec["containers"][0]
    own = container.setdefault("securityContext", {})
    general = spec.setdefault("securityContext", {})
    if "identity" not in leave_out:
        general |= {"runAsNonRoot": True, "runAsUser": 10001}
        for key in ("runAsNonRoot", "runAsUser", "privileged"):
            own.pop(key, None)
        own |= {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    if "isolation" not in leave_out:
        own.pop("seccompProfile", None)
        general["seccompProfile"] = {"type": "RuntimeDefault"}
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            spec.pop(key, None)
        spec["automountServiceAccountToken"] = False
    if "filesystem" not in leave_out:
        own["readOnlyRootFilesystem"] = True
        for mount in container["volumeMounts"]:
            mount["readOnly"] = mount["mountPath"] != "/tmp"
    if "limits" not in leave_out:
        container.setdefault("resources", {})["limits"] = {
            "cpu": "2",
            "memory": "1Gi",
            "ephemeral-storage": "1Gi",
        }
    if "supply" not in leave_out:
        container["image"] = f"{container['image'].split('@')[0].rsplit(':', 1)[0]}@sha256:{digest}"
    return pod


@mutant("pod", isolation="STILL_OPEN")
def shares_memory_with_the_host(pod, digest):
    kept = {key: pod["spec"][key] for key in ("hostIPC",) if key in pod["spec"]}
    hardened = _pod(pod, digest)
    hardened["spec"] |= kept
    return hardened


@mutant("pod", limits="STILL_OPEN")
def limits_in_words(pod, digest):
    hardened = _pod(pod, digest)
    hardened["spec"]["containers"][0]["resources"]["limits"]["memory"] = "little"
    return hardened


for _part in ("identity", "isolation", "filesystem", "limits", "supply"):
    declare(
        "pod",
        f"{_part}_forgotten",
        lambda pod, digest, _part=_part: _pod(pod, digest, [_part]),
        **{_part: "STILL_OPEN"},
    )


@mutant("pod", identity="STILL_OPEN")
def pods_word_over_the_containers(pod, digest):
    """What the container says stands above what the pod says."""
    fixed = _pod(pod, digest)
    own = pod["spec"]["containers"][0].get("securityContext") or {}
    for key in ("runAsNonRoot", "runAsUser"):
        if key in own:
            fixed["spec"]["containers"][0]["securityContext"][key] = own[key]
    return fixed


@mutant("pod", identity="STILL_OPEN")
def capabilities_added_back(pod, digest):
    fixed = _pod(pod, digest)
    fixed["spec"]["containers"][0]["securityContext"]["capabilities"]["add"] = ["NET_ADMIN"]
    return fixed


@mutant("pod", works="NO_LONGER_WORKS")
def nowhere_to_write(pod, digest):
    fixed = _pod(pod, digest)
    for mount in fixed["spec"]["containers"][0]["volumeMounts"]:
        mount["readOnly"] = True
    return fixed


@mutant("pod", works="NO_LONGER_WORKS")
def secure_because_silent(pod, digest):
    fixed = _pod(pod, digest)
    fixed["spec"]["containers"][0]["ports"] = []
    return fixed


@mutant("pod", works="ARGUMENT_CHANGED")
def in_place(pod, digest):
    return _pod(pod, digest, copied=False)


declare("pod", "text_instead", lambda pod, digest: "runAsNonRoot: true", everywhere="WRONG_SHAPE")
declare(
    "pod",
    "as_it_was",
    lambda pod, digest: pod,
    **dict.fromkeys(("identity", "isolation", "filesystem", "limits", "supply"), "STILL_OPEN"),
)

# --- canaries -----------------------------------------------------------------------------------------


def _decide(counts, bounds, leave_out=()):
    shares = {name: Interval(k, n) if n else None for name, (k, n) in counts.items() if name not in leave_out}
    if any(share and share.low > bounds[name] for name, share in shares.items()):
        return "rollback"
    sure = all(share and share.high <= bounds[name] for name, share in shares.items())
    return "promote" if sure else "wait"


@mutant("canary", rollback="HARM_NOT_STOPPED", wait="PROMOTED_ON_LUCK")
def accuracy_is_not_watched(counts, bounds):
    return _decide(counts, bounds, ["probe_errors"])


@mutant("canary", wait="PROMOTED_ON_LUCK")
def estimates_alone(counts, bounds):
    shares = {name: k / n if n else 0.0 for name, (k, n) in counts.items()}
    return "rollback" if any(shares[name] > bounds[name] for name in BOUNDS) else "promote"


@mutant("canary", wait="ROLLED_BACK_ON_NOISE")
def nervous(counts, bounds):
    shares = {name: k / n if n else 0.0 for name, (k, n) in counts.items()}
    return "rollback" if any(shares[name] > bounds[name] for name in BOUNDS) else _decide(counts, bounds)


@mutant("canary", rollback="HARM_NOT_STOPPED")
def waits_for_all_metrics(counts, bounds):
    return "wait" if any(n < 100 for _, n in counts.values()) else _decide(counts, bounds)


@mutant("canary", rollback="HEALTHY_ROLLED_BACK", wait="ROLLED_BACK_ON_NOISE", promote="NEVER_PROMOTED")
def any_error_is_one_too_many(counts, bounds):
    return "rollback" if counts["errors"][0] else _decide(counts, bounds)


declare(
    "canary",
    "always_waits",
    lambda counts, bounds: "wait",
    rollback="HARM_NOT_STOPPED",
    promote="NEVER_PROMOTED",
)
declare("canary", "words_of_ones_own", lambda counts, bounds: "ok", everywhere="UNKNOWN_DECISION")
