"""The incident machine on both databases: legal moves alone, one winner of a race, and a timeline that says it all."""

import html
import itertools
import math
import threading

import pytest
from sqlalchemy import Engine, event

from robustkit import report
from robustkit.errors import RobustkitError
from robustkit.serve import events, incident, page
from robustkit.serve.incident import NEXT, State

MODEL = "sha256:9f2a"
# How to reach each state from the beginning.
WAYS = {
    State.NORMAL: (),
    State.SUSPECT: (State.SUSPECT,),
    State.CONTAIN: (State.SUSPECT, State.CONTAIN),
    State.RECOVER: (State.SUSPECT, State.CONTAIN, State.RECOVER),
    State.REVIEW: (State.SUSPECT, State.CONTAIN, State.RECOVER, State.REVIEW),
}
# From the brief of the machine, not from the code.
LEGAL = {
    ("normal", "suspect"),
    ("suspect", "normal"),
    ("suspect", "contain"),
    ("contain", "recover"),
    ("recover", "contain"),
    ("recover", "review"),
    ("review", "contain"),
    ("review", "normal"),
}


def move(engine, to, now=1000.0, reason="probe accuracy fell", model=MODEL, actor="on call"):
    return incident.move(engine, to, reason=reason, actor=actor, model=model, now=now)


def lead(engine, state, now=1000.0):
    for i, to in enumerate(WAYS[state]):
        move(engine, to, now + i)


def expect_legal_moves_alone(engine, start):
    lead(engine, start)
    before, told = incident.posture(engine, 1100.0), events.newest(engine)
    for to in State:
        if (start.value, to.value) not in LEGAL:
            with pytest.raises(RobustkitError, match=f"in {start} cannot move to {to}"):
                move(engine, to)
            assert incident.posture(engine, 1100.0) == before
            assert events.newest(engine) == told


@pytest.mark.parametrize("start", State)
def test_an_illegal_move_changes_nothing_and_writes_nothing(engine, start):
    expect_legal_moves_alone(engine, start)


def test_mutant_that_allows_every_move(engine, monkeypatch):
    monkeypatch.setattr(incident, "NEXT", dict.fromkeys(State, tuple(State)))
    with pytest.raises(pytest.fail.Exception):
        expect_legal_moves_alone(engine, State.NORMAL)


def test_legal_moves_lead_where_they_say(engine):
    assert {(a.value, b.value) for a, to in NEXT.items() for b in to} == LEGAL
    served = []
    for state in (*WAYS[State.REVIEW], State.NORMAL):
        found = move(engine, state)
        assert found == incident.posture(engine, 1001.0)
        served.append((found.state, found.serving, found.output, found.mode, found.incident))
    assert served == [
        ("suspect", "champion", "rounded", "reject", 1),
        ("contain", "fallback", "label", "ban", 1),
        ("recover", "canary", "label", "reject", 1),
        ("review", "champion", "rounded", "reject", 1),
        ("normal", "canary", None, None, 1),
    ]
    assert move(engine, State.SUSPECT).incident == 2


@pytest.mark.parametrize(("reason", "model"), [("", MODEL), ("  ", MODEL), ("probes fell", "")])
def test_a_move_without_reason_or_model_does_not_happen(engine, reason, model):
    with pytest.raises(RobustkitError, match="needs a reason and a model's digest"):
        move(engine, State.SUSPECT, reason=reason, model=model)
    assert incident.posture(engine, 1001.0).state is State.NORMAL
    assert events.newest(engine)[0] == 0


def test_a_bad_actor_takes_the_state_back_with_the_event(engine):
    """Both are one transaction: where the event cannot be written, the move has not happened."""
    with pytest.raises(RobustkitError, match="actor"):
        move(engine, State.SUSPECT, actor="")
    assert incident.posture(engine, 1001.0).state is State.NORMAL


def test_of_many_operators_who_contain_at_once_one_does(engine):
    lead(engine, State.SUSPECT)
    ready, outcomes = threading.Barrier(6), []

    def contain(number):
        ready.wait()
        try:
            outcomes.append(move(engine, State.CONTAIN, actor=f"operator {number}").state)
        except RobustkitError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=contain, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes.count(State.CONTAIN) == 1
    assert sum("cannot move to contain" in str(outcome) for outcome in outcomes) == 5
    assert events.verify(engine) == 2


# --- the bridge --------------------------------------------------------------------------------------


def bridge(engine, until, now=2000.0):
    return incident.bridge(
        engine, until, reason="retraining takes an hour", actor="on call", model=MODEL, now=now
    )


