"""The guard around torchvision: it mends one known failure, hides no other, and is the only way in."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import robustkit
from robustkit._torchvision import import_torchvision

PACKAGE = Path(robustkit.__file__).parent


def run_with_fake(folder: Path, init: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter whose torchvision is the one line `init`."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(init)
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{PACKAGE.parent}"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


IMPORT = "from robustkit._torchvision import import_torchvision as i; assert i() is i(); print('imported')"


def test_the_parts_we_use_are_there_and_a_second_import_is_the_same() -> None:
    torchvision = import_torchvision()
    assert torchvision.datasets.MNIST.resources
    assert callable(torchvision.transforms.functional.affine)
    assert import_torchvision() is torchvision


def test_missing_operators_are_declared(tmp_path: Path) -> None:
    done = run_with_fake(
        tmp_path,
        "import torch\n"
        "if not hasattr(torch.ops.torchvision, 'nms'):\n"
        "    raise RuntimeError('operator torchvision::nms does not exist')\n",
        IMPORT,
    )
    assert done.stdout == "imported\n", done.stderr


@pytest.mark.parametrize(
    "message", ["operator torchvision::nms does not exist", "another failure"], ids=["not mended", "unknown"]
)
def test_other_failures_are_raised(tmp_path: Path, message: str) -> None:
    done = run_with_fake(tmp_path, f"raise RuntimeError({message!r})\n", IMPORT)
    assert done.returncode == 1
    assert f"RuntimeError: {message}" in done.stderr


def test_every_import_of_torchvision_is_behind_the_guard() -> None:
    importers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "torchvision" for name in names):
                importers.add(path.relative_to(PACKAGE).as_posix())
    assert importers == {"_torchvision.py"}
