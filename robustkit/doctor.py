"""Doctor: what this machine has for the course, what is missing, and how long each lesson will take."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit import _torchvision, data
from robustkit.defences import DEFENCES
from robustkit.device import TIERS, hardware, pick_device, seeded
from robustkit.errors import RobustkitError
from robustkit.evaluate import ATTACKS
from robustkit.models import mnist_cnn
from robustkit.recipes import RECIPES
from robustkit.threat import Ball

PACKAGES = {
    "robustkit": ("torch", "torchvision", "numpy", "safetensors", "scikit-learn", "matplotlib"),
    "robustkit[course]": ("jupyterlab", "nbgrader", "nbclient", "ipykernel"),
    "robustkit[peers]": ("cleverhans", "adversarial-robustness-toolbox", "foolbox"),
}
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
DATASETS = ("mnist", "cifar10")

BATCH = 128
WINDOW_SECONDS, BENCHMARK_SECONDS = 0.2, 2.0
THREADS_ALARM = 1.3  # times faster with one thread: more than the noise of the benchmark
LEAST_DISK = 500 * 2**20  # bytes: the data sets of the course, decoded, and a class's runs

# Cost of a forward pass alone, with forward and backward together as the unit: measured for
# mnist_cnn at 0.3 (1.5 s against 4.6 s for 60,000 images on one core).
FORWARD = 1 / 3


# --- what a lesson costs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A recipe that a lesson trains, with so many seeds."""

    recipe: str
    seeds: int = 1


@dataclass(frozen=True)
class Attacking:
    """An attack that a lesson runs on so many images in each tier.

    `share` of the attack's greatest cost is spent: restarts stop at the first success.
    """

    attack: str
    images: Mapping[str, int]
    share: float = 1.0


@dataclass(frozen=True)
class Cost:
    """What one tier of a lesson costs: image passes, in millions, and seconds that no speed changes."""

    million_passes: float
    fixed_seconds: float

    def minutes(self, passes_per_second: float) -> float:
        return (1e6 * self.million_passes / passes_per_second + self.fixed_seconds) / 60


_STRONG = {"smoke": 100, "standard": 1_000, "full": 10_000}
_WHOLE = {"smoke": 360, "standard": 10_000, "full": 10_000}

# What the reference solution of each lesson runs. Seconds: starting the kernel, imports, data, figures.
LESSON_WORK: dict[str, tuple[float, tuple[Training | Attacking, ...]]] = {
    "00-start-here": (20.0, (Training("mnist-clean"), Attacking("fgsm", _STRONG))),
    "01-mnist-fgsm": (
        40.0,
        (
            Training("mnist-clean"),
            Training("mnist-fgsm", seeds=3),
            Training("mnist-rs-fgsm"),
            Training("mnist-pgd"),
            # FGSM at three eps on the clean model, for the report and its check; then on every model.
            *[Attacking("fgsm", _WHOLE)] * 13,
            # The undefended and the overfitted model fall to the first of ten restarts.
            *[Attacking("pgd-100x10", _STRONG, share=0.1)] * 2,
            Attacking("pgd-100x10", _STRONG, share=0.8),
            Attacking("pgd-100x10", _STRONG, share=0.95),
            # Eight times on its own; the curve's 10 eps, 4 models, 500 images, 20 steps cost ten more.
            *[Attacking("pgd-40", _STRONG)] * 18,
        ),
    ),
    "02-attacks-and-evaluation": (
        40.0,
        (
            # PGD, APGD, Square and AutoAttack, the suspects, other libraries; a photograph counts for eighteen.
            Attacking("pgd-40", {"smoke": 1_000, "standard": 110_000, "full": 600_000}),
        ),
    ),
    "03-cifar-pgd": (
        60.0,  # with the JPEGs, decoded
        # Continuations, looks, the judge's attacks, PGD-50x10 and `fast`; a photograph counts for sixty, trained on.
        (Attacking("pgd-40", {"smoke": 5_000, "standard": 200_000, "full": 6_000_000}),),
    ),
    "04-certified": (
        40.0,
        (
            # Votes are forward passes, as the draws of noise are: three certified models, costs, verdicts, a log.
            Attacking("noise", {"smoke": 500, "standard": 49_000, "full": 450_000}),
            # PGD-20 at nine eps on two models, and the attacks on the vote, in steps of 40.
            Attacking("pgd-40", {"smoke": 600, "standard": 7_700, "full": 122_000}),
        ),
    ),
    "05-empirical-or-certified": (
        40.0,
        (
            # Votes as in lesson 4; one of the CIFAR network counts for eighteen.
            Attacking("noise", {"smoke": 600, "standard": 47_000, "full": 811_000}),
            # Each model in each ball and the gradients of the votes, by the forty.
            Attacking("pgd-40", {"smoke": 230, "standard": 52_000, "full": 983_000}, share=0.9),
        ),
    ),
    "06-secure-the-api": (
        40.0,
        # Queries of every attack on every gate: a forward pass, and a look into a detector's memory that costs as much
        # as several; counted by the hundred forward passes of `noise`.
        (Attacking("noise", {"smoke": 3_000, "standard": 250_000, "full": 14_000_000}),),
    ),
    "07-incident": (
        60.0,  # with the detector and the registration of every held input
        # Three retrained candidates, each judged in four families and by an attacker who adapts, by the forty steps.
        (Attacking("pgd-40", {"smoke": 3_000, "standard": 70_000, "full": 350_000}),),
    ),
    "08-attack-the-grader": (20.0, ()),  # it runs no model
}


