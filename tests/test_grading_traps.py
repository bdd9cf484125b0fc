"""The traps of autograding notebooks that no other test closes, and the table of them all."""

import ast
import hashlib
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
from nbgrader.apps.api import NbGraderAPI
from nbgrader.utils import compute_checksum, determine_grade
from packaging.requirements import Requirement
from packaging.version import Version
from sqlalchemy import create_engine, text

from grading import build, gradebook, run, sandbox
from grading.pipeline import Settings
from grading.run import Limits
from grading.score import read_scorecard
from grading.workspace import ROOT
from robustkit.errors import RobustkitError
from robustkit.lessons import check
from tests.fixtures import small_course as small
from tests.redteam.corpus import CORPUS, WRONG

SETTINGS = Settings(limits=Limits(cell=60, notebook=120))
TABLE = ROOT / "docs" / "grading-traps.md"

# nbgrader 0.9.6 with SQLAlchemy 2.1: rows are stored all the same.
pytestmark = pytest.mark.filterwarnings("ignore:Object of type .* not in session:sqlalchemy.exc.SAWarning")


# --- the table ---------------------------------------------------------------------------------------------


def rows():
    """Trap -> the tests that its row names."""
    lines = [line.split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")][2:]
    return {line[0].removeprefix("| "): re.findall(r"\w+", line[2]) for line in lines}


def test_every_trap_of_the_table_has_its_tests_and_every_such_test_its_row():
    tests = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    known = tests | {hostile.name for hostile in CORPUS}
    table = rows()
    assert len(table) >= 29
    assert {trap: names for trap, names in table.items() if not names or set(names) - known} == {}
    named = {name for names in table.values() for name in names}
    assert {name for name in tests if name.startswith("test_trap_")} <= named


# --- what a check cell prints ------------------------------------------------------------------------------

LOUD = small.DISTANCE.replace("change =", "import sys; print('a warning', file=sys.stderr); change =", 1)
LYING = """
def robust_accuracy(correct, fooled):
    return 2.0
answers = iter([float("nan"), "full marks", float("inf")])
def check(*_):
    return next(answers)
"""


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A class of two: one honest, loud, and with three of its check cells tampered with; one that only lies."""
    workspace = small.workspace_in(tmp_path_factory.mktemp("traps"))
    small.author(workspace, small.LESSON, small.source_notebook())
    build.build(workspace, [small.LESSON])
    release = nbformat.read(workspace.release(small.LESSON), as_version=4)
    honest = small.filled(release, {**small.SOLUTIONS, "s0_distance": LOUD})
    small.cell(honest, "s0_distance_check").metadata["nbgrader"].update(points=1000, locked=False)
    honest.cells.remove(small.cell(honest, "s0_project_check"))
    edited = small.cell(honest, "s0_robust_accuracy_check")
    edited.source = "1000.0"
    edited.metadata["nbgrader"]["checksum"] = compute_checksum(edited)  # as valid as MD5 can say
    small.hand_in(workspace, "honest", honest)
    small.hand_in(
        workspace, "liar", small.filled(release, {**WRONG, "s0_distance": WRONG["s0_distance"] + LYING})
    )
    outcomes = small.graded(workspace, [small.LESSON], SETTINGS)
    assert not [outcome.problem for outcome in outcomes if outcome.problem]
    return workspace


def row_of(workspace, student):
    return next(row for row in gradebook.rows(workspace) if row.student == student)


@pytest.mark.slow
def test_trap_stderr_in_a_check_cell_costs_nothing(graded):
    shown = nbformat.read(graded.autograded / "honest" / small.LESSON / f"{small.LESSON}.ipynb", as_version=4)
    cell = small.cell(shown, "s0_distance_check")
    assert "a warning" in str(cell.outputs)
    assert determine_grade(cell) == (0, 2)  # what nbgrader alone makes of it
    assert row_of(graded, "honest").points == 7


@pytest.mark.slow
def test_trap_an_output_that_is_no_number_earns_nothing(graded):
    shown = nbformat.read(graded.autograded / "liar" / small.LESSON / f"{small.LESSON}.ipynb", as_version=4)
    printed = [str(small.cell(shown, f"s0_{name}_check").outputs) for name in ("distance", "project")]
    assert "nan" in printed[0]
    assert "full marks" in printed[1]
    row = row_of(graded, "liar")
    assert (row.points, row.maximum, row.needs_marking) == (0, 7, False)


@pytest.mark.parametrize("said", ["nan", "tensor(0.5)", "np.float32(0.0)", "False", "'0.0'", "-3"])
def test_trap_nbgrader_alone_gives_full_marks(said):
    """Why the judge's points are written in place of nbgrader's: none of these is worth 2 points."""
    cell = small.cell(small.source_notebook(), "s0_distance_check")
    cell.outputs = [nbformat.v4.new_output("execute_result", data={"text/plain": said}, execution_count=1)]
    points, _ = determine_grade(cell)
    assert not 0 <= points < 2


@pytest.mark.slow
def test_trap_a_deleted_check_cell_is_put_back(graded):
    assert not row_of(graded, "honest").needs_marking
    card = read_scorecard(graded.hop("honest", small.LESSON) / "scorecard.json")
    assert {exercise.id: exercise.points for exercise in card.exercises}["s0_project_check"] == 3


@pytest.mark.slow
def test_trap_edited_metadata_is_put_back_and_reported(graded):
    card = read_scorecard(graded.hop("honest", small.LESSON) / "scorecard.json")
    assert card.restored == ("s0_distance_check", "s0_project_check", "s0_robust_accuracy_check")
    assert (card.points, card.maximum) == (7, 7)
    page = graded.page("honest", small.LESSON).read_text()
    assert "s0_distance_check" in page.split("was put back before grading")[1].split("</p>")[0]
    assert read_scorecard(graded.hop("liar", small.LESSON) / "scorecard.json").restored == ()


def test_trap_the_check_says_that_it_is_only_the_visible_one(capsys):
    check("s0_robust_accuracy_check", lambda correct, fooled: 2.0)
    assert capsys.readouterr().out.endswith("points on the visible check\n")


# --- release, gradebook, exchange --------------------------------------------------------------------------


def test_trap_hidden_tests_are_not_in_the_release():
    for path in (ROOT / "course").rglob("*.ipynb"):
        assert not re.search(r"BEGIN (HIDDEN|SOLUTION|MARK)", path.read_text()), path.name


@pytest.mark.slow
@pytest.mark.parametrize("change", ["a cell more", "a cell that nbgrader refuses"])
def test_trap_nbgraders_generator_cannot_lose_the_release(graded, change):
    """The command and formgrader's button, which remove the release before they make it again."""
    source, release = graded.source(small.LESSON), graded.release(small.LESSON)
    before, released = source.read_bytes(), release.read_bytes()
    notebook = nbformat.read(source, as_version=4)
    extra = nbformat.from_dict(small.cell(notebook, "s0_setup"))
    extra["id"] = "more"
    extra.metadata["nbgrader"]["grade_id"] = "s0_more" if change == "a cell more" else "no id at all!"
    notebook.cells.append(extra)
    nbformat.write(notebook, source)
    try:
        done = NbGraderAPI(config=gradebook.settings(graded)).generate_assignment(small.LESSON, force=True)
        assert not done["success"]
        assert release.read_bytes() == released
    finally:
        source.write_bytes(before)
    again = NbGraderAPI(config=gradebook.settings(graded)).generate_assignment(small.LESSON, force=True)
    assert again["success"], again
    assert release.read_bytes() == released


@pytest.mark.slow
def test_trap_an_old_gradebook_is_refused_untouched_and_can_be_migrated(tmp_path):
    workspace = small.workspace_in(tmp_path)
    workspace.private.mkdir()
    with gradebook.opened(workspace) as book:
        book.update_or_create_student("ada", last_name="Lovelace")
    engine = create_engine(workspace.gradebook_url)
    with engine.begin() as connection:  # as nbgrader 0.5 left it
        for statement in (
            "UPDATE alembic_version SET version_num = '282d30a0218e'",
            "DROP TABLE course",
            "DROP TABLE assignment",
            "CREATE TABLE assignment (id VARCHAR(32) PRIMARY KEY, name VARCHAR(128) NOT NULL, duedate DATETIME)",
            "INSERT INTO assignment (id, name) VALUES ('1', 'old')",
        ):
            connection.execute(text(statement))
    engine.dispose()
    before = hashlib.sha256(workspace.gradebook.read_bytes()).hexdigest()
    with pytest.raises(RobustkitError, match="back it up, then run: nbgrader db upgrade"):
        gradebook.rows(workspace)
    assert hashlib.sha256(workspace.gradebook.read_bytes()).hexdigest() == before

    command = [sys.executable, "-m", "nbgrader", "db", "upgrade", "--db", workspace.gradebook_url]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    backups = list(workspace.private.glob("gradebook.db.*"))
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in backups] == [before]
    with gradebook.opened(workspace) as book:
        assert [student.last_name for student in book.students] == ["Lovelace"]


