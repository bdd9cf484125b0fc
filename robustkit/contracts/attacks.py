"""Contracts of attacks, on the linear oracle: FGSM, random-start FGSM, PGD, adversarial loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustkit.contracts.base import Array, Arrays, Contract, Finding, text, untext
from robustkit.contracts.oracle import (
    LinearOracle,
    adversarial_cross_entropy,
    ascent,
    breakable,
    draw_linear,
    oracle,
    z,
)
from robustkit.device import seeded
from robustkit.threat import TOLERANCE

FULL_STEPS, FULL_STEP = 10, 0.25  # in eps: 2.5 eps in all, enough to cross the ball from any start
SHORT_STEPS, SHORT_STEP = 3, 0.1  # 0.3 eps in all: the start and the number of steps stay visible

Call = Callable[[LinearOracle, Tensor, Tensor], Any]


# --- observe: run and record ---------------------------------------------------------------------


def _candidates(call: Call, case: Arrays, batch: str = "") -> tuple[Array, LinearOracle]:
    """The candidates for one batch, with the oracle in eval mode."""
    model = oracle(case).eval()
    x = torch.from_numpy(case[f"{batch}x"].copy())
    result = call(model, x, torch.from_numpy(case[f"{batch}y"].copy()))
    if not isinstance(result, Tensor):
        raise TypeError(f"expected a torch tensor of candidates, got {type(result).__name__}")
    return result.detach().numpy(), model


def _side_effects(call: Call, case: Arrays) -> list[str]:
    """Everything that a call with the model in train mode leaves behind."""
    model = oracle(case).train()
    x, y = torch.from_numpy(case["x"].copy()), torch.from_numpy(case["y"].copy())
    weights = model.w.detach().clone()
    random_state = torch.random.get_rng_state()
    result = call(model, x, y)
    left = {
        "INPUT_MODIFIED": not np.array_equal(x.numpy(force=True), case["x"]) or x.requires_grad,
        "WEIGHT_GRADIENTS_LEFT": any(p.grad is not None and bool(p.grad.any()) for p in model.parameters()),
        "WEIGHTS_CHANGED": not torch.equal(weights, model.w)
        or not all(p.requires_grad for p in model.parameters()),
        "EVAL_MODE_MISSING": any(model.forwards),
        "MODE_NOT_RESTORED": not (model.training and model.drop.training),
        "GLOBAL_RANDOMNESS": not torch.equal(random_state, torch.random.get_rng_state()),
        "GRAPH_RETURNED": bool(result.requires_grad),
    }
    return [code for code, happened in left.items() if happened]


def _observe_fgsm(attack: Any, case: Arrays) -> Arrays:
    def call(model: LinearOracle, x: Tensor, y: Tensor) -> Any:
        return attack(model, x, y, float(case["eps"]))

    full, model = _candidates(call, case)
    return {
        "candidate": full,
        "corner": _candidates(call, case, "corner_")[0],
        "gradients": np.int64(model.gradients),
        "left": text(_side_effects(call, case)),
    }


def _observe_rs_fgsm(attack: Any, case: Arrays) -> Arrays:
    def seeded_call(seed: int) -> Call:
        return lambda model, x, y: attack(model, x, y, float(case["eps"]), seeded(seed, "rs"))

    full, model = _candidates(seeded_call(1), case)
    return {
        "candidate": full,
        "corner": _candidates(seeded_call(1), case, "corner_")[0],
        "same_seed": _candidates(seeded_call(1), case)[0],
        "other_seed": _candidates(seeded_call(2), case)[0],
        "gradients": np.int64(model.gradients),
        "left": text(_side_effects(seeded_call(1), case)),
    }


def _observe_pgd(attack: Any, case: Arrays) -> Arrays:
    eps = float(case["eps"])

    def call(seed: int, steps: int, step: float) -> Call:
        return lambda model, x, y: attack(model, x, y, eps, steps, step * eps, seeded(seed, "pgd"))

    short, model = _candidates(call(1, SHORT_STEPS, SHORT_STEP), case)
    return {
        "candidate": _candidates(call(1, FULL_STEPS, FULL_STEP), case)[0],
        "corner": _candidates(call(1, FULL_STEPS, FULL_STEP), case, "corner_")[0],
        "short": short,
        "same_seed": _candidates(call(1, SHORT_STEPS, SHORT_STEP), case)[0],
        "other_seed": _candidates(call(2, SHORT_STEPS, SHORT_STEP), case)[0],
        "gradients": np.int64(model.gradients),
        "left": text(_side_effects(call(1, SHORT_STEPS, SHORT_STEP), case)),
    }


def _observe_loss(loss_function: Any, case: Arrays) -> Arrays:
    model = oracle(case, dropout=0.0).train()
    x, y = torch.from_numpy(case["x"].copy()), torch.from_numpy(case["y"].copy())
    loss = loss_function(model, x, y, float(case["eps"]))
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise TypeError("expected a scalar tensor that the training loop can call .backward() on")
    forwards = list(model.forwards)
    loss.backward()
    return {
        "loss": np.float64(loss.item()),
        "gradient_w": model.w.grad.numpy() if model.w.grad is not None else np.zeros(0),
        "gradient_b": model.b.grad.numpy() if model.b.grad is not None else np.zeros(0),
        "forwards": np.array(forwards, dtype=bool),
        "training": np.bool_(model.training and model.drop.training),
        "modified": np.bool_(not np.array_equal(x.numpy(force=True), case["x"])),
    }


# --- judge: findings from the record --------------------------------------------------------------


def _unusable(candidate: Array, x: Array) -> tuple[str, str] | None:
    """Why a batch of candidates cannot be judged at all, or None."""
    if candidate.shape != x.shape:
        return "WRONG_SHAPE", f"candidates have shape {candidate.shape}, the batch has {x.shape}"
    if candidate.dtype != np.float32:
        return "WRONG_DTYPE", f"candidates are {candidate.dtype}, the images are float32"
    if not np.isfinite(candidate).all():
        return "NOT_FINITE", "candidates hold NaN or infinity"
    if np.array_equal(candidate, x):
        return "NO_EFFECT", "the candidates are the images themselves"
    return None


def _inside(case: Arrays, evidence: Arrays) -> list[Finding]:
    """Ball and box, on the interior batch and in the corners."""
    eps, found = float(case["eps"]), []
    change = max(
        float(np.abs(evidence[name] - case[x]).max())
        for name, x in (("candidate", "x"), ("corner", "corner_x"))
    )
    if change > eps + TOLERANCE["Linf"]:
        found.append(
            Finding(
                "ball",
                "EPS_BALL_VIOLATED",
                f"the largest change of a pixel is {change:.3f}, allowed is {eps:g}",
            )
        )
    low = min(float(evidence[name].min()) for name in ("candidate", "corner"))
    high = max(float(evidence[name].max()) for name in ("candidate", "corner"))
    if low < 0 or high > 1:
        found.append(
            Finding("box", "BOX_VIOLATED", f"pixels reach [{low:.3f}, {high:.3f}]; images live in [0, 1]")
        )
    return found


HINTS = {
    "INPUT_MODIFIED": "the images you were given are not as they were after the call; work on a copy",
    "WEIGHT_GRADIENTS_LEFT": "the call left gradients on the model's weights; ask autograd for the input's alone",
    "WEIGHTS_CHANGED": "the call changed the model's weights or froze them for good",
    "EVAL_MODE_MISSING": "the model was attacked in train mode, with dropout on: that is not the deployed model",
    "MODE_NOT_RESTORED": "the model came in train mode and left in another; put the mode back",
    "GLOBAL_RANDOMNESS": "torch's global random state moved; draw from the generator that you are given",
    "GRAPH_RETURNED": "the result still carries an autograd graph",
    "SEED_IGNORED": "the same generator seed gave two different results",
    "SAME_FOR_EVERY_SEED": "two different generator seeds gave the same result; the random part is missing",
}


def _hygiene(evidence: Arrays) -> list[Finding]:
    return [Finding("hygiene", code, HINTS[code]) for code in untext(evidence["left"])]


def _randomness(evidence: Arrays, first: str) -> list[Finding]:
    """Same seed, same result: the generator alone decides."""
    if not np.array_equal(evidence[first], evidence["same_seed"]):
        return [Finding("hygiene", "SEED_IGNORED", HINTS["SEED_IGNORED"])]
    return []


def _direction(case: Arrays, candidate: Array) -> tuple[str, str] | None:
    """Why candidates that should be x + eps * sign(gradient) are not, or None."""
    eps = float(case["eps"])
    moved = (candidate - case["x"]) * ascent(case, case["y"]) / eps  # 1 everywhere when right
    if np.abs(moved - 1).max() <= 1e-3:
        return None
    if np.abs(moved + 1).max() <= 1e-3:
        return "WRONG_SIGN", "every pixel moves so that the loss falls"
    honest = breakable(case, case["x"], case["y"], 0.0) == 0  # classified right before the attack
    if np.abs(moved[honest] - 1).max() <= 1e-3:
        return (
            "LABEL_IGNORED",
            "misclassified images are moved towards their true class; use the labels you are given",
        )
    if np.abs(np.abs(moved) - 1).max() <= 1e-3:
        return "NOT_STEEPEST", "pixels move by eps, but not in the direction in which the loss rises fastest"
    if (moved > 0).all():
        return (
            "STEP_TOO_SMALL",
            f"pixels move the right way, but by {np.abs(moved).mean():.2f} eps on average, not by eps",
        )
    return (
        "NOT_STEEPEST",
        f"only {100 * (moved > 0.999).mean():.0f} % of the pixels are where the steepest step puts them",
    )


def _blocked(
    case: Arrays, evidence: Arrays, criteria: tuple[str, ...], names: dict[str, str]
) -> list[Finding]:
    """The findings that leave nothing to judge: unusable candidates cost every criterion."""
    for name, x in names.items():
        reason = _unusable(evidence[name], case[x])
        if reason is not None:
            return [Finding(criterion, *reason) for criterion in criteria]
    return []


_FGSM = ("ball", "box", "closed_form", "hygiene")
_RS_FGSM = ("ball", "box", "start", "step", "hygiene")
_PGD = ("ball", "box", "closed_form", "start", "steps", "hygiene")
_LOSS = ("loss", "gradient", "modes")


def _judge_fgsm(case: Arrays, evidence: Arrays) -> list[Finding]:
    blocked = _blocked(case, evidence, _FGSM, {"candidate": "x", "corner": "corner_x"})
    if blocked:
        return blocked
    found = _inside(case, evidence) + _hygiene(evidence)
    if reason := _direction(case, evidence["candidate"]):
        found.append(Finding("closed_form", *reason))
    return found


def _displacement(case: Arrays, candidate: Array) -> Array:
    """Each pixel's move along the ascent direction, in units of eps: start plus step, capped at 1."""
    return np.asarray((candidate - case["x"]) * ascent(case, case["y"]) / float(case["eps"]))


