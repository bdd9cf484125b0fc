"""An incident as sections of a report: timeline, triage, gate. Pictures of users are not shown. No torch."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from robustkit import report
from robustkit.results import Interval
from robustkit.serve.events import Event
from robustkit.serve.incident import State

if TYPE_CHECKING:
    from robustkit.serve.retrain import Gate
    from robustkit.serve.triage import Group, Triage

_STATES = tuple(State)


def sections(events: Sequence[Event], triage: Triage | None = None, gates: Sequence[Gate] = ()) -> list[str]:
    """The sections of an incident report, for `report.render`: what happened, what it was, what was done."""
    parts = [_timeline(events)] if events else []
    if triage is not None:
        parts.append(_triage(triage))
    return parts + [_gate(one, number) for number, one in enumerate(gates, 1)]


def _clock(at: float) -> str:
    return f"{datetime.datetime.fromtimestamp(at, datetime.UTC):%Y-%m-%d %H:%M:%S}"


# --- timeline ----------------------------------------------------------------------------------------


def _timeline(events: Sequence[Event]) -> str:
    start = events[0].at
    rows = [
        (
            _clock(event.at),
            f"{(event.at - start) / 60:.1f}",
            event.kind,
            event.actor,
            str(event.body.get("reason", "")),
            str(event.body.get("model", ""))[:12],
            event.digest[:12],
        )
        for event in events
    ]
    return (
        "<section>\n<h2>Timeline</h2>\n"
        f"<p>{len(events)} events of an append-only chain; the digest of each covers the one before. Compare the "
        "last one with the anchor that was published.</p>\n"
        + _states_figure(events)
        + report.table(
            "Events, in order", ("time, UTC", "minutes", "event", "actor", "reason", "model", "digest"), rows
        )
        + "</section>\n"
    )


def _states_figure(events: Sequence[Event]) -> str:
    """The state of the incident over time, and when an ensemble answered."""
    start = events[0].at
    moves = [event for event in events if event.body.get("state") in {state.value for state in _STATES}]
    if not moves:
        return ""
    minutes = [(event.at - start) / 60 for event in moves]
    levels = [_STATES.index(State(event.body["state"])) for event in moves]
    end = (events[-1].at - start) / 60
    with mpl.rc_context(report.STYLE):
        figure = Figure(figsize=(8, 3), layout="constrained")
        axes = figure.add_subplot()
        axes.step(
            [*minutes, end],
            [*levels, levels[-1]],
            where="post",
            color=report.PALETTE[0],
            marker="o",
            label="state",
        )
        bridges = [event for event in moves if event.kind == "incident.bridge"]
        for number, event in enumerate(bridges):
            begun, until = (event.at - start) / 60, (event.body["until"] - start) / 60
            over = min(until, max(end, begun))
            axes.hlines(
                levels[moves.index(event)] + 0.15,
                begun,
                over,
                color=report.PALETTE[1],
                linestyle="--",
                linewidth=3,
                label="ensemble answers, at the longest" if number == 0 else "",
            )
        axes.set_yticks(range(len(_STATES)), [state.value for state in _STATES])
        axes.set_ylim(-0.3, len(_STATES) - 0.5)
        axes.set_xlabel("minutes since the first event")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        told = "; ".join(
            f"{minute:.1f} minutes: {event.body['state']}"
            for minute, event in zip(minutes, moves, strict=True)
        )
        return report.picture(figure, f"State of the incident over time. {told}.")


# --- triage ------------------------------------------------------------------------------------------


def _share(share: Interval | None) -> str:
    return "cannot be said" if share is None else str(share)


def _triage(found: Triage) -> str:
    trained = "; ".join(found.trained) or "none was named"
    rows = [(group.account[:16], *_row(group)) for group in found.groups]
    head = (
        *("account", "family", "outside", "votes", "queries", "L0", "L2", "L-inf", "high", "window"),
        *("turned and shifted", "explained"),
    )
    lead = (
        f"<p>{found.looked_at} of {found.held} quarantined inputs, in {len(found.groups)} groups of one account and "
        f"one image. Most attacks are <strong>{escape(found.family)}</strong>: "
        f"{escape(_share(found.share(found.family)))} of the groups that are attacks. Outside the trained threat "
        f"models ({escape(trained)}): {escape(_share(found.outside))}.</p>\n"
    )
    return (
        "<section>\n<h2>Triage of the quarantine</h2>\n"
        + lead
        + '<p class="warning"><strong>What triage cannot see.</strong> A single input whose original nobody has '
        'queried is "unrelated": it may be an attack or a new picture.</p>\n'
        + report.table(
            "Groups, the largest first; the input nearest to the median stands for its group; shifts: right, down",
            head,
            rows,
        )
        + "</section>\n"
    )


def _row(group: Group) -> tuple[str, ...]:
    one = group.typical
    return (
        group.family,
        {None: "cannot be said", True: "yes", False: "no"}[group.outside],
        f"{group.votes.k} of {group.votes.n}",
        str(group.queries),
        f"{one.l0:.0%}",
        f"{one.l2:.2f}",
        f"{one.linf:.2f}",
        f"{one.high:.0%}",
        f"{one.window:.0%}",
        f"{one.degrees:+.0f}\N{DEGREE SIGN}, {one.right:+.1f}, {one.down:+.1f}",
        f"{one.explained:.0%}",
    )


# --- gate --------------------------------------------------------------------------------------------


def _gate(gate: Gate, number: int) -> str:
    verdict = "passed" if gate.passed else f"stopped by: {', '.join(gate.failed)}"
    bars = [
        (bar.name, str(bar.share), f"{bar.floor:.1%}", "yes" if bar.passed else "NO") for bar in gate.bars
    ]
    records = [
        (str(one.threat), ", ".join(run.name for run in one.attacks), str(one.clean), str(one.robust))
        for one in gate.evaluations
    ]
    first = gate.evaluations[0]
    return (
        f"<section>\n<h2>Gate {number}: {escape(gate.model)}, {escape(verdict)}</h2>\n"
        f"<p>Families that it must withstand: {escape(', '.join(gate.families))}; held out of training: "
        f"{escape(gate.held_out)}. A bar is passed "
        "when the lower end of its 95 % Wilson interval reaches the floor, which was set before. Data: "
        f"{escape(str(first.data))}; seed {first.seed}, tier {escape(first.tier)}, {escape(str(first.hardware))}.</p>\n"
        + _bars_figure(gate)
        + report.table("Bars", ("bar", "share", "floor", "passed"), bars)
        + report.table("Evaluations that they count", ("threat model", "attacks", "clean", "robust"), records)
        + "</section>\n"
    )


def _bars_figure(gate: Gate) -> str:
    with mpl.rc_context(report.STYLE):
        figure = Figure(figsize=(8, 0.8 + 0.5 * len(gate.bars)), layout="constrained")
        axes = figure.add_subplot()
        for row, bar in enumerate(gate.bars):
            axes.errorbar(
                [100 * bar.share.share],
                [row],
                xerr=report.whiskers([bar.share]),
                fmt="o",
                color=report.PALETTE[0],
                capsize=4,
                label="measured, 95 % interval" if row == 0 else None,
            )
            axes.plot(
                [100 * bar.floor] * 2,
                [row - 0.3, row + 0.3],
                color=report.PALETTE[1],
                linestyle="--",
                label="floor" if row == 0 else None,
            )
        names = [f"{bar.name} {'(passed)' if bar.passed else '(FAILED)'}" for bar in gate.bars]
        axes.set_yticks(range(len(names)), [report.drawable(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("accuracy in %")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        told = "; ".join(f"{bar.name}: {bar.share}, floor {bar.floor:.1%}" for bar in gate.bars)
        return report.picture(figure, f"Shares with intervals beside their floors. {told}.")
