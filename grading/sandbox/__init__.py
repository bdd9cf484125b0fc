"""Kernels for submissions that nobody trusts: `confined` is the seam that `grading.run` calls.

provisioner.py    how such a kernel is started and ended, for jupyter_client
confine.py        the launcher: seccomp, Landlock, limits; standard library alone
cgroups.py        control groups
leftovers.py      whose a run folder or a control group is, for the sweep of those of killed graders
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.factory import KernelProvisionerFactory

from grading.sandbox import cgroups, confine, leftovers
from robustkit.errors import RobustkitError

TIERS = ("bwrap", "landlock")
UNCONFINED = "none"
_NAME = "robustkit-sandbox"


@cache
def available() -> tuple[str, ...]:
    """The tiers that work on this machine, the stronger first; found out by trying."""
    if sys.platform != "linux":
        return ()
    found = []
    bwrap = shutil.which("bwrap")
    if bwrap:
        probe = ["--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
        probe += ["--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "true"]
        if subprocess.run([bwrap, *probe], capture_output=True, timeout=30, check=False).returncode == 0:
            found.append("bwrap")
    if confine.landlock_version() >= 1:
        found.append("landlock")
    return tuple(found)


def choose(wanted: str) -> str:
    """The tier to grade in: the strongest for "auto", otherwise the one that is named.

    Raises: RobustkitError when it cannot be had here; "none" must be asked for by name.
    """
    if wanted == UNCONFINED:
        return wanted
    if wanted != "auto" and wanted not in TIERS:
        raise RobustkitError(
            f"the sandbox {wanted!r} is unknown; choose auto, {', '.join(TIERS)} or {UNCONFINED}."
        )
    here = available()
    if wanted == "auto" and here:
        return here[0]
    if wanted in here:
        return wanted
    raise RobustkitError(
        f"no sandbox ({wanted}) works on this machine; install bubblewrap (apt-get install bubblewrap), use a Linux "
        f"with Landlock, or, for submissions that you trust, say --sandbox {UNCONFINED}."
    )


def sweep() -> int:
    """Remove what graders that were killed left on this machine: groups with all in them, folders. How many."""
    return cgroups.sweep() + leftovers.sweep_folders()


class _OneSpec(KernelSpecManager):
    """Knows one kernel, whatever a notebook asks for."""

    def __init__(self, spec: KernelSpec) -> None:
        super().__init__()
        self._spec = spec

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return self._spec


def confined(
    tier: str,
    *,
    seconds: float,
    readable: Sequence[str] = (),
    memory: int = 4 * 2**30,
    processes: int = 128,
    disk: int = 256 * 2**20,
) -> Callable[[Path], AsyncKernelManager]:
    """A kernel factory for `grading.run`: kernels of this Python in the sandbox `tier`.

    `readable` are folders of data that it may read.
    """
    KernelProvisionerFactory.instance().provisioners[_NAME] = EntryPoint(
        _NAME, "grading.sandbox.provisioner:SandboxProvisioner", "jupyter_client.kernel_provisioners"
    )
    settings = {
        "tier": tier,
        "memory": memory,
        "processes": processes,
        "seconds": float(seconds),
        "disk": disk,
        "readable": list(readable),
        "exchange_in": EXCHANGE_IN,
        "exchange_out": EXCHANGE_OUT,
    }
    spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        display_name=f"Python in the sandbox {tier}",
        language="python",
        interrupt_mode="message",  # a signal would reach the supervisor, not the cell
        metadata={"kernel_provisioner": {"provisioner_name": _NAME, "config": settings}},
    )

    def kernel(folder: Path) -> AsyncKernelManager:
        from grading.sandbox.provisioner import CappedClient

        manager = AsyncKernelManager(
            kernel_name=_NAME,
            kernel_spec_manager=_OneSpec(spec),
            connection_file=str(folder / "kernel.json"),
            transport="ipc",
            ip=str(folder / "s"),
        )
        manager.client_factory = CappedClient
        return manager

    return kernel


# The two files through which a case goes in and evidence comes out; `grading.run` makes them beforehand.
EXCHANGE_IN, EXCHANGE_OUT = "case.npz", "evidence.npz"
