"""The house: set-up, pins, make targets, the wheel. Real shells, real pip, real interpreters; no network."""

import argparse
import importlib.metadata
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import grading.__main__
import robustkit.cli

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
THIS = f"{sys.version_info.major}.{sys.version_info.minor}"
OURS = ("PIP_", "VENV", "PYTHON", "MAKE", "MFLAGS", "ROBUSTKIT_")


def environment(**changes: str) -> dict[str, str]:
    """The caller's environment without what steers the set-up, and with `changes`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return kept | {"PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "*"} | changes


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None, timeout: int = 300):
    """Run to the end, with both streams as text."""
    return subprocess.run(
        command, cwd=cwd, env=env or environment(), capture_output=True, text=True, timeout=timeout
    )


def tracked() -> list[Path]:
    """The files of the project as git knows them, new ones included."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone, to know which files belong to the project")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


# --- Papers -------------------------------------------------------------------------------------------


def test_changelog_top_version_is_the_package_version():
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == robustkit.__version__


def test_licence_is_the_full_apache_text():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PYPROJECT["project"]["license"] == "Apache-2.0"


def test_no_path_of_one_machine_in_any_file():
    # Put together here, so that this file does not hold what it looks for.
    places = ["/" + place for place in ("root/", "work/main", "work/shared", "opt/wheels", "opt/pypi")]
    found = [
        f"{path.relative_to(ROOT)}: {place}"
        for path in tracked()
        for place in places
        if place in path.read_text(errors="ignore")
    ]
    assert found == []


# --- Make targets -------------------------------------------------------------------------------------


def test_every_make_target_is_listed_and_told_to_contributors():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    listed = re.findall(r"^  make (\w+) +\S", run("make").stdout, re.MULTILINE)
    assert sorted(listed) == sorted(targets)
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert [target for target in targets if f"`make {target}`" not in contributing] == []


def test_make_test_runs_every_stage_and_ends_with_pytest():
    plan = run("make", "-n", "test").stdout
    for stage in (
        "scripts/setup.sh",
        "ruff check",
        "ruff format --check",
        "mypy",
        "build --check",
        "--nbval",
    ):
        assert stage in plan
    assert re.search(r'-m pytest [^"]*-m "not redteam"$', plan.splitlines()[-1])


def test_ci_calls_make_test_last():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert run("bash", "-n", script).returncode == 0
    assert script.read_text().splitlines()[-1] == "make test"


def test_nbgrader_finds_the_course_from_the_repository_root():
    ask = "from nbgrader.apps import NbGraderApp as A; a = A(); a.initialize([]); c = a.coursedir"
    done = run(sys.executable, "-c", f"{ask}; print(c.source_directory, c.release_directory)")
    assert done.stdout.split() == ["solutions", "course"], done.stderr


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A command line's parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


@pytest.mark.parametrize("whole", [robustkit.cli._parser(), grading.__main__._parser()], ids=lambda p: p.prog)
def test_every_command_can_show_its_help(whole):
    """argparse formats help texts with %: one that stands alone is found when somebody asks, not before."""
    for parser in parsers(whole):
        assert parser.format_help().startswith("usage: ")


# --- Pins ---------------------------------------------------------------------------------------------


def pins() -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(pin.name): pin for pin in map(Requirement, filter(None, lines))}


def version_of(pin: Requirement) -> str:
    return next(iter(pin.specifier)).version


def test_every_pin_is_one_exact_version():
    for pin in pins().values():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), f"{pin}: no ranges, no local part"


def test_every_declared_dependency_is_pinned_within_its_bounds():
    declared = list(PYPROJECT["project"]["dependencies"]) + list(PYPROJECT["build-system"]["requires"])
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        declared += extra
    for wanted in map(Requirement, declared):
        pin = pins().get(canonicalize_name(wanted.name))
        assert pin is not None, f"{wanted} is not in constraints.txt"
        assert wanted.specifier.contains(version_of(pin)), f"{wanted} does not allow {pin}"


