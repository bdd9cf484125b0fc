"""Fresh processes, cheaply: a server that has imported the hops, and seen no submission, forks one for each hop.

    with fresh.Server() as server:
        server.hop("judge", evidence, "-o", records)

A fresh interpreter takes seconds to import torch, a fork of one that has, a hundredth of that; each is as
untouched as the other. What a server started ends with it, and it ends with the grader that started it, in
whatever way: no killed grader leaves a half-graded submission running.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from grading.workspace import ONE_THREAD, ROOT
from robustkit.errors import RobustkitError

Told = Callable[[str], object]  # gets each line in which a hop says how far it is

_IMPORTED = ("grading.run", "grading.judge")
_ENDED = "ended with status "  # begins the last line of a hop that was not killed
_MOST_REQUEST = 2**16
_MOST_LINE = 500
_PR_SET_PDEATHSIG = 1


def unheard(line: str) -> None:
    """Told nobody."""


class Server:
    """Runs hops, each in a process of its own; threads may ask side by side. On leaving, what runs is ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None
        self._over = False

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._over = True
            self._end()

    def hop(self, name: str, *arguments: str | Path, told: Told = unheard) -> None:
        """`python -m grading NAME ARGUMENTS` in the clone's folder; `told` gets what it prints to stderr.

        Raises: RobustkitError with its last words when it fails, or was killed.
        """
        ours, theirs = os.pipe()
        with os.fdopen(ours, encoding="utf-8", errors="replace") as lines:
            try:
                self._ask([name, *map(str, arguments)], theirs)
            finally:
                os.close(theirs)
            last = ""
            for line in lines:
                if line.startswith(_ENDED):
                    if line.removeprefix(_ENDED).strip() == "0":
                        return
                    raise RobustkitError(last or f"the hop {name} stopped without a word.")
                last = line.strip()[:_MOST_LINE]
                told(last)
        raise RobustkitError(
            f"the process of the hop {name} was killed; see whether the machine has enough memory."
        )

    def _ask(self, arguments: Sequence[str], said: int) -> None:
        request = json.dumps(arguments).encode()
        with self._lock:
            try:
                socket.send_fds(self._running(), [request], [said])
            except OSError:  # the server has been killed: another one, then
                self._end()
                socket.send_fds(self._running(), [request], [said])

    def _running(self) -> socket.socket:
        if self._over:
            raise RobustkitError("grading was stopped.")
        if self._requests is None:
            self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "grading.fresh", str(theirs.fileno())],
                    cwd=ROOT,
                    env=ONE_THREAD | os.environ,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # Ctrl-C is for the grader, who ends this
                )
        return self._requests

    def _end(self) -> None:
        if self._requests is not None:
            self._requests.close()
            self._requests = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def serve(requests: socket.socket) -> None:
    """Fork a process for each request, until whoever may ask has gone."""
    for module in _IMPORTED:
        import_module(module)
    gc.freeze()  # or the first collection in each child would copy all that it shares
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    here = os.getpid()
    while True:
        request, handles, _, _ = socket.recv_fds(requests, _MOST_REQUEST, 1)
        if not request:
            return
        if os.fork() == 0:
            _become(json.loads(request), handles[0], requests, here)
        os.close(handles[0])


def _become(arguments: Sequence[str], said: int, requests: socket.socket, server: int) -> NoReturn:
    """In the child: do the hop, with stderr to the asker, as `python -m grading` would, and end."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)
        requests.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.set_inheritable(said, False)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a kernel inherits this one
        sys.stderr = os.fdopen(said, "w", buffering=1, encoding="utf-8", errors="replace")
        from grading.__main__ import main

        status = main(arguments)
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        print(f"{_ENDED}{status}", file=sys.stderr, flush=True)
        os._exit(status)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
