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
    flat_oracle,
    oracle,
    valley_oracle,
    z,
)
from robustkit.device import seeded
from robustkit.threat import TOLERANCE

FULL_STEPS, FULL_STEP = 10, 0.25  # in eps: 2.5 eps in all, enough to cross the ball from any start
SHORT_STEPS, SHORT_STEP = 3, 0.2  # 0.6 eps in all: the start and the number of steps stay visible
RS_STEP = 1.25  # in eps

Call = Callable[[LinearOracle, Tensor, Tensor], Any]


# --- observe: run and record ---------------------------------------------------------------------


def candidates_of(call: Call, case: Arrays, batch: str = "", model: LinearOracle | None = None) -> Array:
    """The candidates for one batch, with the model, the linear oracle by default, in eval mode."""
    model = (oracle(case) if model is None else model).eval()
    x = torch.from_numpy(case[f"{batch}x"].copy())
    result = call(model, x, torch.from_numpy(case[f"{batch}y"].copy()))
    if not isinstance(result, Tensor):
        raise TypeError(f"expected a torch tensor of candidates, got {type(result).__name__}")
    return result.detach().numpy()


def side_effects(call: Call, case: Arrays) -> list[str]:
    """Everything that calls leave behind: once amid training, with gradients collected, once at rest."""
    return [code for training in (True, False) for code in _side_effects_in(call, case, training)]


def _side_effects_in(call: Call, case: Arrays, training: bool) -> list[str]:
    model = oracle(case).train(training)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if training else None
    x, y = torch.from_numpy(case["x"].copy()), torch.from_numpy(case["y"].copy())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0x0DD5EED)  # so that a call which always sets the same seed is noticed
        random_state = torch.random.get_rng_state()
        result = call(model, x, y)
        drawn = not torch.equal(random_state, torch.random.get_rng_state())
    gradients = [parameter.grad for parameter in model.parameters()]
    erased = training and any(gradient is None or not gradient.any() for gradient in gradients)
    left = {
        "INPUT_MODIFIED": x.requires_grad
        or not np.array_equal(x.numpy(force=True), case["x"])
        or not np.array_equal(y.numpy(force=True), case["y"]),
        "WEIGHT_GRADIENTS_ERASED": erased,
        "WEIGHT_GRADIENTS_LEFT": not erased
        and any(gradient is not None and bool((gradient != training).any()) for gradient in gradients),
        "WEIGHTS_CHANGED": any(not torch.equal(weights[k], v) for k, v in model.state_dict().items())
        or not all(p.requires_grad for p in model.parameters()),
        "EVAL_MODE_MISSING": any(model.forwards),
        "MODE_NOT_RESTORED": any(module.training != training for module in model.modules()),
        # Dropout left on draws from the global state too; then the mode is the mistake to name.
        "GLOBAL_RANDOMNESS": drawn and not any(model.forwards),
        "GRAPH_RETURNED": bool(result.requires_grad),
    }
    return [code for code, happened in left.items() if happened]


def _observe_fgsm(attack: Any, case: Arrays) -> Arrays:
    def call(model: LinearOracle, x: Tensor, y: Tensor) -> Any:
        return attack(model, x, y, float(case["eps"]))

    return {
        "candidate": candidates_of(call, case),
        "corner": candidates_of(call, case, "corner_"),
        "flat": candidates_of(call, case, model=flat_oracle(case)),
        "left": text(side_effects(call, case)),
    }


def _observe_rs_fgsm(attack: Any, case: Arrays) -> Arrays:
    def seeded_call(seed: int) -> Call:
        return lambda model, x, y: attack(model, x, y, float(case["eps"]), seeded(seed, "rs"))

    return {
        "candidate": candidates_of(seeded_call(1), case),
        "corner": candidates_of(seeded_call(1), case, "corner_"),
        "valley": candidates_of(seeded_call(1), case, "valley_", valley_oracle(case)),
        "start": candidates_of(seeded_call(1), case, model=flat_oracle(case)),
        "same_seed": candidates_of(seeded_call(1), case),
        "other_start": candidates_of(seeded_call(2), case, model=flat_oracle(case)),
        "left": text(side_effects(seeded_call(1), case)),
    }