def test_trap_an_nbgrader_with_known_holes_is_not_accepted():
    project = (ROOT / "pyproject.toml").read_text()
    (needed,) = {Requirement(found) for found in re.findall(r'"(nbgrader[^"]*)"', project) if ">=" in found}
    assert not needed.specifier.contains("0.9.5")
    assert Version(version("nbgrader")) >= Version("0.9.6")


@pytest.mark.slow
def test_trap_grading_needs_no_exchange(graded):
    """The class above was graded; the folder that nbgrader asks for is the grader's own, and empty."""
    exchange = graded.private / "exchange"
    assert list(exchange.iterdir()) == []
    assert not exchange.stat().st_mode & 0o002


# --- kernels, notebooks, late hand-ins ---------------------------------------------------------------------


def test_trap_kernels_talk_over_private_sockets(tmp_path):
    assert run.plain_kernel(Path("/run/k")).transport == "ipc"
    for tier in sandbox.available():
        assert run.kernel_in(tier, Limits())(Path("/run/k")).transport == "ipc"


def test_trap_nbval_uses_this_environment_and_waits():
    stage = re.search(r"^notebooks:.*?\n\n", (ROOT / "Makefile").read_text(), re.MULTILINE | re.DOTALL)[0]
    assert "--nbval-current-env" in stage
    assert re.search(r"--nbval-cell-timeout=\d{3}", stage)


