"""A class graded side by side: kill -9 at any point, processes and workers that die, left-overs, the table."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import nbformat
import pytest

from grading import build, crew, fresh, grade, pipeline, sandbox
from grading.__main__ import main
from grading.progress import Table
from grading.sandbox import cgroups, leftovers
from grading.workspace import ROOT
from robustkit import cluster
from robustkit.errors import RobustkitError
from tests import test_cluster
from tests.fixtures import small_course as small
from tests.killed_grader import SETTINGS, contents

SECONDS = 600  # the longest that anything here may take, on a busy machine
CLASS = ("ada", "bob", "cyd")
dask = test_cluster.dask  # a scheduler and two workers

nbgraders_rows = pytest.mark.filterwarnings(
    "ignore:Object of type .* not in session:sqlalchemy.exc.SAWarning"
)


def wait_for(done, what: str) -> None:
    until = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < until, f"{what}: not in time"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The small course, released."""
    workspace = small.workspace_in(tmp_path_factory.mktemp("released"))
    small.author(workspace, small.LESSON, small.source_notebook())
    build.build(workspace, [small.LESSON])
    return workspace


class Watched:
    """A class whose notebooks, in plain kernels, say when they begin and end, and wait in between for their gate."""

    def __init__(self, released, folder: Path, students=CLASS, between: str = "") -> None:
        shutil.copytree(released.course, folder / "course")
        shutil.copytree(released.solutions, folder / "solutions")
        self.folder, self.workspace = folder, small.workspace_in(folder)
        self.workspace.private.mkdir()
        self.workspace.secret.write_bytes(b"the same cases for every class of these tests")
        release = nbformat.read(self.workspace.release(small.LESSON), as_version=4)
        for student in students:
            waits = f"""
import os, pathlib, signal, time
def note(what):
    with open({str(folder)!r} + "/log", "a") as file:
        file.write(f"{student} {{what}} {{os.getpid()}}\\n")
note("begun")
{between}
while not os.path.exists({str(folder / student)!r}):
    time.sleep(0.01)
note("ended")
"""
            wrong = {} if student == "bob" else {"s0_project": small.PROJECT}
            cells = {"s0_distance": small.DISTANCE + waits, **wrong}
            small.hand_in(self.workspace, student, small.filled(release, cells))

    def events(self, what: str) -> Counter[str]:
        """How often each student's notebook has begun or ended."""
        log = self.folder / "log"
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return Counter(student for student, happened, _ in lines if happened == what)

    def kernels_end(self) -> None:
        """A plain kernel notices within a second that its grader is gone; a confined one is killed."""
        log = (self.folder / "log").read_text().split()
        wait_for(lambda: not any(running(pid) for pid in log[2::3]), "the kernels end")

    def open(self, *students: str) -> None:
        for student in students:
            (self.folder / student).touch()

    def stage(self, student: str) -> str:
        path = self.workspace.hop(student, small.LESSON) / "graded.json"
        return json.loads(path.read_text())["stage"] if path.exists() else ""

    def grader(self, jobs: int = 1) -> subprocess.Popen[bytes]:
        """A grader in a process of its own, which tells what it has done in the file `said`."""
        with (self.folder / "said").open("wb") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.killed_grader", "grade", str(self.folder), str(jobs)],
                cwd=ROOT,
                stderr=said,
            )

    def said(self) -> str:
        return (self.folder / "said").read_text()


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(grader: subprocess.Popen[bytes]) -> None:
    assert grader.poll() is None, "it ended before it was killed"
    grader.kill()
    grader.wait()


@pytest.fixture(scope="module")
def undisturbed(released, tmp_path_factory):
    """The class graded two at a time by a grader that nobody disturbs."""
    watched = Watched(released, tmp_path_factory.mktemp("undisturbed"))
    watched.open(*CLASS)
    assert watched.grader(jobs=2).wait(SECONDS) == 0, watched.said()
    return watched


# --- kill -9 ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_class_whose_grader_is_killed_twice_is_graded_once(released, undisturbed, tmp_path):
    """While a notebook runs, and when it is judged and not entered."""
    watched = Watched(released, tmp_path)

    grader = watched.grader()
    wait_for(lambda: watched.events("begun")["ada"] == 1, "ada's notebook begins")
    kill(grader)
    assert watched.stage("ada") == ""

    grader = watched.grader()
    wait_for(lambda: watched.events("begun")["ada"] == 2, "it begins again")
    watched.open("ada")
    wait_for(lambda: watched.stage("ada"), "ada is judged")
    kill(grader)
    watched.kernels_end()
    assert watched.stage("ada") == pipeline.JUDGED

    watched.open("bob", "cyd")
    assert watched.grader().wait(SECONDS) == 0, watched.said()
    assert watched.events("begun")["ada"] == 2
    assert watched.events("ended") == Counter(CLASS)
    assert contents(watched.workspace) == contents(undisturbed.workspace)
    assert [row[2] for row in contents(watched.workspace)["gradebook"]].count(2) == 3  # the distances
    assert "rk-" not in " ".join(path.name for path in watched.workspace.private.iterdir())


