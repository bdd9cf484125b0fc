"""Exact duplicates, answered from what was answered before.

Phones retry and people tap twice: a detector that sees those repeats calls most of them an attack. An answer is
found for the same account, the same pixels and the same model only, so nobody learns by timing or by a label
what others have sent, and a new model answers anew. Repeats are counted apart from the queries that detectors see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    String,
    Table,
    Text,
    bindparam,
    delete,
    func,
    select,
    update,
)

from robustkit.serve.store import Prepared, insert, metadata

Image = NDArray[np.uint8]

_answers = Table(
    "answers",
    metadata,
    Column("account", String(128), primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("model", String(128), primary_key=True),
    Column("answer", Text, nullable=False),
    Column("at", Float(53), nullable=False),
    Column("repeats", BigInteger, nullable=False),
    Index("answers_by_age", "account", "at"),
)


def digest(image: Image) -> str:
    """The content address of an image: sha256 of its shape and its pixels. Shapes: (h, w, c) uint8."""
    named = hashlib.sha256(repr(image.shape).encode())
    named.update(np.ascontiguousarray(image).data)
    return named.hexdigest()


class Answers:
    """Answers by account, image and model: `lasting` seconds, at most `per_account` of an account, oldest out first."""

    def __init__(self, engine: Engine, *, lasting: float = 3600, per_account: int = 256) -> None:
        self._engine, self._lasting, self._per_account = engine, lasting, per_account
        mine = _answers.c.account == bindparam("of")
        here = mine & (_answers.c.digest == bindparam("image")) & (_answers.c.model == bindparam("by"))
        self._find = Prepared(engine, select(_answers.c.answer, _answers.c.at).where(here))
        self._count = Prepared(engine, update(_answers).where(here).values(repeats=_answers.c.repeats + 1))
        stored = insert(engine, _answers)
        new = {name: stored.excluded[name] for name in ("answer", "at", "repeats")}
        key = ["account", "digest", "model"]
        self._store = Prepared(engine, stored.on_conflict_do_update(index_elements=key, set_=new))
        newest = select(_answers.c.at).where(mine).order_by(_answers.c.at.desc())
        oldest = newest.offset(per_account).limit(1).scalar_subquery()
        self._trim = Prepared(engine, delete(_answers).where(mine, _answers.c.at <= oldest))

    def get(
        self, connection: Connection, account: str, digest: str, model: str, now: float
    ) -> dict[str, Any] | None:
        """What this account was told about this image by this model, if that is not too old; counted as a repeat."""
        here = {"of": account, "image": digest, "by": model}
        rows, _ = self._find(connection, **here)
        if not rows or not abs(now - rows[0][1]) < self._lasting:
            return None
        self._count(connection, **here)
        connection.commit()
        found: dict[str, Any] = json.loads(rows[0][0])
        return found

    def put(self, account: str, digest: str, model: str, answer: Mapping[str, Any], now: float) -> None:
        """Keep an answer, and let go of the account's oldest beyond its share."""
        row = {"account": account, "digest": digest, "model": model}
        with self._engine.begin() as connection:
            self._store(connection, **row, answer=json.dumps(answer), at=now, repeats=0)
            self._trim(connection, of=account)

    def repeats(self, account: str) -> int:
        """How many queries of this account were answered from here, of the answers still kept."""
        with self._engine.connect() as connection:
            total = connection.scalar(
                select(func.sum(_answers.c.repeats)).where(_answers.c.account == account)
            )
        return int(total or 0)

    def expire(self, now: float) -> int:
        """Remove what is too old to answer with; how many."""
        with self._engine.begin() as connection:
            return connection.execute(delete(_answers).where(_answers.c.at <= now - self._lasting)).rowcount