def observe_pgd(attack: Any, case: Arrays) -> Arrays:
    eps = float(case["eps"])

    def call(seed: int, steps: int, step: float) -> Call:
        return lambda model, x, y: attack(model, x, y, eps, steps, step * eps, seeded(seed, "pgd"))

    full, short = call(1, FULL_STEPS, FULL_STEP), call(1, SHORT_STEPS, SHORT_STEP)
    return {
        "candidate": candidates_of(full, case),
        "corner": candidates_of(full, case, "corner_"),
        "valley": candidates_of(full, case, "valley_", valley_oracle(case)),
        "start": candidates_of(short, case, model=flat_oracle(case)),
        "short": candidates_of(short, case),
        "same_seed": candidates_of(short, case),
        "other_start": candidates_of(call(2, SHORT_STEPS, SHORT_STEP), case, model=flat_oracle(case)),
        "left": text(side_effects(short, case)),
    }


def _observe_loss(loss_function: Any, case: Arrays) -> Arrays:
    """The loss, and what one `.backward()` adds to gradients that were there before (all ones)."""
    model = oracle(case, dropout=0.0).train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    x, y = torch.from_numpy(case["x"].copy()), torch.from_numpy(case["y"].copy())
    loss = loss_function(model, x, y, float(case["eps"]))
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise TypeError("expected a scalar tensor that the training loop can call .backward() on")
    forwards = list(model.forwards)
    if loss.requires_grad:
        loss.backward()
    added = [-torch.ones_like(p) if p.grad is None else p.grad - 1 for p in (model.w, model.b)]
    return {
        "loss": np.float64(loss.item()),
        "gradient_w": added[0].detach().numpy(),
        "gradient_b": added[1].detach().numpy(),
        "forwards": np.array(forwards, dtype=bool),
        "training": np.bool_(model.training and model.drop.training),
        "modified": np.bool_(not np.array_equal(x.numpy(force=True), case["x"])),
    }


# --- judge: findings from the record --------------------------------------------------------------


def unusable(case: Arrays, evidence: Arrays, names: tuple[str, ...]) -> tuple[str, str] | None:
    """Why the candidates cannot be judged at all, or None."""
    eps = float(case["eps"])
    for name in names:
        candidate, x = evidence[name], case[_BATCH.get(name, "x")]
        if candidate.shape != x.shape:
            return "WRONG_SHAPE", f"candidates have shape {candidate.shape}, the batch has {x.shape}"
        if candidate.dtype != np.float32:
            return "WRONG_DTYPE", f"candidates are {candidate.dtype}, the images are float32"
    if np.array_equal(evidence["candidate"], case["x"]):
        return "NO_EFFECT", "the candidates are the images themselves"
    if np.abs(evidence["candidate"]).max() <= eps + TOLERANCE["Linf"]:
        return "PERTURBATION_RETURNED", "these are changes of at most eps; return the changed images"
    return None


_BATCH = {"corner": "corner_x", "valley": "valley_x"}  # what was not recorded on the batch "x"
_FGSM_RECORDS = ("candidate", "corner", "flat")
_RS_FGSM_RECORDS = ("candidate", "corner", "valley", "start", "other_start", "same_seed")
PGD_RECORDS = (*_RS_FGSM_RECORDS, "short")


def _inside(case: Arrays, evidence: Arrays, names: tuple[str, ...]) -> list[Finding]:
    """Ball and box, for everything that was recorded."""
    eps, found = float(case["eps"]), []
    change = max(float(np.abs(evidence[name] - case[_BATCH.get(name, "x")]).max()) for name in names)
    if change > eps + TOLERANCE["Linf"]:
        found.append(
            Finding(
                "ball",
                "EPS_BALL_VIOLATED",
                f"the largest change of a pixel is {change:.3f}, allowed is {eps:g}",
            )
        )
    low = min(float(evidence[name].min()) for name in names)
    high = max(float(evidence[name].max()) for name in names)
    if low < 0 or high > 1:
        found.append(
            Finding("box", "BOX_VIOLATED", f"pixels reach [{low:.3f}, {high:.3f}]; images live in [0, 1]")
        )
    return found