def killed_at_points(grader: str, undisturbed: Watched, number: int):
    command = [sys.executable, "-m", "tests.killed_grader", grader, str(undisturbed.folder), str(number)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_wherever_a_grader_is_killed_the_next_one_grades_the_rest_and_nothing_twice(undisturbed):
    whole, *killed = killed_at_points("points", undisturbed, 8)
    assert whole["same"]
    assert whole["writes"] > 100
    assert len(killed) == 8
    for point in killed:
        assert point == {"at": point["at"], "died": True, "same": True, "twice": [], "lost": [], "left": []}


@pytest.mark.slow
def test_a_grader_that_does_not_note_what_is_done_is_noticed(undisturbed):
    whole, *killed = killed_at_points("forgetful", undisturbed, 3)
    assert whole["same"]
    assert any(point["twice"] for point in killed)


@pytest.mark.slow
@nbgraders_rows
def test_what_changed_is_graded_again_and_nothing_else(undisturbed, tmp_path):
    shutil.copytree(undisturbed.folder, tmp_path / "class")
    workspace = small.workspace_in(tmp_path / "class")
    asked = []

    def submit(task, told):
        asked.append(task.student)
        future = crew.Future()
        future.set_exception(RobustkitError("it was asked for."))
        return future

    def graded(settings=SETTINGS):
        asked.clear()
        return grade.grade(workspace, [small.LESSON], settings, crew.Crew(2, submit))

    points = {outcome.student: outcome.card.points for outcome in graded()}
    assert (points, asked) == ({"ada": 5, "bob": 2, "cyd": 5}, [])

    notebook = workspace.submission("bob", small.LESSON)
    notebook.write_bytes(notebook.read_bytes() + b"\n")
    ada, bob, _ = graded()
    assert asked == ["bob"]
    assert str(bob) == f"bob, {small.LESSON}: not graded; it was asked for. Grade it again."
    assert ada.card.points == 5

    graded(pipeline.Settings(limits=pipeline.Limits(cell=61), sandbox="none"))
    assert asked == list(CLASS)
    workspace.gradebook.unlink()  # what was judged is entered anew
    graded()
    assert asked == ["bob"]
    assert {row[0] for row in contents(workspace)["gradebook"]} == {"ada", "cyd"}
    grade.forget(workspace, [small.LESSON])
    graded()
    assert asked == list(CLASS)

    with (workspace.records / ".lock").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RobustkitError, match="another grader is at work"):
            graded()


# --- processes that die -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with fresh.Server() as one:
        yield one


def task_of(watched: Watched, student: str) -> pipeline.Task:
    submission = watched.workspace.submission(student, small.LESSON).read_bytes()
    release = watched.workspace.release(small.LESSON).read_bytes()
    secret = watched.workspace.secret.read_bytes()
    return pipeline.Task(student, small.LESSON, SETTINGS, submission, release, secret)


@pytest.mark.slow
def test_a_submission_whose_process_is_killed_is_run_again(released, server, tmp_path):
    """It kills the process that runs it, the first time: all that it can reach in a plain kernel."""
    once = "if not os.path.exists('{0}'): open('{0}', 'w').close(); os.kill(os.getppid(), signal.SIGKILL)"
    watched = Watched(released, tmp_path, ["ada"], once.format(tmp_path / "once"))
    watched.open("ada")
    heard: list[str] = []
    files = pipeline.carry_out(task_of(watched, "ada"), server, heard.append)
    assert watched.events("begun") == {"ada": 2}
    assert heard.count("starting") == 2
    assert heard[-1] == "judging"
    assert "s0_project_check collected" in heard
    assert sorted(files)[-1] == "records.json"
    assert not list(Path(tempfile.gettempdir()).glob(f"rk-{os.getpid()}-*"))


@pytest.mark.slow
@nbgraders_rows
def test_a_submission_whose_process_is_always_killed_is_reported_and_the_others_are_graded(
    released, server, tmp_path
):
    watched = Watched(released, tmp_path, ["ada"], "os.kill(os.getppid(), signal.SIGKILL)")
    release = nbformat.read(watched.workspace.release(small.LESSON), as_version=4)
    small.hand_in(watched.workspace, "bob", small.filled(release, small.SOLUTIONS))
    with crew.here(server, 2) as here:
        ada, bob = grade.grade(watched.workspace, [small.LESSON], SETTINGS, here)
    assert watched.events("begun") == {"ada": pipeline.ATTEMPTS}
    assert "the process of the hop run was killed" in ada.problem
    assert ada.problem.endswith("It was tried 3 times. Grade it again.")
    assert ada.card is None
    assert bob.card.points == 7
    assert watched.stage("ada") == ""


