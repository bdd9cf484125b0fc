"""Which model answers an account."""

from __future__ import annotations

import hashlib
import logging
import threading
import time

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.exc import SQLAlchemyError

from robustkit.errors import RobustkitError
from robustkit.serve.decode import Pixels
from robustkit.serve.logs import log
from robustkit.serve.registry import Alias, Registry, Served

_FRESH = 1.0  # seconds for which this process believes what it read about the aliases


class Router:
    """The registry's aliases, their models in memory. A model that cannot be loaded changes nothing: the one that
    answered before goes on.

    Raises: RobustkitError when none of champion, last-good and fallback can be loaded at the start.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._read = time.monotonic()
        self._loaded: dict[str, Served] = {}
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

    def choose(self, account: str, serving: str) -> list[tuple[str, Served]]:
        """Alias and model that answer this account; several are an ensemble.

        `serving` is the posture's: champion and canary (the canary for its share of accounts), fallback, ensemble.
        """
        self._refresh()
        held = self._serving
        if serving == "fallback" and "fallback" in held:
            return [("fallback", held["fallback"])]
        if serving == "ensemble":
            distinct = {model.digest: ("ensemble", model) for model in held.values()}
            return list(distinct.values())
        if serving == "canary" or serving == "champion":
            canary = held.get("canary")
            if canary is not None and share(canary.digest, account) < self._percent:
                return [("canary", canary)]
        return [("champion", held["champion"])]

    def _refresh(self) -> None:
        """Follow the aliases once a second, in one thread; the others go on with what is there."""
        if time.monotonic() - self._read < _FRESH or not self._lock.acquire(blocking=False):
            return
        try:
            self._follow(self._registry.aliases())
        except SQLAlchemyError:
            log("the registry is out of reach; its models go on", {}, logging.WARNING)
        finally:
            self._read = time.monotonic()
            self._lock.release()

    def _follow(self, named: dict[str, Alias]) -> None:
        serving = {}
        for alias, wanted in named.items():
            model = self._loaded.get(wanted.digest)
            if model is None:
                try:
                    model = self._loaded[wanted.digest] = self._registry.load_digest(wanted.digest)
                except RobustkitError as error:
                    what = {"alias": alias, "model": wanted.digest, "reason": str(error)}
                    log("a model was not loaded", what, logging.ERROR)
                    model = self._serving.get(alias) if alias != "canary" else None
            if model is not None:
                serving[alias] = model
        self._percent = named["canary"].percent if "canary" in named else 0
        self._serving = serving if "champion" in serving else {**self._serving, **serving}
        kept = {model.digest for model in serving.values()}
        self._loaded = {digest: model for digest, model in self._loaded.items() if digest in kept}


def share(salt: str, account: str) -> int:
    """A number from 0 to 99 that an account keeps as long as the salt: its place among the canary's shares."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{account}".encode()).digest()[:8]) % 100


def averaged(models: list[tuple[str, Served]], image: Pixels) -> NDArray[np.float64]:
    """The mean of the models' probabilities. Shapes: uint8 (H, W, C) -> (classes,)."""
    scores: NDArray[np.float64] = np.mean([model.probabilities(image) for _, model in models], axis=0)
    return scores
