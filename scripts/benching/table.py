"""The record as Markdown."""

from __future__ import annotations

from typing import Any


def markdown(record: dict[str, Any]) -> str:
    """The whole page."""
    hardware, versions = record["hardware"], record["versions"]
    lines = [
        "# What attacks cost",
        "",
        f"Made by `make bench` on {record['created']} in {record['minutes']} minutes"
        + (" (a quick run: figures mean little)." if record["quick"] else "."),
        f"Machine: {hardware['device']}, {hardware['cpu']}, {record['processors']} processors, "
        f"{hardware['threads']} torch threads, Python {hardware['python']}; load at the end {record['load']:.1f}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        f"Models prepared in {record['search']}. Seed {record['seed']}. "
        f"Missing: {', '.join(record['missing']) or 'nobody'}.",
        "",
        "Everybody attacks the same images from the images themselves, in batches of the same size, one after",
        "the other in each round. A ratio is the median of the rounds' ratios, with their middle half. Floor:",
        "the bare forward and backward passes to the input, parameters frozen; tuned floor: the same on the",
        "prepared model. Peers get the model as it is. Passes are counted an image.",
    ]
    for section in record["sections"]:
        lines += ["", *_section(section)]
    for part in record["memory"]:
        lines += ["", *_memory(part)]
    return "\n".join(lines) + "\n"


COLUMNS = (
    "who",
    "seconds a round",
    "to the fastest peer",
    "to the floor",
    "to the tuned floor",
    "robust",
    "forward, backward",
)


def _section(section: dict[str, Any]) -> list[str]:
    return [
        f"## {section['title']}",
        "",
        f"{section['about']}; n={section['n']} in {section['rounds']} rounds, batches of {section['batch']}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
        *(_row(row) for row in section["rows"]),
    ]


def _row(row: dict[str, Any]) -> str:
    ratios = [_ratio(row["ratios"].get(key)) for key in ("fastest peer", "floor", "tuned floor")]
    robust, name = row["robust"], row["name"]
    share = f"{100 * robust['k'] / robust['n']:.1f} % [{100 * robust['low']:.1f}, {100 * robust['high']:.1f}]"
    passes = "" if row["forward"] is None else f"{row['forward']:.1f}, {row['backward']:.1f}"
    if "floor" in name:
        share = ""
    seconds = f"{row['seconds']:.3f}"
    who = f"{name} (fastest peer)" if row["fastest peer"] else name
    return f"| {' | '.join([who, seconds, *ratios, share, passes])} |"


def _ratio(ratio: list[float] | None) -> str:
    return "" if ratio is None else f"{ratio[1]:.2f} [{ratio[0]:.2f}, {ratio[2]:.2f}]"


def _memory(part: dict[str, Any]) -> list[str]:
    return [
        f"## {part['title']}",
        "",
        "Beyond what was in use before the call, each in a process of its own; "
        f"n={part['n']}, batches of {part['batch']}.",
        "",
        "| who | MB |",
        "| --- | --- |",
        *(
            f"| {name} | {'not measured' if taken is None else f'{taken / 2**20:.0f}'} |"
            for name, taken in part["bytes"].items()
        ),
    ]
