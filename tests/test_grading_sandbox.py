"""What a sandbox is made of, where this machine cannot run it: the other processor's filter, cgroups of version 2."""

from __future__ import annotations

import platform
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from grading.sandbox import cgroups, confine

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
COLUMN = {"x86_64": 0, "aarch64": 1}
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_* of linux/audit.h
ALLOWED, KILLED, REFUSED = 0x7FFF0000, 0x80000000, 0x00050001
CALLS = {**confine._FORBIDDEN, **confine._FORBIDDEN_ON_HOST}

each_machine = pytest.mark.parametrize("machine", AUDIT)


# --- seccomp -----------------------------------------------------------------------------------------


@each_machine
def test_the_numbers_are_those_of_the_kernels_headers(machine):
    if not HEADERS[machine].exists():
        pytest.skip(f"no kernel headers for {machine} here (Debian: linux-libc-dev)")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text())
    table = {name: int(number) for name, number in found}
    for name, numbers in {**CALLS, "socket": confine._SOCKET, "clone3": confine._CLONE3}.items():
        assert numbers[COLUMN[machine]] == table.get(name), name


def run(program: bytes, call: int, audit: int, *arguments: int) -> int:
    """What a filter says to a system call: classic BPF, interpreted."""
    data = struct.pack("<IIQ6Q", call, audit, 0, *(*arguments, *[0] * 6)[:6])
    instructions = list(struct.iter_unpack("HBBI", program))
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        if code == 0x20:  # load a word of the data
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code in (0x15, 0x35):  # jump where equal, where at least
            at += if_true if (accumulator == value if code == 0x15 else accumulator >= value) else if_false
        else:
            assert code == 0x06
            return value


@each_machine
@pytest.mark.parametrize("on_host", [False, True])
def test_the_filter_refuses_what_is_forbidden_and_nothing_else(machine, on_host, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    program, audit = confine.seccomp_program(on_host=on_host), AUDIT[machine]
    listed = CALLS if on_host else confine._FORBIDDEN
    forbidden = {numbers[COLUMN[machine]] for numbers in listed.values()} - {None}
    for call in range(470):
        if call == 435:  # clone3: ENOSYS, so that the C library takes clone
            assert run(program, call, audit) == 0x00050000 + 38
        elif not (on_host and call == confine._SOCKET[COLUMN[machine]]):
            assert run(program, call, audit) == (REFUSED if call in forbidden else ALLOWED)
    (other,) = set(AUDIT.values()) - {audit}
    for foreign in (other, 0x40000003):  # the other processor's calls, and those of 32-bit x86
        assert run(program, 0, foreign) == KILLED
    if machine == "x86_64":
        assert run(program, 0x40000000 + 59, audit) == KILLED  # the x32 numbers


@each_machine
def test_on_the_host_only_stream_sockets_of_unix_are_made(machine, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    program, socket = confine.seccomp_program(on_host=True), confine._SOCKET[COLUMN[machine]]
    unix, inet, inet6, netlink, packet = 1, 2, 10, 16, 17
    stream, datagram, raw, flags = 1, 2, 3, 0o2004000  # SOCK_CLOEXEC and SOCK_NONBLOCK
    for kind in (stream, stream | flags):
        assert run(program, socket, AUDIT[machine], unix, kind) == ALLOWED
    for family, kind in (
        *((family, stream) for family in (0, inet, inet6, netlink, packet, 40)),
        *((unix, kind) for kind in (datagram, raw, datagram | flags, 5)),
    ):
        assert run(program, socket, AUDIT[machine], family, kind) == 0x00050000 + 95


# --- cgroups of version 2 ----------------------------------------------------------------------------


@pytest.fixture
def version_2(tmp_path, monkeypatch):
    """A folder like the root of version 2; groups in it have files that anything can be written to."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    real = Path.mkdir

    def mkdir(path: Path, *arguments: object) -> None:
        real(path, *arguments)
        for name in ("memory.max", "memory.swap.max", "pids.max", "cgroup.procs"):
            (path / name).touch()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    return tmp_path


def test_one_group_of_version_2_limits_memory_swap_and_processes(version_2):
    (group,) = cgroups.make(2**30, 64)
    assert group.name.startswith("robustkit-")
    wanted = {"memory.max": str(2**30), "memory.swap.max": "0", "pids.max": "64", "cgroup.procs": ""}
    assert {file.name: file.read_text() for file in group.iterdir()} == wanted


@pytest.mark.parametrize(
    ("own", "beside"), [("/user.slice/session-1.scope", "user.slice"), ("/grader", "."), ("/", ".")]
)
def test_a_group_of_version_2_lies_beside_the_graders_own(version_2, own, beside, monkeypatch):
    """A group that holds processes cannot limit groups below it."""
    (version_2 / "user.slice").mkdir()
    real = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, **said: f"1:name=systemd:/\n0::{own}\n" if path.name == "cgroup" else real(path, **said),
    )
    (group,) = cgroups.make(2**30, 64)
    assert group.parent.resolve() == (version_2 / beside).resolve()


def test_where_version_2_hands_nothing_down_there_is_no_group_and_nothing_is_left(tmp_path, monkeypatch):
    (tmp_path / "cgroup.controllers").write_text("")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError()))
    assert cgroups.make(2**30, 64) == []
    assert [path.name for path in tmp_path.iterdir()] == ["cgroup.controllers"]


def hierarchy() -> Path | None:
    """Where a hierarchy of version 2 is mounted here, if groups can be made in it."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    for place in (Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"):
        try:
            (place / "robustkit-probe").mkdir()
        except OSError:
            continue
        (place / "robustkit-probe").rmdir()
        return place
    return None


@pytest.mark.skipif(hierarchy() is None, reason="no cgroups of version 2 can be made here")
def test_a_group_of_version_2_is_killed_with_all_that_forks_in_it_and_removed():
    place = hierarchy()
    assert place is not None
    group = place / "robustkit-of-a-test"
    group.mkdir()
    forks = "import os, time\nfor _ in range(3): os.fork()\nprint(flush=True)\ntime.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", f"input()\n{forks}"], stdin=-1, stdout=-1) as parent:
        try:
            (group / "cgroup.procs").write_text(str(parent.pid))
            assert parent.stdin is not None
            assert parent.stdout is not None
            parent.stdin.write(b"\n")
            parent.stdin.flush()
            assert [parent.stdout.readline() for _ in range(8)] == [b"\n"] * 8
            assert len((group / "cgroup.procs").read_text().split()) == 8
        finally:
            cgroups.kill([group])
            cgroups.remove([group])
    assert parent.returncode == -9
    assert not group.exists()
