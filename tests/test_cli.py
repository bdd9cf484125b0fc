"""The command line: real parsing, real files, and no traceback for anything a user can type."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import robustkit
from robustkit import cli, data, doctor
from robustkit.errors import RobustkitError
from robustkit.lessons import LESSONS
from robustkit.models import pretrained, zoo
from robustkit.recipes import RECIPES
from robustkit.results import read_evaluation
from tests.oracle import evaluation

pytestmark = pytest.mark.usefixtures("offline")

COMMANDS = (
    "doctor",
    "train",
    "evaluate",
    "audit",
    "certify",
    "curve",
    "tls-certificates",
    "report",
    "leaderboard",
    "triage",
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """An untrained model in a run folder: the command line does not care how good it is."""
    path = tmp_path_factory.mktemp("runs") / "untrained" / "model.safetensors"
    robustkit.save_weights(robustkit.build("mnist_cnn", seed=3), path)
    return path


def sentence(result: tuple[int, str, str], status: int = 2) -> str:
    """The complaint of a failed command: one line on stderr, nothing on stdout."""
    found, out, err = result
    assert found == status, err
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("robustkit: ")
    assert last.endswith((".", ")", "?"))
    assert "Traceback" not in err
    assert err.count("\n") == 1 or "embedded digits" in err.splitlines()[0]
    return last


# --- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text
    (example,) = re.findall(r"^example: robustkit (.*)$", text, re.MULTILINE)
    options = cli._parser().parse_args(example.split())
    assert options.command is getattr(cli, f"_{command.replace('-', '_')}")


def test_the_top_help_lists_the_commands_and_needs_no_torch():
    code = """
import sys
from robustkit.cli import main
try:
    main(["--help"])
except SystemExit:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert all(re.search(rf"^  +{command}( |$)", done.stdout, re.MULTILINE) for command in COMMANDS)


def test_it_runs_as_a_module_and_knows_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "robustkit", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"robustkit {robustkit.__version__}\n"
    failed = subprocess.run(
        [sys.executable, "-m", "robustkit", "dance"], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["train"], "required: RECIPE; see `robustkit train --help`"),
        (["train", "mnist-pgd", "--tier", "huge"], "invalid choice: 'huge'"),
        (["train", "mnist-pgd", "--seed", "x"], "invalid int value: 'x'"),
        (["train", "mnist-pdg"], "did you mean 'mnist-pgd'"),
        (["evaluate", "m.safetensors"], "required: --data"),
        (
            ["evaluate", "m.safetensors", "--data", "mnist", "--eps", "8/0"],
            "'8/0' is no number; write 0.3 or 8/255",
        ),
        (["evaluate", "m.safetensors", "--data", "mnist", "--eps", "-0.1"], "eps must be a finite number"),
        (["evaluate", "m.safetensors", "--data", "mnist", "--eps", "nan"], "eps must be a finite number"),
        (
            ["evaluate", "m.safetensors", "--data", "mnist", "--norm", "L2"],
            "L2 has no usual size on mnist; give --eps",
        ),
        (["evaluate", "m.safetensors", "--data", "mnist", "--attacks", "apgd"], "'apgd' is unknown"),
        (["evaluate", "m.safetensors", "--data", "mnist"], "m.safetensors cannot be read"),
        (["evaluate", "m.safetensors", "--data", "mnist", "--model", "vgg"], "model 'vgg' is unknown"),
        (["report", "missing.json"], "missing.json cannot be read"),
    ],
    ids=" ".join,
)
def test_a_mistake_on_the_command_line_is_one_sentence(arguments, words, run):
    assert words in sentence(run(*arguments))


def test_an_unknown_tier_in_the_environment_is_one_sentence(run, monkeypatch):
    monkeypatch.setenv("ROBUSTKIT_TIER", "huge")
    assert "ROBUSTKIT_TIER='huge' is not a tier" in sentence(run("train", "mnist-clean"))


# --- train -----------------------------------------------------------------------------------------


