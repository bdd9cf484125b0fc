"""Which models may serve: signed folders, a table of them, and the aliases by which they are asked for."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    String,
    Table,
    delete,
    insert,
    select,
)
from sqlalchemy.exc import IntegrityError
from torch import nn

from robustkit import models
from robustkit.data import CIFAR10_CLASSES, DIGIT_CLASSES
from robustkit.errors import RobustkitError
from robustkit.models import zoo
from robustkit.serve import events, signing
from robustkit.serve.decode import Pixels
from robustkit.serve.store import metadata

ALIASES = ("champion", "canary", "fallback", "last-good")

registered = Table(
    "models",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("name", String(100), nullable=False),
    Column("registered", Float, nullable=False),
)
aliases = Table(
    "aliases",
    metadata,
    Column("alias", String(20), primary_key=True),
    Column("digest", String(64), ForeignKey("models.digest"), nullable=False),
    Column("percent", Integer, nullable=False, server_default="100"),
    Column("changed", Float, nullable=False),
)

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")


def _takes(architecture: str) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    """Input (H, W, C) and labels of the kit's architectures."""
    return ((28, 28, 1), DIGIT_CLASSES) if architecture == "mnist_cnn" else ((32, 32, 3), CIFAR10_CLASSES)


@dataclass(frozen=True, eq=False)
class Served:
    """A model that answers. Shapes: `shape` is (H, W, C) of the uint8 images that it takes."""

    name: str
    digest: str
    shape: tuple[int, int, int]
    labels: tuple[str, ...]
    model: nn.Module

    def probabilities(self, image: Pixels) -> NDArray[np.float64]:
        """Shapes: uint8 (H, W, C) -> (classes,), in float32 on the CPU.

        Raises: FloatingPointError when the model answers with anything but numbers.
        """
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            scores: NDArray[np.float64] = self.model(x)[0].double().softmax(0).numpy()
        if not np.isfinite(scores).all():
            raise FloatingPointError(f"{self.name} answered with a value that is not finite")
        return scores


def bundle(name: str, source: Path, folder: Path, key: Path) -> Path:
    """A signed folder of the model `name` of `source`, as `Registry.register` takes it: card, weights, signature.

    Raises: RobustkitError for a name without a card.
    """
    card = zoo.card(name, source)
    out = folder / name
    out.mkdir(parents=True, exist_ok=True)
    for file in (f"{name}.json", *_files(name, card)):
        shutil.copyfile(source / file, out / file)
    signing.sign(out, _signature(out), key)
    return out


