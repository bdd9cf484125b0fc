"""Retraining after an incident: a mixed threat model with the new family in it, and the gate before the canary."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from sqlalchemy import Engine
from torch import Tensor, nn

from robustkit import results
from robustkit.attacks import Attack, apgd, apgd_targeted, patch_pgd, pgd, spatial_grid, spatial_random
from robustkit.data import Dataset
from robustkit.defences import Defence
from robustkit.device import tier as tier_of_this_run
from robustkit.errors import RobustkitError
from robustkit.evaluate import evaluate
from robustkit.results import Evaluation, Interval
from robustkit.serve import events
from robustkit.serve.events import Event
from robustkit.threat import Ball, Patch, PerturbationSet, RotationTranslation
from robustkit.train import Run, Schedule, train


@dataclass(frozen=True)
class Family:
    """A family of perturbations: the attack to train against, those to judge by, and those of an attacker who
    knows what was trained and spends more.
    """

    name: str
    threat: PerturbationSet
    training: Attack
    judging: Mapping[str, Attack]
    adaptive: Mapping[str, Attack]


def _ball(ball: Ball) -> Family:
    quick = {
        "apgd-ce-20": partial(apgd, steps=20),
        "apgd-t-20x3": partial(apgd_targeted, steps=20, targets=3),
    }
    more = {"apgd-ce-60": partial(apgd, steps=60), "apgd-t-40x5": partial(apgd_targeted, steps=40, targets=5)}
    training = partial(pgd, steps=5, step_size=0.4 * ball.eps)
    return Family(ball.norm, ball, training, quick, more)


def _spatial(degrees: float, pixels: float) -> Family:
    return Family(
        "rotation-translation",
        RotationTranslation(degrees, pixels),
        partial(spatial_random, draws=3),
        {"spatial-random-20": partial(spatial_random, draws=20)},
        {"spatial-grid": spatial_grid},
    )


def _patch(side: int) -> Family:
    return Family(
        "patch",
        Patch(side),
        partial(patch_pgd, steps=5),
        {"patch-20": partial(patch_pgd, steps=20)},
        {"patch-20x5": partial(patch_pgd, steps=20, restarts=5)},
    )


def _named(*families: Family) -> dict[str, Family]:
    return {family.name: family for family in families}


# The sizes of the literature: eps 0.3 and 2 on MNIST (Madry et al. 2018), 30 degrees and a tenth of the side
# (Engstrom et al. 2019); patches of a twentieth of the area.
FAMILIES: dict[str, dict[str, Family]] = {
    "mnist": _named(_ball(Ball("Linf", 0.3)), _ball(Ball("L2", 2.0)), _spatial(30, 3), _patch(6)),
    "cifar10": _named(_ball(Ball("Linf", 4 / 255)), _ball(Ball("L2", 0.5)), _spatial(30, 3), _patch(7)),
}


def mixed(families: Sequence[Family]) -> Defence:
    """Adversarial training in which each image of a batch meets one family, or none: an equal share each.

    Source: Tramer & Boneh 2019 (arXiv 1904.13000), section 4, the average over perturbation sets; Maini et al.
    2020 (arXiv 1909.04068). Difference: an image meets one family at a time, not all of them, so that a
    batch costs what one family costs. The ball of a run says in what it is watched, nothing else.
    Raises: RobustkitError without a family.
    """
    if not families:
        raise RobustkitError(
            "a mixed threat model needs at least one family; name the one that was attacked."
        )

    def loss(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
        untouched, *shares = torch.arange(len(x), device=x.device).tensor_split(len(families) + 1)
        candidates = [x[untouched]]
        for family, rows in zip(families, shares, strict=True):
            if len(rows):
                candidates.append(
                    family.training(model, x[rows], y[rows], family.threat, generator=generator)
                )
        return F.cross_entropy(model(torch.cat(candidates)), y)

    return loss


def retrain(
    champion: nn.Module,
    data: Dataset,
    families: Sequence[Family],
    schedule: Schedule,
    *,
    seed: int = 0,
    run_dir: Path | None = None,
    progress: bool = True,
) -> tuple[nn.Module, Run]:
    """A copy of the champion, trained on against all these families; the champion stays as it is.

    Going on from the champion keeps what it has and takes a fraction of the time. Randomness, interruption,
    resumption, raises: as `train.train`; RobustkitError without a family.
    """
    balls = [family.threat for family in families if isinstance(family.threat, Ball)]
    model = copy.deepcopy(champion)
    names = "+".join(family.name for family in families)
    run = train(
        model,
        data,
        mixed(families),
        balls[0] if balls else Ball("Linf", 0.0),
        schedule,
        seed=seed,
        recipe=f"mixed: {names}",
        tier=tier_of_this_run(),
        run_dir=run_dir,
        progress=progress,
    )
    return model, run


# --- the gate ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floors:
    """What a candidate must reach, by the lower end of its interval: set before it is measured."""

    clean: float
    worst: float
    held_out: float
    adaptive: float


@dataclass(frozen=True)
class Bar:
    """One condition of the gate: passed when the lower end of the interval reaches the floor."""

    name: str
    share: Interval
    floor: float

    @property
    def passed(self) -> bool:
        return self.share.low >= self.floor


@dataclass(frozen=True)
class Gate:
    """What the gate found; a candidate that does not pass every bar goes nowhere.

    `families` were trained, `held_out` was not; `evaluations` are the records that the bars count.
    """

    model: str
    families: tuple[str, ...]
    held_out: str
    bars: tuple[Bar, ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def passed(self) -> bool:
        return all(bar.passed for bar in self.bars)

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(bar.name for bar in self.bars if not bar.passed)

    def to_json(self) -> str:
        return results.dumps(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        found: Self = results.from_json(cls, text, "the gate")
        return found


def enter(engine: Engine, judged: Gate, model: str, *, actor: str, now: float) -> Event:
    """Write what the gate found about the candidate of this digest into the chain, where the control plane reads it.

    Raises: RobustkitError as `events.append`.
    """
    body = {
        "model": model,
        "passed": judged.passed,
        "families": list(judged.families),
        "held_out": judged.held_out,
        "bars": {bar.name: [bar.share.k, bar.share.n, bar.floor] for bar in judged.bars},
    }
    return events.append(engine, "retrain.judged", body, actor=actor, now=now)


def worst_case(evaluations: Sequence[Evaluation]) -> Interval:
    """Accuracy under an attacker who may choose the family for each image.

    Raises: RobustkitError without evaluations, or unless all are of the same images.
    """
    if not evaluations or len({(one.data.sha256, one.indices) for one in evaluations}) > 1:
        raise RobustkitError(
            "a worst case over families needs evaluations of the same images; evaluate again."
        )
    records = zip(*(one.broken_by for one in evaluations), strict=True)
    kept = sum(all(verdict is None for verdict in record) for record in records)
    return Interval(kept, evaluations[0].n)


def gate(
    model: nn.Module,
    data: Dataset,
    families: Sequence[Family],
    held_out: Family,
    floors: Floors,
    *,
    model_name: str,
    seed: int = 0,
    progress: bool = True,
) -> Gate:
    """Judge a candidate: clean accuracy, worst case over its families, a family it never saw, an adaptive attacker.

    The held-out family shows whether the candidate learned its attacks or something about images; the adaptive
    attacker knows the families and spends more on each image. Every figure is `evaluate`'s, with its threat model.
    Randomness: `seed`. Raises: RobustkitError without a family, or where the held-out one was trained; what
    `evaluate` raises.
    """
    if not families or held_out.name in {family.name for family in families}:
        raise RobustkitError(
            f"the held-out family must not be trained, and one must; got {held_out.name!r} held out of "
            f"{[family.name for family in families]}."
        )

    def measured(family: Family, attacks: Mapping[str, Attack]) -> Evaluation:
        return evaluate(
            model,
            data,
            family.threat,
            attacks,
            model_name=model_name,
            tier=tier_of_this_run(),
            seed=seed,
            progress=progress,
        )

    trained = [measured(family, family.judging) for family in families]
    unseen = measured(held_out, held_out.judging)
    adaptive = [measured(family, family.adaptive) for family in families]
    bars = (
        Bar("clean", trained[0].clean, floors.clean),
        Bar("worst case over families", worst_case(trained), floors.worst),
        Bar(f"held out: {held_out.name}", unseen.robust, floors.held_out),
        Bar("adaptive attacker", worst_case([*trained, *adaptive]), floors.adaptive),
    )
    names = tuple(family.name for family in families)
    return Gate(model_name, names, held_out.name, bars, (*trained, unseen, *adaptive))