def expect_an_end(engine):
    lead(engine, State.CONTAIN)
    bridge(engine, 5600.0)
    assert incident.posture(engine, 2000.0).serving == "ensemble"
    assert incident.posture(engine, 5599.9).serving == "ensemble"
    assert incident.posture(engine, 5600.0).serving == "fallback"
    assert incident.posture(engine, 1e9).state is State.CONTAIN  # the containment does not end by itself


def test_an_ensemble_ends_when_it_said_it_would(engine):
    expect_an_end(engine)


def test_mutant_whose_ensemble_stays(engine, monkeypatch):
    monkeypatch.setattr(incident.Posture, "at", lambda self, now: self)
    with pytest.raises(AssertionError):
        expect_an_end(engine)


@pytest.mark.parametrize("until", [2000.0, 1999.0, 2000.0 + 15 * 86400, math.inf, math.nan])
def test_an_ensemble_without_an_end_in_reach_is_refused(engine, until):
    lead(engine, State.CONTAIN)
    with pytest.raises(RobustkitError, match="ends in the future, within 14 days"):
        bridge(engine, until)
    assert incident.posture(engine, 2000.0).serving == "fallback"


@pytest.mark.parametrize("state", [state for state in State if state is not State.CONTAIN])
def test_an_ensemble_bridges_a_containment_alone(engine, state):
    lead(engine, state)
    with pytest.raises(RobustkitError, match="bridges a containment"):
        bridge(engine, 5600.0)


def test_a_move_ends_the_ensemble_and_a_bridge_can_be_lengthened(engine):
    lead(engine, State.CONTAIN)
    bridge(engine, 5600.0)
    assert bridge(engine, 9000.0, now=5000.0).until == 9000.0
    assert move(engine, State.RECOVER, 5100.0).until is None
    assert move(engine, State.CONTAIN, 5200.0).serving == "fallback"


# --- what the data plane reads -----------------------------------------------------------------------


def test_a_busy_reader_asks_the_store_once_a_second_and_survives_its_loss(engine, monkeypatch):
    clock = itertools.count(0.0, 0.3)
    monkeypatch.setattr(incident.time, "monotonic", lambda: next(clock))
    asked = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: asked.append(arguments[2]))
    read = incident.watched(engine)
    lead(engine, State.CONTAIN)
    bridge(engine, 5600.0)
    asked.clear()
    assert [read(2000.0).serving for _ in range(4)] == ["ensemble"] * 4
    assert len(asked) == 1
    assert read(5700.0).serving == "fallback"  # the end of an ensemble needs no store

    def lost(self):
        raise incident.SQLAlchemyError("the database is gone")

    monkeypatch.setattr(Engine, "connect", lost)
    assert [read(2000.0).state for _ in range(8)] == [State.CONTAIN] * 8
    with pytest.raises(incident.SQLAlchemyError):
        incident.watched(engine)(2000.0)


# --- the timeline, and its page ----------------------------------------------------------------------


def drill(engine):
    lead(engine, State.CONTAIN, 1_800_000_000.0)
    incident.note(
        engine, "quarantine exported", actor="analyst", now=1_800_000_300.0, evidence={"inputs": 412}
    )
    bridge(engine, 1_800_007_200.0, now=1_800_000_600.0)
    move(engine, State.RECOVER, 1_800_003_600.0, reason="<b>gate</b> passed")
    move(engine, State.REVIEW, 1_800_007_200.0)
    move(engine, State.NORMAL, 1_800_009_000.0)


def test_the_timeline_of_one_incident_is_whole_and_in_order(engine):
    drill(engine)
    drill(engine)
    kinds = [
        f"incident.{kind}" for kind in ("suspect", "contain", "note", "bridge", "recover", "review", "normal")
    ]
    for number in (None, 1, 2):
        told = incident.timeline(engine, number)
        assert [one.kind for one in told] == kinds
        assert all(one.body.get("model", MODEL) == MODEL and one.body["reason"] for one in told)
    assert incident.timeline(engine, 1)[-1].seq < incident.timeline(engine, 2)[0].seq
    assert incident.timeline(engine, 3) == ()
    assert events.verify(engine) == 14
    with pytest.raises(RobustkitError, match="needs text"):
        incident.note(engine, " ", actor="analyst", now=1.0)


def test_the_page_tells_the_timeline_and_escapes_what_people_wrote(engine):
    drill(engine)
    written = report.render([], "Incident 1", page.sections(incident.timeline(engine)))
    assert "<b>gate</b>" not in written
    assert html.escape("<b>gate</b> passed") in written
    assert written.count("<tr>") == 8
    assert (
        'alt="State of the incident over time. 0.0 minutes: suspect; 0.0 minutes: contain; 10.0 minutes: contain'
        in written
    )
    assert written == report.render([], "Incident 1", page.sections(incident.timeline(engine)))
