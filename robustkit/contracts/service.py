"""Contracts of guarding a service: query detectors, what they cost customers, how they fall, pods, canaries.

They need no service: a detector meets recorded queries, an evasion a detector whose limit is known, a manifest is
data, a canary a handful of counts.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import betaincinv  # type: ignore[import-untyped]

from robustkit.contracts.base import Array, Arrays, Contract, Finding, everywhere, shaped, text, untext
from robustkit.device import seeded
from robustkit.results import Interval

_NONE = -1  # where the answer is None


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng(seeded(seed, name).initial_seed())


# --- a detector of query sequences --------------------------------------------------------------------

_DETECTOR = ("near", "quiet", "accounts", "repeats", "bounded")
_CAPACITY = 24
# What an account sends: its pictures, and what is done to the one it sent before.
_SAME, _PATCH, _NOISE, _BOTH = range(4)


def _draw_queries(seed: int) -> Arrays:
    """Recorded queries: pictures 40 grey levels apart or more, changes of 8 at most, and which criterion each tests."""
    draw = _generator(seed, "queries")

    def pictures(n: int) -> Array:
        coarse: Array = draw.integers(0, 4, (n, 4, 4, 3)) * 64 + 30
        return coarse.repeat(4, axis=1).repeat(4, axis=2)

    def near(image: Array, kind: int) -> Array:
        change = np.zeros_like(image)
        if kind in (_NOISE, _BOTH):
            change += draw.integers(-5, 6, image.shape)
        if kind in (_PATCH, _BOTH):
            row, column = draw.integers(0, 11, 2)
            change[row : row + 6, column : column + 6] += draw.choice((-8, 8), 3)
        moved: Array = np.clip(image + change, 0, 255)
        return moved

    images: list[Array] = []
    accounts: list[int] = []
    tests: list[int] = []
    flags: list[bool] = []

    def send(account: int, image: Array, criterion: str, flag: bool = False) -> None:
        images.append(image)
        accounts.append(account)
        tests.append(_DETECTOR.index(criterion))
        flags.append(flag)

    customer, attacker, other, flood = range(4)
    own = pictures(14)
    for image in own:
        send(customer, image, "quiet")
    for i in (0, 5, 13):
        send(customer, own[i], "repeats")
    target, *chaff = pictures(7)
    send(attacker, target, "near")
    for step in range(12):
        send(attacker, near(target, (_PATCH, _NOISE, _BOTH)[step % 3]), "near", True)
        if step % 2:
            send(attacker, chaff[step // 2], "near")
    for image in (target, own[3], own[7]):
        send(other, near(image, _BOTH), "accounts")
    many = pictures(3 * _CAPACITY)
    for image in many:
        send(flood, image, "quiet")
    for image in many[-6:]:
        send(flood, near(image, _PATCH), "bounded", True)
    return {
        "images": np.stack(images).astype(np.uint8),
        "accounts": np.array(accounts),
        "tests": np.array(tests),
        "flags": np.array(flags),
    }


def _observe_queries(flagged: Any, case: Arrays) -> Arrays:
    memory: dict[str, Any] = {}
    seen, most = [], 0
    for account, image in zip(case["accounts"].tolist(), case["images"], strict=True):
        flag = flagged(memory, f"account {account}", image.copy(), _CAPACITY)
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"flagged must return True or False; got {type(flag).__name__}")
        seen.append(bool(flag))
        most = max([most, *(len(kept) for kept in memory.values())])
    return {"flags": np.array(seen), "most": np.int64(most)}


def _judge_queries(case: Arrays, evidence: Arrays) -> list[Finding]:
    shaped(evidence, {"flags": case["flags"].shape, "most": ()})
    seen, right = evidence["flags"].astype(bool), case["flags"]
    found = []

    def wrong(criterion: str, flag: bool) -> int:
        of = (case["tests"] == _DETECTOR.index(criterion)) & (right == flag)
        return int((seen[of] != flag).sum())

    missed, chaff = wrong("near", True), wrong("near", False)
    if missed:
        hint = f"{missed} of 12 small changes of one picture, other pictures in between, were not flagged"
        found.append(Finding("near", "NEAR_MISSED", hint))
    elif chaff:
        hint = f"the attacker also sends other pictures, and {chaff} of those 7 were flagged"
        found.append(Finding("near", "EVERYTHING_FLAGGED", hint))
    if alarms := wrong("quiet", False):
        hint = f"{alarms} of {14 + 3 * _CAPACITY} customers' pictures that resemble no other were flagged"
        found.append(Finding("quiet", "FALSE_ALARM", hint))
    if mixed := wrong("accounts", False):
        hint = f"{mixed} of 3 pictures were flagged because another account had sent the like"
        found.append(Finding("accounts", "ACCOUNTS_MIXED", hint))
    if retries := wrong("repeats", False):
        hint = f"{retries} of 3 exact repeats were flagged: what does a phone do when no answer comes?"
        found.append(Finding("repeats", "RETRY_FLAGGED", hint))
    if evidence["most"] <= 0:
        found.append(Finding("bounded", "NOTHING_KEPT", "memory[account] is the list of what you keep"))
    elif evidence["most"] > _CAPACITY:
        hint = f"one account had {int(evidence['most'])} entries in memory, and {_CAPACITY} were allowed"
        found.append(Finding("bounded", "NOT_BOUNDED", hint))
    elif forgotten := wrong("bounded", True):
        hint = f"after a flood, {forgotten} of 6 changes of the account's newest pictures were not flagged"
        found.append(Finding("bounded", "NEWEST_FORGOTTEN", hint))
    return found


QUERY_DETECTOR = Contract(
    _DETECTOR,
    _draw_queries,
    _observe_queries,
    _judge_queries,
    essential=("near",),
    hidden=("tests", "flags"),
)


# --- what a detector costs customers ------------------------------------------------------------------

_BENIGN = ("counts", "upper", "edges", "claim")
_STREAMS = 6
_RATES = (0.005, 0.01, 0.02)
_BENIGN_EDGES = ((0, 40, 3), (25, 25, 4), (0, 0, 9))  # flagged, seen, repeats


def _draw_streams(seed: int) -> Arrays:
    """Benign streams: flags, and which queries were exact repeats. The claim holds for some, not for others."""
    draw = _generator(seed, "benign")
    case: Arrays = {"rates": draw.choice(_RATES, _STREAMS)}
    seen = draw.integers(900, 2000, _STREAMS)
    for i in range(_STREAMS + len(_BENIGN_EDGES)):
        if i < _STREAMS:
            # From far below the rate to above it: for the third the estimate keeps to it and the bound does not.
            k = int(seen[i] * case["rates"][i] * (0.05, 0.3, 0.9, 1.4, 0.2, 0.8)[i])
            n, repeats = int(seen[i]), int(draw.integers(80, 200))
        else:
            k, n, repeats = _BENIGN_EDGES[i - _STREAMS]
        kinds = np.repeat([3, 1, 0], [repeats, k, n - k])
        kinds[: repeats // 3] = (
            2  # some repeats were flagged too, by a detector that should not have seen them
        )
        draw.shuffle(kinds)
        # 3: a repeat that was flagged, 2: a repeat, 1: flagged, 0: neither.
        case[f"flags_{i}"], case[f"repeats_{i}"] = (kinds % 2).astype(bool), kinds >= 2
    return case


def _observe_streams(benign: Any, case: Arrays) -> Arrays:
    rows = []
    for i in range(_STREAMS + len(_BENIGN_EDGES)):
        rate = float(case["rates"][i]) if i < _STREAMS else 0.2
        k, n, upper, holds = benign(case[f"flags_{i}"].copy(), case[f"repeats_{i}"].copy(), rate)
        rows.append([float(k), float(n), float(upper), float(bool(holds))])
    return {"rows": np.array(rows)}


def _exact_upper(k: int, n: int, level: float) -> float:
    """The largest share under which k or fewer of n still come with probability 1 - level (Clopper and Pearson)."""
    return 1.0 if k == n else float(betaincinv(k + 1, n - k, level))


def _judge_streams(case: Arrays, evidence: Arrays) -> list[Finding]:
    shaped(evidence, {"rows": (_STREAMS + len(_BENIGN_EDGES), 4)})
    found = []
    seen = [~case[f"repeats_{i}"] for i in range(len(evidence["rows"]))]
    n = np.array([int(one.sum()) for one in seen])
    k = np.array([int((case[f"flags_{i}"] & one).sum()) for i, one in enumerate(seen)])
    upper = np.array([_exact_upper(*pair, 0.95) for pair in zip(k.tolist(), n.tolist(), strict=True)])
    rates = np.append(case["rates"], [0.2] * len(_BENIGN_EDGES))
    rows, usual = evidence["rows"], slice(_STREAMS)
    if (rows[usual, :2] != np.stack([k, n], 1)[usual]).any():
        code, hint = "WRONG_COUNT", "which queries did the detector see, and how many of those did it flag?"
        every = [len(one) for one in seen[usual]]
        if (rows[usual, 1] == every).all():
            code, hint = "REPEATS_COUNTED", "exact repeats are answered from the cache; no detector sees them"
        found.append(Finding("counts", code, hint))

    def near(values: Any) -> bool:
        return bool(np.allclose(rows[usual, 2], values, atol=2e-6, rtol=0))

    share = k[usual] / n[usual]
    if not near(upper[usual]):
        code, hint = (
            "WRONG_BOUND",
            f"{rows[0, 2]:.5f} is not the exact bound of {k[0]} in {n[0]} at 95 %, one-sided",
        )
        if near(share):
            code, hint = "NO_BOUND", "this is the estimate; an honest stream can be luckier than the truth"
        elif near(share + 1.6449 * np.sqrt(share * (1 - share) / n[usual])):
            code, hint = "NORMAL_BOUND", "near zero the normal approximation promises too much"
        elif near(
            [_exact_upper(*pair, 0.975) for pair in zip(k[usual].tolist(), n[usual].tolist(), strict=True)]
        ):
            code, hint = "TWO_SIDED", "the claim has one side: nobody minds a rate that is lower"
        found.append(Finding("upper", code, hint))
    edges = slice(_STREAMS, None)
    if not np.allclose(rows[edges, 2], upper[edges], atol=2e-6) or (rows[edges, 1] != n[edges]).any():
        hint = "nothing flagged in 40, all of 25 flagged, nothing seen at all: what is the largest rate that fits?"
        found.append(Finding("edges", "EDGE_CASES", hint))
    if (rows[usual, 3] != (upper <= rates)[usual]).any():
        code, hint = "WRONG_CLAIM", "the claim holds where even the bound keeps to the rate"
        if (rows[usual, 3] == (share <= rates[usual])).all():
            code, hint = "CLAIM_FROM_ESTIMATE", "the estimate keeps to the rate; does the bound?"
        found.append(Finding("claim", code, hint))
    return found


BENIGN = Contract(_BENIGN, _draw_streams, _observe_streams, _judge_streams, essential=("counts", "upper"))


# --- what an attack achieved --------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One attack on one image, as logged: the true `label`; the class `before`, for the image untouched; the class
    `after`, when the attack's own result was sent once more (None: rejected); its `size`; the `queries` it took."""

    label: int
    before: int
    after: int | None
    size: float
    queries: int


