"""Hand-ins from zip files and folders, honest and hostile: real archives, real links, nbgrader's own autograder."""

import hashlib
import json
import os
import socket
import stat
import struct
import time
import zipfile
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbgrader.api import Gradebook
from nbgrader.apps.api import NbGraderAPI
from nbgrader.coursedir import CourseDirectory

from grading import build, files, grade, gradebook, intake
from grading.__main__ import main
from grading.pipeline import Settings
from grading.run import Limits
from grading.score import read_scorecard
from robustkit.errors import RobustkitError
from robustkit.lessons import LESSONS
from tests.fixtures import small_course as small

L = small.LESSON
LESSON = LESSONS[L]
MONDAY, TUESDAY = (2026, 11, 2, 9, 30, 0), (2026, 11, 3, 9, 30, 0)
SECRET = b"the grader's own file"


@cache
def notebook(text="", lesson=L):
    """A notebook of the lesson, as bytes; `text` tells two of them apart."""
    made = small.source_notebook() if lesson == L else small.written_notebook()
    made.cells.append(nbformat.v4.new_markdown_cell(text, id="own"))
    return nbformat.writes(made).encode()


def entry(name, date=MONDAY, mode=stat.S_IFREG | 0o644):
    info = zipfile.ZipInfo(name, date)
    info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
    return info


def pack(path, contents):
    """A zip file of (name or ZipInfo, bytes) pairs."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents:
            archive.writestr(name if isinstance(name, zipfile.ZipInfo) else entry(name), data)
    return path


def patch(path, name, offset, form, value):
    """Overwrite a field of the entry's record in the table of contents."""
    data = bytearray(path.read_bytes())
    start = next(
        place
        for place in range(len(data))
        if data[place : place + 4] == b"PK\1\2" and data[place + 46 :].startswith(name.encode())
    )
    struct.pack_into(form, data, start + offset, value)
    path.write_bytes(data)


