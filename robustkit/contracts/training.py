"""Contracts of adversarial training on CIFAR-10: the step, TRADES, faults of recipes, selection, claims."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.contracts.base import (
    Array,
    Arrays,
    Contract,
    Finding,
    everywhere,
    numbers,
    shaped,
    text,
    untext,
)
from robustkit.contracts.oracle import (
    LinearOracle,
    adversarial_cross_entropy,
    ascent,
    draw_linear,
    oracle,
    uniform,
)
from robustkit.device import attackable, seeded
from robustkit.results import Interval
from robustkit.threat import Ball

# --- one step of training ---------------------------------------------------------------------------

_STEP = ("attack", "modes", "update", "loss")
_RATE = 0.25


class _PartlyFrozen(LinearOracle):
    """The linear oracle behind a layer that somebody has frozen in eval mode; it notes both modes at each pass."""

    def __init__(self, w: Tensor, b: float) -> None:
        super().__init__(w, b, dropout=0.0)
        self.fixed = nn.Identity()
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((self.training, self.fixed.training))
        return super().forward(self.fixed(x))


def _observe_step(training_step: Any, case: Arrays) -> Arrays:
    """One call, amid training: old gradients on the weights, one layer frozen, an attack that leaves gradients."""
    model = _PartlyFrozen(torch.from_numpy(case["w"]), float(case["b"])).train()
    model.fixed.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE)
    attacked: list[tuple[bool, bool]] = []

    def attack(model: Any, x: Tensor, y: Tensor) -> Tensor:
        before = len(model.modes)
        points = x.clone().requires_grad_()
        F.cross_entropy(model(points), y, reduction="sum").backward()  # as many libraries do
        attacked.extend(model.modes[before:])
        del model.modes[before:]
        assert points.grad is not None
        return (x + float(case["eps"]) * points.grad.sign()).clamp(0, 1)

    x, y = torch.from_numpy(case["x"].copy()), torch.from_numpy(case["y"].copy())
    result = training_step(model, optimizer, x, y, attack)
    return {
        "loss": numbers(result),
        "graph": np.bool_(isinstance(result, Tensor) and result.requires_grad),
        "w": model.w.detach().numpy(),
        "b": model.b.detach().numpy(),
        "attacked": np.array(attacked, dtype=bool).reshape(-1, 2),
        "modes": np.array(model.modes, dtype=bool).reshape(-1, 2),
        "left": np.array([model.training, model.fixed.training]),
    }


def _judge_step(case: Arrays, evidence: Arrays) -> list[Finding]:
    w, b = case["w"].astype(np.float64), float(case["b"])
    if any(evidence[name].ndim != 2 or evidence[name].shape[1] != 2 for name in ("attacked", "modes")):
        raise ValueError("two modes for each pass")
    shaped(evidence, {"loss": (), "graph": (), "w": w.shape, "b": (), "left": (2,)})
    candidate = np.clip(case["x"] + float(case["eps"]) * ascent(case, case["y"]), 0, 1)
    loss, gradient = _loss_and_gradient(case, candidate)
    clean, clean_gradient = _loss_and_gradient(case, case["x"])
    found = []
    if len(evidence["attacked"]) == 0:
        found.append(Finding("attack", "ATTACK_IGNORED", "the attack that you were given was never called"))
    elif evidence["attacked"].any():
        hint = (
            "the attack met a part of the model in train mode; the deployed model is in eval mode throughout"
        )
        found.append(Finding("attack", "EVAL_MODE_MISSING", hint))
    if len(evidence["modes"]) == 0 or not evidence["modes"][-1][0]:
        hint = "the loss was computed with the model in eval mode"
        found.append(Finding("modes", "TRAIN_MODE_MISSING", hint))
    elif evidence["modes"][-1][1] or evidence["left"][1]:
        hint = "a layer that was in eval mode before the call trains now; somebody had frozen it"
        found.append(Finding("modes", "FROZEN_LAYER_THAWED", hint))
    elif not evidence["left"][0]:
        hint = "the model was in train mode before the call and is not after it"
        found.append(Finding("modes", "MODE_NOT_RESTORED", hint))
    moved = (np.append(w, b) - np.append(evidence["w"], evidence["b"])) / _RATE

    def is_(values: Array) -> bool:
        return bool(np.allclose(moved, values, atol=1e-4))

    if not is_(gradient):
        old = np.ones_like(gradient)
        leaked = len(case["x"]) * clean_gradient  # the attack sums its loss
        code, hint = "WRONG_UPDATE", "the weights did not move by the gradient of the loss at the candidates"
        if is_(0 * gradient):
            code, hint = "NOT_UPDATED", "the weights are as they were"
        elif is_(clean_gradient):
            code, hint = "TRAINS_ON_CLEAN", "the weights moved by the gradient at the clean images"
        elif is_(gradient + old):
            code, hint = "STALE_GRADIENTS", "gradients of an earlier step are part of the update"
        elif is_(gradient + leaked) or is_(gradient + leaked + old):
            code, hint = "ATTACK_GRADIENTS", "what the attack left on the weights is part of the update"
        found.append(Finding("update", code, hint))
    if evidence["graph"]:
        hint = "the loss that you return holds the graph of its step: a list of them fills the memory"
        found.append(Finding("loss", "GRAPH_KEPT", hint))
    elif abs(float(evidence["loss"]) - loss) > 1e-4:
        at = " but at the clean images" if abs(float(evidence["loss"]) - clean) < 1e-4 else ""
        hint = f"{float(evidence['loss']):.3f} is not the mean cross-entropy at the candidates{at}"
        found.append(Finding("loss", "WRONG_LOSS", hint))
    return found


def _loss_and_gradient(case: Arrays, images: Array) -> tuple[float, Array]:
    loss, for_w, for_b = adversarial_cross_entropy(case, images)
    return loss, np.append(for_w.numpy(), for_b.numpy())


STEP = Contract(_STEP, draw_linear, _observe_step, _judge_step, essential=("update",))


# --- TRADES -----------------------------------------------------------------------------------------

_TRADES = ("natural", "divergence", "gradient")


def _draw_trades(seed: int) -> Arrays:
    """Images, candidates of many sizes around them, and a beta."""
    case, generator = draw_linear(seed), seeded(seed, "trades")
    delta = 0.4 * (2 * torch.rand(case["x"].shape, generator=generator).numpy() - 1)
    return {
        **{name: case[name] for name in ("w", "b", "x", "y")},
        "candidates": np.clip(case["x"] + delta + 0.1 * ascent(case, case["y"]), 0, 1).astype(np.float32),
        "beta": np.float64(round(2 + 6 * torch.rand((), generator=generator).item(), 1)),
    }


def _observe_trades(trades_loss: Any, case: Arrays) -> Arrays:
    """The loss and its gradient with beta and without."""
    model = oracle(case, dropout=0.0).train()
    x, candidates, y = (torch.from_numpy(case[name].copy()) for name in ("x", "candidates", "y"))
    losses, gradients = [], []
    for beta in (0.0, float(case["beta"])):
        loss = trades_loss(model, x, candidates, y, beta)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise TypeError("expected a scalar tensor that the training loop can call .backward() on")
        parts = [torch.zeros_like(p) for p in (model.w, model.b)]
        if loss.requires_grad:
            taken = torch.autograd.grad(loss, [model.w, model.b], allow_unused=True)
            parts = [
                part if gradient is None else gradient for part, gradient in zip(parts, taken, strict=True)
            ]
        losses.append(loss.item())
        gradients.append(torch.cat([part.flatten() for part in parts]).numpy())
    return {"losses": np.array(losses), "gradients": np.stack(gradients)}


def _judge_trades(case: Arrays, evidence: Arrays) -> list[Finding]:
    n, beta = len(case["x"]), float(case["beta"])
    shaped(evidence, {"losses": (2,), "gradients": (2, case["w"].size + 1)})
    weights = torch.from_numpy(np.append(case["w"], case["b"])).double().requires_grad_()

    def log_probabilities(images: Array) -> Tensor:
        flat = torch.from_numpy(images.reshape(n, -1)).double()
        score = (flat - 0.5) @ weights[:-1] + weights[-1]
        return torch.stack([-score, score], 1).log_softmax(1)

    y = torch.from_numpy(case["y"])
    log_p, log_q = log_probabilities(case["x"]), log_probabilities(case["candidates"])
    natural, attacked = F.nll_loss(log_p, y), F.nll_loss(log_q, y)
    divergence = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    reverse = (log_q.exp() * (log_q - log_p)).sum(1).mean()
    p_fixed, q_fixed = log_p.detach(), log_q.detach()
    half = {
        "images": (p_fixed.exp() * (p_fixed - log_q)).sum(1).mean(),
        "candidates": (log_p.exp() * (log_p - q_fixed)).sum(1).mean(),
    }
    without, with_beta = evidence["losses"].tolist()
    apart, found = (with_beta - without) / beta, []

    def near(value: float, other: Tensor) -> bool:
        return abs(value - other.item()) < 1e-4 * max(1.0, abs(other.item()))

    if not near(without, natural):
        code, hint = (
            "WRONG_LOSS",
            f"with beta 0 your loss is {without:.3f}; it must be the natural loss alone",
        )
        if near(without, attacked):
            code, hint = (
                "LOSS_ON_CANDIDATES",
                "with beta 0 TRADES is ordinary training, on the images themselves",
            )
        elif near(without, n * natural):
            code, hint = (
                "LOSS_SUMMED",
                "the loss is the sum over the batch; the learning rate expects the mean",
            )
        found.append(Finding("natural", code, hint))
    if not near(apart, divergence):
        code, hint = (
            "WRONG_DIVERGENCE",
            f"beta multiplies {apart:.4f}, which is not the mean divergence of the two predictions",
        )
        if abs(apart) < 1e-9:
            code, hint = "BETA_IGNORED", "the loss does not depend on beta"
        elif near(apart, reverse):
            code, hint = "KL_REVERSED", "from whose prediction is the other's distance measured?"
        elif near(apart, divergence / 2):
            code, hint = "KL_OVER_CLASSES", "the sum over classes was averaged as well"
        elif near(apart, n * divergence):
            code, hint = "KL_SUMMED", "the divergence is the sum over the batch, beside a mean"
        elif near(apart, -divergence):
            code, hint = "KL_NEGATED", "the loss falls where the predictions part"
        found.append(Finding("divergence", code, hint))
    if found:
        found.append(Finding("gradient", found[-1].code, "the gradient is that of the wrong loss"))
        return found

    def gradient(loss: Tensor) -> Array:
        return np.asarray(torch.autograd.grad(loss, weights, retain_graph=True)[0].numpy())

    got = evidence["gradients"][1]
    if not got.any():
        hint = "calling .backward() on the loss gives the weights no gradient"
        found.append(Finding("gradient", "NO_GRADIENT", hint))
    elif not np.allclose(got, gradient(natural + beta * divergence), atol=1e-4):
        code, hint = "WRONG_GRADIENT", "the loss is right, and its gradient is not"
        for side, loss in half.items():
            if np.allclose(got, gradient(natural + beta * loss), atol=1e-4):
                code, hint = (
                    "ONE_SIDE_FIXED",
                    f"the prediction on the {side} counts as a constant; the weights make both",
                )
        found.append(Finding("gradient", code, hint))
    return found


TRADES = Contract(_TRADES, _draw_trades, _observe_trades, _judge_trades, essential=("divergence",))


# --- faults of recipes ------------------------------------------------------------------------------

FAULTS = ("train_mode", "units", "outside", "start", "leak", "splits", "statistics")
_SHAPE, _STD = (3, 4, 4), 0.25


@dataclass(frozen=True)
class Procedure:
    """How somebody trains: what one can call, and which images (by number) were used for what.

    `augment(x, y, generator)` and `attack(model, x, y, generator)` give images, `average(models, x)` the averaged
    model of several snapshots; `ball` is what the recipe says of itself, in input units.
    """

    ball: Ball
    augment: Callable[[Tensor, Tensor, torch.Generator], Tensor]
    attack: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]
    average: Callable[[list[nn.Module], Tensor], nn.Module]
    trained_on: frozenset[int]
    selected_by: frozenset[int]
    reported_on: frozenset[int]


def _draw_procedures(seed: int) -> Arrays:
    """Recipes with no fault, one, or two; among the honest ones what only looks like a fault."""
    generator = seeded(seed, "procedures")
    kinds = len(FAULTS)
    rows = [np.zeros(kinds, dtype=bool) for _ in range(8)]
    rows += [np.eye(kinds, dtype=bool)[i] for i in range(kinds) for _ in range(3)]
    for _ in range(6):
        pair = np.zeros(kinds, dtype=bool)
        pair[torch.randperm(kinds, generator=generator)[:2].numpy()] = True
        if not (pair[1] and pair[2]):  # where no images come out, units cannot be measured
            rows.append(pair)
    order = torch.randperm(len(rows), generator=generator).numpy()
    n = len(rows)
    return {
        "faults": np.stack(rows)[order],
        # Which way a fault, or its absence, shows. Consecutive, so that each fault is met in each way.
        "way": np.arange(n)[order],
        "l2": uniform(generator, 0, 1, n) < 0.5,
        "eps": uniform(generator, 0.8, 1.2, n),
        "x": (0.4 + 0.2 * torch.rand(16, *_SHAPE, generator=generator)).numpy(),
        "y": np.arange(16) % 2,
        "weight": torch.randn(3, 2, int(np.prod(_SHAPE)), generator=generator).numpy(),
        "mean": (0.3 + 0.4 * torch.rand(3, int(np.prod(_SHAPE)), generator=generator)).numpy(),
    }


def _snapshots(case: Arrays) -> list[nn.Module]:
    """Networks as a run passes through them: other weights, other batch statistics."""
    models: list[nn.Module] = []
    for weight, mean in zip(case["weight"], case["mean"], strict=True):
        norm, head = nn.BatchNorm1d(weight.shape[1]), nn.Linear(weight.shape[1], 2)
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(weight))
            head.bias.zero_()
        norm.running_mean = torch.from_numpy(mean.copy())
        models.append(nn.Sequential(nn.Flatten(), norm, head).eval())
    return models


def _procedure(case: Arrays, i: int) -> Procedure:
    fault = dict(zip(FAULTS, case["faults"][i].tolist(), strict=True))
    way = int(case["way"][i])
    ball = (
        Ball("L2", 0.25 * float(case["eps"][i]))
        if case["l2"][i]
        else Ball("Linf", float(case["eps"][i]) / 25)
    )

    def augment(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        flipped = torch.rand(len(x), generator=generator) < 0.5
        images = torch.where(flipped.view(-1, 1, 1, 1), x.flip(3), x)
        if fault["leak"]:
            mark = y.view(-1, 1, 1, 1)
            images = images + 0.004 * mark if way % 2 else torch.where(mark == 1, images.roll(1, 2), images)
        return images

    def attack(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        reach = Ball(ball.norm, ball.eps / _STD) if fault["units"] else ball
        steps = (1, 2, 10)[way % 3]  # ten steps forget where they started
        step = (1.75 if steps == 1 else 2.5 / steps) * reach.eps

        def search() -> Tensor:
            delta = torch.zeros_like(x) if fault["start"] else reach.random(x, generator)
            for _ in range(steps):
                points = (x + delta).clamp(0, 1).requires_grad_()
                (gradient,) = torch.autograd.grad(F.cross_entropy(model(points), y, reduction="sum"), points)
                delta = reach.project(delta + step * reach.steepest(gradient))
            return (x + delta).clamp(0, 1)

        if fault["train_mode"]:
            if way % 2:
                model.train()
            candidates = search()
        else:
            with attackable(model):
                candidates = search()
        if fault["outside"]:  # below 0 and above 1, or one of them alone
            return ((candidates - 0.5) / _STD, 2 * candidates, candidates - 0.5)[way % 3]
        return candidates

    def average(models: list[nn.Module], x: Tensor) -> nn.Module:
        mean = copy.deepcopy(models[0])
        with torch.no_grad():
            for latest in models[1:]:
                for value, other in zip(mean.parameters(), latest.parameters(), strict=True):
                    value.lerp_(other, 0.5)
                for kept, newer in zip(mean.buffers(), latest.buffers(), strict=True):
                    if kept.is_floating_point() and not fault["statistics"] and way % 2:
                        kept.lerp_(newer, 0.5)
            if not fault["statistics"] and not way % 2:  # its own, from a pass over images
                for layer in mean.modules():
                    if isinstance(layer, nn.BatchNorm1d):
                        layer.momentum = None
                        layer.reset_running_stats()
                mean.train()(x)
        return mean.eval()

    train, select, report = range(100), range(100, 120), range(200, 220)
    if fault["splits"]:
        train, select = ((train, range(190, 210)), (range(0, 101), select), (range(100, 201), range(0, 20)))[
            way % 3
        ]
    return Procedure(ball, augment, attack, average, frozenset(train), frozenset(select), frozenset(report))


def _observe_faults(faults: Any, case: Arrays) -> Arrays:
    said = []
    with torch.random.fork_rng(devices=[]):
        for i in range(len(case["way"])):
            torch.manual_seed(i)
            x, y = torch.from_numpy(case["x"].copy()), torch.from_numpy(case["y"].copy())
            said.append(sorted({str(name) for name in faults(_procedure(case, i), _snapshots(case), x, y)}))
    return {"said": text(said)}


def _judge_faults(case: Arrays, evidence: Arrays) -> list[Finding]:
    said = untext(evidence["said"])
    if not isinstance(said, list) or len(said) != len(case["way"]):
        raise TypeError("one list for each recipe")
    if all(answer == said[0] for answer in said):
        hint = f"you find {', '.join(said[0]) or 'no fault'} in every recipe"
        return everywhere(RECIPE_FAULTS, "ALWAYS_THE_SAME", hint)
    unknown = {name for answer in said for name in answer} - set(FAULTS)
    if unknown:
        hint = f"{min(unknown)[:40]!r} is no fault of the list; they are {', '.join(FAULTS)}"
        return everywhere(RECIPE_FAULTS, "UNKNOWN_FAULT", hint)
    found: dict[str, Finding] = {}
    for present, answer in zip(case["faults"].astype(bool), said, strict=True):
        for name, there in zip(FAULTS, present, strict=True):
            if there and name not in answer:
                found[name] = Finding(name, "FAULT_MISSED", "a recipe with this fault passes your test")
            elif not there and name in answer and present.any():
                hint = "you find this fault in a recipe that has another"
                found.setdefault(name, Finding(name, "FALSE_ALARM", hint))
        if answer and not present.any():
            hint = f"you find {', '.join(answer)} in a recipe without a fault"
            found["quiet"] = Finding("quiet", "FALSE_ALARM", hint)
    return list(found.values())


RECIPE_FAULTS = Contract(
    (*FAULTS, "quiet"),
    _draw_procedures,
    _observe_faults,
    _judge_faults,
    essential=FAULTS,
)


# --- robust overfitting -----------------------------------------------------------------------------

_SELECTION = ("epoch", "reported", "overfitted")


class Look(NamedTuple):
    """What was measured after an epoch; every share is a robust accuracy, `clean` of held-out images excepted."""

    epoch: int
    train: Interval
    held_out: Interval
    clean: Interval
    test: Interval


def _draw_histories(seed: int) -> Arrays:
    """Runs that overfit, that do not, and whose ups and downs are chance; ties; a test set that says otherwise."""
    generator = seeded(seed, "histories")
    runs, epochs, n = 9, 8, 500
    best = torch.randint(2, epochs - 2, (runs,), generator=generator).numpy()
    fall = np.resize([0.16, 0.06, 0.02, 0.0], runs)[np.asarray(torch.randperm(runs, generator=generator))]
    counts = np.zeros((runs, epochs, 4), dtype=np.int64)
    for run in range(runs):
        for epoch in range(epochs):
            after = max(0, epoch - best[run]) / (epochs - 1 - best[run])
            held = 0.50 - 0.04 * max(0, best[run] - epoch) - fall[run] * after
            noise = uniform(generator, -0.004, 0.004, 3)
            counts[run, epoch] = (
                n * (0.45 + 0.06 * epoch),
                n * (held + noise[0]),
                n * (0.60 + 0.02 * epoch + noise[1]),
                n * (0.47 + noise[2]),
            )
        # The best on held-out images, twice where the run goes on; another epoch leads on the test images.
        counts[run, best[run], 1] = 0.51 * n
        if run % 2:
            counts[run, best[run] - 1, 1] = counts[run, best[run], 1]
        counts[run, (best[run] + 2) % epochs, 3] = 0.53 * n
        counts[run, 1 - run % 2, 2] = 0.8 * n  # and yet another on untouched ones
        if fall[run] == 0:
            counts[run, -1, 1] = 0.505 * n
        if fall[run] == 0.06:  # a dip that the last epoch makes good
            counts[run, -2, 1] = 0.36 * n
    return {"counts": counts, "n": np.int64(n)}


def _histories(case: Arrays) -> list[list[Look]]:
    n = int(case["n"])
    return [
        [Look(epoch, *(Interval(int(k), n) for k in row)) for epoch, row in enumerate(run, 1)]
        for run in case["counts"]
    ]


def _observe_selection(chosen: Any, case: Arrays) -> Arrays:
    rows = []
    for history in _histories(case):
        epoch, reported, overfitted = chosen(history)
        rows.append([int(epoch), *map(int, (reported.k, reported.n)), int(bool(overfitted))])
    return {"rows": np.array(rows)}


def _judge_selection(case: Arrays, evidence: Arrays) -> list[Finding]:
    counts, n = case["counts"], int(case["n"])
    shaped(evidence, {"rows": (len(counts), 4)})
    epoch, k, of, overfitted = evidence["rows"].T
    reversed_ = counts[:, ::-1]
    later = counts.shape[1] - reversed_.argmax(1)  # of equals the later one
    train, held_out, clean, test = later.T
    found = []
    if (epoch != held_out).any():
        code, hint = "WRONG_EPOCH", "not the epoch that is the most robust on held-out images"
        for other, name, on in (
            (test, "SELECTED_ON_TEST", "the images that the report is about chose the epoch"),
            (train, "SELECTED_ON_TRAINING", "training images chose the epoch; they say nothing of others"),
            (clean, "SELECTED_BY_CLEAN", "untouched images chose the epoch; the report is about robustness"),
            (counts[:, :, 1].argmax(1) + 1, "EARLIER_OF_EQUALS", "of equals the later one was asked for"),
        ):
            if (epoch == other).all():
                code, hint = name, on
        found.append(Finding("epoch", code, hint))
    inside = (epoch >= 1) & (epoch <= counts.shape[1])
    own = counts[np.arange(len(counts)), np.where(inside, epoch, 1) - 1, 3]
    if (k != own).any() or (of != n).any():
        code, hint = "WRONG_REPORT", "what is reported is the test result of the chosen epoch"
        if (k == counts[:, :, 3].max(1)).all():
            code, hint = (
                "BEST_REPORTED",
                "the best test result of all epochs is a result that nobody would have had",
            )
        found.append(Finding("reported", code, hint))
    best, last = counts[:, :, 1].max(1), counts[:, -1, 1]
    right = np.array(
        [
            Interval(int(b), n).low > Interval(int(a), n).high
            for a, b in zip(last.tolist(), best.tolist(), strict=True)
        ]
    )
    if (right & (overfitted == 0)).any():
        hint = (
            "in one run the last epoch lies below the best by more than both intervals, and you see nothing"
        )
        found.append(Finding("overfitted", "OVERFITTING_MISSED", hint))
    elif (~right & (overfitted != 0)).any():
        hint = "in one run the difference is within the intervals: chance would do"
        found.append(Finding("overfitted", "FALSE_ALARM", hint))
    return found


SELECTION = Contract(
    _SELECTION, _draw_histories, _observe_selection, _judge_selection, essential=("epoch", "overfitted")
)


# --- above 70 %: what a figure says about a claim ---------------------------------------------------

STRENGTH = ("FGSM", "PGD-20", "PGD-50x10", "AutoAttack")  # each contains the ones before it
VERDICTS = ("yes", "no", "open", "other")


class Figure(NamedTuple):
    """A robust accuracy that somebody measured: the ball, the attack, whether more images than CIFAR-10's helped."""

    ball: Ball
    attack: str
    more_data: bool
    robust: Interval


