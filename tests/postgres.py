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


class Cluster:
    """A cluster that can be stopped and started: `url` stays the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"postgresql+psycopg2://grader@/postgres?host={folder}"
        self._user = {"user": "nobody"} if os.geteuid() == 0 else {}  # initdb refuses root
        if self._user:
            shutil.chown(folder, "nobody")
        self._pg("initdb", "-U", "grader", "-A", "trust", "-E", "UTF8", "--no-locale", "-N")

    def start(self) -> None:
        options = f"-c listen_addresses= -c fsync=off -k {self.folder}"
        self._pg("pg_ctl", "start", "-w", "-t", "60", "-o", options, "-l", str(self.folder / "server.log"))

    def stop(self) -> None:
        """As when the machine fails: connections break, and the next start recovers from the log."""
        self._pg("pg_ctl", "stop", "-m", "immediate", "-w")

    def _pg(self, program: str, *arguments: str) -> None:
        command = [str(PROGRAMS / program), *arguments, "-D", str(self.folder / "data")]
        with (self.folder / "log").open("a") as log:
            done = subprocess.run(command, cwd="/", stdout=log, stderr=log, check=False, **self._user)
        assert done.returncode == 0, (self.folder / "log").read_text()[-2000:]


@contextmanager
def cluster() -> Iterator[Cluster]:
    """An empty cluster that runs. No port is opened; the server and its files are gone at the end."""
    # Not below pytest's folder: that one is closed to the other user, and too long a path for a socket.
    folder = Path(tempfile.mkdtemp(prefix="rk-pg-"))
    try:
        made = Cluster(folder)
        made.start()
        try:
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(folder)


@contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database, until the end."""
    with cluster() as made:
        yield made.url