def lay_out(folder, contents):
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def everything(folder):
    """Every path beneath, with its contents: what a test may find changed."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


@pytest.fixture
def workspace(tmp_path):
    return small.workspace_in(tmp_path / "course")


def collect(source, workspace):
    outcomes = intake.collect(source, LESSON, workspace)
    for outcome in outcomes:
        assert "\n" not in str(outcome)
        assert str(outcome).isprintable()
    return outcomes


def actions(outcomes):
    return {outcome.file: outcome.action for outcome in outcomes}


# --- the honest class ----------------------------------------------------------------------------------

HONEST = {
    f"ada/{L}/{L}.ipynb": "ada",
    f"o'neil, s/{L}.ipynb": "o'neil, s",
    "grace_h.ipynb": "grace_h",
    f"doejane_LATE_1234_5678_{L}-2.ipynb": "doejane",
    f"Alan Turing_987_assignsubmission_file_{L}.ipynb": "Alan Turing",
    f"Mary Shaw_988_assignsubmission_file/{L}.ipynb": "Mary Shaw",
}
BESIDE = {
    f"ada/{L}/.ipynb_checkpoints/{L}-checkpoint.ipynb": "hidden",
    f"ada/{L}/numpy.py": "not a notebook",
    f"ada/{L}/run.zip": "not a notebook",
    f"ada/{L}/earlier/2026.ipynb": "an earlier hand-in",
    "ada/01-mnist-fgsm/01-mnist-fgsm.ipynb": "another lesson",
    "__MACOSX/._ada.ipynb": "hidden",
}


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_honest_class_arrives_as_it_was_handed_in(tmp_path, workspace, kind):
    contents = {name: notebook(student) for name, student in HONEST.items()} | dict.fromkeys(BESIDE, b"PK")
    make = {"zip": lambda path: pack(path, contents.items()), "folder": lambda path: lay_out(path, contents)}
    source = make[kind](tmp_path / "class")
    outcomes = collect(source, workspace)
    assert actions(outcomes) == dict.fromkeys(HONEST, "collected") | dict.fromkeys(BESIDE, "left out")
    assert {outcome.file: outcome.student for outcome in outcomes if outcome.student} == HONEST
    assert all(BESIDE[o.file] in o.reason for o in outcomes if o.action == "left out")
    for name, student in HONEST.items():
        path = workspace.submission(student, L)
        assert path.read_bytes() == contents[name]
        assert sorted(found.name for found in path.parent.iterdir()) == [f"{L}.ipynb", "timestamp.txt"]
        intake.preflight(path.parent)
    assert grade.students(workspace, L) == sorted(HONEST.values())
    before = everything(workspace.submitted)
    assert {outcome.action for outcome in collect(source, workspace)} == {"unchanged", "left out"}
    assert everything(workspace.submitted) == before


def test_large_notebook_that_does_not_pack_arrives(tmp_path, workspace):
    large = notebook(os.urandom(7 * 2**20).hex())
    for source in (
        pack(tmp_path / "class.zip", [("ada.ipynb", large)]),
        lay_out(tmp_path / "class", {"grace.ipynb": large}),
    ):
        assert collect(source, workspace)[0].action == "collected"
    assert workspace.submission("ada", L).read_bytes() == large
    assert workspace.submission("grace", L).read_bytes() == large


def handed_in(workspace, student):
    """The time as nbgrader reads it, naive UTC."""
    return CourseDirectory().get_existing_timestamp(str(workspace.submission(student, L).parent))


def test_time_is_read_by_nbgrader(tmp_path, workspace, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        collect(pack(tmp_path / "class.zip", [("ada.ipynb", notebook())]), workspace)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert handed_in(workspace, "ada") == datetime(2026, 11, 2, 0, 30)

    folder = lay_out(tmp_path / "class", {"grace.ipynb": notebook()})
    os.utime(folder / "grace.ipynb", (1_700_000_000, 1_700_000_000))
    collect(folder, workspace)
    assert handed_in(workspace, "grace") == datetime(2023, 11, 14, 22, 13, 20)


def test_entry_without_a_time_is_not_late(tmp_path, workspace):
    source = pack(tmp_path / "class.zip", [(entry("ada.ipynb", (1980, 1, 1, 0, 0, 0)), notebook())])
    (outcome,) = collect(source, workspace)
    assert (outcome.action, outcome.at) == ("collected", "")
    assert handed_in(workspace, "ada") is None


def test_file_from_another_era_is_taken(tmp_path, workspace):
    folder = lay_out(tmp_path / "class", {"ada.ipynb": notebook()})
    os.utime(folder / "ada.ipynb", (2**45, 2**45))  # some file systems keep it
    assert collect(folder, workspace)[0].action == "collected"
    os.utime(workspace.submission("ada", L), (2**45, 2**45))
    (workspace.submission("ada", L).parent / "timestamp.txt").write_bytes(b"\xff yesterday")
    assert intake._handed_in(workspace.submission("ada", L)).tzinfo is UTC


def test_later_hand_in_wins_and_the_earlier_is_kept(tmp_path, workspace):
    first, second, third = notebook("first"), notebook("second"), notebook("third")
    path = workspace.submission("ada", L)
    collect(pack(tmp_path / "1.zip", [(entry("ada.ipynb", MONDAY), first)]), workspace)
    (outcome,) = collect(pack(tmp_path / "2.zip", [(entry("ada.ipynb", TUESDAY), second)]), workspace)
    assert outcome.action == "replaced"
    assert path.read_bytes() == second
    (kept,) = (path.parent / "earlier").iterdir()
    assert kept.read_bytes() == first
    assert kept.name in outcome.reason
    assert handed_in(workspace, "ada") == datetime(*TUESDAY).astimezone(UTC).replace(tzinfo=None)
    intake.preflight(path.parent)

    before = everything(workspace.submitted)
    (outcome,) = collect(pack(tmp_path / "3.zip", [(entry("ada.ipynb", MONDAY), third)]), workspace)
    assert outcome.action == "refused"
    assert "handed in another one later, on 2026-11-03" in outcome.reason
    assert everything(workspace.submitted) == before


def test_stopped_between_time_and_notebook_is_made_good(tmp_path, workspace):
    collect(pack(tmp_path / "1.zip", [(entry("ada.ipynb", MONDAY), notebook("first"))]), workspace)
    source = pack(tmp_path / "2.zip", [(entry("ada.ipynb", TUESDAY), notebook("second"))])
    path = workspace.submission("ada", L)
    (path.parent / "timestamp.txt").write_text("2026-11-03 09:30:00.000000 UTC\n")  # and then it was killed
    collect(source, workspace)
    assert path.read_bytes() == notebook("second")


# --- hostile archives: each with an honest neighbour, who is collected all the same -----------------------

HOSTILE_NAMES = {
    "absolute_path": (f"/etc/{L}.ipynb", "absolute or leaves"),
    "drive_letter": (f"C:/{L}.ipynb", "absolute or leaves"),
    "parent_folder": (f"../../{L}/{L}.ipynb", "absolute or leaves"),
    "parent_folder_within": (f"bob/../{L}.ipynb", "absolute or leaves"),
    "parent_folder_with_backslashes": (f"..\\..\\{L}.ipynb", "absolute or leaves"),
    "empty_part": (f"bob//{L}.ipynb", "absolute or leaves"),
    "terminal_escape": ("\x1b[31mbob.ipynb", "unusable"),
    "right_to_left": ("bob\u202e.ipynb", "unusable"),
    "line_break": (f"bob\nada/{L}.ipynb", "unusable"),
    "pattern": (f"*/{L}.ipynb", "unusable"),
    "long_name": (f"{'b' * 81}.ipynb", "unusable"),
    "other_alphabet": ("bоb.ipynb", "unusable"),  # noqa: RUF001  # a Cyrillic o
    "no_place_for_a_name": (f"{L}.ipynb", "does not say whose"),
    "too_deep": (f"a/b/{L}/{L}.ipynb", "does not say whose"),
    "name_of_another_file": (f"bob/{L}/solution.ipynb", "does not say whose"),
    "export_with_a_chosen_name": ("bob_1234_5678_ada.ipynb", "does not say whose"),
    "extension_in_capitals": ("bob.IPYNB", "does not say whose"),
}
HOSTILE_CONTENTS = {
    "not_json": (b"{", "not JSON"),
    "empty": (b"", "not JSON"),
    "not_a_notebook": (b'{"nbformat": 4}', "not a notebook"),
    "nested_json": (b"[" * 200_000, "nested too deeply"),
    "old_format": (b'{"nbformat": 3}', "not a notebook"),
    "a_zip_named_as_notebook": (b"PK\3\4" + b"\0" * 40, "not JSON"),
    "wrong_lesson": (notebook(lesson=small.WRITTEN), "--lesson 01-mnist-fgsm"),
    "foreign_notebook": (nbformat.writes(nbformat.v4.new_notebook()).encode(), "none of the cells"),
    "zip_bomb": (b" " * (19 * 2**20), "200 times"),
}
HOSTILE_KINDS = {
    "link": (stat.S_IFLNK, "a link"),
    "device": (stat.S_IFCHR, "a device"),
    "block_device": (stat.S_IFBLK, "a device"),
    "pipe": (stat.S_IFIFO, "a pipe"),
    "socket": (stat.S_IFSOCK, "a socket"),
    "no_known_type": (0o150000, "no plain file"),
}
HOSTILE_FIELDS = {  # offset and form in the table of contents, value
    "encrypted": (8, "<H", 0x1, "encrypted"),
    "strongly_encrypted": (8, "<H", 0x41, "encrypted"),
    "unknown_packing": (10, "<H", 97, "other than deflate"),
    "says_smaller": (24, "<I", 100, "cannot be unpacked"),
    "says_larger": (24, "<I", 100_000, "unpacks to"),
    "says_enormous": (24, "<I", 2**32 - 2, "200 times"),
    "wrong_checksum": (16, "<I", 1, "cannot be unpacked"),
    "points_into_nothing": (42, "<I", 2**31, "cannot be unpacked"),
    "points_to_its_neighbour": (42, "<I", 0, "cannot be unpacked"),
}


def bystander(source, workspace, reason, outside):
    """Collect: ada's notebook arrives, the one other file is refused for `reason`, nothing else is written."""
    before = everything(outside)
    ours, theirs = collect(source, workspace)
    assert (ours.action, ours.student, theirs.action) == ("collected", "ada", "refused")
    assert reason in theirs.reason
    there = {f"ada/{L}/{L}.ipynb", f"ada/{L}/timestamp.txt"}
    assert set(everything(workspace.submitted)) == there
    prefix = workspace.submitted.relative_to(outside)
    assert set(everything(outside)) - set(before) == {f"{prefix}/{name}" for name in there}