def _start_and_step(
    moved: Array, total: float, start: str, step: str, wrong_step: tuple[str, str]
) -> list[Finding]:
    """Judge `moved` = min(uniform(-1, 1) + total, 1): its least value and how much of it is capped."""
    least, capped = float(moved.min()), float((moved > 0.999).mean())
    if moved.std() < 1e-3 or capped > 0.999:
        return [
            Finding(start, "NO_RANDOM_START", "every pixel moves by the same amount: the start is not random")
        ]
    if moved.mean() < 0:
        return [Finding(step, "WRONG_SIGN", "on average the pixels move so that the loss falls")]
    if abs(least - (total - 1)) > 0.02:
        return [Finding(step, *wrong_step)]
    if abs(capped - total / 2) > 0.05:
        return [Finding(start, "START_NOT_UNIFORM", "the start is not uniform over the whole ball")]
    return []


def _judge_rs_fgsm(case: Arrays, evidence: Arrays) -> list[Finding]:
    blocked = _blocked(case, evidence, _RS_FGSM, {"candidate": "x", "corner": "corner_x", "other_seed": "x"})
    if blocked:
        return blocked
    found = _inside(case, evidence) + _hygiene(evidence) + _randomness(evidence, "candidate")
    moved = _displacement(case, evidence["candidate"])
    wrong = (
        "STEP_SIZE",
        (
            f"the pixel that moved least moved {moved.min():.2f} eps along the gradient's sign; "
            "a start anywhere in the ball and a step of 1.25 eps leave at least 0.25"
        ),
    )
    shape = _start_and_step(moved, 1.25, "start", "step", wrong)
    if not shape and np.array_equal(evidence["candidate"], evidence["other_seed"]):
        shape = [Finding("start", "SAME_FOR_EVERY_SEED", HINTS["SAME_FOR_EVERY_SEED"])]
    return found + shape


