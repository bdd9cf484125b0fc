"""RobustBench: the copy against figures known from elsewhere, the filters, the ranks, the JSON form.

The published figures here were read from the leaderboard on their own, before the copy was made.
"""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import robustkit
from robustkit import cli, leaderboard
from robustkit.errors import RobustkitError
from robustkit.leaderboard import EPS, PARTS, Entry, Leaderboard, fallen, load, place, standing
from robustkit.results import Evaluation, Interval, Provenance, read_evaluation
from robustkit.threat import Ball, RotationTranslation, ThreatModel
from tests.oracle import evaluation

PACKAGE = Path(robustkit.__file__).parent
CIFAR10 = Provenance("CIFAR-10", "test", "download", "0" * 64, True)
JPEG = Provenance("CIFAR-10 (JPEG mirror)", "test", "cache", "1" * 64, False, "JPEG quality 75")

# Clean and robust accuracy as the leaderboard shows them.
PUBLISHED = {
    "Linf": {
        "Bartoldson2024Adversarial_WRN-94-16": (93.68, 73.71),
        "Amini2024MeanSparse_S-WRN-94-16": (93.60, 73.10),
        "Bartoldson2024Adversarial_WRN-82-8": (93.11, 71.59),
        "Peng2023Robust": (93.27, 71.07),
        "Wang2023Better_WRN-70-16": (93.25, 70.69),
        "Chen2024Data_WRN_34_20": (86.10, 58.09),
        "Addepalli2021Towards_WRN34": (85.32, 58.04),
        "Addepalli2022Efficient_WRN_34_10": (88.71, 57.81),
        "Chen2021LTD_WRN34_20": (86.03, 57.71),
        "Jia2022LAS-AT_70_16": (85.66, 57.61),
        "Gowal2021Improving_R18_ddpm_100m": (87.35, 58.50),
        "Rade2021Helper_R18_extra": (89.02, 57.67),
        "Rade2021Helper_R18_ddpm": (86.86, 57.09),
        "Rebuffi2021Fixing_R18_ddpm": (83.53, 56.66),
        "Sehwag2021Proxy_R18": (84.59, 55.54),
        "Addepalli2022Efficient_RN18": (85.71, 52.48),
        "Addepalli2021Towards_RN18": (80.24, 51.06),
        "Andriushchenko2020Understanding": (79.84, 43.93),
        "Wong2020Fast": (83.34, 43.21),
    },
    "L2": {
        "Wang2023Better_WRN-70-16": (95.54, 84.97),
        "Amini2024MeanSparse_S-WRN-70-16": (95.51, 84.33),
        "Wang2023Better_WRN-28-10": (95.16, 83.68),
        "Rebuffi2021Fixing_70_16_cutmix_extra": (95.74, 82.32),
        "Gowal2020Uncovering_extra": (94.74, 80.53),
        "Gowal2020Uncovering": (90.90, 74.50),
        "Wu2020Adversarial": (88.51, 73.66),
        "Engstrom2019Robustness": (90.83, 69.24),
        "Rice2020Overfitting": (88.67, 67.68),
        "Rony2019Decoupling": (89.05, 66.44),
        "Rade2021Helper_R18_ddpm": (90.57, 76.15),
        "Rebuffi2021Fixing_R18_cutmix_ddpm": (90.33, 75.86),
        "Sehwag2021Proxy_R18": (89.76, 74.41),
    },
}
TOP = {
    "Linf": [*PUBLISHED["Linf"]][:5],
    "L2": [*PUBLISHED["L2"]][:5],
}
TOP_ALONE = {  # trained on the data set's own images alone
    "Linf": [*PUBLISHED["Linf"]][5:10],
    "L2": [*PUBLISHED["L2"]][5:10],
}


@pytest.fixture(autouse=True)
def no_checkout(monkeypatch):
    """Our copy, whatever robustbench this machine has; a test that wants a checkout makes one."""
    monkeypatch.setattr(leaderboard, "find_spec", lambda name: None)


def measured(
    survivors: int = 7000,
    n: int = 10_000,
    *,
    ball: Ball | None = None,
    data: Provenance = CIFAR10,
    attacks: tuple[str, ...] = PARTS,
) -> Evaluation:
    """An evaluation of `n` images: a tenth misclassified, `survivors` robust."""
    clean = n // 10
    broken = ("clean",) * clean + (attacks[0],) * (n - clean - survivors) + (None,) * survivors
    return evaluation(broken, ball=ball or Ball("L2", 0.5), data=data, attacks=attacks)