@pytest.mark.parametrize("case", HOSTILE_NAMES)
def test_zip_with_a_hostile_name(case, tmp_path, workspace):
    name, reason = HOSTILE_NAMES[case]
    source = pack(tmp_path / "class.zip", [("ada.ipynb", notebook()), (name, notebook("hostile"))])
    bystander(source, workspace, reason, tmp_path)


@pytest.mark.parametrize("case", HOSTILE_CONTENTS)
@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_hostile_contents(case, kind, tmp_path, workspace):
    data, reason = HOSTILE_CONTENTS[case]
    contents = {"ada.ipynb": notebook(), "bob.ipynb": data}
    if kind == "zip":
        bystander(pack(tmp_path / "class.zip", contents.items()), workspace, reason, tmp_path)
    else:
        reason = "not JSON" if case == "zip_bomb" else reason
        bystander(lay_out(tmp_path / "class", contents), workspace, reason, tmp_path)


@pytest.mark.parametrize("case", HOSTILE_KINDS)
def test_zip_with_an_entry_that_is_no_file(case, tmp_path, workspace):
    kind, reason = HOSTILE_KINDS[case]
    hostile = entry("bob.ipynb", mode=kind | 0o777)
    source = pack(tmp_path / "class.zip", [("ada.ipynb", notebook()), (hostile, b"/etc/passwd")])
    bystander(source, workspace, reason, tmp_path)


