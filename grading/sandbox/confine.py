"""The launcher of a confined kernel, and the kernel interfaces that it uses. Standard library alone.

    python -I -S confine.py supervise SPEC COMMAND...    outside: starts COMMAND, and ends everything with the grader
    python -I -S confine.py enter SPEC COMMAND...        inside: gives rights up, then becomes COMMAND

It runs before anything of the learner's, and as little as possible of Python: no site-packages, no environment.
SPEC is JSON. Linux on x86-64 and 64-bit ARM.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import select
import signal
import stat
import struct
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# --- seccomp: system calls that no notebook needs --------------------------------------------------
# Numbers on x86-64 and on 64-bit ARM, from the kernel's tables; None where there is no such call.

_Numbers = tuple[int | None, int | None]
_FORBIDDEN: dict[str, _Numbers] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # mounts and namespaces: the way out of a file-system sandbox
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    # large and often broken parts of the kernel
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    # the machine
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "sethostname": (170, 161),
    "personality": (135, 92),
}
# Where nothing but seccomp stands between a kernel and the host's sockets: Landlock does not guard
# connect() to a socket's file. And nobody leaves the process group, so that one signal reaches all.
_FORBIDDEN_ON_HOST: dict[str, _Numbers] = {
    "connect": (42, 203),
    "setsid": (112, 157),
    "setpgid": (109, 154),
}
_SOCKET, _CLONE3 = (41, 198), (435, 435)
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # audit number, column above

_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS, _EOPNOTSUPP = 1, 38, 95


def seccomp_program(*, on_host: bool) -> bytes:
    """The filter as classic BPF: everything is allowed but the calls above.

    `on_host`: without a network namespace; only stream sockets of AF_UNIX, and no connect.
    """
    audit, column = _MACHINES[platform.machine()]
    program: list[bytes] = []

    def add(code: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        program.append(struct.pack("HBBI", code, if_true, if_false, value))

    add(_LOAD, 4)  # the architecture
    add(_EQUAL, audit, 1, 0)
    add(_RETURN, _KILL)
    add(_LOAD, 0)  # the number of the call
    if column == 0:
        add(_AT_LEAST, 0x40000000, 0, 1)  # the x32 table would be a second set of numbers
        add(_RETURN, _KILL)
    for numbers in [*_FORBIDDEN.values(), *(_FORBIDDEN_ON_HOST.values() if on_host else ())]:
        number = numbers[column]
        if number is not None:
            add(_EQUAL, number, 0, 1)
            add(_RETURN, _FAIL | _EPERM)
    # clone3 hides its flags from a filter; told that there is none, the C library falls back to clone.
    add(_EQUAL, _CLONE3[column], 0, 1)
    add(_RETURN, _FAIL | _ENOSYS)
    if on_host:
        # EOPNOTSUPP: libzmq aborts when a netlink socket fails with anything else.
        add(_EQUAL, _SOCKET[column], 0, 7)
        add(_LOAD, 16)  # the family
        add(_EQUAL, 1, 1, 0)  # AF_UNIX
        add(_RETURN, _FAIL | _EOPNOTSUPP)
        add(_LOAD, 24)  # the type, without its flags
        add(_AND, 0xF)
        add(_EQUAL, 1, 1, 0)  # SOCK_STREAM
        add(_RETURN, _FAIL | _EOPNOTSUPP)
    add(_RETURN, _ALLOW)
    return b"".join(program)


def load_seccomp(program: bytes) -> None:
    """Install the filter for this process and all that it will start."""
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)), 16
    )
    if _libc.prctl(22, 2, header, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp")


# --- Landlock: which files ---------------------------------------------------------------------------

_EXECUTE, _WRITE, _READ, _LIST, _REMOVE_DIR, _REMOVE, _MAKE_DEVICE = 1, 2, 4, 8, 16, 32, 64
_MAKE_SOCKET, _MAKE_BLOCK, _TRUNCATE, _IOCTL = 1 << 9, 1 << 11, 1 << 14, 1 << 15


def landlock_version() -> int:
    """The version of Landlock in this kernel; 0 where there is none."""
    version = _libc.syscall(444, None, ctypes.c_size_t(0), 1)
    return max(int(version), 0)


def load_landlock(
    read: Sequence[str], write: Sequence[str], sockets: Sequence[str], lists: Sequence[str]
) -> None:
    """From here on this process reads, writes and makes sockets below these paths, and nothing elsewhere.

    `lists` may be listed, not read. Paths that do not exist are skipped.
    """
    version = landlock_version()
    handled = (1 << 13) - 1
    for since, right in ((2, 1 << 13), (3, _TRUNCATE), (5, _IOCTL)):
        handled |= right if version >= since else 0
    network = 3 if version >= 4 else 0  # bind and connect over TCP
    scoped = 3 if version >= 6 else 0  # abstract sockets and signals of others
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("QQQ", handled, network, scoped)[:size]
    rules = _call(444, ctypes.c_char_p(attributes), ctypes.c_size_t(size), 0)
    of_a_file = _EXECUTE | _WRITE | _READ | _TRUNCATE | _IOCTL
    for paths, rights in (
        (read, _EXECUTE | _READ | _LIST),
        (write, handled & ~(_MAKE_DEVICE | _MAKE_BLOCK)),
        (sockets, _READ | _LIST | _REMOVE | _MAKE_SOCKET),
        (lists, _LIST),
    ):
        for path in paths:
            try:
                handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
            allowed = rights & handled if is_folder else rights & handled & of_a_file
            _call(445, rules, 1, ctypes.c_char_p(struct.pack("=Qi", allowed, handle)), 0)
            os.close(handle)
    _call(446, rules, 0)
    os.close(rules)


def _call(*arguments: Any) -> int:
    result = int(_libc.syscall(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# --- inside ------------------------------------------------------------------------------------------


def enter(spec: dict[str, Any], command: list[str]) -> None:
    """Give up what the notebook does not need, and become `command`."""
    for name, value in spec["limits"].items():
        which = getattr(resource, f"RLIMIT_{name.upper()}")
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    os.chdir(spec["folder"])
    _libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: no set-uid program gives anything back
    if landlock_version():
        load_landlock(**spec["landlock"])
    load_seccomp(seccomp_program(on_host=spec["on_host"]))
    nothing = os.open("/dev/null", os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)  # the grader's terminal is none of the notebook's business
    os.closerange(3, 4096)
    os.execve(command[0], command, spec["environment"])


# --- outside -----------------------------------------------------------------------------------------


def supervise(spec: dict[str, Any], command: list[str]) -> None:
    """Run `command`, and end with it, with the grader, or when its folders grow over their budget.

    The grader holds the other end of the pipe `spec["alive"]`; when it ends, in whatever way, the pipe
    closes. This process leads the group that everything below it is in, or is the parent of a namespace
    that dies with it.
    """
    child = os.fork()
    if child == 0:
        for group in spec["cgroups"]:
            with open(f"{group}/cgroup.procs", "w", encoding="ascii") as procs:  # noqa: PTH123
                procs.write("0")
        os.execv(command[0], command)
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(spec["alive"], select.POLLIN | select.POLLHUP)
    poll.register(ended, select.POLLIN)
    while not poll.poll(250):
        if _bytes_below(spec["watched"]) > spec["budget"]:
            break
    end_all()


def end_all() -> None:
    """Kill the whole process group, this process included."""
    os.killpg(0, signal.SIGKILL)
    time.sleep(60)


def _bytes_below(folders: Sequence[str]) -> int:
    """What the folders hold on the disk; a file counts at least a block, so that empty ones add up too."""
    total = 0
    for folder in folders:
        for root, _, names in os.walk(folder):
            total += 4096
            for name in names:
                try:
                    total += max(512 * os.lstat(f"{root}/{name}").st_blocks, 4096)
                except OSError:
                    continue  # gone by now
    return total


if __name__ == "__main__":
    roles: dict[str, Callable[[dict[str, Any], list[str]], None]] = {"supervise": supervise, "enter": enter}
    roles[sys.argv[1]](json.loads(sys.argv[2]), sys.argv[3:])
