"""Mutants of choosing a defence: the sandwich, covering balls, costs, paired comparisons, requirements, routes."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from tests.mutants import declare, mutant

# --- the sandwich -------------------------------------------------------------------------------------


def _clean(records):
    return sum(r.clean == r.label for r in records)


def _empirical(records):
    return sum(r.clean == r.label and r.attacked == r.label for r in records)


def _holds(record, eps):
    return (
        record.certificate is not None
        and record.certificate[0] == record.label
        and record.certificate[1] >= eps
    )


def _certified(records, eps):
    return sum(_holds(r, eps) for r in records)


def _impossible(record):
    if record.certificate is None:
        return False
    label, radius = record.certificate
    return record.clean not in (None, label) or (
        record.attacked not in (None, label) and record.size < radius
    )


def _contradictions(records):
    return [i for i, r in enumerate(records) if _impossible(r)]


def _right(records, eps):
    return _clean(records), _empirical(records), _certified(records, eps), _contradictions(records)


@mutant("sandwich", empirical="CLEAN_ERRORS_COUNTED")
def right_after_the_attack(records, eps):
    survivors = sum(r.attacked == r.label for r in records)
    return _clean(records), survivors, *_right(records, eps)[2:]


@mutant("sandwich", empirical="ABSTENTION_COUNTED")
def not_fooled_is_robust(records, eps):
    kept = sum(r.clean == r.label and r.attacked in (r.label, None) for r in records)
    return _clean(records), kept, *_right(records, eps)[2:]


@mutant("sandwich", empirical="WRONG_COUNT")
def unchanged_is_robust(records, eps):
    kept = sum(r.clean == r.attacked for r in records)
    return _clean(records), kept, *_right(records, eps)[2:]


@mutant("sandwich", empirical="WRONG_COUNT")
def abstention_is_right_untouched(records, eps):
    return sum(r.clean in (r.label, None) for r in records), *_right(records, eps)[1:]


@mutant("sandwich", certified="CLEAN_ERRORS_COUNTED")
def certified_for_any_class(records, eps):
    count = sum(r.certificate is not None and r.certificate[1] >= eps for r in records)
    return _clean(records), _empirical(records), count, _contradictions(records)


@mutant("sandwich", certified="TIES_DROPPED")
def certified_beyond_eps(records, eps):
    count = sum(_holds(r, eps) and r.certificate[1] > eps for r in records)
    return _clean(records), _empirical(records), count, _contradictions(records)


@mutant("sandwich", certified="RADIUS_IGNORED")
def certified_at_any_radius(records, eps):
    return _clean(records), _empirical(records), _certified(records, 0), _contradictions(records)


@mutant("sandwich", certified="WRONG_COUNT")
def certified_where_nothing_broke(records, eps):
    count = sum(_holds(r, eps) and r.attacked == r.label for r in records)
    return _clean(records), _empirical(records), count, _contradictions(records)


@mutant("sandwich", contradictions="CONTRADICTION_MISSED")
def only_certificates_that_reach_eps(records, eps):
    flagged = [i for i in _contradictions(records) if records[i].certificate[1] >= eps]
    return *_right(records, eps)[:3], flagged


@mutant("sandwich", contradictions="CONTRADICTION_MISSED")
def only_certificates_of_the_true_class(records, eps):
    flagged = [i for i in _contradictions(records) if records[i].certificate[0] == records[i].label]
    return *_right(records, eps)[:3], flagged


@mutant("sandwich", contradictions="CONTRADICTION_MISSED")
def clean_answers_not_looked_at(records, eps):
    flagged = [i for i in _contradictions(records) if records[i].attacked != records[i].certificate[0]]
    return *_right(records, eps)[:3], flagged


@mutant("sandwich", contradictions="FALSE_CONTRADICTION")
def broken_at_just_the_radius(records, eps):
    *counts, flagged = _right(records, eps)
    at_the_edge = [
        i
        for i, r in enumerate(records)
        if r.certificate is not None
        and r.attacked not in (None, r.certificate[0])
        and r.size == r.certificate[1]
    ]
    return *counts, flagged + at_the_edge


@mutant("sandwich", contradictions="FALSE_CONTRADICTION")
def every_broken_certificate(records, eps):
    flagged = [
        i
        for i, r in enumerate(records)
        if r.certificate is not None and (_impossible(r) or r.attacked not in (None, r.certificate[0]))
    ]
    return *_right(records, eps)[:3], flagged


@mutant("sandwich", contradictions="FALSE_CONTRADICTION")
def abstentions_contradict(records, eps):
    flagged = [
        i
        for i, r in enumerate(records)
        if r.certificate is not None
        and (_impossible(r) or (r.attacked is None and r.size < r.certificate[1]))
    ]
    return *_right(records, eps)[:3], flagged


@mutant("sandwich", contradictions="CONTRADICTION_MISSED")
def certified_and_not_robust(records, eps):
    """The totals' own view: certified at eps for the true class, and not among the robust."""
    flagged = [
        i
        for i, r in enumerate(records)
        if _holds(r, eps)
        and None not in (r.clean, r.attacked)
        and (r.clean, r.attacked) != (r.label, r.label)
    ]
    return *_right(records, eps)[:3], flagged


