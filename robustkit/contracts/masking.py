"""Contracts of the audit by hand: name the reason why an attack fails, and take it away.

`suspects` are the models of the lesson that report a robustness; all but the last are no more robust than the
ordinary network behind them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustkit.contracts.base import (
    Array,
    Arrays,
    Contract,
    Finding,
    everywhere,
    measured,
    numbers,
    shaped,
    text,
    untext,
)
from robustkit.contracts.oracle import SHAPE, LinearOracle, ValleyOracle, draw_linear, uniform
from robustkit.data import load
from robustkit.device import attackable, seeded, strict_fp32, tier
from robustkit.models import pretrained
from robustkit.results import Interval
from robustkit.threat import Ball

# --- diagnosis ------------------------------------------------------------------------------------

KINDS = ("honest", "saturated", "shattered", "random")
_OF_EACH = 4


class Masked(nn.Module):
    """A model behind noise and a quantiser, its logits scaled: `levels` 0 is none, `noise` 0 is none."""

    def __init__(self, model: nn.Module, scale: float, noise: float, levels: int) -> None:
        super().__init__()
        self.model, self.scale, self.noise, self.levels = model, scale, noise, levels

    def forward(self, x: Tensor) -> Tensor:
        if self.noise:
            x = x + self.noise * torch.randn_like(x)
        if self.levels:
            x = (self.levels * x).round() / self.levels
        logits: Tensor = self.model(x)
        return self.scale * logits


def _draw_diagnosis(seed: int) -> Arrays:
    """A linear model behind several of each kind of mask, in an order that tells nothing.

    Most of its pixels decide nothing, and more than half of its labels are wrong. Images are far from the
    boundary or near it; one honest model in two is so sure of the far ones, fewer than half of those it reads
    right, that their cross-entropy has no gradient.
    """
    generator = seeded(seed, "diagnosis")
    d, images = int(np.prod(SHAPE)), 64
    w = 0.05 + uniform(generator, 0, 0.2, d)
    w[torch.randperm(d, generator=generator)[: 6 * d // 10].numpy()] = 0
    w *= np.where(uniform(generator, 0, 1, d) < 0.5, -1, 1)
    far = np.arange(images) % 8 < 3
    along = np.where(far, uniform(generator, 0.15, 0.2, images), uniform(generator, 0.01, 0.018, images))
    label = torch.randint(2, (images,), generator=generator).numpy()
    x = 0.5 + (along * (2 * label - 1))[:, None] * np.sign(w)
    y = np.where(np.arange(images) // 8 < 5, 1 - label, label)
    # The logits of a far image then differ by 110 at least, those of a near one by 14 at most.
    sure = 110 / (2 * 0.15 * np.abs(w).sum())
    n = len(KINDS) * _OF_EACH
    kind = torch.randperm(n, generator=generator) % len(KINDS)
    is_kind = {name: (kind == i).numpy() for i, name in enumerate(KINDS)}
    scale = uniform(generator, 1, 10, n)  # where cross-entropy still has a gradient
    scale[np.flatnonzero(is_kind["honest"])[::2]] = sure
    scale[is_kind["saturated"]] = 10 ** uniform(generator, 5, 7, _OF_EACH)
    noise = np.where(is_kind["random"], uniform(generator, 0.02, 0.2, n), 0.0)
    levels = np.where(is_kind["shattered"], torch.randint(4, 17, (n,), generator=generator).numpy(), 0)
    return {
        "w": w.astype(np.float32),
        "x": x.reshape(images, *SHAPE).astype(np.float32),
        "y": y,
        "scale": scale,
        "noise": noise,
        "levels": levels,
        "kind": kind.numpy(),
    }


def _observe_diagnosis(diagnose: Any, case: Arrays) -> Arrays:
    said = []
    with torch.random.fork_rng(devices=[]):
        for i, (scale, noise, levels) in enumerate(
            zip(case["scale"], case["noise"], case["levels"], strict=True)
        ):
            torch.manual_seed(i)  # the models draw their noise from the global state
            oracle = LinearOracle(torch.from_numpy(case["w"]), 0.0, dropout=0.0)
            model = Masked(oracle, float(scale), float(noise), int(levels)).eval()
            x, y = torch.from_numpy(case["x"].copy()), torch.from_numpy(case["y"].copy())
            said.append(str(diagnose(model, x, y)))
    return {"said": text(said)}


def _judge_diagnosis(case: Arrays, evidence: Arrays) -> list[Finding]:
    said = untext(evidence["said"])
    if (
        not isinstance(said, list)
        or len(said) != len(case["kind"])
        or not all(isinstance(s, str) for s in said)
    ):
        raise TypeError("one word for each model")
    if len(set(said)) == 1:
        return everywhere(DIAGNOSIS, "ALWAYS_THE_SAME", f"you say {said[0]!r} of every model")
    found: dict[str, Finding] = {}
    for kind, answer in zip(case["kind"], said, strict=True):
        name = KINDS[kind]
        if answer == name or name in found:
            continue
        if answer not in KINDS:
            found[name] = Finding(
                name, "UNKNOWN_KIND", f"you say {answer!r}; the kinds are {', '.join(KINDS)}"
            )
        elif name == "honest":
            found[name] = Finding(name, "FALSE_ALARM", f"a model without a mask is called {answer!r}")
        else:
            found[name] = Finding(name, "WRONG_DIAGNOSIS", f"one of these models is called {answer!r}")
    return list(found.values())


DIAGNOSIS = Contract(
    KINDS,
    _draw_diagnosis,
    _observe_diagnosis,
    _judge_diagnosis,
    essential=("saturated", "shattered", "random"),
    hidden=("kind",),
)


# --- expectation over transformation --------------------------------------------------------------

DRAWS, _KEPT = 25, 0.5


class Sieve(nn.Module):
    """z = <w, m (x - 0.5)> with a fresh m for every image of every call: a pixel is kept, doubled, or dropped.

    It counts the images that it is asked about.
    """

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())
        self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        kept = (torch.rand_like(x) < _KEPT).float() / _KEPT
        z = (kept * (x - 0.5)).flatten(1) @ self.w
        return torch.stack([-z, z], 1)


def _draw_sieve(seed: int) -> Arrays:
    case = draw_linear(seed)
    return {"w": case["w"], "x": case["x"]}


def _observe_eot(eot: Any, case: Arrays) -> Arrays:
    x = torch.from_numpy(case["x"].copy()).requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Sieve(torch.from_numpy(case["w"])).eval()
        logits = eot(model, DRAWS)(x)
    gradient = (
        torch.autograd.grad(logits[..., -1].sum(), x)[0] if logits.requires_grad else torch.zeros_like(x)
    )
    return {"logits": numbers(logits), "gradient": numbers(gradient), "asked": np.int64(model.asked)}


def _judge_eot(case: Arrays, evidence: Arrays) -> list[Finding]:
    x = case["x"].astype(np.float64).reshape(len(case["x"]), -1) - 0.5
    w = case["w"].astype(np.float64)
    shaped(evidence, {"gradient": case["x"].shape, "asked": ()})
    if evidence["logits"].shape != (len(x), 2):
        hint = f"expected logits of shape {(len(x), 2)}, got {evidence['logits'].shape}"
        return everywhere(EOT, "WRONG_SHAPE", hint)
    spread = (1 / _KEPT - 1) / DRAWS  # the variance of a pixel's mean factor
    off = (evidence["logits"] * [-1, 1] - (x @ w)[:, None]) / np.sqrt(spread * ((x * w) ** 2).sum(1))[:, None]
    factor = (evidence["gradient"].reshape(len(x), -1) / w - 1) / np.sqrt(spread)
    found = []
    if np.abs(off.mean(0)).max() > 0.75:
        hint = f"the logits are not the mean of those of {DRAWS} calls"
        found.append(Finding("mean", "NOT_THE_MEAN", hint))
    if (asked := evidence["asked"].item()) != DRAWS * len(x):
        hint = f"the model is asked {asked / len(x):g} times about each image, not {DRAWS} times"
        found.append(Finding("fresh", "WRONG_DRAWS", hint))
    elif not 0.4 < (ratio := float((off**2).mean())) < 2.2:
        hint = f"the answers scatter {ratio:.2g} times as much as those of {DRAWS} fresh draws do"
        found.append(Finding("fresh", "WRONG_DRAWS", hint))
    if not evidence["gradient"].any():
        found.append(Finding("gradient", "NO_GRADIENT", "no gradient comes back from the mean to the image"))
    elif not 0.5 < float((factor**2).mean()) < 1.6:
        hint = f"the gradient is not the mean of the gradients of {DRAWS} fresh draws"
        found.append(Finding("gradient", "WRONG_GRADIENT", hint))
    return found


EOT = Contract(("mean", "fresh", "gradient"), _draw_sieve, _observe_eot, _judge_eot, essential=("fresh",))


# --- backward pass differentiable approximation ---------------------------------------------------


def _draw_bpda(seed: int) -> Arrays:
    """Images around 0.5, where the valley oracle's gradient turns, and a quantiser that carries pixels across."""
    generator = seeded(seed, "bpda")
    case = draw_linear(seed)
    x = 0.5 + 0.3 * (2 * torch.rand(32, *case["x"].shape[1:], generator=generator) - 1)
    levels = 2 * int(torch.randint(2, 5, (), generator=generator)) + 1
    shift = 0.3 / levels  # so that rounding moves many pixels past the middle
    return {
        "w": case["w"],
        "b": case["b"],
        "x": x.numpy(),
        "levels": np.int64(levels),
        "shift": np.float64(shift),
    }


