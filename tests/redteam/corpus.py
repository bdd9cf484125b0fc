"""Hostile submissions to the small lesson. Each says what it attempts; none may succeed.

A hostile cell prints LEAK, and what, when it reaches something that it must not reach. Words in @...@ stand for
places and numbers of the machine that grades, filled in by the runner: the attacker is taken to know them all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.fixtures import small_course as small

HONEST = small.SOLUTIONS
WRONG = {
    "s0_distance": "def distance(x, z, norm):\n    return (z - x).flatten(1).sum(1) * 0",
    "s0_project": "def project(x, candidate, eps):\n    return candidate * 0 + 7",
    "s0_robust_accuracy": "def robust_accuracy(correct, fooled):\n    return 2.0",
}


@dataclass(frozen=True)
class Hostile:
    """One submission: what it attempts, its cells, and the points that its honest part earns."""

    name: str
    attempts: str
    cells: dict[str, str] = field(hash=False)
    points: float = 0.0
    after: tuple[str, ...] = ()  # marks of processes that must not outlive it


def _forging(name: str, attempts: str, code: str) -> Hostile:
    """Wrong answers, and code before the first of them that is to make them count."""
    return Hostile(name, attempts, {**WRONG, "s0_distance": f"{WRONG['s0_distance']}\n{code}"})


def _breaking_out(name: str, attempts: str, code: str, points: float = 5.0, **more) -> Hostile:
    """Code in the first exercise that reaches for the machine, and honest answers to the other two."""
    return Hostile(name, attempts, {**HONEST, "s0_distance": code}, points, **more)


# --- points that were not earned -----------------------------------------------------------------------

FORGERIES = (
    _forging(
        "drops_asserts",
        "an AST transformer that removes every assert and comparison from the cells to come",
        """
import ast
class Drop(ast.NodeTransformer):
    def visit_Assert(self, node): return ast.Pass()
    def visit_Compare(self, node): return ast.Constant(True)
get_ipython().ast_transformers.append(Drop())""",
    ),
    _forging(
        "equals_everything",
        "results that are equal to, and close to, whatever they are compared with",
        """
import torch
class Yes(torch.Tensor):
    def __eq__(self, other): return torch.ones(1, dtype=torch.bool)
    def allclose(self, *a, **k): return True
    @classmethod
    def __torch_function__(cls, f, types, args=(), kwargs=None):
        if getattr(f, "__name__", "") in ("allclose", "equal", "isclose"): return True
        return super().__torch_function__(f, types, args, kwargs or {})
def distance(x, z, norm): return torch.zeros(len(x)).as_subclass(Yes)
project = lambda x, candidate, eps: torch.zeros_like(x).as_subclass(Yes)""",
    ),
    _forging(
        "patches_the_shell",
        "a shell that reports success for every cell without running it",
        """
from IPython.core.interactiveshell import ExecutionResult
async def nothing(*a, **k):
    done = ExecutionResult(None); done.execution_count = 1
    return done
get_ipython().run_cell_async = nothing""",
    ),
    _forging(
        "patches_builtins",
        "built-in functions that find everything true, close and of the right type",
        """
import builtins, math
builtins.all = builtins.any = lambda *a: True
builtins.abs = lambda v: 0.0
math.isclose = lambda *a, **k: True""",
    ),
    _forging(
        "patches_torch_and_numpy",
        "comparisons of torch and numpy that always hold",
        """
import torch, numpy as np
torch.equal = torch.allclose = lambda *a, **k: True
np.allclose = np.array_equal = lambda *a, **k: True
np.abs = torch.abs = lambda v: v * 0""",
    ),
    _forging(
        "patches_the_contracts",
        "the lesson's own check, replaced in the kernel by one that finds nothing wrong",
        """
import robustkit.contracts, robustkit.lessons as lessons
for contract in robustkit.contracts.CONTRACTS.values():
    object.__setattr__(contract, "judge", lambda case, evidence: ())
lessons.check = lessons.award = lambda *a: 1000.0
check = lessons.check""",
    ),
    _forging(
        "prints_points",
        "outputs that look like full marks to whoever reads them, nbgrader among them",
        """