@mutant("sandwich", contradictions="CONTRADICTION_MISSED")
def nothing_contradicts(records, eps):
    return *_right(records, eps)[:3], []


@mutant("sandwich", everywhere="SHARES_NOT_COUNTS")
def shares_of_the_images(records, eps):
    n = len(records)
    return (
        _clean(records) / n,
        _empirical(records) / n,
        _certified(records, eps) / n,
        _contradictions(records),
    )


# --- one ball inside another --------------------------------------------------------------------------


def _covers(claimed, needed, d):
    if (claimed.norm, needed.norm) == ("L2", "Linf"):
        return claimed.eps >= needed.eps * math.sqrt(d)
    return claimed.eps >= needed.eps


@mutant("covers", across_norms="FALSE_COVER")
def norms_ignored(claimed, needed, d):
    return claimed.eps >= needed.eps


@mutant("covers", across_norms="COVER_MISSED")
def another_norm_never_covers(claimed, needed, d):
    return claimed.norm == needed.norm and claimed.eps >= needed.eps


@mutant("covers", across_norms="FALSE_COVER")
def linf_stretched_by_the_root(claimed, needed, d):
    if (claimed.norm, needed.norm) == ("Linf", "L2"):
        return claimed.eps * math.sqrt(d) >= needed.eps
    return _covers(claimed, needed, d)


@mutant("covers", across_norms="FALSE_COVER")
def roles_of_the_norms_swapped(claimed, needed, d):
    if (claimed.norm, needed.norm) == ("Linf", "L2"):
        return claimed.eps >= needed.eps * math.sqrt(d)
    return claimed.eps >= needed.eps


@mutant("covers", across_norms="COVER_MISSED")
def divided_by_d(claimed, needed, d):
    if (claimed.norm, needed.norm) == ("L2", "Linf"):
        return claimed.eps >= needed.eps * d
    return _covers(claimed, needed, d)


@mutant("covers", across_norms="COVER_MISSED")
def root_both_ways(claimed, needed, d):
    scale = 1 if claimed.norm == needed.norm else math.sqrt(d)
    return claimed.eps >= needed.eps * scale


@mutant("covers", same_norm="COVER_MISSED", across_norms="COVER_MISSED")
def strictly_larger(claimed, needed, d):
    if (claimed.norm, needed.norm) == ("L2", "Linf"):
        return claimed.eps > needed.eps * math.sqrt(d)
    return claimed.eps > needed.eps


@mutant("covers", same_norm="FALSE_COVER", across_norms="COVER_MISSED")
def inside_for_around(claimed, needed, d):
    return _covers(needed, claimed, d)


@mutant("covers", same_norm="COVER_MISSED")
def same_ball_alone(claimed, needed, d):
    return claimed == needed if claimed.norm == needed.norm else _covers(claimed, needed, d)