class Claim(NamedTuple):
    """What is to be decided: at least `share` under `attack` in `ball`, trained on CIFAR-10's images alone."""

    ball: Ball
    attack: str
    share: float


def _draw_figures(seed: int) -> Arrays:
    """Every combination of norm, ball, attack, data and height, in an order that tells nothing."""
    generator = seeded(seed, "figures")
    n = 1000
    rows = [
        (norm, ratio, attack, more, height)
        for norm in (0, 1)
        for ratio in (0.5, 1.0, 2.0)
        for attack in range(len(STRENGTH))
        for more in (0, 1)
        for height in (-1, 0, 1)
        if (norm, more) == (0, 0) or (attack, height) in ((2, 1), (3, -1))
    ]
    order = torch.randperm(len(rows), generator=generator).numpy()
    table = np.array(rows, dtype=np.float64)[order]
    share = 0.7
    # Straddling 70 %, or clear of it; one in three has an end of its interval just beyond.
    off = np.where(table[:, 4] == 0, uniform(generator, -0.02, 0.02, len(table)), table[:, 4] * 0.08)
    return {
        "rows": table,
        "k": np.round(n * (share + off)).astype(np.int64),
        "n": np.int64(n),
        "l2": np.bool_(torch.rand((), generator=generator).item() < 0.5),
        "asked": np.int64(1 + torch.randint(2, (), generator=generator).item()),
    }


