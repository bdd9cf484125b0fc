"""Building the course: deterministic, never half-done, and every way of being wrong is told."""

import shutil
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

from grading import build, leaks
from grading.records import Mark, Note
from grading.workspace import Workspace
from robustkit.errors import RobustkitError
from robustkit.lessons import LESSONS
from tests.fixtures import small_course as small

LESSON = small.LESSON


def honest_wheel(folder):
    """A wheel such as learners install, without the second that building the real one takes."""
    return make_wheel(folder, {"robustkit/__init__.py": "", "robustkit-0.dist-info/METADATA": ""})


def make_wheel(folder, files):
    path = folder / "robustkit-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture(scope="module")
def executed():
    """The small lesson's source as it should lie in solutions/: with the outputs of its execution."""
    notebook = small.source_notebook()
    client = NotebookClient(notebook, record_timing=False)
    client.create_kernel_manager()
    client.km.transport = "ipc"
    client.execute()
    return notebook


@pytest.fixture(scope="module")
def built(tmp_path_factory, executed):
    workspace = small.workspace_in(tmp_path_factory.mktemp("built"))
    small.author(workspace, LESSON, executed)
    build.build(workspace, [LESSON])
    return workspace


@pytest.fixture
def workspace(tmp_path, built):
    """A copy of a built course, to spoil."""
    shutil.copytree(built.private.parent, tmp_path, dirs_exist_ok=True)
    return small.workspace_in(tmp_path)


def problems(workspace, tmp_path, wheel=honest_wheel):
    aside = replace(workspace, course=tmp_path / "aside" / "course", private=tmp_path / "aside" / "private")
    return build.check_files(workspace, [LESSON], aside, wheel)[0]


def edit(workspace, change):
    """Change the source notebook."""
    path = workspace.source(LESSON)
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


# --- build -------------------------------------------------------------------------------------------


def test_release_has_the_stubs_and_none_of_the_answers(workspace):
    release = nbformat.read(workspace.release(LESSON), as_version=4)
    assert "raise NotImplementedError" in small.cell(release, "s0_distance").source
    text = workspace.release(LESSON).read_text()
    assert "SOLUTION" not in text
    assert small.CANARY not in text
    assert "3.0.0" not in text
    assert not any(c.get("outputs") for c in release.cells)


def test_building_again_gives_identical_bytes_and_touches_nothing(workspace):
    path = workspace.release(LESSON)
    before = path.read_bytes(), path.stat().st_mtime_ns
    build.build(workspace, [LESSON])
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_another_place_gives_identical_bytes(workspace, tmp_path, executed):
    other = small.workspace_in(tmp_path / "elsewhere")
    small.author(other, LESSON, executed)
    build.build(other, [LESSON])
    assert other.release(LESSON).read_bytes() == workspace.release(LESSON).read_bytes()


def test_failing_build_leaves_the_release_and_says_why(workspace):
    before = workspace.release(LESSON).read_bytes()

    def break_(notebook):
        small.cell(notebook, "s0_project").source = "### BEGIN SOLUTION\nx = 1"

    edit(workspace, break_)
    with pytest.raises(RobustkitError, match="cannot generate 00-start-here"):
        build.build(workspace, [LESSON])
    assert workspace.release(LESSON).read_bytes() == before
    assert not list(workspace.private.glob(".build-*"))


def test_files_that_left_the_source_leave_the_release(workspace):
    extra = workspace.release(LESSON).with_name("old.txt")
    extra.write_text("left over")
    build.build(workspace, [LESSON])
    assert not extra.exists()


def test_lesson_without_a_source_is_one_sentence(workspace):
    with pytest.raises(RobustkitError, match="does not exist; choose a lesson"):
        build.build(workspace, [small.WRITTEN])


# --- check, the half that runs nothing -----------------------------------------------------------------


def test_course_as_built_is_fine(workspace, tmp_path):
    assert problems(workspace, tmp_path) == []


def test_hand_edited_release_is_told(workspace, tmp_path):
    path = workspace.release(LESSON)
    path.write_text(path.read_text().replace("A small lesson", "A smaller lesson"))
    (found,) = problems(workspace, tmp_path)
    assert "edited by hand" in found
    assert "A smaller lesson" in found


def test_missing_and_foreign_files_are_told(workspace, tmp_path):
    workspace.release(LESSON).unlink()
    (workspace.course / LESSON / "notes.txt").write_text("mine")
    (workspace.course / "99-gone").mkdir()
    found = "\n".join(problems(workspace, tmp_path))
    assert "00-start-here.ipynb is missing" in found
    assert "notes.txt is not generated" in found
    assert "course/99-gone has no source" in found


def test_leaks_into_the_course_are_told(workspace, tmp_path):
    notes = workspace.course / LESSON / "notes.md"
    notes.write_text(
        f"{small.CANARY}\n    nearest = torch.minimum(torch.maximum(candidate, x  - eps), x + eps)\n"
    )
    found = "\n".join(problems(workspace, tmp_path))
    assert f"carries the canary {small.CANARY}" in found
    assert "shows 1 lines of a solution, the first is: nearest =" in found


def test_solution_shown_in_the_text_of_the_lesson_is_told(workspace, tmp_path):
    """The author's own slip: the release is up to date, and gives the answer away."""

    def give_away(notebook):
        notebook.cells[0].source += "\n\nHint:\n\n    survives_all = correct & ~fooled.any(dim=0)"

    edit(workspace, give_away)
    build.build(workspace, [LESSON])
    (found,) = problems(workspace, tmp_path)
    assert "shows 1 lines of a solution" in found


