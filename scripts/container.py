"""Build the service's image from nothing and run it as the manifests say: `make container`.

A base is made with debootstrap, the image is built of it by deploy/Dockerfile with buildah, and podman runs it with
runc: no network, a read-only root, no capability, uid 10001. Then a client inside sends a real picture over HTTP and
looks at what the container lets it do; the same image must refuse a model that was changed after it was signed.
All of it lies in a temporary folder that is removed. Installs nothing; needs root, for debootstrap.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sbom
import yaml
from packaging.utils import canonicalize_name
from PIL import Image

from robustkit import data
from robustkit.errors import RobustkitError
from robustkit.serve.provision import Provision, provision

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "podman": "podman",
    "buildah": "buildah",
    "runc": "runc",
    "debootstrap": "debootstrap",
    "unshare": "util-linux",
}
SUITE = "bookworm"
CONTEXT = (
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "LICENSE",
    "robustkit",
    "deploy",
    ".dockerignore",
)
USER = 10001

# Runs inside, as the service's own user: a client of the data plane, and somebody who tries what he may.
INSIDE = r"""
import errno, importlib.metadata, json, os, pathlib, socket, sys, time, urllib.request
found = {}
for _ in range(600):
    try:
        found["ready"] = json.load(urllib.request.urlopen("http://127.0.0.1:8000/readyz", timeout=2))
        break
    except OSError:
        time.sleep(0.1)
key = json.loads(pathlib.Path("/run/secrets/robustkit/credentials.json").read_text())["api_key"]
request = urllib.request.Request("http://127.0.0.1:8000/v1/classify", data=sys.stdin.buffer.read(),
                                 headers={"Authorization": f"Bearer {key}"})
found["answer"] = json.load(urllib.request.urlopen(request, timeout=30))
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/1/status").read_text().splitlines())
found["status"] = {name: value.split() for name, value in status.items()}
def tried(path):
    try:
        pathlib.Path(path).write_text("x")
    except OSError as error:
        return errno.errorcode[error.errno]
    return "written"
found["writes"] = {path: tried(path) for path in
                   ("/x", "/usr/bin/x", "/opt/robustkit/x", "/models/champion/x", "/tmp/x", "/state/x")}
found["shells"] = [name for name in ("sh", "bash", "dash", "perl", "apt-get") for folder in ("/bin", "/usr/bin")
                   if pathlib.Path(folder, name).exists()]
found["interfaces"] = [name for _, name in socket.if_nameindex()]
found["packages"] = {d.metadata["Name"].lower().replace("_", "-"): d.version
                     for d in importlib.metadata.distributions()}
