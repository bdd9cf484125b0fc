"""Mutants of lesson 0's functions, the interval, the curve, the alarms, the prediction and the statement."""

from __future__ import annotations

import torch
from scipy import stats

from robustkit.results import Interval
from tests.mutants import declare, mutant

# --- distance ----------------------------------------------------------------------------------------


def _right_distance(x, z, norm):
    delta = (z - x).flatten(1)
    return delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)


@mutant("distance", Linf="NOT_PER_EXAMPLE", L2="NOT_PER_EXAMPLE")
def one_distance_for_the_batch(x, z, norm):
    return (z - x).abs().max() if norm == "Linf" else (z - x).norm()


@mutant("distance", Linf="WRONG_DISTANCE")
def largest_signed_change(x, z, norm):
    return (z - x).flatten(1).amax(1) if norm == "Linf" else _right_distance(x, z, norm)


@mutant("distance", L2="WRONG_DISTANCE")
def square_root_forgotten(x, z, norm):
    return _right_distance(x, z, norm) if norm == "Linf" else (z - x).flatten(1).pow(2).sum(1)


@mutant("distance", L2="WRONG_DISTANCE")
def root_of_the_mean(x, z, norm):
    return _right_distance(x, z, norm) if norm == "Linf" else (z - x).flatten(1).pow(2).mean(1).sqrt()


@mutant("distance", L2="WRONG_DISTANCE")
def norm_ignored(x, z, norm):
    return _right_distance(x, z, "Linf")


@mutant("distance", Linf="WRONG_DISTANCE", L2="WRONG_DISTANCE")
def first_channel_only(x, z, norm):
    return _right_distance(x[:, :1], z[:, :1], norm)


@mutant("distance", everywhere="NOT_FINITE")
def distance_divided_by_zero(x, z, norm):
    return _right_distance(x, z, norm) / torch.zeros(len(x))


# --- projection --------------------------------------------------------------------------------------


@mutant("projection", ball="EPS_BALL_VIOLATED")
def box_only(x, candidate, eps):
    return candidate.clamp(0, 1)


@mutant("projection", box="BOX_VIOLATED")
def ball_only(x, candidate, eps):
    return x + (candidate - x).clamp(-eps, eps)


@mutant("projection", ball="NOT_NEAREST", inside="INTERIOR_MOVED")
def onto_the_surface(x, candidate, eps):
    return (x + eps * (candidate - x).sign()).clamp(0, 1)


@mutant("projection", ball="NOT_NEAREST", inside="INTERIOR_MOVED")
def into_the_l2_ball(x, candidate, eps):
    delta = (candidate - x).flatten(1)
    shrink = (eps / delta.norm(dim=1, keepdim=True)).clamp(max=1)
    return (x + (delta * shrink).view_as(x)).clamp(0, 1)


@mutant("projection", ball="NOT_NEAREST")
def whole_image_scaled_back(x, candidate, eps):
    delta = candidate - x
    shrink = (eps / delta.flatten(1).abs().amax(1)).clamp(max=1).view(-1, 1, 1, 1)
    return (x + delta * shrink).clamp(0, 1)


@mutant("projection", inside="INPUT_MODIFIED")
def candidate_overwritten(x, candidate, eps):
    return candidate.copy_((x + (candidate - x).clamp(-eps, eps)).clamp(0, 1))


@mutant("projection", inside="INPUT_MODIFIED")
def image_overwritten(x, candidate, eps):
    return x.copy_((x + (candidate - x).clamp(-eps, eps)).clamp(0, 1))


@mutant("projection", inside="INTERIOR_MOVED", ball="NOT_NEAREST")
def returns_the_image(x, candidate, eps):
    return x


@mutant("projection", ball="EPS_BALL_VIOLATED")
def eps_of_the_lesson(x, candidate, eps):
    return (x + (candidate - x).clamp(-0.3, 0.3)).clamp(0, 1)


@mutant("projection", everywhere="WRONG_SHAPE")
def flat_images(x, candidate, eps):
    return (x + (candidate - x).clamp(-eps, eps)).clamp(0, 1).flatten(1)


# --- robust accuracy ---------------------------------------------------------------------------------


@mutant("robust_accuracy", worst_case="MIN_OF_MEANS")
def least_of_the_accuracies(correct, fooled):
    return (correct & ~fooled).float().mean(1).min()


@mutant("robust_accuracy", clean_errors="CLEAN_ERRORS_COUNTED")
def clean_errors_counted(correct, fooled):
    return (~fooled.any(0)).float().mean()