def test_answers_in_the_wheel_are_told(workspace, tmp_path):
    def leaky(folder):
        return make_wheel(
            folder,
            {
                "robustkit/answers.py": small.PROJECT,
                "robustkit/notes.py": f"# {small.CANARY}",
                "grading/judge.py": "",
            },
        )

    found = "\n".join(problems(workspace, tmp_path, leaky))
    assert "robustkit/answers.py in the wheel holds a whole solution" in found
    assert f"robustkit/notes.py in the wheel carries the canary {small.CANARY}" in found
    assert "the wheel holds grading/judge.py" in found


def test_wheel_that_cannot_be_built_is_told(workspace, tmp_path):
    def broken(folder):
        raise RuntimeError("no setuptools")

    assert problems(workspace, tmp_path, broken) == ["the wheel cannot be built (no setuptools)."]


def test_stripped_outputs_and_saved_errors_are_told(workspace, tmp_path):
    def strip(notebook):
        for c in notebook.cells[3:]:
            if c.cell_type == "code":
                c.outputs, c.execution_count = [], None
        error = nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
        notebook.cells[1].outputs = [error]

    edit(workspace, strip)
    found = "\n".join(problems(workspace, tmp_path))
    assert "saved without its outputs (5 cells never ran, 3 checks print nothing)" in found
    assert "saved with an error in cell" in found


def test_missing_canary_is_told(workspace, tmp_path):
    edit(workspace, lambda notebook: notebook.metadata.pop("robustkit_canary"))
    (found,) = problems(workspace, tmp_path)
    assert "has no canary" in found


def _rename(notebook):
    small.cell(notebook, "s0_project").metadata["nbgrader"]["grade_id"] = "s0_projection"


def _more_points(notebook):
    small.cell(notebook, "s0_project_check").metadata["nbgrader"]["points"] = 30


def _unlock(notebook):
    small.cell(notebook, "s0_project_check").metadata["nbgrader"].update(locked=False)


def _swap(notebook):
    notebook.cells[2:4], notebook.cells[4:6] = notebook.cells[4:6], notebook.cells[2:4]


def _secret_exercise(notebook):
    extra = nbformat.from_dict(small.cell(notebook, "s0_project_check"))
    extra = nbformat.v4.new_code_cell("1.0", metadata=nbformat.from_dict(extra.metadata), execution_count=1)
    extra.metadata["nbgrader"]["grade_id"] = "s0_extra"
    notebook.cells.append(extra)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_rename, "has no cell s0_project,"),
        (_more_points, "s0_project_check is worth 30 points, the table says 3"),
        (_unlock, "s0_project_check must have locked: true"),
        (_swap, "not in the order of the lesson's table"),
        (_secret_exercise, "s0_extra is worth points, but the lesson's table does not name it"),
    ],
)
def test_source_and_table_must_agree(workspace, tmp_path, change, told):
    edit(workspace, change)
    assert any(told in line for line in problems(workspace, tmp_path))


def test_unreadable_source_is_told(workspace, tmp_path):
    workspace.source(LESSON).write_text("{")
    assert "is not JSON" in "\n".join(problems(workspace, tmp_path))


# --- check, the half that runs the notebooks -----------------------------------------------------------


@pytest.mark.slow
def test_whole_check_of_a_sound_course_is_silent(workspace, capsys):
    assert build.check(workspace, [LESSON], honest_wheel) == []


@pytest.mark.slow
def test_solution_that_loses_points_and_release_that_earns_them_are_told(workspace):
    """One exercise is solved wrongly, one outside the markers."""

    def spoil(notebook):
        wrong = small.cell(notebook, "s0_distance")
        wrong.source = wrong.source.replace("(z - x)", "(z + x)")
        shown = small.cell(notebook, "s0_robust_accuracy")
        body = "\n".join(line for line in shown.source.splitlines() if "###" not in line)
        shown.source = f"{body}\n### BEGIN SOLUTION\n### END SOLUTION"

    edit(workspace, spoil)
    build.build(workspace, [LESSON])
    found = build.check(workspace, [LESSON], honest_wheel)
    assert len(found) == 4
    assert found[0].startswith(
        "solutions/00-start-here loses 1 points on s0_distance_check Linf (WRONG_DISTANCE"
    )
    assert found[1].startswith("solutions/00-start-here loses 1 points on s0_distance_check L2")
    assert (
        found[2] == "course/00-start-here earns 2 points on s0_robust_accuracy_check without a line written."
    )
    assert found[3].startswith("nbgrader validate --invert does not accept course/00-start-here")


@pytest.mark.slow
def test_real_wheel_holds_robustkit_alone(tmp_path):
    wheel = leaks.build_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "robustkit/lessons.py" in names
    assert leaks.in_wheel(wheel, []) == []


def test_every_lesson_of_the_table_that_has_a_source_is_checked(workspace):
    assert build.standing(workspace) == [LESSON]
    assert set(build.standing(workspace)) <= set(LESSONS)


@pytest.mark.parametrize(("code", "lost"), [("NO_IMAGES", 0), ("SHIPPED_WEIGHTS", 1), ("NOT_COUNTED", 1)])
def test_only_a_machine_that_lacks_the_images_is_no_fault_of_a_solution(
    monkeypatch, tmp_path, capsys, code, lost
):
    mark = Mark("s3_weights_check", "clean", 0.0, 2.0, "failed", (Note(code, "why"),), "")
    monkeypatch.setattr(build, "_assess", lambda *_: SimpleNamespace(marks=(mark,)))
    problems = build._check_reference(Workspace(*[tmp_path] * 4), LESSONS["03-cifar-pgd"], None)
    assert len(problems) == lost
    assert ("could not be checked here: why" in capsys.readouterr().err) == (not lost)
