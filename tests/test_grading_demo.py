"""The demo: its examples fit the lesson, its folder is its own, and the whole path gives the expected order."""

import pytest

from grading import demo, notebooks
from grading.workspace import repository
from robustkit.errors import RobustkitError
from robustkit.lessons import LESSONS

EXAMPLES = ("partly-right", "wrong-but-plausible")


@pytest.fixture(scope="module")
def source():
    return notebooks.read_release(repository().source(demo.LESSON))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_fill_cells_that_the_lesson_has(source, name):
    cells = demo.read_example(name)
    filled = {notebooks.grade_id(c): c.source for c in demo.fill(source, cells).cells}
    assert len(cells) >= 8
    assert all(filled[cell] == text for cell, text in cells.items())


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_code_that_compiles_and_are_marked_as_the_instructors(name):
    for cell, text in demo.read_example(name).items():
        if cell != "s1_judgement":
            compile(text, cell, "exec")
    path = demo.EXAMPLES / demo.LESSON / f"{name}.md"
    assert "rk-canary-" in path.read_text()


def test_example_for_a_cell_that_is_gone_is_told(source):
    with pytest.raises(RobustkitError, match="no solution cell s1_gone"):
        demo.fill(source, {"s1_gone": "1"})


def test_demo_leaves_other_folders_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RobustkitError, match="something else than a demo"):
        demo.demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.slow
def test_four_submissions_from_build_to_class_report(tmp_path):
    lines = {line.submission: line for line in demo.demo(tmp_path / "demo")}
    full = LESSONS[demo.LESSON].autograded
    points = {name: line.points for name, line in lines.items()}
    assert points[demo.REFERENCE] == points["full-marks"] == full
    assert points["untouched"] == 0
    assert 0.15 * full < points["wrong-but-plausible"] < points["partly-right"] < 0.8 * full
    assert "MASKED_GRADIENTS" in lines["partly-right"].missed
    assert {"BOX_VIOLATED", "EVAL_MODE_MISSING", "NO_RANDOM_START"} <= set(
        lines["wrong-but-plausible"].missed.split(", ")
    )
    assert lines["full-marks"].missed == "nothing"
    assert lines["full-marks"].to_mark == 10
    out = tmp_path / "demo"
    assert (out / "class.html").stat().st_size > 10_000
    assert (out / "grades.csv").read_bytes().count(b"\r\n") == 5
    assert len(list((out / "feedback").glob("*/*/*.html"))) == 4
    assert "wrong-but-plausible" in "\n".join(demo.table(list(lines.values()), out))