@mutant("robust_accuracy", everywhere="WRONG_SHARE")
def mean_over_attacks(correct, fooled):
    return (correct & ~fooled).float().mean()


@mutant("robust_accuracy", everywhere="WRONG_SHARE")
def survives_any_attack(correct, fooled):
    return (correct & ~fooled.all(0)).float().mean()


@mutant("robust_accuracy", everywhere="WRONG_SHARE")
def share_of_the_correct_only(correct, fooled):
    return (~fooled.any(0))[correct].float().mean()


@mutant("robust_accuracy", everywhere="WRONG_SHARE")
def percent(correct, fooled):
    return 100 * (correct & ~fooled.any(0)).float().mean()


@mutant("robust_accuracy", everywhere="WRONG_SHARE")
def clean_accuracy(correct, fooled):
    return correct.float().mean()


@mutant("robust_accuracy", everywhere="WRONG_SHAPE")
def one_per_attack(correct, fooled):
    return (correct & ~fooled).float().mean(1)


# --- interval ----------------------------------------------------------------------------------------


def _wilson(k, n, z):
    p, q = k / n, 1 + z * z / n
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (p + z * z / (2 * n) - half) / q, (p + z * z / (2 * n) + half) / q


@mutant("interval", value="NORMAL_INTERVAL", edges="EDGE_CASES")
def wald(k, n):
    half = 1.96 * (k / n * (1 - k / n) / n) ** 0.5
    return k / n - half, k / n + half


@mutant("interval", value="NORMAL_INTERVAL", edges="EDGE_CASES")
def wald_clipped(k, n):
    low, high = wald(k, n)
    return max(low, 0), min(high, 1)


@mutant("interval", value="WRONG_INTERVAL")
def of_ninety_percent(k, n):
    return _wilson(k, n, 1.645)


@mutant("interval", value="WRONG_INTERVAL")
def always_five_points_wide(k, n):
    return max(0, k / n - 0.05), min(1, k / n + 0.05)


@mutant("interval", value="WRONG_INTERVAL")
def clopper_pearson(k, n):
    low = stats.beta.ppf(0.025, k, n - k + 1) if k else 0.0
    return low, stats.beta.ppf(0.975, k + 1, n - k) if k < n else 1.0


@mutant("interval", value="WRONG_INTERVAL", edges="EDGE_CASES")
def agresti_coull_unclipped(k, n):
    n, k = n + 1.96**2, k + 1.96**2 / 2
    half = 1.96 * (k / n * (1 - k / n) / n) ** 0.5
    return k / n - half, k / n + half


@mutant("interval", value="WRONG_INTERVAL", edges="EDGE_CASES")
def percent_interval(k, n):
    return tuple(100 * bound for bound in _wilson(k, n, 1.96))


@mutant("interval", value="WRONG_INTERVAL", edges="EDGE_CASES")
def bounds_swapped(k, n):
    return _wilson(k, n, 1.96)[::-1]


@mutant("interval", everywhere="WRONG_SHAPE")
def with_the_share_in_the_middle(k, n):
    low, high = _wilson(k, n, 1.96)
    return low, k / n, high


@mutant("interval", everywhere="RAISED")
def fails_at_the_edges(k, n):
    p = k / n
    half = 1.96 * p * (1 - p) / (p * (1 - p))
    return p - half, p + half


# --- curve -------------------------------------------------------------------------------------------


def _right(model, x, y):
    with torch.no_grad():
        return model(x).argmax(1) == y


@mutant("curve", everywhere="SHARES_NOT_COUNTS")
def shares(model, x, y, epsilons, attack):
    clean = _right(model, x, y)
    return [(clean & _right(model, attack(model, x, y, eps), y)).float().mean() for eps in epsilons]


@mutant("curve", counts="CLEAN_ERRORS_COUNTED")
def clean_errors_counted_under_attack(model, x, y, epsilons, attack):
    return [int(_right(model, attack(model, x, y, eps), y).sum()) for eps in epsilons]


@mutant("curve", clean="CLEAN_ERRORS_COUNTED")
def every_image_robust_at_zero(model, x, y, epsilons, attack):
    clean = _right(model, x, y)
    attacked = [int((clean & _right(model, attack(model, x, y, eps), y)).sum()) for eps in epsilons]
    return [len(x), *attacked[1:]]


@mutant("curve", counts="ATTACK_IGNORED")
def attack_ignored(model, x, y, epsilons, attack):
    return [int(_right(model, x, y).sum()) for _ in epsilons]


