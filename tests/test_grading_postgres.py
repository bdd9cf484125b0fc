"""The gradebook by URL: the whole path on a real PostgreSQL gives what it gives on SQLite."""

import csv
import io
import json
from dataclasses import replace

import nbformat
import pytest
from sqlalchemy import create_engine, text

from grading import build, export, grade, gradebook
from grading.pipeline import Settings
from grading.run import Limits
from grading.workspace import repository
from robustkit.errors import RobustkitError
from tests import postgres
from tests.fixtures import small_course as small

SECRET = b"a secret of the tests' own, of 32"
SETTINGS = Settings(limits=Limits(cell=60, notebook=120))
GONE = "postgresql+psycopg2://grader:hunter2@/postgres?host=/nonexistent"

needs_postgres = pytest.mark.skipif(postgres.PROGRAMS is None, reason=postgres.MISSING)
pytestmark = [
    # nbgrader 0.9.6 with SQLAlchemy 2.1: rows are stored all the same.
    pytest.mark.filterwarnings("ignore:Object of type .* not in session:sqlalchemy.exc.SAWarning"),
]


def whole_path(folder, database=""):
    """Build, grade, mark, replay: scorecards, feedback pages, CSV."""
    workspace = replace(small.workspace_in(folder), database=database)
    small.author(workspace, small.WRITTEN, small.written_notebook())
    workspace.private.mkdir()
    workspace.secret.write_bytes(SECRET)
    build.build(workspace, [small.WRITTEN])
    release = nbformat.read(workspace.release(small.WRITTEN), as_version=4)
    answer = {"s1_judgement": 'It names no norm; O\'Neil said "no".', "s1_predict": small.PREDICTION}
    small.hand_in(workspace, "O, Neil's", small.filled(release, answer), small.WRITTEN)
    small.hand_in(workspace, "twice", release, small.WRITTEN)
    foreign = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("hello")])
    small.hand_in(workspace, "foreign", foreign, small.WRITTEN)
    small.graded(workspace, [small.WRITTEN], SETTINGS)
    with gradebook.opened(workspace) as book:  # as formgrader does when a marker types points
        score = book.find_grade("s1_judgement", small.WRITTEN, small.WRITTEN, "O, Neil's")
        score.manual_score, score.needs_manual_grade = 7.5, False
        book.db.commit()
    outcomes = grade.regrade(workspace)
    assert not [outcome.problem for outcome in outcomes if outcome.card is None]
    names = [outcome.student for outcome in outcomes]
    cards = [(workspace.hop(name, small.WRITTEN) / "scorecard.json").read_text() for name in names]
    pages = [workspace.page(name, small.WRITTEN).read_text() for name in names]
    return workspace, cards, pages, export.to_csv(gradebook.rows(workspace))


@needs_postgres
@pytest.mark.slow
def test_postgresql_gives_the_same_scorecards_feedback_and_csv_as_sqlite(tmp_path):
    with postgres.server() as url:
        theirs, *on_postgres = whole_path(tmp_path / "postgres", url)
        with create_engine(url).connect() as connection:  # the marks are there, and nowhere else
            assert connection.execute(
                text("SELECT manual_score FROM grade WHERE manual_score > 0")
            ).all() == [(7.5,)]
    assert not theirs.gradebook.exists()
    ours, *on_sqlite = whole_path(tmp_path / "sqlite")
    assert ours.gradebook.exists()
    assert on_postgres == on_sqlite

    cards, pages, table = on_postgres
    assert [json.loads(card)["summary"]["points"] for card in cards] == [8.5, 0, 0]
    assert "8.5 of 50" in pages[0]
    rows = {row["student"]: row for row in csv.DictReader(io.StringIO(table, newline=""))}
    assert (rows["O, Neil's"]["points"], rows["O, Neil's"]["needs_marking"]) == ("8.5", "no")


@needs_postgres
@pytest.mark.slow
def test_a_database_with_tables_of_something_else_is_left_alone(tmp_path):
    with postgres.server() as url:
        with create_engine(url).begin() as connection:
            connection.execute(text("CREATE TABLE invoices (id integer)"))
        workspace = replace(small.workspace_in(tmp_path), database=url)
        with pytest.raises(RobustkitError, match="tables of another nbgrader"):
            gradebook.rows(workspace)
        with create_engine(url).connect() as connection:
            names = connection.execute(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"))
            assert names.scalars().all() == ["invoices"]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (GONE, "the gradebook cannot be opened .*start its database"),
        ("postgres://host/name", "correct ROBUSTKIT_GRADEBOOK"),
        ("gradebook.db", "such as postgresql://"),
    ],
)
def test_a_gradebook_that_cannot_be_reached_is_one_sentence_without_its_password(url, told, tmp_path):
    workspace = replace(small.workspace_in(tmp_path), database=url)
    small.author(workspace, small.WRITTEN, small.written_notebook())
    for attempt in (lambda: gradebook.rows(workspace), lambda: gradebook.register(workspace, small.WRITTEN)):
        with pytest.raises(RobustkitError, match=told) as raised:
            attempt()
        assert "\n" not in str(raised.value)
        assert "hunter2" not in str(raised.value)
    assert "hunter2" not in repr(workspace)


def test_the_environment_names_the_gradebook_of_this_clone(monkeypatch):
    monkeypatch.delenv("ROBUSTKIT_GRADEBOOK", raising=False)
    assert repository().gradebook_url.startswith("sqlite:////")
    monkeypatch.setenv("ROBUSTKIT_GRADEBOOK", GONE)
    assert repository().gradebook_url == GONE
    assert gradebook.settings(repository()).CourseDirectory.db_url == GONE
