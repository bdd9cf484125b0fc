"""Campaigns as a section of a report: attacks by defence in one table, success against queries. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from robustkit import report
from robustkit.results import Interval
from robustkit.serve.redteam.records import Campaign, Run


def sections(campaigns: Sequence[Campaign]) -> list[str]:
    """One section for all campaigns, or none: the states of a defence side by side, then each by itself."""
    if not campaigns:
        return []
    names = [one.name for one in campaigns]
    labels = [
        name if names.count(name) == 1 else f"{name} (no. {names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]
    parts = [
        "<section>\n<h2>Red team</h2>\n<p>An attack has succeeded on an image that was classified right when a fresh "
        "query, with the bytes that it had sent, gets another class, inside its threat model and within its budget. "
        "Shares carry 95 % Wilson intervals. A share of rejected queries is a cost to the attacker, no measure of "
        "security.</p>\n",
        report.table("Attacks by defence", ("attack, threat model", *labels), matrix(campaigns)),
    ]
    for label, one in zip(labels, campaigns, strict=True):
        parts.append(_campaign(label, one))
    return [*parts[:-1], f"{parts[-1]}</section>\n"]


def matrix(campaigns: Sequence[Campaign]) -> list[tuple[str, ...]]:
    """One row for each attack and threat model, one cell for each campaign."""
    rows = dict.fromkeys((run.attack, str(run.threat)) for one in campaigns for run in one.runs)
    return [
        (
            f"{attack}: {threat}",
            *(
                "; ".join(_cell(run) for run in one.runs if (run.attack, str(run.threat)) == (attack, threat))
                or "-"
                for one in campaigns
            ),
        )
        for attack, threat in rows
    ]


def cells(run: Run) -> tuple[str, str, str, str]:
    """Success, median queries of a success, rejected share and burnt keys, in words."""
    success, rejected = run.success(), run.rejected
    return (
        run.skipped or (str(success) if success else "no image was right" if run.attempts else "not reached"),
        "-" if run.median is None else f"{run.median:g}",
        "-" if rejected is None else f"{100 * rejected.share:.0f} %",
        str(run.burnt),
    )


def _cell(run: Run) -> str:
    if run.skipped:
        return "not run"
    success, median, rejected, burnt = cells(run)
    return f"{success}; median {median}; rejected {rejected}; keys burnt {burnt}"


def _campaign(label: str, one: Campaign) -> str:
    adaptive = "adaptive, keys taking turns" if one.adaptive else "not adaptive, one key after the other"
    parts = [
        f"<h3>{escape(label)}</h3>\n<p>Model {escape(one.model)}, which tells {escape(one.output)}; attacker with "
        f"{one.keys} {'key' if one.keys == 1 else 'keys'}, {adaptive}. {len(one.indices)} images of "
        f"{escape(str(one.data))}; seed {one.seed}, tier {escape(one.tier)}, {escape(str(one.hardware))}, "
        f"{escape(one.created)}.{''.join(f' {escape(note)}.' for note in one.notes)}</p>\n"
    ]
    if not one.data.exact:
        parts.append(
            f'<p class="warning"><strong>Not the published pixels.</strong> {escape(one.data.note)}</p>\n'
        )
    if one.stopped:
        parts.append(f'<p class="warning"><strong>Ended early:</strong> {escape(one.stopped)}</p>\n')
    parts.append(
        report.table(
            "What each attack achieved",
            (
                "attack",
                "threat model",
                "success",
                "median queries",
                "rejected",
                "keys burnt",
                "waited: 429, 503",
                "largest size",
            ),
            ((run.attack, str(run.threat), *cells(run), _waits(run), _largest(run)) for run in one.runs),
        )
    )
    ran = [run for run in one.runs if run.attacked]
    for norm in dict.fromkeys(run.threat.ball.norm for run in ran):
        same = [run for run in ran if run.threat.ball.norm == norm]
        parts.append(_curves(label, same))
    if ran:
        marks = sorted({mark for run in ran for mark in run.marks()})
        parts.append(
            report.table(
                "Success within so many queries",
                ("attack", *(str(mark) for mark in marks)),
                ((run.attack, *(str(run.success(mark)) for mark in marks)) for run in ran),
            )
        )
    return "".join(parts)


def _waits(run: Run) -> str:
    return f"{sum(one.throttled for one in run.attempts)}, {sum(one.shed for one in run.attempts)}"


def _largest(run: Run) -> str:
    sizes = [one.size for one in run.attacked if one.size is not None and run.succeeded(one)]
    return f"{max(sizes):.4g}" if sizes else "-"


def _curves(label: str, runs: Sequence[Run]) -> str:
    """Success against queries, a line for each attack; all of one norm."""
    ball = runs[0].threat.ball
    with mpl.rc_context(report.STYLE):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.add_subplot()
        told = []
        for i, run in enumerate(runs):
            points = [(mark, share) for mark in run.marks() if (share := run.success(mark)) is not None]
            shares: list[Interval] = [share for _, share in points]
            axes.errorbar(
                [mark for mark, _ in points],
                [100 * share.share for share in shares],
                yerr=report.whiskers(shares),
                label=report.drawable(run.attack),
                color=report.PALETTE[i % len(report.PALETTE)],
                marker="os^Dv*X"[i % 7],
                linestyle=report.LINES[i % len(report.LINES)],
                capsize=3,
            )
            told.append(f"{run.attack}: {shares[-1]} within {points[-1][0]}")
        axes.set_xscale("log")
        axes.minorticks_off()
        marks = runs[0].marks()
        axes.set_xticks(marks, [str(mark) for mark in marks])  # powers of ten would be formulas
        axes.set_ylim(0, 100)
        axes.set_xlabel(f"queries an image; {ball}")
        axes.set_ylabel("success in %, 95 % intervals")
        figure.legend(loc="outside upper center", ncols=min(len(runs), 4), frameon=False)
        return report.picture(figure, f"Attack success against queries, {label}, {ball}. {'; '.join(told)}.")


def summary(one: Campaign) -> dict[str, Any]:
    """What a section says of a campaign, for programs."""
    return {
        "name": one.name,
        "model": one.model,
        "output": one.output,
        "adaptive": one.adaptive,
        "keys": one.keys,
        "data": str(one.data),
        "seed": one.seed,
        "tier": one.tier,
        "created": one.created,
        "stopped": one.stopped,
        "runs": [{"threat": str(run.threat), **run.record()} for run in one.runs],
    }