@mutant("curve", everywhere="WRONG_COUNT")
def broken_images_counted(model, x, y, epsilons, attack):
    clean = _right(model, x, y)
    return [int((~clean | ~_right(model, attack(model, x, y, eps), y)).sum()) for eps in epsilons]


@mutant("curve", everywhere="WRONG_COUNT")
def largest_eps_throughout(model, x, y, epsilons, attack):
    clean = _right(model, x, y)
    return [int((clean & _right(model, attack(model, x, y, 0.1), y)).sum()) for _ in epsilons]


@mutant("curve", everywhere="WRONG_COUNT")
def epsilons_reversed(model, x, y, epsilons, attack):
    clean = _right(model, x, y)
    return [int((clean & _right(model, attack(model, x, y, eps), y)).sum()) for eps in epsilons[::-1]]


@mutant("curve", everywhere="WRONG_SHAPE")
def last_count_only(model, x, y, epsilons, attack):
    return [int(_right(model, attack(model, x, y, epsilons[-1]), y).sum())]


# --- alarms ------------------------------------------------------------------------------------------

LEAK, MASK = "LABEL_LEAKING", "MASKED_GRADIENTS"


@mutant("alarms", everywhere="ALWAYS_THE_SAME")
def never(clean, fgsm, pgd):
    return []


@mutant("alarms", everywhere="ALWAYS_THE_SAME")
def always(clean, fgsm, pgd):
    return [LEAK, MASK]


@mutant("alarms", leaking="MISSED_ALARM", masked="MISSED_ALARM")
def leaking_found_late(clean, fgsm, pgd):
    return [LEAK] if fgsm > clean + 0.019 else []


@mutant("alarms", quiet="FALSE_ALARM")
def any_gap_is_masking(clean, fgsm, pgd):
    return [LEAK] * (fgsm > clean + 0.01) + [MASK] * (fgsm > pgd)


@mutant("alarms", leaking="FALSE_ALARM", quiet="FALSE_ALARM")
def leaking_inverted(clean, fgsm, pgd):
    return [LEAK] * (fgsm < clean + 0.01) + [MASK] * (fgsm - pgd > 0.2)


@mutant("alarms", masked="MISSED_ALARM", quiet="FALSE_ALARM")
def masking_inverted(clean, fgsm, pgd):
    return [LEAK] * (fgsm > clean + 0.01) + [MASK] * (fgsm - pgd < 0.2)


@mutant("alarms", masked="MISSED_ALARM", quiet="FALSE_ALARM")
def masking_from_clean_and_fgsm(clean, fgsm, pgd):
    return [LEAK] * (fgsm > clean + 0.01) + [MASK] * (clean - fgsm > 0.2)


@mutant("alarms", masked="MISSED_ALARM", quiet="FALSE_ALARM")
def low_pgd_is_masking(clean, fgsm, pgd):
    return [LEAK] * (fgsm > clean + 0.01) + [MASK] * (pgd < 0.5)


@mutant("alarms", leaking="FALSE_ALARM", quiet="FALSE_ALARM")
def any_point_above_clean_is_leaking(clean, fgsm, pgd):
    return [LEAK] * (fgsm > clean - 0.25) + [MASK] * (fgsm - pgd > 0.2)


@mutant("alarms", quiet="FALSE_ALARM")
def leaking_without_a_margin(clean, fgsm, pgd):
    return [LEAK] * (fgsm > clean) + [MASK] * (fgsm - pgd > 0.2)


@mutant("alarms", leaking="MISSED_ALARM")
def leaking_by_two_points(clean, fgsm, pgd):
    return [LEAK] * (fgsm > clean + 0.02) + [MASK] * (fgsm - pgd > 0.2)


@mutant("alarms", masked="MISSED_ALARM")
def masking_by_forty_points(clean, fgsm, pgd):
    return [LEAK] * (fgsm > clean + 0.01) + [MASK] * (fgsm - pgd > 0.4)


@mutant("alarms", quiet="FALSE_ALARM")
def masking_by_ten_points(clean, fgsm, pgd):
    return [LEAK] * (fgsm > clean + 0.01) + [MASK] * (fgsm - pgd > 0.1)


@mutant("alarms", masked="MISSED_ALARM")
def masking_by_ratio(clean, fgsm, pgd):
    return [LEAK] * (fgsm > clean + 0.01) + [MASK] * (pgd < fgsm / 2 and fgsm > 0.5)