HINTS = {
    "INPUT_MODIFIED": "the images or labels you were given are not as they were after the call; work on a copy",
    "WEIGHT_GRADIENTS_LEFT": "the call left gradients on the model's weights; only the input's gradient is needed",
    "WEIGHT_GRADIENTS_ERASED": "the weights had gradients before the call, and lost them; leave them as they were",
    "WEIGHTS_CHANGED": "the call changed the model's weights or froze them for good",
    "EVAL_MODE_MISSING": "the model was attacked in train mode, with dropout on: that is not the deployed model",
    "MODE_NOT_RESTORED": "the model came in train mode, or in eval mode, and left in another; put the mode back",
    "GLOBAL_RANDOMNESS": "torch's global random state moved; draw from the generator that you are given",
    "GRAPH_RETURNED": "the result still carries an autograd graph",
    "SEED_IGNORED": "the same generator seed gave two different results",
    "SAME_FOR_EVERY_SEED": "two different generator seeds gave the same result; the random part is missing",
    "START_CLIPPED": "black and white pixels lose part of their random start before the step; see the paper's order",
    "GRADIENT_ELSEWHERE": "on a model whose gradient changes from place to place the candidates go astray; "
    "at which points is your gradient taken?",
}


def hygiene(evidence: Arrays) -> list[Finding]:
    left = untext(evidence["left"])
    if not isinstance(left, list):
        raise TypeError("side effects are a list of codes")
    return [Finding("hygiene", code, HINTS[code]) for code in dict.fromkeys(left)]


def _reproducible(evidence: Arrays, first: str) -> bool:
    """Same seed, same result: the generator alone decides."""
    return np.array_equal(evidence[first], evidence["same_seed"])


def _displacement(case: Arrays, candidate: Array) -> Array:
    """Each pixel's move along the ascent direction, in units of eps."""
    return np.asarray((candidate - case["x"]) * ascent(case, case["y"]) / float(case["eps"]))


def _direction(case: Arrays, candidate: Array) -> tuple[str, str] | None:
    """Why candidates that should be x + eps * sign(gradient) are not, or None."""
    moved = _displacement(case, candidate)  # 1 everywhere when right
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
        mean = np.abs(moved).mean()
        hint = f"pixels move the right way, but by {mean:.2f} eps on average, not by eps"
        return "STEP_TOO_SMALL" if mean < 1 else "STEP_TOO_LARGE", hint
    return (
        "NOT_STEEPEST",
        f"only {100 * (np.abs(moved - 1) <= 1e-3).mean():.0f} % of the pixels are where the steepest step puts them",
    )


def _no_attack(case: Arrays, evidence: Arrays) -> tuple[str, str] | None:
    """Why candidates that start at random are no better than noise, or None."""
    moved = np.clip(_displacement(case, evidence["candidate"]), -1, 1).mean()  # noise: 0, to within 0.03
    if moved > 0.1:
        return None
    if moved < -0.1:
        return "WRONG_SIGN", "the pixels move so that the loss falls"
    return "NO_EFFECT", "the candidates raise the loss no more than noise does"


def _start(case: Arrays, evidence: Arrays) -> list[Finding]:
    """Judge where the attack starts: on the flat oracle it goes nowhere else."""
    start = (evidence["start"] - case["x"]).reshape(len(case["x"]), -1) / float(case["eps"])
    off = np.abs(np.sort(start, axis=None) - np.linspace(-1, 1, start.size)).max()
    if np.abs(start).max() < 1e-3:
        reason = "NO_RANDOM_START", "without a gradient to follow no pixel moves: the start is not random"
    elif off > 0.12 or (np.abs(start) > 0.999).mean() > 0.02:
        reason = "START_NOT_UNIFORM", "the start is not uniform over the whole ball"
    elif min(start.std(0).min(), start.std(1).min()) < 0.3:
        reason = "START_NOT_UNIFORM", "images, or the pixels of an image, share their random start"
    elif np.array_equal(evidence["start"], evidence["other_start"]):
        reason = "SAME_FOR_EVERY_SEED", HINTS["SAME_FOR_EVERY_SEED"]
    else:
        return []
    return [Finding("start", *reason)]


def _start_clipped(case: Arrays, evidence: Arrays) -> bool:
    """Whether random-start FGSM clamped its start into the box before the step.

    From an edge of the box, inwards, a start in the whole ball still falls short of the surface after
    1.25 eps on three pixels in eight; a start that was clamped first never does.
    """
    x, y = case["corner_x"], case["corner_y"]
    inwards = ascent(case, y) * (0.5 - x) > 0
    moved = np.abs(evidence["corner"] - x)[inwards] / float(case["eps"])
    return bool((moved > 0.999).mean() > 0.8)


