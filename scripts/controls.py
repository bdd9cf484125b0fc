"""docs/controls.toml as the page docs/controls.md. `--check` says whether the page is stale."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"


def page(told: dict[str, Any]) -> str:
    """The table, and the names of the ids that it uses."""
    names = {**told["atlas"]["techniques"], **told["atlas"]["mitigations"], **told["owasp"]["risks"]}
    rows = []
    used: set[str] = set()
    for control in told["control"]:
        ids = [*control["atlas"], *control["owasp"]]
        used |= set(ids)
        where = [f"`serve.{name.replace(':', '.')}`" for name in control["where"]]
        where += [f"manifest: {rule}" for rule in control.get("manifest", [])]
        tests = [f"`{test}`" for test in control["tests"]]
        cells = [control["name"], ", ".join(where), ", ".join(ids) or "none fits", "<br>".join(tests)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            "# Controls of the service",
            "",
            "What guards the service, where it stands, which threat or mitigation of MITRE ATLAS and which risk of",
            "OWASP's ML Top Ten it belongs to, and the tests that show it. T: techniques of ATLAS, M: mitigations.",
            "A control answers a threat in part: no row claims that an attack stops.",
            "Made from `controls.toml`; do not edit.",
            "",
            "| control | where | ids | tests |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "## Ids",
            "",
            f"{told['atlas']['source']}. {told['owasp']['source']}.",
            "",
            *(f"- {name}: {names[name]}" for name in sorted(used)),
            "",
        ]
    )


def main() -> int:
    """Write the page, or with --check compare it; 1 when it is stale."""
    made = page(tomllib.loads((DOCS / "controls.toml").read_text(encoding="utf-8")))
    path = DOCS / "controls.md"
    if "--check" in sys.argv[1:]:
        stale = not path.exists() or path.read_text(encoding="utf-8") != made
        if stale:
            print("controls: docs/controls.md is stale; run python scripts/controls.py.", file=sys.stderr)
        return int(stale)
    path.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