def _part(case: Arrays, x: Array) -> Array:
    """The quantiser, in numpy: nothing comes back from it."""
    levels = int(case["levels"])
    return np.asarray(np.round(levels * (x + float(case["shift"]))) / levels, dtype=np.float32)


def _observe_bpda(bpda: Any, case: Arrays) -> Arrays:
    def part(x: Tensor) -> Tensor:
        return torch.from_numpy(_part(case, x.detach().numpy()))

    model = ValleyOracle(torch.from_numpy(case["w"]), float(case["b"])).eval()
    x = torch.from_numpy(case["x"].copy()).requires_grad_()
    with attackable(model):
        logits = bpda(part, model)(x)
        gradient = (
            torch.autograd.grad(logits[..., -1].sum(), x)[0] if logits.requires_grad else torch.zeros_like(x)
        )
    return {"logits": numbers(logits), "gradient": numbers(gradient)}


def _judge_bpda(case: Arrays, evidence: Arrays) -> list[Finding]:
    w = np.abs(case["w"].astype(np.float64))
    passed = _part(case, case["x"]).reshape(len(case["x"]), -1).astype(np.float64)
    plain = case["x"].reshape(len(case["x"]), -1).astype(np.float64)
    shaped(evidence, {"gradient": case["x"].shape})
    if evidence["logits"].shape != (len(plain), 2):
        hint = f"expected logits of shape {(len(plain), 2)}, got {evidence['logits'].shape}"
        return everywhere(BPDA, "WRONG_SHAPE", hint)

    def logits(x: Array) -> Array:
        z = np.abs(x - 0.5) @ w + float(case["b"])
        return np.stack([-z, z], 1)

    gradient, found = evidence["gradient"].reshape(plain.shape), []
    if not np.allclose(evidence["logits"], logits(passed), atol=1e-4):
        skipped = np.allclose(evidence["logits"], logits(plain), atol=1e-4)
        code = "PART_SKIPPED" if skipped else "WRONG_VALUE"
        hint = "going forward, the logits must be those of the model behind the part, as deployed"
        found.append(Finding("value", code, hint))
    if not gradient.any():
        hint = "no gradient comes back: the part is still in the way"
        found.append(Finding("gradient", "NO_GRADIENT", hint))
    elif not np.allclose(gradient, w * np.sign(passed - 0.5), atol=1e-4):
        hint = "the gradient is not the model's, taken at what the part makes of the image"
        found.append(Finding("gradient", "GRADIENT_ELSEWHERE", hint))
    return found