@pytest.mark.parametrize("case", HOSTILE_FIELDS)
def test_zip_whose_table_of_contents_lies(case, tmp_path, workspace):
    offset, form, value, reason = HOSTILE_FIELDS[case]
    source = pack(tmp_path / "class.zip", [("ada.ipynb", notebook()), ("bob.ipynb", notebook("b" * 2000))])
    patch(source, "bob.ipynb", offset, form, value)
    bystander(source, workspace, reason, tmp_path)


def test_zip_with_a_null_in_a_name(tmp_path, workspace):
    source = pack(tmp_path / "class.zip", [("ada.ipynb", notebook()), ("bob.ipynb~.txt", notebook())])
    source.write_bytes(source.read_bytes().replace(b"bob.ipynb~", b"bob.ipynb\0"))
    bystander(source, workspace, "null", tmp_path)


def test_small_declaration_of_a_large_bomb_unpacks_no_further(tmp_path, workspace):
    source = pack(tmp_path / "class.zip", [("ada.ipynb", notebook()), ("bob.ipynb", b" " * 2**27)])
    patch(source, "bob.ipynb", 24, "<I", 2**20)
    started = time.process_time()
    bystander(source, workspace, "cannot be unpacked", tmp_path)
    assert time.process_time() - started < 5


def test_bomb_that_lies_about_its_packed_size_is_still_bounded(tmp_path, workspace):
    source = pack(tmp_path / "class.zip", [("ada.ipynb", notebook()), ("bob.ipynb", b" " * (19 * 2**20))])
    patch(source, "bob.ipynb", 20, "<I", 2**31)
    bystander(source, workspace, "cannot be unpacked", tmp_path)
    patch(source, "bob.ipynb", 24, "<I", 21 * 2**20)
    _, theirs = collect(source, workspace)
    assert "more than 20 MiB" in theirs.reason


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning:zipfile")
@pytest.mark.parametrize(
    "twin",
    ["bob.ipynb", "BOB.ipynb", "ｂob.ipynb", f"bob/{L}.ipynb", f"bob_9_{L}.ipynb"],  # noqa: RUF001
    ids=["same", "case", "unicode", "layout", "export"],
)
def test_two_for_one_student_are_both_refused(twin, tmp_path, workspace):
    contents = [("ada.ipynb", notebook()), ("bob.ipynb", notebook("one")), (twin, notebook("two"))]
    outcomes = collect(pack(tmp_path / "class.zip", contents), workspace)
    assert [outcome.action for outcome in outcomes] == ["collected", "refused", "refused"]
    assert "2 files are for bob" in outcomes[1].reason
    assert not (workspace.submitted / "bob").exists()


