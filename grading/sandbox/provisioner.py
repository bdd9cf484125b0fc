"""A jupyter_client kernel provisioner: the kernel of a notebook that nobody trusts.

Tier "bwrap": user, mount, process, network, IPC and host-name namespaces by bubblewrap: a read-only root with
little in it, no network, a folder in memory. Tier "landlock", where namespaces are forbidden: Landlock for files
and signals, seccomp for sockets. Both: seccomp, resource limits, a control group where one can be made, messages
over ipc sockets in one folder, and an end with the grader's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from traitlets import Float, Integer, List, Unicode

import robustkit
from grading.sandbox import cgroups, confine

_MESSAGE_BYTES = 32 * 2**20  # the largest message that the grader takes from a kernel
_ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "fonts", "mime.types", "alternatives")
_SYSTEM = ("/usr", "/sys/devices/system/cpu", *(f"/etc/{name}" for name in _ETC))
_MERGED = ("/bin", "/sbin", "/lib", "/lib32", "/lib64")  # on most systems links into /usr
_PROC = ("self", "cpuinfo", "meminfo", "stat", "loadavg", "sys/kernel", "sys/vm")


class CappedClient(AsyncKernelClient):
    """A kernel client whose sockets refuse what is too large, before it is in our memory."""

    def _context_default(self) -> zmq.asyncio.Context:
        context = super()._context_default()
        context.setsockopt(zmq.MAXMSGSIZE, _MESSAGE_BYTES)
        return context


class SandboxProvisioner(LocalProvisioner):
    """Starts the kernel confined, and leaves nothing of it running."""

    tier = Unicode(help="bwrap or landlock")
    memory = Integer(help="bytes; of the control group, or of the address space where there is none")
    processes = Integer(help="processes and threads at most")
    seconds = Float(help="the kernel is killed after so long, whatever it does")
    disk = Integer(help="bytes of files that the kernel may have at a time")
    readable = List(Unicode(), help="data that the kernel may read")
    exchange_in = Unicode(help="the file in the kernel's folder that the grader writes and the kernel reads")
    exchange_out = Unicode(help="the file in the kernel's folder that the kernel writes and the grader reads")

    groups: list[Path]
    alive: int = -1  # our end of the pipe whose closing ends the kernel
    timer: threading.Timer | None = None

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        manager: Any = self.parent
        manager.transport = "ipc"
        kwargs = await super().pre_launch(**kwargs)
        folder = Path(kwargs["cwd"]).resolve()
        sockets = Path(manager.connection_file).resolve().parent
        environment = dict(kwargs["env"])
        environment.pop("JPY_PARENT_PID", None)  # of another process namespace: the kernel would exit
        environment["PYTHONPATH"] = str(_library(sockets))
        self.groups = cgroups.make(self.memory, self.processes)
        confine_file = str(Path(confine.__file__).resolve())
        enter = [
            sys.executable,
            "-I",
            "-S",
            confine_file,
            "enter",
            json.dumps(self._inside(folder, sockets, environment)),
            *kwargs["cmd"],
        ]
        if self.tier == "bwrap":
            enter = [*self._bubble(folder, sockets), "--", *enter]
        self._theirs, self.alive = os.pipe()  # the supervisor reads from its end until ours is closed
        outside = {
            "alive": self._theirs,
            "cgroups": [str(group) for group in self.groups],
            "watched": [str(sockets)] if self.tier == "bwrap" else [str(sockets), str(folder)],
            "budget": self.disk,
        }
        kwargs["cmd"] = [sys.executable, "-I", "-S", confine_file, "supervise", json.dumps(outside), *enter]
        kwargs["env"] = {"PATH": os.environ.get("PATH", os.defpath)}
        kwargs["cwd"] = str(sockets)
        kwargs["pass_fds"] = (self._theirs,)
        return kwargs

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        try:
            return await super().launch_kernel(cmd, **kwargs)
        finally:
            os.close(self._theirs)

    async def post_launch(self, **kwargs: Any) -> None:
        await super().post_launch(**kwargs)
        # Not on the event loop, which may be waiting for the very kernel that does not answer.
        self.timer = threading.Timer(self.seconds, self._end)
        self.timer.daemon = True
        self.timer.start()

    async def send_signal(self, signum: int) -> None:
        # An interrupt goes by message: as a signal it would end the supervisor, not the cell.
        if signum == signal.SIGKILL:
            self._end()
        elif signum == 0:
            await super().send_signal(signum)

    async def kill(self, restart: bool = False) -> None:
        self._end()

    async def terminate(self, restart: bool = False) -> None:
        self._end()

    async def cleanup(self, restart: bool = False) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self._end()
        if self.process is not None:
            self.process.wait()
        cgroups.remove(self.groups)
        await super().cleanup(restart)

    def _end(self) -> None:
        """Close the pipe, kill the group: the supervisor, and in the landlock tier everything below it."""
        if self.alive >= 0:
            os.close(self.alive)
            self.alive = -1
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # it leads a session of its own
        cgroups.kill(self.groups)

    def _inside(self, folder: Path, sockets: Path, environment: dict[str, str]) -> dict[str, Any]:
        """What `confine.enter` is told."""
        limits = {"core": 0, "nofile": 1024, "fsize": self.disk, "cpu": int(self.seconds) + 60}
        on_host = self.tier == "landlock"
        if not self.groups:
            limits["as"] = self.memory
            limits["nproc"] = self.processes + (_own_tasks() if on_host else 0)
        read = [*_MERGED, *self._readable(), str(confine.__file__)]
        read += [f"/proc/{name}" for name in _PROC] + ["/dev/urandom", "/dev/random", "/dev/zero"]
        if not on_host:
            read.append("/")  # nothing is in it but what bubblewrap put there
        return {
            "limits": limits,
            "folder": str(folder),
            "environment": environment,
            "on_host": on_host,
            "landlock": {
                "read": read,
                "write": [str(folder), "/dev/null", *([] if on_host else ["/tmp", "/dev/shm", "/proc"])],
                "sockets": [str(sockets)],
                "lists": ["/proc"],
            },
        }

    def _bubble(self, folder: Path, sockets: Path) -> list[str]:
        """The bubblewrap command: what exists inside, and nothing else does."""
        size = ["--size", str(self.disk)]
        command = ["--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
        command += ["--disable-userns", "--die-with-parent", "--clearenv", "--hostname", "sandbox"]
        command += ["--proc", "/proc", "--dev", "/dev"]
        for place in ("/tmp", "/dev/shm"):
            command += [*size, "--tmpfs", place]
        for name in _MERGED:
            link = Path(name)
            command += (
                ["--symlink", str(link.readlink()), name]
                if link.is_symlink()
                else ["--ro-bind-try", name, name]
            )
        for path in self._readable():
            command += ["--ro-bind-try", path, path]
        command += ["--ro-bind", str(confine.__file__), str(confine.__file__)]
        command += [*size, "--tmpfs", str(folder), "--bind", str(sockets), str(sockets)]
        for bind, name in (("--ro-bind", self.exchange_in), ("--bind", self.exchange_out)):
            command += [bind, str(folder / name), str(folder / name)]
        command += ["--remount-ro", "/", "--chdir", str(folder)]
        return [shutil.which("bwrap") or "bwrap", *command]

    def _readable(self) -> list[str]:
        package = str(Path(robustkit.__file__).resolve().parent)
        paths = {*_SYSTEM, sys.prefix, sys.base_prefix, package, *self.readable}
        return sorted(paths, key=len)  # a folder is bound before what lies in it


def _library(sockets: Path) -> Path:
    """A folder that holds the package `robustkit` alone: what else lies beside it is not for learners."""
    library = sockets / "lib"
    library.mkdir(exist_ok=True)
    link = library / "robustkit"
    if not link.is_symlink():
        link.symlink_to(Path(robustkit.__file__).resolve().parent)
    return library


def _own_tasks() -> int:
    """Threads of this user on this machine: the limit on processes counts them all."""
    count = 0
    for entry in os.scandir("/proc"):
        with suppress(OSError):
            if entry.name.isdecimal() and entry.stat().st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{entry.name}/task"))  # noqa: PTH208
    return count