class Registry:
    """Models in `folder`, by digest; nothing is loaded whose signature `verify_key` does not confirm, each time."""

    def __init__(self, engine: Engine, folder: Path, verify_key: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._verify_key = verify_key
        folder.mkdir(parents=True, exist_ok=True)

    def register(self, bundle: Path, *, actor: str, now: float) -> str:
        """Take over a signed folder with one card and its weights; the digest under which the model is known.

        What is checked is the copy that stays. Raises: RobustkitError for a signature that does not fit, a card
        that cannot be read, weights that are not the card's or not the architecture's; nothing is kept then.
        """
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".incoming-") as aside:
            copy = Path(aside) / bundle.name
            try:
                shutil.copytree(bundle, copy, symlinks=True)
                shutil.copyfile(_signature(bundle), _signature(copy))
            except OSError as error:
                raise RobustkitError(
                    f"{bundle.name} or its signature cannot be copied ({error.strerror}); put both there."
                ) from error
            model = self._load(copy)
            with suppress(OSError):  # it is registered already, by this or another replica
                _signature(copy).replace(_signature(self._folder / model.digest))
                copy.replace(self._folder / model.digest)
        row = {"digest": model.digest, "name": model.name}
        with suppress(IntegrityError), self._engine.begin() as connection:
            connection.execute(insert(registered).values(**row, registered=now))
            events.append_within(connection, "model.registered", row, actor=actor, now=now)
        return model.digest

    def load(self, alias: str) -> Served:
        """The model behind an alias. Raises: RobustkitError as `load_digest`, and for an alias that names none."""
        named = self.aliases()
        if alias not in named:
            raise RobustkitError(f"no model is {alias}; give one that alias first.")
        return self.load_digest(named[alias].digest)

    def load_digest(self, digest: str) -> Served:
        """Raises: RobustkitError unless the model is there, signed, and what its card says."""
        return self._load(self._folder / digest)

    def _load(self, folder: Path) -> Served:
        signing.verify(folder, _signature(folder), self._verify_key)
        cards = [path for path in folder.glob("*.json") if _NAME.fullmatch(path.stem)]
        if len(cards) != 1:
            raise RobustkitError(f"{folder.name} holds {len(cards)} cards; a model has one, NAME.json.")
        name = cards[0].stem
        card = zoo.card(name, folder)
        shape, labels = _takes(card["architecture"])
        return Served(name, card["sha256"], shape, labels, zoo.load(name, models.build, folder))

    # --- aliases --------------------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        """What is registered, oldest first."""
        with self._engine.connect() as connection:
            rows = connection.execute(select(registered).order_by(registered.c.registered))
            return [dict(row._mapping) for row in rows]

    def aliases(self) -> dict[str, Alias]:
        """Which model each alias names."""
        with self._engine.connect() as connection:
            rows = connection.execute(select(aliases)).all()
        return {row.alias: Alias(row.digest, row.percent) for row in rows}

    def assign(
        self, alias: str, digest: str, *, reason: str, actor: str, now: float, percent: int = 100
    ) -> None:
        """Let `alias` name a model; `percent` is the share of accounts that a canary answers.

        Raises: RobustkitError for an unknown alias or model, a share outside 1 to 100, or a model that does not load.
        """
        if alias not in ALIASES:
            raise RobustkitError(f"alias {alias!r} is unknown; choose one of {', '.join(ALIASES)}.")
        if not 1 <= percent <= 100:
            raise RobustkitError(f"a share must lie in 1 to 100 percent; got {percent}.")
        if digest not in {row["digest"] for row in self.models()}:
            raise RobustkitError(f"model {digest[:12]} is not registered; register it first.")
        self.load_digest(digest)
        with self._engine.begin() as connection:
            body = {"alias": alias, "model": digest, "percent": percent, "reason": reason}
            events.append_within(connection, "model.assigned", body, actor=actor, now=now)
            _assign(connection, alias, digest, now, percent)

    def promote(self, *, reason: str, actor: str, now: float) -> str:
        """The canary becomes champion, the champion last-good; the new champion.

        Raises: RobustkitError without a canary, or for one that does not load.
        """
        named = self.aliases()
        if "canary" not in named:
            raise RobustkitError("there is no canary to promote; name one first.")
        new, old = named["canary"].digest, named["champion"].digest
        self.load_digest(new)
        with self._engine.begin() as connection:
            body = {"model": new, "before": old, "reason": reason}
            events.append_within(connection, "model.promoted", body, actor=actor, now=now)
            if not _removed(connection, "canary", new):
                raise RobustkitError("somebody else has just moved the canary; look again.")
            _assign(connection, "last-good", old, now)
            _assign(connection, "champion", new, now)
        return new

    def rollback(self, *, reason: str, actor: str, now: float) -> str:
        """Take back the canary, or without one let last-good be champion again; the digest that was taken back.

        Raises: RobustkitError when there is neither.
        """
        named = self.aliases()
        alias = "canary" if "canary" in named else "champion"
        digest = named[alias].digest
        if not self.take_back(alias, digest, reason=reason, actor=actor, now=now):
            raise RobustkitError("there is no canary and no other model that was good; promote one first.")
        return digest

    def take_back(self, alias: str, digest: str, *, reason: str, actor: str, now: float) -> bool:
        """Undo a canary, or a promotion, if `alias` still names that model: of several replicas one does it."""
        good = self.aliases().get("last-good")
        if alias == "champion" and (good is None or good.digest == digest):
            return False
        if alias == "champion" and good is not None:
            self.load_digest(good.digest)
        with self._engine.begin() as connection:
            body = {"alias": alias, "model": digest, "reason": reason}
            events.append_within(connection, "model.rolled-back", body, actor=actor, now=now)
            if not _removed(connection, alias, digest):
                connection.rollback()
                return False
            if alias == "champion" and good is not None:
                _assign(connection, "champion", good.digest, now)
        return True


@dataclass(frozen=True)
class Alias:
    """A name for a model, and the share of accounts that it answers."""

    digest: str
    percent: int


def _assign(connection: Connection, alias: str, digest: str, now: float, percent: int = 100) -> None:
    connection.execute(delete(aliases).where(aliases.c.alias == alias))
    connection.execute(insert(aliases).values(alias=alias, digest=digest, percent=percent, changed=now))


def _removed(connection: Connection, alias: str, digest: str) -> bool:
    named = (aliases.c.alias == alias) & (aliases.c.digest == digest)
    return bool(connection.execute(delete(aliases).where(named)).rowcount)


def _signature(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.sig")


def _files(name: str, card: Mapping[str, Any]) -> Sequence[str]:
    files: Sequence[str] = card.get("files", [f"{name}.safetensors"])
    return files