import sys
print("7 of 7 points"); print(1000.0); sys.stdout.flush()
1000.0""",
    ),
    _forging(
        "reads_the_frames",
        "answers taken from the local variables of whoever calls, found by walking up the stack",
        """
import inspect
def _steal(shape):
    frame = inspect.currentframe()
    while frame:
        for name, value in list(frame.f_locals.items()):
            if name in ("expected", "reference", "answer", "solution", "truth"):
                return value
        frame = frame.f_back
    return 0
def robust_accuracy(correct, fooled): return float(_steal(()) or 0.77)""",
    ),
    _forging(
        "searches_the_heap",
        "arrays of the grader found among all live objects",
        """
import gc, numpy as np, torch
def distance(x, z, norm):
    for thing in gc.get_objects():
        if isinstance(thing, dict) and any(k in thing for k in ("expected", "reference", "Linf_expected")):
            for key in ("expected", "reference", "Linf_expected"):
                if key in thing: return torch.as_tensor(thing[key])
    return torch.zeros(len(x))""",
    ),
    _forging(
        "reads_the_history",
        "hidden checks found in the history of the session, or by a hook before each cell",
        """
seen = []
get_ipython().events.register("pre_run_cell", lambda info: seen.append(info.raw_cell))
def robust_accuracy(correct, fooled):
    text = " ".join(map(str, seen + In))
    if "exp" + "ected" in text or "sec" + "ret" in text: print("LEAK hidden check in the history")
    return 0.5""",
    ),
    _forging(
        "writes_evidence_meanwhile",
        "a thread that overwrites the evidence file a thousand times a second",
        """
import threading, time, numpy as np
def flood():
    while True:
        try: np.savez("evidence.npz", Linf=np.zeros(8, np.float32), L2=np.zeros(8, np.float32), result=np.ones(1))
        except Exception: pass
        time.sleep(0.001)
threading.Thread(target=flood, daemon=True).start()""",
    ),
    _forging(
        "replays_the_case",
        "the case itself handed back as evidence, under every name that was seen",
        """
import numpy as np, robustkit.lessons as lessons
honest = lessons.save_arrays
def forged(path, arrays):
    with np.load("case.npz") as case: every = dict(case)
    honest(path, {name: next(iter(every.values())) for name in arrays} | every)
lessons.save_arrays = forged""",
    ),
    *(
        _forging(
            f"evidence_is_{name}",
            f"evidence that the judge cannot read safely: {name.replace('_', ' ')}",
            f"""
import os, struct, zipfile, numpy as np, robustkit.lessons as lessons
def forged(path, arrays):
    {code}
lessons.save_arrays = forged""",
        )
        for name, code in (
            ("nan", "np.savez(path, **{k: np.full(np.shape(v), np.nan) for k, v in arrays.items()})"),
            ("infinite", "np.savez(path, **{k: np.full(np.shape(v), np.inf) for k, v in arrays.items()})"),
            ("a_pickle", "np.savez(path, **{k: np.array([{}], dtype=object) for k in arrays})"),
            ("of_another_type", "np.savez(path, **{k: np.array(['x' * 99]) for k in arrays})"),
            ("complex", "np.savez(path, **{k: np.zeros(np.shape(v), complex) for k, v in arrays.items()})"),
            ("huge", "np.savez(path, **{k: np.zeros(30_000_000) for k in arrays})"),
            ("compressed", "np.savez_compressed(path, **{k: np.zeros(50_000_000) for k in arrays})"),
            ("a_lying_header", "open(path, 'wb').write(b'PK\\x03\\x04' + b'\\xff' * 4000)"),
            ("not_a_zip", "open(path, 'wb').write(b'\\x93NUMPY' + os.urandom(4000))"),
            ("missing", "pass"),
            ("a_link", "os.unlink(path); os.symlink('@SECRET@', path)"),
            ("a_hard_link", "os.unlink(path); os.link('@SECRET@', path)"),
            ("a_pipe", "os.unlink(path); os.mkfifo(path)"),
            ("a_folder", "os.unlink(path); os.makedirs(path)"),
        )
    ),
    _forging(
        "forges_messages",
        "messages to the grader with a wrong signature and with none",
        """
