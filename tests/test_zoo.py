"""The command behind `make zoo`: trains, ships and measures in chunks, and goes on wherever it was cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from robustkit.models import build, zoo

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_chunks_cut_anywhere_lead_to_the_model_and_its_card(tmp_path):
    """On the embedded digits. The first chunks are too short for anything but a checkpoint."""
    env = os.environ | {
        "ROBUSTKIT_OFFLINE": "1",
        "ROBUSTKIT_CACHE": str(tmp_path / "cache"),
        "ROBUSTKIT_DATA": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        str(ROOT / "scripts" / "zoo.py"),
        "mnist-clean",
        "--out",
        str(tmp_path / "runs"),
    ]
    command += ["--into", str(tmp_path / "weights"), "--n", "20", "--audited", "16"]

    def chunk(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
        )

    cut = chunk("--minutes", "0.1")
    assert cut.returncode == 3, cut.stderr
    assert "not finished; the same command goes on" in cut.stderr
    whole = chunk()
    assert whole.returncode == 0, whole.stderr
    card = json.loads((tmp_path / "weights" / "mnist-clean.json").read_text())
    assert {"measured", "certified", "audit"} <= card.keys()
    assert card["measured"]["clean"]["n"] == 20
    assert zoo.load("mnist-clean", build, tmp_path / "weights") is not None
    before = (tmp_path / "weights" / "mnist-clean.json").read_bytes()
    again = chunk()
    assert again.returncode == 0, again.stderr
    assert again.stdout == ""  # nothing was measured again
    assert (tmp_path / "weights" / "mnist-clean.json").read_bytes() == before
