"""run, judge, score, feedback: hostile and broken submissions through real kernels. No mocks."""

import dataclasses
import html.parser
import io
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import zipfile

import nbformat
import numpy as np
import pytest

from grading import build, evidence, feedback, judge, notebooks, records, run
from grading.__main__ import main
from grading.records import Note
from grading.score import read_scorecard, score, write_scorecard
from grading.workspace import ROOT, case_seed, check_student, course_secret
from robustkit.contracts import CONTRACTS
from robustkit.errors import RobustkitError
from robustkit.lessons import LESSONS
from tests.fixtures import small_course as small

LESSON = LESSONS[small.LESSON]
SECRET = b"a secret of the tests' own, of 32"
QUICK = run.Limits(cell=60, notebook=120, output_bytes=20_000)
SHORT = run.Limits(cell=6, notebook=60)  # an endless loop takes this long; importing torch must not


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A workspace with the small lesson released."""
    workspace = small.workspace_in(tmp_path_factory.mktemp("course"))
    small.author(workspace, LESSON.id, small.source_notebook())
    build.build(workspace, [LESSON.id])
    return workspace


@pytest.fixture
def release(course):
    return nbformat.read(course.release(LESSON.id), as_version=4)


def execute(course, notebook, into, limits=QUICK, student="s-1"):
    """Run a notebook, or a file's path; the folder of evidence and the run."""
    path = notebook
    if not hasattr(notebook, "joinpath"):
        path = into / "submission.ipynb"
        nbformat.write(notebook, path)
    folder = into / "evidence"
    done = run.run_submission(
        path, LESSON, course.release(LESSON.id), folder, student=student, secret=SECRET, limits=limits
    )
    return folder, done


def grade(course, notebook, into, limits=QUICK):
    """The scorecard of a notebook, and its run."""
    folder, done = execute(course, notebook, into, limits)
    return score(judge.judge(folder, SECRET), {}), done


def earned(card):
    return {exercise.id.removesuffix("_check"): exercise.points for exercise in card.exercises}


# --- the honest ------------------------------------------------------------------------------------


def test_solution_earns_everything_and_leaves_its_outputs(course, release, tmp_path):
    card, done = grade(course, small.filled(release, small.SOLUTIONS), tmp_path)
    assert (card.points, card.maximum, card.codes) == (7, 7, ())
    assert done.errors == 0
    assert done.tier == "smoke"
    executed = nbformat.read(tmp_path / "evidence" / "executed.ipynb", as_version=4)
    assert "Distances: 2 of 2" in small.cell(executed, "s0_distance_check").outputs[0].text
    assert not [c for c in executed.cells if "_robustkit_probe" in c.source]


def test_untouched_release_earns_nothing(course, release, tmp_path):
    card, _ = grade(course, release, tmp_path)
    assert card.points == 0
    assert card.codes == ("NOT_IMPLEMENTED",)


def test_partial_credit_goes_by_criterion(course, release, tmp_path):
    only_linf = "def distance(x, z, norm):\n    return (z - x).flatten(1).abs().amax(1)"
    card, _ = grade(course, small.filled(release, {"s0_distance": only_linf}), tmp_path)
    distance = card.exercises[0]
    assert [(mark.criterion, mark.outcome, mark.points) for mark in distance.marks] == [
        ("Linf", "passed", 1),
        ("L2", "failed", 0),
    ]
    assert distance.marks[1].notes[0].code == "WRONG_DISTANCE"


# --- the broken and the hostile ----------------------------------------------------------------------

PRINTS_POINTS = """
import builtins, robustkit.lessons, robustkit.contracts
def forged(*anything):
    print("Distances: 1000 of 1000")
    return 1000.0
robustkit.lessons.check = robustkit.lessons.award = forged
check = forged
distance = project = robust_accuracy = forged
"""


