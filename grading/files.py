"""Files that somebody else wrote, read without following or believing them."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from robustkit.errors import RobustkitError


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


def blank_plain(path: Path, content: bytes = b"") -> None:
    """A plain file at `path` that holds `content`: the same file where there is one, so that a sandbox which
    has it mounted sees it; a new one in place of a link, a folder or anything else.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags, 0o600)
    except OSError:
        handle = -1
    if handle >= 0:
        found = os.fstat(handle)
        # A second name could be that of a file that is not the learner's.
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
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