def entry(name: str, robust: float, **changes: object) -> Entry:
    made = Entry(name, "", "", "", "", "ResNet-18", "0.5", 90, robust, robust, None, False, False, "", False)
    return replace(made, **changes)  # type: ignore[arg-type]


# --- the copy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_copy_holds_the_published_figures(norm):
    board = load("cifar10", norm)
    found = {one.id: (one.clean, one.robust) for one in board.entries}
    assert {name: found[name] for name in PUBLISHED[norm]} == PUBLISHED[norm]
    assert [one.id for one in board.entries][:5] == TOP[norm]
    assert board.eps == EPS["cifar10", norm]
    assert len(board.entries) >= {"Linf": 100, "L2": 21}[norm]


def test_the_lowest_known_figure_ranks_and_not_autoattacks_own():
    entries = {one.id: one for one in load("cifar10", "Linf").entries}
    sparse = entries["Amini2024MeanSparse_S-WRN-94-16"]  # AutoAttack does not see through its operator
    assert (sparse.autoattack, sparse.robust) == (75.28, 73.10)
    assert entries["Kang2021Stable"].unreliable
    assert not sparse.unreliable
    assert all(one.robust <= one.autoattack for one in entries.values())


def test_every_entry_of_the_copy_is_whole_and_says_where_it_was_read():
    copy = json.loads((PACKAGE / "leaderboards" / "cifar10.json").read_text())
    assert copy["licence"].startswith("MIT")
    assert "not measured by this project" in copy["note"]
    for norm in ("Linf", "L2"):
        for name, record in copy[norm].items():
            assert record["source"]["figures"] in ("file", "release"), name
            commit = record["source"]["commit"]
            assert (commit is None) == ("could not be read" in record["footnote"]), name
            assert commit is None or len(commit) == 40
        for one in load("cifar10", norm).entries:
            assert 0 <= one.robust <= one.clean <= 100, one.id
            assert one.reported is None or 0 <= one.reported <= one.clean, one.id
            assert one.title, one.id
            assert one.link.startswith("http"), one.id
            assert one.architecture, one.id
            assert one.venue, one.id
            assert one.authors or one.id == "Standard"


def test_a_board_that_does_not_exist_is_one_sentence():
    with pytest.raises(RobustkitError, match=r"no leaderboard for cifar10 L1; choose one of: cifar10 Linf"):
        load("cifar10", "L1")


# --- extra and synthetic images ---------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_without_extra_and_synthetic_images_the_first_five_are_these(norm):
    board = load("cifar10", norm)
    assert [one.id for one in board.select().entries][:5] == TOP_ALONE[norm]
    # `additional_data` alone would have let these in.
    by_flag = [one.id for one in board.select(synthetic=True).entries]
    assert by_flag[:5] != TOP_ALONE[norm]
    assert board.select(extra_data=True, synthetic=True).entries == board.entries


def test_the_best_small_network_without_other_images():
    linf = load("cifar10", "Linf").select(architecture="resnet-18").entries
    assert [(one.id, one.robust) for one in linf][:2] == [
        ("Addepalli2022Efficient_RN18", 52.48),
        ("Addepalli2021Towards_RN18", 51.06),
    ]
    l2 = load("cifar10", "L2").select(architecture="ResNet-18")
    assert [one.id for one in l2.entries] == ["Rice2020Overfitting"]
    assert l2.selection == "entries without extra or synthetic images of architecture 'ResNet-18'"


@pytest.mark.parametrize(
    ("footnote", "said"),
    [
        ("Trained with 1M synthetic images.", True),
        ("Uses images GENERATED by a model.", True),
        ("20M samples of a diffusion model", True),
        ("Uses 1M DDPM images", True),
        ("EDM data", True),
        ("", False),
        ("Uses an ensemble of 3 models.", False),
        ("eps is 0.031, about 7.9/255", False),
        ("the seedming of edmund", False),
    ],
)
def test_the_footnote_tells_of_synthetic_images(footnote, said):
    assert leaderboard.says_synthetic(footnote) is said