kernel = get_ipython().kernel
for parts in ([b"stream", b"<IDS|MSG>", b"bad", b"{", b"{", b"{", b"["], [b""], [b"<IDS|MSG>"]):
    try: kernel.iopub_socket.send_multipart(parts)
    except Exception: pass""",
    ),
    Hostile(
        "shadows_the_libraries",
        "files named numpy.py, torch.py and robustkit.py beside the notebook, and first on the path",
        {
            **WRONG,
            "s0_distance": WRONG["s0_distance"]
            + """
import sys, pathlib, importlib
for name in ("numpy", "torch", "robustkit", "zipfile", "json"):
    pathlib.Path(f"{name}.py").write_text("def __getattr__(n): return lambda *a, **k: 0\\n")
sys.path.insert(0, ""); sys.path.insert(0, ".")""",
        },
    ),
    Hostile(
        "rewrites_the_files_of_the_course",
        "the notebook, the solutions, the gradebook and the records, overwritten from the kernel",
        {
            **WRONG,
            "s0_distance": WRONG["s0_distance"]
            + """
import glob, pathlib
for place in ("@SOLUTION@", "@RELEASE@", "@GRADEBOOK@", "@RECORDS@/x", "@SECRET@", *glob.glob("*.ipynb"), *glob.glob("../*")):
    try:
        with open(place, "ab") as file: file.write(b" ")
        print("LEAK wrote", place)
    except OSError: pass""",
        },
    ),
)

# --- ways out of the kernel -------------------------------------------------------------------------------

_REACH = """
import socket
def reach(what, family, address, kind=socket.SOCK_STREAM):
    try:
        s = socket.socket(family, kind); s.settimeout(2); s.connect(address)
        if kind == socket.SOCK_STREAM: print("LEAK reached", what)
        s.send(b"x")  # a datagram that went off may be lost: the host tells
    except OSError as error: print(what, error)
"""

ESCAPES = (
    _breaking_out(
        "calls_home_over_tcp",
        "connections to a port of the grading machine and to the internet",
        _REACH
        + 'reach("host", socket.AF_INET, ("127.0.0.1", @PORT@)); reach("net", socket.AF_INET, ("192.0.2.1", 80))'
        + '\nreach("host6", socket.AF_INET6, ("::1", @PORT@))',
    ),
    _breaking_out(
        "calls_home_over_udp_and_dns",
        "datagrams to the grading machine, and a look-up of a name",
        _REACH
        + 'reach("udp", socket.AF_INET, ("127.0.0.1", @UDP@), socket.SOCK_DGRAM)\n'
        + 'try: socket.getaddrinfo("example.com", 80); print("LEAK name resolved")\nexcept OSError: pass',
    ),
    _breaking_out(
        "knocks_at_sockets_of_the_host",
        "sockets in the file system, such as a container daemon's",
        _REACH
        + 'reach("file", socket.AF_UNIX, "@SOCKET@"); reach("docker", socket.AF_UNIX, "/var/run/docker.sock")',
    ),
    _breaking_out(
        "knocks_at_abstract_sockets",
        "sockets in the abstract name space, which belongs to the network name space",
        _REACH + 'reach("abstract", socket.AF_UNIX, "\\0@ABSTRACT@")',
    ),
    _breaking_out(
        "reads_what_is_not_its_own",
        "the course secret, solutions, gradebook, other submissions, keys of the host",
        """
import os
for place in ("@SECRET@", "@SOLUTION@", "@GRADEBOOK@", "@OTHER@", "@CANARY@/canary", "/etc/shadow", os.path.expanduser("~root") + "/.ssh/id_rsa"):
    try: print("LEAK read", place, len(open(place, "rb").read(1)))
    except OSError as error: print(error)
try: print("LEAK listed", os.listdir(os.path.dirname("@SECRET@")))
except OSError: pass
try:
    import grading
    print("LEAK imported the grader")
