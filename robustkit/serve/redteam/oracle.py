"""The service as attacks see a model, for one image and within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from robustkit.serve.redteam.client import Answer, Client, NoKeys, Pixels, png
from robustkit.threat import Ball, PerturbationSet, RotationTranslation

_SURE = 30.0  # the lead of a class that nothing speaks against, in logits


class Over(Exception):
    """The attack on this image has ended: an image was found, or no query, key or question is left."""


def pixels(x: Tensor) -> Pixels:
    """An image in the nearest grey levels. Shapes: (c, h, w) in [0, 1] -> (h, w, c) uint8."""
    return np.ascontiguousarray((255 * x.detach().clamp(0, 1)).round().byte().permute(1, 2, 0).cpu().numpy())


def image(sent: Pixels) -> Tensor:
    """Shapes: (h, w, c) uint8 -> (c, h, w) float64 in [0, 1]."""
    return torch.from_numpy(sent.astype(np.float64) / 255).permute(2, 0, 1)


def within(threat: PerturbationSet, original: Pixels, sent: Pixels) -> bool:
    """Whether `threat` allows to turn one image into the other, both in whole grey levels.

    A rotated image is one of the lattice's, up to one grey level of rounding. Shapes: (h, w, c) uint8 twice.
    """
    clean, changed = image(original)[None], image(sent)[None]
    if isinstance(threat, Ball):
        return bool(
            threat.size(changed - clean) <= threat.eps + 1e-9
        )  # of float64 sums, not of float32 images
    if not isinstance(threat, RotationTranslation):
        return bool(threat.contains(clean, changed))
    lattice = threat.transforms()
    turned = threat.transformed(clean.float().expand(len(lattice), -1, -1, -1), lattice)
    return bool(((255 * (turned - changed)).abs().flatten(1).amax(1) <= 1.0).any())


def once(point: Tensor) -> tuple[Tensor]:
    """The one form of a point that an attacker has who does not ask again."""
    return (point,)


class Oracle:
    """Images in, logits out, one query each, about one image: what a black-box attack takes for a model.

    What is sent has 8 bits a channel, and stays inside a ball in which the point lies. The logits are those of the
    scores where the service tells them, else the label's class before all others. A rejected query looks like one
    that is surely classified right: nothing is gained by it. A query that was asked already is answered from
    memory. The first point inside the threat model that gets another label is `found`, as the bytes that were sent,
    and ends the attack, as does the budget, and an attack that has run out of new questions.
    `answered` says of the points of the last call which were not rejected. `forms` gives the forms in which a point
    is asked about, one after the other while they are rejected.
    Shapes: (n, c, h, w) -> (n, classes). Raises: Over.
    """

    def __init__(
        self,
        client: Client,
        original: Pixels,
        label: int,
        threat: PerturbationSet,
        *,
        classes: int,
        budget: int,
        known: Answer | None = None,
        forms: Callable[[Tensor], Iterable[Tensor]] = once,
    ) -> None:
        self.client, self.original, self.label, self.threat = client, original, label, threat
        self.classes, self.budget, self._forms = classes, budget, forms
        self.queries = self.rejected = self._repeats = 0
        self.found: bytes | None = None
        self.answered = torch.ones(0, dtype=torch.bool)
        self._clean = image(original)
        self._memory: dict[bytes, Answer | None] = {}
        if known is not None:
            self._memory[original.tobytes()] = known

    def __call__(self, x: Tensor) -> Tensor:
        answers = [self._answer(point) for point in x]
        self.answered = torch.tensor([answer is not None for answer in answers])
        return torch.stack([self._logits(answer) for answer in answers]).to(x)

    def sent(self, point: Tensor) -> Pixels:
        """What is sent of a point: the nearest grey levels, or towards the original where those leave the ball."""
        nearest = pixels(point)
        if not isinstance(self.threat, Ball) or within(self.threat, self.original, nearest):
            return nearest
        levels = 255 * (point.detach().double().cpu() - self._clean)
        shorter = pixels(self._clean + levels.trunc() / 255)
        return shorter if within(self.threat, self.original, shorter) else nearest

    def _answer(self, point: Tensor) -> Answer | None:
        for form in self._forms(point):
            answer = self._ask(self.sent(form))
            if answer is not None:
                return answer
        return None

    def _ask(self, sent: Pixels) -> Answer | None:
        name = sent.tobytes()
        if name in self._memory:
            self._repeats += 1
            if self._repeats > 100 + 10 * self.budget:
                raise Over("there is nothing new to ask")
            return self._memory[name]
        if self.queries >= self.budget:
            raise Over("the budget is spent")
        body = png(sent)
        try:
            answer = self.client.ask(body)
        except NoKeys as error:
            raise Over(str(error)) from error
        self.queries += 1
        self.rejected += answer is None
        self._memory[name] = answer
        if answer is not None and answer.index != self.label and within(self.threat, self.original, sent):
            self.found = body
            raise Over("an image was found")
        return answer

    def _logits(self, answer: Answer | None) -> Tensor:
        if answer is not None and answer.scores is not None:
            return torch.tensor(answer.scores, dtype=torch.float64).clamp_min(1e-12).log()
        logits = torch.full((self.classes,), -_SURE if answer is None else -1.0)
        logits[self.label if answer is None else answer.index] = 0.0
        return logits