@mutant("covers", across_norms="FALSE_COVER")
def dimension_of_the_lesson(claimed, needed, d):
    return _covers(claimed, needed, 28)


# --- cost ---------------------------------------------------------------------------------------------


def _cost(training, passes, per_pass, decisions):
    return training / decisions + passes * per_pass


def _break_even(a, b):
    if a[1] > b[1] or (a[1] == b[1] and a[0] > b[0]):
        return None
    return 0 if a[0] <= b[0] else math.ceil((a[0] - b[0]) / (b[1] - a[1]))


def _declare_costs():
    wrong_costs = {
        "training_for_free": ("TRAINING_IGNORED", lambda t, p, s, m: p * s),
        "training_with_every_decision": ("TRAINING_NOT_SHARED", lambda t, p, s, m: t + p * s),
        "cost_of_all_decisions": ("TOTAL_NOT_SHARE", lambda t, p, s, m: t + m * p * s),
        "one_pass_a_decision": ("WRONG_COST", lambda t, p, s, m: t / m + s),
        "running_shared_too": ("WRONG_COST", lambda t, p, s, m: (t + p * s) / m),
    }
    for name, (code, cost) in wrong_costs.items():
        declare("cost", name, (cost, _break_even), amortised=code)

    def rounded(step):
        def break_even(a, b):
            exact = _break_even(a, b)
            return exact if not exact else step((a[0] - b[0]) / (b[1] - a[1]))

        return break_even

    wrong_crossings = {
        "rounded_down": ({"crossing": "NOT_WHOLE"}, rounded(math.floor)),
        "not_rounded": ({"crossing": "NOT_WHOLE"}, rounded(float)),
        "one_too_many": ({"crossing": "NOT_WHOLE"}, rounded(lambda m: math.ceil(m) + 1)),
        "sides_swapped": (
            {"crossing": "WRONG_CROSSING", "edges": "EDGE_CASES"},
            lambda a, b: _break_even(b, a),
        ),
        "training_ratio": (
            {"crossing": "WRONG_CROSSING"},
            lambda a, b: _break_even(a, b) and math.ceil(a[0] / b[1]),
        ),
        "formula_alone": (
            {"edges": "EDGE_CASES"},
            lambda a, b: math.ceil((a[0] - b[0]) / (b[1] - a[1])),
        ),
        "never_is_zero": ({"edges": "EDGE_CASES"}, lambda a, b: _break_even(a, b) or 0),
        "never_is_infinite": (
            {"edges": "EDGE_CASES"},
            lambda a, b: math.inf if _break_even(a, b) is None else _break_even(a, b),
        ),
        "cheaper_at_first_is_cheaper": (
            {"edges": "EDGE_CASES"},
            lambda a, b: 0 if a[0] <= b[0] else _break_even(a, b),
        ),
        "negative_when_cheaper_all_along": (
            {"edges": "EDGE_CASES"},
            lambda a, b: None if a[1] >= b[1] else math.ceil((a[0] - b[0]) / (b[1] - a[1])),
        ),
    }
    for name, (costs, break_even) in wrong_crossings.items():
        declare("cost", name, (_cost, break_even), **costs)


_declare_costs()


# --- paired comparison --------------------------------------------------------------------------------


def _difference(a, b):
    return (a.double().mean() - b.double().mean()).item()


def _interval(a, b, z=1.96):
    step = a.double() - b.double()
    half = z * step.std(correction=0).item() / math.sqrt(len(a))
    return _difference(a, b) - half, _difference(a, b) + half


def _p(a, b, alternative="two-sided"):
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return 1.0
    return stats.binomtest(only_a, only_a + only_b, alternative=alternative).pvalue


@mutant("paired", interval="UNPAIRED_INTERVAL")
def two_samples(a, b):
    p, q, n = a.double().mean().item(), b.double().mean().item(), len(a)
    half = 1.96 * math.sqrt((p * (1 - p) + q * (1 - q)) / n)
    return p - q, p - q - half, p - q + half, _p(a, b)


