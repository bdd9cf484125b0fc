"""Evaluation: worst case per example over attacks, every verdict given here."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from robustkit.attacks import Attack, fgsm, pgd, rs_fgsm
from robustkit.data import Dataset
from robustkit.device import Model, attackable, hardware, seeded, strict_fp32
from robustkit.errors import RobustkitError
from robustkit.losses import margin
from robustkit.results import CLEAN, AttackRun, Evaluation
from robustkit.threat import Ball, check_batch, check_logits, white_box

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


def evaluate(
    model: Model,
    data: Dataset,
    ball: Ball,
    attacks: Mapping[str, Attack],
    *,
    model_name: str,
    tier: str,
    seed: int = 0,
    batch_size: int = 250,
    progress: bool = True,
) -> Evaluation:
    """Robust accuracy as the worst case over `attacks`, example by example.

    Attacks run in the given order; each meets only the examples that survived the earlier ones. An
    attack proposes candidates; this function measures them against the ball and predicts them again
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
    left = []
    for rows in torch.arange(len(data)).split(batch_size):
        right = predict(model, data.x[rows], data.y[rows]).cpu()
        for row in rows[~right].tolist():
            broken_by[row] = CLEAN
        left.append(rows[right])
    survivors, runs = torch.cat(left), []
    for name, attack in attacks.items():
        started = time.perf_counter()
        survivors = _run(model, data, ball, name, attack, survivors, broken_by, seed, batch_size, progress)
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


def _run(
    model: Model,
    data: Dataset,
    ball: Ball,
    name: str,
    attack: Attack,
    survivors: Tensor,
    broken_by: list[str | None],
    seed: int,
    batch_size: int,
    progress: bool,
) -> Tensor:
    """Attack the survivors batch by batch; return those that are left."""
    left = []
    bar = tqdm(total=len(survivors), desc=name, unit="image", disable=not progress, file=sys.stderr)
    for rows in survivors.split(batch_size):
        if len(rows) == 0:
            break
        x, y = data.x[rows], data.y[rows]
        generator = seeded(seed, name, int(rows[0]), device=x.device)
        # Copies: an attack that changes its input in place would otherwise be measured from there.
        candidates = attack(model, x.clone(), y.clone(), ball, generator=generator)
        check_candidates(name, x, candidates, ball)
        right = predict(model, candidates, y).cpu()
        for row in rows[~right].tolist():
            broken_by[row] = name
        left.append(rows[right])
        bar.update(len(rows))
        bar.set_postfix(robust=f"{sum(verdict is None for verdict in broken_by) / len(broken_by):.1%}")
    bar.close()
    return torch.cat(left) if left else survivors


def check_candidates(name: str, x: Tensor, candidates: Tensor, ball: Ball) -> None:
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
        size = ball.size(candidates - x).max().item()
        raise RobustkitError(
            f"attack {name!r} left its ball on {int((~inside).sum())} of {len(x)} images: "
            f"{ball.norm} distance {size:.4g}, allowed {ball.eps:.4g}; project with Ball.candidates."
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
    chosen = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in ATTACKS:
            raise RobustkitError(f"attack {name!r} is unknown; choose from {', '.join(ATTACKS)}.")
        chosen[name] = ATTACKS[name]
    return chosen
