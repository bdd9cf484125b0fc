"""What learners' functions and models must satisfy; one contract for pytest, check cells and the judge."""

from __future__ import annotations

from robustkit.contracts import attacks, certify, grader, logs, measures, models, tradeoff
from robustkit.contracts.base import Arrays, Contract, Finding, examine, judge_safely, observe_safely
from robustkit.contracts.oracle import LinearOracle

CONTRACTS: dict[str, Contract] = {
    "distance": measures.DISTANCE,
    "projection": measures.PROJECTION,
    "robust_accuracy": measures.ROBUST_ACCURACY,
    "prediction": measures.PREDICTION,
    "interval": measures.INTERVAL,
    "fgsm": attacks.FGSM,
    "fgsm_report": models.FGSM_REPORT,
    "adversarial_loss": attacks.ADVERSARIAL_LOSS,
    "rs_fgsm": attacks.RS_FGSM,
    "pgd": attacks.PGD,
    "alarms": measures.ALARMS,
    "curve": measures.CURVE,
    "robust_model": models.ROBUST_MODEL,
    "statement": measures.STATEMENT,
    "grader_prediction": grader.GRADER_PREDICTION,
    "grader_forgery": grader.FORGE,
    "grader_number": grader.NUMBER,
    "grader_seeds": grader.SEEDS,
    "grader": grader.GRADER,
    "votes": certify.VOTES,
    "lower_bound": certify.LOWER_BOUND,
    "certified_radius": certify.CERTIFIED_RADIUS,
    "certify": certify.CERTIFY,
    "certified_accuracy": certify.CERTIFIED_ACCURACY,
    "interval_linear": certify.INTERVAL_LINEAR,
    "ibp": certify.IBP,
    "certification_log": logs.CERTIFICATION_LOG,
    "covers": tradeoff.COVERS,
    "sandwich": tradeoff.SANDWICH,
    "paired": tradeoff.PAIRED,
    "cost": tradeoff.COST,
    "route": tradeoff.ROUTE,
    "admissible": tradeoff.ADMISSIBLE,
}

__all__ = [
    "CONTRACTS",
    "Arrays",
    "Contract",
    "Finding",
    "LinearOracle",
    "examine",
    "judge_safely",
    "observe_safely",
]
