"""What becomes of one image: decode, duplicates, detectors, model, output policy. Knows nothing of HTTP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from robustkit.serve import auth
from robustkit.serve.cache import Answers, digest
from robustkit.serve.decode import Pixels, decode
from robustkit.serve.detectors import Detector
from robustkit.serve.logs import log
from robustkit.serve.metrics import Metrics
from robustkit.serve.quarantine import Quarantine
from robustkit.serve.refusal import Refused
from robustkit.serve.routing import Router, averaged
from robustkit.serve.settings import Settings


class Posture(Protocol):
    """What the incident machine says; None leaves a policy as it is configured."""

    @property
    def serving(self) -> str: ...
    @property
    def output(self) -> str | None: ...
    @property
    def mode(self) -> str | None: ...


@dataclass(frozen=True)
class Calm:
    """The posture where nobody watches for incidents."""

    serving: str = "champion"
    output: str | None = None
    mode: str | None = None


@dataclass(frozen=True)
class Pipeline:
    """The stages in their order; an optional one is None or empty."""

    settings: Settings
    engine: Engine
    accounts: auth.Accounts
    router: Router
    metrics: Metrics
    detectors: Sequence[Detector] = ()
    answers: Answers | None = None
    quarantine: Quarantine | None = None
    posture: Callable[[float], Posture] = lambda now: Calm()

    def answer(self, account: str, body: bytes, now: float) -> dict[str, Any]:
        """Label, index and, by the output policy, scores. Raises: Refused; what the store raises."""
        image = decode(body, self.router.champion.shape, most_pixels=self.settings.most_pixels)
        posture = self.posture(now)
        output = posture.output or self.settings.output
        models = self.router.choose(account, posture.serving)
        name = digest(image)
        answered_by = f"{models[0][1].digest if len(models) == 1 else 'ensemble'}:{output}"
        told = self.answers.get(account, name, answered_by, now) if self.answers else None
        if told is not None:
            self.metrics.duplicates.inc()
            return told
        self._inspect(account, image, posture.mode or self.settings.mode, now)
        told = spoken(averaged(models, image), models[0][1].labels, output)
        for alias, model in models:
            self.metrics.answers.labels(alias, model.digest[:12]).inc()
        if self.answers:
            self.answers.put(account, name, answered_by, told, now)
        return told

    def _inspect(self, account: str, image: Pixels, mode: str, now: float) -> None:
        """Ask the detectors; what a flag leads to is the mode's. Raises: Refused, 403."""
        if mode == "off":
            return
        verdicts = {detector.name: detector.observe(account, image, now) for detector in self.detectors}
        flagged = {name: verdict for name, verdict in verdicts.items() if verdict.flagged}
        if not flagged:
            return
        for name in flagged:
            self.metrics.flags.labels(name).inc()
        total = auth.flag(self.engine, account, now)
        reason = ", ".join(f"{name} {verdict.score:.2f}" for name, verdict in flagged.items())
        log("flagged", {"account": account, "reason": reason, "mode": mode, "total": total})
        self._keep(account, image, reason, now)
        if mode == "ban" and total >= self.settings.ban_after:
            auth.ban(self.engine, account, now + self.settings.ban_seconds, now)
            self.accounts.forget(account)
            self.metrics.bans.inc()
        if mode in ("reject", "ban"):
            self.metrics.rejected.inc()
            raise Refused(403, "rejected")

    def _keep(self, account: str, image: Pixels, reason: str, now: float) -> None:
        """Quarantine a flagged image. A disk that is full costs the copy, not the answer."""
        if self.quarantine is None:
            return
        try:
            kept = self.quarantine.put(account, image, reason, now)
        except (OSError, SQLAlchemyError):
            kept = None
            log("an image was not kept", {"account": account}, logging.ERROR)
        if kept is None:
            self.metrics.lost.labels("quarantine").inc()


def spoken(scores: NDArray[np.float64], labels: Sequence[str], output: str) -> dict[str, Any]:
    """An answer as the output policy has it: the label; with it the first score to one decimal; or all scores."""
    index = int(scores.argmax())
    told: dict[str, Any] = {"label": labels[index], "index": index}
    if output == "rounded":
        told["scores"] = {labels[index]: round(float(scores[index]), 1)}
    elif output == "full":
        told["scores"] = {label: float(score) for label, score in zip(labels, scores, strict=True)}
    return told