def test_train_writes_weights_and_history_and_says_where(run, tmp_path):
    status, out, err = run("train", "mnist-clean", "--tier", "smoke", "--seed", "4")
    folder = Path("runs/mnist-clean")
    assert status == 0, err
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "model.safetensors", "run.json"}
    record = json.loads((folder / "run.json").read_text())
    assert (record["recipe"], record["seed"], record["tier"]) == ("mnist-clean", 4, "smoke")
    assert re.search(r"^epoch +loss +clean +FGSM +PGD-10", out, re.MULTILINE)
    epochs = RECIPES["mnist-clean"].schedules["smoke"].epochs
    assert len(re.findall(r"^\d+ +\d\.\d{3} ", out, re.MULTILINE)) == epochs == len(record["history"])
    assert str(folder / "model.safetensors") in out
    assert "NOT MNIST" in err
    assert "NOT the published pixels" in out
    # What was written is what was trained: it classifies digits.
    model = robustkit.load_weights(robustkit.build("mnist_cnn"), folder / "model.safetensors")
    digits = robustkit.load("digits", "test")
    assert robustkit.predict(model, digits.x, digits.y).float().mean() > 0.7

    again = sentence(run("train", "mnist-clean", "--tier", "smoke"))
    assert "already holds a run" in again
    assert "--resume" in again

    before = (folder / "model.safetensors").read_bytes()
    status, out, _ = run("train", "mnist-clean", "--tier", "smoke", "--seed", "4", "--resume", "--json")
    assert status == 0
    assert json.loads(out) == record
    assert (folder / "model.safetensors").read_bytes() == before

    other = sentence(run("train", "mnist-clean", "--tier", "smoke", "--seed", "5", "--resume"))
    assert "belongs to a run with other settings" in other
    (folder / "checkpoint.pt").unlink()
    assert "no checkpoint to resume from" in sentence(
        run("train", "mnist-clean", "--tier", "smoke", "--resume")
    )
    assert (folder / "model.safetensors").read_bytes() == before


def test_tensorboard_reads_the_history_of_a_run_and_of_its_resumption(run):
    EventAccumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    command = ("train", "mnist-clean", "--tier", "smoke", "--tensorboard", "--json")
    folder = Path("runs/mnist-clean")
    status, out, _ = run(*command)
    assert status == 0
    history = json.loads(out)["history"]
    assert run(*command, "--resume")[1] == out  # nothing is left to train, and nothing is written twice

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    shown = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    numbers = range(1, len(history) + 1)
    assert [step for step, _ in shown["loss"]] == list(numbers)
    assert [value for _, value in shown["loss"]] == pytest.approx([epoch["loss"] for epoch in history])
    for name in ("clean", "fgsm", "pgd"):
        shares = [epoch[name]["k"] / epoch[name]["n"] for epoch in history]
        assert [value for _, value in shown[f"accuracy/{name}"]] == pytest.approx(shares)


