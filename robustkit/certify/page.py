"""Certifications as sections of a report: certified accuracy against radius, and where it is from. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from robustkit import report
from robustkit.certify.certificates import ABSTAIN, Certification, average_radius, certified_accuracy, curve
from robustkit.results import Interval


def sections(certifications: Sequence[Certification]) -> list[str]:
    """One section of a report for each data set: its curves, a table of their values, and their records."""
    ordered = sorted(certifications, key=lambda one: (_group(one), one.model, one.smoothing.sigma))
    return [_section(list(group)) for _, group in groupby(ordered, key=_group)]


def summary(certification: Certification) -> dict[str, Any]:
    """What a section says of a certification, for programs."""
    return {
        "model": certification.model,
        "smoothing": str(certification.smoothing),
        "precision": certification.base.precision,
        "data": str(certification.data),
        "seed": certification.seed,
        "tier": certification.tier,
        "created": certification.created,
        "summary": certification.summary(),
    }


def _group(one: Certification) -> tuple[str, str, str]:
    return one.data.dataset, one.data.split, one.data.sha256


def _section(group: list[Certification]) -> str:
    data, labels = group[0].data, _labels(group)
    parts = [
        f"<section>\n<h2>{escape(f'Certified against L2 on {data.dataset}, {data.split} split')}</h2>\n",
        f"<p>Data: {escape(str(data))}. Certified accuracy at a radius is the share of images classified right "
        "with a certificate of at least that radius: a lower bound on the smoothed model's accuracy under every "
        "L2 attack smaller than it, up to the chance alpha for each image. It says nothing about other "
        "perturbations, or about the base classifier without its votes.</p>\n",
    ]
    parts += [
        f'<p class="warning"><strong>{escape(label)}:</strong> {escape(one.base.warning)}.</p>\n'
        for label, one in zip(labels, group, strict=True)
        if one.base.warning
    ]
    parts += [_figure(group, labels), _table(group, labels), _records(group, labels), "</section>\n"]
    return "".join(parts)


def _figure(group: list[Certification], labels: list[str]) -> str:
    with mpl.rc_context(report.STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for i, (label, one) in enumerate(zip(labels, group, strict=True)):
            radii, shares = _steps(one)
            colour = report.PALETTE[i % len(report.PALETTE)]
            line = report.LINES[i % len(report.LINES)]
            percent = [100 * share.share for share in shares]
            axes.step(radii, percent, where="pre", label=report.drawable(label), color=colour, linestyle=line)
            low, high = (
                [100 * end for end in ends] for ends in zip(*(s.bounds for s in shares), strict=True)
            )
            axes.fill_between(radii, low, high, step="pre", color=colour, alpha=0.15, linewidth=0)
        axes.set_xlim(left=0)
        axes.set_ylim(0, 100)
        axes.set_xlabel("L2 radius, input units")
        axes.set_ylabel("certified accuracy in %, 95 % band")
        figure.legend(loc="outside upper center", ncols=min(len(group), 2), frameon=False)
        lines = "; ".join(
            f"{label}: " + ", ".join(f"{100 * s.share:.1f} % at {r:g}" for r, s in curve(one.rows))
            for label, one in zip(labels, group, strict=True)
        )
        return report.picture(figure, f"Certified accuracy against L2 radius. {lines}.")


def _steps(one: Certification) -> tuple[list[float], list[Interval]]:
    """The corners of the curve, which falls just after each radius that an image reaches."""
    radii = sorted({0.0, *(row.radius for row in one.rows if row.correct)})
    shares = [certified_accuracy(one.rows, radius) for radius in radii]
    return [*radii, radii[-1]], [*shares, Interval(0, len(one.rows))]


def _table(group: list[Certification], labels: list[str]) -> str:
    return report.table(
        "Certified accuracy with 95 % Wilson intervals",
        ("certification", "L2 radius", "certified accuracy"),
        (
            (label, f"{radius:g}", str(share))
            for label, one in zip(labels, group, strict=True)
            for radius, share in curve(one.rows)
        ),
    )


def _records(group: list[Certification], labels: list[str]) -> str:
    return report.table(
        "Where the certificates are from",
        (
            *("certification", "threat model", "smoothing", "average certified radius", "largest provable"),
            *("abstained", "base classifier", "seed", "tier", "seconds", "hardware", "measured", "notes"),
        ),
        (
            (
                *(label, one.threat, str(one.smoothing), f"{average_radius(one.rows):.3f}"),
                f"{one.smoothing.largest_radius:.3f}",
                str(sum(row.prediction == ABSTAIN for row in one.rows)),
                f"{one.base.precision}; clean {one.base.clean}; under noise {one.base.noisy}",
                *(str(one.seed), one.tier, f"{sum(row.seconds for row in one.rows):.0f}"),
                *(str(one.hardware), one.created, "; ".join(one.notes) or "none"),
            )
            for label, one in zip(labels, group, strict=True)
        ),
    )


def _labels(group: list[Certification]) -> list[str]:
    """A name for each certification of a group; numbered where two would have the same."""
    names = [f"{one.model}, sigma {one.smoothing.sigma:g}" for one in group]
    return [
        name if names.count(name) == 1 else f"{name} (no. {names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]
