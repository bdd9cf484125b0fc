"""Which model answers an account, and when a new one is taken back without anybody's doing."""

from __future__ import annotations

import hashlib
import logging
import statistics
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.exc import SQLAlchemyError

from robustkit.errors import RobustkitError
from robustkit.results import Interval
from robustkit.serve.decode import Pixels
from robustkit.serve.logs import log
from robustkit.serve.metrics import Metrics
from robustkit.serve.refusal import Refused
from robustkit.serve.registry import Alias, Registry, Served

_PATIENCE = 30.0  # seconds before a model that could not be loaded is tried again
_WINDOW = 1000  # of a model's latest answers, by which it is judged

Chosen = tuple[str, Served]  # alias and model


@dataclass(frozen=True)
class Bounds:
    """How much worse than the model before it a new one may be, once each has given `least` answers.

    Units: shares in [0, 1]; `slower` a ratio of median times.
    """

    least: int = 50
    errors: float = 0.01  # share of answers that failed: the lower end of its interval
    flagged: float = 0.05  # share of queries that a detector flagged: between the intervals
    slower: float = 2.0
    probe: float = 0.02  # accuracy on the probe set


@dataclass
class Window:
    """A model's latest answers in this process: seconds, failures, flags."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    failed: deque[bool] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    flagged: deque[bool] = field(default_factory=lambda: deque(maxlen=_WINDOW))


@dataclass(frozen=True, eq=False)
class Probe:
    """Labelled images whose accuracy every new model must hold. Shapes: uint8 (n, H, W, C), (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def accuracy(self, model: Served) -> float:
        """The share of the probe set that a model gets right; 0 where it fails."""
        try:
            answers = [int(model.probabilities(image).argmax()) for image in self.images]
        except (RuntimeError, FloatingPointError):
            return 0.0
        return float(np.mean(np.array(answers) == self.labels))


def read_probe(path: Path) -> Probe:
    """The probe set in an .npz file with `images` and `labels`. Raises: RobustkitError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            probe = Probe(np.asarray(arrays["images"]), np.asarray(arrays["labels"]))
    except (OSError, ValueError, KeyError) as error:
        raise RobustkitError(
            f"{path} is no probe set ({type(error).__name__}); save images and labels with np.savez."
        ) from error
    shape = probe.images.shape
    if probe.images.dtype != np.uint8 or len(shape) != 4 or probe.labels.shape != shape[:1] or not shape[0]:
        raise RobustkitError(
            f"{path} holds images {probe.images.dtype} {shape}, labels {probe.labels.shape}; a probe set has "
            "uint8 (n, H, W, C) and (n,)."
        )
    return probe


def complaint(new: Window, old: Window, bounds: Bounds) -> str | None:
    """Why a new model should be taken back, beside the one before it; None while nothing speaks against it."""
    if len(new.failed) >= bounds.least:
        errors = Interval(sum(new.failed), len(new.failed))
        if errors.low > bounds.errors:
            return f"errors {errors}"
    if min(len(new.flagged), len(old.flagged)) >= bounds.least:
        now, before = (Interval(sum(one.flagged), len(one.flagged)) for one in (new, old))
        if now.low > before.high + bounds.flagged:
            return f"flagged {now}, before {before}"
    if min(len(new.seconds), len(old.seconds)) >= bounds.least:
        ratio = statistics.median(new.seconds) / statistics.median(old.seconds)
        if ratio > bounds.slower:
            return f"latency {ratio:.1f} times as long"
    return None


class Router:
    """The registry's aliases, their models in memory, and what each did.

    A model that cannot be loaded changes nothing: the one that answered before goes on.
    Raises: RobustkitError when none of champion, last-good and fallback can be loaded at the start.
    """

    def __init__(
        self,
        registry: Registry,
        metrics: Metrics,
        probe: Probe | None = None,
        bounds: Bounds | None = None,
        *,
        believed: float = 1.0,
    ) -> None:
        self._believed = believed
        self._registry, self._metrics = registry, metrics
        self._probe, self._bounds = probe, bounds or Bounds()
        self._lock = threading.Lock()
        self._read = time.monotonic()
        self._loaded: dict[str, Served] = {}
        self._failed: dict[str, float] = {}
        self._windows: dict[str, Window] = {}
        self._accuracies: dict[str, float] = {}
        self._serving: dict[str, Served] = {}
        self._percent = 0
        self._follow(registry.aliases())
        for alias in ("last-good", "fallback"):
            if "champion" not in self._serving and alias in self._serving:
                self._serving["champion"] = self._serving[alias]
        if "champion" not in self._serving:
            raise RobustkitError("no model of the registry can be loaded; register one that is signed.")

    @property
    def champion(self) -> Served:
        """What answers when nothing else is said."""
        return self._serving["champion"]

    def choose(self, account: str, serving: str, now: float) -> list[Chosen]:
        """Who answers this account; several are an ensemble.

        `serving` is the posture's: champion, canary (it for its share of accounts, the champion for the others),
        fallback, ensemble.
        """
        self._refresh(now)
        held = self._serving
        if serving == "ensemble":
            return list({model.digest: ("ensemble", model) for model in held.values()}.values())
        if serving == "canary" and "canary" in held:
            canary = held["canary"]
            return (
                [("canary", canary)]
                if share(canary.digest, account) < self._percent
                else [("champion", held["champion"])]
            )
        alias = serving if serving in held and serving != "canary" else "champion"
        return [(alias, held[alias])]

    def scores(self, chosen: list[Chosen], image: Pixels) -> tuple[str, NDArray[np.float64]]:
        """The digest that answered and the mean probabilities of the chosen models.

        One that fails is passed over; when all have failed, the others that are loaded are asked, one by one.
        Shapes: uint8 (H, W, C) -> (classes,). Raises: Refused, 503, when every model has failed.
        """
        found = {
            model.digest: scores for _, model in chosen if (scores := self._asked(model, image)) is not None
        }
        held = self._serving
        others = [held[alias] for alias in ("champion", "last-good", "fallback") if alias in held]
        tried = {model.digest for _, model in chosen}
        while not found and others:
            model = others.pop(0)
            if model.digest not in tried and (scores := self._asked(model, image)) is not None:
                found[model.digest] = scores
            tried.add(model.digest)
        if not found:
            raise Refused(503, "no model can answer; come again.", retry_after=5)
        mean: NDArray[np.float64] = np.mean(list(found.values()), axis=0)
        return ("ensemble" if len(found) > 1 else next(iter(found))), mean

    def flagged(self, chosen: list[Chosen], flagged: bool) -> None:
        """Remember what the detectors said of a query of these models."""
        for _, model in chosen:
            self._window(model.digest).flagged.append(flagged)

    def _asked(self, model: Served, image: Pixels) -> NDArray[np.float64] | None:
        window, started = self._window(model.digest), time.perf_counter()
        try:
            scores = model.probabilities(image)
        except (RuntimeError, FloatingPointError) as error:
            log("a model failed", {"model": model.digest, "error": type(error).__name__}, logging.ERROR)
            window.failed.append(True)
            return None
        window.seconds.append(time.perf_counter() - started)
        window.failed.append(False)
        return scores

    def _window(self, digest: str) -> Window:
        return self._windows.setdefault(digest, Window())

    # --- following the registry -------------------------------------------------------------------------

    def _refresh(self, now: float) -> None:
        """Follow the aliases now and then, in one thread; the others go on with what is there."""
        if time.monotonic() - self._read < self._believed or not self._lock.acquire(blocking=False):
            return
        try:
            self._follow(self._registry.aliases())
            self._judge(now)
        except SQLAlchemyError:
            log("the registry is out of reach; its models go on", {}, logging.WARNING)
        finally:
            self._read = time.monotonic()
            self._lock.release()

    def _follow(self, named: dict[str, Alias]) -> None:
        serving = {}
        for alias, wanted in named.items():
            model = self._loaded.get(wanted.digest) or self._load(alias, wanted.digest)
            if model is None and alias != "canary":
                model = self._serving.get(alias)
            if model is not None:
                serving[alias] = model
        self._percent = named["canary"].percent if "canary" in named else 0
        self._serving = serving if "champion" in serving else {**self._serving, **serving}
        kept = {model.digest for model in self._serving.values()}
        self._loaded = {digest: model for digest, model in self._loaded.items() if digest in kept}

    def _load(self, alias: str, digest: str) -> Served | None:
        clock = time.monotonic()
        if clock - self._failed.get(digest, -_PATIENCE) < _PATIENCE:
            return None
        try:
            self._loaded[digest] = self._registry.load_digest(digest)
        except RobustkitError as error:
            self._failed[digest] = clock
            what = {"alias": alias, "model": digest, "reason": str(error)}
            log("a model was not loaded", what, logging.ERROR)
            return None
        return self._loaded[digest]

    def _judge(self, now: float) -> None:
        """Take back the canary, or a champion that has a predecessor, when it leaves the bounds."""
        held = self._serving
        new, old = ("canary", "champion") if "canary" in held else ("champion", "last-good")
        if old not in held or held[new].digest == held[old].digest:
            return
        reason = self._probed(held[new], held[old]) or complaint(
            self._window(held[new].digest), self._window(held[old].digest), self._bounds
        )
        if reason and self._registry.take_back(
            new, held[new].digest, reason=reason, actor="service", now=now
        ):
            what = {"alias": new, "model": held[new].digest, "reason": reason}
            log("rolled back", what, logging.WARNING)
            self._metrics.rollbacks.labels(reason.split()[0]).inc()
            self._windows.pop(held[new].digest, None)
            self._follow(self._registry.aliases())

    def _probed(self, new: Served, old: Served) -> str | None:
        if self._probe is None:
            return None
        for model in (new, old):
            if model.digest not in self._accuracies:
                self._accuracies[model.digest] = self._probe.accuracy(model)
        lost = self._accuracies[old.digest] - self._accuracies[new.digest]
        return f"accuracy {lost:.1%} lower on the probe set" if lost > self._bounds.probe else None


def share(salt: str, account: str) -> int:
    """A number from 0 to 99 that an account keeps as long as the salt: its place among the canary's shares."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{account}".encode()).digest()[:8]) % 100