@mutant("paired", interval="WRONG_INTERVAL")
def ninety_percent(a, b):
    return _difference(a, b), *_interval(a, b, 1.645), _p(a, b)


@mutant("paired", interval="WRONG_INTERVAL")
def spread_of_the_images(a, b):
    return _difference(a, b), *_interval(a, b, 1.96 * math.sqrt(len(a))), _p(a, b)


@mutant("paired", interval="WRONG_INTERVAL")
def one_standard_error(a, b):
    return _difference(a, b), *_interval(a, b, 1.0), _p(a, b)


@mutant("paired", interval="WRONG_INTERVAL")
def ends_of_the_two_intervals(a, b):
    """The lowest of one less the highest of the other."""
    halves = [
        1.96 * math.sqrt(p * (1 - p) / len(a)) for p in (a.double().mean().item(), b.double().mean().item())
    ]
    difference = _difference(a, b)
    return difference, difference - sum(halves), difference + sum(halves), _p(a, b)


@mutant("paired", interval="WRONG_INTERVAL")
def variance_about_zero(a, b):
    difference, half = _difference(a, b), 1.96 * math.sqrt(int((a != b).sum())) / len(a)
    return difference, difference - half, difference + half, _p(a, b)


@mutant("paired", interval="WRONG_INTERVAL")
def interval_around_zero(a, b):
    low, high = _interval(a, b)
    return _difference(a, b), low - _difference(a, b), high - _difference(a, b), _p(a, b)


@mutant("paired", difference="SIGN_REVERSED", interval="WRONG_INTERVAL")
def b_less_a(a, b):
    return -_difference(a, b), *_interval(b, a), _p(a, b)


@mutant("paired", difference="WRONG_DIFFERENCE")
def ratio_of_the_accuracies(a, b):
    return a.double().mean() / b.double().mean() - 1 + 1e-3, *_interval(a, b), _p(a, b)


@mutant("paired", difference="WRONG_DIFFERENCE")
def count_for_share(a, b):
    return int(a.sum() - b.sum()), *_interval(a, b), _p(a, b)


@mutant("paired", p_value="ONE_SIDED_TEST")
def a_is_better(a, b):
    return _difference(a, b), *_interval(a, b), _p(a, b, "greater")


@mutant("paired", p_value="WRONG_P")
def chi_squared_of_mcnemar(a, b):
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = stats.chi2.sf((only_a - only_b) ** 2 / max(only_a + only_b, 1), 1)
    return _difference(a, b), *_interval(a, b), p


@mutant("paired", p_value="WRONG_P")
def test_of_two_samples(a, b):
    table = [[int(side.sum()), int((~side).sum())] for side in (a, b)]
    return _difference(a, b), *_interval(a, b), stats.fisher_exact(table).pvalue


@mutant("paired", p_value="WRONG_P")
def agreements_counted_too(a, b):
    p = stats.binomtest(int((a & ~b).sum()), len(a)).pvalue
    return _difference(a, b), *_interval(a, b), p


@mutant("paired", p_value="EDGE_CASES")
def no_difference_forgotten(a, b):
    p = float("nan") if (a == b).all() else _p(a, b)
    return _difference(a, b), *_interval(a, b), p


@mutant("paired", everywhere="WRONG_SHAPE")
def interval_alone(a, b):
    return _interval(a, b)


# --- requirements -------------------------------------------------------------------------------------


def _reaches(claim, need, d):
    return _covers(claim.ball, need.ball, d)


def _meets(
    need, offer, d, *, low=lambda share: share.low, kinds=("certified",), reaches=_reaches, late=False
):
    proofs = kinds if need.guarantee else ("certified", "empirical")
    return (
        low(offer.clean) >= need.clean
        and (late or offer.seconds <= need.seconds)
        and any(
            claim.kind in proofs and reaches(claim, need, d) and low(claim.share) >= need.robust
            for claim in offer.claims
        )
    )