def test_synthetic_and_extra_are_told_apart_on_known_entries():
    linf = {one.id: (one.extra_data, one.synthetic) for one in load("cifar10", "Linf").entries}
    assert linf["Rade2021Helper_R18_ddpm"] == (False, True)
    assert linf["Rade2021Helper_R18_extra"] == (True, False)
    assert linf["Carmon2019Unlabeled"] == (True, False)
    assert linf["Gowal2020Uncovering_70_16"] == (False, False)
    assert linf["Gowal2021Improving_R18_ddpm_100m"] == (False, True)
    # A flag that is set does not hide the footnote, and a model built on another inherits its images.
    assert linf["Bai2023Improving_edm"] == (True, True)
    assert linf["Amini2024MeanSparse_Ra_WRN_70_16"] == (True, True)
    assert linf["Kang2021Stable"] == (True, False)  # built on an entry with extra images


# --- those that fell --------------------------------------------------------------------------------


def test_the_fallen_are_those_whose_claim_did_not_hold():
    down = fallen(load("cifar10", "Linf").entries)
    falls = {one.id: (one.reported, one.robust) for one in down}
    assert falls["JinRinard2020Manifold"] == (71.22, 1.35)
    assert falls["ZhangXu2020Adversarial"] == (68.7, 36.45)
    depths = [one.reported - one.robust for one in down if one.reported is not None]
    assert depths == sorted(depths, reverse=True)
    assert min(depths) >= 10
    assert "Bartoldson2024Adversarial_WRN-94-16" not in falls
    l2 = load("cifar10", "L2").entries
    assert fallen(l2) == ()
    # 71.6 % under PGD crosses 70; AutoAttack's 67.68 % does not.
    assert [one.id for one in fallen(l2, by=3.9)] == ["Rice2020Overfitting"]


# --- ranks ------------------------------------------------------------------------------------------


def test_a_rank_is_one_more_than_the_number_of_better_entries():
    entries = [entry("a", 80.0), entry("b", 70.0), entry("c", 60.0)]
    for k, rank, above, below in (
        (9000, 1, None, "a"),
        (8000, 1, None, "a"),  # a tie stands before its equal
        (7999, 2, "a", "b"),
        (7000, 2, "a", "b"),
        (6500, 3, "b", "c"),
        (1000, 4, "c", None),
    ):
        found = place(Interval(k, 10_000), reversed(entries))
        assert (found.rank, found.of) == (rank, 3)
        assert (found.above.id if found.above else None, found.below.id if found.below else None) == (
            above,
            below,
        )


def test_a_tie_is_a_tie_at_every_share_that_can_be_published():
    for k in range(10_001):
        assert place(Interval(k, 10_000), [entry("same", float(f"{k / 100:.2f}"))]).rank == 1


def test_the_range_of_ranks_is_that_of_the_interval():
    robust = Interval(70, 100)
    # Wilson by hand: the roots of (p - 0.7)^2 = z^2 p (1 - p) / 100.
    z = 1.959963984540054
    a, b, c = 1 + z * z / 100, -(1.4 + z * z / 100), 0.49
    low, high = sorted((-b + sign * math.sqrt(b * b - 4 * a * c)) / (2 * a) for sign in (-1, 1))
    entries = [
        entry("over", 100 * high + 0.1),
        entry("at most", 100 * high - 0.1),
        entry("better", 71.0),
        entry("worse", 69.0),
        entry("at least", 100 * low + 0.1),
        entry("under", 100 * low - 0.1),
    ]
    found = place(robust, entries)
    assert (found.best, found.rank, found.worst) == (2, 4, 6)
    more = place(Interval(7000, 10_000), entries)
    assert (more.best, more.rank, more.worst) == (4, 4, 4)


def test_no_entries_leave_the_first_rank():
    found = place(Interval(1, 2), [])
    assert (found.rank, found.best, found.worst, found.of) == (1, 1, 1, 0)
    assert found.above is found.below is None


def test_where_a_model_would_stand_among_like_models():
    board = load("cifar10", "L2").select()
    found = standing(measured(7031), board)
    assert (found.rank, found.of) == (3, len(board.entries))
    assert found.above is not None
    assert found.below is not None
    assert (found.above.id, found.below.id) == ("Wu2020Adversarial", "Engstrom2019Robustness")
    assert found.notes == ()
    everything = standing(measured(7031), load("cifar10", "L2"))
    assert everything.rank == 17  # behind sixteen with extra or synthetic images, or larger
    assert standing(measured(7031, attacks=("autoattack",)), board).rank == 3
    assert standing(measured(7031, attacks=("pgd-40", *PARTS, "square")), board).rank == 3