@mutant("alarms", leaking="MISSED_ALARM")
def no_leaking(clean, fgsm, pgd):
    return [MASK] * (fgsm - pgd > 0.2)


@mutant("alarms", masked="MISSED_ALARM")
def one_alarm_at_most(clean, fgsm, pgd):
    return [LEAK] if fgsm > clean + 0.01 else [MASK] if fgsm - pgd > 0.2 else []


@mutant("alarms", quiet="FALSE_ALARM")
def alarms_of_its_own_naming(clean, fgsm, pgd):
    return [LEAK] * (fgsm > clean + 0.01) + [MASK] * (fgsm - pgd > 0.2) + ["ALL_IS_WELL"] * (fgsm - pgd < 0.2)


@mutant("alarms", everywhere="RAISED")
def booleans(clean, fgsm, pgd):
    return fgsm > clean


# --- prediction and statement: values ----------------------------------------------------------------

for _name, _code, _value in (
    ("rises_with_eps", "NOT_MONOTONE", {"0.1": 0.2, "0.2": 0.5, "0.3": 0.9}),
    ("one_value_rises", "NOT_MONOTONE", {"0.1": 0.9, "0.2": 0.1, "0.3": 0.2}),
    ("in_percent", "NOT_A_SHARE", {"0.1": 90, "0.2": 50, "0.3": 10}),
    ("negative", "NOT_A_SHARE", {"0.1": 0.9, "0.2": 0.5, "0.3": -0.1}),
    ("not_a_number", "NOT_A_SHARE", {"0.1": 0.9, "0.2": float("nan"), "0.3": 0.1}),
    ("stub", "PREDICTION_MISSING", {"0.1": None, "0.2": None, "0.3": None}),
    ("one_missing", "PREDICTION_MISSING", {"0.1": 0.9, "0.3": 0.1}),
    ("a_list", "PREDICTION_MISSING", [0.9, 0.5, 0.1]),
    ("nothing", "PREDICTION_MISSING", None),
):
    declare("prediction", _name, _value, plausible=_code)


def statement(**changes):
    """A right statement, but for `changes`."""
    share = Interval(910, 1000)
    right = {
        "norm": "Linf",
        "eps": 0.3,
        "input_range": (0, 1),
        "knowledge": "white-box",
        "goal": "untargeted",
        "queries": None,
        "dataset": "mnist test",
        "n": 1000,
        "seed": 0,
        "attack": "PGD-100x10",
        "robust_accuracy": share.share,
        "interval": share.bounds,
    }
    return right | changes


for _name, _changes in {
    "another_eps": {"eps": 0.03},
    "another_norm": {"norm": "L2"},
    "range_of_bytes": {"input_range": (0, 255)},
    "scores_only": {"knowledge": "score-based"},
    "another_attack": {"attack": "FGSM"},
    "interval_beside_the_share": {"interval": (0.2, 0.3)},
    "interval_of_another_n": {"interval": Interval(91, 100).bounds},
}.items():
    declare("statement", _name, statement(**_changes), consistent="STATEMENT_INCONSISTENT")

for _name, _changes in {
    "eps_in_units_of_255": {"eps": 0.3 * 255},
    "norm_unknown": {"norm": "inf"},
    "range_is_a_number": {"input_range": 1},
    "black_box": {"knowledge": "black-box"},
    "goal_unknown": {"goal": "evil"},
    "negative_queries": {"queries": -1},
    "no_images": {"n": 0},
    "n_in_words": {"n": "a thousand"},
    "n_is_true": {"n": True},
    "accuracy_in_percent": {"robust_accuracy": 91.0, "interval": (89.1, 92.6)},
    "accuracy_not_a_number": {"robust_accuracy": float("nan")},
    "interval_without_width": {"interval": (0.91, 0.91)},
    "interval_is_a_number": {"interval": 0.91},
    "all_the_same": dict.fromkeys(statement(), "x"),
}.items():
    declare("statement", _name, statement(**_changes), everywhere="FIELD_UNUSABLE")

declare("statement", "a_sentence", "Linf, eps 0.3", everywhere="NOT_A_STATEMENT")
declare("statement", "left_open", statement(knowledge="..."), everywhere="STATEMENT_INCOMPLETE")
declare("statement", "empty", {}, everywhere="STATEMENT_INCOMPLETE")
for _key in ("n", "eps", "queries", "interval", "seed"):
    _partial = statement()
    del _partial[_key]
    declare("statement", f"without_{_key}", _partial, everywhere="STATEMENT_INCOMPLETE")