def test_without_tensorboard_training_says_what_to_install_before_it_begins(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "robustkit[tensorboard]" in sentence(run("train", "mnist-clean", "--tensorboard"))


def test_train_refuses_a_file_in_the_place_of_its_folder(run):
    Path("runs").mkdir()
    Path("runs/mine").touch()
    assert "is a file" in sentence(run("train", "mnist-clean", "--out", "runs/mine"))
    assert "runs/mine" in sentence(run("train", "mnist-clean", "--out", "runs/mine/deeper"))


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(run, tmp_path):
    recipe = ("train", "mnist-rs-fgsm", "--tier", "smoke", "--out")

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "robustkit", *recipe, "cut", *more],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    with start() as killed:
        checkpoint, limit = tmp_path / "cut" / "checkpoint.pt", time.monotonic() + 60
        while not checkpoint.exists() and killed.poll() is None and time.monotonic() < limit:
            time.sleep(0.002)
        killed.kill()
        assert killed.wait(30) == -signal.SIGKILL  # it was at work, not done
    assert not (tmp_path / "cut" / "model.safetensors").exists()

    with start("--resume") as resumed:
        _, err = resumed.communicate(timeout=120)
        assert resumed.returncode == 0, err

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # sums are ordered by the number of threads
        assert run(*recipe, "whole")[0] == 0
    finally:
        torch.set_num_threads(threads)
    files = [tmp_path / folder / "model.safetensors" for folder in ("cut", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_interruption_is_a_sentence_and_status_130(run, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("robustkit.train.train", interrupted)
    monkeypatch.setattr("robustkit.data.load", lambda *arguments, **settings: None)
    assert "--resume goes on" in sentence(run("train", "mnist-clean"), status=130)


# --- evaluate --------------------------------------------------------------------------------------

SMALL = ("--data", "mnist", "--n", "40", "--attacks", "fgsm,pgd-10", "--eps", "0.05")


def test_evaluate_writes_a_record_and_prints_what_it_means(run, weights):
    status, out, err = run("evaluate", weights, *SMALL, "--out", "here/eval.json", "--seed", "2")
    assert status == 0, err
    found = read_evaluation(Path("here/eval.json"))
    assert found.threat.ball == robustkit.Ball("Linf", 0.05)
    assert (found.n, found.seed, found.model, found.tier) == (40, 2, "untrained", "standard")
    assert [one.name for one in found.attacks] == ["fgsm", "pgd-10"]
    assert re.match(r"mnist_cnn, weights sha256 [0-9a-f]{16}$", found.notes[0])
    for said in (found.threat, found.data, found.clean, found.robust_after(1), found.robust):
        assert str(said) in out
    assert "here/eval.json" in out
    # The library gives the same verdicts.
    model = robustkit.load_weights(robustkit.build("mnist_cnn"), weights)
    images = robustkit.load("mnist", "test", limit=40, seed=2)
    attacks = robustkit.evaluate.find_attacks("fgsm,pgd-10")
    again = robustkit.evaluate.evaluate(
        model, images, found.threat.ball, attacks, model_name="", tier="smoke", seed=2, progress=False
    )
    assert again.broken_by == found.broken_by


def test_evaluate_json_is_the_record_and_nothing_else(run, weights):
    status, out, _ = run("evaluate", weights, *SMALL, "--out", "eval.json", "--json")
    assert status == 0
    assert json.loads(out) == json.loads(Path("eval.json").read_text())
    assert json.loads(out)["summary"]["n"] == 40


def test_the_usual_ball_and_number_of_images_follow_data_and_tier(run, weights):
    status, _, _ = run(
        "evaluate", weights, "--data", "digits", "--tier", "smoke", "--attacks", "fgsm", "--out", "e.json"
    )
    assert status == 0
    found = read_evaluation(Path("e.json"))
    assert (str(found.threat.ball), found.n, found.tier) == ("Linf eps=0.3", 200, "smoke")
    status, _, _ = run(
        "evaluate",
        weights,
        "--data",
        "digits",
        "--norm",
        "L2",
        "--eps",
        "8/16",
        "--n",
        "5",
        "--out",
        "l2.json",
    )
    assert str(read_evaluation(Path("l2.json")).threat.ball) == "L2 eps=0.5"


def test_a_model_of_the_kit_goes_by_its_name(run, tmp_path):
    """Half-precision files, a dot in the name, the architecture and digest of the card."""
    card = zoo.card("mnist-gaussian-0.25")
    status, _, _ = run(
        "evaluate", "mnist-gaussian-0.25", "--data", "digits", "--n", "10", "--attacks", "fgsm"
    )
    assert status == 0
    found = read_evaluation(tmp_path / "eval.json")
    assert found.model == "mnist-gaussian-0.25"
    assert found.notes[0] == f"mnist_cnn, weights sha256 {card['sha256'][:16]}"
    images = data.load("digits", "test", limit=10)
    right = (pretrained("mnist-gaussian-0.25")(images.x).argmax(1) == images.y).sum()
    assert found.clean.k == right


def test_a_file_goes_before_a_model_of_the_kit(run, weights, tmp_path):
    """Whoever has a file of that name means the file."""
    (tmp_path / "mnist-pgd").write_bytes(weights.read_bytes())
    status, _, _ = run("evaluate", "mnist-pgd", "--data", "digits", "--n", "10", "--attacks", "fgsm")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert status == 0
    assert read_evaluation(tmp_path / "eval.json").notes[0].endswith(digest[:16])


def test_evaluate_writes_beside_the_weights_unless_told_otherwise(run, tmp_path):
    path = tmp_path / "mine" / "net.safetensors"
    robustkit.save_weights(robustkit.build("mnist_cnn"), path)
    assert run("evaluate", path, *SMALL)[0] == 0
    assert read_evaluation(tmp_path / "mine" / "eval.json").model == "net"


def test_a_protocol_is_recorded_by_its_name(run, weights):
    command = ("evaluate", weights, "--data", "digits", "--n", "10", "--eps", "0.05")
    status, out, err = run(*command, "--protocol", "quick", "--out", "eval.json")
    assert status == 0, err
    found = read_evaluation(Path("eval.json"))
    assert found.protocol == "quick"
    assert [one.name for one in found.attacks] == list(robustkit.evaluate.PROTOCOLS["quick"])
    assert "protocol: quick" in out
    said = sentence(run(*command, "--protocol", "slow"))
    assert "protocol 'slow' is unknown; choose from quick" in said
    said = sentence(run(*command, "--protocol", "quick", "--attacks", "fgsm"))
    assert "not allowed with argument" in said


def test_the_help_names_every_protocol(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    (line,) = re.findall(r"a\s+list\s+of\s+attacks\s+with\s+a\s+name: ([^-]*) --", capsys.readouterr().out)
    assert set(re.findall(r"\w+", line)) - {"or"} == set(robustkit.evaluate.PROTOCOLS)


def test_a_result_and_a_journal_are_not_overwritten(run, weights):
    command = ("evaluate", weights, *SMALL, "--out", "eval.json")
    assert run(*command)[0] == 0
    result, journal = Path("eval.json"), Path("eval.json.partial")
    assert not journal.exists()
    before = result.read_bytes()
    for more in ([], ["--resume"]):
        said = sentence(run(*command, *more))
        assert "eval.json already holds a result; delete it, or choose another file with --out" in said
    assert result.read_bytes() == before

    # Killed between the result and the removal of the journal, or before the result: --resume finishes.
    journal.write_bytes(b"")
    assert (
        "eval.json.partial holds an evaluation that is not finished; go on with it by --resume"
        in sentence(run(*command))
    )
    for _ in range(2):
        status, _, err = run(*command, "--resume")
        assert status == 0, err
        assert not journal.exists()
        assert json.loads(result.read_text())["broken_by"] == json.loads(before)["broken_by"]
        result.unlink()
    assert "is not there; starting from the beginning" in err


def test_resume_belongs_to_the_same_settings(run, weights, monkeypatch):
    command = ("evaluate", weights, *SMALL, "--out", "eval.json")
    real = cli.write_atomically

    def killed(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "write_atomically", killed)
    assert "--resume goes on" in run(*command)[2].splitlines()[-1]
    monkeypatch.setattr(cli, "write_atomically", real)
    journal = Path("eval.json.partial").read_bytes()
    said = run(*command, "--resume", "--seed", "3")[2].splitlines()[-1]
    assert "is the journal of another evaluation (" in said
    assert "seed 0 there, 3 here" in said
    assert Path("eval.json.partial").read_bytes() == journal
    assert run(*command, "--resume")[0] == 0
    assert [path.name for path in Path().glob("eval.json*")] == ["eval.json"]


@pytest.mark.slow
def test_a_killed_evaluation_resumes_to_the_result_of_an_uninterrupted_one(run, weights, tmp_path):
    command = ("evaluate", str(weights), "--data", "mnist", "--n", "300", "--attacks", "fgsm,pgd-40", "--out")

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "robustkit", *command, "cut.json", *more],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    journal, limit = tmp_path / "cut.json.partial", time.monotonic() + 60
    with start() as killed:
        while killed.poll() is None and time.monotonic() < limit:
            if journal.exists() and journal.read_bytes().count(b"\n") >= 3:
                break
            time.sleep(0.002)
        killed.kill()
        assert killed.wait(30) == -signal.SIGKILL  # it was at work, not done
    assert journal.exists()
    assert not (tmp_path / "cut.json").exists()

    with start("--resume") as resumed:
        _, err = resumed.communicate(timeout=120)
        assert resumed.returncode == 0, err
    assert not journal.exists()

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # sums are ordered by the number of threads
        assert run(*command, "whole.json")[0] == 0
    finally:
        torch.set_num_threads(threads)
    cut, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("cut", "whole"))
    for record in (cut, whole):
        del record["created"]
        for attack in record["attacks"]:
            del attack["seconds"]
    assert cut == whole
    assert cut["summary"]["clean"]["k"] > cut["summary"]["robust"]["k"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--n", "0"], "limit must be at least 1"),
        (["--n", "-3"], "limit must be at least 1"),
        (["--split", "holdout"], "no split 'holdout'"),
        (["--attacks", ","], "at least one attack"),
        (["--model", "preact_resnet18"], "choose the matching model"),
        (["--out", "."], "is a folder"),
    ],
)
def test_evaluate_refuses_in_a_sentence_and_writes_nothing(more, words, run, weights, tmp_path):
    assert words in sentence(run("evaluate", weights, "--data", "mnist", "--out", "eval.json", *more))
    assert not Path("eval.json").exists()


def test_weights_that_cannot_be_believed_are_one_sentence(run, weights, tmp_path):
    content = weights.read_bytes()
    state = safetensors.torch.load(content)
    state["0.weight"][0, 0, 0, 0] = torch.nan
    for name, bad, words in (
        ("cut", content[:-100], "damaged"),
        ("pickle", b"\x80\x04\x95" + b"." * 100, "not a safetensors file"),
        ("nan", safetensors.torch.save(state), "NaN or infinity"),
        ("large", content + b"\0" * 2_000_000, "at most"),
    ):
        (tmp_path / name).write_bytes(bad)
        assert words in sentence(run("evaluate", tmp_path / name, "--data", "mnist", "--out", "eval.json"))


def test_images_of_a_shape_that_the_model_does_not_take_are_one_sentence(run, tmp_path, monkeypatch):
    path = tmp_path / "colour.safetensors"
    monkeypatch.setitem(
        robustkit.MODELS, "preact_resnet18", lambda: robustkit.models.preact_resnet18(width=4)
    )
    robustkit.save_weights(robustkit.build("preact_resnet18"), path)
    said = sentence(run("evaluate", path, *SMALL, "--model", "preact_resnet18"))
    assert "this model takes images of 3 channels" in said

    # A model without Normalize fails inside torch: an image too large for its linear layer.
    monkeypatch.setitem(
        robustkit.MODELS, "narrow", lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 10))
    )
    robustkit.save_weights(robustkit.build("narrow"), path)
    said = sentence(run("evaluate", path, *SMALL, "--model", "narrow"))
    assert "narrow does not take scikit-learn digits (embedded) images of shape (1, 28, 28)" in said