_ACHIEVED = ("attacked", "verified", "threat_model", "budget", "median")
_BUDGET = 300


def _draw_attempts(seed: int) -> Arrays:
    """Five logs of 40 attempts; in each of the first four one kind of attempt that looks like a success."""
    draw = _generator(seed, "attempts")
    n, eps = 40, float(draw.choice((0.03, 0.06, 0.3)))
    label = draw.integers(0, 10, (5, n))
    other = (label + draw.integers(1, 10, (5, n))) % 10
    before, size = label.copy(), eps * draw.choice((1.0, 0.5, 0.99), (5, n))
    queries = draw.integers(2, _BUDGET, (5, n))
    queries[0, 0] = _BUDGET  # just enough is enough
    after = np.where(draw.random((5, n)) < 0.5, other, label)
    after[:4, :4] = other[:4, :4]  # some true successes in each of the four
    odd = slice(4, 12)
    before[0, odd] = after[0, odd] = other[0, odd]
    after[1, odd] = np.where(np.arange(8) % 2, _NONE, label[1, odd])
    after[2, odd], size[2, odd] = other[2, odd], eps * draw.uniform(1.1, 3.0, 8)
    after[3, odd], queries[3, odd] = other[3, odd], _BUDGET + draw.integers(1, 200, 8)
    after[4] = label[4]  # nothing was broken
    queries[:4, 12] = 1
    for log in range(5):
        order = draw.permutation(n)
        for values in (label, before, after, size, queries):
            values[log] = values[log][order]
    return {
        "label": label,
        "before": before,
        "after": after,
        "size": size,
        "queries": queries,
        "eps": np.float64(eps),
    }