def test_fewer_images_and_other_pixels_are_said():
    board = load("cifar10", "L2").select()
    few = standing(measured(700, 1000), board)
    assert few.worst > few.best
    (note,) = few.notes
    assert "1,000 images" in note
    assert str(Interval(700, 1000)) in note
    assert "10,000" in note
    jpeg, _ = standing(measured(700, 1000, data=JPEG), board).notes
    assert jpeg.startswith("NOT the images that RobustBench measures on: CIFAR-10 (JPEG mirror)")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ball": Ball("Linf", 8 / 255)}, "measured at Linf eps=0.03137; RobustBench ranks cifar10 at L2"),
        ({"ball": Ball("L2", 0.25)}, "measured at L2 eps=0.25"),
        ({"ball": Ball("L2", 128 / 255)}, "measured at L2 eps=0.502"),
        ({"ball": RotationTranslation(30, 3)}, "RobustBench ranks cifar10 at L2"),
        ({"data": replace(CIFAR10, dataset="MNIST")}, "measured on MNIST test"),
        ({"data": replace(CIFAR10, dataset="CIFAR-100")}, "measured on CIFAR-100 test"),
        ({"data": replace(CIFAR10, split="train")}, "measured on CIFAR-10 train"),
        ({"attacks": ("pgd-100x10",)}, "measured with pgd-100x10, which bounds from above"),
        ({"attacks": PARTS[:3]}, "evaluate with autoattack-square as well"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(changed, words):
    with pytest.raises(RobustkitError) as refused:
        standing(measured(**changed), load("cifar10", "L2"))
    assert words in str(refused.value)
    assert str(refused.value).startswith("not comparable: ")
    assert "\n" not in str(refused.value)


def test_the_attacks_that_count_are_autoattacks_standard_four():
    from robustkit.attacks import library

    assert tuple(f"autoattack-{part}" for part in library.AUTOATTACK_PARTS) == PARTS
    assert {*PARTS, leaderboard.AUTOATTACK} <= set(library.LIBRARY)


def test_a_threat_model_without_a_leaderboard_is_refused_in_a_sentence():
    turned = measured(ball=RotationTranslation(30, 3))
    with pytest.raises(RobustkitError, match="no leaderboard for cifar10 rotation-translation; choose one"):
        leaderboard.to_robustbench(turned)


@pytest.mark.parametrize(
    "weaker",
    [
        {"knowledge": "score-based"},
        {"goal": "targeted"},
        {"queries": 1000},
        {"input_range": (0.0, 0.5)},
    ],
)
def test_a_weaker_attacker_is_not_comparable(weaker):
    full = measured()
    other = replace(full, threat=replace(full.threat, **weaker))
    assert isinstance(other.threat, ThreatModel)
    with pytest.raises(RobustkitError, match="not comparable"):
        standing(other, load("cifar10", "L2"))


# --- RobustBench's own files ------------------------------------------------------------------------

ABOUT = {
    "title": "A paper",
    "authors": "Its authors",
    "venue": "arXiv, Jan 2026",
    "link": "https://example.org",
    "architecture": "PreActResNet-18",
    "additional_data": False,
    "forward_passes": 1,
}


def test_the_json_form_has_the_keys_of_the_published_files():
    written = leaderboard.to_robustbench(measured(7031), **ABOUT)
    copy = json.loads((PACKAGE / "leaderboards" / "cifar10.json").read_text())
    published = copy["L2"]["Wu2020Adversarial"]
    assert set(written) == set(published) - {"source"}
    for key, value in written.items():
        assert type(value) is type(published[key]), key
    assert (written["clean_acc"], written["autoattack_acc"]) == ("90.00", "70.31")
    assert (written["eps"], written["dataset"], written["footnote"]) == ("0.5", "cifar10", "")
    linf = leaderboard.to_robustbench(measured(5000, ball=Ball("Linf", 8 / 255)), **ABOUT)
    assert linf["eps"] == "8/255"


def test_the_json_form_invents_nothing_and_hides_nothing():
    written = leaderboard.to_robustbench(measured(700, 1000, data=JPEG), footnote="1M synthetic images.")
    assert [key for key, value in written.items() if value is None] == [
        "link",
        "name",
        "authors",
        "additional_data",
        "number_forward_passes",
        "venue",
        "architecture",
    ]
    assert written["footnote"].startswith("1M synthetic images. NOT the images that RobustBench measures on")
    assert "1,000 images" in written["footnote"]
    for wrong in (
        measured(ball=Ball("L2", 1.0)),
        measured(attacks=("fgsm", "pgd-40")),
        measured(data=replace(CIFAR10, dataset="MNIST")),
    ):
        with pytest.raises(RobustkitError, match="not comparable"):
            leaderboard.to_robustbench(wrong)


def test_our_own_four_are_compared_and_say_that_they_are_ours():
    from robustkit.evaluate import PROTOCOLS

    ours = replace(measured(7031, attacks=tuple(PROTOCOLS["standard"])), protocol=leaderboard.OWN)
    (note,) = standing(ours, load("cifar10", "L2")).notes
    assert "robustkit's own form (protocol standard), not AutoAttack's code" in note
    assert leaderboard.to_robustbench(ours, footnote="Ours.")["footnote"] == f"Ours. {note}"
    for weaker in (replace(ours, protocol=None), replace(ours, protocol="fast")):
        with pytest.raises(RobustkitError, match="as well, or with protocol standard"):
            leaderboard.to_robustbench(weaker)
    by_the_referee = replace(measured(7031), protocol=leaderboard.OWN)  # as written when these were its parts
    assert standing(by_the_referee, load("cifar10", "L2")).notes == ()


def checkout(folder: Path, records: dict[str, str], norm: str = "L2") -> None:
    place = folder / "model_info" / "cifar10" / norm
    place.mkdir(parents=True)
    for name, text in records.items():
        (place / f"{name}.json").write_text(text)


@pytest.fixture
def robustbench_at(tmp_path, monkeypatch) -> Path:
    """A checkout whose package is found as an installed one is, without being imported."""
    (tmp_path / "robustbench").mkdir()
    (tmp_path / "robustbench" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.undo()  # the real find_spec
    monkeypatch.delitem(sys.modules, "robustbench", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_files_of_an_installed_robustbench_go_before_our_copy(robustbench_at):
    written = leaderboard.to_robustbench(measured(9000 - 1), **ABOUT, footnote="1M synthetic images")
    low = {**written, "external": "12.34", "footnote": "built on Ours", "venue": "GitHub,<br>Sep 2019"}
    for key in ("unreliable", "reported"):
        del low[key]  # older files have neither
    checkout(robustbench_at, {"Ours": json.dumps(written), "Lower": json.dumps(low)})
    board = load("cifar10", "L2")
    assert str(robustbench_at) in board.source
    ours, lower = board.entries
    assert (ours.id, ours.robust, ours.reported, ours.synthetic) == ("Ours", 89.99, 89.99, True)
    assert (lower.robust, lower.autoattack, lower.reported) == (12.34, 89.99, None)
    assert (lower.venue, lower.synthetic) == ("GitHub, Sep 2019", True)
    assert "robustkit's copy" in load("cifar10", "Linf").source  # it has no files for that one


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"clean_acc": "9', "Broken.json is not JSON"),
        ('{"eps": "0.5",}', "Broken.json is not JSON"),
        ("[]", "Broken.json holds no model"),
        ("{}", "published file of Broken is not one"),
        ('{"clean_acc": null, "autoattack_acc": "1", "additional_data": false}', "published file of Broken"),
        (
            '{"clean_acc": "90", "autoattack_acc": "n/a", "additional_data": false}',
            "published file of Broken",
        ),
    ],
)
def test_a_broken_installed_file_is_one_sentence(robustbench_at, text, words):
    checkout(robustbench_at, {"Broken": text})
    with pytest.raises(RobustkitError, match=words):
        load("cifar10", "L2")


# --- the command ------------------------------------------------------------------------------------


def test_the_command_shows_the_table_and_the_standing(tmp_path, capsys):
    saved, out = tmp_path / "eval.json", tmp_path / "new" / "Ours.json"
    saved.write_text(measured(703, 1000, data=JPEG).to_json())
    assert read_evaluation(saved).n == 1000
    assert cli.main(["leaderboard", "--eval", str(saved), "--write", str(out)]) == 0
    said = capsys.readouterr().out
    assert "RobustBench, cifar10, L2 eps=0.5: entries without extra or synthetic images" in said
    rows = [line.split() for line in said.splitlines() if line[:1].isdigit()]
    assert [row[:2] for row in rows][:4] == [[str(i), name] for i, name in enumerate(TOP_ALONE["L2"][:4], 1)]
    assert "not measured here" in said
    assert "NOTE: NOT the images" in said
    assert f"robust {Interval(703, 1000)} would stand at rank 3 (by its interval " in said
    assert "above it: Wu2020Adversarial, 73.66 %; below it: Engstrom2019Robustness, 69.24 %" in said
    assert json.loads(out.read_text()) == leaderboard.to_robustbench(read_evaluation(saved))
    assert "fill in what is null" in said

    assert cli.main(["leaderboard", "--eval", str(saved), "--json", "--extra-data", "--synthetic"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["id"] for one in told["entries"]][:5] == TOP["L2"]
    assert told["standing"]["of"] == len(told["entries"]) == 21
    assert told["standing"]["robust"]["k"] == 703


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--norm", "L1"], "invalid choice: 'L1'"),
        (["--data", "mnist"], "no leaderboard for mnist Linf"),
        (["--write", "x.json"], "--write needs a result to write"),
        (["--eval", "missing.json"], "missing.json cannot be read"),
        (["--norm", "Linf", "--eval", "eval.json"], "not comparable: measured at L2 eps=0.5"),
        (["--eval", "weak.json", "--write", "out.json"], "not comparable: measured with fgsm, pgd-40"),
        (["--eval", "eval.json", "--write", "."], "is a folder"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_sentence_and_writes_nothing(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("eval.json").write_text(measured(70, 100).to_json())
    Path("weak.json").write_text(measured(70, 100, attacks=("fgsm", "pgd-40")).to_json())
    assert cli.main(["leaderboard", *arguments]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert words in streams.err
    assert streams.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "weak.json"]


def test_boards_and_standings_need_no_torch():
    code = (
        "import sys; from robustkit import cli; cli.main(['leaderboard', '--json']); "
        "print({'torch', 'numpy', 'robustbench'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"


# --- the package itself -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_installed_robustbench_imports_and_reads_our_json(tmp_path):
    """The real package in a fresh interpreter where every warning is an error; its own reader on our file."""
    pytest.importorskip("pyautoattack")
    checkout(tmp_path, {"Ours": json.dumps(leaderboard.to_robustbench(measured(7031), **ABOUT))})
    code = """
import dataclasses, json, sys
from pathlib import Path
import torch
torch.manual_seed(5)
before = torch.get_rng_state()
from robustkit._robustbench import import_robustbench
robustbench = import_robustbench()
assert import_robustbench() is robustbench
assert torch.equal(torch.get_rng_state(), before)
import autoattack, pyautoattack, autoattack.state
assert autoattack.AutoAttack is pyautoattack.AutoAttack is robustbench.eval.AutoAttack
assert robustbench.eval.EvaluationState is autoattack.state.EvaluationState is pyautoattack.state.EvaluationState
assert callable(robustbench.benchmark) and callable(robustbench.data.load_cifar10)
assert "Rice2020Overfitting" in robustbench.model_zoo.model_dicts[
    robustbench.model_zoo.enums.BenchmarkDataset.cifar_10][robustbench.model_zoo.enums.ThreatModel.L2]
fields = {field.name for field in dataclasses.fields(robustbench.utils.ModelInfo)}
ours = json.loads(Path("model_info/cifar10/L2/Ours.json").read_text())
assert set(ours) - fields == {"unreliable"}, set(ours) - fields
print(robustbench.utils.get_leaderboard_latex("cifar10", "L2"))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1]
    assert [cell.strip(" \\") for cell in row.split("&")] == [
        "1",
        "citet{Ours}",
        "90.00",
        "70.31",
        "N",
        "PreActRN-18",
        "arXiv, Jan 2026",
        "N/A",
    ]


def test_every_import_of_robustbench_is_behind_its_guard():
    importers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.append(node.value if node.value == "robustbench.eval" else "")
            if any(name.split(".")[0] == "robustbench" for name in names):
                importers.add(path.name)
    assert importers == {"_robustbench.py"}


def test_a_board_stays_what_it_was_when_it_is_filtered():
    board = load("cifar10", "L2")
    assert isinstance(board, Leaderboard)
    before = board.entries
    board.select(architecture="ResNet-18")
    assert board.entries == before
    assert board.selection == "every entry"