def _travel(case: Arrays, evidence: Arrays, first: str, total: float) -> tuple[str, str] | None:
    """Why `first` is not `total` * eps further up the loss than the attack's start, or None.

    `first` is compared with the start pixel by pixel; when the seed does not bring the same start back,
    the two distributions are.
    """
    moved = np.clip(_displacement(case, evidence[first]), -1, 1)
    start = np.clip(_displacement(case, evidence["start"]), -1, 1)
    tolerance = 0.005
    if not _reproducible(evidence, first):
        moved, start, tolerance = np.sort(moved, axis=None), np.sort(start, axis=None), 0.06

    def off(distance: float) -> Array:
        return np.asarray(np.abs(moved - np.clip(start + distance, -1, 1)))

    if off(total).mean() <= tolerance:
        return None
    if off(-total).mean() <= tolerance:
        return "WRONG_SIGN", "the pixels move so that the loss falls"
    honest = breakable(case, case["x"], case["y"], 0.0) == 0
    if len(moved) == len(honest) and off(total)[honest].mean() <= tolerance:
        return (
            "LABEL_IGNORED",
            "misclassified images are moved towards their true class; use the labels you are given",
        )
    free = np.abs(moved) < 0.999
    shown = f"{(moved - start)[free].mean():.2f} eps" if free.any() else "to the surface of the ball"
    return "STEP_SIZE", f"from their start, pixels travel {shown} where {total:.3g} eps is asked"


def _strays(case: Arrays, evidence: Arrays, arrives: bool) -> bool:
    """Whether the attack on the valley oracle followed a gradient taken elsewhere than where it was.

    Label 0 climbs out of the valley: every pixel must end at the ball's surface. Label 1 descends into
    it: an attack in small steps must arrive at the bottom, to within a step.
    """
    eps, climbs = float(case["eps"]), case["valley_y"] == 0
    climbed = np.abs(evidence["valley"] - case["valley_x"])[climbs]
    height = np.abs(evidence["valley"] - 0.5)[~climbs]
    return bool(climbed.min() < 0.999 * eps or (arrives and height.max() > (FULL_STEP + 0.01) * eps))


_FGSM = ("ball", "box", "closed_form", "hygiene")
_RS_FGSM = ("ball", "box", "start", "step", "hygiene")
_PGD = ("ball", "box", "closed_form", "start", "steps", "hygiene")
_LOSS = ("loss", "gradient", "modes")


def _judge_fgsm(case: Arrays, evidence: Arrays) -> list[Finding]:
    if reason := unusable(case, evidence, _FGSM_RECORDS):
        return [Finding(criterion, *reason) for criterion in _FGSM]
    found = _inside(case, evidence, _FGSM_RECORDS) + hygiene(evidence)
    if reason := _direction(case, evidence["candidate"]):
        found.append(Finding("closed_form", *reason))
    return found


def _judge_rs_fgsm(case: Arrays, evidence: Arrays) -> list[Finding]:
    if reason := unusable(case, evidence, _RS_FGSM_RECORDS):
        return [Finding(criterion, *reason) for criterion in _RS_FGSM]
    if reason := _no_attack(case, evidence):
        return [Finding(criterion, *reason) for criterion in _RS_FGSM]
    start = _start(case, evidence)
    found = _inside(case, evidence, _RS_FGSM_RECORDS) + hygiene(evidence) + start
    if not _reproducible(evidence, "candidate"):
        found.append(Finding("hygiene", "SEED_IGNORED", HINTS["SEED_IGNORED"]))
    reason = _travel(case, evidence, "candidate", RS_STEP)
    # A longer step hides a clipped start, so that only a right one tells.
    if not start and reason is None and _start_clipped(case, evidence):
        found.append(Finding("start", "START_CLIPPED", HINTS["START_CLIPPED"]))
    if reason is not None:
        found.append(Finding("step", *reason))
    elif _strays(case, evidence, arrives=False):
        found.append(Finding("step", "GRADIENT_ELSEWHERE", HINTS["GRADIENT_ELSEWHERE"]))
    return found


