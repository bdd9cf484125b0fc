"""`robustkit certify`, `curve` and the certificates in `report`: real parsing, real files, one-sentence errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import robustkit
from robustkit import report
from robustkit.certify import page
from robustkit.certify.certificates import PUBLISHED, Base, read_certification, read_rows
from robustkit.certify.confidence import certified_radius
from robustkit.device import fastest
from robustkit.models import build, pretrained, save_weights
from robustkit.results import Interval
from tests.oracle import evaluation
from tests.test_certify_smoothing import LOG, certification

PRECISION = str(fastest(torch.device("cpu"))).removeprefix("torch.")

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "runs" / "mnist-clean" / "model.safetensors"
    save_weights(pretrained("mnist-clean"), path)
    return path


def sentence(result) -> str:
    status, out, err = result
    assert status == 2, err
    assert out == ""
    assert "Traceback" not in err
    return err.splitlines()[-1]


def settings(sigma=0.25, n=500, images=5):
    return ("--data", "digits", "--sigma", sigma, "--n", n, "--images", images)


def test_certify_writes_rows_and_a_record_and_says_what_they_mean(run, weights):
    status, out, err = run("certify", weights, *settings())
    assert status == 0, err
    rows, record = weights.with_name("certificates.tsv"), weights.with_name("certificates.json")
    made = read_certification(record)
    assert made.rows == read_rows(rows)
    assert len(made.rows) == 5
    assert made.model == "mnist-clean"
    assert "weights sha256" in made.notes[0]
    assert f"base classifier: {PRECISION}, clean" in out
    assert "probability 0.999" in out
    assert f"average certified radius {made.summary()['average_certified_radius']:.3f}" in out
    assert f"no radius above {made.smoothing.largest_radius:.3f}" in out


def test_json_on_stdout_is_the_record(run, weights, tmp_path):
    status, out, _ = run("certify", weights, *settings(), "--out", "rows.tsv", "--json")
    assert status == 0
    assert json.loads(out) == json.loads((tmp_path / "rows.json").read_text())
    assert json.loads(out)["base"]["precision"] == PRECISION


def test_resume_completes_the_rows_and_nothing_is_overwritten_without_it(run, weights, tmp_path):
    whole = tmp_path / "whole.tsv"
    assert run("certify", weights, *settings(), "--out", whole)[0] == 0
    part = tmp_path / "part.tsv"
    part.write_text("".join(whole.read_text().splitlines(keepends=True)[:4]) + "99\t1")
    said = sentence(run("certify", weights, *settings(), "--out", part))
    assert "part.tsv already exists; go on with it by --resume" in said
    assert run("certify", weights, *settings(), "--out", part, "--resume")[0] == 0
    timeless = [[replace(row, seconds=0) for row in read_rows(path)] for path in (part, whole)]
    assert timeless[0] == timeless[1]
    assert part.read_text().splitlines()[:4] == whole.read_text().splitlines()[:4]
    said = sentence(run("certify", weights, *settings(sigma=0.3), "--out", part, "--resume"))
    assert "other settings" in said


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_file(run, weights, tmp_path):
    arguments = ["certify", str(weights), *map(str, settings(n=4_000, images=40)), "--out"]
    rows = tmp_path / "rows.tsv"
    with subprocess.Popen(
        [sys.executable, "-m", "robustkit", *arguments, str(rows)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(robustkit.__file__).parents[1])},
    ) as process:
        deadline = time.monotonic() + 120
        while not (rows.exists() and rows.read_text().count("\n") >= 5) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = rows.read_text().count("\n")
    assert 5 <= kept < 42
    assert run(*arguments, rows, "--resume")[0] == 0
    assert run(*arguments, tmp_path / "whole.tsv")[0] == 0
    timeless = [
        [replace(row, seconds=0) for row in read_rows(path)] for path in (rows, tmp_path / "whole.tsv")
    ]
    assert timeless[0] == timeless[1]
    assert len(timeless[0]) == 40


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("--sigma", "0"), "sigma must be a finite number above zero; got 0.0"),
        (("--sigma", "nan"), "sigma must be a finite number"),
        (("--n", "9"), "10 is the least n that can"),
        (("--alpha", "1"), "alpha must lie between 0 and 1"),
        (("--n0", "0"), "n0 must be at least 1"),
        (("--batch-size", "100"), "must be a multiple of 250"),
        (("--images", "0"), "limit must be at least 1"),
        (("--out", "rows.json"), "would be the rows and the JSON at once"),
        (("--out", "."), "is a folder"),
        (("--data", "cifar10"), "another architecture"),
        (("--model", "preact_resnet18"), "another architecture"),
    ],
)
def test_what_cannot_be_certified_is_one_sentence(run, weights, changes, words):
    assert words in sentence(run("certify", weights, *settings(), *changes))
    assert not weights.with_name("certificates.json").exists()


def test_weights_that_vote_nan_are_refused(run, tmp_path):
    model = build("mnist_cnn")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e30)  # finite, and infinity minus infinity by the last layer
    save_weights(model, tmp_path / "huge.safetensors")
    assert "NaN logits" in sentence(run("certify", "huge.safetensors", *settings()))


def test_a_model_that_does_not_know_the_noise_is_certified_and_told(run, weights):
    status, out, err = run("certify", weights, *settings(sigma=2, n=100))
    assert status == 0
    assert "it was not trained for this sigma" in err
    assert "under the noise" in out


# --- curve -------------------------------------------------------------------------------------------


def test_curve_tabulates_a_published_log_and_checks_its_claims(run, tmp_path):
    log = tmp_path / "sigma_0.12"
    log.write_text(LOG)
    status, out, _ = run("curve", log)
    assert status == 0
    assert "5 rows, abstained on 1, average certified radius 0.2024" in out
    assert re.search(r"^0\.5 +20\.0 % ", out, re.MULTILINE)
    assert "give --sigma" in out
    _, out, _ = run("curve", log, "--sigma", "0.25")
    assert "no radius is above 0.9529" in out
    _, out, _ = run("curve", log, "--sigma", "0.12")
    assert "3 radii, the largest 0.9000, are above 0.4574" in out
    _, out, _ = run("curve", log, "--sigma", "0.12", "--json")
    (record,) = json.loads(out)["logs"]
    assert record["beyond_bound"] == [0, 20, 60]
    assert [point["k"] for point in record["certified"]] == [3, 2, 1, 0]


def test_a_saturated_log_gives_away_its_alpha(run, tmp_path):
    """All votes equal at alpha 0.01 exceed what alpha 0.001 could prove: the mismatch that the check is for."""
    radius = certified_radius(0.01 ** (1 / 100_000), 0.25)
    (tmp_path / "log").write_text(f"{PUBLISHED}\n0\t3\t3\t{radius:.3f}\t1\t15.4\n")
    assert "the log was not made so" in run("curve", "log", "--sigma", "0.25")[1]
    assert "no radius is above" in run("curve", "log", "--sigma", "0.25", "--alpha", "0.01")[1]


def test_curve_reads_our_rows(run, weights):
    run("certify", weights, *settings())
    made = read_certification(weights.with_name("certificates.json"))
    _, out, _ = run("curve", weights.with_name("certificates.tsv"), "--json")
    (record,) = json.loads(out)["logs"]
    assert record["certified"] == made.summary()["certified"]


def test_a_malformed_log_names_its_line(run, tmp_path):
    (tmp_path / "log").write_text(LOG.replace("0.4999", "half"))
    assert "log, line 3 is not a row of six numbers" in sentence(run("curve", "log"))
    assert "cannot be read" in sentence(run("curve", "nowhere"))


# --- report ------------------------------------------------------------------------------------------


class Tables(HTMLParser):
    """The text of every cell, and every image's alternative text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.alts: list[str] = []
        self._in = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._in = tag in ("td", "th")
        if self._in:
            self.cells.append("")
        if tag == "img":
            self.alts.append(dict(attrs)["alt"])

    def handle_endtag(self, tag):
        self._in = self._in and tag not in ("td", "th")

    def handle_data(self, text):
        if self._in:
            self.cells[-1] += text