@mutant("admissible", floors="WRONGLY_ADMITTED")
def estimates_for_bounds(need, offers, d):
    return [o.name for o in offers if _meets(need, o, d, low=lambda share: share.share)]


@mutant("admissible", floors="WRONGLY_ADMITTED")
def upper_bounds(need, offers, d):
    return [o.name for o in offers if _meets(need, o, d, low=lambda share: share.high)]


@mutant("admissible", floors="WRONGLY_REFUSED")
def more_than_the_floor(need, offers, d):
    above = [o for o in offers if o.clean.low > need.clean]
    return [o.name for o in above if _meets(need, o, d)]


@mutant("admissible", floors="WRONGLY_ADMITTED")
def clean_accuracy_ignored(need, offers, d):
    return [o.name for o in offers if _meets(need._replace(clean=0.0), o, d)]


@mutant("admissible", floors="WRONGLY_ADMITTED", guarantee="WRONGLY_ADMITTED")
def robust_floor_ignored(need, offers, d):
    return [o.name for o in offers if _meets(need._replace(robust=0.0), o, d)]


@mutant("admissible", floors="WRONGLY_ADMITTED", guarantee="WRONGLY_ADMITTED")
def eps_ignored(need, offers, d):
    return [o.name for o in offers if _meets(need, o, d, reaches=lambda claim, need, d: True)]


@mutant("admissible", floors="WRONGLY_REFUSED", guarantee="WRONGLY_REFUSED")
def claims_at_this_eps_alone(need, offers, d):
    return [
        o.name for o in offers if _meets(need, o, d, reaches=lambda claim, need, d: claim.ball == need.ball)
    ]


@mutant("admissible", floors="WRONGLY_REFUSED", guarantee="WRONGLY_REFUSED")
def every_claim_must_do(need, offers, d):
    def alone(offer):
        return [offer._replace(claims=(claim,)) for claim in offer.claims]

    return [o.name for o in offers if all(_meets(need, part, d) for part in alone(o))]


@mutant("admissible", guarantee="WRONGLY_ADMITTED")
def attacks_for_proofs(need, offers, d):
    return [o.name for o in offers if _meets(need, o, d, kinds=("certified", "empirical"))]


@mutant("admissible", guarantee="WRONGLY_REFUSED")
def proof_asked_of_everyone(need, offers, d):
    return [o.name for o in offers if _meets(need._replace(guarantee=True), o, d)]


@mutant("admissible", floors="WRONGLY_REFUSED", latency="WRONGLY_REFUSED")
def attacks_alone_are_evidence(need, offers, d):
    """Where no proof is needed, a proof counts for nothing."""
    kinds = ("certified",) if need.guarantee else ("empirical",)
    kept = [o._replace(claims=tuple(c for c in o.claims if c.kind in kinds)) for o in offers]
    return [o.name for o in kept if _meets(need, o, d)]


@mutant("admissible", latency="WRONGLY_ADMITTED")
def slow_ones_too(need, offers, d):
    return [o.name for o in offers if _meets(need, o, d, late=True)]


@mutant("admissible", latency="WRONGLY_REFUSED")
def faster_than_allowed(need, offers, d):
    return [o.name for o in offers if _meets(need, o, d) and o.seconds < need.seconds]


@mutant("admissible", everywhere="NOTHING_ADMITTED")
def nobody_is_good_enough(need, offers, d):
    return []


@mutant("admissible", everywhere="RAISED")
def names_of_its_own(need, offers, d):
    return ["smoothing"]


# --- routes -------------------------------------------------------------------------------------------


def _route(certificate, empirical, eps):
    if certificate is None:
        return None, "review"
    label, radius = certificate
    if radius >= eps:
        return label, "certified"
    return (label, "checked") if label == empirical else (None, "review")


def _guaranteed(certificates, y, eps):
    pairs = zip(certificates, y.tolist(), strict=True)
    return sum(c is not None and c[0] == label and c[1] >= 2 * eps for c, label in pairs)