def test_link_then_file_of_one_name_is_refused(tmp_path, workspace):
    """An archiver would make the link, and write the second entry through it."""
    link = entry(f"bob/{L}/{L}.ipynb", mode=stat.S_IFLNK | 0o777)
    contents = [(link, b"../../ada.ipynb"), (f"bob/{L}.ipynb", notebook())]
    outcomes = collect(pack(tmp_path / "class.zip", contents), workspace)
    assert {outcome.action for outcome in outcomes} == {"refused"}


def test_student_who_differs_from_one_there_by_case_alone(tmp_path, workspace):
    collect(pack(tmp_path / "1.zip", [("Ada.ipynb", notebook())]), workspace)
    (outcome,) = collect(pack(tmp_path / "2.zip", [("ada.ipynb", notebook("other"))]), workspace)
    assert "differs from ada by case alone" in outcome.reason


def test_notebooks_with_too_much_together(tmp_path, workspace, monkeypatch):
    monkeypatch.setattr(intake, "MOST_BYTES", len(notebook()) + 10)
    contents = [("ada.ipynb", notebook()), ("bob.ipynb", notebook())]
    bystander(pack(tmp_path / "class.zip", contents), workspace, "collect them in parts", tmp_path)


def test_sources_that_cannot_be_read_at_all(tmp_path, workspace, monkeypatch):
    whole = pack(tmp_path / "class.zip", [("ada.ipynb", notebook())])
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole.read_bytes()[:-30])
    text = tmp_path / "notes.txt"
    text.write_text("no archive")
    (tmp_path / "nothing").mkdir()
    for source, reason in [
        (tmp_path / "missing.zip", "No such file"),
        (cut, "not a whole zip"),
        (text, "not a whole zip"),
        (tmp_path / "nothing", "no notebook for"),
        (pack(tmp_path / "empty.zip", []), "no notebook for"),
    ]:
        with pytest.raises(RobustkitError, match=reason):
            collect(source, workspace)
    monkeypatch.setattr(intake, "MOST_ENTRIES", 2)
    many = {f"s{i}.ipynb": notebook() for i in range(3)}
    for source in (pack(tmp_path / "many.zip", many.items()), lay_out(tmp_path / "many", many)):
        with pytest.raises(RobustkitError, match="more than 2 entries"):
            collect(source, workspace)
    assert not workspace.submitted.exists()
    workspace.submitted.parent.mkdir(parents=True, exist_ok=True)
    workspace.submitted.write_text("a file")
    with pytest.raises(RobustkitError, match="name another folder"):
        collect(whole, workspace)


def test_enormous_table_of_contents_is_not_read(tmp_path, workspace):
    size = 2**30
    source = tmp_path / "class.zip"
    with source.open("wb") as file:  # a hole, and the record that says it is all table
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size, 0, 0))
    with pytest.raises(RobustkitError, match=r"^the archive has more than 20000 entries"):
        collect(source, workspace)


