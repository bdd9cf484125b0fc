"""Files that somebody else wrote, read without following or believing them."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from robustkit.errors import RobustkitError

MOST_DEPTH = 20

_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_plain(path: Path, most: int) -> bytes:
    """The bytes of a plain file of at most `most` bytes.

    Raises: RobustkitError when it is missing, a link, a pipe, a device, a folder, or larger.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise RobustkitError(
            f"{path} cannot be opened ({error.strerror}); put a plain file there."
        ) from error
    return _read(handle, path, most)


def read_beneath(folder: Path, name: str, most: int) -> bytes:
    """As `read_plain`, for `name` within `folder`, where no part of `name` may be a link and the file has no
    second name: others may write there while it is read.
    """
    *folders, file = name.split("/")
    opened = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        for part in folders:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            opened.append(os.open(part, flags, dir_fd=opened[-1]))
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=opened[-1])
    except OSError as error:
        raise RobustkitError(f"it cannot be opened ({error.strerror}); put a plain file there.") from error
    finally:
        for folder_handle in opened:
            os.close(folder_handle)
    if odd := oddity(os.fstat(handle)):
        os.close(handle)
        raise RobustkitError(f"it is {odd}; put a plain file there.")
    return _read(handle, folder / name, most)


def _read(handle: int, path: Path, most: int) -> bytes:
    """What the open file holds; closes it."""
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise RobustkitError(f"{path} is not a plain file; put one there.")
        with os.fdopen(handle, "rb", closefd=False) as file:
            data = file.read(most + 1)
    finally:
        os.close(handle)
    if len(data) > most:
        raise RobustkitError(f"{path.name} has more than {most // 2**20} MiB, the limit; make it smaller.")
    return data


def oddity(found: os.stat_result) -> str:
    """What an entry is that is neither a folder nor a plain file with one name; "" where it is one of these."""
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFREG:
        return "" if found.st_nlink == 1 else "a file with a second name (a hard link)"
    return "" if kind == stat.S_IFDIR else kind_of(kind)


def kind_of(kind: int) -> str:
    """The file type of a mode (S_IFMT) in words."""
    return _KINDS.get(kind, "no plain file")


def walk(folder: Path, most: int) -> Iterator[tuple[str, os.stat_result]]:
    """Everything beneath `folder`, in order: its name, with /, and its own status. No link is followed, also
    where one takes a folder's place meanwhile.

    Raises: RobustkitError when there are more than `most` entries, they lie too deep, or cannot be read.
    """
    count = 0
    try:
        for here, folders, names, handle in os.fwalk(folder, onerror=_raise):
            folders.sort()
            below = Path(here).relative_to(folder)
            for name in sorted([*folders, *names]):
                count += 1
                if count > most or len(below.parts) >= MOST_DEPTH:
                    raise RobustkitError(
                        f"{folder} holds more than {most} entries or folders more than {MOST_DEPTH} deep; "
                        "leave there what is to be graded."
                    )
                yield (below / name).as_posix(), os.stat(name, dir_fd=handle, follow_symlinks=False)
    except OSError as error:
        raise RobustkitError(
            f"{folder} cannot be searched ({error.strerror}); make its folders readable."
        ) from error


def _raise(error: OSError) -> None:
    raise error


def blank_plain(path: Path, content: bytes = b"") -> None:
    """A plain file at `path` that holds `content`: the same file where there is one, so that a sandbox which
    has it mounted sees it; a new one in place of a link, a folder or anything else.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags, 0o600)
    except OSError:
        handle = -1
    # A second name could be that of a file that is not the learner's.
    if handle >= 0 and oddity(os.fstat(handle)):
        os.close(handle)
        handle = -1
    if handle < 0:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        handle = os.open(path, flags | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.truncate(0)
        file.write(content)
