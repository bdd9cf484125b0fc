"""A class through nbgrader: real SQLite, real converters, the command line and formgrader's own queries."""

import csv
import io
import os
import subprocess
import sys

import nbformat
import pytest
from nbgrader.api import Gradebook
from nbgrader.apps.api import NbGraderAPI

from grading import build, class_report, export, grade, gradebook, notebooks, records
from grading.pipeline import Settings
from grading.run import Limits
from grading.score import read_scorecard
from grading.workspace import ROOT
from robustkit.errors import RobustkitError
from robustkit.files import write_atomically
from tests.fixtures import small_course as small

SETTINGS = Settings(limits=Limits(cell=300, notebook=600))

pytestmark = [
    pytest.mark.slow,
    # nbgrader 0.9.6 with SQLAlchemy 2.1: rows are stored all the same.
    pytest.mark.filterwarnings("ignore:Object of type .* not in session:sqlalchemy.exc.SAWarning"),
]


def open_book(workspace):
    return Gradebook(f"sqlite:///{workspace.gradebook}", gradebook.COURSE_ID)


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A class: two that run, one that kills its kernel, four that cannot be graded. The workspace and the outcomes."""
    workspace = small.workspace_in(tmp_path_factory.mktemp("class"))
    small.author(workspace, small.LESSON, small.source_notebook())
    build.build(workspace, [small.LESSON])
    release = nbformat.read(workspace.release(small.LESSON), as_version=4)
    small.hand_in(workspace, "full-marks", small.filled(release, small.SOLUTIONS))
    small.hand_in(workspace, "one, of three", small.filled(release, {"s0_distance": small.DISTANCE}))
    small.hand_in(workspace, "dead-kernel", small.filled(release, {"s0_project": "import os; os._exit(1)"}))
    foreign = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("hello")])
    small.hand_in(workspace, "foreign", foreign)
    twice = small.filled(release, small.SOLUTIONS)
    again = small.cell(twice, "s0_distance_check")
    twice.cells.append(nbformat.v4.new_code_cell(again.source, metadata=again.metadata))
    small.hand_in(workspace, "duplicated", twice)
    write_atomically(small.hand_in(workspace, "not-json", release), b"{")
    small.hand_in(workspace, "nothing", release).unlink()
    small.hand_in(workspace, "star*", release)
    outcomes = small.graded(workspace, [small.LESSON], SETTINGS)
    return workspace, {outcome.student: outcome for outcome in outcomes}


def test_everybody_is_graded_whatever_the_others_do(graded):
    _, outcomes = graded
    points = {student: outcome.card and outcome.card.points for student, outcome in outcomes.items()}
    refused = {"foreign": 0, "duplicated": 0, "not-json": 0, "nothing": 0}
    assert points == {"full-marks": 7, "one, of three": 2, "dead-kernel": 0, **refused, "star*": None}
    assert {student for student, outcome in outcomes.items() if outcome.problem} == {*refused, "star*"}
    for outcome in outcomes.values():
        assert "\n" not in str(outcome)


def test_gradebook_holds_the_judges_points(graded):
    workspace, _ = graded
    rows = {row.student: row for row in gradebook.rows(workspace)}
    assert rows["full-marks"].points == 7
    assert rows["one, of three"].points == 2
    assert all(
        rows[name].points == 0 for name in ("dead-kernel", "foreign", "duplicated", "not-json", "nothing")
    )
    assert all(row.maximum == 7 and not row.needs_marking for row in rows.values())


def test_refused_submissions_say_so_in_every_file(graded):
    workspace, _ = graded
    folder = workspace.hop("not-json", small.LESSON)
    card = read_scorecard(folder / "scorecard.json")
    assert "is not JSON" in card.refused
    assert {mark.outcome for exercise in card.exercises for mark in exercise.marks} == {"refused"}
    assert records.read_records(folder / "records.json").refused == card.refused
    assert "is not JSON" in workspace.page("not-json", small.LESSON).read_text()


def test_autograded_copy_shows_what_ran(graded):
    workspace, _ = graded
    copy = workspace.autograded / "full-marks" / small.LESSON / f"{small.LESSON}.ipynb"
    notebook = nbformat.read(copy, as_version=4)
    assert "Distances: 2 of 2" in small.cell(notebook, "s0_distance_check").outputs[0].text


def test_nbgrader_command_gives_the_same_points(graded, tmp_path):
    """`nbgrader autograde` with the same settings, on a submission whose cells print more than they earn."""
    workspace, _ = graded
    release = nbformat.read(workspace.release(small.LESSON), as_version=4)
    boast = "import robustkit.lessons\nrobustkit.lessons.check = check = lambda *a: 2.0"
    small.hand_in(
        workspace, "boaster", small.filled(release, {"s0_distance": boast, "s0_project": small.PROJECT})
    )
    folders = [workspace.solutions, workspace.course, workspace.submitted, workspace.private]
    (tmp_path / "nbgrader_config.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom grading.gradebook import settings\nfrom grading.workspace import Workspace\n"
        f"c = get_config()\nc.merge(settings(Workspace(*map(Path, {list(map(str, folders))!r}))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", "autograde", small.LESSON, "--student", "boaster"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    row = next(row for row in gradebook.rows(workspace) if row.student == "boaster")
    assert row.points == 3


def test_csv_survives_commas_quotes_and_formulas(graded):
    workspace, _ = graded
    with open_book(workspace) as book:
        book.update_or_create_student("full-marks", first_name='=HYPERLINK("x")', last_name='O, "N"\nx')
        book.update_or_create_student("dead-kernel", first_name="-1+1", last_name="@sum")
    text = export.to_csv(gradebook.rows(workspace))
    read = {row["student"]: row for row in csv.DictReader(io.StringIO(text, newline=""))}
    assert read["full-marks"]["first_name"] == '\'=HYPERLINK("x")'
    assert read["full-marks"]["last_name"] == 'O, "N"\nx'
    assert read["dead-kernel"]["first_name"] == "'-1+1"
    assert read["dead-kernel"]["last_name"] == "'@sum"
    assert read["one, of three"]["points"] == "2"
    assert len({len(row) for row in csv.reader(io.StringIO(text, newline=""))}) == 1


def test_class_report_has_a_table_for_every_figure_and_opens_offline(graded):
    workspace, _ = graded
    cards = grade.scorecards(workspace)
    page = class_report.render(cards)
    assert page.count("<img ") == page.count('alt="Bar chart')
    assert page.count("<table>") == page.count("<caption>") == 5
    assert 'src="data:' in page
    assert "http" not in page.replace("http-equiv", "")
    assert "not-json" in page
    assert "4 refused: nothing could be run: duplicated, foreign, not-json, nothing" in page
    (lesson,) = class_report.summarise(cards)
    assert dict(lesson.bins)["90 to 100 %"] == 1
    assert sum(count for _, count in lesson.bins) == len(cards)
    assert lesson.exercises[0].earned >= 4


def test_report_without_grades_is_one_sentence(tmp_path):
    with pytest.raises(RobustkitError, match="holds no scorecard"):
        grade.scorecards(small.workspace_in(tmp_path))


# --- written answers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def essay(tmp_path_factory):
    """One submission with a written answer, graded."""
    workspace = small.workspace_in(tmp_path_factory.mktemp("essay"))
    small.author(workspace, small.WRITTEN, small.written_notebook())
    build.build(workspace, [small.WRITTEN])
    release = nbformat.read(workspace.release(small.WRITTEN), as_version=4)
    answer = {"s1_judgement": "It names no norm.", "s1_predict": small.PREDICTION}
    small.hand_in(workspace, "essayist", small.filled(release, answer), small.WRITTEN)
    small.hand_in(workspace, "silent", release, small.WRITTEN)
    small.graded(workspace, [small.WRITTEN], SETTINGS)
    return workspace


def mark(workspace, points):
    """What formgrader does when a marker types points."""
    with open_book(workspace) as book:
        score = book.find_grade("s1_judgement", small.WRITTEN, small.WRITTEN, "essayist")
        score.manual_score, score.needs_manual_grade = points, False
        book.db.commit()


def row_of(workspace, student="essayist"):
    return next(row for row in gradebook.rows(workspace) if row.student == student)


def test_mark_scheme_is_for_markers_alone(essay):
    release = essay.release(small.WRITTEN).read_text()
    assert "Two points for each gap" not in release
    assert "model answer" not in release
    autograded = essay.autograded / "essayist" / small.WRITTEN / f"{small.WRITTEN}.ipynb"
    assert "Two points for each gap" in autograded.read_text()
    assert "It names no norm." in autograded.read_text()
    assert "Two points for each gap" not in essay.page("essayist", small.WRITTEN).read_text()


def test_written_answer_waits_for_a_marker_and_keeps_the_mark(essay):
    assert (row_of(essay).points, row_of(essay).needs_marking) == (1, True)
    card = read_scorecard(essay.hop("essayist", small.WRITTEN) / "scorecard.json")
    assert [answer.id for answer in card.pending] == ["s1_judgement"]
    mark(essay, 7.5)
    assert (row_of(essay).points, row_of(essay).needs_marking) == (8.5, False)

    replayed, _ = grade.regrade(essay)
    assert (replayed.card.points, replayed.card.pending) == (8.5, ())
    assert "8.5 of 50" in essay.page("essayist", small.WRITTEN).read_text()

    again, _ = small.graded(essay, [small.WRITTEN], SETTINGS)
    assert again.card.points == 8.5
    assert row_of(essay).points == 8.5


def test_answer_left_empty_needs_no_marker(essay):
    assert (row_of(essay, "silent").points, row_of(essay, "silent").needs_marking) == (0, False)
    card = read_scorecard(essay.hop("silent", small.WRITTEN) / "scorecard.json")
    assert (card.pending, card.points) == ((), 0)


def test_untouched_written_answer_is_accepted_by_nbgraders_own_check(essay):
    """`validate --invert` takes a graded cell worth nothing for one that passes."""
    command = [sys.executable, "-m", "nbgrader", "validate", "--invert", str(essay.release(small.WRITTEN))]
    done = subprocess.run(command, cwd=essay.course, capture_output=True, text=True, check=False)
    assert "Success" in done.stdout


def test_formgraders_feedback_is_the_learners_page(essay):
    page = essay.page("essayist", small.WRITTEN)
    page.unlink()
    config = gradebook.settings(essay)
    result = NbGraderAPI(config=config).generate_feedback(small.WRITTEN, "essayist")
    assert result["success"], result
    text = page.read_text()
    assert "Points by exercise and criterion" in text
    assert "8.5 of 50" in text
    assert "Two points for each gap" not in text
    assert "<script" not in text


def test_cells_cannot_be_added_once_submissions_are_in(essay):
    source = essay.source(small.WRITTEN)
    before, released = source.read_bytes(), essay.release(small.WRITTEN).read_bytes()
    notebook = nbformat.read(source, as_version=4)
    extra = nbformat.from_dict(small.cell(notebook, "s1_setup"))
    extra.metadata["nbgrader"]["grade_id"], extra["id"] = "s1_more", "more"
    notebook.cells.append(extra)
    nbformat.write(notebook, source)
    with pytest.raises(RobustkitError, match="Cannot add or remove cells"):
        build.build(essay, [small.WRITTEN])
    assert essay.release(small.WRITTEN).read_bytes() == released
    source.write_bytes(before)


def test_release_is_needed_before_grading(tmp_path):
    workspace = small.workspace_in(tmp_path)
    small.hand_in(workspace, "early", small.source_notebook())
    with pytest.raises(RobustkitError, match="make the course first"):
        small.graded(workspace, grade.lessons_in(workspace, None), SETTINGS)
    with pytest.raises(RobustkitError, match="no submission to 01-mnist-fgsm"):
        grade.lessons_in(workspace, small.WRITTEN)
    assert notebooks.solution_id("s0_project_check") == "s0_project"