except ImportError: pass""",
    ),
    _breaking_out(
        "reads_the_graders_process",
        "environment, memory and files of the grader through /proc",
        """
import os, glob
if "ROBUSTKIT_REDTEAM" in os.environ: print("LEAK own environment")
for place in ["/proc/@GRADER@/environ", "/proc/@GRADER@/maps", f"/proc/{os.getppid()}/environ", *glob.glob("/proc/[0-9]*/environ")]:
    try:
        if b"ROBUSTKIT_REDTEAM" in open(place, "rb").read(): print("LEAK environment", place)
    except OSError: pass
try: open("/proc/@GRADER@/mem", "r+b"); print("LEAK memory")
except OSError: pass""",
    ),
    _breaking_out(
        "writes_where_it_must_not",
        "files anywhere on the grading machine",
        """
import os
for place in ("@CANARY@/x", "/usr/lib/x-redteam", "/etc/x-redteam", os.path.dirname("@GRADEBOOK@") + "/x", "/var/tmp/x-redteam"):
    try: open(place, "wb").write(b"x"); print("LEAK wrote", place)
    except OSError: pass
import sys
try: open(os.path.join(sys.prefix, "lib", "x-redteam.pth"), "w").write("x"); print("LEAK wrote into the environment")
except OSError: pass""",
    ),
    _breaking_out(
        "traces_and_signals_the_grader",
        "the grader stopped, killed or debugged",
        """
import ctypes, os, signal
for who in (@GRADER@, os.getppid(), 1):
    try: os.kill(who, signal.SIGKILL); print("signalled", who)
    except OSError as error: print(error)
libc = ctypes.CDLL(None, use_errno=True)
if libc.ptrace(16, @GRADER@, 0, 0) == 0: print("LEAK traced")
try: os.kill(-1, signal.SIGCONT)
except OSError: pass""",
    ),
    _breaking_out(
        "mounts_and_makes_name_spaces",
        "new mounts and name spaces, in which it would be root",
        """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for flags in (0x10000000, 0x20000, 0x40000000):
    if libc.unshare(flags) == 0: print("LEAK unshared", hex(flags))
if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0: print("LEAK mounted")
if libc.chroot(b"/") == 0: print("LEAK changed root")
for number in (321, 323, 425, 250, 298):
    if libc.syscall(number, 0, 0, 0, 0, 0) >= 0: print("LEAK system call", number)""",
    ),
    _breaking_out(
        "gains_rights_by_programs",
        "set-uid programs and files of its own with the bit set",
        """
import os, shutil, subprocess
try:
    shutil.copy("/bin/sh", "own-sh"); os.chmod("own-sh", 0o6755); os.chown("own-sh", 0, 0)
except OSError as error: print(error)
for command in (["su", "-c", "id"], ["sudo", "-n", "id"], ["mount"], ["unshare", "-r", "id"]):
    try:
        if subprocess.run(command, capture_output=True, timeout=5).returncode == 0 and command[0] != "mount": print("LEAK ran", command)
    except (OSError, subprocess.SubprocessError): pass""",
    ),
    _breaking_out(
        "swaps_links_in_the_exchange",
        "links in its own folder, so that the grader writes the next case over a file of the host",
        """
import os
for name in ("case.npz", "evidence.npz"):
    try:
        os.unlink(name); os.symlink("@CANARY@/canary", name); print("swapped", name)
    except OSError as error: print(error)""",
        points=5.0,
    ),
)

# --- spending what is not its own -----------------------------------------------------------------------------

_MARK = "rk-redteam-survivor"
BOMBS = (
    _breaking_out(
        "forks",
        "four hundred processes",
        """
import os, time, signal
children = []
try:
    for _ in range(400):
        child = os.fork()
        if child == 0:
            time.sleep(30); os._exit(0)
        children.append(child)
    print("LEAK forked", len(children))
except OSError as error: print("stopped after", len(children), error)
for child in children: os.kill(child, signal.SIGKILL); os.waitpid(child, 0)""",
    ),
    Hostile(
        "eats_memory",
        "twice the memory that it may have",
        {
            **HONEST,
            "s0_robust_accuracy": """