@pytest.mark.parametrize(
    ("cells", "points", "outcomes"),
    [
        pytest.param({"s0_distance": PRINTS_POINTS}, 0, {"failed", "not_implemented"}, id="prints_1000"),
        pytest.param({"s0_distance": "import os; os._exit(1)"}, 0, {"crashed", "not_reached"}, id="kills_kernel"),
        pytest.param(
            {"s0_distance": small.DISTANCE, "s0_project": "import os; os._exit(1)"},
            2,
            {"passed", "crashed", "not_reached"},
            id="kills_kernel_later",
        ),
        pytest.param(
            {**small.SOLUTIONS, "s0_project": "while True:\n    pass"}, 4, {"passed", "timed_out"}, id="loops_for_ever"
        ),
        pytest.param(
            {
                "s0_distance": "def distance(*a):\n    while True: pass",
                "s0_project": "def project(*a):\n    raise SystemExit",
                "s0_robust_accuracy": small.ROBUST_ACCURACY,
            },
            2,
            {"passed", "timed_out", "crashed"},
            id="loops_and_exits_when_called",
        ),
        pytest.param(
            {
                "s0_distance": "distance = 7",
                "s0_project": "syntax error",
                "s0_robust_accuracy": "robust_accuracy = lambda correct, fooled: float('nan')",
            },
            0,
            {"failed", "missing"},
            id="not_callable_and_syntax_error_and_nan",
        ),
    ],
)  # fmt: skip
def test_points_are_what_the_functions_earn(course, release, tmp_path, cells, points, outcomes):
    card, _ = grade(course, small.filled(release, cells), tmp_path, SHORT)
    assert card.points == points
    assert {mark.outcome for exercise in card.exercises for mark in exercise.marks} == outcomes


def test_equality_that_is_always_true_earns_nothing(course, release, tmp_path):
    always = """
class Always(float):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0.0
    __rsub__ = __sub__
    def __abs__(self): return 0.0
def robust_accuracy(correct, fooled): return Always(0.123)
"""
    card, _ = grade(course, small.filled(release, {"s0_robust_accuracy": always}), tmp_path)
    assert card.points == 0


def test_total_time_ends_a_notebook_that_spends_it_cell_by_cell(course, release, tmp_path):
    slow = {"s0_distance": "import time\ntime.sleep(30)\n" + small.DISTANCE}
    card, _ = grade(
        course, small.filled(release, {**small.SOLUTIONS, **slow}), tmp_path, run.Limits(60, notebook=5)
    )
    assert card.points == 0
    assert {mark.outcome for e in card.exercises for mark in e.marks} == {"timed_out", "not_reached"}