def _logs(case: Arrays) -> list[list[Attempt]]:
    columns = ("label", "before", "after", "size", "queries")
    logs = [zip(*(case[column][log].tolist() for column in columns), strict=True) for log in range(5)]
    return [
        [
            Attempt(label, before, None if after == _NONE else after, size, queries)
            for label, before, after, size, queries in log
        ]
        for log in logs
    ]


def _observe_achieved(achieved: Any, case: Arrays) -> Arrays:
    rows = []
    for attempts in _logs(case):
        broken, attacked, median = achieved(attempts, float(case["eps"]), _BUDGET)
        rows.append([float(broken), float(attacked), _NONE if median is None else float(median)])
    return {"rows": np.array(rows)}


_ACHIEVED_HINTS = {
    "attacked": ("CLEAN_ERRORS_COUNTED", "nobody has to attack an image that is answered wrongly untouched"),
    "verified": (
        "NOT_VERIFIED",
        "what was the answer when the result was sent again? A rejection is no success",
    ),
    "threat_model": ("OUTSIDE_THREAT_MODEL", "an attack that leaves the ball has broken another promise"),
    "budget": ("BUDGET_IGNORED", "with enough queries everything falls; how many were allowed?"),
}


def _judge_achieved(case: Arrays, evidence: Arrays) -> list[Finding]:
    shaped(evidence, {"rows": (5, 3)})
    label, eps = case["label"], float(case["eps"])
    attacked = case["before"] == label
    broken = attacked & (case["after"] != _NONE) & (case["after"] != label)
    broken &= (case["size"] <= eps * (1 + 1e-9)) & (case["queries"] <= _BUDGET)
    right = np.stack([broken.sum(1), attacked.sum(1)], 1)
    found = []
    for log, criterion in enumerate(_ACHIEVED[:4]):
        if (evidence["rows"][log, :2] != right[log]).any():
            k, n = evidence["rows"][log, :2]
            code, hint = _ACHIEVED_HINTS[criterion]
            found.append(Finding(criterion, code, f"{k:g} of {n:g}: {hint}"))
    # The median is asked of logs whose successes were counted right: a wrong count costs its own criterion.
    counted = (evidence["rows"][:, :2] == right).all(1)
    median = np.array(
        [np.median(case["queries"][log][broken[log]]) if log < 4 else _NONE for log in range(5)]
    )
    if not counted.any() or (evidence["rows"][counted, 2] != median[counted]).any():
        code, hint = "WRONG_MEDIAN", "the middle of the queries of the successes, and of no other attempt"
        if (evidence["rows"][:4, 2] == median[:4])[counted[:4]].all():
            code, hint = "NO_SUCCESS_NO_MEDIAN", "one log holds no success at all: None"
        found.append(Finding("median", code, hint))
    return found


