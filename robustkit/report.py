"""Reports: evaluations in, one self-contained HTML page out. Needs no torch and no network.

Two norms are never drawn in one figure, nor are two data sets: a group of evaluations shares both.
Every figure is followed by a table of the values it draws, and every row names its threat model.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from robustkit.errors import RobustkitError
from robustkit.files import write_atomically
from robustkit.results import CLEAN, Evaluation, Interval, read_evaluation
from robustkit.threat import Ball, Patch, RotationTranslation

# Okabe & Ito 2008: told apart with any colour vision. Markers, lines and hatches say the same again.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^Dv*X"
LINES = ("-", "--", ":", "-.")

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "robustkit",  # the same evaluations give the same bytes
    "text.parse_math": False,  # a model's name is not a formula
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 2px solid #0072B2; padding-top: 1rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border: 1px solid #767676; padding: .3rem .6rem; text-align: left; vertical-align: top; }
.warning { border-left: .4rem solid #D55E00; background: #fdf1e7; padding: .6rem 1rem; }
""".strip()


def read_and_render(paths: Sequence[Path], title: str = "Robustness report") -> str:
    """The page for the evaluations stored at `paths`. Raises: RobustkitError."""
    return render([read_evaluation(path) for path in paths], title)


def write(page: str, path: Path) -> None:
    """Write a page, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())


def render(
    evaluations: Sequence[Evaluation], title: str = "Robustness report", more: Sequence[str] = ()
) -> str:
    """One HTML page about the evaluations, in groups that share norm and data; then the sections `more`.

    The page loads nothing and runs nothing. It depends on the evaluations alone: rendered again, it
    comes out byte for byte the same. Raises: RobustkitError when there is no evaluation.
    """
    if not evaluations and not more:
        raise RobustkitError(
            "a report needs at least one evaluation; pass JSON that `robustkit evaluate` wrote."
        )
    ordered = sorted(evaluations, key=lambda one: (*_group(one), one.model, one.threat.ball.eps))
    sections = [_section(list(group)) for _, group in groupby(ordered, key=_group)]
    groups = (
        "of one norm and one data set"
        if len(sections) == 1
        else f"in {len(sections)} groups, each of one norm and one data set and never drawn together"
    )
    count = "One evaluation" if len(evaluations) == 1 else f"{len(evaluations)} evaluations"
    lead = (
        f"""<p>{count} {groups}. Shares carry 95 % Wilson intervals.
Robust accuracy is the worst case over the attacks listed, image by image: an upper bound on what a
stronger attack would leave. It holds for the stated threat model and for no other.</p>
"""
        if evaluations
        else ""
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{lead}{"".join([*sections, *more])}
</body>
</html>
"""


def _group(evaluation: Evaluation) -> tuple[str, str, str, str]:
    data = evaluation.data
    return evaluation.threat.ball.norm, data.dataset, data.split, data.sha256


def _section(evaluations: list[Evaluation]) -> str:
    """The figures and tables of one group: one norm, one split of one data set."""
    first = evaluations[0]
    norm, data = first.threat.ball.norm, first.data
    parts = [f"<section>\n<h2>{escape(f'{norm} on {data.dataset}, {data.split} split')}</h2>\n"]
    parts.append(f"<p>Data: {escape(str(data))}.</p>\n")
    if not data.exact:
        reason = f" {data.note}." if data.note else ""
        parts.append(
            f'<p class="warning"><strong>Not the published pixels.</strong>{escape(reason)} '
            "Do not compare these figures with published ones.</p>\n"
        )
    labels = _labels(evaluations)
    parts.append(_accuracy_figure(evaluations, labels))
    parts.append(_accuracy_table(evaluations, labels))
    for curves in _curves(evaluations):
        parts.append(_curve_figure(curves, norm))
        parts.append(_curve_table(curves, norm))
    parts.append(_attack_table(evaluations, labels))
    parts.append(_record_table(evaluations, labels))
    parts.append("</section>\n")
    return "".join(parts)


# --- figures ---------------------------------------------------------------------------------------