def test_files_beside_the_notebook_shadow_nothing(course, release, tmp_path):
    (tmp_path / "numpy.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "torch.py").write_text("raise SystemExit('shadowed')")
    writes = "from pathlib import Path\nPath('robustkit.py').write_text('raise SystemExit')\n"
    cells = {**small.SOLUTIONS, "s0_distance": writes + small.DISTANCE}
    card, _ = grade(course, small.filled(release, cells), tmp_path)
    assert card.points == 7


def test_deleted_and_edited_locked_cells_come_back(course, release, tmp_path):
    notebook = small.filled(release, {**small.SOLUTIONS, "s0_project_check": "1000.0"})
    notebook.cells.remove(small.cell(notebook, "s0_distance_check"))
    notebook.cells.remove(small.cell(notebook, "s0_setup"))
    card, done = grade(course, notebook, tmp_path)
    assert card.points == 7
    assert done.restored == ("s0_setup", "s0_distance_check", "s0_project_check")
    assert card.restored == done.restored


def test_points_and_flags_in_the_metadata_are_ignored(course, release, tmp_path):
    notebook = small.filled(release, {"s0_distance": small.DISTANCE})
    small.cell(notebook, "s0_distance_check").metadata["nbgrader"].update(
        points=1000, locked=False, solution=True
    )
    notebook.metadata["kernelspec"] = {"name": "evil", "display_name": "evil"}
    card, _ = grade(course, notebook, tmp_path)
    assert (card.points, card.maximum) == (2, 7)


def test_output_is_cut_and_active_content_is_dropped(course, release, tmp_path):
    loud = """
from IPython.display import HTML, Javascript, display
display(HTML("<script>alert(1)</script>"), Javascript("alert(2)"))
for _ in range(200): print("x" * 1000)
"""
    _, _ = execute(course, small.filled(release, {"s0_distance": loud}), tmp_path)
    executed = (tmp_path / "evidence" / "executed.ipynb").read_text()
    assert len(executed) < 60_000
    assert "text/html" not in executed
    assert "application/javascript" not in executed


def test_kernel_sees_neither_the_callers_environment_nor_other_cases(course, release, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADER_TOKEN", "do not leak")
    look = """
import os, pathlib
print("TOKEN", os.environ.get("GRADER_TOKEN"), "CASE", os.path.getsize("case.npz"))
print("HOME", os.environ["HOME"] == os.getcwd())
try:
    import grading
    print("GRADING importable")
except ImportError:
    print("GRADING absent")
"""
    execute(course, small.filled(release, {**small.SOLUTIONS, "s0_robust_accuracy": look}), tmp_path)
    executed = nbformat.read(tmp_path / "evidence" / "executed.ipynb", as_version=4)
    printed = small.cell(executed, "s0_robust_accuracy").outputs[0].text
    assert "TOKEN None" in printed
    assert "CASE 0\n" in printed
    assert "HOME True" in printed
    assert "GRADING absent" in printed


@pytest.mark.parametrize(
    "forge",
    [
        pytest.param("os.symlink('/etc/passwd', 'evidence.npz')", id="symlink"),
        pytest.param("os.makedirs('evidence.npz')", id="folder"),
        pytest.param("np.savez('evidence.npz', Linf=np.array([{}], dtype=object))", id="pickle"),
        pytest.param("np.savez('evidence.npz', Linf=np.full(8, np.nan), L2=np.full(8, np.nan))", id="nan"),
        pytest.param("np.savez('evidence.npz', error=np.frombuffer(b'[[], {}]', dtype=np.uint8))", id="error_object"),
    ],
)  # fmt: skip
def test_forged_evidence_earns_nothing_and_costs_only_its_exercise(course, release, tmp_path, forge):
    """The learner's code replaces what the probe writes. One run forges the first exercise alone."""
    code = f"""
import os, numpy as np, robustkit.lessons as lessons
honest = lessons.save_arrays
def forged(path, arrays):
    if "Linf" not in arrays:
        return honest(path, arrays)
    {forge}
lessons.save_arrays = forged
"""
    cells = {**small.SOLUTIONS, "s0_distance": small.DISTANCE + code}
    card, _ = grade(course, small.filled(release, cells), tmp_path)
    assert earned(card) == {"s0_distance": 0, "s0_project": 3, "s0_robust_accuracy": 2}


def test_a_learners_exception_carries_no_case_out(course, release, tmp_path):
    tell = "def distance(x, z, norm):\n    raise ValueError(str(x.flatten().tolist()))"
    card, _ = grade(course, small.filled(release, {"s0_distance": tell}), tmp_path)
    note = card.exercises[0].marks[0].notes[0]
    assert note == Note("RAISED", "your code raised ValueError on the grader's inputs")
    named = "class Told(Exception): pass\nTold.__name__ = '0.123,0.456'\ndef distance(x, z, norm):\n    raise Told"
    card, _ = grade(course, small.filled(release, {"s0_distance": named}), tmp_path)
    assert card.exercises[0].marks[0].notes[0].hint == "your code raised an exception on the grader's inputs"


# --- preflight: what cannot be graded at all ---------------------------------------------------------


def _bad_files(folder, release):
    twice = small.filled(release, {})
    again = nbformat.from_dict(small.cell(twice, "s0_project"))
    twice.cells.append(nbformat.v4.new_code_cell(again.source, metadata=again.metadata))
    foreign = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    older = {**json.loads(nbformat.writes(foreign)), "nbformat": 3}
    texts = {
        "not_json": "{",
        "empty": "",
        "a_list": "[]",
        "binary": "\udc80",
        "deep": "[" * 100_000 + "]" * 100_000,
        "format_3": json.dumps(older),
        "cells_missing": json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}}),
        "cells_wrong": json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [7]}),
        "none_of_the_cells": nbformat.writes(foreign),
        "duplicated": nbformat.writes(twice),
    }
    for name, text in texts.items():
        path = folder / f"{name}.ipynb"
        path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
        yield name, path
    link = folder / "link.ipynb"
    link.symlink_to(folder / "duplicated.ipynb")
    fifo = folder / "fifo.ipynb"
    os.mkfifo(fifo)
    large = folder / "large.ipynb"
    with large.open("wb") as file:
        file.truncate(notebooks.MOST_BYTES + 1)
    yield from (("link", link), ("fifo", fifo), ("large", large), ("missing", folder / "missing.ipynb"))


