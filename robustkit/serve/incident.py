"""An incident from the first suspicion to the review, and what the data plane does meanwhile.

    NORMAL -> SUSPECT -> CONTAIN -> RECOVER -> REVIEW -> NORMAL

A suspicion may prove unfounded, and a recovery may fail: SUSPECT leads back to NORMAL, RECOVER and REVIEW back
to CONTAIN. Every move is an event of the chain, written in one transaction with the state it leads to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from sqlalchemy import Column, Connection, Engine, Float, Integer, String, Table, select, update
from sqlalchemy.exc import SQLAlchemyError

from robustkit.errors import RobustkitError
from robustkit.serve import events
from robustkit.serve.store import metadata, only_row


class State(StrEnum):
    """Where an incident stands."""

    NORMAL = "normal"
    SUSPECT = "suspect"
    CONTAIN = "contain"
    RECOVER = "recover"
    REVIEW = "review"


NEXT: dict[State, tuple[State, ...]] = {
    State.NORMAL: (State.SUSPECT,),
    State.SUSPECT: (State.NORMAL, State.CONTAIN),
    State.CONTAIN: (State.RECOVER,),
    State.RECOVER: (State.CONTAIN, State.REVIEW),
    State.REVIEW: (State.CONTAIN, State.NORMAL),
}
LONGEST_BRIDGE = 14 * 86_400.0  # seconds; a weak ensemble that stays is a weak defence


@dataclass(frozen=True)
class Posture:
    """What the data plane does: which model answers, how much it says, what becomes of flagged queries.

    `serving` is "champion", "canary" (the champion, and the canary for its share of accounts), "fallback" or
    "ensemble". `output` is "full", "rounded" or "label", `mode` "shadow", "reject" or "ban"; None leaves both as
    the service is configured. `incident` numbers incidents, 0 before the first. `until` ends an ensemble:
    from then on the fallback answers alone.
    """

    state: State
    serving: str
    output: str | None
    mode: str | None
    incident: int
    since: float
    until: float | None

    def at(self, now: float) -> Posture:
        """The posture at this time: an ensemble whose time is over is the fallback."""
        if self.until is None or now < self.until:
            return self
        return replace(self, serving="fallback", until=None)


# state -> serving, output, mode
_POSTURES: dict[State, tuple[str, str | None, str | None]] = {
    State.NORMAL: ("canary", None, None),
    State.SUSPECT: ("champion", "rounded", "reject"),
    State.CONTAIN: ("fallback", "label", "ban"),
    State.RECOVER: ("canary", "label", "reject"),
    State.REVIEW: ("champion", "rounded", "reject"),
}

_row = Table(
    "incident",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("number", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("since", Float(53), nullable=False),
    Column("until", Float(53), nullable=True),
)
_FIRST: dict[str, Any] = {"number": 0, "state": State.NORMAL.value, "since": 0.0, "until": None}


def posture(engine: Engine, now: float) -> Posture:
    """What the data plane does at this time: one row read."""
    return _stored(engine).at(now)


def watched(engine: Engine, *, seconds: float = 1.0) -> Callable[[float], Posture]:
    """`posture` for a busy reader: the row is read again once it is `seconds` old, by the monotonic clock.

    While the store cannot be read, the last posture holds: a database that is down must not end a containment.
    Raises: what the store raises, where no posture was read yet.
    """
    known: list[tuple[float, Posture]] = []

    def read(now: float) -> Posture:
        clock = time.monotonic()
        if not known or clock - known[0][0] >= seconds:
            try:
                known[:] = [(clock, _stored(engine))]
            except SQLAlchemyError:
                if not known:
                    raise
                known[:] = [(clock, known[0][1])]
        return known[0][1].at(now)

    return read


def _stored(engine: Engine) -> Posture:
    with engine.connect() as connection:
        row = connection.execute(select(_row)).mappings().one_or_none()
    return _posture(dict(row) if row else _FIRST)


def move(engine: Engine, to: State, *, reason: str, actor: str, model: str, now: float) -> Posture:
    """Lead the incident to another state; the posture of that state holds from now on, and no ensemble.

    `model` is the digest of the model that answered until now: the timeline must say which it was.
    Raises: RobustkitError for a move that NEXT does not allow, or without reason or digest; nothing changes
    then, and nothing is written.
    """
    with engine.begin() as connection:
        before = _locked(connection)
        if to not in NEXT[before.state]:
            raise RobustkitError(
                f"an incident in {before.state} cannot move to {to}; from there it goes to "
                f"{' or '.join(NEXT[before.state])}."
            )
        opened = before.state is State.NORMAL
        after = _posture({"number": before.incident + opened, "state": to.value, "since": now, "until": None})
        _write(connection, before, after, f"incident.{to}", reason, actor, model, now)
    return after


def bridge(engine: Engine, until: float, *, reason: str, actor: str, model: str, now: float) -> Posture:
    """Let the ensemble answer in place of the fallback while the incident is contained, and say until when.

    An ensemble of weak defences is not a strong one (He et al. 2017, arXiv 1706.04701): it buys the time that
    retraining takes, and ends by itself.
    Raises: RobustkitError outside CONTAIN, or unless it ends in the future, within LONGEST_BRIDGE.
    """
    with engine.begin() as connection:
        before = _locked(connection)
        if before.state is not State.CONTAIN:
            raise RobustkitError(
                f"an ensemble bridges a containment; this incident is in {before.state}. Move it to contain first."
            )
        if not now < until <= now + LONGEST_BRIDGE:
            raise RobustkitError(
                f"an ensemble ends in the future, within {LONGEST_BRIDGE / 86_400:.0f} days; got "
                f"{until - now:+.0f} seconds from now."
            )
        after = replace(before, serving="ensemble", until=until)
        _write(connection, before, after, "incident.bridge", reason, actor, model, now)
    return after


def note(
    engine: Engine, text: str, *, actor: str, now: float, evidence: dict[str, Any] | None = None
) -> None:
    """Add a finding to the timeline: a triage, a decision, a call. Raises: RobustkitError for an empty one."""
    if not text.strip():
        raise RobustkitError("a note needs text; say what was found or decided.")
    events.append(engine, "incident.note", {"reason": text, **(evidence or {})}, actor=actor, now=now)


def timeline(engine: Engine, number: int | None = None) -> tuple[events.Event, ...]:
    """The moves and notes of one incident, the latest unless `number` says otherwise, in the order of the chain."""
    told: list[events.Event] = []
    after = 0
    while page := events.timeline(engine, kinds=("incident",), after=after):
        told += page
        after = page[-1].seq
    current = 0
    numbered: list[tuple[int, events.Event]] = []
    for event in told:
        current = int(event.body.get("incident", current))
        numbered.append((current, event))
    wanted = current if number is None else number
    return tuple(event for of, event in numbered if of == wanted)


def _locked(connection: Connection) -> Posture:
    """The posture, and the row held until the transaction ends: of two moves at once one sees the other's state."""
    return _posture(dict(only_row(connection, _row, id=1, **_FIRST)._mapping))


def _posture(row: dict[str, Any]) -> Posture:
    state = State(row["state"])
    serving, output, mode = _POSTURES[state]
    serving = "ensemble" if row["until"] is not None else serving
    return Posture(state, serving, output, mode, row["number"], row["since"], row["until"])


def _write(
    connection: Connection,
    before: Posture,
    after: Posture,
    kind: str,
    reason: str,
    actor: str,
    model: str,
    now: float,
) -> None:
    if not reason.strip() or not model.strip():
        raise RobustkitError("a move of an incident needs a reason and a model's digest; give both.")
    connection.execute(
        update(_row).values(
            number=after.incident, state=after.state.value, since=after.since, until=after.until
        )
    )
    body = {"from": before.state.value, "reason": reason, "model": model, **asdict(after)}
    events.append_within(connection, kind, body, actor=actor, now=now)
