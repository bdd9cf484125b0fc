"""A PostgreSQL server of a test's own: a fresh cluster in a temporary folder, reached by a socket there."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = max(
    Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: int(path.parent.name)
)
MISSING = "there is no PostgreSQL under /usr/lib/postgresql (Debian: apt install postgresql)"


@contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database. No port is opened; the server and its files are gone at the end."""
    # Not below pytest's folder: that one is closed to the other user, and too long a path for a socket.
    folder = Path(tempfile.mkdtemp(prefix="rk-pg-"))
    user = {"user": "nobody"} if os.geteuid() == 0 else {}  # initdb refuses root
    if user:
        shutil.chown(folder, "nobody")
    options = f"-c listen_addresses= -c fsync=off -k {folder}"

    def pg(program: str, *arguments: str) -> None:
        command = [str(PROGRAMS / program), *arguments, "-D", str(folder / "data")]
        with (folder / "log").open("a") as log:
            done = subprocess.run(command, cwd="/", stdout=log, stderr=log, check=False, **user)
        assert done.returncode == 0, (folder / "log").read_text()[-2000:]

    try:
        pg("initdb", "-U", "grader", "-A", "trust", "-E", "UTF8", "--no-locale", "-N")
        pg("pg_ctl", "start", "-w", "-t", "60", "-o", options, "-l", str(folder / "server.log"))
        try:
            yield f"postgresql+psycopg2://grader@/postgres?host={folder}"
        finally:
            pg("pg_ctl", "stop", "-m", "immediate", "-w")
    finally:
        shutil.rmtree(folder)