def test_unusable_notebooks_are_refused_in_one_sentence(course, release, tmp_path):
    for name, path in _bad_files(tmp_path, release):
        with pytest.raises(RobustkitError) as refusal:
            execute(course, path, tmp_path)
        assert "\n" not in str(refusal.value), name
        assert str(refusal.value).endswith("."), name


def test_duplicated_cells_are_named(course, release, tmp_path):
    path = dict(_bad_files(tmp_path, release))["duplicated"]
    with pytest.raises(RobustkitError, match="s0_project 2 times; keep one"):
        execute(course, path, tmp_path)


def test_restore_keeps_the_learners_cells_in_place_and_puts_missing_ones_in_order(release):
    submitted = small.filled(release, {"s0_project": "mine"})
    own = nbformat.v4.new_code_cell(
        "my own", metadata={"tags": ["x"], "nbgrader": {"grade_id": "s0_unknown"}}
    )
    submitted.cells.insert(4, own)
    for name in ("s0_distance_check", "s0_robust_accuracy", "s0_robust_accuracy_check"):
        submitted.cells.remove(small.cell(submitted, name))
    rebuilt, restored = notebooks.restore(submitted, release)
    ids = [notebooks.grade_id(c) or c.source for c in rebuilt.cells]
    assert [name for name in ids if name.startswith("s0")] == [
        notebooks.grade_id(c) for c in release.cells if notebooks.grade_id(c)
    ]
    assert "my own" in ids
    assert restored == ("s0_distance_check", "s0_robust_accuracy_check")
    assert all(not c.metadata for c in rebuilt.cells if c.source == "my own")
    assert len({c.id for c in rebuilt.cells}) == len(rebuilt.cells)


def test_notebook_without_any_nbgrader_metadata_is_refused(release):
    stripped = small.filled(release, {})
    for c in stripped.cells:
        c.metadata = nbformat.NotebookNode()
    with pytest.raises(RobustkitError, match="none of the lesson's cells"):
        notebooks.restore(stripped, release)


def test_older_minor_formats_are_read(release, tmp_path):
    content = json.loads(nbformat.writes(release)) | {"nbformat_minor": 2}
    for c in content["cells"]:
        c.pop("id")
    path = tmp_path / "old.ipynb"
    path.write_text(json.dumps(content))
    notebook, _ = notebooks.read_submission(path)
    assert notebooks.lesson_of(notebook) is LESSON


# --- evidence ------------------------------------------------------------------------------------------


def test_evidence_round_trip(tmp_path):
    arrays = {
        "a": np.arange(6.0).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "scalar": np.float32(0.5),
        "flag": np.bool_(True),
        "none": np.zeros((0, 3)),
    }
    np.savez(tmp_path / "e.npz", **arrays)
    read = evidence.parse(evidence.take(tmp_path / "e.npz"))
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(read[name], array)
        assert read[name].shape == np.shape(array)