def test_a_report_shows_certifications_beside_evaluations(run, tmp_path):
    made = certification()
    (tmp_path / "c.json").write_text(made.to_json())
    (tmp_path / "e.json").write_text(evaluation().to_json())
    status, out, err = run("report", "c.json", "e.json", "-o", "page.html")
    assert status == 0, err
    assert "m: certified, sigma=0.25" in out
    text = (tmp_path / "page.html").read_text()
    found = Tables(text)
    assert "50.0 % [9.5, 90.5] (n=2)" in found.cells
    assert made.threat in found.cells
    assert any("float32; clean" in cell for cell in found.cells)
    assert any("50.0 % at 0.25" in alt for alt in found.alts)
    assert "Robust accuracy is the worst case" in text
    _, out, _ = run("report", "c.json", "e.json", "-o", "page.html", "--json")
    record = json.loads(out)
    assert len(record["evaluations"]) == 1
    assert record["certifications"][0]["summary"]["abstained"] == 1


def test_a_report_of_certifications_alone_claims_nothing_about_attacks(run, tmp_path):
    collapsed = Base("float32", Interval(100, 100), Interval(30, 100))
    first = certification()
    second = replace(first, model="<b>evil</b>_", base=collapsed)
    text = report.render([], "t", page.sections([first, second, first]))
    assert "worst case" not in text
    assert "<b>evil" not in text
    assert "was not trained for this sigma" in text
    assert "m, sigma 0.25 (no. 2)" in text
    assert report.render([], "t", page.sections([first, second, first])) == text
    assert text.count("<h2>") == 1
    other = replace(first, data=replace(first.data, dataset="other"))
    assert len(page.sections([first, other])) == 2


def test_pages_of_certificates_need_no_torch():
    code = "import sys; from robustkit.certify import page; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
