"""Submissions from a zip file or a folder into submitted/, for places without a shared file system; and what a
submission's folder may hold before nbgrader copies it.

Only notebooks are taken, as bytes, and each is written anew: no link is followed, and an archive is never
unpacked. A file that cannot be taken is one sentence, and the others are taken.
"""

from __future__ import annotations

import io
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from grading import files, notebooks
from grading.records import sha256
from grading.workspace import LAYOUTS, Workspace, check_student
from robustkit.errors import RobustkitError
from robustkit.files import write_atomically
from robustkit.lessons import LESSONS, Lesson

MOST_ENTRIES = 20_000
MOST_DIRECTORY = 8 * 2**20  # bytes of a zip's table of contents, which is read whole
MOST_BYTES = 4 * 2**30  # of all notebooks together
MOST_RATIO = 200  # of a notebook's size to its size in the archive; text with pictures stays below 20
FREE_RATIO = 2**20  # a notebook up to this size may be as repetitive as it likes

MOST_FILES = 2000  # in one submission's folder
MOST_FOLDER_BYTES = 200 * 2**20

COLLECTED, REPLACED, UNCHANGED = "collected", "replaced", "unchanged"
LEFT_OUT, REFUSED = "left out", "refused"
ACTIONS = (COLLECTED, REPLACED, UNCHANGED, LEFT_OUT, REFUSED)

EARLIER = "earlier"  # the folder beside a notebook that keeps those which it replaced
TIMESTAMP = "timestamp.txt"  # what nbgrader's late policy reads
_NBGRADERS_FORMAT = "%Y-%m-%d %H:%M:%S.%f %Z"

# What zipfile raises for archives that are not what they say.
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, NotImplementedError)

_CHUNK = 2**20
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_MOODLE_FOLDER = re.compile(r"_\d+_assignsubmission_file_?$")
_EXPORTED = re.compile(r"_\d+_|_assignsubmission_")


@dataclass(frozen=True)
class Offered:
    """One file of a source, before anything in it is believed."""

    name: str  # its path in the source, with /
    at: datetime | None  # when it was last written, which the source may have wrong
    size: int
    flaw: str  # why it is not read at all; "" where it may be
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Outcome:
    """What became of one file of the source."""

    file: str
    action: str
    student: str = ""
    at: str = ""
    reason: str = ""

    def __str__(self) -> str:
        whose = f" for {self.student}" if self.student and self.action != REFUSED else ""
        return f"{self.file}: {self.action}{whose}" + (f"; {self.reason}" if self.reason else "")


def collect(source: Path, lesson: Lesson, workspace: Workspace) -> list[Outcome]:
    """Every file of `source`, and what became of it: notebooks of `lesson` are in `workspace.submitted` now.

    A later hand-in takes the place of an earlier one, which is kept in `earlier/` beside it; an older one is
    refused. `timestamp.txt` has the file's own time, which is what the archive or file system says.
    Raises: RobustkitError when the source cannot be read, is out of bounds, or has nothing for the lesson.
    """
    if source.is_dir():
        return _collect(list(_in_folder(source.resolve())), source, lesson, workspace)
    with _BoundedFile(source) as file, _archive(file, source) as archive:
        return _collect(list(_in_zip(archive)), source, lesson, workspace)