class _Counter(nn.Module):
    """A model that no attack fools and that counts its passes, an image at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.cost = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.cost += FORWARD
        score = self.weight * x.flatten(1).sum(1)
        logits = torch.stack([score + 1e4, score * 0], 1)
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, gradient: Tensor) -> None:
        self.cost += 1 - FORWARD


@cache
def passes_of_defence(name: str) -> float:
    """Passes that one training step of a defence spends on an image, counted while it runs."""
    model, (x, y) = _Counter(), _probe()
    DEFENCES[name](model, x, y, Ball("Linf", 0.1), seeded(0)).backward()
    return model.cost


@cache
def passes_of_attack(name: str) -> float:
    """Passes that an attack spends on an image which withstands it, counted while it runs."""
    model, (x, y) = _Counter(), _probe()
    ATTACKS[name](model, x, y, Ball("Linf", 0.1), generator=seeded(0))
    return model.cost


def _probe() -> tuple[Tensor, Tensor]:
    return torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.int64)


def lesson_cost(lesson: str, tier: str, train_images: int) -> Cost:
    """What a lesson costs in a tier, from the recipes' own schedules.

    `train_images` is the size of the training split; a tier's limit can take fewer.
    """
    seconds, work = LESSON_WORK[lesson]
    passes = 0.0
    for item in work:
        if isinstance(item, Training):
            recipe = RECIPES[item.recipe]
            n = min(recipe.limits[tier] or train_images, train_images)
            passes += item.seeds * recipe.schedules[tier].epochs * n * passes_of_defence(recipe.defence)
        else:
            passes += item.images[tier] * item.share * passes_of_attack(item.attack)
    return Cost(passes / 1e6, seconds)


def passes_per_second(device: torch.device, seconds: float = BENCHMARK_SECONDS) -> float:
    """Forward and backward passes of mnist_cnn that the device makes in a second, in images.

    The best of several short windows: on a shared machine the mean measures the neighbours. Random
    images and weights cost the same as real ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mnist_cnn().to(device)
        x = torch.rand(BATCH, 1, 28, 28, device=device)
        y = torch.randint(10, (BATCH,), device=device)

    def once() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):  # the first calls pay for allocation and kernel selection
        once()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        started, done = time.perf_counter(), 0
        while (taken := time.perf_counter() - started) < WINDOW_SECONDS or done == 0:
            once()
            done += 1
        best = max(best, done * BATCH / taken)
    return best


# --- the examination -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What is wrong and what to do about it; `essential` when the course cannot run as it is."""

    what: str
    remedy: str
    essential: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}."


@dataclass(frozen=True)
class Diagnosis:
    """Everything that the doctor found, ready to be printed or written as JSON."""

    versions: dict[str, str | None]
    torchvision: str
    device: str
    cpu: str
    cpus: int
    threads: int
    load: float | None
    precision: dict[str, bool]
    data: dict[str, str]
    cache: str
    free_bytes: int
    programs: dict[str, str | None]
    passes_per_second: float
    minutes: dict[str, dict[str, float]]
    problems: tuple[Problem, ...]

    @property
    def healthy(self) -> bool:
        return not any(problem.essential for problem in self.problems)

    def record(self) -> dict[str, Any]:
        return {"type": "Diagnosis", "healthy": self.healthy, **asdict(self)}


def examine(seconds: float = BENCHMARK_SECONDS) -> Diagnosis:
    """Look at this machine, without downloading anything, and time it for `seconds`."""
    problems: list[Problem] = []
    versions = _versions(problems)
    guard = _torchvision_state(problems)
    sources, train_images = _sources(problems)
    cache_folder, free = _disk(problems)
    device, cpus = pick_device(), _cpus()
    speed = _speed(device, seconds, problems)
    return Diagnosis(
        versions=versions,
        torchvision=guard,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        cpu=hardware(device).cpu,
        cpus=cpus,
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        precision=_precision(device),
        data=sources,
        cache=_shown(cache_folder),
        free_bytes=free,
        programs={"chromium": _which(CHROMIUMS), "bubblewrap": _which(("bwrap",))},
        passes_per_second=round(speed),
        minutes={
            lesson: {tier: round(lesson_cost(lesson, tier, train_images).minutes(speed), 1) for tier in TIERS}
            for lesson in LESSON_WORK
        },
        problems=tuple(problems),
    )


