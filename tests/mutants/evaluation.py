"""Mutants of the margin, of the worst case image by image, and of a place on a leaderboard."""

from __future__ import annotations

import torch

from robustkit.results import Interval
from tests.mutants import mutant

# --- margin --------------------------------------------------------------------------------------------


def _others(logits, y):
    return logits.scatter(1, y[:, None], -torch.inf).amax(1)


def _true(logits, y):
    return logits.gather(1, y[:, None]).squeeze(1)


def _right_margin(logits, y):
    return _others(logits, y) - _true(logits, y)


@mutant("margin", value="WRONG_SIGN", gradient="WRONG_GRADIENT")
def margin_of_the_defender(logits, y):
    return -_right_margin(logits, y)


@mutant("margin", value="WRONG_MARGIN", gradient="WRONG_GRADIENT")
def true_class_among_the_others(logits, y):
    return logits.amax(1) - _true(logits, y)


@mutant("margin", value="WRONG_MARGIN", gradient="WRONG_GRADIENT")
def margin_of_probabilities(logits, y):
    return _right_margin(logits.softmax(1), y)


@mutant("margin", value="WRONG_MARGIN", gradient="WRONG_GRADIENT")
def cross_entropy_again(logits, y):
    return torch.nn.functional.cross_entropy(logits, y, reduction="none")


@mutant("margin", gradient="NO_GRADIENT")
def margin_in_numbers(logits, y):
    return _right_margin(logits.detach(), y)


@mutant("margin", gradient="WRONG_GRADIENT")
def half_of_the_gradient(logits, y):
    return _others(logits, y) - _true(logits.detach(), y)


@mutant("margin", everywhere="NOT_PER_EXAMPLE")
def mean_margin(logits, y):
    return _right_margin(logits, y).mean()


@mutant("margin", everywhere="NOT_PER_EXAMPLE")
def all_differences(logits, y):
    return logits - _true(logits, y)[:, None]


@mutant("margin", value="INPUT_MODIFIED")
def logits_shifted_in_place(logits, y):
    logits.data.sub_(logits.data.amax(1, keepdim=True))
    return _right_margin(logits, y)


@mutant("margin", everywhere="NOT_FINITE")
def infinity_minus_infinity(logits, y):
    return (logits - torch.inf * torch.nn.functional.one_hot(y, logits.shape[1])).amax(1) - _true(logits, y)


# --- worst_case ----------------------------------------------------------------------------------------

TOLERANCE = 1e-5


def _right(model, x, y):
    with torch.no_grad():
        return model(x).argmax(1) == y


def _in_ball(x, candidate, norm, eps, tolerance=TOLERANCE):
    change = (candidate - x).flatten(1)
    size = change.abs().amax(1) if norm == "Linf" else change.norm(dim=1)
    return size <= eps + tolerance


def _in_box(candidate):
    flat = candidate.flatten(1)
    return (flat.amin(1) >= 0) & (flat.amax(1) <= 1)


def _broken(model, x, y, candidate, norm, eps):
    return ~_right(model, candidate, y) & _in_ball(x, candidate, norm, eps) & _in_box(candidate)


@mutant("worst_case", clean_errors="CLEAN_ERRORS_COUNTED")
def clean_errors_counted(model, x, y, candidates, norm, eps):
    return ~torch.stack([_broken(model, x, y, c, norm, eps) for c in candidates]).any(0)


@mutant("worst_case", worst_case="BREAK_MISSED", valid="NOT_COUNTED", clean_errors="NOT_COUNTED")
def last_attack_alone(model, x, y, candidates, norm, eps):
    return _right(model, x, y) & ~_broken(model, x, y, candidates[-1], norm, eps)


@mutant("worst_case", worst_case="BREAK_MISSED")
def must_fall_to_every_attack(model, x, y, candidates, norm, eps):
    return _right(model, x, y) & ~torch.stack([_broken(model, x, y, c, norm, eps) for c in candidates]).all(0)


@mutant("worst_case", valid="BALL_NOT_CHECKED")
def ball_not_checked(model, x, y, candidates, norm, eps):
    fooled = torch.stack([~_right(model, c, y) & _in_box(c) for c in candidates]).any(0)
    return _right(model, x, y) & ~fooled


@mutant("worst_case", valid="BOX_NOT_CHECKED")
def box_not_checked(model, x, y, candidates, norm, eps):
    fooled = torch.stack([~_right(model, c, y) & _in_ball(x, c, norm, eps) for c in candidates]).any(0)
    return _right(model, x, y) & ~fooled