def test_a_hop_says_how_far_it_is_and_why_it_failed(server, tmp_path):
    with pytest.raises(RobustkitError, match=r"nothing.*run\.json cannot be read"):
        server.hop("judge", tmp_path / "nothing", "-o", tmp_path / "records.json")
    with pytest.raises(RobustkitError, match="invalid choice: 'nonsense'"):
        server.hop("nonsense")


def test_a_killed_server_is_started_again_and_a_closed_one_is_not(tmp_path):
    def ask() -> None:
        server.hop("judge", tmp_path, "-o", tmp_path / "records.json")

    with fresh.Server() as server:
        with pytest.raises(RobustkitError, match=r"run\.json cannot be read"):
            ask()
        os.kill(server._process.pid, signal.SIGKILL)
        server._process.wait()
        with pytest.raises(RobustkitError, match=r"run\.json cannot be read"):
            ask()
        pid = server._process.pid
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(RobustkitError, match="grading was stopped"):
        ask()


def test_a_kernel_imports_nothing_large_that_no_exercise_needs():
    """Each submission's kernel pays for it: scipy.stats alone takes as long as half of torch."""
    large = ("scipy.stats", "sklearn", "matplotlib", "torchvision", "distributed", "nbgrader")
    ask = f"import robustkit.lessons, sys; print(*[name for name in {large} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# --- left-overs ---------------------------------------------------------------------------------------------


HOLDS = """
import sys, time
from grading.sandbox import cgroups, leftovers
groups = cgroups.make(2**30, 64)
with leftovers.run_folder() as folder:
    (folder / "work").mkdir()
    (folder / "work" / "file").touch()
    print(folder, *groups, flush=True)
    time.sleep(120)
"""


def test_the_sweep_takes_what_a_dead_grader_left_and_nothing_of_a_living_one():
    graders = [
        subprocess.Popen([sys.executable, "-c", HOLDS], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)
    ]
    try:
        dead, living = ([Path(p.decode()) for p in grader.stdout.readline().split()] for grader in graders)
        assert sandbox.sweep() == 0 or all(path.exists() for path in dead + living)
        graders[0].kill()
        graders[0].wait()
        assert all(path.exists() for path in dead)
        assert sandbox.sweep() >= len(dead)
        assert not any(path.exists() for path in dead)
        assert all(path.exists() for path in living)
        assert (living[0] / "work" / "file").exists()
        if cgroups.places():
            assert len(living) == 1 + len(cgroups.places())
    finally:
        for grader in graders:
            grader.kill()
            grader.wait()
            grader.stdout.close()
    sandbox.sweep()
    assert not any(path.exists() for path in living)


def test_a_name_is_abandoned_when_its_process_is_gone_and_only_then(tmp_path):
    pid, namespace, started, end = leftovers.owned_name().split("-")
    assert not leftovers.abandoned(f"{pid}-{namespace}-{started}-{end}")
    before = int(started) - 1
    assert leftovers.abandoned(f"{pid}-{namespace}-{before}-{end}")  # the number was given again
    assert not leftovers.abandoned(f"{pid}-{int(namespace) + 1}-{before}-{end}")  # another container's
    for odd in ("", "lock", pid, f"{pid}-{namespace}", f"{pid}-{namespace}-", f"x-{namespace}-{started}"):
        assert not leftovers.abandoned(odd)
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    old = tmp_path / f"rk-{gone.pid}-{namespace}-1-{end}"
    old.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (old / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / f"rk-{gone.pid}-{namespace}-1-link").symlink_to(tmp_path / "elsewhere")
    leftovers.sweep_folders(tmp_path)
    assert not old.exists()
    assert (tmp_path / "elsewhere" / "kept").exists()


