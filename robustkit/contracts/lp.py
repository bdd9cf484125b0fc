"""Contracts of PGD in two norms, part by part: projection, random start, and the whole with its restarts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustkit.contracts.attacks import (
    HINTS,
    PGD_RECORDS,
    candidates_of,
    judge_pgd,
    observe_pgd,
    unusable,
)
from robustkit.contracts.base import Array, Arrays, Contract, Finding, everywhere, numbers, shaped
from robustkit.contracts.oracle import (
    SHAPE,
    ForkOracle,
    ascent,
    breakable,
    draw_linear,
    flat_oracle,
    uniform,
)
from robustkit.device import seeded
from robustkit.losses import cross_entropy
from robustkit.threat import TOLERANCE, Ball

NORMS = {"linf": "Linf", "l2": "L2"}  # the names of criteria and records, and the kit's of the norms


def size(change: Array, norm: str) -> Array:
    """The norm of each image's change, in float64."""
    flat = change.reshape(len(change), -1).astype(np.float64)
    return np.asarray(np.abs(flat).max(1) if norm == "Linf" else np.sqrt((flat**2).sum(1)))


def _draw_eps(generator: torch.Generator, low: float, high: float) -> np.float64:
    return np.float64(round(uniform(generator, low, high, 1).item(), 3))


def _outside_box(points: list[Array]) -> list[Finding]:
    low, high = min(float(p.min()) for p in points), max(float(p.max()) for p in points)
    if low >= 0 and high <= 1:
        return []
    hint = f"pixels reach [{low:.3f}, {high:.3f}]; images live in [0, 1]"
    return [Finding("box", "BOX_VIOLATED", hint)]


# --- projection -----------------------------------------------------------------------------------

_NO_NUMBER = -9.0  # stands in the record for what is not a number


def _draw_projection(seed: int) -> Arrays:
    """Images; for each norm candidates inside ball and box, the first of them an image itself, and far ones."""
    generator = seeded(seed, "projection in two norms")
    x = torch.rand(24, *SHAPE, generator=generator)
    case: Arrays = {"x": x.numpy()}
    for name, (low, high) in {"linf": (0.05, 0.15), "l2": (0.4, 0.8)}.items():
        eps = _draw_eps(generator, low, high)
        ball = Ball(NORMS[name], float(eps))
        near = ball.candidates(x, 0.5 * ball.random(x, generator))
        near[0] = x[0]
        case |= {
            f"eps_{name}": eps,
            f"near_{name}": near.numpy(),
            f"far_{name}": (x + 0.4 * (2 * torch.rand(x.shape, generator=generator) - 1)).numpy(),
        }
    return case


def _observe_projection(project: Any, case: Arrays) -> Arrays:
    seen: Arrays = {}
    for name, norm in NORMS.items():
        for kind in ("near", "far"):
            x, candidate = (torch.from_numpy(case[key].copy()) for key in ("x", f"{kind}_{name}"))
            points = numbers(project(x, candidate, norm, float(case[f"eps_{name}"])))
            seen[f"{kind}_{name}"] = np.nan_to_num(points, nan=_NO_NUMBER)
            kept = np.array_equal(candidate, case[f"{kind}_{name}"]) and np.array_equal(x, case["x"])
            seen[f"{kind}_{name}_kept"] = np.bool_(kept)
    return seen


def _judge_projection(case: Arrays, evidence: Arrays) -> list[Finding]:
    x, found = case["x"].astype(np.float64), []
    records = [f"{kind}_{name}" for name in NORMS for kind in ("near", "far")]
    for record in records:
        if evidence[record].shape != x.shape:
            hint = f"expected images of shape {x.shape}, got shape {evidence[record].shape}"
            return everywhere(BALL_PROJECTION, "WRONG_SHAPE", hint)
    for name, norm in NORMS.items():
        eps, far, got = float(case[f"eps_{name}"]), case[f"far_{name}"], evidence[f"far_{name}"]
        change = size(got - x, norm).max()
        if change > eps + TOLERANCE[norm]:
            hint = f"{norm}: an image is still {change:.3f} from its original; allowed is {eps:g}"
            found.append(Finding(name, "EPS_BALL_VIOLATED", hint))
        elif not _nearest(got, far, Ball(norm, eps), x):
            hint = f"{norm}: a far point should go to the nearest one that is allowed, each image by itself"
            found.append(Finding(name, "NOT_NEAREST", hint))
    found += _outside_box([evidence[f"far_{name}"] for name in NORMS])
    return found + _inside_moved(case, evidence)


