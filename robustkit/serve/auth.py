"""Who asks: API keys and JWTs, and the pseudonym under which everything else knows an account."""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jwt
from sqlalchemy import Column, Engine, Float, Integer, String, Table, insert, select, update
from sqlalchemy.exc import IntegrityError

from robustkit.serve.refusal import Refused
from robustkit.serve.store import metadata

accounts = Table(
    "accounts",
    metadata,
    Column("account", String(32), primary_key=True),
    Column("created", Float, nullable=False),
    Column("revoked", Float),
    Column("banned_until", Float),
    Column("flags", Integer, nullable=False, server_default="0"),
)

_PREFIX = "rk_"
_MOST_KNOWN = 10_000

_UNKNOWN = "no valid credential came with the request; send Authorization: Bearer and a key of this service."


@dataclass(frozen=True)
class Issuer:
    """Whose JWTs are taken: one public key, one algorithm, one issuer, one audience."""

    public_key: str
    issuer: str
    audience: str
    algorithm: str = "ES256"


def pseudonym(secret: bytes, identity: str) -> str:
    """The only name of an account inside the service: an HMAC, so that the store names nobody."""
    return hmac.new(secret, identity.encode(), hashlib.sha256).hexdigest()[:32]


def bearer(header: str | None) -> str:
    """The credential in an Authorization header. Raises: Refused, 401."""
    scheme, _, credential = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not credential.strip():
        raise Refused(401, _UNKNOWN)
    return credential.strip()


def same(given: str, wanted: str) -> bool:
    """Whether two credentials are equal, in a time that does not say how nearly they are."""
    return hmac.compare_digest(
        hashlib.sha256(given.encode()).digest(), hashlib.sha256(wanted.encode()).digest()
    )


def make_key(engine: Engine, secret: bytes, now: float) -> str:
    """A new API key and its account. The store keeps the HMAC alone: a key that is lost cannot be read again.

    Randomness: the operating system's.
    """
    key = _PREFIX + secrets.token_urlsafe(32)
    with engine.begin() as connection:
        connection.execute(insert(accounts).values(account=pseudonym(secret, f"key:{key}"), created=now))
    return key


def revoke(engine: Engine, account: str, now: float) -> None:
    """End an account, whatever credential it comes with."""
    _change(engine, account, now, {"revoked": now})


def ban(engine: Engine, account: str, until: float, now: float) -> None:
    """Refuse an account until then."""
    _change(engine, account, now, {"banned_until": until})


def flag(engine: Engine, account: str, now: float) -> int:
    """Count one flagged query of an account; its total."""
    _change(engine, account, now, {"flags": accounts.c.flags + 1})
    with engine.connect() as connection:
        return int(connection.scalar(select(accounts.c.flags).where(accounts.c.account == account)) or 0)


def _change(engine: Engine, account: str, now: float, values: Mapping[str, Any]) -> None:
    """Update an account; one that came by JWT gets its row here."""
    change = update(accounts).where(accounts.c.account == account).values(values)
    with engine.begin() as connection:
        if connection.execute(change).rowcount:
            return
    with suppress(IntegrityError), engine.begin() as connection:  # another replica may have been first
        connection.execute(insert(accounts).values(account=account, created=now))
    with engine.begin() as connection:
        connection.execute(change)


@dataclass(frozen=True)
class Identity:
    """Who a credential says it is; an API key must be on the list, a JWT proves itself."""

    account: str
    must_be_listed: bool


class Accounts:
    """Credentials to accounts. What the store says of one is believed for so many seconds."""

    def __init__(
        self, engine: Engine, secret: bytes, issuer: Issuer | None = None, *, believed: float = 1.0
    ) -> None:
        self._believed = believed
        self._engine = engine
        self._secret = secret
        self._issuer = issuer
        self._known: dict[str, tuple[float, Any]] = {}

    def identify(self, header: str | None) -> Identity:
        """The account of an Authorization header; no store is asked. Raises: Refused, 401."""
        credential = bearer(header)
        if credential.startswith(_PREFIX):
            return Identity(pseudonym(self._secret, f"key:{credential}"), must_be_listed=True)
        return Identity(pseudonym(self._secret, f"jwt:{self._subject(credential)}"), must_be_listed=False)

    def is_fresh(self, identity: Identity) -> bool:
        """Whether `check` will answer without asking the store."""
        read, _ = self._known.get(identity.account, (-math.inf, None))
        return time.monotonic() - read < self._believed

    def check(self, identity: Identity, now: float) -> None:
        """Raises: Refused, 401 for an account that is unknown or revoked, 403 for one that is banned."""
        if not self.is_fresh(identity):
            with self._engine.connect() as connection:
                row = connection.execute(
                    select(accounts).where(accounts.c.account == identity.account)
                ).first()
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[identity.account] = (time.monotonic(), row)
        _, row = self._known[identity.account]
        if row is None and not identity.must_be_listed:
            return
        if row is None or row.revoked is not None:
            raise Refused(401, _UNKNOWN)
        if row.banned_until is not None and now < row.banned_until:
            raise Refused(403, "this account is banned; ask the operator.")

    def forget(self, account: str) -> None:
        """Ask the store about this account the next time."""
        self._known.pop(account, None)

    def _subject(self, token: str) -> str:
        if self._issuer is None:
            raise Refused(401, _UNKNOWN)
        try:
            claims = jwt.decode(
                token,
                self._issuer.public_key,
                algorithms=[self._issuer.algorithm],  # never the token's own word
                audience=self._issuer.audience,
                issuer=self._issuer.issuer,
                options={"require": ["exp", "sub", "aud", "iss"]},
                leeway=10,
            )
        except jwt.PyJWTError as error:
            raise Refused(401, _UNKNOWN) from error
        return str(claims["sub"])