@mutant("worst_case", valid="BALL_NOT_CHECKED")
def ball_of_the_other_norm(model, x, y, candidates, norm, eps):
    fooled = torch.stack(
        [~_right(model, c, y) & _in_ball(x, c, "Linf", eps) & _in_box(c) for c in candidates]
    )
    return _right(model, x, y) & ~fooled.any(0)


@mutant("worst_case", valid="BALL_NOT_CHECKED")
def only_brighter_pixels_measured(model, x, y, candidates, norm, eps):
    def inside(c):
        return (c - x).flatten(1).amax(1) <= eps + TOLERANCE if norm == "Linf" else _in_ball(x, c, norm, eps)

    fooled = torch.stack([~_right(model, c, y) & inside(c) & _in_box(c) for c in candidates]).any(0)
    return _right(model, x, y) & ~fooled


@mutant("worst_case", valid="BOX_NOT_CHECKED")
def only_white_measured(model, x, y, candidates, norm, eps):
    fooled = [
        ~_right(model, c, y) & _in_ball(x, c, norm, eps) & (c.flatten(1).amax(1) <= 1) for c in candidates
    ]
    return _right(model, x, y) & ~torch.stack(fooled).any(0)


@mutant("worst_case", valid="ROUNDING_REJECTED")
def not_a_millionth_more(model, x, y, candidates, norm, eps):
    fooled = torch.stack(
        [~_right(model, c, y) & _in_ball(x, c, norm, eps, -1e-6) & _in_box(c) for c in candidates]
    )
    return _right(model, x, y) & ~fooled.any(0)


@mutant("worst_case", worst_case="FALSE_BREAK", valid="BALL_NOT_CHECKED", clean_errors="NOT_COUNTED")
def every_change_counts(model, x, y, candidates, norm, eps):
    return _right(model, x, y) & torch.stack([(c == x).flatten(1).all(1) for c in candidates]).all(0)


@mutant("worst_case", everywhere="NOT_PER_EXAMPLE")
def share_of_the_worst_attack(model, x, y, candidates, norm, eps):
    return min(_right(model, c, y).float().mean() for c in candidates)


@mutant("worst_case", everywhere="NOT_PER_EXAMPLE")
def attacks_that_fail(model, x, y, candidates, norm, eps):
    return torch.stack([_right(model, c, y) for c in candidates]).sum(0)


# --- standing ------------------------------------------------------------------------------------------


def _fair(entries):
    return [e for e in entries if not e.extra_data and not e.synthetic]


def _rank(share, entries):
    return 1 + sum(entry.robust > 100 * share for entry in entries)


def _ranks(k, n, entries):
    share = Interval(k, n)
    return _rank(share.high, entries), _rank(share.share, entries), _rank(share.low, entries)


@mutant("standing", comparable="INCOMPARABLE_COUNTED")
def placed_among_all(k, n, entries):
    return _ranks(k, n, entries)


@mutant("standing", comparable="INCOMPARABLE_COUNTED")
def synthetic_images_admitted(k, n, entries):
    return _ranks(k, n, [e for e in entries if not e.extra_data])


@mutant("standing", comparable="INCOMPARABLE_COUNTED")
def extra_images_admitted(k, n, entries):
    return _ranks(k, n, [e for e in entries if not e.synthetic])


@mutant("standing", interval="RANKS_SWAPPED")
def worst_rank_first(k, n, entries):
    return _ranks(k, n, _fair(entries))[::-1]


@mutant("standing", interval="WRONG_RANKS")
def one_rank_three_times(k, n, entries):
    return (_rank(k / n, _fair(entries)),) * 3


@mutant("standing", interval="WRONG_RANKS")
def twice_the_interval(k, n, entries):
    half, fair = 2 * (Interval(k, n).high - k / n), _fair(entries)
    return _rank(k / n + half, fair), _rank(k / n, fair), _rank(k / n - half, fair)


@mutant("standing", rank="WRONG_RANK")
def rank_at_the_middle_of_the_interval(k, n, entries):
    best, rank, worst = _ranks(k, n, _fair(entries))
    return best, rank + 1, worst


@mutant("standing", everywhere="WRONG_RANK")
def shares_against_percentages(k, n, entries):
    fair = _fair(entries)
    return tuple(1000 + rank for rank in _ranks(k / 100, n, fair))


@mutant("standing", everywhere="WRONG_SHAPE")
def rank_alone(k, n, entries):
    return (_rank(k / n, _fair(entries)),)
