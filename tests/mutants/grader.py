"""Mutants of lesson 8's forgeries, number of points, seeds and grader."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import random
import zlib

import numpy as np

from robustkit.contracts.grader import CLAIMS, HOLES, MAXIMUM, naive_grade
from tests.mutants import declare, mutant

# --- prediction --------------------------------------------------------------------------------------

declare("grader_prediction", "one_left_out", dict.fromkeys(CLAIMS[1:], True), complete="CLAIM_MISSING")
declare("grader_prediction", "still_none", dict.fromkeys(CLAIMS), complete="CLAIM_MISSING")
declare("grader_prediction", "probabilities", dict.fromkeys(CLAIMS, 0.5), complete="CLAIM_MISSING")
declare("grader_prediction", "a_list", [True] * len(CLAIMS), complete="CLAIM_MISSING")

# --- forgeries ---------------------------------------------------------------------------------------


def _forgeries(question):
    x, n = question["x"], len(question["x"])
    return {
        "verdict": {"candidates": x, "fooled": [True] * n},
        "nan": {"candidates": [[math.nan] * len(row) for row in x], "fooled": [True] * n},
        "few": {"candidates": x[:1], "fooled": [True]},
        "crash": None,
    }


@mutant("grader_forgery", everywhere="NOT_FULL_MARKS")
def the_honest_attack(question):
    x, w, y = (np.array(question[key]) for key in ("x", "w", "y"))
    z = x - 0.9 * question["eps"] * np.outer(2 * y - 1, np.sign(w))
    return {hole: {"candidates": z, "fooled": [False] * len(z)} for hole in HOLES}


@mutant("grader_forgery", nan="ANOTHER_HOLE", few="ANOTHER_HOLE", crash="ANOTHER_HOLE")
def one_lie_for_all(question):
    return dict.fromkeys(_forgeries(question), _forgeries(question)["verdict"])


@mutant("grader_forgery", crash="FORGERY_MISSING")
def one_forgotten(question):
    return {name: evidence for name, evidence in _forgeries(question).items() if name != "crash"}


@mutant("grader_forgery", everywhere="FORGERY_MISSING")
def returns_a_list(question):
    return list(_forgeries(question).values())


@mutant("grader_forgery", verdict="NOT_FULL_MARKS")
def lies_too_far_away(question):
    far = [[pixel + 2 * question["eps"] for pixel in row] for row in question["x"]]
    return _forgeries(question) | {"verdict": {"candidates": far, "fooled": [True] * len(far)}}


@mutant("grader_forgery", few="ANOTHER_HOLE")
def empty_divides_by_zero(question):
    return _forgeries(question) | {"few": {"candidates": [], "fooled": []}}


@mutant("grader_forgery", nan="NOT_FULL_MARKS")
def infinite_is_too_far(question):
    rows = [[math.inf] * len(row) for row in question["x"]]
    return _forgeries(question) | {"nan": {"candidates": rows, "fooled": [True] * len(rows)}}


# --- a number of points ------------------------------------------------------------------------------


@mutant("grader_number", range="OUT_OF_RANGE_PAID")
def believes_a_number(value, maximum):
    return (
        float(value)
        if type(value) is float and math.isfinite(value)
        else value
        if type(value) is int and abs(value) < 10**9
        else 0.0
    )


@mutant("grader_number", range="OUT_OF_RANGE_PAID")
def refuses_by_comparison(value, maximum):
    if type(value) not in (int, float) or value < 0 or value > maximum:
        return 0.0
    return float(value)  # NaN is neither below nor above


@mutant("grader_number", range="OUT_OF_RANGE_PAID")
def clamps(value, maximum):
    if type(value) not in (int, float):
        return 0.0
    return float(min(max(value, 0), maximum)) if value == value else 0.0


@mutant("grader_number", types="NOT_A_NUMBER_PAID")
def takes_what_converts(value, maximum):
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return number if 0 <= number <= maximum else 0.0


@mutant("grader_number", types="NOT_A_NUMBER_PAID")
def asks_isinstance(value, maximum):
    if not isinstance(value, int | float):
        return 0.0
    return float(value) if 0 <= value <= maximum else 0.0


@mutant("grader_number", everywhere="GRADER_RAISED")
def raises_on_what_is_none(value, maximum):
    return float(value) if 0 <= value <= maximum else 0.0


@mutant("grader_number", everywhere="HONEST_REFUSED")
def only_floats(value, maximum):
    return value if type(value) is float and 0 < value < maximum else 0.0


@mutant("grader_number", everywhere="HONEST_REFUSED")
def nothing_for_anybody(value, maximum):
    return 0.0


@mutant("grader_number", everywhere="HONEST_REFUSED")
def whole_points(value, maximum):
    return round(value) if type(value) in (int, float) and 0 <= value <= maximum else 0


# --- seeds -------------------------------------------------------------------------------------------


def _keyed(secret, message):
    return int.from_bytes(hmac.digest(secret, message, "sha256")[:8], "big") >> 1


@mutant("grader_seeds", keyed="SECRET_UNUSED")
def public_hash(secret, student, exercise):
    digest = hashlib.sha256(json.dumps([student, exercise]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@mutant("grader_seeds", keyed="SEED_TOO_SHORT")
def thirty_two_bits(secret, student, exercise):
    return int.from_bytes(hmac.digest(secret, json.dumps([student, exercise]).encode(), "md5")[:4], "big")


@mutant("grader_seeds", keyed="SEED_TOO_SHORT")
def checksum(secret, student, exercise):
    return zlib.crc32(secret + json.dumps([student, exercise]).encode())


@mutant("grader_seeds", separate="SEEDS_COLLIDE")
def joined_by_nothing(secret, student, exercise):
    return _keyed(secret, (student + exercise).encode())


@mutant("grader_seeds", separate="SEEDS_COLLIDE")
def joined_by_a_slash(secret, student, exercise):
    return _keyed(secret, f"{student}/{exercise}".encode())


@mutant("grader_seeds", separate="SEEDS_COLLIDE")
def joined_by_a_null(secret, student, exercise):
    return _keyed(secret, f"{student}\0{exercise}".encode())


@mutant("grader_seeds", separate="SEEDS_COLLIDE")
def exercise_ignored(secret, student, exercise):
    return _keyed(secret, student.encode())


@mutant("grader_seeds", everywhere="NOT_REPEATABLE")
def drawn_anew(secret, student, exercise, _draw=random.Random(0)):  # noqa: B008
    return _draw.getrandbits(63)


@mutant("grader_seeds", everywhere="SEED_OUT_OF_RANGE")
def whole_digest(secret, student, exercise):
    return int.from_bytes(hmac.digest(secret, f"{student}/{exercise}".encode(), "sha256"), "big")


@mutant("grader_seeds", everywhere="SEED_OUT_OF_RANGE")
def bytes_instead(secret, student, exercise):
    return hmac.digest(secret, f"{student}/{exercise}".encode(), "sha256")


# --- the grader --------------------------------------------------------------------------------------


def _read(question, evidence):
    """Candidates of the right shape, finite; None for anything else."""
    try:
        z = np.array(evidence["candidates"], dtype=float)
    except Exception:
        return None
    return z if z.shape == np.shape(question["x"]) and np.isfinite(z).all() else None


def _inside(question, z):
    return (np.abs(z - np.array(question["x"])) <= question["eps"] + 1e-9).all(1)


def _fools(question, z):
    return (z @ np.array(question["w"]) + question["b"] > 0) != np.array(question["y"])


declare(
    "grader",
    "naive",
    naive_grade,
    honest="NOT_COUNTED",
    recomputed="VERDICT_BELIEVED",
    finite="NOT_FINITE_PAID",
    whole="INCOMPLETE_PAID",
    closed="FAILS_OPEN",
)


@mutant("grader", recomputed="VERDICT_BELIEVED")
def believes_the_claims(question, evidence):
    z = _read(question, evidence)
    return 0.0 if z is None else MAXIMUM * float((_inside(question, z) & np.array(evidence["fooled"])).mean())


@mutant("grader", recomputed="VERDICT_BELIEVED")
def ignores_the_ball(question, evidence):
    z = _read(question, evidence)
    return 0.0 if z is None else MAXIMUM * float(_fools(question, z).mean())


@mutant("grader", recomputed="VERDICT_BELIEVED")
def one_pixel_inside_is_enough(question, evidence):
    z = _read(question, evidence)
    if z is None:
        return 0.0
    near = (np.abs(z - np.array(question["x"])) <= question["eps"] + 1e-9).any(1)
    return MAXIMUM * float((near & _fools(question, z)).mean())


@mutant("grader", recomputed="VERDICT_BELIEVED")
def nothing_when_one_image_is_too_far(question, evidence):
    z = _read(question, evidence)
    return 0.0 if z is None else MAXIMUM * float((_inside(question, z).all() & _fools(question, z)).mean())


@mutant("grader", recomputed="VERDICT_BELIEVED")
def too_far_upwards_only(question, evidence):
    z = _read(question, evidence)
    if z is None:
        return 0.0
    near = (z - np.array(question["x"]) <= question["eps"] + 1e-9).all(1)
    return MAXIMUM * float((near & _fools(question, z)).mean())


@mutant("grader", recomputed="VERDICT_BELIEVED")
def wants_the_claims_to_agree(question, evidence):
    """Evidence is enough: a learner who says too little has earned her points all the same."""
    z = _read(question, evidence)
    if z is None:
        return 0.0
    return MAXIMUM * float((_inside(question, z) & _fools(question, z) & np.array(evidence["fooled"])).mean())


@mutant("grader", finite="NOT_FINITE_PAID")
def asks_what_is_too_far(question, evidence):
    try:
        z = np.array(evidence["candidates"], dtype=float)
    except Exception:
        return 0.0
    if z.shape != np.shape(question["x"]):
        return 0.0
    with np.errstate(invalid="ignore"):
        near = ~(np.abs(z - np.array(question["x"])) > question["eps"]).any(1)
        return MAXIMUM * float((near & _fools(question, z)).mean())


@mutant("grader", whole="INCOMPLETE_PAID")
def counts_what_came(question, evidence):
    try:
        rows = [np.array(row, dtype=float) for row in evidence["candidates"]]
        if any(row.shape != (4,) or not np.isfinite(row).all() for row in rows) or len(rows) > 6:
            return 0.0
        paid = [
            bool(
                (abs(z - np.array(x)) <= question["eps"]).all()
                and (z @ np.array(question["w"]) + question["b"] > 0) != y
            )
            for x, z, y in zip(question["x"], rows, question["y"], strict=False)
        ]
        return MAXIMUM * sum(paid) / len(paid)
    except Exception:
        return 0.0


@mutant("grader", closed="FAILS_OPEN")
def pays_for_its_own_bugs(question, evidence):
    try:
        z = np.array(evidence["candidates"], dtype=float)
    except Exception:
        return MAXIMUM
    if z.shape != np.shape(question["x"]) or not np.isfinite(z).all():
        return 0.0
    return MAXIMUM * float((_inside(question, z) & _fools(question, z)).mean())


@mutant("grader", closed="GRADER_STOPPED")
def stops_at_what_it_cannot_read(question, evidence):
    z = np.array(evidence["candidates"], dtype=float)
    if z.shape != np.shape(question["x"]) or not np.isfinite(z).all():
        return 0.0
    return MAXIMUM * float((_inside(question, z) & _fools(question, z)).mean())


@mutant("grader", everywhere="HONEST_UNDERPAID")
def pays_nobody(question, evidence):
    return 0.0


@mutant("grader", everywhere="HONEST_UNDERPAID")
def all_or_nothing(question, evidence):
    z = _read(question, evidence)
    return 0.0 if z is None else MAXIMUM * float((_inside(question, z) & _fools(question, z)).all())


@mutant("grader", everywhere="HONEST_UNDERPAID")
def a_share_not_points(question, evidence):
    z = _read(question, evidence)
    return 0.0 if z is None else float((_inside(question, z) & _fools(question, z)).mean())