ACHIEVED = Contract(_ACHIEVED, _draw_attempts, _observe_achieved, _judge_achieved)


# --- an attacker who tunes against rejections ---------------------------------------------------------

_EVASION = ("close", "passed", "budget", "hopeless")
_PROBES, _LIMITS = 12, 4


def _draw_limits(seed: int) -> Arrays:
    """Detectors that reject every change smaller than a limit; the last rejects all."""
    draw = _generator(seed, "limits")
    low = draw.uniform(0.01, 0.05, _LIMITS + 1)
    high = low * draw.uniform(8, 30, _LIMITS + 1)
    at = np.append(np.array([0.12, 0.35, 0.6, 0.93]), 2.0)
    return {
        "low": low,
        "high": high,
        "limit": low + (high - low) * (at + draw.uniform(-0.03, 0.03, _LIMITS + 1)),
    }


def _observe_limits(least_passing: Any, case: Arrays) -> Arrays:
    rows = []
    for low, high, limit in zip(*(case[name].tolist() for name in ("low", "high", "limit")), strict=True):
        asked: list[float] = []

        def passes(size: float, asked: list[float] = asked, limit: float = limit) -> bool:
            asked.append(float(size))
            return bool(len(asked) <= _PROBES and size >= limit)

        size = least_passing(passes, low, high, _PROBES)
        chosen = _NONE if size is None else float(size)
        tried = any(math.isclose(chosen, one, rel_tol=1e-9) for one in asked[:_PROBES])
        rows.append([chosen, float(len(asked)), float(tried)])
    return {"rows": np.array(rows)}


