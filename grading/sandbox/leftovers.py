"""What a killed grader leaves behind, its run folders and control groups, and how the next one removes it.

Their names say whose they are: the process, when it started, and in which process namespace. So a process that
has the number of a dead one is not taken for it, and what belongs to another container is left alone.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = "rk-"  # short: the path of a socket in such a folder has at most 107 bytes


def owned_name() -> str:
    """A new name that says it is this process's."""
    return f"{_namespace()}-{os.getpid()}-{_started(os.getpid())}-{secrets.token_hex(4)}"


def abandoned(name: str) -> bool:
    """Whether the process that chose the name is gone. False where that cannot be known from here."""
    namespace, *numbers = name.split("-")[:3]
    if namespace != _namespace() or len(numbers) < 2 or not all(number.isdecimal() for number in numbers):
        return False
    return _started(int(numbers[0])) != numbers[1]


@contextmanager
def run_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder of this process in `parent` (default: where temporary files go), removed at the end."""
    folder = Path(parent or tempfile.gettempdir(), FOLDER + owned_name())
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_folders(parent: Path | None = None) -> int:
    """Remove the run folders of this user whose process is gone; how many there were."""
    count = 0
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{FOLDER}*"):
        if abandoned(folder.name.removeprefix(FOLDER)) and folder.lstat().st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)  # which follows no link
            count += 1
    return count


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:  # no Linux
        return "0"


def _started(pid: int) -> str:
    """When the process started, in ticks since the machine did; "" where there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = status.rpartition(")")[2].split()  # behind the name, which may hold anything
    return "" if fields[0] in "ZX" else fields[19]
