"""Contracts of what surrounds an attack: distances, projection, intervals, accuracies, judgements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from robustkit.contracts.base import Arrays, Contract, Finding, numbers, text, untext
from robustkit.contracts.oracle import draw_linear, oracle, z
from robustkit.device import seeded
from robustkit.results import Interval
from robustkit.threat import GOALS, KNOWLEDGE, NORMS

EPSILONS = (0.0, 0.03, 0.06, 0.1)


# --- distance -------------------------------------------------------------------------------------


def _draw_pairs(seed: int) -> Arrays:
    generator = seeded(seed, "pairs")
    x, z = torch.rand(2, 32, 3, 4, 4, generator=generator)
    return {"x": x.numpy(), "z": z.numpy()}


def _observe_distance(distance: Any, case: Arrays) -> Arrays:
    x, other = torch.from_numpy(case["x"].copy()), torch.from_numpy(case["z"].copy())
    return {norm: numbers(distance(x, other, norm)) for norm in ("Linf", "L2")}


def _judge_distance(case: Arrays, evidence: Arrays) -> list[Finding]:
    delta = (case["z"].astype(np.float64) - case["x"]).reshape(len(case["x"]), -1)
    expected = {"Linf": np.abs(delta).max(1), "L2": np.sqrt((delta**2).sum(1))}
    found = []
    for norm, values in expected.items():
        got = evidence[norm]
        if got.shape != values.shape:
            hint = (
                f"{norm}: got shape {got.shape}; each of the {len(values)} images has a distance of its own"
            )
            found.append(Finding(norm, "NOT_PER_EXAMPLE", hint))
        elif not np.allclose(got, values, atol=1e-5):
            found.append(Finding(norm, "WRONG_DISTANCE", f"{norm}: image 0 is not {got[0]:.4f} away"))
    return found


DISTANCE = Contract(("Linf", "L2"), _draw_pairs, _observe_distance, _judge_distance)


# --- projection -----------------------------------------------------------------------------------


def _draw_projection(seed: int) -> Arrays:
    generator = seeded(seed, "projection")
    x = torch.rand(32, 1, 6, 6, generator=generator)
    eps = round(0.05 + 0.1 * torch.rand((), generator=generator).item(), 3)
    near = (x + 0.5 * eps * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
    far = x + 2 * torch.rand(x.shape, generator=generator) - 1
    return {"x": x.numpy(), "near": near.numpy(), "far": far.numpy(), "eps": np.float64(eps)}


def _observe_projection(project: Any, case: Arrays) -> Arrays:
    seen: Arrays = {}
    for name in ("near", "far"):
        x, candidate = torch.from_numpy(case["x"].copy()), torch.from_numpy(case[name].copy())
        seen[name] = numbers(project(x, candidate, float(case["eps"])))
        kept = np.array_equal(candidate.numpy(), case[name]) and np.array_equal(x.numpy(), case["x"])
        seen[f"{name}_kept"] = np.bool_(kept)
    return seen


def _judge_projection(case: Arrays, evidence: Arrays) -> list[Finding]:
    criteria = ("ball", "box", "inside")
    for name in ("near", "far"):
        if evidence[name].shape != case["x"].shape:
            hint = f"expected images of shape {case['x'].shape}, got shape {evidence[name].shape}"
            return [Finding(criterion, "WRONG_SHAPE", hint) for criterion in criteria]
    eps, x, found = float(case["eps"]), case["x"].astype(np.float64), []
    change = np.abs(evidence["far"] - x).max()
    if change > eps + 1e-6:
        found.append(
            Finding(
                "ball",
                "EPS_BALL_VIOLATED",
                f"a pixel is still {change:.3f} from its original; allowed is {eps:g}",
            )
        )
    elif not np.allclose(
        np.clip(evidence["far"], 0, 1), np.clip(np.clip(case["far"], x - eps, x + eps), 0, 1), atol=1e-6
    ):
        found.append(
            Finding(
                "ball",
                "NOT_NEAREST",
                "a far point should go to the nearest point allowed, coordinate by coordinate",
            )
        )
    if evidence["far"].min() < 0 or evidence["far"].max() > 1:
        found.append(Finding("box", "BOX_VIOLATED", "pixels leave [0, 1]; the result must still be an image"))
    if not np.allclose(evidence["near"], case["near"], atol=1e-6):
        found.append(
            Finding(
                "inside",
                "INTERIOR_MOVED",
                "a point that is already allowed was moved; a projection leaves it alone",
            )
        )
    if not (evidence["near_kept"].item() and evidence["far_kept"].item()):
        hint = "the images or the candidates that you were given were changed; return new ones"
        found.append(Finding("inside", "INPUT_MODIFIED", hint))
    return found


PROJECTION = Contract(
    ("ball", "box", "inside"), _draw_projection, _observe_projection, _judge_projection, essential=("ball",)
)


# --- robust accuracy over several attacks -----------------------------------------------------------


def _draw_outcomes(seed: int) -> Arrays:
    generator = seeded(seed, "outcomes")
    correct = torch.rand(200, generator=generator) < 0.9
    fooled = torch.rand(3, 200, generator=generator) < torch.tensor([[0.3], [0.35], [0.25]])
    correct[:4], fooled[:, :4] = False, False  # misclassified untouched, and by no candidate
    return {"correct": correct.numpy(), "fooled": fooled.numpy()}


def _observe_outcomes(robust_accuracy: Any, case: Arrays) -> Arrays:
    result = robust_accuracy(
        torch.from_numpy(case["correct"].copy()), torch.from_numpy(case["fooled"].copy())
    )
    return {"result": numbers(result)}


def _judge_outcomes(case: Arrays, evidence: Arrays) -> list[Finding]:
    correct, fooled, got = case["correct"], case["fooled"], evidence["result"]
    if got.shape != ():
        hint = f"expected one number, got shape {got.shape}"
        return [Finding(criterion, "WRONG_SHAPE", hint) for criterion in ("worst_case", "clean_errors")]
    value = float(got)
    right = (correct & ~fooled.any(0)).mean()
    if abs(value - right) < 1e-6:
        return []
    if abs(value - (~fooled.any(0)).mean()) < 1e-6:
        return [
            Finding(
                "clean_errors",
                "CLEAN_ERRORS_COUNTED",
                "an image that is misclassified untouched cannot be robust",
            )
        ]
    if abs(value - (correct & ~fooled).mean(1).min()) < 1e-6:
        hint = "the least of the attacks' accuracies is not the accuracy under the worst attack on each image"
        return [Finding("worst_case", "MIN_OF_MEANS", hint)]
    return [
        Finding(criterion, "WRONG_SHARE", f"{value:.3f} is not the share of images that survive every attack")
        for criterion in ("worst_case", "clean_errors")
    ]


ROBUST_ACCURACY = Contract(("worst_case", "clean_errors"), _draw_outcomes, _observe_outcomes, _judge_outcomes)


# --- interval -------------------------------------------------------------------------------------


def _draw_counts(seed: int) -> Arrays:
    generator = seeded(seed, "counts")
    n = torch.randint(20, 2000, (6,), generator=generator)
    k = (n * (0.05 + 0.9 * torch.rand(6, generator=generator))).long()
    n[0] = 20 + n[0] % 40  # small and far from one half: there every other interval differs
    k[0] = n[0] // 10
    return {"k": k.numpy(), "n": n.numpy()}


def _observe_interval(interval: Any, case: Arrays) -> Arrays:
    pairs = [(int(k), int(n)) for k, n in zip(case["k"], case["n"], strict=True)]
    return {
        "inner": np.stack([numbers(tuple(interval(k, n))) for k, n in pairs]),
        "edges": np.stack([numbers(tuple(interval(0, 50))), numbers(tuple(interval(50, 50)))]),
    }


def _judge_interval(case: Arrays, evidence: Arrays) -> list[Finding]:
    inner = np.array([Interval(int(k), int(n)).bounds for k, n in zip(case["k"], case["n"], strict=True)])
    got, edges, found = evidence["inner"], evidence["edges"], []
    if got.shape != inner.shape or edges.shape != (2, 2):
        hint = "expected the lower and the upper bound, and nothing else"
        return [Finding(criterion, "WRONG_SHAPE", hint) for criterion in ("value", "edges")]
    if not np.allclose(got, inner, rtol=0, atol=5e-4):
        p = case["k"] / case["n"]
        wald = 1.96 * np.sqrt(p * (1 - p) / case["n"])
        code, hint = "WRONG_INTERVAL", "the bounds are not those of the 95 % Wilson interval"
        if np.allclose(np.minimum(got[:, 1], 1), np.minimum(p + wald, 1), rtol=0, atol=5e-4):
            code, hint = "NORMAL_INTERVAL", "this is the normal interval; it fails near 0 % and 100 %"
        found.append(Finding("value", code, hint))
    # Any honest interval for 0 of 50 runs from 0 to somewhere above it, and the other way round.
    outer, width = np.abs([edges[0, 0], edges[1, 1] - 1]), edges[:, 1] - edges[:, 0]
    if (outer > 1e-6).any() or (width < 0.03).any() or (width > 0.2).any():
        hint = "0 of 50 and 50 of 50 still leave doubt; the interval has width there, and stays inside [0, 1]"
        found.append(Finding("edges", "EDGE_CASES", hint))
    return found


INTERVAL = Contract(
    ("value", "edges"), _draw_counts, _observe_interval, _judge_interval, essential=("value",)
)


# --- robust accuracy against eps ---------------------------------------------------------------------


def _curve_attack(model: Any, x: torch.Tensor, y: torch.Tensor, eps: float) -> torch.Tensor:
    """Optimal on the oracle, with one wrinkle: it carries misclassified images back to their class.

    A curve that counts those as robust is wrong, and real attacks produce them by accident.
    """
    towards = torch.where(y == 1, -1.0, 1.0)[:, None] * model.w.detach().sign()[None, :]
    with torch.no_grad():
        wrong = model(x).argmax(1) != y
    towards = torch.where(wrong[:, None], -5 * towards, towards)
    return (x + eps * towards.view_as(x)).clamp(0, 1)


def _observe_curve(curve: Any, case: Arrays) -> Arrays:
    model = oracle(case).eval()
    x, y = torch.from_numpy(case["x"].copy()), torch.from_numpy(case["y"].copy())
    return {"counts": numbers(list(curve(model, x, y, list(EPSILONS), _curve_attack)))}


def _judge_curve(case: Arrays, evidence: Arrays) -> list[Finding]:
    y, counts = case["y"], evidence["counts"]
    if counts.shape != (len(EPSILONS),):
        hint = f"expected {len(EPSILONS)} counts, one per eps; got shape {counts.shape}"
        return [Finding(criterion, "WRONG_SHAPE", hint) for criterion in ("counts", "clean")]
    value = z(case, case["x"])
    margin = np.where(y == 1, value, -value) / np.abs(case["w"].astype(np.float64)).sum()
    expected = np.array([(margin > max(eps, 0)).sum() for eps in EPSILONS])
    if np.abs(counts - expected / len(y)).max() < 1e-6:
        hint = "these are shares; return counts, because an interval needs k and n"
        return [Finding(criterion, "SHARES_NOT_COUNTS", hint) for criterion in ("counts", "clean")]
    found = []
    if counts[0] != expected[0]:
        code = "CLEAN_ERRORS_COUNTED" if counts[0] > expected[0] else "WRONG_COUNT"
        hint = f"{counts[0]:g} is not the number of images that are classified right at eps 0"
        found.append(Finding("clean", code, hint))
    if np.abs(counts[1:] - expected[1:]).max() > 1:  # one image may lie on the boundary
        if (counts == expected[0]).all():
            reason = "ATTACK_IGNORED", "the counts do not change with eps: which images are classified?"
        elif (counts[1:] >= expected[1:]).all() and counts[0] == expected[0]:
            reason = (
                "CLEAN_ERRORS_COUNTED",
                "an image that is misclassified untouched is counted as robust under attack",
            )
        else:
            reason = "WRONG_COUNT", "the counts of images that stay right under attack are off"
        found.append(Finding("counts", *reason))
    return found


CURVE = Contract(("counts", "clean"), draw_linear, _observe_curve, _judge_curve, essential=("counts",))


# --- alarms: reading the signs of false robustness ----------------------------------------------------

LABEL_LEAKING, MASKED_GRADIENTS = "LABEL_LEAKING", "MASKED_GRADIENTS"

_ALARM_RULES: tuple[frozenset[str], ...] = (
    frozenset({MASKED_GRADIENTS, LABEL_LEAKING}),  # leaking
    frozenset({MASKED_GRADIENTS}),  # masked
    frozenset(),  # honest
    frozenset(),  # undefended
    frozenset({MASKED_GRADIENTS, LABEL_LEAKING}),  # leaking by more than one point, and less than two
    frozenset({MASKED_GRADIENTS}),  # masked by little more than 20 points
    frozenset(),  # FGSM above clean by less than one point, and above PGD by less than 20
)


def _draw_alarms(seed: int) -> Arrays:
    """Rows of clean, FGSM and PGD accuracy, and which kind each is; no value is within 0.2 points of a threshold."""
    generator = seeded(seed, "alarms")

    def between(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    rows = []
    for _ in range(4):
        clean = between(0.85, 0.95)
        rows.append((clean, clean + between(0.02, 0.04), between(0.0, 0.3)))
        rows.append((between(0.96, 0.99), between(0.6, 0.9), between(0.0, 0.3)))
        pgd = between(0.8, 0.9)
        rows.append((between(0.97, 0.99), pgd + between(0.01, 0.06), pgd))
        rows.append((between(0.97, 0.99), between(0.02, 0.12), between(0.0, 0.01)))
        rows.append((clean, clean + between(0.012, 0.018), between(0.0, 0.3)))
        fgsm = between(0.75, 0.9)
        rows.append((between(0.96, 0.99), fgsm, fgsm - between(0.21, 0.24)))
        rows.append((clean, clean + between(0.006, 0.008), clean - between(0.12, 0.18)))
    order = torch.randperm(len(rows), generator=generator).numpy()
    return {"accuracies": np.array(rows)[order], "kind": order % len(_ALARM_RULES)}


def _observe_alarms(alarms: Any, case: Arrays) -> Arrays:
    return {
        "alarms": text(
            [sorted(str(alarm) for alarm in alarms(*map(float, row))) for row in case["accuracies"]]
        )
    }


def _judge_alarms(case: Arrays, evidence: Arrays) -> list[Finding]:
    answers, found = untext(evidence["alarms"]), {}
    if not all(isinstance(answer, list) for answer in answers):
        raise TypeError("alarms are lists of names")
    if all(answer == answers[0] for answer in answers):
        hint = f"you answer {answers[0] or 'no alarm'} whatever the accuracies are"
        return [Finding(criterion, "ALWAYS_THE_SAME", hint) for criterion in _ALARMS]
    for row, kind, answer in zip(case["accuracies"], case["kind"], answers, strict=True):
        expected = _ALARM_RULES[kind]
        missed, false = expected - set(answer), set(answer) - expected
        shown = f"clean {row[0]:.3f}, FGSM {row[1]:.3f}, PGD {row[2]:.3f}: you answer {answer or 'no alarm'}"
        for criterion, alarm in (("leaking", LABEL_LEAKING), ("masked", MASKED_GRADIENTS)):
            if alarm in missed:
                found[criterion, "MISSED_ALARM"] = shown
            elif alarm in false and expected:
                found[criterion, "FALSE_ALARM"] = shown
        if (false and not expected) or false - {LABEL_LEAKING, MASKED_GRADIENTS}:
            found["quiet", "FALSE_ALARM"] = shown
    return [Finding(criterion, code, shown) for (criterion, code), shown in found.items()]


_ALARMS = ("leaking", "masked", "quiet")
ALARMS = Contract(
    _ALARMS, _draw_alarms, _observe_alarms, _judge_alarms, essential=("leaking", "masked"), hidden=("kind",)
)


# --- prediction and threat model: values, not functions ------------------------------------------------


def _draw_nothing(seed: int) -> Arrays:
    return {}


def _observe_value(value: Any, case: Arrays) -> Arrays:
    return {"value": text(value)}


def _judge_prediction(case: Arrays, evidence: Arrays) -> list[Finding]:
    value = untext(evidence["value"])
    try:
        guesses = [float(value[key]) for key in ("0.1", "0.2", "0.3")]
    except (KeyError, TypeError, ValueError):
        return [
            Finding("plausible", "PREDICTION_MISSING", "give one accuracy for each of eps 0.1, 0.2 and 0.3")
        ]
    if not all(0 <= guess <= 1 for guess in guesses):
        return [Finding("plausible", "NOT_A_SHARE", "an accuracy lies between 0 and 1")]
    if not guesses[0] >= guesses[1] >= guesses[2]:
        hint = "you expect a stronger attacker to do worse; a larger ball contains the smaller one"
        return [Finding("plausible", "NOT_MONOTONE", hint)]
    return []


PREDICTION = Contract(("plausible",), _draw_nothing, _observe_value, _judge_prediction)

_STATEMENT_KEYS = (
    "norm",
    "eps",
    "input_range",
    "knowledge",
    "goal",
    "queries",
    "dataset",
    "n",
    "seed",
    "attack",
    "robust_accuracy",
    "interval",
)


def _is_share(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and 0 <= value <= 1
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_interval(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_share, value)) and value[0] < value[1]


# What a field can hold at all, and what to say where it holds something else.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "norm": (lambda norm: norm in NORMS, f"norm is one of {', '.join(NORMS)}"),
    "eps": (lambda eps: _is_share(eps) and eps > 0, "eps is in input units, where images lie in [0, 1]"),
    "input_range": (lambda ends: isinstance(ends, list) and len(ends) == 2, "input_range holds two ends"),
    "knowledge": (lambda kind: kind in KNOWLEDGE, f"knowledge is one of {', '.join(KNOWLEDGE)}"),
    "goal": (lambda goal: goal in GOALS, f"goal is one of {', '.join(GOALS)}"),
    "queries": (
        lambda most: most is None or _is_count(most),
        "queries is None, no limit, or the number allowed for each image",
    ),
    "n": (_is_count, "n is the number of images that were attacked"),
    "robust_accuracy": (_is_share, "robust_accuracy is a share between 0 and 1"),
    "interval": (_is_interval, "interval holds two bounds, the lower first"),
}


def _judge_statement(case: Arrays, evidence: Arrays) -> list[Finding]:
    value = untext(evidence["value"])
    if not isinstance(value, dict):
        return [Finding(c, "NOT_A_STATEMENT", "the statement is a dict") for c in ("complete", "consistent")]
    missing = [key for key in _STATEMENT_KEYS if key not in value or value[key] in ("", "...")]
    if missing:
        hint = f"the statement does not say: {', '.join(missing)}"
        return [Finding(criterion, "STATEMENT_INCOMPLETE", hint) for criterion in ("complete", "consistent")]
    unusable = [hint for key, (usable, hint) in _FIELDS.items() if not usable(value[key])]
    if unusable:
        return [Finding(criterion, "FIELD_UNUSABLE", unusable[0]) for criterion in ("complete", "consistent")]
    share, n, interval = value["robust_accuracy"], value["n"], value["interval"]
    off = np.abs(np.subtract(interval, Interval(round(share * n), n).bounds)).max()
    problems = [
        (
            value["norm"] != "Linf" or value["eps"] != 0.3,
            "this lesson's ball is Linf with eps 0.3, in input units",
        ),
        (value["input_range"] != [0, 1], "images lie in [0, 1]"),
        (
            value["knowledge"] != "white-box",
            "an attack that uses the model's gradient knows more than that",
        ),
        ("pgd" not in str(value["attack"]).lower(), "attack names the one that gave the figure"),
        (off > max(0.01, 1 / n), f"interval is not the 95 % interval of {share} over {n} images"),
    ]
    wrong = next((hint for bad, hint in problems if bad), None)
    return [] if wrong is None else [Finding("consistent", "STATEMENT_INCONSISTENT", wrong)]


STATEMENT = Contract(("complete", "consistent"), _draw_nothing, _observe_value, _judge_statement)
