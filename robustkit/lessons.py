"""The lessons' exercises, and the check that a learner runs: points and hints at once.

The tables are public: what is asked, what it is worth, how long it takes. They hold no answers. The
grader uses the same tables with cases of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from robustkit.contracts import CONTRACTS, Arrays, Finding, examine, observe_safely
from robustkit.errors import RobustkitError

VISIBLE_SEED = 0  # the seed of the cases that check cells use; the grader draws its own


@dataclass(frozen=True)
class Exercise:
    """One autograded exercise. `names` are what the learner defines; `points` go by criterion.

    `id` is the grade_id of its check cell; the solution cell has the same without "_check".
    """

    id: str
    title: str
    contract: str
    names: tuple[str, ...]
    points: Mapping[str, float]
    difficulty: int  # 1 to 3
    minutes: int

    @property
    def total(self) -> float:
        return sum(self.points.values())


@dataclass(frozen=True)
class WrittenAnswer:
    """One hand-marked answer: marked in formgrader against the rubric in its cell."""

    id: str
    title: str
    points: float
    minutes: int


@dataclass(frozen=True)
class Lesson:
    """A lesson folder, its exercises in order, and its minutes of reading and running beside them."""

    id: str
    title: str
    exercises: tuple[Exercise, ...]
    written: tuple[WrittenAnswer, ...]

    @property
    def autograded(self) -> float:
        return sum(exercise.total for exercise in self.exercises)

    def exercise(self, exercise_id: str) -> Exercise:
        for exercise in self.exercises:
            if exercise.id == exercise_id:
                return exercise
        known = ", ".join(exercise.id for exercise in self.exercises)
        raise RobustkitError(f"{self.id} has no exercise {exercise_id!r}; it has {known}.")


LESSONS: dict[str, Lesson] = {
    lesson.id: lesson
    for lesson in (
        Lesson(
            "00-start-here",
            "Start here: adversarial examples, threat models, and how this kit checks you",
            (
                Exercise(
                    "s0_distance_check", "Distances", "distance", ("distance",), {"Linf": 1, "L2": 1}, 1, 5
                ),
                Exercise(
                    "s0_project_check",
                    "Projection",
                    "projection",
                    ("project",),
                    {"ball": 1, "box": 1, "inside": 1},
                    1,
                    8,
                ),
                Exercise(
                    "s0_robust_accuracy_check",
                    "Robust accuracy",
                    "robust_accuracy",
                    ("robust_accuracy",),
                    {"worst_case": 1, "clean_errors": 1},
                    2,
                    8,
                ),
            ),
            (),
        ),
        Lesson(
            "01-mnist-fgsm",
            "Scenario 1: a CNN for MNIST that withstands FGSM, and what that is worth",
            (
                Exercise(
                    "s1_predict_check", "Predict", "prediction", ("prediction",), {"plausible": 1}, 1, 3
                ),
                Exercise(
                    "s1_fgsm_check",
                    "FGSM",
                    "fgsm",
                    ("fgsm",),
                    {"ball": 1, "box": 1, "closed_form": 2, "hygiene": 1},
                    2,
                    20,
                ),
                Exercise(
                    "s1_interval_check",
                    "Wilson interval",
                    "interval",
                    ("wilson",),
                    {"value": 1, "edges": 1},
                    1,
                    8,
                ),
                Exercise(
                    "s1_measure_check",
                    "Measure FGSM",
                    "fgsm_report",
                    ("clean_model", "fgsm_report"),
                    {"counts": 2, "clean": 1},
                    1,
                    10,
                ),
                Exercise(
                    "s1_loss_check",
                    "FGSM adversarial training",
                    "adversarial_loss",
                    ("fgsm_loss",),
                    {"loss": 2, "gradient": 1, "modes": 1},
                    2,
                    15,
                ),
                Exercise(
                    "s1_pgd_check",
                    "PGD",
                    "pgd",
                    ("pgd",),
                    {"ball": 1, "box": 1, "closed_form": 1, "start": 1, "steps": 1, "hygiene": 1},
                    3,
                    25,
                ),
                Exercise(
                    "s1_alarms_check",
                    "Alarms",
                    "alarms",
                    ("alarms",),
                    {"leaking": 1, "masked": 1, "quiet": 1},
                    2,
                    10,
                ),
                Exercise(
                    "s1_rs_fgsm_check",
                    "Random-start FGSM",
                    "rs_fgsm",
                    ("rs_fgsm",),
                    {"ball": 1, "box": 1, "start": 1, "step": 1, "hygiene": 1},
                    2,
                    15,
                ),
                Exercise(
                    "s1_robust_model_check",
                    "A robust model",
                    "robust_model",
                    ("robust_model",),
                    {"clean": 1, "pgd_half": 2, "pgd_full": 3},
                    2,
                    15,
                ),
                Exercise(
                    "s1_curve_check",
                    "Robustness curve",
                    "curve",
                    ("robust_curve",),
                    {"counts": 2, "clean": 1},
                    2,
                    12,
                ),
                Exercise(
                    "s1_statement_check",
                    "Threat-model statement",
                    "statement",
                    ("statement",),
                    {"complete": 1, "consistent": 1},
                    1,
                    8,
                ),
            ),
            (WrittenAnswer("s1_judgement", "Judgement", 10, 25),),
        ),
        Lesson(
            "02-attacks-and-evaluation",
            "Attacks and evaluation: how strong is the attack, and is this robustness real?",
            (
                Exercise(
                    "s2_project_check",
                    "Projection in two norms",
                    "ball_projection",
                    ("project",),
                    {"linf": 1, "l2": 1, "box": 1, "inside": 1},
                    1,
                    10,
                ),
                Exercise(
                    "s2_start_check",
                    "Random start",
                    "random_start",
                    ("random_start",),
                    {"linf": 1, "l2": 1, "box": 1, "hygiene": 1},
                    2,
                    15,
                ),
                Exercise(
                    "s2_margin_check",
                    "Another loss",
                    "margin",
                    ("margin",),
                    {"value": 1, "gradient": 1},
                    1,
                    8,
                ),
                Exercise(
                    "s2_pgd_check",
                    "PGD in two norms",
                    "pgd_lp",
                    ("pgd",),
                    {
                        "ball": 1,
                        "box": 1,
                        "closed_form": 1,
                        "l2": 2,
                        "start": 1,
                        "steps": 1,
                        "restarts": 2,
                        "loss": 1,
                        "hygiene": 1,
                    },
                    3,
                    30,
                ),
                Exercise(
                    "s2_survives_check",
                    "Worst case, image by image",
                    "worst_case",
                    ("survives",),
                    {"worst_case": 2, "clean_errors": 1, "valid": 2},
                    2,
                    15,
                ),
                Exercise(
                    "s2_diagnose_check",
                    "Diagnosis",
                    "diagnosis",
                    ("diagnose",),
                    {"honest": 1, "saturated": 1, "shattered": 1, "random": 1},
                    3,
                    25,
                ),
                Exercise(
                    "s2_eot_check",
                    "Expectation over transformation",
                    "eot",
                    ("eot",),
                    {"mean": 1, "fresh": 1, "gradient": 1},
                    2,
                    10,
                ),
                Exercise(
                    "s2_bpda_check",
                    "Around the part that has no gradient",
                    "bpda",
                    ("bpda",),
                    {"value": 1, "gradient": 2},
                    2,
                    12,
                ),
                Exercise(
                    "s2_break_check",
                    "Break them",
                    "suspects",
                    ("broken",),
                    {"A": 2, "B": 3, "C": 2},
                    3,
                    20,
                ),
                Exercise(
                    "s2_standing_check",
                    "A place on the leaderboard",
                    "standing",
                    ("standing",),
                    {"comparable": 1, "rank": 1, "interval": 1},
                    2,
                    12,
                ),
            ),
            (
                WrittenAnswer("s2_fall", "Why entries fell", 6, 15),
                WrittenAnswer("s2_judgement", "Judgement", 10, 25),
            ),
        ),
        Lesson(
            "03-cifar-pgd",
            "Scenario 2: a CIFAR-10 ResNet above 70 % under strong PGD, honestly",
            (
                Exercise(
                    "s3_verdict_check",
                    "Seventy percent of what?",
                    "verdict",
                    ("verdict",),
                    {"yes": 1, "no": 1, "open": 1, "other": 1},
                    2,
                    15,
                ),
                Exercise(
                    "s3_step_check",
                    "The training step",
                    "training_step",
                    ("training_step",),
                    {"attack": 1, "modes": 1, "update": 2, "loss": 1},
                    2,
                    20,
                ),
                Exercise(
                    "s3_trades_check",
                    "TRADES",
                    "trades",
                    ("trades_loss",),
                    {"natural": 1, "divergence": 2, "gradient": 1},
                    2,
                    15,
                ),
                Exercise(
                    "s3_faults_check",
                    "Faults of recipes",
                    "recipe_faults",
                    ("faults",),
                    {
                        **{"train_mode": 1, "units": 1, "outside": 1, "start": 1},
                        **{"leak": 1, "splits": 1, "statistics": 1, "quiet": 1},
                    },
                    3,
                    40,
                ),
                Exercise(
                    "s3_selection_check",
                    "Which epoch, and what to report",
                    "selection",
                    ("chosen",),
                    {"epoch": 1, "reported": 1, "overfitted": 1},
                    2,
                    12,
                ),
                Exercise(
                    "s3_weights_check",
                    "Weights that the judge attacks",
                    "cifar_weights",
                    ("submitted",),
                    {"clean": 1, "robust_half": 2, "robust_full": 3},
                    2,
                    30,
                ),
            ),
            (
                WrittenAnswer("s3_curves", "What the curves say", 8, 20),
                WrittenAnswer("s3_judgement", "Judgement", 10, 25),
            ),
        ),
        Lesson(
            "04-certified",
            "Certified robustness: what a certificate says, and what it does not",
            (
                Exercise(
                    "s4_votes_check",
                    "Votes",
                    "votes",
                    ("votes",),
                    {"total": 1, "noise": 2, "hygiene": 1},
                    2,
                    20,
                ),
                Exercise(
                    "s4_lower_bound_check",
                    "Lower bound",
                    "lower_bound",
                    ("lower_bound",),
                    {"value": 2, "edges": 1},
                    2,
                    12,
                ),
                Exercise(
                    "s4_certified_radius_check",
                    "Certified radius",
                    "certified_radius",
                    ("certified_radius",),
                    {"value": 1, "abstain": 1},
                    1,
                    8,
                ),
                Exercise(
                    "s4_certify_check",
                    "Certify",
                    "certify",
                    ("certify",),
                    {"selection": 2, "estimation": 2, "abstain": 1},
                    3,
                    20,
                ),
                Exercise(
                    "s4_certified_accuracy_check",
                    "Certified accuracy",
                    "certified_accuracy",
                    ("certified_accuracy",),
                    {"correct": 1, "abstentions": 1, "ties": 1},
                    1,
                    10,
                ),
                Exercise(
                    "s4_interval_linear_check",
                    "Interval of a layer",
                    "interval_linear",
                    ("interval_linear",),
                    {"sound": 2, "tight": 1},
                    2,
                    12,
                ),
                Exercise(
                    "s4_ibp_check",
                    "Interval bound propagation",
                    "ibp",
                    ("ibp_bounds",),
                    {"sound": 2, "tight": 1},
                    3,
                    20,
                ),
                Exercise(
                    "s4_log_check",
                    "Read a log",
                    "certification_log",
                    ("log_faults",),
                    {"bound": 1, "votes": 1, "abstained": 1, "verdict": 1, "repeated": 1, "quiet": 1},
                    3,
                    25,
                ),
            ),
            (
                WrittenAnswer("s4_explain", "Explain", 4, 10),
                WrittenAnswer("s4_judgement", "Judgement", 10, 25),
            ),
        ),
        Lesson(
            "05-empirical-or-certified",
            "Empirical or certified? Three defences on the same images, and three decisions",
            (
                Exercise(
                    "s5_covers_check",
                    "One ball in another",
                    "covers",
                    ("covers",),
                    {"same_norm": 1, "across_norms": 1},
                    2,
                    12,
                ),
                Exercise(
                    "s5_sandwich_check",
                    "The sandwich",
                    "sandwich",
                    ("sandwich",),
                    {"empirical": 1, "certified": 1, "contradictions": 2},
                    2,
                    20,
                ),
                Exercise(
                    "s5_paired_check",
                    "Paired comparison",
                    "paired",
                    ("paired",),
                    {"difference": 1, "interval": 1, "p_value": 1},
                    2,
                    15,
                ),
                Exercise(
                    "s5_cost_check",
                    "Cost of a decision",
                    "cost",
                    ("cost", "break_even"),
                    {"amortised": 1, "crossing": 1, "edges": 1},
                    1,
                    10,
                ),
                Exercise(
                    "s5_route_check",
                    "Both at once",
                    "route",
                    ("route", "guaranteed"),
                    {"certified": 1, "unproved": 1, "guarantee": 1},
                    3,
                    15,
                ),
                Exercise(
                    "s5_admissible_check",
                    "What meets the need",
                    "admissible",
                    ("admissible",),
                    {"floors": 1, "guarantee": 1, "latency": 1},
                    2,
                    12,
                ),
            ),
            (
                WrittenAnswer("s5_photo", "Brief: a photo app", 9, 15),
                WrittenAnswer("s5_triage", "Brief: a medical triage reader", 9, 15),
                WrittenAnswer("s5_border", "Brief: a border-control gate", 9, 15),
            ),
        ),
        Lesson(
            "06-secure-the-api",
            "Scenario 3: secure an image-classification API, and say what is left",
            (
                Exercise(
                    "s6_achieved_check",
                    "What an attack achieved",
                    "achieved",
                    ("achieved",),
                    {"attacked": 1, "verified": 1, "threat_model": 1, "budget": 1, "median": 1},
                    2,
                    12,
                ),
                Exercise(
                    "s6_detector_check",
                    "A detector of query sequences",
                    "query_detector",
                    ("flagged",),
                    {"near": 2, "quiet": 1, "accounts": 1, "repeats": 1, "bounded": 1},
                    3,
                    30,
                ),
                Exercise(
                    "s6_benign_check",
                    "What it costs customers",
                    "benign",
                    ("benign_rate",),
                    {"counts": 1, "upper": 2, "edges": 1, "claim": 1},
                    2,
                    12,
                ),
                Exercise(
                    "s6_evasion_check",
                    "The adaptive attacker",
                    "evasion",
                    ("least_passing",),
                    {"close": 2, "passed": 1, "budget": 1, "hopeless": 1},
                    2,
                    12,
                ),
                Exercise(
                    "s6_pod_check",
                    "A hardened pod",
                    "pod",
                    ("harden",),
                    {"identity": 2, "isolation": 1, "filesystem": 1, "limits": 1, "supply": 1, "works": 1},
                    2,
                    25,
                ),
                Exercise(
                    "s6_canary_check",
                    "Canary and rollback",
                    "canary",
                    ("decide",),
                    {"rollback": 2, "wait": 1, "promote": 1},
                    2,
                    15,
                ),
            ),
            (
                WrittenAnswer("s6_explain", "Explain", 6, 15),
                WrittenAnswer("s6_residual_risk", "Residual-risk statement", 12, 30),
            ),
        ),
        Lesson(
            "07-incident",
            "An incident: a family of attacks that nobody trained for",
            (
                Exercise(
                    "s7_residual_check",
                    "Residuals",
                    "residual",
                    ("residual",),
                    {"nearest": 1, "changed": 1, "sizes": 1},
                    1,
                    10,
                ),
                Exercise(
                    "s7_register_check",
                    "Registration",
                    "register",
                    ("register",),
                    {"turned": 2, "untouched": 1},
                    2,
                    15,
                ),
                Exercise(
                    "s7_family_check",
                    "Families",
                    "family",
                    ("family",),
                    {"lp": 1, "patch": 1, "spatial": 1, "sequence": 1, "restraint": 1},
                    2,
                    15,
                ),
                Exercise(
                    "s7_cause_check",
                    "Root cause",
                    "cause",
                    ("cause",),
                    {"novel": 1, "overfitted": 1, "undecided": 1},
                    2,
                    10,
                ),
                Exercise(
                    "s7_mixed_check",
                    "A mixed threat model",
                    "mixed",
                    ("mixed_loss",),
                    {"shares": 1, "loss": 2},
                    2,
                    15,
                ),
                Exercise(
                    "s7_gate_check",
                    "The gate",
                    "incident_gate",
                    ("gate",),
                    {"clean": 1, "worst": 1, "held_out": 1, "adaptive": 1},
                    2,
                    15,
                ),
                Exercise(
                    "s7_respond_check",
                    "Respond",
                    "response",
                    ("respond",),
                    {
                        **{"isolate": 3, "evidence": 1, "proportion": 2, "cause": 2},
                        **{"bridge": 2, "mix": 2, "gate": 2, "order": 2},
                    },
                    3,
                    40,
                ),
            ),
            (WrittenAnswer("s7_report", "Incident report", 12, 30),),
        ),
        Lesson(
            "08-attack-the-grader",
            "Attack the grader: evidence, not verdicts",
            (
                Exercise(
                    "s8_predict_check", "Predict", "grader_prediction", ("prediction",), {"complete": 1}, 1, 5
                ),
                Exercise(
                    "s8_forge_check",
                    "Forgeries",
                    "grader_forgery",
                    ("forge",),
                    {"verdict": 1, "nan": 1, "few": 1, "crash": 1},
                    2,
                    20,
                ),
                Exercise(
                    "s8_number_check",
                    "A number of points",
                    "grader_number",
                    ("validated",),
                    {"honest": 1, "range": 1, "types": 1},
                    1,
                    10,
                ),
                Exercise(
                    "s8_seeds_check",
                    "Cases that nobody can foresee",
                    "grader_seeds",
                    ("case_seed",),
                    {"repeatable": 1, "keyed": 1, "separate": 1},
                    2,
                    15,
                ),
                Exercise(
                    "s8_grade_check",
                    "The grader, repaired",
                    "grader",
                    ("grade",),
                    {"honest": 1, "recomputed": 2, "finite": 1, "whole": 1, "closed": 1},
                    3,
                    25,
                ),
            ),
            (WrittenAnswer("s8_judgement", "Judgement", 10, 25),),
        ),
    )
}


def find_exercise(exercise_id: str) -> Exercise:
    """The exercise with this id, whichever lesson it is in. Raises: RobustkitError when there is none."""
    for lesson in LESSONS.values():
        for exercise in lesson.exercises:
            if exercise.id == exercise_id:
                return exercise
    raise RobustkitError(
        f"exercise {exercise_id!r} is unknown; the check cell names it, leave that cell as it is."
    )


def award(exercise: Exercise, findings: list[Finding]) -> dict[str, float]:
    """Points by criterion: a criterion without findings is earned."""
    lost = {finding.criterion for finding in findings}
    return {
        criterion: 0.0 if criterion in lost else float(points)
        for criterion, points in exercise.points.items()
    }


def check(exercise_id: str, *subject: Any) -> float:
    """Check an exercise on the visible cases: print points and coded hints, return the points.

    The grader uses the same contract on cases of its own; full marks here promise nothing there.
    """
    exercise = find_exercise(exercise_id)
    findings = examine(
        CONTRACTS[exercise.contract], subject[0] if len(subject) == 1 else subject, VISIBLE_SEED
    )
    earned = award(exercise, findings)
    for criterion, points in exercise.points.items():
        mark = "ok  " if earned[criterion] else "MISS"
        print(f"{mark} {criterion}: {earned[criterion]:g}/{points:g}")
        for code, hint in dict.fromkeys((f.code, f.hint) for f in findings if f.criterion == criterion):
            print(f"       {code}: {hint}")
    total = sum(earned.values())
    print(f"{exercise.title}: {total:g} of {exercise.total:g} points on the visible check")
    return total


def collect(exercise: Exercise, namespace: Mapping[str, Any], case: Arrays) -> Arrays:
    """What the grader runs inside the learner's kernel: the evidence for one exercise.

    It records; it judges nothing. A missing name is recorded as such.
    """
    missing = [name for name in exercise.names if name not in namespace]
    if missing:
        from robustkit.contracts.base import text

        return {"error": text(["NOT_FOUND", f"the notebook defines no {missing[0]}"])}
    subject = [namespace[name] for name in exercise.names]
    return observe_safely(
        CONTRACTS[exercise.contract], subject[0] if len(subject) == 1 else tuple(subject), case
    )


def save_arrays(path: Any, arrays: Arrays) -> None:
    """Cases and evidence on disk: an uncompressed .npz without pickles."""
    np.savez(path, allow_pickle=False, **arrays)