def _accuracy_figure(evaluations: list[Evaluation], labels: list[str]) -> str:
    """Clean and robust accuracy of every evaluation of the group, as bars with intervals."""
    norm = evaluations[0].threat.ball.norm
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 1.6 + 0.75 * len(evaluations)), layout="constrained")
        axes = figure.add_subplot()
        for offset, name, colour, hatch in (
            (-0.2, "clean", PALETTE[0], ""),
            (0.2, "robust", PALETTE[1], "///"),
        ):
            shares = [_share(evaluation, name) for evaluation in evaluations]
            axes.barh(
                [row + offset for row in range(len(shares))],
                [100 * share.share for share in shares],
                height=0.38,
                xerr=whiskers(shares),
                label=name,
                color=colour,
                hatch=hatch,
                edgecolor="black",
                ecolor="black",
                capsize=3,
            )
        axes.set_yticks(range(len(labels)), [drawable(label) for label in labels])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel(f"accuracy in %, {norm} attacks, 95 % intervals")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        lines = "; ".join(
            f"{label}: clean {100 * evaluation.clean.share:.1f} %, robust {100 * evaluation.robust.share:.1f} %"
            for label, evaluation in zip(labels, evaluations, strict=True)
        )
        return picture(figure, f"Bar chart of clean and robust accuracy under {norm} attacks. {lines}.")


Curve = tuple[str, list[Evaluation]]  # a label, and evaluations of rising eps


def _curves(evaluations: list[Evaluation]) -> list[list[Curve]]:
    """Sets of curves over eps that may be compared: the same attacks, images and knowledge in each.

    A curve is one model at two or more sizes of the ball; where a size was evaluated with several
    seeds, each seed is a curve of its own.
    """

    def comparable(one: Evaluation) -> tuple[str, ...]:
        threat = one.threat
        attacks = ",".join(run.name for run in one.attacks)
        # eps is the angle alone
        shifts = str(threat.ball.pixels) if isinstance(threat.ball, RotationTranslation) else ""
        return attacks, shifts, threat.knowledge, threat.goal, str(threat.queries), str(one.indices), one.tier

    sets = []
    for _, group in groupby(sorted(evaluations, key=comparable), key=comparable):
        curves: dict[tuple[str, int], dict[float, Evaluation]] = {}
        for one in group:
            curves.setdefault((one.model, one.seed), {})[one.threat.ball.eps] = one
        seeds = {seed for _, seed in curves}
        several = [
            (model if len(seeds) == 1 else f"{model}, seed {seed}", [found[eps] for eps in sorted(found)])
            for (model, seed), found in sorted(curves.items())
            if len(found) > 1
        ]
        if several:
            sets.append(several)
    return sets


def _curve_figure(curves: list[Curve], norm: str) -> str:
    """Robust accuracy against eps, one line for each model; clean accuracy stands at eps 0."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for i, (label, evaluations) in enumerate(curves):
            points = _curve_points(evaluations)
            axes.errorbar(
                [eps for eps, _ in points],
                [100 * share.share for _, share in points],
                yerr=whiskers([share for _, share in points]),
                label=drawable(label),
                color=PALETTE[i % len(PALETTE)],
                marker=_MARKERS[i % len(_MARKERS)],
                linestyle=LINES[i % len(LINES)],
                capsize=3,
            )
        axes.set_ylim(0, 100)
        axes.set_xlabel(_axis(curves[0][1][0]))
        axes.set_ylabel("robust accuracy in %")
        figure.legend(loc="outside upper center", ncols=min(len(curves), 3), frameon=False)
        lines = "; ".join(
            f"{label}: "
            + ", ".join(f"{100 * share.share:.1f} % at {eps:.4g}" for eps, share in _curve_points(each))
            for label, each in curves
        )
        return picture(figure, f"Robust accuracy against {norm} eps. {lines}.")


def _axis(evaluation: Evaluation) -> str:
    ball = evaluation.threat.ball
    if isinstance(ball, Ball):
        return f"{ball.norm} eps, input units; clean accuracy at 0"
    if isinstance(ball, Patch):
        return "side of the patch in pixels"
    return f"rotation in degrees, with shifts of up to {ball.pixels:g} pixels"


def _curve_points(evaluations: list[Evaluation]) -> list[tuple[float, Interval]]:
    ball = evaluations[0].threat.ball
    # A ball of size 0 is the clean image; no rotation can still be a shift.
    clean = [(0.0, evaluations[0].clean)] if isinstance(ball, Ball) and ball.eps > 0 else []
    return clean + [(one.threat.ball.eps, one.robust) for one in evaluations]


def whiskers(shares: Sequence[Interval]) -> list[list[float]]:
    """The distances from each share down and up to the ends of its interval, in per cent."""
    # The bounds of 0/n and n/n can lie past the share itself by one rounding.
    return [
        [max(0.0, 100 * (share.share - share.low)) for share in shares],
        [max(0.0, 100 * (share.high - share.share)) for share in shares],
    ]


def picture(figure: Figure, alt: str) -> str:
    """The figure as an image inside the page: SVG, in an <img>, where no script of it could run."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{escape(alt)}"></figure>\n'


