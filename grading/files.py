"""Files that somebody else wrote, read without following or believing them."""

from __future__ import annotations

import os
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
