"""Inputs of attacks, kept for the analysts: sealed, capped, and gone when their time is over.

They are photographs of customers, rightly flagged or not. So what lies on the disk is sealed with AES-GCM, an
account is a pseudonym that only the holder of the service's key can follow, and everything expires. And an attacker
chooses what comes in here: shares per account and in total keep a flood from filling the disk or pushing out the
evidence against others.
"""

from __future__ import annotations

import secrets
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import (
    BigInteger,
    Column,
    Engine,
    Float,
    Integer,
    String,
    Table,
    delete,
    func,
    select,
    update,
)

from robustkit.errors import RobustkitError
from robustkit.files import write_atomically
from robustkit.serve.cache import Image, digest
from robustkit.serve.store import metadata, only_row

_NONCE = 12
_SHAPE = struct.Struct(">III")

_items = Table(
    "quarantine",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("account", String(128), primary_key=True, index=True),
    Column("reason", String(200), nullable=False),
    Column("at", Float(53), nullable=False),
    Column("expires", Float(53), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
)
# One row: what is kept and what was turned away. Whoever changes the quarantine holds it, so that caps are exact.
_totals = Table(
    "quarantine_totals",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("bytes", BigInteger, nullable=False),
    Column("refused", BigInteger, nullable=False),
)


@dataclass(frozen=True)
class Item:
    """One image of one account: why it was kept, when, and until when (seconds since the epoch)."""

    digest: str
    account: str
    reason: str
    at: float
    expires: float


class Quarantine:
    """Images by content: `folder` holds the sealed bytes, the store who sent them, why and until when.

    `key` (32 bytes) seals; without it the folder is noise. Names in the folder are sha256 of the image, so who has
    a copy of a photograph can see from the names that it was sent. Units: bytes as sealed, seconds.
    Raises: RobustkitError for a key of another length.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        key: bytes,
        *,
        per_account: int = 8 * 2**20,
        total: int = 512 * 2**20,
        lasting: float = 30 * 86400,
    ) -> None:
        if len(key) != 32:
            raise RobustkitError(f"a quarantine's key has 32 bytes; got {len(key)}. Draw 32 random ones.")
        self._engine, self._folder, self._seal = engine, folder, AESGCM(key)
        self._per_account, self._total, self._lasting = per_account, total, lasting
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, account: str, image: Image, reason: str, now: float) -> str | None:
        """Keep an image and return its digest; None, and counted, when a share or the disk is full.

        The same image of the same account is kept once, as it came first.
        """
        name = digest(image)
        nonce = secrets.token_bytes(_NONCE)
        plain = _SHAPE.pack(*image.shape) + np.ascontiguousarray(image).tobytes()
        sealed = nonce + self._seal.encrypt(nonce, plain, name.encode())
        mine = _items.c.account == account
        with self._engine.begin() as connection:
            totals = only_row(connection, _totals, id=1, bytes=0, refused=0)
            if connection.scalar(select(func.count()).where(mine, _items.c.digest == name)):
                return name
            used = int(connection.scalar(select(func.sum(_items.c.bytes)).where(mine)) or 0)
            fits = used + len(sealed) <= self._per_account and totals.bytes + len(sealed) <= self._total
            if not fits or not self._written(name, sealed):
                connection.execute(update(_totals).values(refused=totals.refused + 1))
                return None
            connection.execute(
                _items.insert().values(
                    digest=name,
                    account=account,
                    reason=reason[:200],
                    at=now,
                    expires=now + self._lasting,
                    bytes=len(sealed),
                )
            )
            connection.execute(update(_totals).values(bytes=totals.bytes + len(sealed)))
        return name

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / name

    def _written(self, name: str, sealed: bytes) -> bool:
        """Whether the sealed image lies in the folder. A full disk is a cap like the others."""
        path = self._path(name)
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            write_atomically(path, sealed)
            path.chmod(0o600)
        except OSError:
            return False
        return True

    def read(self, name: str) -> Image:
        """The image of this digest. Shapes: (h, w, c) uint8.

        Raises: RobustkitError when it is not kept, was sealed with another key, or its bytes were changed.
        """
        with self._engine.connect() as connection:
            known = connection.scalar(select(func.count()).where(_items.c.digest == name))
        if not known:
            raise RobustkitError(f"the quarantine holds no {name!r:.80}; `items` lists what it holds.")
        try:
            sealed = self._path(name).read_bytes()
            plain = self._seal.decrypt(sealed[:_NONCE], sealed[_NONCE:], name.encode())
        except (OSError, ValueError, InvalidTag) as error:
            raise RobustkitError(
                f"{name} cannot be opened ({type(error).__name__}): its file is missing, was changed, or was "
                "sealed with another key; restore it, or give the key it was sealed with."
            ) from None
        return np.frombuffer(plain, np.uint8, offset=_SHAPE.size).reshape(_SHAPE.unpack_from(plain))

    def items(self, *, account: str | None = None, since: float = 0) -> tuple[Item, ...]:
        """What is kept since then, oldest first; of one account, or of all."""
        columns = (_items.c.digest, _items.c.account, _items.c.reason, _items.c.at, _items.c.expires)
        wanted = select(*columns).where(_items.c.at >= since).order_by(_items.c.at, _items.c.digest)
        if account is not None:
            wanted = wanted.where(_items.c.account == account)
        with self._engine.connect() as connection:
            return tuple(Item(*row) for row in connection.execute(wanted))

    def usage(self) -> tuple[int, int]:
        """Bytes kept, and how many images were turned away because a share or the disk was full."""
        with self._engine.connect() as connection:
            row = connection.execute(select(_totals)).one_or_none()
        return (row.bytes, row.refused) if row else (0, 0)

    def expire(self, now: float) -> int:
        """Remove what is over its time, from the store and from the disk, and files that nothing names; how many rows.

        Files without a row are left by a process that was killed between the two.
        """
        with self._engine.begin() as connection:
            only_row(connection, _totals, id=1, bytes=0, refused=0)
            removed = connection.execute(delete(_items).where(_items.c.expires <= now)).rowcount
            left = connection.scalar(select(func.sum(_items.c.bytes))) or 0
            connection.execute(update(_totals).values(bytes=int(left)))
            kept = set(connection.scalars(select(_items.c.digest)))
            for path in self._folder.glob("??/*"):
                if path.name not in kept:
                    with suppress(OSError):
                        path.unlink()
        return removed
