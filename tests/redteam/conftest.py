"""`pytest tests/redteam --table FILE`: what each hostile submission attempted and gained, tier by tier."""

from __future__ import annotations

from datetime import date
from pathlib import Path

ROWS: dict[tuple[str, str], dict[str, str]] = {}  # by (name, attempt), then by tier


def pytest_addoption(parser):
    parser.addoption("--table", type=Path, help="write a Markdown table of the corpus to this file")


def pytest_runtest_logreport(report):
    said = dict(report.user_properties)
    if report.when == "call" and "attempts" in said:
        verdict = "held" if report.passed else "GOT THROUGH"
        row = ROWS.setdefault((said["name"], said["attempts"]), {})
        row[said["tier"]] = f"{verdict}: {said.get('points', '?')} of {said['points that are honest']}"


def pytest_sessionfinish(session):
    path = session.config.getoption("--table", default=None)
    if path is None or not ROWS:
        return
    tiers = sorted({tier for row in ROWS.values() for tier in row})
    held = sum(cell.startswith("held") for row in ROWS.values() for cell in row.values())
    lines = [
        "# The corpus of hostile submissions",
        "",
        f"Written by `make redteam` on {date.today()}: {len(ROWS)} submissions, {held} of "
        f"{sum(map(len, ROWS.values()))} runs held. A run holds when it gains no point beyond those that its honest "
        "part earns (points given, of points that are honest), and nothing leaked, was changed or left running.",
        "",
        "| submission | attempts | " + " | ".join(tiers) + " |",
        "| --- " * (2 + len(tiers)) + "|",
    ]
    for (name, attempts), row in ROWS.items():
        lines.append(f"| `{name}` | {attempts} | " + " | ".join(row.get(tier, "") for tier in tiers) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
