"""Recorded incidents: benign traffic on real images, with the queries of real attacks in mid-stream.

What a service would have seen, without one: for drills, for tests, and to measure triage on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from robustkit.attacks import Attack, patch_pgd, pgd, spatial_random, square
from robustkit.data import Dataset
from robustkit.device import seeded
from robustkit.errors import RobustkitError
from robustkit.serve import triage
from robustkit.serve.triage import Stream
from robustkit.threat import Ball, Patch, PerturbationSet, RotationTranslation


@dataclass(frozen=True)
class Attacker:
    """One way to attack: the family that triage should name, the attack, its threat, and what is sent.

    With `searching` every query of the attack reaches the service, else its last candidate alone, made
    elsewhere.
    """

    family: str
    attack: Attack
    threat: PerturbationSet
    searching: bool


def attackers(side: int) -> dict[str, Attacker]:
    """Attackers by name, for images of this side: sizes as in the literature of MNIST (28) and CIFAR-10 (32)."""
    linf, l2, patch = (0.3, 2.0, 7) if side == 28 else (8 / 255, 1.0, 8)
    turned = RotationTranslation(30.0, round(0.1 * side))
    return {
        "pgd-linf": Attacker(triage.LP, partial(pgd, steps=10), Ball("Linf", linf), False),
        "pgd-l2": Attacker(triage.LP, partial(pgd, steps=10), Ball("L2", l2), False),
        "patch": Attacker(triage.PATCH, partial(patch_pgd, steps=10), Patch(patch), False),
        "turn-once": Attacker(triage.SPATIAL, partial(spatial_random, draws=20), turned, False),
        "turn-search": Attacker(triage.SPATIAL, partial(spatial_random, draws=20), turned, True),
        "square": Attacker(triage.SEQUENCE, partial(square, queries=60), Ball("Linf", linf), True),
    }


class _Recorder(nn.Module):
    """The model, and every image that it was asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked += x.detach().cpu().unbind(0)
        logits: Tensor = self.model(x)
        return logits


def queries(
    attacker: Attacker, model: nn.Module, image: Tensor, label: Tensor, generator: torch.Generator
) -> Tensor:
    """What one attack on one image sends, in order. Shapes: image (c, h, w), label () -> (n, c, h, w)."""
    recorder = _Recorder(model)
    found = attacker.attack(recorder, image[None], label[None], attacker.threat, generator=generator).detach()
    return torch.stack(recorder.asked) if attacker.searching and recorder.asked else found


def stored(images: Tensor) -> np.ndarray:
    """Images as the service has them. Shapes: (n, c, h, w) in [0, 1] -> uint8 (n, h, w, c)."""
    return np.ascontiguousarray((255 * images).round().byte().numpy().transpose(0, 2, 3, 1))


def record(
    model: nn.Module,
    data: Dataset,
    attackers: Mapping[str, Attacker],
    *,
    each: int,
    benign: int,
    seen: float = 1.0,
    seconds: float = 3600.0,
    seed: int = 0,
) -> tuple[Stream, dict[str, str]]:
    """A stream of `seconds` and the truth: for each account in quarantine, the attacker's name or "benign".

    `benign` accounts ask about one image each, a tenth of them twice. From a third of that time on, `each` accounts
    of every attacker attack an image of their own; with probability `seen` they first ask about the image
    itself. In quarantine are the attackers' later queries, and one benign query in fifty, as a detector errs.
    Shapes: as `Stream`. Randomness: `seed` alone.
    Raises: RobustkitError when the data have fewer images than accounts.
    """
    needed = benign + each * len(attackers)
    if len(data) < needed:
        raise RobustkitError(f"{needed} accounts need an image each; the data have {len(data)}. Load more.")
    draw = np.random.default_rng(seeded(seed, "stream").initial_seed() % 2**32)
    order = torch.randperm(len(data), generator=seeded(seed, "images"))[:needed].tolist()
    rows: list[tuple[float, str, np.ndarray, bool]] = []
    truth: dict[str, str] = {}
    for number, position in enumerate(order[:benign]):
        account, image = f"user-{number:05d}", stored(data.x[position : position + 1])[0]
        times = draw.uniform(0, seconds, 2 if number % 10 == 0 else 1)
        for at in times:
            flagged = bool(draw.random() < 0.02)
            rows.append((at, account, image, flagged))
            if flagged:
                truth[account] = "benign"
    left = iter(order[benign:])
    for name, attacker in attackers.items():
        for number in range(each):
            position, account = next(left), f"{name}-{number:03d}"
            generator = seeded(seed, name, number)
            image, label = data.x[position], data.y[position]
            start = draw.uniform(seconds / 3, seconds)
            if draw.random() < seen:
                rows.append((start, account, stored(image[None])[0], False))
            for k, query in enumerate(stored(queries(attacker, model, image, label, generator)), 1):
                rows.append((start + k, account, query, True))
            truth[account] = name
    rows.sort(key=lambda row: row[0])
    return _stream(rows), truth


def _stream(rows: Sequence[tuple[float, str, np.ndarray, bool]]) -> Stream:
    at, account, images, held = zip(*rows, strict=True)
    return Stream(np.stack(images), np.array(account), np.array(at), np.array(held))