# --- hostile folders -------------------------------------------------------------------------------------


def hard_link(path, secret):
    os.link(secret, path)


def pipe(path, _secret):
    os.mkfifo(path)


def device(path, _secret):
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root makes devices")


def listening(path, _secret):
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def link(path, secret):
    path.symlink_to(secret)


def link_to_folder(path, secret):
    path.symlink_to(secret.parent)


def dangling(path, secret):
    path.symlink_to(secret.with_name("nothing"))


ODD = [link, link_to_folder, dangling, hard_link, pipe, device, listening]
ODD_NAMES = [odd.__name__ for odd in ODD]


@pytest.mark.parametrize("odd", ODD, ids=ODD_NAMES)
def test_folder_with_an_entry_that_is_no_file_of_its_own(odd, tmp_path, workspace):
    source = lay_out(tmp_path / "class", {"ada.ipynb": notebook()})
    (tmp_path / "grader").mkdir()
    (tmp_path / "grader" / "secret").write_bytes(notebook("another's"))
    odd(source / "bob.ipynb", tmp_path / "grader" / "secret")
    bystander(source, workspace, "it is a", tmp_path)


def test_folder_reached_through_a_link_is_not_entered(tmp_path, workspace):
    other = lay_out(tmp_path / "other", {f"{L}/{L}.ipynb": notebook("another's")})
    source = lay_out(tmp_path / "class", {"ada.ipynb": notebook()})
    (source / "bob").symlink_to(other)
    outcomes = collect(source, workspace)
    assert actions(outcomes)["ada.ipynb"] == "collected"
    assert not (workspace.submitted / "bob").exists()


@pytest.mark.parametrize("swapped", ["bob", f"bob/{L}", f"bob/{L}/{L}.ipynb"])
def test_what_becomes_a_link_after_it_was_seen_is_not_followed(swapped, tmp_path):
    other = lay_out(tmp_path / "other", {f"bob/{L}/{L}.ipynb": SECRET})
    source = lay_out(tmp_path / "class", {f"bob/{L}/{L}.ipynb": notebook()})
    (offered,) = intake._in_folder(source)
    assert offered.read() == notebook()
    (source / swapped).rename(tmp_path / "aside")
    (source / swapped).symlink_to(other / swapped)
    with pytest.raises(RobustkitError, match="cannot be opened"):
        offered.read()


@pytest.mark.parametrize("place", ["ada", f"ada/{L}", f"ada/{L}/{L}.ipynb", f"ada/{L}/earlier"])
def test_link_that_lies_in_submitted_is_not_written_through(place, tmp_path, workspace):
    outside = lay_out(tmp_path / "outside", {"kept": SECRET})
    if place.endswith("earlier"):
        collect(pack(tmp_path / "1.zip", [(entry("ada.ipynb"), notebook("first"))]), workspace)
    path = workspace.submitted / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(outside / "kept" if place.endswith(".ipynb") else outside)
    (outcome,) = collect(
        pack(tmp_path / "2.zip", [(entry("ada.ipynb", TUESDAY), notebook("next"))]), workspace
    )
    assert outcome.action == "refused"
    assert everything(outside) == {"kept": hashlib.sha256(SECRET).hexdigest()}


# --- the command -------------------------------------------------------------------------------------------


