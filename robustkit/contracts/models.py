"""Contracts of trained models: weights go in, the examiner measures them itself.

The thresholds are pass marks for a tier, not reference figures: they stand below what the reference
solution reaches, by more than the interval is wide, and the interval's lower bound must reach them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.attacks import fgsm
from robustkit.audit import CHECKS, Budget, Runs
from robustkit.contracts.base import Arrays, Contract, Finding, measured, text, untext
from robustkit.data import Dataset, load
from robustkit.device import attackable, seeded, strict_fp32, tier
from robustkit.errors import RobustkitError
from robustkit.models import build, mnist_cnn, pretrained, zoo
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


_HIDDEN = ("seed", "tier")  # from the seed a kernel could work out which test images it will be judged on


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


def _rebuild(evidence: Arrays, model: nn.Sequential) -> nn.Sequential | None:
    """A fresh `model` with the submitted weights; None when they are not its weights."""
    state = {key.removeprefix("weights."): a for key, a in evidence.items() if key.startswith("weights.")}
    expected = {name: (tuple(a.shape), a.numpy().dtype) for name, a in model.state_dict().items()}
    if {name: (array.shape, array.dtype) for name, array in state.items()} != expected:
        return None
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.items()})
    return model.eval()


def _other_architecture(criteria: tuple[str, ...], name: str) -> list[Finding]:
    hint = f"these are not the weights of {name}, in float32: keep the lesson's architecture"
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
    model, report = _rebuild(evidence, mnist_cnn()), evidence["report"]
    if model is None:
        return _other_architecture(_REPORT, "robustkit.models.mnist_cnn")
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
FGSM_REPORT = Contract(_REPORT, _draw, _observe_report, _judge_report, essential=("counts",), hidden=_HIDDEN)


# --- a robust model ----------------------------------------------------------------------------------

# What the judge's attacks spend on each image.
BUDGETS = {
    "smoke": Budget(steps=20, restarts=2, queries=200, draws=50),
    "standard": Budget(steps=40, restarts=5, queries=1000, draws=500),
    "full": Budget(steps=40, restarts=10, queries=2000, draws=1000),
}

# Findings after which not even the worst case over all attacks is to be believed. The others of the audit
# say that one attack was weak; here no figure rests on one attack.
AUDITED = ("constant-output", "zero-gradients", "large-eps", "black-box", "noise")


def _observe_model(model: Any, case: Arrays) -> Arrays:
    return _weights(model)


def balanced(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    """The same decisions from outputs of mean size one in every layer, measured on `x`.

    A positive factor passes through ReLUs and changes no argmax, yet it can take the gradient from the loss:
    by large logits, or by numbers too small for float32. A layer of nothing but zeros stays as it is.
    Raises: ValueError for outputs that overflow.
    """
    model, passed = copy.deepcopy(model).double(), 1.0
    values = x.double()
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                weight, bias = layer.parameters()
                bias.div_(passed)
                size = float(layer(values).abs().mean()) or 1.0
                if not math.isfinite(size):
                    raise ValueError("a layer whose outputs overflow")
                weight.div_(size)
                bias.div_(size)
                passed *= size
            values = layer(values)
    return model.float()


def _judge_robust_model(case: Arrays, evidence: Arrays) -> list[Finding]:
    model = _rebuild(evidence, mnist_cnn())
    if model is None:
        return _other_architecture(_ROBUST, "robustkit.models.mnist_cnn")
    level = untext(case["tier"])
    x, y = _judged_images(case)
    # Models of this very tier are left out: who follows their recipe may arrive at them.
    if name := _shipped(model, x, [n for n in _names("mnist_cnn") if zoo.card(n)["tier"] != level]):
        hint = f"these are the weights of {name}, which come with robustkit; train a model of your own"
        return [Finding(criterion, "SHIPPED_WEIGHTS", hint) for criterion in _ROBUST]
    right = _correct(model, x, y)
    clean, found = _share(right), []
    measured("clean", clean.k, clean.n)
    if clean.low < ROBUST_CLEAN_MARK[level]:
        hint = f"clean accuracy {clean}: lower bound below {ROBUST_CLEAN_MARK[level]:.0%}"
        found.append(Finding("clean", "CLEAN_ACCURACY_LOW", hint))
    one_step = _share(right & _correct(model, x, y, lambda a, b: fgsm(model, a, b, BALL)))
    even, budget = balanced(model, x), BUDGETS[level]
    robust, doubts = _attacked(even, x, y, BALL, budget, PGD_HALF_MARK[level], int(case["seed"]))
    measured("pgd_full", robust.k, robust.n)
    told = f"under the worst of the judge's attacks at eps 0.3 it keeps {robust}"
    masked = one_step.share - robust.share > 0.2
    for criterion, mark in (("pgd_half", PGD_HALF_MARK[level]), ("pgd_full", PGD_FULL_MARK[level])):
        if doubts:
            hint = f"{told}, which cannot be believed: {doubts[0]}"
            found.append(Finding(criterion, "MASKED_GRADIENTS", hint))
        elif robust.low < mark and masked:
            hint = f"{told}, under FGSM {one_step}: the one-step figure was an illusion"
            found.append(Finding(criterion, "MASKED_GRADIENTS", hint))
        elif robust.low < mark:
            hint = f"{told}; the lower bound must reach {mark:.0%}"
            found.append(Finding(criterion, "NOT_ROBUST", hint))
    return found


def _attacked(
    model: nn.Sequential, x: Tensor, y: Tensor, ball: Ball, budget: Budget, lowest: float, seed: int
) -> tuple[Interval, list[str]]:
    """The share that survives every attack, and what the audit says against believing it.

    What gradient attacks leave is first compared with the lowest mark: below it, the rest would change nothing.
    """
    runs = Runs(model, x, y, ball, seed, budget, None, 250)
    with attackable(model), strict_fp32():
        if _share(~runs.white_box).low < lowest:
            return _share(~runs.white_box), []
        outcomes = [check(runs) for check in CHECKS if check.name in AUDITED]
        left = _share(~(runs.white_box | runs.square | runs.noise))
    return left, [outcome.evidence for outcome in outcomes if outcome.verdict != "passed"]


def _names(architecture: str) -> list[str]:
    """The trained models of the package of one architecture."""
    return [name for name in zoo.names() if zoo.card(name)["architecture"] == architecture]


def _shipped(model: nn.Module, x: Tensor, names: list[str]) -> str:
    """The trained model among `names` that gives the same answers, or "".

    The logits are compared, up to shift and scale, on images and on noise: weights that were permuted or
    rescaled are the same model. Two trainings with different random draws agree far less on noise.
    """
    points = torch.cat([x, torch.rand(x.shape, generator=seeded(0, "noise"))])

    def answers(one: nn.Module) -> Tensor:
        with torch.no_grad():
            logits = one(points).double()
        return F.normalize(logits - logits.mean(1, keepdim=True), dim=1)

    for name in names:
        if (answers(model) * answers(pretrained(name))).sum(1).mean() > SAME_MODEL:
            return name
    return ""


SAME_MODEL = 0.999  # mean cosine


_ROBUST = ("clean", "pgd_half", "pgd_full")
ROBUST_MODEL = Contract(
    _ROBUST, _draw, _observe_model, _judge_robust_model, essential=("pgd_half",), hidden=_HIDDEN
)


# --- weights for CIFAR-10 ------------------------------------------------------------------------------

CIFAR_BALL = Ball("L2", 0.5)
CIFAR_MODEL = "preact_resnet10_w16"
CIFAR_SOURCES = (("cifar10-jpeg", "test"), ("cifar10", "test"))  # the first at hand is judged on
N_CIFAR = {"smoke": 20, "standard": 200, "full": 1000}
CIFAR_BUDGETS = {
    "smoke": Budget(steps=5, restarts=1, queries=20, draws=5),
    "standard": Budget(steps=10, restarts=1, queries=100, draws=20),
    "full": Budget(steps=50, restarts=10, queries=1000, draws=200),
}
CIFAR_CLEAN_MARK = {"smoke": 0.25, "standard": 0.50, "full": 0.55}
CIFAR_HALF_MARK = {"smoke": 0.10, "standard": 0.22, "full": 0.30}
CIFAR_FULL_MARK = {"smoke": 0.12, "standard": 0.32, "full": 0.38}
_CIFAR = ("clean", "robust_half", "robust_full")


def cifar_test(limit: int | None, seed: int = 0) -> Dataset:
    """Test images of CIFAR-10, from the first of `CIFAR_SOURCES` at hand. Raises: RobustkitError when none is."""
    *others, last = CIFAR_SOURCES
    for name, split in others:
        with suppress(RobustkitError):
            return load(name, split, limit=limit, seed=seed)
    return load(*last, limit=limit, seed=seed)


def _judge_cifar_model(case: Arrays, evidence: Arrays) -> list[Finding]:
    model = _rebuild(evidence, cast(nn.Sequential, build(CIFAR_MODEL)))
    if model is None:
        return _other_architecture(_CIFAR, f'robustkit.models.build("{CIFAR_MODEL}")')
    level, seed = untext(case["tier"]), int(case["seed"])
    try:
        images = cifar_test(N_CIFAR[level], seed)
    except RobustkitError as error:
        return [Finding(criterion, "NO_IMAGES", f"nothing to judge on: {error}") for criterion in _CIFAR]
    x, y = images.x, images.y
    if name := _shipped(model, x, _names(CIFAR_MODEL)):
        hint = f"these are the weights of {name}, which come with robustkit; train on from them, or train your own"
        return [Finding(criterion, "SHIPPED_WEIGHTS", hint) for criterion in _CIFAR]
    clean, found = _share(_correct(model, x, y)), []
    measured("clean", clean.k, clean.n)
    if clean.low < CIFAR_CLEAN_MARK[level]:
        hint = f"clean accuracy {clean}: lower bound below {CIFAR_CLEAN_MARK[level]:.0%}"
        found.append(Finding("clean", "CLEAN_ACCURACY_LOW", hint))
    even = _even_logits(model, x)
    robust, doubts = _attacked(even, x, y, CIFAR_BALL, CIFAR_BUDGETS[level], CIFAR_HALF_MARK[level], seed)
    measured("robust_full", robust.k, robust.n)
    told = f"under the worst of the judge's attacks, {CIFAR_BALL}, it keeps {robust}"
    for criterion, mark in (("robust_half", CIFAR_HALF_MARK[level]), ("robust_full", CIFAR_FULL_MARK[level])):
        if doubts:
            hint = f"{told}, which cannot be believed: {doubts[0]}"
            found.append(Finding(criterion, "MASKED_GRADIENTS", hint))
        elif robust.low < mark:
            found.append(Finding(criterion, "NOT_ROBUST", f"{told}; the lower bound must reach {mark:.0%}"))
    return found


def _even_logits(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    """The same decisions from logits of mean size one on `x`: their scale can hide the gradient of a loss.

    Inside the network BatchNorm undoes scales by itself. Logits of nothing but zeros stay as they are.
    """
    model = copy.deepcopy(model)
    head: nn.Linear = model[1].head  # type: ignore[assignment]
    with torch.no_grad():
        size = float(model(x).double().abs().mean()) or 1.0
        for parameter in head.parameters():
            parameter.copy_((parameter.double() / size).float())
    return model


CIFAR_WEIGHTS = Contract(
    _CIFAR, _draw, _observe_model, _judge_cifar_model, essential=("robust_half",), hidden=_HIDDEN
)