def _speed(device: torch.device, seconds: float, problems: list[Problem]) -> float:
    """Passes per second as things are set, and a problem where one thread alone would be faster.

    On processors shared with other programs, threads that wait for one another at every layer can make
    a small model thirty times slower.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return passes_per_second(device, seconds)
    speed = passes_per_second(device, seconds / 2)
    try:
        torch.set_num_threads(1)
        alone = passes_per_second(device, seconds / 2)
    finally:
        torch.set_num_threads(threads)
    if alone > THREADS_ALARM * speed:
        problems.append(
            Problem(
                f"{threads} threads are {alone / speed:.1f} times slower than one, because the processors are busy",
                "set GOMP_SPINCOUNT=0, or OMP_NUM_THREADS=1, before starting Jupyter or robustkit",
                essential=False,
            )
        )
    return speed


def _versions(problems: list[Problem]) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for extra, names in PACKAGES.items():
        missing = []
        for name in names:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = None
                missing.append(name)
        if missing:
            problems.append(
                Problem(
                    f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
                    f"pip install '{extra}'",
                    essential=extra == "robustkit",
                )
            )
    nbgrader = found["nbgrader"]
    if nbgrader is not None and _numbers(nbgrader) < (0, 9, 6):
        problems.append(
            Problem(
                f"nbgrader {nbgrader} does not work with JupyterLab 4.6",
                "pip install 'nbgrader>=0.9.6'",
                essential=False,
            )
        )
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _torchvision_state(problems: list[Problem]) -> str:
    try:
        _torchvision.import_torchvision()
    except (ImportError, RuntimeError) as error:
        problems.append(
            Problem(
                f"torchvision cannot be imported ({_first_line(error)})",
                "install the torchvision that belongs to this torch",
                essential=True,
            )
        )
        return "cannot be imported"
    if _torchvision._library is not None:
        return "guarded: robustkit declared the operators that cannot load beside this torch"
    return "loads by itself"


def _sources(problems: list[Problem]) -> tuple[dict[str, str], int]:
    """For each data set the source that would be used, and how many images MNIST's training split would have."""
    found, train_images = {}, 60_000
    for name in DATASETS:
        try:
            source = _source(name)
        except RobustkitError as error:
            problems.append(
                Problem(f"{name} cannot be loaded", str(error).rstrip("."), essential=name == "mnist")
            )
            found[name] = "unusable"
            continue
        if source is None and name == "mnist":
            found[name] = "embedded digits of scikit-learn, upscaled: NOT MNIST"
            train_images = 1_437
            problems.append(
                Problem(
                    "MNIST is in no source, so lessons run on the embedded digits",
                    "connect to a network once, or set ROBUSTKIT_DATA",
                    essential=False,
                )
            )
        else:
            found[name] = source or "in no source; lessons on it cannot run"
    return found, train_images


def _source(name: str) -> str | None:
    """Where `load` would find a data set, its files checked; None when nothing has it."""
    places = data._places()
    files = list({file.path: file for part in data._RECIPES[name].files.values() for file in part}.values())
    at_hand = data._find(files, places._replace(mirror="", offline=True))
    if at_hand is not None:
        return at_hand[1]
    if places.mirror:
        return f"would be fetched from the mirror in ROBUSTKIT_DATA ({places.mirror})"
    if not places.offline:
        instead = "; without a network, the embedded digits: NOT MNIST" if name == "mnist" else ""
        return f"would be downloaded at the first use{instead}"
    return None


def _shown(folder: Path) -> str:
    """The path, with the home folder as ~: this output stands in notebooks that travel."""
    home = Path.home()
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)


def _disk(problems: list[Problem]) -> tuple[Path, int]:
    """The cache folder, and the bytes that are free where it is or would be."""
    try:
        folder = data._places().cache
    except RobustkitError:  # an unusable ROBUSTKIT_DATA, already told about
        folder = Path.home()
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < LEAST_DISK:
        problems.append(
            Problem(
                f"{existing} has {free / 2**20:.0f} MB free, the course needs {LEAST_DISK // 2**20}",
                "free some, or set ROBUSTKIT_CACHE to a folder elsewhere",
                essential=False,
            )
        )
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        problems.append(
            Problem(
                f"{existing} cannot be written, so downloads will not be kept",
                "set ROBUSTKIT_CACHE to a folder that can",
                essential=False,
            )
        )
    return folder, free


def _precision(device: torch.device) -> dict[str, bool]:
    """Faster arithmetic that training could use. Verdicts are given in full float32 whatever is here."""
    if device.type == "cuda":
        return {
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            "amx": False,
            "tf32": torch.cuda.get_device_capability(device) >= (8, 0),
        }
    flags = _cpu_flags()
    return {
        "bf16": bool({"avx512_bf16", "amx_bf16", "bf16"} & flags),
        "amx": "amx_tile" in flags,
        "tf32": False,
    }


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip().lower() in ("flags", "features"):
                return set(value.split())
    except OSError:
        pass  # not Linux: nothing is claimed
    return set()


def _cpus() -> int:
    """Processors that this process may use: in a container often fewer than the machine has."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or the quota "max"
        return allowed


def _which(names: Sequence[str]) -> str | None:
    return next((name for name in names if shutil.which(name)), None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
