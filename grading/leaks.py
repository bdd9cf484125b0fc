"""Does anything that only the instructor should have reach the course or the wheel?"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from nbformat import NotebookNode

from grading.workspace import PRIVATE, ROOT

CANARY = re.compile(r"rk-canary-[0-9a-z]{16,}")
SHORTEST = 30  # characters; shorter lines of a solution are too common to prove anything

_REGION = re.compile(r"BEGIN (SOLUTION|HIDDEN TESTS|MARK SCHEME)[^\n]*\n(.*?)\n[^\n]*END \1", re.DOTALL)
_IN_WHEEL = re.compile(r"robustkit/|robustkit-[^/]+\.dist-info/")


def regions(source: NotebookNode) -> list[str]:
    """What nbgrader takes out of the source's cells: solutions, hidden tests, mark schemes."""
    return [match[2] for cell in source.cells for match in _REGION.finditer(cell.source)]


def in_course(folder: Path, sources: list[NotebookNode]) -> list[str]:
    """One sentence per canary, and per file that shows a line of a solution."""
    secret = {
        line
        for source in sources
        for region in regions(source)
        for line in _lines(region)
        if len(line) >= SHORTEST
    }
    problems = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        text = _text(path.read_bytes())
        name = path.relative_to(folder.parent)
        problems += [
            f"{name} carries the canary {token}: it is an instructor's file." for token in _tokens(text)
        ]
        shown = sorted(secret.intersection(_lines(text)))
        if shown:
            problems.append(f"{name} shows {len(shown)} lines of a solution, the first is: {shown[0]}")
    return problems


def in_wheel(wheel: Path, sources: list[NotebookNode]) -> list[str]:
    """One sentence per file that learners should not be able to install.

    The engine has an FGSM of its own, so single lines prove nothing here; a whole solution does.
    """
    whole = [lines for source in sources for region in regions(source) if len(lines := _lines(region)) > 1]
    problems = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not _IN_WHEEL.match(name):
                problems.append(f"the wheel holds {name}; only robustkit is for learners.")
            text = archive.read(name).decode("utf-8", errors="replace")
            problems += [f"{name} in the wheel carries the canary {token}." for token in _tokens(text)]
            body = "\n".join(_lines(text))
            if any("\n".join(region) in body for region in whole):
                problems.append(f"{name} in the wheel holds a whole solution; take it out of robustkit.")
    return problems


def build_wheel(into: Path) -> Path:
    """The wheel of this clone, built from a copy so that the clone stays clean; nothing is downloaded."""
    with tempfile.TemporaryDirectory(prefix="rk-") as folder:
        copy = Path(folder, "source")
        copy.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, copy)
        for name in ("robustkit", "grading", "solutions", "course"):
            if (ROOT / name).exists():
                ignored = shutil.ignore_patterns("__pycache__", *PRIVATE)
                shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        command = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
        done = subprocess.run(
            [sys.executable, "-c", command, str(into.resolve())],
            cwd=copy,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return into / done.stdout.strip().splitlines()[-1]


def _tokens(text: str) -> list[str]:
    return sorted(set(CANARY.findall(text)))


def _lines(text: str) -> list[str]:
    """The lines of `text`, blanks collapsed, without empty ones and comments."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _text(data: bytes) -> str:
    """Everything readable in a file: a notebook's strings decoded, any other file as it is."""
    text = data.decode("utf-8", errors="replace")
    try:
        return "\n".join(_strings(json.loads(text)))
    except ValueError:
        return text


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        # nbformat stores a text as a list of its lines, newlines included.
        yield "".join(item for item in value if isinstance(item, str))
        for item in value:
            yield from () if isinstance(item, str) else _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
