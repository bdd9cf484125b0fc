"""The chain of events: several writers on either database, and every way to tamper with it."""

import multiprocessing
from collections import Counter
from itertools import pairwise

import pytest
from sqlalchemy import delete, insert, select, update

from robustkit.errors import RobustkitError
from robustkit.serve import events
from robustkit.serve.store import metadata, open_store

TABLE = metadata.tables["events"]
HEAD = metadata.tables["events_head"]


def five(engine):
    for i in range(5):
        events.append(engine, "probe.seen", {"i": i, "share": 0.1}, actor="monitor", now=1000.0 + i / 3)


def change(**values):
    return lambda connection: connection.execute(update(TABLE).where(TABLE.c.seq == 3).values(**values))


def drop(*numbers):
    return lambda connection: connection.execute(delete(TABLE).where(TABLE.c.seq.in_(numbers)))


def swap(connection):
    for seq, other in ((2, 99), (3, 2), (99, 3)):
        connection.execute(update(TABLE).where(TABLE.c.seq == seq).values(seq=other))


def forge(connection):
    row = connection.execute(select(TABLE).where(TABLE.c.seq == 5)).one()._asdict()
    connection.execute(insert(TABLE).values({**row, "seq": 6, "body": "{}"}))


def behead(connection):
    connection.execute(delete(HEAD))


def everything(connection):
    connection.execute(delete(TABLE))


TAMPERED = {
    "time": change(at=999.0),
    "kind": change(kind="probe.lost"),
    "actor": change(actor="somebody"),
    "body": change(body='{"i":7,"share":0.1}'),
    "link": change(previous="f" * 64),
    "digest": change(digest="f" * 64),
    "first removed": drop(1),
    "middle removed": drop(3),
    "end removed": drop(4, 5),
    "two swapped": swap,
    "one put behind": forge,
    "no head": behead,
    "all removed": everything,
}


def test_what_is_appended_comes_back_in_order_and_verifies(engine):
    assert events.verify(engine) == 0
    assert events.newest(engine) == (0, "0" * 64)
    five(engine)
    told = events.timeline(engine)
    assert [event.seq for event in told] == [1, 2, 3, 4, 5]
    assert [event.body["i"] for event in told] == [0, 1, 2, 3, 4]
    assert [event.at for event in told] == [1000.0 + i / 3 for i in range(5)]  # to the last bit
    assert all(later.previous == earlier.digest for earlier, later in pairwise(told))
    assert events.newest(engine) == (5, told[-1].digest)
    assert events.verify(engine) == 5


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_every_tampering_breaks_the_chain(engine, tamper):
    five(engine)
    with engine.begin() as connection:
        tamper(connection)
    with pytest.raises(RobustkitError, match=r"chain"):
        events.verify(engine)


@pytest.mark.parametrize(("left_out", "tampering"), [(1, "time"), (2, "kind"), (3, "actor"), (4, "body")])
def test_mutant_digest_that_leaves_a_field_out_is_found_by_its_tampering(
    engine, monkeypatch, left_out, tampering
):
    """The tamperings above are sharp: a digest that forgets a field lets exactly that one pass."""
    whole = events._digest
    monkeypatch.setattr(
        events, "_digest", lambda *fields: whole(*(0 if i == left_out else f for i, f in enumerate(fields)))
    )
    five(engine)
    with engine.begin() as connection:
        TAMPERED[tampering](connection)
    assert events.verify(engine) == 5


def test_a_chain_written_anew_shows_against_an_anchor_kept_elsewhere(engine):
    five(engine)
    anchor = events.newest(engine)
    assert events.verify(engine, anchor) == 5
    events.append(engine, "probe.seen", {}, actor="monitor", now=2000.0)
    assert events.verify(engine, anchor) == 6  # what came later does not matter
    with engine.begin() as connection:
        everything(connection)
        behead(connection)
    for i in range(6):
        events.append(engine, "probe.seen", {"i": i}, actor="monitor", now=1000.0)
    assert events.verify(engine) == 6  # by itself it looks whole
    with pytest.raises(RobustkitError, match="published"):
        events.verify(engine, anchor)


def write(url, writer, n):
    engine = open_store(url)
    for i in range(n):
        events.append(
            engine, "probe.seen", {"writer": writer, "i": i}, actor=f"writer {writer}", now=float(i)
        )
    engine.dispose()


def test_several_processes_append_at_once_and_nothing_is_lost(engine):
    spawn = multiprocessing.get_context("spawn")  # a forked one would share the parent's connections
    url = engine.url.render_as_string(hide_password=False)
    writers = [spawn.Process(target=write, args=(url, i, 30)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    told = events.timeline(engine)
    assert events.verify(engine) == 90
    assert Counter(event.actor for event in told) == {f"writer {i}": 30 for i in range(3)}
    for i in range(3):  # each writer's own order is kept
        assert [event.body["i"] for event in told if event.body["writer"] == i] == list(range(30))


def test_an_event_stands_exactly_if_its_transaction_does(engine):
    def fails():
        with engine.begin() as connection:
            events.append_within(connection, "model.promoted", {}, actor="admin", now=1.0)
            raise KeyboardInterrupt

    five(engine)
    with pytest.raises(KeyboardInterrupt):
        fails()
    assert events.verify(engine) == 5


def test_a_timeline_by_kind_and_from_a_number_on(engine):
    for kind in ("incident.opened", "incident_report", "incident", "model.promoted"):
        events.append(engine, kind, {}, actor="a", now=0.0)
    assert [event.kind for event in events.timeline(engine, kinds=("incident",))] == [
        "incident.opened",
        "incident",
    ]
    assert [event.seq for event in events.timeline(engine, after=2, limit=1)] == [3]


@pytest.mark.parametrize(
    ("kind", "body", "actor"),
    [
        ("", {}, "a"),
        ("Model promoted", {}, "a"),
        ("x" * 65, {}, "a"),
        ("ok", {"score": float("nan")}, "a"),
        ("ok", {"image": b"bytes"}, "a"),
        ("ok", {"long": "x" * 70_000}, "a"),
        ("ok", {}, ""),
        ("ok", {}, "two\nlines"),
        ("ok", {}, "nul\0"),
    ],
)
def test_what_no_event_may_hold_is_refused_in_a_sentence(engine, kind, body, actor):
    five(engine)
    with pytest.raises(RobustkitError, match=r"event"):
        events.append(engine, kind, body, actor=actor, now=0.0)
    assert events.verify(engine) == 5


def test_text_of_any_kind_survives_in_a_body(engine):
    body = {"text": "a\0b \ud800 ünï 'quote\" \n", "nested": [1, None, {"b": True}], "tiny": 5e-324}
    events.append(engine, "probe.seen", body, actor="monitor", now=0.0)
    assert events.timeline(engine)[0].body == body
    assert events.verify(engine) == 1
