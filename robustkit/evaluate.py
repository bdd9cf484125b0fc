"""Evaluation: worst case per example over attacks, every verdict given here."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from robustkit.attacks import Attack, fgsm, pgd, rs_fgsm
from robustkit.attacks.library import LIBRARY
from robustkit.data import Dataset
from robustkit.device import Model, attackable, hardware, seeded, strict_fp32
from robustkit.errors import RobustkitError
from robustkit.losses import margin
from robustkit.results import CLEAN, AttackRun, Evaluation
from robustkit.threat import Ball, PerturbationSet, check_batch, check_logits, white_box

ATTACKS: dict[str, Attack] = {
    "fgsm": fgsm,
    "rs-fgsm": rs_fgsm,
    "pgd-10": partial(pgd, steps=10),
    "pgd-40": partial(pgd, steps=40),
    "pgd-100x10": partial(pgd, steps=100, restarts=10),
}


def predict(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """Whether each example is classified right, in strict float32 and eval mode.

    A tie between the true class and another counts against the model.
    Shapes: (n, ...), (n,) -> bool (n,). Raises: RobustkitError on unusable logits.
    """
    with torch.no_grad(), strict_fp32(), attackable(model):
        logits = model(x)
    check_logits(logits, y)
    return margin(logits, y) < 0


@dataclass(frozen=True)
class Job:
    """One batch for one attack: its name, and the positions in the data of the images to attack."""

    attack: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Attacker:
    """The work of an evaluation: a job in, the positions of the images that it broke out.

    Everything random follows from (seed, attack, first row), so it does not matter where or when, or in
    which order, jobs are done.
    """

    model: Model
    data: Dataset
    ball: PerturbationSet
    attacks: Mapping[str, Attack]
    seed: int

    def __call__(self, job: Job) -> list[int]:
        rows = torch.tensor(job.rows, device=self.data.x.device)
        x, y = self.data.x[rows], self.data.y[rows]
        generator = seeded(self.seed, job.attack, job.rows[0], device=x.device)
        # Copies: an attack that changes its input in place would otherwise be measured from there.
        candidates = self.attacks[job.attack](
            self.model, x.clone(), y.clone(), self.ball, generator=generator
        )
        check_candidates(job.attack, x, candidates, self.ball)
        return rows[~predict(self.model, candidates, y)].tolist()


class Runner(Protocol):
    """Who does the jobs of one attack: this process in turn, or others; pairs come back in any order."""

    def __call__(
        self, work: Callable[[Job], list[int]], jobs: Sequence[Job]
    ) -> Iterator[tuple[Job, list[int]]]: ...


def in_turn(work: Callable[[Job], list[int]], jobs: Sequence[Job]) -> Iterator[tuple[Job, list[int]]]:
    """One job after the other, here."""
    for job in jobs:
        yield job, work(job)


def evaluate(
    model: Model,
    data: Dataset,
    ball: PerturbationSet,
    attacks: Mapping[str, Attack],
    *,
    model_name: str,
    tier: str,
    seed: int = 0,
    batch_size: int = 250,
    runner: Runner = in_turn,
    progress: bool = True,
) -> Evaluation:
    """Robust accuracy as the worst case over `attacks`, example by example.

    Attacks run in the given order; each meets only the examples that survived the earlier ones. An
    attack proposes candidates; `Attacker` measures them against the ball and predicts them again
    in strict float32, so that nothing an attack says about its own success counts.
    Source: Croce & Hein 2020 (arXiv 2003.01690), section 5, for the worst case per example.
    Randomness: each batch's generator follows from (seed, attack, first example).
    Raises: RobustkitError when there is no attack, when the batch is unusable, when an attack returns
    another shape, NaN, or a candidate outside the ball or the box.
    """
    if not attacks:
        raise RobustkitError("an evaluation needs at least one attack; give one, e.g. fgsm.")
    check_batch(data.x, data.y)
    broken_by: list[str | None] = [None] * len(data)
    for rows in torch.arange(len(data)).split(batch_size):
        right = predict(model, data.x[rows], data.y[rows]).cpu()
        for row in rows[~right].tolist():
            broken_by[row] = CLEAN
    work, runs = Attacker(model, data, ball, attacks, seed), []
    for name, attack in attacks.items():
        started = time.perf_counter()
        left = [row for row, verdict in enumerate(broken_by) if verdict is None]
        jobs = [Job(name, tuple(left[i : i + batch_size])) for i in range(0, len(left), batch_size)]
        bar = tqdm(total=len(left), desc=name, unit="image", disable=not progress, file=sys.stderr)
        for job, broken in runner(work, jobs):
            for row in broken:
                broken_by[row] = name
            bar.update(len(job.rows))
            bar.set_postfix(robust=f"{broken_by.count(None) / len(broken_by):.1%}")
        bar.close()
        runs.append(AttackRun(name, _parameters(attack), time.perf_counter() - started))
    return Evaluation(
        model=model_name,
        threat=white_box(ball),
        data=data.provenance,
        indices=tuple(int(i) for i in data.indices),
        attacks=tuple(runs),
        broken_by=tuple(broken_by),
        seed=seed,
        tier=tier,
        hardware=hardware(data.x.device),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def check_candidates(name: str, x: Tensor, candidates: Tensor, ball: PerturbationSet) -> None:
    """Refuse candidates that the threat model does not allow. Raises: RobustkitError."""
    if not isinstance(candidates, Tensor) or candidates.dtype != x.dtype:
        found = candidates.dtype if isinstance(candidates, Tensor) else type(candidates).__name__
        raise RobustkitError(
            f"attack {name!r} returned {found} for images of {x.dtype}; return a tensor of those."
        )
    if candidates.shape != x.shape:
        raise RobustkitError(
            f"attack {name!r} returned shape {tuple(candidates.shape)} for images of shape {tuple(x.shape)}; "
            "it must return one candidate per image."
        )
    if not torch.isfinite(candidates).all():
        raise RobustkitError(
            f"attack {name!r} returned NaN or infinite pixels; no verdict can be given on them."
        )
    low, high = candidates.min().item(), candidates.max().item()
    if low < 0 or high > 1:
        raise RobustkitError(
            f"attack {name!r} left the box [0, 1]: pixels in [{low:.3g}, {high:.3g}]; clamp them."
        )
    inside = ball.contains(x, candidates)
    if not inside.all():
        if isinstance(ball, Ball):
            size = ball.size(candidates - x).max().item()
            reason = f"{ball.norm} distance {size:.4g}, allowed {ball.eps:.4g}; project with Ball.candidates."
        else:
            reason = (
                "no transform of the lattice gives them; build them with RotationTranslation.transformed."
            )
        raise RobustkitError(
            f"attack {name!r} left its ball on {int((~inside).sum())} of {len(x)} images: {reason}"
        )


def _parameters(attack: Attack) -> dict[str, Any]:
    """The settings that a partial fixes; a plain function runs with its documented defaults."""
    if not isinstance(attack, partial):
        return {}
    return {
        key: value if isinstance(value, int | float | str) else repr(value)
        for key, value in attack.keywords.items()
    }


def find_attacks(names: str) -> dict[str, Attack]:
    """Attacks from a comma-separated list of names. Raises: RobustkitError for one that is unknown."""
    known, chosen = ATTACKS | LIBRARY, {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in known:
            raise RobustkitError(f"attack {name!r} is unknown; choose from {', '.join(known)}.")
        chosen[name] = known[name]
    return chosen