def test_a_full_disk_is_a_sentence(run, weights, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(cli, "write_atomically", full)
    status, _, err = run("evaluate", weights, *SMALL, "--out", "eval.json")
    assert status == 2
    assert (
        err.splitlines()[-1]
        == "robustkit: eval.json: No space left on device; choose another path or free this one."
    )


# --- report ----------------------------------------------------------------------------------------


def test_report_makes_one_page_of_several_evaluations(run):
    paths = [Path(f"{i}.json") for i in range(2)]
    for path, eps in zip(paths, (0.1, 0.3), strict=True):
        path.write_text(evaluation(ball=robustkit.Ball("Linf", eps)).to_json())
    status, out, err = run("report", *paths, "-o", "deep/page.html", "--title", "Ours")
    assert (status, err) == (0, "")
    page = Path("deep/page.html").read_text()
    assert "<h1>Ours</h1>" in page
    assert "Linf eps=0.1" in out
    assert "deep/page.html" in out
    status, out, _ = run("report", *paths, "--json")
    record = json.loads(out)
    assert record["out"] == "report.html"
    assert [one["threat"]["ball"]["eps"] for one in record["evaluations"]] == [0.1, 0.3]


def test_a_bad_file_is_named_and_leaves_no_page(run):
    Path("good.json").write_text(evaluation().to_json())
    Path("bad.json").write_text(evaluation().to_json()[:-30])
    said = sentence(run("report", "good.json", "bad.json"))
    assert "bad.json: the result is not JSON" in said
    assert not Path("report.html").exists()


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    (tmp_path / "e.json").write_text(evaluation(tuple([None] * 20_000)).to_json())
    code = "from robustkit.cli import main; import sys; sys.exit(main(['report', 'e.json', '--json']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait(60) == 1


# --- doctor ----------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "passes_per_second", lambda device, seconds=0: 10_000.0)


def test_the_doctor_says_what_is_here_and_how_long_it_takes(run, quick):
    status, out, err = run("doctor")
    assert (status, err) == (0, "")
    assert torch.__version__ in out
    assert "embedded digits of scikit-learn, upscaled: NOT MNIST" in out
    assert "set ROBUSTKIT_DATA" in out
    for lesson in doctor.LESSON_WORK:
        assert re.search(rf"^{lesson} +[\d.]+ +[\d.]+ +[\d.]+$", out, re.MULTILINE)

    status, out, _ = run("doctor", "--json")
    record = json.loads(out)
    assert record["healthy"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["data"]["mnist"].endswith("NOT MNIST")
    assert set(record["minutes"]) == set(doctor.LESSON_WORK) == set(LESSONS)


def test_the_doctor_never_downloads(run, quick, monkeypatch, tmp_path):
    def touched(*arguments, **settings):
        raise AssertionError("the doctor went to the network")

    monkeypatch.setenv("ROBUSTKIT_OFFLINE", "0")
    monkeypatch.setattr(data, "_open", touched)
    record = json.loads(run("doctor", "--json")[1])
    assert record["data"]["mnist"].startswith(
        "would be downloaded at the first use; without a network, the embedded"
    )
    monkeypatch.setenv("ROBUSTKIT_DATA", "http://mirror.invalid/data")
    record = json.loads(run("doctor", "--json")[1])
    assert (
        record["data"]["cifar10"]
        == "would be fetched from the mirror in ROBUSTKIT_DATA (http://mirror.invalid/data)"
    )
    assert not (tmp_path / "cache").exists()


def test_the_doctor_finds_what_is_broken_and_says_what_to_do(run, quick, monkeypatch, tmp_path):
    monkeypatch.setenv("ROBUSTKIT_DATA", str(tmp_path / "nowhere"))
    status, out, _ = run("doctor")
    assert status == 1
    assert re.search(
        r"^BROKEN: mnist cannot be loaded: ROBUSTKIT_DATA=.* correct or unset it\.$", out, re.MULTILINE
    )

    folder = tmp_path / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{name}-ubyte.gz").write_bytes(b"half of it")
    monkeypatch.setenv("ROBUSTKIT_DATA", str(tmp_path / "data"))
    status, out, _ = run("doctor", "--json")
    record = json.loads(out)
    assert (status, record["healthy"]) == (1, False)
    (problem,) = [one for one in record["problems"] if one["essential"]]
    assert "cut, corrupt or another file" in problem["remedy"]


def test_the_doctor_names_what_is_not_installed(monkeypatch):
    installed = {"nbgrader": "0.9.5", "jupyterlab": "4.6.0"}

    def version(name: str) -> str:
        if name in ("foolbox", "cleverhans"):
            raise doctor.metadata.PackageNotFoundError(name)
        return installed.get(name, "1.0")

    monkeypatch.setattr(doctor.metadata, "version", version)
    problems: list[doctor.Problem] = []
    versions = doctor._versions(problems)
    assert versions["foolbox"] is None
    assert [str(problem) for problem in problems] == [
        "cleverhans, foolbox are not installed: pip install 'robustkit[peers]'.",
        "nbgrader 0.9.5 does not work with JupyterLab 4.6: pip install 'nbgrader>=0.9.6'.",
    ]
    assert not any(problem.essential for problem in problems)


def test_threads_that_hinder_one_another_are_told_with_a_remedy(monkeypatch):
    threads = torch.get_num_threads()
    speeds = {1: 9_000.0, 2: 300.0}
    monkeypatch.setattr(doctor, "passes_per_second", lambda device, seconds: speeds[torch.get_num_threads()])
    problems: list[doctor.Problem] = []
    try:
        torch.set_num_threads(2)
        assert doctor._speed(torch.device("cpu"), 1, problems) == 300
        assert torch.get_num_threads() == 2
        assert "2 threads are 30.0 times slower than one" in str(problems[0])
        speeds[2] = 17_000.0
        doctor._speed(torch.device("cpu"), 1, problems)
        assert len(problems) == 1
    finally:
        torch.set_num_threads(threads)


def test_passes_are_those_of_the_definitions():
    forward, both = doctor.FORWARD, 1.0
    assert doctor.passes_of_defence("clean") == pytest.approx(both)
    assert doctor.passes_of_defence("fgsm-at") == pytest.approx(2 * both)
    assert doctor.passes_of_defence("rs-fgsm-at") == pytest.approx(2 * both)
    # PGD-AT: a gradient for each of its five steps, and the update.
    assert doctor.passes_of_defence("pgd-at") == pytest.approx(5 * both + both)
    assert doctor.passes_of_attack("fgsm") == pytest.approx(both)
    assert doctor.passes_of_attack("pgd-100x10") == pytest.approx(10 * (100 * both + forward))


def test_expected_minutes_follow_the_recipes(monkeypatch):
    monkeypatch.setitem(doctor.LESSON_WORK, "one", (30.0, (doctor.Training("mnist-fgsm", seeds=3),)))
    monkeypatch.setitem(
        doctor.LESSON_WORK, "two", (0.0, (doctor.Attacking("pgd-10", {"full": 500}, share=0.5),))
    )
    schedule, limit = RECIPES["mnist-fgsm"].schedules, RECIPES["mnist-fgsm"].limits["smoke"]
    standard = doctor.lesson_cost("one", "standard", 60_000)
    assert standard.million_passes == pytest.approx(3 * schedule["standard"].epochs * 0.06 * 2)
    assert doctor.lesson_cost("one", "smoke", 60_000).million_passes == pytest.approx(
        3 * schedule["smoke"].epochs * limit * 2 / 1e6
    )
    assert doctor.lesson_cost("one", "standard", 1_437).million_passes < standard.million_passes / 40
    assert doctor.lesson_cost("two", "full", 60_000).million_passes == pytest.approx(500 * 0.5 * 10 / 1e6)
    assert doctor.Cost(0.6, 30.0).minutes(10_000) == pytest.approx(1.5)


def test_the_benchmark_measures_and_leaves_no_trace():
    before = torch.random.get_rng_state()
    assert doctor.passes_per_second(torch.device("cpu"), 0.05) > 10
    assert torch.equal(before, torch.random.get_rng_state())


# --- one place for errors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (RobustkitError("x must lie in [0, 1];\n got [-2, 2]."), 2, "x must lie in [0, 1]; got [-2, 2]."),
        (PermissionError(13, "Permission denied", "runs"), 2, "runs: Permission denied"),
        (
            ModuleNotFoundError("No module named 'sklearn'"),
            2,
            "No module named 'sklearn'; `pip install robustkit`",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_one_sentence_in_one_place(error, status, words, run, monkeypatch):
    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr(doctor, "examine", fail)
    assert words in sentence(run("doctor"), status)


def test_a_bug_is_not_dressed_up_as_bad_input(run, monkeypatch):
    def fail(*arguments, **settings):
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "examine", fail)
    with pytest.raises(ZeroDivisionError):
        run("doctor")
