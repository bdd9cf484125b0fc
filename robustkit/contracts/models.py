"""Contracts of trained models: weights go in, the examiner measures them itself.

The thresholds are pass marks for a tier, not reference figures: they stand below what the reference
solution reaches, by more than the interval is wide, and the interval's lower bound must reach them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustkit.attacks import fgsm, pgd
from robustkit.contracts.base import Arrays, Contract, Finding, text, untext
from robustkit.data import load
from robustkit.device import seeded, strict_fp32, tier
from robustkit.losses import cross_entropy, margin
from robustkit.models import mnist_cnn
from robustkit.results import Interval
from robustkit.threat import Ball

BALL = Ball("Linf", 0.3)
EPSILONS = (0.1, 0.2, 0.3)
N_REPORT = {
    "smoke": 300,
    "standard": 10_000,
    "full": 10_000,
}  # test images, the first n, that a learner reports on
N_JUDGED = {"smoke": 200, "standard": 500, "full": 1000}

# Lowest share that the lower bound of the 95 % interval must reach, by tier.
CLEAN_MARK = {"smoke": 0.80, "standard": 0.96, "full": 0.96}
ROBUST_CLEAN_MARK = {"smoke": 0.80, "standard": 0.96, "full": 0.96}
PGD_HALF_MARK = {"smoke": 0.25, "standard": 0.60, "full": 0.60}
PGD_FULL_MARK = {"smoke": 0.35, "standard": 0.83, "full": 0.85}


def _draw(seed: int) -> Arrays:
    """Only the seed and the tier: the images are drawn where they are judged, and stay there."""
    return {"seed": np.int64(seed), "tier": text(tier())}


def _first_images(level: str) -> tuple[Tensor, Tensor]:
    """The test images that a learner reports on."""
    data = load("mnist", "test")
    return data.x[: N_REPORT[level]], data.y[: N_REPORT[level]]


def _judged_images(case: Arrays) -> tuple[Tensor, Tensor]:
    """A random part of the test set, by the case's seed."""
    data = load("mnist", "test")
    chosen = torch.randperm(len(data), generator=seeded(int(case["seed"]), "judged"))
    chosen = chosen[: N_JUDGED[untext(case["tier"])]]
    return data.x[chosen], data.y[chosen]


def _weights(model: Any) -> Arrays:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch module, got {type(model).__name__}")
    return {f"weights.{name}": value.detach().cpu().numpy() for name, value in model.state_dict().items()}


def _rebuild(evidence: Arrays) -> nn.Module | None:
    """The course's CNN with the submitted weights; None when they are not its weights."""
    model = mnist_cnn()
    state = {key.removeprefix("weights."): a for key, a in evidence.items() if key.startswith("weights.")}
    expected = {name: (tuple(value.shape), np.float32) for name, value in model.state_dict().items()}
    if {name: (array.shape, array.dtype) for name, array in state.items()} != expected:
        return None
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return model.eval()


def _other_architecture(criteria: tuple[str, ...]) -> list[Finding]:
    hint = (
        "these are not the weights of robustkit.models.mnist_cnn, in float32: keep the lesson's architecture"
    )
    return [Finding(criterion, "WRONG_ARCHITECTURE", hint) for criterion in criteria]


