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
    return f"{os.getpid()}-{_namespace()}-{_started(os.getpid())}-{secrets.token_hex(4)}"


def abandoned(name: str) -> bool:
    """Whether the process that chose the name is gone. False where that cannot be known from here."""
    pid, namespace, started, *_ = [*name.split("-"), "", ""]
    if not pid.isdecimal() or not started.isdecimal() or namespace != _namespace():
        return False
    return _started(int(pid)) != started


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
    """Remove the run folders whose process is gone; how many there were."""
    left = abandoned_in(Path(parent or tempfile.gettempdir()), FOLDER)
    for folder in left:
        shutil.rmtree(folder, ignore_errors=True)  # which follows no link
    return len(left)


def abandoned_in(parent: Path, prefix: str) -> list[Path]:
    """What this user has in a folder under `prefix` and the name of a process that is gone."""
    return [
        path
        for path in parent.glob(f"{prefix}*")
        if abandoned(path.name.removeprefix(prefix)) and path.lstat().st_uid == os.getuid()
    ]


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
