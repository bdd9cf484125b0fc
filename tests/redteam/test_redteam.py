"""Every hostile submission in every sandbox tier: no point that was not earned, nothing leaked, nothing left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import nbformat
import pytest

from grading import build, feedback, judge, run, sandbox
from grading.sandbox import cgroups
from grading.score import score
from grading.workspace import ROOT
from robustkit.errors import RobustkitError
from robustkit.lessons import LESSONS
from tests.fixtures import small_course as small
from tests.redteam.corpus import CORPUS, Hostile

LESSON = LESSONS[small.LESSON]
SECRET = b"a secret of the tests' own, of 32"
LIMITS = run.Limits(cell=12, notebook=60, output_bytes=200_000)
MEMORY = 2**31
SAMPLE = {  # the quick run: one of each kind
    "drops_asserts",
    "writes_evidence_meanwhile",
    "evidence_is_a_link",
    "calls_home_over_tcp",
    "knocks_at_sockets_of_the_host",
    "reads_what_is_not_its_own",
    "leaves_a_daemon",
    "shows_scripts",
}


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A workspace with the small lesson released, a secret, a gradebook and somebody else's submission."""
    workspace = small.workspace_in(tmp_path_factory.mktemp("course"))
    small.author(workspace, LESSON.id, small.source_notebook())
    build.build(workspace, [LESSON.id])
    workspace.private.mkdir(exist_ok=True)
    workspace.secret.write_bytes(SECRET)
    workspace.gradebook.write_bytes(b"grades")
    small.hand_in(workspace, "somebody", small.source_notebook())
    return workspace


@contextmanager
def listening(folder: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Sockets of the grading machine that hostile code may want; who connected is in the list."""
    hits: list[str] = []
    abstract = f"rk-redteam-{os.getpid()}"
    with ExitStack() as stack:
        places = {}
        for name, family, kind, address in (
            ("PORT", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("UDP", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("SOCKET", socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "host.sock")),
            ("ABSTRACT", socket.AF_UNIX, socket.SOCK_STREAM, f"\0{abstract}"),
        ):
            server = stack.enter_context(socket.socket(family, kind))
            server.bind(address)
            server.settimeout(0.2)
            if kind == socket.SOCK_STREAM:
                server.listen()
            bound = server.getsockname()
            places[name] = str(bound[1]) if family == socket.AF_INET else str(folder / "host.sock")
            stop = threading.Event()
            watcher = threading.Thread(target=_watch, args=(server, name, hits, stop))
            watcher.start()
            stack.callback(watcher.join)
            stack.callback(stop.set)
        places["ABSTRACT"] = abstract
        yield places, hits


def _watch(server: socket.socket, name: str, hits: list[str], stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            if server.type == socket.SOCK_DGRAM:
                server.recv(16)
            else:
                server.accept()[0].close()
            hits.append(name)
        except TimeoutError:
            continue


def survivors(marks: tuple[str, ...]) -> list[str]:
    """Command lines of running processes that carry one of the marks."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = place.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if any(mark in line for mark in marks):
            found.append(line)
    return found


def submit(course, hostile: Hostile, tier: str, folder: Path, monkeypatch):
    """Run one hostile submission; its scorecard, what it printed, and who connected to the host."""
    monkeypatch.setenv("ROBUSTKIT_REDTEAM", "the grader's own")
    canary = folder / "canary"
    canary.mkdir()
    (canary / "canary").write_text("sings")
    with listening(folder) as (places, hits):
        places |= {
            "SECRET": str(course.secret),
            "SOLUTION": str(course.source(LESSON.id)),
            "RELEASE": str(course.release(LESSON.id)),
            "GRADEBOOK": str(course.gradebook),
            "RECORDS": str(course.records),
            "OTHER": str(course.submission("somebody", LESSON.id)),
            "CANARY": str(canary),
            "GRADER": str(os.getpid()),
            "MEMORY_MB": str(MEMORY >> 20),
        }
        cells = {}
        for name, source in hostile.cells.items():
            for word, value in places.items():
                source = source.replace(f"@{word}@", value)
            cells[name] = source
        release = nbformat.read(course.release(LESSON.id), as_version=4)
        path = folder / "submission.ipynb"
        nbformat.write(small.filled(release, cells), path)
        done = run.run_submission(
            path,
            LESSON,
            course.release(LESSON.id),
            folder / "evidence",
            student="mallory",
            secret=SECRET,
            limits=LIMITS,
            confinement=tier,
        )
    card = score(judge.judge(folder / "evidence", SECRET), {})
    assert done.student == "mallory"
    executed = nbformat.read(folder / "evidence" / "executed.ipynb", as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", ())]
    return card, json.dumps(outputs, indent=1), hits


def tiers() -> list[str]:
    return list(sandbox.available())


@pytest.mark.skipif(not tiers(), reason="no sandbox works on this machine")
@pytest.mark.parametrize("tier", tiers())
@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(one, id=one.name, marks=() if one.name in SAMPLE else pytest.mark.redteam)
        for one in CORPUS
    ],
)
def test_a_hostile_submission_gains_nothing(course, hostile, tier, tmp_path, monkeypatch, record_property):
    record_property("name", hostile.name)
    record_property("attempts", hostile.attempts)
    record_property("tier", tier)
    record_property("points that are honest", hostile.points)
    before = {path: path.read_bytes() for path in (course.secret, course.gradebook, course.source(LESSON.id))}
    card, printed, hits = submit(course, hostile, tier, tmp_path, monkeypatch)
    record_property("points", card.points)
    assert card.points == hostile.points, card
    assert "LEAK" not in printed, printed
    assert not hits
    assert [path.name for path in (tmp_path / "canary").iterdir()] == ["canary"]
    assert (tmp_path / "canary" / "canary").read_text() == "sings"
    for path, content in before.items():
        assert path.read_bytes() == content
    time.sleep(0.1)
    assert not survivors(hostile.after or ("rk-redteam-survivor",))
    assert not [place for parent in cgroups.places() for place in parent.glob(f"robustkit-{os.getpid()}-*")]
    page = feedback.render(card)
    assert "redteam" not in page
    assert "<script" not in page.replace("<script></script>", "")
    assert "text/html" not in printed
    assert "image/svg+xml" not in printed
    assert "application/" not in printed