def _correct(
    model: nn.Module, x: Tensor, y: Tensor, attack: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """Which examples the model gets right, after `attack` where there is one."""
    right = []
    for images, labels in zip(x.split(250), y.split(250), strict=True):
        candidates = images if attack is None else attack(images, labels)
        with torch.no_grad(), strict_fp32():
            logits = model(candidates)
            if not torch.isfinite(logits).all():
                raise ValueError("logits that overflow: a verdict on them would be arbitrary")
            right.append(logits.argmax(1) == labels)
    return torch.cat(right)


def _share(right: Tensor) -> Interval:
    return Interval(int(right.sum()), len(right))


# --- a clean model and the learner's report on it ----------------------------------------------------


def _observe_report(subject: Any, case: Arrays) -> Arrays:
    model, report = subject
    rows = [[float(eps), *map(int, report[eps])] for eps in sorted(report)]
    return {**_weights(model), "report": np.array(rows, dtype=np.float64)}


def _judge_report(case: Arrays, evidence: Arrays) -> list[Finding]:
    model, report = _rebuild(evidence), evidence["report"]
    if model is None:
        return _other_architecture(_REPORT)
    if report.shape != (3, 3) or not np.allclose(report[:, 0], EPSILONS):
        # The model alone earns nothing: an untouched notebook trains it too.
        return [
            Finding(c, "REPORT_INCOMPLETE", "report (k, n) for each of eps 0.1, 0.2, 0.3") for c in _REPORT
        ]
    level = untext(case["tier"])
    x, y = _first_images(level)
    found = []
    clean = _share(_correct(model, x, y))
    if clean.low < CLEAN_MARK[level]:
        found.append(
            Finding(
                "clean",
                "MODEL_TOO_WEAK",
                f"clean accuracy {clean}: its lower bound must reach {CLEAN_MARK[level]:.0%}",
            )
        )
    for eps, k, n in report:
        if int(n) != len(y):
            found.append(
                Finding("counts", "WRONG_N", f"eps {eps:g}: n is {n:g}, this tier measures {len(y)} images")
            )
            break
        ball = Ball("Linf", float(eps))
        survived = int(_correct(model, x, y, lambda a, b, ball=ball: fgsm(model, a, b, ball)).sum())  # type: ignore[misc]
        # Two honest runs differ in a few images at the decision boundary, through float32 alone.
        if abs(k - survived) > max(2, 0.005 * n):
            hint = f"eps {eps:g}: you report {k:g} of {n:g}, the judge's FGSM on your weights leaves another number"
            found.append(Finding("counts", "REPORT_NOT_REPRODUCED", hint))
            break
    return found


_REPORT = ("counts", "clean")
FGSM_REPORT = Contract(_REPORT, _draw, _observe_report, _judge_report)


# --- a robust model ----------------------------------------------------------------------------------


def _observe_model(model: Any, case: Arrays) -> Arrays:
    return _weights(model)


def _judge_robust_model(case: Arrays, evidence: Arrays) -> list[Finding]:
    model, seed = _rebuild(evidence), int(case["seed"])
    if model is None:
        return _other_architecture(_ROBUST)
    level = untext(case["tier"])
    x, y = _judged_images(case)
    right = _correct(model, x, y)
    clean = _share(right)
    one_step = _share(right & _correct(model, x, y, lambda a, b: fgsm(model, a, b, BALL)))
    # Cross-entropy's gradient underflows to zero on large logits, which then look robust; the margin's does not.
    for loss in (cross_entropy, margin):
        attack = partial(pgd, steps=40, step_size=0.02, loss=loss, generator=seeded(seed, "judge"))
        right &= _correct(model, x, y, lambda a, b, attack=attack: attack(model, a, b, BALL))  # type: ignore[misc]
    robust = _share(right)
    found = []
    if clean.low < ROBUST_CLEAN_MARK[level]:
        found.append(
            Finding(
                "clean",
                "CLEAN_ACCURACY_LOW",
                f"clean accuracy {clean}: lower bound below {ROBUST_CLEAN_MARK[level]:.0%}",
            )
        )
    masked = one_step.share - robust.share > 0.2
    code = "MASKED_GRADIENTS" if masked else "NOT_ROBUST"
    hint = f"under PGD-40, on two losses, at eps 0.3 it keeps {robust}"
    if masked:
        hint += f", under FGSM {one_step}: the one-step figure was an illusion"
    for criterion, mark in (("pgd_half", PGD_HALF_MARK[level]), ("pgd_full", PGD_FULL_MARK[level])):
        if robust.low < mark:
            found.append(Finding(criterion, code, f"{hint}; the lower bound must reach {mark:.0%}"))
    return found


_ROBUST = ("clean", "pgd_half", "pgd_full")
ROBUST_MODEL = Contract(_ROBUST, _draw, _observe_model, _judge_robust_model)