def test_trap_no_pickle_is_ever_loaded():
    """Every torch.load says weights_only, every numpy.load that it allows no pickle; nothing imports pickle."""
    calls, imports = [], []
    for path in [*(ROOT / "robustkit").rglob("*.py"), *(ROOT / "grading").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "np.load",
                "numpy.load",
            ):
                calls.append((path.name, ast.unparse(node)))
            if isinstance(node, ast.Import):
                imports += [(path.name, name.name) for name in node.names]
    assert any("torch.load" in call for _, call in calls)
    assert [c for c in calls if "weights_only=True" not in c[1] and "allow_pickle=False" not in c[1]] == []
    assert [found for found in imports if found[1] in ("pickle", "dill", "cloudpickle", "joblib")] == []


@pytest.mark.slow
@pytest.mark.parametrize(("late", "points"), [(timedelta(hours=-1), 7), (timedelta(hours=25), 5.6)])
def test_trap_a_late_day_costs_its_share(graded, late, points, monkeypatch):
    """Two days begun at a tenth each. A plain tier: this is about nbgrader's due date, not about the sandbox."""
    monkeypatch.setenv("ROBUSTKIT_LATE_PER_DAY", "0.1")
    due = datetime(2026, 3, 1, 12, tzinfo=UTC)
    with gradebook.opened(graded) as book:
        book.update_or_create_assignment(small.LESSON, duedate=due.replace(tzinfo=None))
    stamp = graded.submission("honest", small.LESSON).with_name("timestamp.txt")
    stamp.write_text(f"{due + late:%Y-%m-%d %H:%M:%S} UTC\n")
    done = NbGraderAPI(config=gradebook.settings(graded, SETTINGS)).autograde(
        small.LESSON, "honest", force=True
    )
    assert done["success"], done
    row = row_of(graded, "honest")
    assert row.points == pytest.approx(points)
    assert row.penalty == pytest.approx(7 - points)


@pytest.mark.parametrize("share", ["ten", "-0.1", "1.5", "nan"])
def test_a_late_share_that_is_none_is_one_sentence(share, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTKIT_LATE_PER_DAY", share)
    with pytest.raises(RobustkitError, match=r"the share of the points that a late day costs, such as 0\.1"):
        gradebook.settings(small.workspace_in(tmp_path))