def _judge_limits(case: Arrays, evidence: Arrays) -> list[Finding]:
    shaped(evidence, {"rows": (_LIMITS + 1, 3)})
    found, rows = [], evidence["rows"]
    chosen, limit = rows[:_LIMITS, 0], case["limit"][:_LIMITS]
    span = (case["high"] - case["low"])[:_LIMITS]
    apart = np.abs(chosen - limit) / span
    left = _PROBES - rows[:_LIMITS, 1].min()
    if apart.max() > 1 / 200:
        hint = f"one answer is {apart.max():.1%} of the range away from the limit; {_PROBES} halvings come nearer"
        found.append(Finding("close", "NOT_CLOSE", hint))
    elif left > 0:
        hint = f"{left:g} of {_PROBES} queries are left, and each would halve what is not known yet"
        found.append(Finding("close", "QUERIES_LEFT", hint))
    if (chosen < limit).any() or not rows[:_LIMITS, 2].all():
        hint = "the answer must be a size that you have seen pass, not one beside it"
        found.append(Finding("passed", "NOT_SEEN_TO_PASS", hint))
    if rows[:, 1].max() > _PROBES:
        hint = f"{rows[:, 1].max():g} queries, and {_PROBES} were allowed: each may cost the account"
        found.append(Finding("budget", "BUDGET_EXCEEDED", hint))
    if rows[_LIMITS, 0] != _NONE:
        found.append(Finding("hopeless", "NONE_EXPECTED", "where even the largest size is rejected: None"))
    return found


EVASION = Contract(_EVASION, _draw_limits, _observe_limits, _judge_limits, essential=("close",))


# --- a pod that runs a model --------------------------------------------------------------------------

_POD = ("identity", "isolation", "filesystem", "limits", "supply", "works")
_PODS = 4
_QUANTITY = re.compile(
    r"(?=.*[1-9])\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i|e\d+)?"
)  # "500m", "1Gi"; none is no limit