blocks = []
try:
    for _ in range(@MEMORY_MB@ // 32): blocks.append(b"x" * (64 << 20))
    print("LE" + "AK has MB", 64 * len(blocks))
except MemoryError: blocks.clear(); print("MemoryError")""",
        },
        5.0,
    ),
    Hostile(
        "fills_the_disk_with_one_file",
        "a file of a gigabyte",
        {
            **HONEST,
            "s0_robust_accuracy": """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with open("big", "wb") as file:
        for _ in range(64): file.write(b"x" * (16 << 20))
    print("LEAK wrote a gigabyte")
except OSError as error: print(error)""",
        },
        5.0,
    ),
    Hostile(
        "fills_the_disk_with_many_files",
        "a gigabyte in small files",
        {
            **HONEST,
            "s0_robust_accuracy": """
import time
try:
    for i in range(1024):
        with open(f"small-{i}", "wb") as file: file.write(b"x" * (1 << 20))
        time.sleep(0.004)
    print("LEAK wrote a gigabyte")
except OSError as error: print(error)""",
        },
        5.0,
    ),
    _breaking_out(
        "prints_for_ever",
        "two hundred thousand lines",
        "for _ in range(200_000): print('x' * 100)",
    ),
    Hostile(
        "sends_one_huge_message",
        "a message of 128 MB, which the grader would have to hold in memory",
        {
            **HONEST,
            "s0_robust_accuracy": """
from IPython.display import display
display({"text/plain": "x" * (128 << 20)}, raw=True)""",
        },
        5.0,
    ),
    Hostile(
        "loops_and_ignores_interrupts",
        "an endless loop that no interrupt ends",
        {
            **HONEST,
            "s0_robust_accuracy": """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    try:
        while True: pass
    except KeyboardInterrupt: pass""",
        },
        5.0,
    ),
    Hostile(
        "leaves_a_daemon",
        "processes that outlive the kernel, by a double fork and a session of their own",
        {
            **HONEST,
            "s0_robust_accuracy": f"""
import os, subprocess, sys
try: subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", "{_MARK}"], start_new_session=True)
except Exception as error: print(error)
if os.fork() == 0:
    try: os.setsid()
    except OSError: pass
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(300)", "{_MARK}"])
    os._exit(0)""",
        },
        5.0,
        after=(_MARK,),
    ),
    Hostile(
        "crashes_in_c",
        "a null pointer followed: no exception, no reply",
        {**HONEST, "s0_robust_accuracy": "import ctypes\nctypes.string_at(0)"},
        5.0,
    ),
    Hostile(
        "exits_at_once",
        "the process ended from inside, with a status that says success",
        {**HONEST, "s0_robust_accuracy": "import os\nos._exit(0)"},
        5.0,
    ),
    Hostile(
        "recurses",
        "a stack without end",
        {
            **HONEST,
            "s0_robust_accuracy": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
        },
        5.0,
    ),
)

# --- whoever looks at it afterwards -----------------------------------------------------------------------------

PAGES = (
    _breaking_out(
        "shows_scripts",
        "scripts in every kind of output, for the marker's browser",
        """
from IPython.display import HTML, Javascript, SVG, Markdown, IFrame, display
display(HTML("<script>alert('redteam')</script><img src=x onerror=alert('redteam')>"), Javascript("alert('redteam')"))
display(SVG("<svg xmlns='http://www.w3.org/2000/svg' onload=\\"alert('redteam')\\"/>"), Markdown("<script>alert('redteam')</script>"))
display({"text/latex": "$\\\\href{javascript:alert('redteam')}{x}$", "application/vnd.custom+json": {"redteam": 1}}, raw=True)""",
    ),
    _breaking_out(
        "raises_scripts",
        "a script in the text of an exception",
        "class E(Exception): pass\nE.__name__ = \"<script>alert('redteam')</script>\"\n"
        "def distance(x, z, norm):\n    raise E(\"<img src=x onerror=alert('redteam')>\")",
    ),
)

CORPUS = (*FORGERIES, *ESCAPES, *BOMBS, *PAGES)
