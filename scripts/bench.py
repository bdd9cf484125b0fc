"""How fast: robustkit against its peers, and against the passes that nobody can do without.

    python scripts/bench.py [--peers FOLDER] [--out FOLDER] [--quick] [--float32]

Everything is interleaved in one process, round after round, on the same images and in batches of the same
size; ratios are taken within rounds, so that what slows the machine slows both sides of a ratio. Memory is
measured afterwards, each contestant in a process of its own. Results go to `--out` as Markdown and JSON,
progress to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import operator
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from benching.contestants import (
    FLOORS,
    OURS,
    Contestant,
    Run,
    best_batch,
    find_peers,
    here,
    in_batches,
    in_forks,
    peers,
)
from benching.measure import Bar, Timing, counted, interleaved, peak_bytes, ratio
from benching.subjects import SEED, SUBJECTS, Subject
from benching.table import markdown
from tqdm import tqdm

from robustkit import device
from robustkit.data import Dataset
from robustkit.device import attackable, hardware, prepare
from robustkit.evaluate import PROTOCOLS, evaluate, predict
from robustkit.results import Interval, Provenance
from robustkit.scale import forks
from robustkit.threat import Ball

# Subject, norm, steps, rounds, images a round: what fits into a quarter of an hour on two cores.
PLAN = [
    ("mnist", "Linf", 40, 5, 512),
    ("mnist", "L2", 40, 3, 512),
    ("mnist", "Linf", 1, 12, 512),
    ("resnet20", "Linf", 40, 3, 128),
    ("resnet20", "Linf", 1, 5, 128),
]
QUICK = [("mnist", "Linf", 4, 2, 64), ("resnet20", "Linf", 4, 2, 32)]
STANDARD = ("mnist", 4, 125, 63)  # AutoAttack: subject, rounds, images a round, images a batch


def versions() -> dict[str, str]:
    """Of everything that is measured and installed; a peer from the folder beside is found there."""
    names = ("robustkit", "torch", "cleverhans", "adversarial-robustness-toolbox", "foolbox", "pyautoattack")
    found = {}
    for name in (*names, "torchattacks", "adv-lib"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not here"
    return found


def figures(
    timings: Mapping[str, Timing], rivals: list[str], passes: Mapping[str, tuple[float, float]]
) -> Any:
    """One row for each contestant: seconds, the ratios of its rounds, robust accuracy, passes an image."""
    fastest = min(rivals, key=lambda name: statistics.median(timings[name].seconds), default=None)
    to = {"fastest peer": fastest, "floor": "floor", "tuned floor": "tuned floor"}
    return [
        {
            "name": name,
            "seconds": statistics.median(timing.seconds),
            "ratios": {
                key: ratio(timing, timings[other]) for key, other in to.items() if other and other in timings
            },
            "robust": asdict(timing.robust) | {"low": timing.robust.low, "high": timing.robust.high},
            "forward": passes.get(name, (None, None))[0],
            "backward": passes.get(name, (None, None))[1],
            "fastest peer": name == fastest,
        }
        for name, timing in timings.items()
    ]


def pgd_section(subject: Subject, ball: Ball, steps: int, rounds: int, bar: Bar) -> dict[str, Any]:
    """FGSM (one step) or PGD of everybody."""
    rivals = peers(ball, steps)
    everybody: dict[str, Contestant] = FLOORS | OURS | rivals
    size = best_batch(subject.model, subject.x)
    make = {name: made(subject.model, subject.x, ball, steps) for name, made in everybody.items()}
    runs = {name: in_batches(run, size) for name, run in make.items()}
    with in_forks(make["robustkit"], size, subject.x) as shared:
        runs["robustkit, forks"] = shared
        timings = interleaved(subject.model, runs, subject.x, subject.y, rounds, SEED, bar)
    passes = {name: passes_of(made, subject, ball, steps) for name, made in (OURS | rivals).items()}
    return {
        "title": f"{'FGSM' if steps == 1 else f'PGD-{steps}'}, {ball} on {subject.name}",
        "about": subject.about,
        "n": len(subject.x),
        "rounds": rounds,
        "batch": size,
        "rows": figures(timings, list(rivals), passes),
    }


def passes_of(made: Contestant, subject: Subject, ball: Ball, steps: int) -> tuple[float, float]:
    """Forward and backward passes an image, counted on one batch, apart from the timing."""
    x, y = subject.x[:32], subject.y[:32]
    handed, asked = counted(prepare(subject.model, x) if made is OURS["robustkit"] else subject.model)
    made(handed, x, ball, steps)(x, y)  # `prepare` leaves a prepared model as it is
    forwards, backwards = asked()
    return forwards / len(x), backwards / len(x)


def forward_section(subject: Subject, rounds: int, bar: Bar) -> dict[str, Any]:
    """Forward passes alone, as score-based attacks and certification make them."""
    size, ready = best_batch(subject.model, subject.x), prepare(subject.model, subject.x)

    def passes(model: Any) -> Run:
        def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), attackable(model):
                for _ in range(20):
                    model(x)
            return x

        return in_batches(run, size)

    runs = {"floor": passes(subject.model), "tuned floor": passes(ready)}
    timings = interleaved(subject.model, runs, subject.x, subject.y, rounds, SEED, bar)
    return {
        "title": f"20 forward passes on {subject.name}",
        "about": subject.about,
        "n": len(subject.x),
        "rounds": rounds,
        "batch": size,
        "rows": figures(timings, [], dict.fromkeys(runs, (20.0, 0.0))),
    }


def standard_section(subject: Subject, rounds: int, size: int, bar: Bar) -> dict[str, Any]:
    """AutoAttack's standard protocol: pyautoattack as it is, and our own protocols as a user runs them."""
    ball = subject.balls["Linf"]
    runs = {"pyautoattack": by_referee}
    runs |= {
        f"robustkit evaluate, protocol {name}": partial(by_protocol, name, size)
        for name in ("standard", "fast")
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    robust: dict[str, list[bool]] = {name: [] for name in runs}
    for x, y in zip(subject.x.chunk(rounds), subject.y.chunk(rounds), strict=True):
        for name, run in runs.items():
            bar.set_postfix_str(name)
            start = time.perf_counter()
            robust[name] += run(subject, ball, x, y)
            seconds[name].append(time.perf_counter() - start)
            bar.update()
    timings = {
        name: Timing(tuple(seconds[name]), Interval(sum(kept), len(kept))) for name, kept in robust.items()
    }
    apart = [
        f"{sum(map(operator.ne, kept, robust['pyautoattack']))} ({name})" for name, kept in robust.items()
    ]
    return {
        "title": f"AutoAttack standard, {ball} on {subject.name}",
        "about": f"{subject.about}; pyautoattack takes a round's images at once; verdicts unlike its: "
        f"{', '.join(apart[1:])}",
        "n": len(subject.x),
        "rounds": rounds,
        "batch": size,
        "rows": figures(timings, ["pyautoattack"], {}),
    }


def by_referee(subject: Subject, ball: Ball, x: torch.Tensor, y: torch.Tensor) -> list[bool]:
    """Which images survive pyautoattack, called directly on the model."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        peer = import_module("pyautoattack")
        attack = peer.AutoAttack(subject.model, norm=ball.norm, eps=ball.eps, seed=SEED, device=x.device)
        found: torch.Tensor = attack.run_standard_evaluation(x, y, batch_size=len(x))[0]
    return predict(subject.model, found, y).tolist()


def by_protocol(
    name: str, size: int, subject: Subject, ball: Ball, x: torch.Tensor, y: torch.Tensor
) -> list[bool]:
    """Which images survive a protocol of ours, as a user runs it: preparing the model and verdicts included."""
    where = Provenance("the bench's images", "test", "bench", "0" * 64, False)
    data = Dataset(x, y, tuple(range(len(x))), where, tuple("0123456789"))
    with forks() as runner:
        result = evaluate(
            subject.model,
            data,
            ball,
            PROTOCOLS[name],
            model_name=subject.name,
            tier="full",
            batch_size=size,
            runner=runner,
            progress=False,
        )
    return [broken is None for broken in result.broken_by]


# --- memory: each contestant in a process of its own ---------------------------------------------------


def memory_section(name: str, n: int, folder: Path, more: list[str], bar: Bar) -> dict[str, Any]:
    subject = SUBJECTS[name](n)
    ball, size = subject.balls["Linf"], best_batch(subject.model, subject.x)
    taken = {}
    for contestant in ("robustkit", *peers(ball, 40)):
        bar.set_postfix_str(f"memory of {contestant}")
        command = [sys.executable, __file__, "--peers", str(folder), *more]
        done = subprocess.run(
            [*command, "--memory", name, contestant, str(n)], capture_output=True, text=True, check=False
        )
        taken[contestant] = int(done.stdout) if done.returncode == 0 else None
        bar.update()
    return {"title": f"Peak memory of PGD-4, {ball} on {name}", "n": n, "batch": size, "bytes": taken}


def memory_of(name: str, contestant: str, n: int) -> int:
    subject = SUBJECTS[name](n)
    ball, size = subject.balls["Linf"], best_batch(subject.model, subject.x)
    made = (OURS | peers(ball, 4))[contestant]

    def whole() -> None:  # whatever is made once, such as our search copy, counts
        in_batches(made(subject.model, subject.x, ball, 4), size)(subject.x, subject.y)

    return peak_bytes(whole, subject.x.device)


# --- the whole -------------------------------------------------------------------------------------------


def bench(out: Path, folder: Path, missing: list[str], quick: bool, float32: bool) -> None:
    plan = QUICK if quick else PLAN
    name, rounds, share, size = STANDARD
    rivals = sum(
        rounds * (len(FLOORS) + len(OURS) + 1 + len(peers(Ball(norm, 1.0), steps)))
        for _, norm, steps, rounds, _ in plan
    )
    forwards = 2 if quick else 6
    total = rivals + 2 * 2 * forwards + rounds * 3 + 2 * (1 + len(peers(Ball("Linf", 1.0), 4)))
    started, sections, memory = time.time(), [], []
    with tqdm(total=total, unit="run", file=sys.stderr) as bar:
        for each, norm, steps, repeats, n in plan:
            subject = SUBJECTS[each](repeats * n)
            sections.append(pgd_section(subject, subject.balls[norm], steps, repeats, bar))
        for each, n in (("mnist", 256), ("resnet20", 64)):
            sections.append(forward_section(SUBJECTS[each](forwards * n), forwards, bar))
        if here("pyautoattack") and not quick:
            sections.append(standard_section(SUBJECTS[name](rounds * share), rounds, size, bar))
        for each, n in (("mnist", 512), ("resnet20", 64)):
            memory.append(memory_section(each, n, folder, ["--float32"] * float32, bar))
    record = {
        "created": time.strftime("%Y-%m-%d"),
        "minutes": round((time.time() - started) / 60, 1),
        "hardware": asdict(hardware()),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": versions(),
        "missing": missing,
        "seed": SEED,
        "quick": quick,
        "search": str(device.fastest(device.pick_device())).removeprefix("torch."),
        "sections": sections,
        "memory": memory,
    }
    out.mkdir(parents=True, exist_ok=True)
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    if kind == "cpu" and device.fastest(torch.device("cpu")) == torch.bfloat16:
        kind = "cpu-bf16"  # another machine in all but name: nothing there compares with figures of float32
    (out / f"{kind}.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / f"{kind}.md").write_text(markdown(record))
    print(markdown(record))


def main() -> None:
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peers", type=Path, default=Path(sys.prefix) / "bench-peers", help="torchattacks, adv-lib"
    )
    parser.add_argument("--out", type=Path, default=root / "docs" / "bench")
    parser.add_argument(
        "--quick", action="store_true", help="one minute, to see that it runs; figures mean little"
    )
    parser.add_argument(
        "--float32",
        action="store_true",
        help="as on a processor without bfloat16 units: prepare models in float32",
    )
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.float32:
        device.fastest = lambda device: torch.float32
    if options.memory:
        subject, contestant, n = options.memory
        find_peers(options.peers, {contestant} - {"robustkit"})
        print(memory_of(subject, contestant, int(n)))
        return
    missing = find_peers(options.peers)
    for peer in missing:
        print(f"bench: left out: {peer}", file=sys.stderr)
    bench(options.out, options.peers, missing, options.quick, options.float32)


if __name__ == "__main__":
    main()