def _judge_pgd(case: Arrays, evidence: Arrays) -> list[Finding]:
    names = {"candidate": "x", "corner": "corner_x", "short": "x", "other_seed": "x"}
    blocked = _blocked(case, evidence, _PGD, names)
    if blocked:
        return blocked
    found = _inside(case, evidence) + _hygiene(evidence) + _randomness(evidence, "short")
    broken = (z(case, evidence["candidate"]) > 0) != (case["y"] == 1)
    should = breakable(case, case["x"], case["y"], float(case["eps"]))
    wrong = int(((broken != (should == 1)) & (should >= 0)).sum())
    if reason := _direction(case, evidence["candidate"]):
        code, hint = reason
        found.append(
            Finding(
                "closed_form", code, f"{hint}; {wrong} images are broken that should not be, or the reverse"
            )
        )
    moved = _displacement(case, evidence["short"])
    total = SHORT_STEPS * SHORT_STEP
    taken = (moved.min() + 1) / SHORT_STEP
    count = (
        "STEP_COUNT",
        (
            f"asked for {SHORT_STEPS} steps of {SHORT_STEP:g} eps, the least-moved pixel shows {taken:.1f} of them"
        ),
    )
    shape = _start_and_step(moved, total, "start", "steps", count)
    if not shape and int(evidence["gradients"]) != SHORT_STEPS:
        shape = [
            Finding(
                "steps",
                "STEP_COUNT",
                f"asked for {SHORT_STEPS} steps, but {int(evidence['gradients'])} gradients were computed",
            )
        ]
    if not shape and np.array_equal(evidence["short"], evidence["other_seed"]):
        shape = [Finding("start", "SAME_FOR_EVERY_SEED", HINTS["SAME_FOR_EVERY_SEED"])]
    return found + shape


