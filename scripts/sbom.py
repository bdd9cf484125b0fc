"""The bill of materials of the service: what `robustkit[serve,postgres]` brings, as installed here. `make sbom`.

CycloneDX 1.6, by cyclonedx-py of this environment, without what only the course and the tests need.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from robustkit.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("serve", "postgres")


def wanted() -> list[str]:
    """What the project asks for, for the service."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    return [*project["dependencies"], *(needed for extra in EXTRAS for needed in extras[extra])]


def installed() -> set[str]:
    """The names of what that brings, through the dependencies of what is installed."""
    seen: set[tuple[str, str]] = set()
    names = {"robustkit"}
    todo = [Requirement(line) for line in wanted()]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for other, extra in seen if other == name}:
            seen.add((name, extra))
            names.add(name)
            todo += [
                needed
                for needed in map(Requirement, importlib.metadata.distribution(name).requires or [])
                if needed.marker is None or needed.marker.evaluate({"extra": extra})
            ]
    return names


def build() -> dict[str, Any]:
    """The bill, as CycloneDX's JSON."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible", "--no-validate"]
    command += [sys.prefix]  # what is valid is checked of what is kept, by the test
    whole = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    names = installed()
    kept = [part for part in whole["components"] if canonicalize_name(part["name"]) in names]
    refs = {part["bom-ref"] for part in kept}
    edges = [
        edge | {"dependsOn": [ref for ref in edge.get("dependsOn", []) if ref in refs]}
        for edge in whole.get("dependencies", [])
        if edge["ref"] in refs
    ]
    bill: dict[str, Any] = {**whole, "components": kept, "dependencies": edges}
    return bill


def main(out: Path) -> None:
    """Write it."""
    bill = build()
    out.parent.mkdir(exist_ok=True)
    write_atomically(out, (json.dumps(bill, indent=2) + "\n").encode())
    print(f"{out}: {len(bill['components'])} components")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "sbom.json")