# --- tables ----------------------------------------------------------------------------------------


def _accuracy_table(evaluations: list[Evaluation], labels: list[str]) -> str:
    return table(
        "Clean and robust accuracy, with 95 % Wilson intervals",
        ("evaluation", "threat model", "clean", "robust, worst case", "tier", "seed"),
        (
            (label, str(one.threat), str(one.clean), str(one.robust), one.tier, str(one.seed))
            for label, one in zip(labels, evaluations, strict=True)
        ),
    )


def _curve_table(curves: list[Curve], norm: str) -> str:
    return table(
        f"Robust accuracy against {norm} eps ({', '.join(run.name for run in curves[0][1][0].attacks)})",
        ("model", "eps", "accuracy"),
        ((label, f"{eps:.4g}", str(share)) for label, each in curves for eps, share in _curve_points(each)),
    )


def _attack_table(evaluations: list[Evaluation], labels: list[str]) -> str:
    """Attack by attack: what it broke of what the earlier ones left, and what is left after it."""

    def rows() -> Iterable[tuple[str, ...]]:
        for label, one in zip(labels, evaluations, strict=True):
            yield label, "none (clean)", "", str(one.broken_by.count(CLEAN)), str(one.clean), ""
            for count, run in enumerate(one.attacks, 1):
                yield (
                    label,
                    run.name,
                    ", ".join(f"{key}={value}" for key, value in run.parameters.items()) or "defaults",
                    str(one.broken_by.count(run.name)),
                    str(one.robust_after(count)),
                    f"{run.seconds:.1f}",
                )

    return table(
        "Attack by attack; each met only the images that the earlier ones left",
        ("evaluation", "attack", "settings", "images broken", "accuracy left", "seconds"),
        rows(),
    )


def _record_table(evaluations: list[Evaluation], labels: list[str]) -> str:
    return table(
        "Where the figures are from",
        ("evaluation", "protocol", "measured", "hardware", "robustkit", "notes"),
        (
            (
                label,
                one.protocol or "none",
                one.created,
                str(one.hardware),
                one.hardware.robustkit,
                "; ".join(one.notes) or "none",
            )
            for label, one in zip(labels, evaluations, strict=True)
        ),
    )


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first cell of a row is its header; every text is escaped here."""
    lines = [f"<table>\n<caption>{escape(caption)}</caption>\n<thead><tr>"]
    lines += [f'<th scope="col">{escape(name)}</th>' for name in head]
    lines.append("</tr></thead>\n<tbody>\n")
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>\n')
    lines.append("</tbody>\n</table>\n")
    return "".join(lines)


# --- labels ----------------------------------------------------------------------------------------


def _share(evaluation: Evaluation, name: str) -> Interval:
    return evaluation.clean if name == "clean" else evaluation.robust


def _labels(evaluations: list[Evaluation]) -> list[str]:
    """A name for each evaluation of a group; numbered where two would have the same."""

    def name(one: Evaluation) -> str:
        ball = one.threat.ball
        size = f"eps {ball.eps:.4g}" if isinstance(ball, Ball) else str(ball)
        if isinstance(ball, RotationTranslation):
            size = f"{ball.degrees:g} degrees, {ball.pixels:g} pixels"
        known = "" if one.threat.knowledge == "white-box" else f", {one.threat.knowledge}"
        return f"{one.model}, {size}{known}"

    names = [name(one) for one in evaluations]
    return [
        name if names.count(name) == 1 else f"{name} (no. {names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]


def drawable(label: str) -> str:
    """A label as the figure's font has it, and no longer than fits; tables hold the whole."""
    plain = label.encode("ascii", "replace").decode()
    plain = "".join(letter if letter.isprintable() else "?" for letter in plain)
    # A legend leaves out what is empty or begins with an underscore.
    plain = f" {plain}" if not plain or plain.startswith("_") else plain
    return plain if len(plain) <= 40 else f"{plain[:22]}...{plain[-15:]}"


def summary(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """What a page says, for programs: one record for each evaluation, without its images."""
    keep = ("model", "threat", "data", "seed", "tier", "protocol", "created", "summary")
    records = [json.loads(one.to_json()) for one in evaluations]
    return [{name: record[name] for name in keep} for record in records]
