"""What happened, in an append-only chain: each event holds the digest of the one before it.

Whoever changes, removes or inserts an event must write every later one anew, and then the newest digest differs
from the one that the metrics and the logs have published: `verify` with that anchor shows it. Without an anchor
kept elsewhere, a chain proves nothing against somebody who may write the whole table.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    String,
    Table,
    Text,
    or_,
    select,
    update,
)

from robustkit.errors import RobustkitError
from robustkit.serve.store import metadata, only_row

_GENESIS = "0" * 64
_BODY = 64 * 1024  # characters; evidence that is larger belongs in the quarantine

_events = Table(
    "events",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Float(53), nullable=False),
    Column("kind", String(64), nullable=False, index=True),
    Column("actor", String(200), nullable=False),
    Column("body", Text, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
)
# One row: the newest event. Every writer holds it while it appends, so that no two follow the same event.
_head = Table(
    "events_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, nullable=False),
    Column("digest", String(64), nullable=False),
)


@dataclass(frozen=True)
class Event:
    """One link: what happened (`kind`, `body`), who did it, when (seconds since the epoch), and its digest."""

    seq: int
    at: float
    kind: str
    actor: str
    body: Mapping[str, Any]
    previous: str
    digest: str


def _digest(seq: int, at: float, kind: str, actor: str, body: str, previous: str) -> str:
    return hashlib.sha256(json.dumps([seq, at, kind, actor, body, previous]).encode()).hexdigest()


def _canonical(body: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RobustkitError(
            f"an event's body must be JSON without NaN ({error}); give numbers and text."
        ) from None
    if len(text) > _BODY:
        raise RobustkitError(
            f"an event's body may have {_BODY} characters; got {len(text)}. Quarantine what is larger."
        )
    return text


def append(engine: Engine, kind: str, body: Mapping[str, Any], *, actor: str, now: float) -> Event:
    """Add one event behind all others, whoever else appends at the same moment.

    Raises: RobustkitError for a kind that is not lower-case words joined by dots, an actor that is no line of 1
    to 200 printable characters, or a body that is not JSON; nothing is appended then.
    """
    with engine.begin() as connection:
        return append_within(connection, kind, body, actor=actor, now=now)


def append_within(
    connection: Connection, kind: str, body: Mapping[str, Any], *, actor: str, now: float
) -> Event:
    """`append` as part of a caller's transaction: the event stands exactly if the change that it tells of does."""
    if not re.fullmatch(r"[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)*", kind) or len(kind) > 64:
        raise RobustkitError(
            f"event kind {kind!r} must be lower-case words joined by dots; for example 'model.promoted'."
        )
    if not 1 <= len(actor) <= 200 or not actor.isprintable():
        raise RobustkitError(f"an event's actor must be 1 to 200 printable characters; got {actor!r:.60}.")
    text, at = _canonical(body), float(now)
    head = only_row(connection, _head, id=1, seq=0, digest=_GENESIS)
    seq = head.seq + 1
    digest = _digest(seq, at, kind, actor, text, head.digest)
    connection.execute(
        _events.insert().values(
            seq=seq, at=at, kind=kind, actor=actor, body=text, previous=head.digest, digest=digest
        )
    )
    connection.execute(update(_head).values(seq=seq, digest=digest))
    return Event(seq, at, kind, actor, json.loads(text), head.digest, digest)


def newest(engine: Engine) -> tuple[int, str]:
    """Number and digest of the newest event: what to publish as an anchor. (0, zeros) when there is none."""
    with engine.connect() as connection:
        head = connection.execute(select(_head)).one_or_none()
    return (head.seq, head.digest) if head else (0, _GENESIS)


def verify(engine: Engine, anchor: tuple[int, str] = (0, _GENESIS)) -> int:
    """The number of events, if each follows from the one before and the newest is the last that was appended.

    `anchor` is what `newest` once returned: the event of that number must still have that digest. Others may append
    meanwhile.
    Raises: RobustkitError with the number of the first event that does not fit.
    """
    before, seq, previous = newest(engine), 0, _GENESIS
    missing = {before, anchor} - {(0, _GENESIS)}
    with engine.connect() as connection:
        for row in connection.execution_options(yield_per=1000).execute(select(_events).order_by("seq")):
            seq += 1
            told = _digest(row.seq, row.at, row.kind, row.actor, row.body, row.previous)
            if row.seq != seq or row.previous != previous or row.digest != told:
                raise RobustkitError(
                    f"the chain of events breaks at event {seq}: it was changed, removed or inserted; keep a copy "
                    "of the store as evidence and trust only what stands before."
                )
            previous = row.digest
            missing.discard((seq, previous))
    if before in missing or seq > newest(engine)[0]:
        raise RobustkitError(
            f"the chain ends at event {seq}, and its head says {before[0]}: events were removed from its end or put "
            "there; compare with the digests in logs and metrics."
        )
    if missing:
        raise RobustkitError(
            f"event {anchor[0]} of the chain does not have the digest that was published: the chain was written anew; "
            "keep a copy of the store as evidence."
        )
    return seq


def timeline(
    engine: Engine, *, kinds: tuple[str, ...] = (), after: int = 0, limit: int = 1000
) -> tuple[Event, ...]:
    """Events in the order of the chain, at most `limit` behind number `after`; of these `kinds` if any is named.

    A kind names its sub-kinds too: "incident" finds "incident.contain".
    """
    wanted = select(_events).where(_events.c.seq > after).order_by(_events.c.seq).limit(limit)
    if kinds:
        matches = [_events.c.kind == kind for kind in kinds]
        matches += [_events.c.kind.startswith(f"{kind}.", autoescape=True) for kind in kinds]
        wanted = wanted.where(or_(*matches))
    with engine.connect() as connection:
        rows = connection.execute(wanted).all()
    return tuple(
        Event(row.seq, row.at, row.kind, row.actor, json.loads(row.body), row.previous, row.digest)
        for row in rows
    )