def _nearest(got: Array, far: Array, ball: Ball, x: Array) -> bool:
    """Whether points are as near to the far ones as ball, then box, bring them; in L2 to within 5 %.

    In L2 that order is not the projection onto both at once, which comes a little nearer.
    """
    right = ball.candidates(torch.from_numpy(x), torch.from_numpy(far - x)).numpy()
    got = np.clip(got, 0, 1)
    if ball.norm == "Linf":
        return bool(np.allclose(got, right, atol=1e-6))
    return bool((size(got - far, "L2") <= 1.05 * size(right - far, "L2")).all())


def _inside_moved(case: Arrays, evidence: Arrays) -> list[Finding]:
    for name, norm in NORMS.items():
        near = evidence[f"near_{name}"]
        if (near[0] == _NO_NUMBER).any():
            hint = f"{norm}: a candidate equal to its image becomes NaN: what do you divide by?"
            return [Finding("inside", "DIVIDED_BY_ZERO", hint)]
        if not np.allclose(near, case[f"near_{name}"], atol=1e-6):
            hint = f"{norm}: a point that is already allowed was moved; a projection leaves it alone"
            return [Finding("inside", "INTERIOR_MOVED", hint)]
    if not all(evidence[f"{kind}_{name}_kept"].item() for name in NORMS for kind in ("near", "far")):
        return [Finding("inside", "INPUT_MODIFIED", HINTS["INPUT_MODIFIED"])]
    return []


BALL_PROJECTION = Contract(
    ("linf", "l2", "box", "inside"),
    _draw_projection,
    _observe_projection,
    _judge_projection,
    essential=("linf", "l2"),
)


# --- random start ---------------------------------------------------------------------------------


def _draw_start(seed: int) -> Arrays:
    """Many small images far from the box's walls, so that the distribution shows, and a few in its corners."""
    generator = seeded(seed, "random start")
    return {
        "x": (0.4 + 0.2 * torch.rand(512, 2, 1, 2, generator=generator)).numpy(),
        "corner": (torch.rand(32, 2, 1, 2, generator=generator) < 0.5).float().numpy(),
        "eps_linf": _draw_eps(generator, 0.1, 0.3),
        "eps_l2": _draw_eps(generator, 0.2, 0.35),
    }


def _observe_start(random_start: Any, case: Arrays) -> Arrays:
    def points(batch: str, name: str, seed: int) -> Array:
        x = torch.from_numpy(case[batch].copy())
        given = random_start(x, NORMS[name], float(case[f"eps_{name}"]), seeded(seed, "start"))
        kept.append(np.array_equal(x, case[batch]))
        return numbers(given)

    kept: list[bool] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0x0DD5EED)
        before = torch.random.get_rng_state()
        seen: Arrays = {name: points("x", name, 1) for name in NORMS}
        seen |= {f"{name}_again": points("x", name, 1) for name in NORMS}
        seen |= {f"{name}_other": points("x", name, 2) for name in NORMS}
        seen |= {f"{name}_corner": points("corner", name, 3) for name in NORMS}
        seen["drawn"] = np.bool_(not torch.equal(before, torch.random.get_rng_state()))
    return seen | {"kept": np.bool_(all(kept))}