def _judge_loss(case: Arrays, evidence: Arrays) -> list[Finding]:
    eps, found = float(case["eps"]), []
    candidate = np.clip(case["x"] + eps * ascent(case, case["y"]), 0, 1)
    expected, gradient_w, gradient_b = adversarial_cross_entropy(case, candidate)
    clean, _, _ = adversarial_cross_entropy(case, case["x"])
    loss, n = float(evidence["loss"]), len(case["x"])
    if abs(loss - expected) > 1e-4:
        if abs(loss - clean) <= 1e-4:
            reason = "TRAINS_ON_CLEAN", "the loss is that of the clean images"
        elif abs(loss - n * expected) <= 1e-2:
            reason = "LOSS_SUMMED", "the loss is the sum over the batch; the learning rate expects the mean"
        elif abs(loss - (clean + expected) / 2) <= 1e-4:
            reason = (
                "MIXED_LOSS",
                "the loss averages clean and adversarial images; this exercise asks for the latter alone",
            )
        else:
            reason = (
                "LOSS_VALUE",
                f"the loss is {loss:.3f}; at the FGSM candidates of this batch it is another",
            )
        found.append(Finding("loss", *reason))
    elif bool(evidence["modified"]):
        found.append(Finding("loss", "INPUT_MODIFIED", HINTS["INPUT_MODIFIED"]))
    got_w, got_b = evidence["gradient_w"], evidence["gradient_b"]
    if found and found[0].code not in {"LOSS_SUMMED", "INPUT_MODIFIED"}:
        found.append(Finding("gradient", found[0].code, "the gradient is that of the wrong loss"))
    elif got_w.shape != gradient_w.shape or got_b.shape != gradient_b.shape:
        found.append(Finding("gradient", "NO_GRADIENT", "after .backward() the weights have no gradient"))
    else:
        scale = n if found and found[0].code == "LOSS_SUMMED" else 1
        if np.abs(got_w - scale * gradient_w.numpy()).max() > 1e-4 * scale:
            hint = "after .backward(), .grad is not that of the adversarial loss; did the candidates leave something?"
            found.append(Finding("gradient", "WEIGHT_GRADIENTS_LEFT", hint))
    forwards = evidence["forwards"].astype(bool)
    if len(forwards) < 2 or forwards[:-1].any():
        found.append(Finding("modes", "EVAL_MODE_MISSING", "the candidates were not made in eval mode"))
    elif not forwards[-1] or not bool(evidence["training"]):
        found.append(
            Finding("modes", "TRAIN_MODE_MISSING", "the loss was computed with the model in eval mode")
        )
    return found


FGSM = Contract(_FGSM, draw_linear, _observe_fgsm, _judge_fgsm)
RS_FGSM = Contract(_RS_FGSM, draw_linear, _observe_rs_fgsm, _judge_rs_fgsm)
PGD = Contract(_PGD, draw_linear, _observe_pgd, _judge_pgd)
ADVERSARIAL_LOSS = Contract(_LOSS, draw_linear, _observe_loss, _judge_loss)