def test_what_is_installed_is_what_is_pinned():
    """Follow the dependencies of every extra through the installed packages: each is pinned, as installed."""
    seen: set[tuple[str, str]] = set()
    todo = [Requirement("robustkit[course,peers,cluster,postgres,serve,tensorboard,dev]")]
    wrong = []
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            installed = importlib.metadata.distribution(name)
            pin = pins().get(name)
            here = installed.version.partition("+")[0]  # 2.13.0+cpu is 2.13.0 with another back end
            if name != "robustkit" and (pin is None or version_of(pin) != here):
                wrong.append(f"{name} {here}: pinned {pin}")
            todo += [
                needed
                for needed in map(Requirement, installed.requires or [])
                if needed.marker is None or needed.marker.evaluate({"extra": extra})
            ]
    assert wrong == []
    assert len(seen) > 100  # the walk did walk


def test_installed_packages_agree_with_each_other():
    done = run(sys.executable, "-m", "pip", "check")
    assert done.returncode == 0, done.stdout


# --- The wheel ----------------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_nothing_of_the_course(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    files = [path.relative_to(ROOT) for path in tracked()]
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for folder in ("grading", "grading/private", "solutions/01", "course/01", "tests", "scripts"):
        (source / folder).mkdir(parents=True, exist_ok=True)
        (source / folder / "__init__.py").touch()
        (source / folder / "canary.json").touch()

    done = run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"),
        *("--wheel-dir", out, source),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    assert wheel.name == f"robustkit-{robustkit.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if not name.startswith(f"robustkit-{robustkit.__version__}.dist-info/")}
    assert packed == {name.as_posix() for name in files if name.parts[0] == "robustkit"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


# --- Set-up that cannot start: one sentence, status 2 -------------------------------------------------


@pytest.fixture
def bare(tmp_path):
    """A machine whose PATH holds only the commands that a test puts there, as name and shell body."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def setup(env: dict[str, str] | None = None, **commands: str):
        for name, body in commands.items():
            command = folder / name.replace("_", ".")
            command.write_text(f"#!/bin/sh\n{body}\n")
            command.chmod(0o755)
        venv = str(tmp_path / "venv")
        shell = shutil.which("sh")
        done = run(shell, "scripts/setup.sh", env=environment(PATH=str(folder), VENV=venv) | (env or {}))
        assert not (tmp_path / "venv" / ".robustkit-setup").exists()
        return done

    return setup


def one_sentence(done) -> str:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("robustkit: ")
    assert done.stderr.endswith(".\n")
    return done.stderr


def test_setup_without_any_python(bare):
    said = one_sentence(bare())
    assert "Python 3.11 or 3.12 is needed, and this machine has no Python: install one" in said
    assert "apt install python3" in said


def test_setup_with_pythons_that_are_too_old_or_too_new(bare):
    said = one_sentence(bare(python3="echo 3.9", python3_11="exit 127"))
    assert "this machine has python3 (3.9): install one" in said
    assert "python3 (3.14)" in one_sentence(bare(python3="echo 3.14"))


def test_setup_with_a_python_that_was_named(bare):
    assert "PYTHON=python3.8 is not a command here" in one_sentence(bare({"PYTHON": "python3.8"}))
    said = one_sentence(bare({"PYTHON": "python3.8"}, python3_8="echo 3.8"))
    assert "PYTHON=python3.8 is Python 3.8, and robustkit needs 3.11 or 3.12: install one" in said
    said = one_sentence(bare({"PYTHON": "python3.8"}, python3_8="exit 127"))
    assert "PYTHON=python3.8 does not run" in said


def test_setup_without_the_venv_module(bare, tmp_path):
    # As Debian ships Python without python3-venv: the interpreter runs, `import ensurepip` fails.
    (tmp_path / "ensurepip.py").write_text("raise ModuleNotFoundError('No module named ensurepip')\n")
    real = f'PYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"'
    said = one_sentence(bare(python3=real))
    assert f"Python {THIS} is here without its venv module: install it" in said
    assert f"apt install python{THIS}-venv" in said
    path = {"PYTHON": "python3", "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    assert f"apt install python{THIS}-venv" in one_sentence(bare(path))


def test_setup_spares_a_folder_that_is_no_environment(bare, tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.txt").write_text("the only copy")
    said = one_sentence(bare({"PYTHON": sys.executable, "PATH": os.environ["PATH"]}))
    assert "is a folder with something else in it" in said
    assert (tmp_path / "venv" / "thesis.txt").exists()


# --- Set-up that runs: what the stamp may claim -------------------------------------------------------

BACKEND = '''\
"""Builds an editable wheel of nothing, with the standard library alone."""
import zipfile, pathlib

def build_editable(wheel_directory, config_settings=None, metadata_directory=None, name="robustkit", version="0"):
    stem = f"{name}-{version}"
    with zipfile.ZipFile(pathlib.Path(wheel_directory, f"{stem}-py3-none-any.whl"), "w") as wheel:
        meta = f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
        wheel.writestr(f"{stem}.dist-info/METADATA", meta)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return f"{stem}-py3-none-any.whl"
'''


@pytest.fixture
def project(tmp_path):
    """The real set-up script in a project that needs one package, which lies in a folder: no network."""
    repo, wheels = tmp_path / "repo", tmp_path / "wheels"
    (repo / "scripts").mkdir(parents=True)
    wheels.mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", repo / "scripts")
    (repo / "backend.py").write_text(BACKEND)
    (repo / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "robustkit"\nversion = "0"\n'
        "[project.optional-dependencies]\ncourse = []\npeers = []\ndev = []\n"
    )
    (repo / "constraints.txt").write_text("setuptools==99.0\n")
    space: dict = {}
    exec(BACKEND, space)
    space["build_editable"](wheels, name="setuptools", version="99.0")
    return repo, environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels), PYTHON=sys.executable)


def stamp(repo: Path) -> str:
    return (repo / ".venv" / ".robustkit-setup").read_text()


@pytest.mark.slow
def test_setup_is_repeated_only_when_its_inputs_changed(project):
    repo, env = project
    first = run("sh", "scripts/setup.sh", cwd=repo, env=env)
    assert first.returncode == 0, first.stderr
    assert f"Setting up .venv with Python {THIS}" in first.stderr
    installed = stamp(repo)

    again = run("sh", "scripts/setup.sh", cwd=repo, env=env)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    env.pop("PYTHON")  # an environment that stands is kept, whatever else PATH offers
    assert run("sh", "setup.sh", cwd=repo / "scripts", env=env).stderr == ""

    (repo / "constraints.txt").write_text("setuptools==99.0\n# another input\n")
    changed = run("sh", "scripts/setup.sh", cwd=repo, env=env)
    assert changed.returncode == 0, changed.stderr
    assert "Setting up .venv" in changed.stderr
    assert stamp(repo) != installed

    moved = repo.with_name("moved")  # bin/ would still name the old place
    repo.rename(moved)
    (moved / ".venv" / "leftover").touch()
    assert run("sh", "scripts/setup.sh", cwd=moved, env=env).returncode == 0
    assert not (moved / ".venv" / "leftover").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_setup_that_was_cut_short_claims_nothing_and_starts_afresh(project, how, request):
    repo, env = project
    # A child inherits an ignored Ctrl-C, as under `&` in a script, and could then not be interrupted.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with socket.create_server(("127.0.0.1", 0)) as index:  # a package index that never answers
        index.settimeout(120)
        slow = environment(
            PIP_INDEX_URL=f"http://127.0.0.1:{index.getsockname()[1]}/simple", PYTHON=sys.executable
        )
        with subprocess.Popen(
            ["sh", "scripts/setup.sh"], cwd=repo, env=slow, stderr=subprocess.DEVNULL, start_new_session=True
        ) as setup:
            connection, _ = index.accept()  # pip is in the middle of it
            with connection:
                os.killpg(setup.pid, how)
                assert setup.wait(60) != 0
    assert stamp(repo) == "unfinished\n"

    (repo / ".venv" / "half-installed").touch()
    done = run("sh", "scripts/setup.sh", cwd=repo, env=env)
    assert done.returncode == 0, done.stderr
    assert not (repo / ".venv" / "half-installed").exists()
    assert run("sh", "scripts/setup.sh", cwd=repo, env=env).stderr == ""


@pytest.mark.slow
def test_setup_whose_packages_cannot_be_had(project):
    repo, env = project
    shutil.rmtree(repo.parent / "wheels")
    done = run("sh", "scripts/setup.sh", cwd=repo, env=env)
    assert done.returncode == 2
    assert "ERROR: " in done.stderr  # what pip had to say stays visible
    assert done.stderr.splitlines()[-1].startswith("robustkit: the packages could not be installed")
    assert stamp(repo) == "unfinished\n"