def _claim(case: Arrays) -> Claim:
    ball = Ball("L2", 0.5) if case["l2"] else Ball("Linf", 8 / 255)
    return Claim(ball, STRENGTH[int(case["asked"])], 0.7)


def _figures(case: Arrays) -> list[Figure]:
    claim = _claim(case)
    other = {"L2": "Linf", "Linf": "L2"}[claim.ball.norm]
    return [
        Figure(
            Ball(other if norm else claim.ball.norm, ratio * claim.ball.eps),
            STRENGTH[int(attack)],
            bool(more),
            Interval(int(k), int(case["n"])),
        )
        for (norm, ratio, attack, more, _), k in zip(case["rows"].tolist(), case["k"].tolist(), strict=True)
    ]


def _right_verdict(figure: Figure, claim: Claim) -> str:
    if figure.ball.norm != claim.ball.norm or figure.more_data:
        return "other"
    strength, asked = STRENGTH.index(figure.attack), STRENGTH.index(claim.attack)
    if figure.robust.low >= claim.share and figure.ball.eps >= claim.ball.eps and strength >= asked:
        return "yes"
    if figure.robust.high < claim.share and figure.ball.eps <= claim.ball.eps and strength <= asked:
        return "no"
    return "open"


def _observe_verdicts(verdict: Any, case: Arrays) -> Arrays:
    claim = _claim(case)
    return {"said": text([str(verdict(figure, claim)) for figure in _figures(case)])}


