"""What becomes of one image: decode, duplicates, detectors, model, output policy. Knows nothing of HTTP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from robustkit.serve import auth, events
from robustkit.serve.cache import Answers, digest
from robustkit.serve.decode import Pixels, decode
from robustkit.serve.detectors import Detector, Verdict, observe
from robustkit.serve.incident import Posture
from robustkit.serve.logs import log
from robustkit.serve.metrics import Metrics
from robustkit.serve.quarantine import Quarantine
from robustkit.serve.refusal import Refused
from robustkit.serve.registry import Served
from robustkit.serve.routing import Chosen, Router
from robustkit.serve.settings import Settings
from robustkit.serve.telemetry import Images, Scores, roughness, squeezing


@dataclass(frozen=True)
class Pipeline:
    """The stages in their order; an optional one is None or empty."""

    settings: Settings
    engine: Engine
    accounts: auth.Accounts
    router: Router
    metrics: Metrics
    posture: Callable[[float], Posture]
    detectors: Sequence[Detector] = ()
    answers: Answers | None = None
    quarantine: Quarantine | None = None

    def answer(self, account: str, body: bytes, now: float) -> dict[str, Any]:
        """Label, index and, by the output policy, scores. Raises: Refused; what the store raises."""
        image = decode(body, self.router.champion.shape, most_pixels=self.settings.most_pixels)
        posture = self.posture(now)
        output = posture.output or self.settings.output
        chosen = self.router.choose(account, posture.serving, now)
        name = digest(image)
        asked = f"{chosen[0][1].digest if len(chosen) == 1 else 'ensemble'}:{output}"
        mode = posture.mode or self.settings.mode
        told, verdicts = self._recalled(account, image, name, asked, mode, now)
        if told is not None:
            self.metrics.duplicates.inc()
            return told
        if mode != "off":
            self._judge(account, image, verdicts, mode, chosen, now)
        model, scores = self.router.scores(chosen, image)
        told = spoken(scores, chosen[0][1].labels, output)
        self.metrics.answers.labels(chosen[0][0], model[:12]).inc()
        self._measure(image, name, scores, chosen[0][1])
        if self.answers and asked.startswith(model):  # not what a substitute said for a model that failed
            self.answers.put(account, name, asked, told, now)
        return told

    def _recalled(
        self, account: str, image: Pixels, name: str, asked: str, mode: str, now: float
    ) -> tuple[dict[str, Any] | None, dict[str, Verdict]]:
        """What the store knows of this query, in one transaction: the answer to a duplicate, or verdicts."""
        detectors = self.detectors if mode != "off" else ()
        if not (self.answers or detectors):
            return None, {}
        with self.engine.connect() as connection:
            told = self.answers.get(connection, account, name, asked, now) if self.answers else None
            return told, {} if told is not None else observe(connection, detectors, account, image, now)

    def _judge(
        self,
        account: str,
        image: Pixels,
        verdicts: Mapping[str, Verdict],
        mode: str,
        chosen: list[Chosen],
        now: float,
    ) -> None:
        """What a flag leads to is the mode's. Raises: Refused, 403."""
        flagged = {name: verdict for name, verdict in verdicts.items() if verdict.flagged}
        self.router.flagged(chosen, bool(flagged))
        if not flagged:
            return
        for name in flagged:
            self.metrics.flags.labels(name).inc()
        total = auth.flag(self.engine, account, now)
        reason = ", ".join(f"{name} {verdict.score:.2f}" for name, verdict in flagged.items())
        log("flagged", {"account": account, "reason": reason, "mode": mode, "total": total})
        self._keep(account, image, reason, now)
        if mode == "ban" and total >= self.settings.ban_after:
            self._ban(account, reason, now)
        if mode in ("reject", "ban"):
            self.metrics.rejected.inc()
            raise Refused(403, "rejected")

    def _ban(self, account: str, reason: str, now: float) -> None:
        until = now + self.settings.ban_seconds
        auth.ban(self.engine, account, until, now)
        self.accounts.forget(account)
        self.metrics.bans.inc()
        body = {"account": account, "until": until, "reason": reason}
        events.append(self.engine, "account.banned", body, actor="service", now=now)

    def _measure(self, image: Pixels, name: str, scores: NDArray[np.float64], model: Served) -> None:
        """Telemetry of one input; what costs two more predictions, of a sample that its digest draws."""
        self.metrics.confidence.observe(float(scores.max()))
        self.metrics.roughness.observe(float(roughness(image[None])[0]))
        every = self.settings.squeeze_every
        if every and int(name[:8], 16) % every == 0:

            def predict(images: Images) -> Scores:
                return np.stack([model.probabilities(one) for one in images])

            with suppress(RuntimeError, FloatingPointError):  # of a model whose substitute has answered
                self.metrics.squeezing.observe(float(squeezing(predict, image[None])[0]))

    def publish(self) -> tuple[int, str]:
        """Tell the metrics what the store holds; return its newest event, an anchor to keep elsewhere."""
        seq, head = events.newest(self.engine)
        self.metrics.events.set(seq)
        self.metrics.chain.info({"digest": head})
        if self.quarantine is not None:
            self.metrics.quarantined.set(self.quarantine.usage()[0])
        return seq, head

    def expire(self, now: float) -> None:
        """Let go of what is past its time: kept images, answers, what detectors remember."""
        for holder in (self.quarantine, self.answers, *self.detectors):
            if holder is not None:
                holder.expire(now)

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