def test_command_collects_says_so_and_exits_2_when_something_was_refused(tmp_path, capsys):
    source = pack(tmp_path / "class.zip", [("ada.ipynb", notebook()), ("notes.txt", b"hello")])
    arguments = ["--lesson", L, "--into", str(tmp_path / "submitted")]
    assert main(["class", "collect", str(source), *arguments]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "ada.ipynb: collected for ada"
    assert said[1] == "notes.txt: left out; not a notebook"
    assert said[2] == "1 collected, 0 replaced, 0 unchanged, 1 left out, 0 refused."

    source = pack(tmp_path / "more.zip", [("bob.ipynb", b"{")])
    assert main(["class", "collect", str(source), *arguments, "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["summary"]["refused"] == 1
    assert "not JSON" in said["files"][0]["reason"]

    assert main(["class", "collect", str(tmp_path / "missing"), *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- before nbgrader copies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ODD, ids=ODD_NAMES)
@pytest.mark.parametrize("where", ["notes.txt", "data/deep/notes.txt", "timestamp.txt", ".hidden"])
def test_preflight_refuses(odd, where, tmp_path):
    folder = lay_out(tmp_path / "bob", {f"{L}/{L}.ipynb": notebook(), f"{L}/data/deep/x": b""}) / L
    (tmp_path / "secret").write_bytes(SECRET)
    intake.preflight(folder)
    odd(folder / where, tmp_path / "secret")
    with pytest.raises(RobustkitError, match=f"holds {where}, a"):
        intake.preflight(folder)


@pytest.mark.parametrize("whole", ["lesson", "student"])
def test_preflight_refuses_a_folder_that_is_a_link(whole, tmp_path):
    lay_out(tmp_path / "ada", {f"{L}/{L}.ipynb": notebook()})
    if whole == "student":
        (tmp_path / "bob").symlink_to(tmp_path / "ada")
    else:
        (tmp_path / "bob").mkdir()
        (tmp_path / "bob" / L).symlink_to(tmp_path / "ada" / L)
    with pytest.raises(RobustkitError, match="not a folder of its own"):
        intake.preflight(tmp_path / "bob" / L)


def test_preflight_refuses_huge_trees(tmp_path):
    wide = lay_out(tmp_path / "wide", {f"{L}/{i}": b"" for i in range(intake.MOST_FILES + 1)})
    deep = lay_out(tmp_path / "deep", {f"{L}/{'d/' * files.MOST_DEPTH}x": b""})
    large = lay_out(tmp_path / "large", {f"{L}/x": b""})
    os.truncate(large / L / "x", intake.MOST_FOLDER_BYTES + 1)
    for folder, reason in [(wide, "more than 2000"), (deep, "20 deep"), (large, "more than 200 MiB")]:
        with pytest.raises(RobustkitError, match=reason):
            intake.preflight(folder / L)


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A built course with ada's right solution, which came late, and a secret that only the grader may read."""
    workspace = small.workspace_in(tmp_path_factory.mktemp("intake"))
    small.author(workspace, L, small.source_notebook())
    build.build(workspace, [L])
    gradebook.register(workspace, L)
    (workspace.private / "answers").write_bytes(SECRET)
    return workspace


def right(course):
    release = nbformat.read(course.release(L), as_version=4)
    return nbformat.writes(small.filled(release, small.SOLUTIONS)).encode()


def arrived(workspace, folder):
    """Where in `folder` the secret lies besides where it belongs."""
    secret = hashlib.sha256(SECRET).hexdigest()
    home = workspace.private / "answers"
    return [name for name, digest in everything(folder).items() if digest == secret and folder / name != home]


nbgraders_rows = pytest.mark.filterwarnings(
    "ignore:Object of type .* not in session:sqlalchemy.exc.SAWarning"  # as in test_grading_gradebook
)


@pytest.mark.slow
def test_link_in_the_exchange_is_not_collected(course, tmp_path):
    """With nbgrader's own collector mallory hands in what ada did; with ours she hands in nothing."""
    workspace = replace(course, submitted=tmp_path / "submitted")
    when = "2026-11-02 09:30:00 UTC"
    inbound = workspace.private / "exchange" / gradebook.COURSE_ID / "inbound"
    for student in ("ada", "mallory", "eve"):
        contents = {f"{L}.ipynb": notebook(student), "timestamp.txt": when.encode(), "data/notes.txt": b"x"}
        lay_out(inbound / f"{student}+{L}+{when}+r4nd0m", contents)
    ada, mallory, eve = (inbound / f"{student}+{L}+{when}+r4nd0m" for student in ("ada", "mallory", "eve"))
    (mallory / f"{L}.ipynb").unlink()
    (mallory / f"{L}.ipynb").symlink_to(ada / f"{L}.ipynb")
    (eve / "data" / "answers.txt").symlink_to(workspace.private / "answers")

    config = gradebook.settings(workspace)
    result = NbGraderAPI(config=config).collect(L)
    assert result["success"], result
    assert grade.students(workspace, L) == ["ada"]
    assert everything(workspace.submitted / "ada" / L) == everything(ada)
    assert handed_in(workspace, "ada") == datetime(*MONDAY)
    assert result["log"].count("is not collected: the submission holds") == 2

    del config.ExchangeFactory.collect
    assert NbGraderAPI(config=config).collect(L)["success"]
    assert workspace.submission("mallory", L).read_bytes() == notebook("ada")
    assert arrived(workspace, workspace.submitted) == [f"eve/{L}/data/answers.txt"]


def test_exchange_link_made_after_the_check_is_not_followed(tmp_path, monkeypatch):
    folder = lay_out(tmp_path / "bob" / L, {f"{L}.ipynb": notebook("bob")})
    (tmp_path / "secret").write_bytes(SECRET)

    def too_soon(checked):
        (checked / f"{L}.ipynb").unlink()
        (checked / f"{L}.ipynb").symlink_to(tmp_path / "secret")

    monkeypatch.setattr(intake, "preflight", too_soon)
    with pytest.raises(RobustkitError, match="cannot be opened"):
        intake.copy_plain(folder, tmp_path / "copy")


@pytest.mark.slow
@nbgraders_rows
def test_nbgrader_follows_links_and_ours_does_not_let_it(course, tmp_path):
    """nbgrader's autograder over a whole class: with its own exporter the secret arrives, with ours never."""
    source = pack(tmp_path / "class.zip", [(entry("ada.ipynb", TUESDAY), right(course))])
    collect(source, course)
    for student in ("mallory", "eve"):
        folder = lay_out(course.submitted / student / L, {f"{L}.ipynb": right(course)})
        (folder / "notes.txt").symlink_to(course.private / "answers")
    (course.submitted / "eve" / L / f"{L}.ipynb").unlink()
    (course.submitted / "eve" / L / f"{L}.ipynb").symlink_to(course.submission("ada", L))

    settings = Settings(limits=Limits(cell=60, notebook=120))
    whole_class = NbGraderAPI(config=gradebook.settings(course, settings)).autograde(L, "*")
    assert "holds notes.txt, a link" in whole_class["log"]
    assert arrived(course, course.private) == []
    assert sorted(path.name for path in course.autograded.iterdir()) == ["ada"]
    with Gradebook(f"sqlite:///{course.gradebook}", gradebook.COURSE_ID) as book:
        submission = book.find_submission(L, "ada")
        assert submission.score == 7
        assert submission.timestamp == datetime(*TUESDAY).astimezone(UTC).replace(tzinfo=None)

    outcomes = {outcome.student: outcome for outcome in small.graded(course, [L], settings)}
    for student in ("mallory", "eve"):
        outcome = outcomes[student]
        assert outcome.card.points == 0
        assert "a link; hand in plain files alone" in outcome.problem
        assert "a link" in read_scorecard(course.hop(student, L) / "scorecard.json").refused
        with pytest.raises(RobustkitError, match="a link; hand in plain files alone"):
            gradebook.enter(course, L, student)
    assert arrived(course, course.private) == []

    # The same without our exporter: if nbgrader should stop following links, this test says so.
    config = gradebook.settings(course, settings)
    del config.Autograde.exporter_class
    config.Autograde.autograde_preprocessors = []  # the copy is all that matters here
    assert NbGraderAPI(config=config).autograde(L, "mallory", force=True, create=True)["success"]
    assert arrived(course, course.private) == [f"autograded/mallory/{L}/notes.txt"]