def _judge_start(case: Arrays, evidence: Arrays) -> list[Finding]:
    shapes = {f"{name}{record}": case["x"].shape for name in NORMS for record in ("", "_again", "_other")}
    shapes |= {f"{name}_corner": case["corner"].shape for name in NORMS}
    shaped(evidence, shapes | {"kept": (), "drawn": ()})
    found = _outside_box([evidence[record] for record in shapes])
    for name, norm in NORMS.items():
        eps = float(case[f"eps_{name}"])
        records = {name: "x", f"{name}_corner": "corner"}
        change = max(float(size(evidence[r] - case[batch], norm).max()) for r, batch in records.items())
        unit = (evidence[name] - case["x"]).reshape(len(case["x"]), -1) / eps
        reason: tuple[str, str] | None = None
        if change > eps + TOLERANCE[norm]:
            reason = "EPS_BALL_VIOLATED", f"a start lies {change:.3f} from its image; allowed is {eps:g}"
        elif np.abs(unit).max() < 1e-3:
            reason = "NO_RANDOM_START", "the starts are the images themselves"
        elif np.array_equal(evidence[name], evidence[f"{name}_other"]):
            reason = "SAME_FOR_EVERY_SEED", HINTS["SAME_FOR_EVERY_SEED"]
        elif told := _not_uniform(unit, norm):
            reason = "START_NOT_UNIFORM", told
        if reason:
            found.append(Finding(name, reason[0], f"{norm}: {reason[1]}"))
    left = {
        "SEED_IGNORED": any((evidence[name] != evidence[f"{name}_again"]).any() for name in NORMS),
        "GLOBAL_RANDOMNESS": evidence["drawn"].item(),
        "INPUT_MODIFIED": not evidence["kept"].item(),
    }
    return found + [Finding("hygiene", code, HINTS[code]) for code, happened in left.items() if happened]


def _not_uniform(unit: Array, norm: str) -> str | None:
    """Why changes, in units of eps, are not uniform over the ball's volume, or None.

    Kolmogorov's distance, at a level of one in a million; in d dimensions the share of a ball's volume
    within r is r**d.
    """

    def off(uniform: Array) -> float:
        return float(np.abs(np.sort(uniform, axis=None) - np.linspace(0, 1, uniform.size)).max())

    if norm == "Linf":
        if off((unit + 1) / 2) > 0.06:
            return "the starts are not uniform over the whole cube"
        shared = unit.std(0).min() < 0.3 or unit.std(1).mean() < 0.3
    else:
        radius = np.linalg.norm(unit, axis=1)
        if off(radius ** unit.shape[1]) > 0.12:
            mean = radius.mean()
            return f"the starts lie {mean:.2f} eps from their images on average; how much volume is within r?"
        direction = unit / np.maximum(radius, 1e-12)[:, None]
        spread = direction.T @ direction / len(unit) - np.eye(unit.shape[1]) / unit.shape[1]
        shared = np.abs(direction.mean(0)).max() > 0.12 or np.abs(spread).max() > 0.08
    return "images, or the pixels of an image, share their direction" if shared else None


RANDOM_START = Contract(
    ("linf", "l2", "box", "hygiene"), _draw_start, _observe_start, _judge_start, essential=("linf", "l2")
)


# --- PGD in both norms ----------------------------------------------------------------------------

L2_STEPS, L2_STEP = 40, 0.5  # in eps: the angle to the steepest direction shrinks by a third at each step
RESTARTS = 8  # on the fork, one image in 256 is still left
FORKED = 64
_FEW = FORKED - 6


def _draw_pgd(seed: int) -> Arrays:
    """The linear oracle's case; its images leave room for an L2 step of 5 eps along the gradient."""
    case = draw_linear(seed)
    return case | {"eps_l2": np.float64(5 * case["eps"])}


def _observe_pgd(attack: Any, case: Arrays) -> Arrays:
    eps, eps_l2 = float(case["eps"]), float(case["eps_l2"])

    def linf(model: Any, x: Tensor, y: Tensor, eps: float, steps: int, step: float, generator: Any) -> Any:
        return attack(model, x, y, "Linf", eps, steps, step, 1, cross_entropy, generator)

    def l2(model: Any, x: Tensor, y: Tensor, steps: int = L2_STEPS) -> Any:
        step = L2_STEP * eps_l2
        return attack(model, x, y, "L2", eps_l2, steps, step, 1, cross_entropy, seeded(1, "pgd"))

    def short(model: Any, x: Tensor, y: Tensor) -> Any:
        return l2(model, x, y, steps=3)

    def downhill(model: Any, x: Tensor, y: Tensor) -> Any:
        def loss(logits: Tensor, y: Tensor) -> Tensor:
            return -cross_entropy(logits, y)

        return attack(model, x, y, "Linf", eps, 10, 0.25 * eps, 1, loss, seeded(1, "pgd"))

    def forked(restarts: int) -> Array:
        x, y = torch.full((FORKED, *SHAPE), 0.5 - 0.02 * eps), torch.ones(FORKED, dtype=torch.int64)
        generator = seeded(1, "fork")
        found = attack(ForkOracle(eps), x, y, "Linf", eps, 10, 0.25 * eps, restarts, cross_entropy, generator)
        return numbers(found)[:, 0, 0, 0]

    return {
        **observe_pgd(linf, case),
        "l2": candidates_of(l2, case),
        "l2_corner": candidates_of(short, case, "corner_"),
        "l2_start": candidates_of(short, case, model=flat_oracle(case)),
        "downhill": candidates_of(downhill, case),
        "one": forked(1),
        "many": forked(RESTARTS),
    }