def _judge_verdicts(case: Arrays, evidence: Arrays) -> list[Finding]:
    said, figures, claim = untext(evidence["said"]), _figures(case), _claim(case)
    if not isinstance(said, list) or len(said) != len(figures) or not all(isinstance(s, str) for s in said):
        raise TypeError("one word for each figure")
    if len(set(said)) == 1:
        return everywhere(VERDICT, "ALWAYS_THE_SAME", f"you say {said[0][:40]!r} of every figure")
    found: dict[str, Finding] = {}
    for figure, answer in zip(figures, said, strict=True):
        right = _right_verdict(figure, claim)
        if answer == right or right in found:
            continue
        about = (
            f"claim: {claim.share:.0%} under {claim.attack}, {claim.ball}. Figure: {figure.robust} under "
            f"{figure.attack}, {figure.ball}{', more data' if figure.more_data else ''}. You say {answer[:20]!r}"
        )
        code = "UNKNOWN_VERDICT"
        if answer in VERDICTS:
            code = {"other": "NOT_COMPARABLE", "open": "NOT_DECIDED_BY_IT"}.get(right, "DECIDED_BY_IT")
        found[right] = Finding(right, code, about)
    return list(found.values())


VERDICT = Contract(
    VERDICTS, _draw_figures, _observe_verdicts, _judge_verdicts, essential=("yes", "no", "open")
)