def _counting(hit):
    def guaranteed(certificates, y, eps):
        return sum(
            c is not None and hit(c, label, eps) for c, label in zip(certificates, y.tolist(), strict=True)
        )

    return guaranteed


def _declare_routes():
    def put_to_the_vote(certificate, empirical, eps):
        answer, lane = _route(certificate, empirical, eps)
        return (None, "review") if lane == "certified" and answer != empirical else (answer, lane)

    def empirical_first(certificate, empirical, eps):
        answer, lane = _route(certificate, empirical, eps)
        return (empirical, lane) if lane == "certified" else (answer, lane)

    def strictly_beyond(certificate, empirical, eps):
        answer, lane = _route(certificate, empirical, eps)
        at = certificate is not None and certificate[1] == eps
        return (certificate[0], "checked") if at else (answer, lane)

    def any_certificate(certificate, empirical, eps):
        return _route(certificate, empirical, 0.0)

    def never_certified(certificate, empirical, eps):
        return _route(certificate, empirical, math.inf)

    def class_zero_is_false(certificate, empirical, eps):
        answer, lane = _route(certificate, empirical, eps)
        return (answer, lane) if answer else (None, "review")

    def empirical_elsewhere(certificate, empirical, eps):
        answer, lane = _route(certificate, empirical, eps)
        return (answer, lane) if lane == "certified" else (empirical, "checked")

    def everything_else_to_people(certificate, empirical, eps):
        answer, lane = _route(certificate, empirical, eps)
        return (answer, lane) if lane == "certified" else (None, "review")

    def two_abstentions_agree(certificate, empirical, eps):
        if certificate is None and empirical is None:
            return None, "checked"
        return _route(certificate, empirical, eps)

    def answer_for_the_reviewer(certificate, empirical, eps):
        answer, lane = _route(certificate, empirical, eps)
        return (empirical, lane) if lane == "review" else (answer, lane)

    def lanes_of_its_own(certificate, empirical, eps):
        answer, lane = _route(certificate, empirical, eps)
        return answer, {"certified": "proof", "checked": "agree", "review": "human"}[lane]

    for route, costs in (
        (put_to_the_vote, {"certified": "WRONG_LANE"}),
        (empirical_first, {"certified": "WRONG_ANSWER"}),
        (strictly_beyond, {"certified": "WRONG_LANE"}),
        (any_certificate, {"unproved": "WRONG_LANE"}),
        (never_certified, {"certified": "WRONG_LANE"}),
        (class_zero_is_false, {"certified": "WRONG_LANE", "unproved": "WRONG_LANE"}),
        (empirical_elsewhere, {"unproved": "WRONG_LANE"}),
        (everything_else_to_people, {"unproved": "WRONG_LANE"}),
        (two_abstentions_agree, {"unproved": "WRONG_LANE"}),
        (answer_for_the_reviewer, {"unproved": "WRONG_ANSWER"}),
        (lanes_of_its_own, {"certified": "WRONG_LANE", "unproved": "WRONG_LANE"}),
    ):
        declare("route", route.__name__, (route, _guaranteed), **costs)

    for name, code, hit in (
        ("certified_at_eps", "DOWNGRADE_MISSED", lambda c, y, eps: c[0] == y and c[1] >= eps),
        ("certified_for_any_class_twice", "CLEAN_ERRORS_COUNTED", lambda c, y, eps: c[1] >= 2 * eps),
        ("more_than_twice", "TIES_DROPPED", lambda c, y, eps: c[0] == y and c[1] > 2 * eps),
        ("every_right_class", "WRONG_COUNT", lambda c, y, eps: c[0] == y),
        ("three_times", "WRONG_COUNT", lambda c, y, eps: c[0] == y and c[1] >= 3 * eps),
    ):
        declare("route", name, (_route, _counting(hit)), guarantee=code)

    def share_guaranteed(certificates, y, eps):
        return np.float64(_guaranteed(certificates, y, eps) / len(y))

    declare("route", "share_guaranteed", (_route, share_guaranteed), guarantee="WRONG_COUNT")


_declare_routes()