print(json.dumps(found))
"""


def main() -> int:
    """Build, run, look; 0 when everything was as it should be."""
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if missing:
        print(f"container: apt install {' '.join(missing)}, then run this again.", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("container: debootstrap needs root; run this with sudo.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="rk-image-") as folder:
        engine = Engine(Path(folder))
        try:
            return _smoke(engine, Path(folder))
        finally:
            engine.clear()


class Engine:
    """podman and buildah on a storage of their own."""

    def __init__(self, folder: Path) -> None:
        self._storage = ["--root", str(folder / "storage"), "--runroot", str(folder / "run-storage")]
        self._storage += ["--storage-driver", "vfs"]
        self._podman = ["podman", *self._storage, "--cgroup-manager", "cgroupfs", "--runtime", "runc"]

    def buildah(self, *arguments: str) -> str:
        return _run(["buildah", *self._storage, *arguments])

    def podman(self, *arguments: str, given: bytes = b"") -> str:
        return _run([*self._podman, *arguments], given=given)

    def run(self, image: str, volumes: Sequence[str], arguments: Sequence[str], *how: str) -> list[str]:
        """The command that runs the service as deploy/ has it."""
        limits = ["--memory", "1536m", "--pids-limit", "256", "--ulimit", "nofile=1024:2048"]
        hardened = ["--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp:size=64m,mode=1777"]
        hardened += ["--cap-drop", "all", "--security-opt", "no-new-privileges", "--network", "none"]
        mounts = [part for volume in volumes for part in ("--volume", volume)]
        given = [*how, *limits, *hardened, "--ulimit", "nproc=4096:4096", *mounts]
        return [*self._podman, "run", *given, image, *arguments]

    def clear(self) -> None:
        """Nothing of it goes on running, or stays mounted."""
        subprocess.run([*self._podman, "rm", "--all", "--force", "--time", "5"], capture_output=True)
        subprocess.run(["buildah", *self._storage, "rm", "--all"], capture_output=True)


def _run(command: Sequence[str], *, given: bytes = b"") -> str:
    done = subprocess.run(command, input=given, capture_output=True)
    if done.returncode != 0:
        said = (done.stdout + done.stderr).decode(errors="replace").strip()[-3000:]
        raise RobustkitError(f"`{' '.join(command)[:300]}` ended with status {done.returncode}: {said}.")
    return done.stdout.decode()


def _say(what: str) -> None:
    print(f"container: {what}", file=sys.stderr, flush=True)


# --- the image ------------------------------------------------------------------------------------------


def _base(engine: Engine, folder: Path) -> str:
    """A base with Python and nothing else, named by its digest."""
    _say(f"debootstrap of {SUITE}")
    ask = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)"]
    targets = _run(ask) if shutil.which("apt-get") else ""  # elsewhere debootstrap knows a mirror
    mirrors = [line.split()[0] for line in targets.splitlines() if line.endswith(f" {SUITE}")]
    rootfs, archive = folder / "rootfs", folder / "rootfs.tar"
    # In a mount name space of its own: what debootstrap mounts is gone with it.
    include = "--include=python3,python3-venv"
    _run(
        ["unshare", "--mount", "debootstrap", "--variant=minbase", include, SUITE, str(rootfs), *mirrors[:1]]
    )
    _run(["tar", "-C", str(rootfs), "--exclude=./var/cache/apt", "-cf", str(archive), "."])
    shutil.rmtree(rootfs)
    engine.podman("import", str(archive), "localhost/base:made")
    archive.unlink()
    digest = engine.podman("image", "inspect", "--format", "{{.Digest}}", "localhost/base:made").strip()
    return f"localhost/base@{digest}"


def _built(engine: Engine, folder: Path, base: str) -> str:
    """The image of deploy/Dockerfile, installed from wheels that were fetched before: the build itself has no index."""
    context = folder / "context"
    context.mkdir()
    for name in CONTEXT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, context / name)
    wheels = context / "deploy" / "wheels"
    _say("fetching wheels")
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--dest", str(wheels), "--only-binary", ":all:"]
    fetch += ["--python-version", "3.11", "-c", str(ROOT / "constraints.txt")]
    _run([*fetch, *sbom.wanted(), "setuptools"])
    _say("building deploy/Dockerfile")
    arguments = ["--build-arg", f"BASE={base}", "--build-arg", "PIP_NO_INDEX=1"]
    place = ["--file", str(context / "deploy" / "Dockerfile"), str(context)]
    engine.buildah("bud", "--isolation", "chroot", *arguments, "--tag", "localhost/robustkit:made", *place)
    shutil.rmtree(context)
    return "localhost/robustkit:made"


# --- the run --------------------------------------------------------------------------------------------


def _arguments() -> list[str]:
    """What the manifests start, but for the store: without PostgreSQL the state is a file of /state."""
    documents = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8"))
    (deployment,) = [document for document in documents if document["kind"] == "Deployment"]
    arguments: list[str] = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    return [argument for argument in arguments if not argument.startswith("--store-file")]


def _given(folder: Path) -> tuple[Provision, list[str]]:
    """What the container is given, readable by its user, and the volumes."""
    made = provision("mnist-clean", folder / "run", "database")
    state, given = folder / "state", folder / "secrets"
    state.mkdir()
    given.mkdir()
    for path in (made.credentials, made.verify_key):
        shutil.copy(path, given)
    for path in (state, *given.iterdir()):
        os.chown(path, USER, USER)
    volumes = [
        f"{made.model.parent}:/models:ro",
        f"{given}:/run/secrets/robustkit:ro",
        f"{state}:/state",
    ]
    return made, volumes


def _picture() -> tuple[bytes, int]:
    """A handwritten digit as PNG, and what it shows."""
    digits = data.load("digits", "test", limit=1)
    pixels = (digits.x[0, 0] * 255).round().byte().numpy()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue(), int(digits.y[0])


def _smoke(engine: Engine, folder: Path) -> int:
    image = _built(engine, folder, _base(engine, folder))
    made, volumes = _given(folder)
    _say("running it")
    picture, digit = _picture()
    _run(engine.run(image, volumes, _arguments(), "--detach", "--name", "service"))
    try:
        found = json.loads(
            engine.podman("exec", "--interactive", "service", "python", "-c", INSIDE, given=picture)
        )
    except RobustkitError:
        print(_log(engine), file=sys.stderr)
        raise
    started = time.monotonic()
    engine.podman("stop", "--time", "40", "service")
    found["stopped"] = {
        "status": int(engine.podman("wait", "service")),
        "seconds": round(time.monotonic() - started, 1),
    }
    found["log"] = [json.loads(line)["event"] for line in _log(engine).splitlines() if line.startswith("{")]
    weights = next(made.model.glob("*.safetensors"))
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(body)
    _say("running it with a model that was changed")
    refused = subprocess.run(engine.run(image, volumes, _arguments(), "--rm"), capture_output=True, text=True)
    found["changed model"] = {"status": refused.returncode, "said": refused.stderr.strip()}
    wrong = _wrong(found, digit)
    for name in ("answer", "ready", "writes", "shells", "interfaces", "stopped", "log", "changed model"):
        print(f"{name}: {found[name]}")
    print(
        {
            name: found["status"][name]
            for name in ("Uid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "VmRSS")
        }
    )
    print(f"packages: {len(found['packages'])}")
    print("\n".join(wrong) or "container: as it should be")
    return 1 if wrong else 0


def _log(engine: Engine) -> str:
    done = subprocess.run([*engine._podman, "logs", "service"], capture_output=True, text=True)
    return done.stdout + done.stderr


def _wrong(found: dict[str, Any], digit: int) -> list[str]:
    """What is not as it should be."""
    status = found["status"]
    nothing, read_only = "0" * 16, "EROFS"
    told = {canonicalize_name(part["name"]): part["version"] for part in sbom.build()["components"]}
    rules = {
        "the digit was not recognised": found["answer"]["index"] == digit,
        "it is not uid 10001": set(status["Uid"] + status["Gid"]) == {str(USER)},
        "it has capabilities": all(
            status[name] == [nothing] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
        ),
        "it can gain privileges": status["NoNewPrivs"] == ["1"],
        "system calls are not filtered": status["Seccomp"] == ["2"],
        "its root can be written": all(
            found["writes"][path] == read_only for path in ("/x", "/usr/bin/x", "/opt/robustkit/x")
        ),
        "the model can be written": found["writes"]["/models/champion/x"] == read_only,
        "/tmp or /state cannot be written": found["writes"]["/tmp/x"]
        == found["writes"]["/state/x"]
        == "written",
        "there is a shell": not found["shells"],
        "there is a network": found["interfaces"] == ["lo"],
        "it did not leave gracefully": found["stopped"]["status"] == 0
        and found["log"][-2:] == ["draining", "stopped"],
        "it took a model that was changed": found["changed model"]["status"] == 2
        and "valid signature" in found["changed model"]["said"],
        f"the SBOM names other packages: {sorted(found['packages'].items() ^ told.items())}": found[
            "packages"
        ]
        == told,
    }
    return [f"WRONG: {what}" for what, right in rules.items() if not right]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RobustkitError as error:
        sys.exit(f"container: {error}")