def judge_pgd(case: Arrays, evidence: Arrays) -> list[Finding]:
    if reason := unusable(case, evidence, PGD_RECORDS):
        return [Finding(criterion, *reason) for criterion in _PGD]
    found = _inside(case, evidence, PGD_RECORDS) + hygiene(evidence) + _start(case, evidence)
    if not _reproducible(evidence, "short"):
        found.append(Finding("hygiene", "SEED_IGNORED", HINTS["SEED_IGNORED"]))
    if reason := _direction(case, evidence["candidate"]):
        broken = (z(case, evidence["candidate"]) > 0) != (case["y"] == 1)
        should = breakable(case, case["x"], case["y"], float(case["eps"]))
        wrong = int(((broken != (should == 1)) & (should >= 0)).sum())
        hint = f"{reason[1]}; {wrong} images are broken that should not be, or the reverse"
        found.append(Finding("closed_form", reason[0], hint))
    elif _strays(case, evidence, arrives=True):
        found.append(Finding("closed_form", "GRADIENT_ELSEWHERE", HINTS["GRADIENT_ELSEWHERE"]))
    reason = _travel(case, evidence, "short", SHORT_STEPS * SHORT_STEP)
    if reason is not None and reason[0] == "STEP_SIZE":
        hint = f"asked for {SHORT_STEPS} steps of {SHORT_STEP:g} eps: {reason[1]}"
        found.append(Finding("steps", "STEP_COUNT", hint))
    elif reason is not None and reason[0] == "WRONG_SIGN":
        found.append(Finding("steps", *reason))
    return found


def _judge_loss(case: Arrays, evidence: Arrays) -> list[Finding]:
    eps, found = float(case["eps"]), []
    candidate = np.clip(case["x"] + eps * ascent(case, case["y"]), 0, 1)
    expected, gradient_w, gradient_b = adversarial_cross_entropy(case, candidate)
    clean, _, _ = adversarial_cross_entropy(case, case["x"])
    loss, n = evidence["loss"].item(), len(case["x"])
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
    elif evidence["modified"].item():
        found.append(Finding("loss", "INPUT_MODIFIED", HINTS["INPUT_MODIFIED"]))
    got_w, got_b = evidence["gradient_w"], evidence["gradient_b"]
    if found and found[0].code not in {"LOSS_SUMMED", "INPUT_MODIFIED"}:
        found.append(Finding("gradient", found[0].code, "the gradient is that of the wrong loss"))
    elif got_w.shape != gradient_w.shape or got_b.shape != gradient_b.shape:
        raise ValueError("gradients of other shapes than the weights")
    else:
        scale = n if found and found[0].code == "LOSS_SUMMED" else 1
        got = np.append(got_w, got_b)
        off = got - scale * np.append(gradient_w, gradient_b)
        if not got.any():
            hint = "calling .backward() on the loss gives the weights no gradient"
            found.append(Finding("gradient", "NO_GRADIENT", hint))
        elif np.abs(off + 1).max() <= 1e-4 * scale:  # the ones that were there before are gone
            found.append(Finding("gradient", "WEIGHT_GRADIENTS_ERASED", HINTS["WEIGHT_GRADIENTS_ERASED"]))
        elif np.abs(off).max() > 1e-4 * scale:
            hint = "after .backward(), .grad is not that of the adversarial loss; did the candidates leave something?"
            found.append(Finding("gradient", "WEIGHT_GRADIENTS_LEFT", hint))
    forwards = evidence["forwards"].astype(bool)
    if len(forwards) < 2 or forwards[0]:
        found.append(Finding("modes", "EVAL_MODE_MISSING", "the candidates were not made in eval mode"))
    elif not forwards[-1] or not evidence["training"].item():
        found.append(
            Finding("modes", "TRAIN_MODE_MISSING", "the loss was computed with the model in eval mode")
        )
    return found


FGSM = Contract(_FGSM, draw_linear, _observe_fgsm, _judge_fgsm, essential=("closed_form",))
RS_FGSM = Contract(_RS_FGSM, draw_linear, _observe_rs_fgsm, _judge_rs_fgsm, essential=("start", "step"))
PGD = Contract(_PGD, draw_linear, observe_pgd, judge_pgd, essential=("closed_form", "steps"))
ADVERSARIAL_LOSS = Contract(_LOSS, draw_linear, _observe_loss, _judge_loss, essential=("loss", "gradient"))
