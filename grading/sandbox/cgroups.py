"""Control groups: limits of memory and processes for a kernel and all it starts, where they can be made."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from grading.sandbox import leftovers

ROOT = Path("/sys/fs/cgroup")
_PREFIX = "robustkit-"


def make(memory: int, processes: int) -> list[Path]:
    """New groups with these limits: one in version 2, one per controller in version 1, none where it is not allowed."""
    name = f"{_PREFIX}{leftovers.owned_name()}"
    made: list[Path] = []
    try:
        for parent, settings in _places(memory, processes):
            group = parent / name
            group.mkdir()
            made.append(group)
            for file, value in settings.items():
                (group / file).write_text(str(value), encoding="ascii")
    except OSError:  # not allowed, or a controller that is not handed down to us: no group at all
        remove(made)
        return []
    return made


def places() -> list[Path]:
    """The folders in which groups can be made."""
    return [parent for parent, _ in _places(0, 0)]


def _places(memory: int, processes: int) -> Iterator[tuple[Path, dict[str, int]]]:
    """The folders in which groups can be made, and what to write there."""
    if (ROOT / "cgroup.controllers").exists():  # version 2; a group with processes has no limited children
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
        own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
        parent = (ROOT / own.lstrip("/")).parent if own != "/" else ROOT
        if os.access(parent, os.W_OK):
            yield parent, {"memory.max": memory, "memory.swap.max": 0, "pids.max": processes}
        return
    for controller, file, value in (
        ("memory", "memory.limit_in_bytes", memory),
        ("pids", "pids.max", processes),
    ):
        if os.access(ROOT / controller, os.W_OK):
            yield ROOT / controller, {file: value}


def kill(groups: Sequence[Path]) -> None:
    """End every process in the groups, those that fork meanwhile too."""
    for group in groups:
        for _ in range(100):
            try:
                pids = (group / "cgroup.procs").read_text(encoding="ascii").split()
            except OSError:
                break
            if not pids:
                break
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.01)


def remove(groups: Sequence[Path]) -> None:
    """Remove the groups; their processes are dead, but the kernel takes a moment to notice."""
    for group in groups:
        for _ in range(100):
            try:
                group.rmdir()
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.02)
            else:
                break


def sweep() -> int:
    """Remove the groups of graders that are gone, with whatever still runs in them; how many there were."""
    left = [group for parent in places() for group in leftovers.abandoned_in(parent, _PREFIX)]
    kill(left)
    remove(left)
    return len(left)