def _npz(member: bytes, name="a.npy", compression=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(name, member)
    return buffer.getvalue()


def _twice(member: bytes) -> bytes:
    """Two members of one name: which of them is read must not depend on the reader."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", member)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", member)
    return buffer.getvalue()


def _npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        _npz(b"nothing"),
        _npz(_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (10**12,)}")),
        _npz(_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}")),
        _npz(_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}")),
        _npz(_npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", pickle.dumps({}))),
        _npz(_npy("{'descr': [('x', '<f8')], 'fortran_order': False, 'shape': (1,)}", b"\0" * 8)),
        _npz(_npy("{'descr': '<U4', 'fortran_order': False, 'shape': (1,)}", b"\0" * 16)),
        _npz(_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}", b"\0" * 7)),
        _npz(_npy("__import__('os').system('true')")),
        _npz(_npy("[" * 5000)),
        _npz(_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (0,)}" + " " * 2000)),
        _npz(_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}", b"\0" * 8)),
        _npz(_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (2**62, 4)}")),
        _npz(_npy("{'descr': '<f99999', 'fortran_order': False, 'shape': (1,)}", b"\0" * 8)),
        _twice(_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}", b"\0" * 8)),
        _npz(_npy("{}")),
        _npz(_npy("{'descr': '<f8', 'fortran_order': False, 'shape': 5}")),
        _npz(b"x" * 100, name="a.txt"),
        _npz(
            _npy("{'descr': '<f8', 'fortran_order': False, 'shape': (0,)}"), compression=zipfile.ZIP_DEFLATED
        ),
    ],
)
def test_malformed_evidence_is_refused(data):
    with pytest.raises(RobustkitError, match="malformed"):
        evidence.parse(data)


def test_zip_bomb_is_refused_before_it_is_unpacked():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\0" * (evidence.MOST_BYTES + 1))
    with pytest.raises(RobustkitError, match="more bytes inside"):
        evidence.parse(buffer.getvalue())


# --- judge ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solved(course, tmp_path_factory):
    """The evidence of a full solution."""
    released = nbformat.read(course.release(LESSON.id), as_version=4)
    return execute(course, small.filled(released, small.SOLUTIONS), tmp_path_factory.mktemp("solved"))[0]


@pytest.fixture
def evidence_folder(solved, tmp_path):
    """A copy to spoil."""
    for path in solved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_judging_again_gives_the_same_records(solved):
    assert judge.judge(solved, SECRET) == judge.judge(solved, SECRET)


def test_another_secret_or_student_means_other_cases(solved, evidence_folder):
    other = score(judge.judge(solved, b"another secret, of 32 bytes also"), {})
    assert other.points < 2  # pixels in [0, 1] are in [0, 1] whoever they belong to
    done = records.read_run(evidence_folder / "run.json")
    records.write(evidence_folder / "run.json", dataclasses.replace(done, student="someone-else"))
    assert score(judge.judge(evidence_folder, SECRET), {}).points < 2


def test_evidence_changed_after_the_run_earns_nothing(evidence_folder):
    path = evidence_folder / "s0_project_check.npz"
    arrays = evidence.parse(path.read_bytes())
    np.savez(path, **arrays, more=np.zeros(1))
    card = score(judge.judge(evidence_folder, SECRET), {})
    assert earned(card) == {"s0_distance": 2, "s0_project": 0, "s0_robust_accuracy": 2}
    assert card.exercises[1].marks[0].outcome == "tampered"


def test_missing_evidence_and_unknown_entries_earn_nothing(evidence_folder):
    (evidence_folder / "s0_distance_check.npz").unlink()
    done = records.read_run(evidence_folder / "run.json")
    records.write(evidence_folder / "run.json", dataclasses.replace(done, exercises=done.exercises[:2]))
    card = score(judge.judge(evidence_folder, SECRET), {})
    assert earned(card) == {"s0_distance": 0, "s0_project": 3, "s0_robust_accuracy": 0}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"type": "Run"}', '{"type": "Records"}'])
def test_judge_refuses_a_folder_without_a_run(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RobustkitError):
        judge.judge(tmp_path, SECRET)


def test_judge_process_loads_no_kernel_client_and_no_nbgrader(solved, tmp_path):
    """What the judge imports is what a forged file could reach."""
    (tmp_path / "secret").write_bytes(SECRET)
    code = (
        "import sys; from grading.__main__ import main\n"
        f"status = main(['judge', {str(solved)!r}, '-o', {str(tmp_path / 'records.json')!r}, "
        f"'--secret', {str(tmp_path / 'secret')!r}])\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(status, sorted(loaded & {'nbgrader', 'nbclient', 'jupyter_client', 'sqlalchemy', 'IPython'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert score(records.read_records(tmp_path / "records.json"), {}).points == 7


# --- score and feedback --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verdicts(solved):
    return judge.judge(solved, SECRET)


def test_records_and_scorecard_survive_json(verdicts, tmp_path):
    records.write(tmp_path / "records.json", verdicts)
    assert records.read_records(tmp_path / "records.json") == verdicts
    card = score(verdicts, {"s0_project_check": 1.5})
    write_scorecard(tmp_path / "scorecard.json", card)
    assert read_scorecard(tmp_path / "scorecard.json") == card
    assert json.loads((tmp_path / "scorecard.json").read_text())["summary"]["points"] == 5.5


def test_marks_that_are_missing_doubled_or_out_of_range_earn_nothing(verdicts):
    first, *rest = verdicts.marks
    for marks in (
        rest,
        [first, first, *rest],
        [dataclasses.replace(first, points=1000.0), *rest],
        [dataclasses.replace(first, points=-1.0), *rest],
        [dataclasses.replace(first, points=float("nan")), *rest],
        [dataclasses.replace(first, maximum=1000.0, points=1000.0), *rest],
    ):
        card = score(dataclasses.replace(verdicts, marks=tuple(marks)), {})
        assert (card.points, card.maximum) == (6, 7)
        assert card.codes == ("NO_VALID_RECORD",)


@pytest.mark.parametrize("points", [-1.0, float("nan"), float("inf")])
def test_impossible_hand_given_points_are_refused(verdicts, points):
    with pytest.raises(RobustkitError, match="0 or more"):
        score(verdicts, {"s0_project_check": points})


def test_written_answers_wait_for_their_marks():
    nothing = judge.refused("s-1", LESSONS[small.WRITTEN], "smoke", "")
    card = score(nothing, {})
    assert [answer.id for answer in card.pending] == ["s1_judgement"]
    assert score(nothing, {"s1_judgement": 7.5}).points == 7.5
    assert not score(dataclasses.replace(nothing, refused="not JSON."), {}).pending


class _Page(html.parser.HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_feedback_says_what_was_asked_and_what_to_look_at(course, release, tmp_path):
    card, _ = grade(course, small.filled(release, {"s0_distance": small.DISTANCE}), tmp_path)
    page = _Page(feedback.render(card))
    assert ("html", {"lang": "en"}) in page.tags
    assert [tag for tag, _ in page.tags if tag in ("h1", "h2")] == ["h1", "h2", "h2"]
    assert "caption" in dict(page.tags)
    assert "2 of 7 points" in page.text
    assert "NOT_IMPLEMENTED" in page.text
    assert "an image counts only when it survives every attack" in page.text
    assert feedback.render(card) == feedback.render(card)


def test_advice_names_what_is_wrong_before_what_it_cost_beside(verdicts):
    """Two marks of the first exercise are lost; the one that only waits for the other comes first on the page."""
    notes = Note("NOT_COUNTED", "this counts only beside L2"), Note("SQUARED", "take the root")
    lost = [
        dataclasses.replace(mark, points=0.0, outcome="failed", notes=(note,))
        for mark, note in zip(verdicts.marks[:2], notes, strict=True)
    ]
    assert lost[0].exercise == lost[1].exercise
    card = score(dataclasses.replace(verdicts, marks=(*lost, *verdicts.marks[2:])), {})
    advised = {exercise.id: code for exercise, code, _ in feedback.advice(card)}
    assert advised[lost[0].exercise] == "SQUARED"


def test_feedback_escapes_everything_and_runs_nothing(verdicts):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    mark = dataclasses.replace(verdicts.marks[0], points=0.0, outcome=evil, notes=(Note(evil, evil),))
    bad = dataclasses.replace(verdicts, student=evil, restored=(evil,), marks=(mark, *verdicts.marks[1:]))
    for text in (
        feedback.render(score(bad, {})),
        feedback.render(score(dataclasses.replace(bad, refused=evil), {})),
    ):
        tags = {tag for tag, _ in _Page(text).tags}
        assert not tags & {"script", "img", "iframe", "object", "link"}
        assert "&lt;script&gt;" in text


def test_every_criterion_is_explained_to_learners():
    for lesson in LESSONS.values():
        for exercise in lesson.exercises:
            assert set(feedback.ASKED[exercise.contract]) >= set(exercise.points)
            assert set(exercise.points) <= set(CONTRACTS[exercise.contract].criteria)


# --- secrets, ids, the command ---------------------------------------------------------------------------


def test_secret_is_made_once_and_is_private(tmp_path):
    secret = course_secret(tmp_path / "private" / "secret")
    assert course_secret(tmp_path / "private" / "secret") == secret
    assert len(secret) == 32
    assert stat.S_IMODE((tmp_path / "private" / "secret").stat().st_mode) == 0o600
    (tmp_path / "short").write_bytes(b"x")
    with pytest.raises(RobustkitError, match="holds 1 bytes"):
        course_secret(tmp_path / "short")


def test_seeds_differ_by_student_lesson_and_exercise_and_fit_a_generator():
    keys = [
        ("a", "l", "e"),
        ("b", "l", "e"),
        ("a", "m", "e"),
        ("a", "l", "f"),
        ("a,l", "", "e"),
        ('a", "l', "", "e"),
    ]
    seeds = {case_seed(SECRET, *key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\nb", "x" * 81, ".hidden", " a", "a*", "[a]", "ä"])
def test_unusable_student_ids_are_refused(name):
    with pytest.raises(RobustkitError, match="unusable"):
        check_student(name)


def test_commands_chain_by_files(course, release, tmp_path, capsys):
    """run, judge, score, feedback as an instructor types them, and bad input as one sentence."""
    (tmp_path / "secret").write_bytes(SECRET)
    secret = ("--secret", tmp_path / "secret")

    def command(*arguments):
        status = main([*map(str, arguments)])
        return status, *capsys.readouterr()

    folder, _ = execute(course, small.filled(release, small.SOLUTIONS), tmp_path)
    assert command("judge", folder, "-o", tmp_path / "r.json", *secret)[0] == 0
    (tmp_path / "marks.json").write_text('{"s0_project_check": 0.5}')
    scored = command(
        "score", tmp_path / "r.json", "-o", tmp_path / "s.json", "--marks", tmp_path / "marks.json"
    )
    assert scored == (0, "4.5 of 7 points, 0 answers to mark\n", "")
    status, out, _ = command("feedback", tmp_path / "s.json", "-o", tmp_path / "f.html", "--json")
    assert (status, json.loads(out)) == (0, str(tmp_path / "f.html"))
    for bad in (
        ("run", tmp_path / "missing.ipynb", "-o", tmp_path / "e"),
        ("run", tmp_path, "-o", tmp_path / "e", "--lesson", "99-nowhere"),
        ("judge", tmp_path / "nothing", "-o", tmp_path / "x", *secret),
        ("score", tmp_path / "f.html", "-o", tmp_path / "x"),
        ("score", tmp_path / "r.json", "-o", tmp_path / "x", "--marks", tmp_path / "f.html"),
        ("feedback", tmp_path / "r.json", "-o", tmp_path / "x"),
        ("class", "grade", "--submitted", tmp_path / "nothing"),
        ("build", "99-nowhere"),
    ):
        status, out, err = command(*bad)
        assert (status, out) == (2, ""), bad
        assert err.count("\n") == 1, err