# --- Dask ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@nbgraders_rows
def test_workers_grade_to_what_one_machine_does_although_one_is_killed(dask, released, undisturbed, tmp_path):
    watched = Watched(released, tmp_path)
    found: list[grade.Graded] = []
    with ExitStack() as stack:
        client = stack.enter_context(cluster.connected(dask.address, **dask.files))
        with pytest.raises(RobustkitError, match="the cluster cannot grade: the sandbox 'docker' is unknown"):
            stack.enter_context(crew.of_dask(client, "docker"))
        workers = stack.enter_context(crew.of_dask(client, "none"))
        assert workers.size == 2

        def work() -> None:
            found.extend(grade.grade(watched.workspace, [small.LESSON], SETTINGS, workers))

        grading = threading.Thread(target=work)
        grading.start()
        wait_for(lambda: len(watched.events("begun")) == 2, "both workers begin")
        first = set(watched.events("begun"))
        dask.processes[1].kill()
        dask.processes[1].wait()
        kernels = (tmp_path / "log").read_text().split()[2::3]
        wait_for(lambda: not all(map(running, kernels)), "the dead worker's kernel ends")
        watched.open(*CLASS)
        grading.join(SECONDS)
    assert [outcome.problem for outcome in found] == [""] * 3
    begun = watched.events("begun")
    assert sorted(begun.values()) == [1, 1, 2]  # the victim's, by the survivor
    assert {student for student in begun if begun[student] == 2} < first
    assert watched.events("ended") == Counter(CLASS)
    assert contents(watched.workspace) == contents(undisturbed.workspace)


def test_a_crew_is_of_this_machine_or_of_a_cluster(capsys, tmp_path, monkeypatch):
    def said(*arguments: object) -> str:
        assert main(["class", "grade", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    submission = tmp_path / "s-17" / small.LESSON / f"{small.LESSON}.ipynb"
    submission.parent.mkdir(parents=True)
    submission.touch()
    here = ("--submitted", tmp_path)
    assert "say --jobs 1 or more" in said(*here, "--jobs", 0)
    assert "leave out one of the two" in said(*here, "--jobs", 2, "--dask", "tls://127.0.0.1:1")
    assert "is not a tls:// address" in said(*here, "--dask", "tcp://127.0.0.1:1")
    assert "the sandbox 'docker' is unknown" in said(*here, "--sandbox", "docker")


# --- the table ----------------------------------------------------------------------------------------------


def screen(written: str) -> list[str]:
    """What a terminal shows after these characters: lines, cursor up and clear are all that is used."""
    lines: list[str] = [""]
    for part in re.split(r"(\x1b\[\d+F\x1b\[J|\r?\n)", written):
        if up := re.fullmatch(r"\x1b\[(\d+)F\x1b\[J", part):
            assert int(up[1]) < len(lines), "above the top"
            del lines[len(lines) - 1 - int(up[1]) :]
            lines.append("")
        elif part.endswith("\n"):
            lines.append("")
        else:
            lines[-1] += part
    return lines[:-1]


def everything(shown: BinaryIO) -> str:
    """What was written to the terminal so far: it may come in several pieces."""
    pieces = []
    while select.select([shown], [], [], 0.2)[0]:
        pieces.append(shown.read(100_000))
    return b"".join(pieces).decode()


def test_the_table_is_redrawn_in_place_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, os.fdopen(ours, "rb", buffering=0) as shown:
        with Table(3, terminal) as table:
            table.told("ada", small.LESSON, "starting")
            table.told("bob", small.LESSON, "s0_distance_check collected")
            table.draw()
            table.draw()
            before = everything(shown)
            table.finished("ada", small.LESSON, "ada: 4 of 7 points")
        after = everything(shown)
    lines = screen(before)
    assert re.fullmatch(r"student +lesson +exercise +elapsed", lines[0])
    assert re.fullmatch(rf"ada +{small.LESSON} +starting +0:0\d", lines[1])
    assert re.fullmatch(rf"bob +{small.LESSON} +s0_distance_check collected +0:0\d", lines[2])
    assert re.fullmatch(r"0 of 3 graded, 0:0\d", lines[3])
    assert len(lines) == 4
    assert re.match(r"1 of 3: ada: 4 of 7 points \(0:0\d\)", screen(before + after)[0])
    assert re.match(r"1 of 3 graded, 0:0\d, about 0:\d\d to go", screen(before + after)[-1])
    assert len(screen(before + after)) == 2


def test_more_rows_than_the_terminal_has_lines_are_counted(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "10")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    table = Table(40, Terminal())
    for i in range(40):
        table.told(f"student-{i}", small.LESSON, "starting")
    table.draw()
    lines = screen(table._stream.getvalue())
    assert len(lines) < 10
    assert lines[-2] == "and 34 more"
    assert all(len(line) < 60 for line in lines)


def test_elsewhere_there_are_plain_lines(capsys):
    with Table(2) as table:
        table.told("ada", small.LESSON, "starting")
        table.draw()
        table.finished("ada", small.LESSON, "ada: 4 of 7 points")
        table.finished("bob", small.LESSON, "bob: not graded")
    assert capsys.readouterr().err == "1 of 2: ada: 4 of 7 points (0:00)\n2 of 2: bob: not graded\n"