BPDA = Contract(("value", "gradient"), _draw_bpda, _observe_bpda, _judge_bpda, essential=("gradient",))


# --- suspects ---------------------------------------------------------------------------------------

BALL = Ball("L2", 2.5)
N_SUSPECTS = {"smoke": 40, "standard": 100, "full": 500}  # test images, the first n
LEFT = 0.3  # the share of images that may still be right when a suspect counts as broken
_VERDICTS = 21  # answers of a model that draws; the majority counts


class Confident(nn.Module):
    """A classifier whose confidence was sharpened: its logits times 1,000."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return 1_000 * logits


class Dithered(nn.Module):
    """Every pixel is compared with a threshold drawn afresh at each call; the step is steep, and smooth."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        threshold = 0.02 + 0.96 * torch.rand_like(x)
        logits: Tensor = self.network(torch.sigmoid((x - threshold) / 0.005))
        return logits


def eight_levels(x: Tensor) -> Tensor:
    """Eight grey levels."""
    return (7 * x).round() / 7


class Quantised(nn.Module):
    """Images pass through `part`, a quantiser, before the network sees them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.part, self.network = eight_levels, network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(self.part(x))
        return logits


def suspects() -> dict[str, nn.Module]:
    """Four readers of digits that claim to withstand an attacker. Read their source last."""
    return {
        "A": Confident(pretrained("mnist-clean")).eval(),
        "B": Dithered(pretrained("mnist-clean")).eval(),
        "C": Quantised(pretrained("mnist-clean")).eval(),
        "D": pretrained("mnist-gaussian-0.5").eval(),
    }


_BROKEN = ("A", "B", "C")


def _draw_suspects(seed: int) -> Arrays:
    return {"seed": np.int64(seed), "tier": text(tier())}


def _observe_suspects(broken: Any, case: Arrays) -> Arrays:
    return {name: torch.as_tensor(broken[name]).detach().cpu().numpy() for name in _BROKEN}


def _judge_suspects(case: Arrays, evidence: Arrays) -> list[Finding]:
    data, found = load("mnist", "test"), []
    n = min(N_SUSPECTS[untext(case["tier"])], len(data))
    x, y = data.x[:n], data.y[:n]
    models = suspects()
    for name in _BROKEN:
        candidates = evidence[name]
        if candidates.shape != tuple(x.shape) or candidates.dtype != np.float32:
            hint = f"expected a candidate for each of the first {n} test images, float32 of shape {tuple(x.shape)}"
            found.append(Finding(name, "WRONG_SHAPE", hint))
            continue
        points = torch.from_numpy(candidates)
        change = BALL.size((points - x).double()).max().item()
        if not BALL.contains(x, points).all():
            hint = f"an image lies {change:.3f} from its original; the ball is {BALL}"
            found.append(Finding(name, "EPS_BALL_VIOLATED", hint))
        elif points.min() < 0 or points.max() > 1:
            found.append(Finding(name, "BOX_VIOLATED", "pixels leave [0, 1]; images live in it"))
        else:
            left = _left(models[name], points, y, int(case["seed"]))
            measured(name, left.k, left.n)
            if left.share > LEFT:
                hint = f"{left} of the images are still read right; broken means {LEFT:.0%} at most"
                found.append(Finding(name, "NOT_BROKEN", hint))
    return found


def _left(model: nn.Module, points: Tensor, y: Tensor, seed: int) -> Interval:
    """The share that most of the model's answers still get right."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), attackable(model), strict_fp32():
        torch.manual_seed(seeded(seed, "verdicts").initial_seed())
        right = sum((model(points).argmax(1) == y).int() for _ in range(_VERDICTS))
    return Interval(int((2 * right > _VERDICTS).sum()), len(y))


SUSPECTS = Contract(_BROKEN, _draw_suspects, _observe_suspects, _judge_suspects, hidden=("seed", "tier"))