def _hardened(digest: str) -> dict[str, Any]:
    """A pod as it should be."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "classifier", "labels": {"app": "classifier"}},
        "spec": {
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "classifier",
                    "image": f"registry.example/robustkit@sha256:{digest}",
                    "args": ["serve", "/models/champion"],
                    "ports": [{"containerPort": 8080}],
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "resources": {
                        "requests": {"cpu": "500m", "memory": "512Mi"},
                        "limits": {"cpu": "2", "memory": "1Gi", "ephemeral-storage": "1Gi"},
                    },
                    "volumeMounts": [
                        {"name": "models", "mountPath": "/models", "readOnly": True},
                        {"name": "scratch", "mountPath": "/tmp"},
                    ],
                }
            ],
            "volumes": [
                {"name": "models", "persistentVolumeClaim": {"claimName": "models"}},
                {"name": "scratch", "emptyDir": {"sizeLimit": "64Mi"}},
            ],
        },
    }


def _mistakes(pod: dict[str, Any]) -> list[tuple[Any, str, Any]]:
    """What can be wrong with a pod, as (where, key, value); None removes the key."""
    spec = pod["spec"]
    (container,) = spec["containers"]
    secure, limits = container["securityContext"], container["resources"]["limits"]
    return [
        (spec["securityContext"], "runAsNonRoot", None),
        (spec["securityContext"], "runAsUser", 0),
        (secure, "runAsUser", 0),  # the container's word counts, whatever the pod says
        (secure, "runAsNonRoot", False),
        (secure, "allowPrivilegeEscalation", None),
        (secure, "privileged", True),
        (secure, "capabilities", {"drop": ["ALL"], "add": ["BPF"]}),
        (secure, "capabilities", None),
        (spec["securityContext"], "seccompProfile", None),
        (secure, "seccompProfile", {"type": "Unconfined"}),
        (spec, "hostNetwork", True),
        (spec, "hostPID", True),
        (spec, "hostIPC", True),
        (spec, "automountServiceAccountToken", None),
        (secure, "readOnlyRootFilesystem", None),
        (container["volumeMounts"][0], "readOnly", None),
        (limits, "memory", None),
        (limits, "cpu", None),
        (limits, "ephemeral-storage", None),
        (container, "resources", None),
        (container, "image", "registry.example/robustkit:latest"),
    ]


def _draw_pods(seed: int) -> Arrays:
    """Manifests as JSON: one with all that can be wrong, two with some of it, one with nothing."""
    draw = _generator(seed, "pods")
    digest = draw.bytes(32).hex()
    case: Arrays = {"digest": text(digest)}
    for i, share in enumerate((1.0, 0.5, 0.3, 0.0)):
        pod = _hardened(digest)
        pod["metadata"]["name"] = pod["spec"]["containers"][0]["name"] = f"classifier-{draw.integers(1000)}"
        for where, key, value in _mistakes(pod):
            if draw.random() < share:
                where.pop(key, None) if value is None else where.__setitem__(key, value)
        case[f"pod_{i}"] = text(pod)
    return case


def _observe_pods(harden: Any, case: Arrays) -> Arrays:
    digest = untext(case["digest"])
    evidence: Arrays = {}
    for i in range(_PODS):
        pod = untext(case[f"pod_{i}"])
        given = copy.deepcopy(pod)
        evidence[f"pod_{i}"] = text(harden(given, digest))
        evidence[f"kept_{i}"] = np.bool_(given == pod)
    return evidence


def _faults(pod: Mapping[str, Any], digest: str) -> dict[str, str]:
    """Criterion -> what is still wrong. A container's security context stands above the pod's."""
    spec = pod["spec"]
    (container,) = spec["containers"]
    own = container.get("securityContext") or {}
    secure = {**(spec.get("securityContext") or {}), **own}
    limits = (container.get("resources") or {}).get("limits") or {}
    capabilities = own.get("capabilities") or {}
    mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts") or []}
    user = secure.get("runAsUser")
    rules = [
        ("identity", "a container may run as root", secure.get("runAsNonRoot") is True and user != 0),
        (
            "identity",
            "a process may gain privileges",
            own.get("allowPrivilegeEscalation") is False and not own.get("privileged"),
        ),
        (
            "identity",
            "it keeps capabilities that it does not need",
            "ALL" in (capabilities.get("drop") or []) and not capabilities.get("add"),
        ),
        (
            "isolation",
            "system calls are not filtered",
            (secure.get("seccompProfile") or {}).get("type") == "RuntimeDefault",
        ),
        (
            "isolation",
            "it shares name spaces with its host",
            not any(spec.get(host) for host in ("hostNetwork", "hostPID", "hostIPC")),
        ),
        (
            "isolation",
            "who breaks in finds a token for the cluster",
            spec.get("automountServiceAccountToken") is False,
        ),
        ("filesystem", "its root can be written", own.get("readOnlyRootFilesystem") is True),
        ("filesystem", "the model can be overwritten", (mounts.get("/models") or {}).get("readOnly") is True),
        (
            "limits",
            "one request can take the node: cpu, memory and ephemeral-storage need limits",
            {"cpu", "memory", "ephemeral-storage"} <= limits.keys()
            and all(_QUANTITY.fullmatch(str(value)) for value in limits.values()),
        ),
        (
            "supply",
            "another image can come under the same name",
            container.get("image") == f"registry.example/robustkit@sha256:{digest}",
        ),
    ]
    return {criterion: what for criterion, what, right in reversed(rules) if not right}


def _function(pod: Mapping[str, Any]) -> Any:
    """What the pod is for: names, what it runs, where it listens, what it mounts where."""
    (container,) = pod["spec"]["containers"]
    mounts = sorted((mount["name"], mount["mountPath"]) for mount in container["volumeMounts"])
    writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    kept = ("name", "args", "ports", "command", "env")
    volumes = sorted(json.dumps(volume, sort_keys=True) for volume in pod["spec"]["volumes"])
    running = [container.get(key) for key in kept]
    return pod["kind"], pod["apiVersion"], pod["metadata"], running, mounts, volumes, "/tmp" in writable


def _judge_pods(case: Arrays, evidence: Arrays) -> list[Finding]:
    digest = untext(case["digest"])
    lost: dict[str, Finding] = {}
    for i in range(_PODS):
        shaped(evidence, {f"kept_{i}": ()})
        given, pod = untext(case[f"pod_{i}"]), untext(evidence[f"pod_{i}"])
        if not isinstance(pod, dict):
            return everywhere(POD, "WRONG_SHAPE", "expected a manifest: a dictionary as you were given")
        for criterion, what in _faults(pod, digest).items():
            lost.setdefault(criterion, Finding(criterion, "STILL_OPEN", f"manifest {i + 1}: {what}"))
        if _function(pod) != _function(given):
            hint = f"manifest {i + 1} no longer runs, listens or mounts what it did; /tmp must stay writable"
            lost["works"] = Finding("works", "NO_LONGER_WORKS", hint)
        elif not evidence[f"kept_{i}"]:
            hint = "the manifest that you were given was changed: return a copy"
            lost["works"] = Finding("works", "ARGUMENT_CHANGED", hint)
    return list(lost.values())


POD = Contract(
    _POD,
    _draw_pods,
    _observe_pods,
    _judge_pods,
    essential=("identity", "isolation", "filesystem", "limits", "supply"),
)


# --- a canary -----------------------------------------------------------------------------------------

_CANARY = ("rollback", "wait", "promote")
METRICS = ("errors", "slow", "flagged", "probe_errors")
BOUNDS = {"errors": 0.01, "slow": 0.05, "flagged": 0.01, "probe_errors": 0.2}


def _shares(draw: np.random.Generator) -> list[dict[str, tuple[int, int]]]:
    """Counts (k, n) of each metric: harm in each metric alone, harm among doubts, doubts, and no reason to wait."""
    n = int(draw.integers(3000, 5000))

    def usual() -> dict[str, tuple[int, int]]:
        share = {"errors": 0.003, "slow": 0.03, "flagged": 0.002, "probe_errors": 0.1}
        counts = {name: (int(n * rate), n) for name, rate in share.items()}
        return counts | {"probe_errors": (int(0.1 * 500), 500)}

    cases = [usual(), usual() | {"errors": (0, n)}]
    for name, (k, of) in {
        "errors": (90, n),
        "slow": (400, n),
        "flagged": (95, n),
        "probe_errors": (160, 500),
    }.items():
        cases.append(usual() | {name: (k, of)})  # above its bound beyond doubt
    few = int(draw.integers(20, 60))
    cases += [
        dict.fromkeys(METRICS, (0, few)),  # nothing bad, and nothing known
        usual() | {"errors": (int(0.011 * n), n)},  # above the bound, and it may be chance
        usual() | {"slow": (int(0.047 * n), n)},  # below the bound, and that may be chance
        usual() | {"probe_errors": (9, 50)},
        usual() | {"probe_errors": (0, 0)},
        dict.fromkeys(METRICS, (0, 0)),
        dict.fromkeys(METRICS, (0, few)) | {"errors": (few // 2, few)},  # few requests, and half of them fail
        usual() | {"flagged": (95, n), "probe_errors": (0, 0)},
    ]
    return cases


def _draw_canaries(seed: int) -> Arrays:
    draw = _generator(seed, "canaries")
    cases = _shares(draw)
    counts = np.array([[case[name] for name in METRICS] for case in cases])
    return {"counts": counts[draw.permutation(len(counts))]}


def _observe_canaries(decide: Any, case: Arrays) -> Arrays:
    said = []
    for row in case["counts"].tolist():
        counts = {name: tuple(pair) for name, pair in zip(METRICS, row, strict=True)}
        answer = decide(counts, dict(BOUNDS))
        said.append(_CANARY.index(answer) if isinstance(answer, str) and answer in _CANARY else _NONE)
    return {"said": np.array(said)}


def _right_decision(row: Array) -> str:
    known = [
        (Interval(int(k), int(n)) if n else None, BOUNDS[name])
        for name, (k, n) in zip(METRICS, row, strict=True)
    ]
    if any(share is not None and share.low > bound for share, bound in known):
        return "rollback"
    sure = all(share is not None and share.high <= bound for share, bound in known)
    return "promote" if sure else "wait"


def _judge_canaries(case: Arrays, evidence: Arrays) -> list[Finding]:
    right = np.array([_CANARY.index(_right_decision(row)) for row in case["counts"]])
    said, found = evidence["said"], []
    shaped(evidence, {"said": right.shape})
    rollback, wait, promote = range(len(_CANARY))
    late, rash = (said != rollback) & (right == rollback), (said == rollback) & (right == promote)

    def told(at: Array) -> str:
        row = case["counts"][int(np.flatnonzero(at)[0])]
        return ", ".join(f"{name} {k} of {n}" for name, (k, n) in zip(METRICS, row.tolist(), strict=True))

    if (said == _NONE).any():
        return everywhere(CANARY, "UNKNOWN_DECISION", "a decision is rollback, wait or promote")
    if late.any():
        hint = f"harm beyond doubt, and the canary stays ({told(late)})"
        found.append(Finding("rollback", "HARM_NOT_STOPPED", hint))
    elif rash.any():
        found.append(
            Finding("rollback", "HEALTHY_ROLLED_BACK", f"nothing is wrong with this one ({told(rash)})")
        )
    doubt = (said != wait) & (right == wait)
    if doubt.any():
        code, word = (
            ("PROMOTED_ON_LUCK", "promoted")
            if (said[doubt] == promote).any()
            else ("ROLLED_BACK_ON_NOISE", "rolled back")
        )
        hint = f"{word} where the interval holds the bound, or nothing was measured ({told(doubt)})"
        found.append(Finding("wait", code, hint))
    stuck = (said != promote) & (right == promote)
    if stuck.any():
        found.append(
            Finding("promote", "NEVER_PROMOTED", f"every bound is kept beyond doubt ({told(stuck)})")
        )
    return found


CANARY = Contract(
    _CANARY, _draw_canaries, _observe_canaries, _judge_canaries, essential=("rollback", "promote")
)