def test_the_corpus_is_large_and_says_what_it_attempts():
    assert len(CORPUS) >= 40
    assert len({one.name for one in CORPUS}) == len(CORPUS)
    assert all(one.attempts for one in CORPUS)
    assert {one.name for one in CORPUS} >= SAMPLE


@pytest.mark.skipif(not tiers(), reason="no sandbox works on this machine")
@pytest.mark.parametrize("tier", tiers())
def test_the_reference_earns_everything_in_the_sandbox(course, tier, tmp_path, monkeypatch):
    card, _, _ = submit(course, Hostile("honest", "nothing", small.SOLUTIONS), tier, tmp_path, monkeypatch)
    assert card.points == card.maximum == 7


@pytest.mark.parametrize(
    "name", ["reads_what_is_not_its_own", "calls_home_over_tcp", "knocks_at_sockets_of_the_host"]
)
def test_the_corpus_bites_where_there_is_no_sandbox(course, name, tmp_path, monkeypatch):
    """The same submissions in a plain kernel reach what they want: the tests above would notice."""
    hostile = next(one for one in CORPUS if one.name == name)
    card, printed, _ = submit(course, hostile, sandbox.UNCONFINED, tmp_path, monkeypatch)
    assert "LEAK" in printed
    assert card.points == hostile.points  # the grade, at least, needs no sandbox


GRADER = """
import sys
from pathlib import Path
from grading import run
from robustkit.lessons import LESSONS
path, release, into, tier = sys.argv[1:]
lesson = LESSONS["{lesson}"]
run.run_submission(Path(path), lesson, Path(release), Path(into), student="s", secret=b"x" * 32, confinement=tier)
"""


@pytest.mark.skipif(not tiers(), reason="no sandbox works on this machine")
@pytest.mark.parametrize("tier", tiers())
def test_nothing_outlives_a_grader_that_is_killed(course, tier, tmp_path):
    mark = f"rk-outlives-{os.getpid()}-{tier}"
    starts = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)", "{mark}"])
time.sleep(120)"""
    release = nbformat.read(course.release(LESSON.id), as_version=4)
    path = tmp_path / "submission.ipynb"
    nbformat.write(small.filled(release, {"s0_distance": starts}), path)
    arguments = [str(path), str(course.release(LESSON.id)), str(tmp_path / "evidence"), tier]
    grader = subprocess.Popen(
        [sys.executable, "-c", GRADER.format(lesson=LESSON.id), *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    try:
        _wait(lambda: survivors((mark,)), 60)
    finally:
        grader.send_signal(signal.SIGKILL)
        grader.wait()
    _wait(lambda: not survivors((mark, str(course.release(LESSON.id)))), 10)
    cgroups.sweep()  # those of other graders that died on this machine too
    assert not [place for parent in cgroups.places() for place in parent.glob(f"robustkit-{grader.pid}-*")]


def _wait(done, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.1)


def test_an_unknown_or_missing_sandbox_is_refused_in_one_sentence(monkeypatch):
    with pytest.raises(RobustkitError, match="unknown; choose auto, bwrap, landlock or none"):
        sandbox.choose("docker")
    monkeypatch.setattr(sandbox, "available", lambda: ())
    for wanted in ("auto", "bwrap"):
        with pytest.raises(RobustkitError, match=r"install bubblewrap .* or, .* say --sandbox none\."):
            sandbox.choose(wanted)
    assert sandbox.choose("none") == "none"


@pytest.mark.skipif(not tiers(), reason="no sandbox works on this machine")
@pytest.mark.parametrize("tier", tiers())
def test_data_may_be_read_also_behind_a_link(course, tier, tmp_path, monkeypatch):
    real = tmp_path / "real"
    real.mkdir()
    (real / "images").write_text("the images")
    (tmp_path / "link").symlink_to(real)
    monkeypatch.setenv("ROBUSTKIT_DATA", str(tmp_path / "link"))
    reads = "import os\nprint(open(os.environ['ROBUSTKIT_DATA'] + '/images').read())"
    reader = Hostile("reads_data", "nothing", {**small.SOLUTIONS, "s0_distance": reads})
    _, printed, _ = submit(course, reader, tier, tmp_path, monkeypatch)
    assert "the images" in printed