def _judge_pgd(case: Arrays, evidence: Arrays) -> list[Finding]:
    if reason := unusable(case, evidence, PGD_RECORDS):
        return everywhere(PGD_LP, *reason)
    in_l2 = {"l2": case["x"], "l2_start": case["x"], "l2_corner": case["corner_x"]}
    shapes = {record: x.shape for record, x in in_l2.items()}
    shaped(evidence, shapes | {"downhill": case["x"].shape, "one": (FORKED,), "many": (FORKED,)})
    found, eps_l2 = judge_pgd(case, evidence), float(case["eps_l2"])
    change = max(float(size(evidence[record] - x, "L2").max()) for record, x in in_l2.items())
    if change > eps_l2 + TOLERANCE["L2"]:
        hint = f"L2: the largest change of an image is {change:.3f}, allowed is {eps_l2:g}"
        found.append(Finding("ball", "EPS_BALL_VIOLATED", hint))
    found += _outside_box([evidence[record] for record in in_l2])
    if size(evidence["l2_start"] - case["x"], "L2").max() < 1e-3:
        hint = "L2: without a gradient to follow no pixel moves: the start is not random"
        found.append(Finding("start", "NO_RANDOM_START", hint))
    if reason := _not_steepest(case, evidence["l2"]):
        found.append(Finding("l2", *reason))
    along = (evidence["downhill"] - case["x"]) * ascent(case, case["y"]) / float(case["eps"])
    if np.abs(along + 1).max() > 1e-3:
        hint = "given a loss that falls where cross-entropy rises, the candidates do not turn round"
        found.append(Finding("loss", "LOSS_IGNORED", hint))
    one, many = (_fooled_fork(case, evidence[record]) for record in ("one", "many"))
    if many < _FEW:
        hint = (
            f"on a model where half of all starts fail, one run fools {one} of {FORKED} images and {RESTARTS} "
            f"runs fool {many}; what should be kept of each run, and for which images?"
        )
        found.append(Finding("restarts", "RESTARTS_WASTED", hint))
    elif one > _FEW:
        hint = f"asked for one run, {one} of {FORKED} images fall where half should: more runs than asked for"
        found.append(Finding("restarts", "RESTARTS_UNASKED", hint))
    return found


def _fooled_fork(case: Arrays, pixel: Array) -> int:
    u = (pixel - 0.5) / float(case["eps"])
    if np.abs(u).max() > 1.03:
        raise ValueError("pixels outside the ball")
    return int((np.maximum(1.5 * u, -0.5 * u) > 1).sum())


def _not_steepest(case: Arrays, candidate: Array) -> tuple[str, str] | None:
    """Why candidates are not an eps along the gradient, in L2, from their images; or None."""
    w = np.abs(case["w"].astype(np.float64)) / np.linalg.norm(case["w"].astype(np.float64))
    right = ascent(case, case["y"]).reshape(len(candidate), -1) * w
    moved = (candidate - case["x"]).reshape(len(candidate), -1).astype(np.float64) / float(case["eps_l2"])
    off = np.abs(moved - right).max(1)
    if off.max() <= 5e-3:
        return None
    along = float((moved * right).sum(1).mean())
    if along < -0.5:
        return "WRONG_SIGN", "L2: the images move so that the loss falls"
    if off[breakable(case, case["x"], case["y"], 0.0) == 0].max() <= 5e-3:
        return "LABEL_IGNORED", "L2: misclassified images are moved towards their true class"
    hint = f"L2: the images end {along:.2f} eps along the steepest direction, not 1; which step is steepest in L2?"
    return "NOT_STEEPEST", hint


PGD_LP = Contract(
    ("ball", "box", "closed_form", "l2", "start", "steps", "restarts", "loss", "hygiene"),
    _draw_pgd,
    _observe_pgd,
    _judge_pgd,
    essential=("closed_form", "l2", "steps"),
)