def summary(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many files of each action."""
    counts = Counter(outcome.action for outcome in outcomes)
    return {action: counts[action] for action in ACTIONS}


def preflight(folder: Path) -> None:
    """Look through the folder STUDENT/LESSON of a submission before anything in it is copied.

    nbgrader follows links when it copies: a link to the grader's files would bring in what they hold.
    Raises: RobustkitError when it holds a link, a device, a file with a second name, or too much.
    """
    try:
        for place in (folder.parent, folder):
            if not stat.S_ISDIR(place.lstat().st_mode):
                raise RobustkitError(f"{place.name} is not a folder of its own; hand in a plain folder.")
    except OSError as error:
        raise RobustkitError(
            f"the submission's folder cannot be opened ({error.strerror}); hand it in again."
        ) from error
    total = 0
    for name, found in files.walk(folder, MOST_FILES):
        if odd := files.oddity(found):
            raise RobustkitError(f"the submission holds {shown(name)}, {odd}; hand in plain files alone.")
        total += found.st_size
        if total > MOST_FOLDER_BYTES:
            raise RobustkitError(
                f"the submission holds more than {MOST_FOLDER_BYTES // 2**20} MiB, the limit; "
                "hand in the notebook alone."
            )


def copy_plain(source: Path, into: Path) -> None:
    """Copy a submission's folder that others can still write to: no link is followed, whenever it is made.

    Raises: RobustkitError where `preflight` does.
    """
    preflight(source)
    into.mkdir()
    for name, found in files.walk(source, MOST_FILES):
        if stat.S_ISDIR(found.st_mode):
            (into / name).mkdir()
        else:
            (into / name).write_bytes(files.read_beneath(source, name, MOST_FOLDER_BYTES))


def shown(name: str) -> str:
    """A stranger's file name for a terminal or a page: one short line without control characters."""
    return (name if name.isprintable() else ascii(name))[:120]


# --- what a source offers ------------------------------------------------------------------------------


def _in_folder(folder: Path) -> Iterator[Offered]:
    for name, found in files.walk(folder, MOST_ENTRIES):
        if not stat.S_ISDIR(found.st_mode):

            def read(name: str = name) -> bytes:
                return files.read_beneath(folder, name, notebooks.MOST_BYTES)

            odd = files.oddity(found)
            at = _moment(found.st_mtime)
            yield Offered(name, at, found.st_size, f"it is {odd}" if odd else "", read)


class _BoundedFile(io.FileIO):
    """A file of which at most MOST_DIRECTORY bytes can be read at once: zipfile reads the table of contents
    whole, however long the archive says it is.
    """

    def __init__(self, path: Path) -> None:
        try:
            super().__init__(path)
        except OSError as error:
            raise RobustkitError(
                f"{path} cannot be opened ({error.strerror}); name a zip file or a folder."
            ) from error

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MOST_DIRECTORY:
            raise RobustkitError(_too_many())
        return super().read(MOST_DIRECTORY if size is None or size < 0 else size) or b""


def _too_many() -> str:
    return f"the archive has more than {MOST_ENTRIES} entries, the limit; collect it in parts."


def _archive(file: io.FileIO, source: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(file)
    except RobustkitError:
        raise
    except _BROKEN as error:
        raise RobustkitError(
            f"{source} is not a whole zip file ({_said(error)}); download it again, or name a folder."
        ) from error
    if len(archive.infolist()) > MOST_ENTRIES:
        raise RobustkitError(_too_many())
    return archive


def _said(error: Exception) -> str:
    return str(error)[:120] or type(error).__name__


def _in_zip(archive: zipfile.ZipFile) -> Iterator[Offered]:
    for info in archive.infolist():
        flaw = _flaw(info)
        if not flaw and info.is_dir():
            continue

        def read(info: zipfile.ZipInfo = info) -> bytes:
            try:
                with archive.open(info) as file:
                    data = b"".join(iter(lambda: file.read(_CHUNK), b""))  # zipfile stops at the size it says
            except _BROKEN as error:
                raise RobustkitError(f"it cannot be unpacked ({_said(error)}); ask for it again.") from error
            if len(data) != info.file_size:
                raise RobustkitError(
                    f"it unpacks to {len(data)} bytes and says {info.file_size}; ask for it again."
                )
            return data

        yield Offered(_path_in(info), _time_in(info), info.file_size, flaw, read)


def _path_in(info: zipfile.ZipInfo) -> str:
    return info.orig_filename.replace("\\", "/")  # as some archivers for Windows write it


def _flaw(info: zipfile.ZipInfo) -> str:
    """Why an entry is not looked into: by its name, its type, how it is packed."""
    name = _path_in(info)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if re.match(r"/|[A-Za-z]:", name) or {"", ".", ".."} & {*name.removesuffix("/").split("/")}:
        return "its path is absolute or leaves the folder"
    if "\0" in name:
        return "its name goes on after a null"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return f"it is {files.kind_of(kind)}"
    if info.flag_bits & _ENCRYPTED:
        return "it is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "it is packed in a way other than deflate"
    if info.file_size > max(FREE_RATIO, MOST_RATIO * info.compress_size):
        return f"it would unpack to more than {MOST_RATIO} times its size"
    return ""


def _time_in(info: zipfile.ZipInfo) -> datetime | None:
    """The entry's time, which a zip has without a zone: the grader's is assumed. None where it has none."""
    if info.date_time <= (1980, 1, 1, 0, 0, 0):
        return None
    try:
        return datetime(*info.date_time).astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _moment(seconds: float) -> datetime | None:
    """A file's time; None where it is none of our era."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None


# --- whose, and whether ----------------------------------------------------------------------------------


def _collect(offers: list[Offered], source: Path, lesson: Lesson, workspace: Workspace) -> list[Outcome]:
    owners = [_owner(offered, lesson) for offered in offers]
    claims = Counter(_folded(student) for student in owners if student)
    if not claims and not any(offered.flaw for offered in offers):
        raise RobustkitError(f"{source} holds no notebook for {lesson.id}; the layouts are {LAYOUTS}.")
    try:
        workspace.submitted.mkdir(parents=True, exist_ok=True)
        known: defaultdict[str, set[str]] = defaultdict(set)
        for path in workspace.submitted.iterdir():
            known[_folded(path.name)].add(path.name)
    except OSError as error:
        raise RobustkitError(
            f"{workspace.submitted} cannot be used ({error.strerror}); name another folder with --into."
        ) from error
    left = MOST_BYTES
    outcomes = []
    for offered, student in zip(offers, owners, strict=True):
        if not offered.flaw and (reason := _not_for_us(offered.name, lesson)):
            outcomes.append(Outcome(shown(offered.name), LEFT_OUT, reason=reason))
            continue
        try:
            owner = _check_owner(offered, student, claims, known)
            left -= offered.size
            if left < 0:
                raise RobustkitError(
                    f"the notebooks have more than {MOST_BYTES // 2**30} GiB together; collect them in parts."
                )
            outcomes.append(_take(offered, owner, lesson, workspace))
        except RobustkitError as error:
            outcomes.append(Outcome(shown(offered.name), REFUSED, student or "", reason=str(error)))
        except OSError as error:
            raise RobustkitError(
                f"{workspace.submitted} cannot be written ({error.strerror}); make room or name another folder, "
                "and run the same command again."
            ) from error
    return outcomes


def _check_owner(
    offered: Offered, student: str | None, claims: Mapping[str, int], known: Mapping[str, set[str]]
) -> str:
    """The student whom the file is for, and who is nobody else. Raises: RobustkitError with the reason."""
    if offered.flaw:
        raise RobustkitError(f"{offered.flaw}; hand in a plain notebook.")
    if not student:
        raise RobustkitError(f"its place does not say whose it is; the layouts are {LAYOUTS}.")
    check_student(student)
    if offered.size > notebooks.MOST_BYTES:
        raise RobustkitError(
            f"it has more than {notebooks.MOST_BYTES // 2**20} MiB, the limit; make it smaller."
        )
    if (count := claims[_folded(student)]) > 1:
        raise RobustkitError(
            f"{count} files are for {student}, whom upper and lower case do not tell apart; keep one."
        )
    alike = known.get(_folded(student), {student})
    if student not in alike:
        raise RobustkitError(
            f"{min(alike)} is there already and differs from {student} by case alone; rename one."
        )
    return student


def _owner(offered: Offered, lesson: Lesson) -> str | None:
    """Whose notebook of the lesson it is, by its place; None where that does not say, or nothing is meant."""
    *folders, file = offered.name.split("/")
    stem = file.removesuffix(".ipynb")
    if _not_for_us(offered.name, lesson) or stem == file:
        return None
    match folders:
        case [student, folder] if folder == stem == lesson.id:
            return student
        case [student] if stem == lesson.id:
            return _MOODLE_FOLDER.sub("", student)
        case [] if flat := re.fullmatch(rf"([^_]+)_(?:.*_)?{re.escape(lesson.id)}(?:-\d+)?", stem):
            return flat[1]  # what follows is the learner's to choose
        case [] if stem not in LESSONS and not _EXPORTED.search(stem):
            return stem
    return None


def _not_for_us(name: str, lesson: Lesson) -> str:
    """Why a file was not meant to be graded now; "" where it may be."""
    parts = name.split("/")
    stem = parts[-1].removesuffix(".ipynb")
    if any(part.startswith(".") or part == "__MACOSX" for part in parts):
        return "hidden, such as a checkpoint"
    if not name.lower().endswith(".ipynb"):
        return "not a notebook"
    if parts[1:3] == [lesson.id, EARLIER]:
        return "an earlier hand-in"
    if len(parts) in (2, 3) and stem in LESSONS and stem != lesson.id:
        return "another lesson"
    return ""


def _folded(student: str) -> str:
    """What two names have in common that some file system takes for one."""
    return unicodedata.normalize("NFKC", student).casefold()


# --- into submitted/ -----------------------------------------------------------------------------------


def _take(offered: Offered, student: str, lesson: Lesson, workspace: Workspace) -> Outcome:
    """Read the notebook, check that it is one of the lesson, write it. Raises: RobustkitError with the reason."""
    data = offered.read()
    found = notebooks.lesson_of(notebooks.parse_submission(data, "it"))
    if found != lesson:
        raise RobustkitError(f"it has the cells of {found.id}; collect it with --lesson {found.id}.")
    path = workspace.submission(student, lesson.id)
    for folder in (path.parent.parent, path.parent):
        _own_folder(folder)
    at = offered.at.strftime(_NBGRADERS_FORMAT) if offered.at else ""
    action, reason = COLLECTED, "" if at else "no time is known, so it counts as in time"
    if path.is_symlink() or path.exists():
        old = files.read_plain(path, notebooks.MOST_BYTES)
        if old == data:
            return Outcome(shown(offered.name), UNCHANGED, student)
        before = _handed_in(path)
        if offered.at and offered.at < before:
            raise RobustkitError(
                f"{student} handed in another one later, on {before:%Y-%m-%d %H:%M:%S %Z}; "
                "to take this one, remove that."
            )
        _own_folder(path.parent / EARLIER)
        kept = path.parent / EARLIER / f"{before:%Y-%m-%dT%H%M%SZ}-{sha256(old)[:8]}.ipynb"
        write_atomically(kept, old)
        action, reason = REPLACED, f"the one before is {EARLIER}/{kept.name}"
    # The time first: stopped between the two, the same command does the rest.
    if at:
        write_atomically(path.parent / TIMESTAMP, f"{at}\n".encode())
    else:
        (path.parent / TIMESTAMP).unlink(missing_ok=True)
    write_atomically(path, data)
    return Outcome(shown(offered.name), action, student, at, reason)


def _own_folder(path: Path) -> None:
    """A folder at `path`, made where there is none. Raises: RobustkitError when a link or a file is there."""
    try:
        path.mkdir()
    except FileExistsError:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise RobustkitError(f"{path} is not a folder of its own; remove it.") from None


def _handed_in(path: Path) -> datetime:
    """When the notebook that is there was handed in: by its timestamp.txt, else by the file."""
    from nbgrader.utils import parse_utc  # slow to load, and rarely needed

    try:
        text = files.read_plain(path.parent / TIMESTAMP, 2**10).decode()
        at: datetime = parse_utc(text.strip())
        return at.replace(tzinfo=UTC)
    except (RobustkitError, ValueError, OverflowError):
        return _moment(path.lstat().st_mtime) or datetime.fromtimestamp(0, UTC)
