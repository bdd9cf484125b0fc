"""What grading a class costs: the sandboxed path beside plain `nbgrader autograde` of the same notebooks.

    python -m scripts.bench_grading [--submissions 60] [--round 6] [--out FOLDER]

Synthetic submissions to lesson 1 in its smoke tier: right, partly right, untouched, crashing and cheating ones,
none of them harmful, because plain nbgrader runs them without a sandbox. The class is cut into rounds; in each
round every contestant grades the same submissions, in an order drawn anew, so that what slows the machine slows
both sides of a ratio. Memory is measured afterwards. Markdown and JSON go to --out, progress to stderr. Each round
is kept in build/bench-grading.jsonl until the table is written: a run that was ended goes on where it stopped.
"""

# nbformat and nbgrader are not annotated.
# mypy: allow-untyped-calls

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import math
import os
import random
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import psutil  # type: ignore[import-untyped]
from nbformat import NotebookNode
from nbgrader.apps.api import NbGraderAPI
from sqlalchemy.exc import SAWarning
from tqdm import tqdm
from traitlets.config import Config

from grading import crew, demo, fresh, grade, gradebook, notebooks, sandbox
from grading.pipeline import Settings
from grading.workspace import DEMO_SECRET, ONE_THREAD, ROOT, Workspace
from robustkit.device import hardware

SEED = 0
LESSON = demo.LESSON
TARGET = 1.10  # of the whole sandboxed path to plain nbgrader
RARE = 5  # what is not the sandboxed path or plain nbgrader takes part in every fifth round
KEPT = ROOT / "build" / "bench-grading.jsonl"
HOSTILE = {
    "kernel dies": {"s1_loss": "import os\nos._exit(1)"},
    "every cell raises": {"s1_fgsm": "raise MemoryError"},
    "prints 30 MB": {"s1_interval": "for _ in range(3000):\n    print('x' * 10_000)"},
    "patches the check": {"s1_predict": "import robustkit.lessons\ncheck = robustkit.lessons.check = lambda *a: 99.0"},
    "ends by sys.exit": {"s1_fgsm": "import sys\nsys.exit()"},
}  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    """One way of grading a folder of submissions into a workspace, and in which rounds it takes part."""

    name: str
    workspace: Workspace
    grade: Callable[[Path], None]
    every: int = 1


@dataclass(frozen=True)
class Round:
    """What one contestant needed for the submissions of one round, and the points that each student has.

    `seconds` are of the wall clock, `processor` what all of the machine computed meanwhile. Without points is who
    has no grade at all, because the grading of the notebook ended in an error.
    """

    seconds: float
    processor: float
    points: dict[str, float]

    @property
    def submissions(self) -> int:
        return len(self.points)


def class_of(number: int) -> dict[str, NotebookNode]:
    """`number` submissions by student: a fifth right, a fifth crash or cheat, the others partly right, by seed."""
    draw, release = random.Random(SEED), ROOT / "course" / LESSON / f"{LESSON}.ipynb"
    source = notebooks.read_release(ROOT / "solutions" / LESSON / f"{LESSON}.ipynb")
    right = {notebooks.grade_id(cell): cell.source for cell in source.cells if notebooks.is_solution(cell)}
    wrong = [demo.read_example("partly-right"), demo.read_example("wrong-but-plausible"), {}]
    made = {}
    for i in range(number):
        if i % 5 == 0:
            kind, cells = "right", dict(right)
        elif i % 5 == 1:
            kind = list(HOSTILE)[i // 5 % len(HOSTILE)]
            cells = right | HOSTILE[kind]
        else:
            kind, cells = "partly right", dict(wrong[i % 3])
            cells |= {name: right[name] for name in draw.sample(sorted(right), 3)}
        made[f"{i:03} {kind}"] = demo.fill(notebooks.read_release(release), cells)
    return made


def workspace_in(folder: Path) -> Workspace:
    """A class of the released course, with grades of its own in `folder`."""
    workspace = Workspace(ROOT / "solutions", ROOT / "course", folder / "submitted", folder / "private")
    workspace.private.mkdir(parents=True)
    workspace.secret.write_bytes(DEMO_SECRET)
    return workspace


def plain_nbgrader(workspace: Workspace) -> Callable[[Path], None]:
    """nbgrader as it comes: its own Execute in its own kernel, its own points."""
    gradebook.register(workspace, LESSON)
    exchange = workspace.private / "exchange"
    exchange.mkdir(exist_ok=True)

    def run(submitted: Path) -> None:
        c = Config()
        c.CourseDirectory.root = "/"
        c.CourseDirectory.source_directory = str(workspace.solutions)
        c.CourseDirectory.release_directory = str(workspace.course)
        c.CourseDirectory.submitted_directory = str(submitted)
        c.CourseDirectory.autograded_directory = str(workspace.autograded)
        c.CourseDirectory.db_url = workspace.gradebook_url
        c.CourseDirectory.course_id = gradebook.COURSE_ID
        c.Exchange.root = str(exchange)
        c.Execute.timeout = 300
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)
            NbGraderAPI(config=c, log_level=50).autograde(LESSON, "*", force=True, create=True)

    return run


def robustkit_way(workspace: Workspace, tier: str, server: fresh.Server, jobs: int) -> Callable[[Path], None]:
    """`python -m grading class grade --sandbox TIER --jobs JOBS`."""

    def run(submitted: Path) -> None:
        with crew.here(server, jobs) as here:
            grade.grade(replace(workspace, submitted=submitted), [LESSON], Settings(sandbox=tier), here)

    return run


def busy() -> float:
    """Seconds that the processors of this machine have computed since it started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def hand_in(students: Mapping[str, NotebookNode], folder: Path) -> Path:
    """The submissions as a folder that nbgrader and we grade."""
    for student, notebook in students.items():
        path = folder / student / LESSON / f"{LESSON}.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(notebook, path)
    return folder


def points_in(workspace: Workspace, students: Sequence[str]) -> dict[str, float]:
    """What the gradebook says of each; NaN for who is not in it."""
    with gradebook.opened(workspace) as book:
        entered = {each.student.id: float(each.score) for each in book.assignment_submissions(LESSON)}
    return {student: entered.get(student, math.nan) for student in students}


def raced(
    contestants: Sequence[Contestant], submitted: Sequence[Path], header: str
) -> dict[str, list[Round | None]]:
    """Every contestant on every round's submissions, in an order drawn anew; None where it does not take part.

    What `KEPT` has of a bench with the same header is not measured again.
    """
    order = random.Random(SEED)
    found: dict[str, list[Round | None]] = {each.name: [] for each in contestants}
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    known = [json.loads(line) for line in lines[1:]] if lines[:1] == [header] else []
    if not known:
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(header + "\n")
    total = sum(i % each.every == 0 for each in contestants for i in range(len(submitted)))
    with tqdm(total=total, desc="bench", unit="round") as bar, KEPT.open("a") as kept:
        for i, folder in enumerate(submitted):
            students = sorted(path.name for path in folder.iterdir())
            for each in order.sample(list(contestants), len(contestants)):
                if i % each.every:
                    found[each.name].append(None)
                    continue
                bar.set_postfix_str(each.name)
                if known:
                    one = Round(**known.pop(0))
                else:
                    started, before = time.perf_counter(), busy()
                    with redirect_stderr(io.StringIO()):
                        each.grade(folder)
                    seconds, processor = time.perf_counter() - started, busy() - before
                    one = Round(seconds, processor, points_in(each.workspace, students))
                    print(json.dumps(asdict(one)), file=kept, flush=True)
                found[each.name].append(one)
                bar.update()
    return found


def judged_alike(ours: Sequence[Round | None], plain: Sequence[Round | None]) -> list[str]:
    """Where the points of the two differ, and by how much: a bench that ran nothing would differ everywhere."""
    found = []
    for mine, its in zip(ours, plain, strict=True):
        for student in sorted(mine.points) if mine and its else ():
            mine_has, it_has = mine.points[student], its.points[student]  # type: ignore[union-attr]
            if not math.isclose(mine_has, it_has):
                found.append(f"{student}: {mine_has:g}, nbgrader {it_has:g}")
    return found


def peak_memory(work: Callable[[], None]) -> dict[str, float]:
    """The most memory, in MB, that this process and all below it share out (PSS) while `work` runs: grader, kernels."""
    most = {"all": 0.0, "largest": 0.0}
    over = threading.Event()

    def watch() -> None:
        here = psutil.Process()
        while not over.wait(0.2):
            sizes = []
            for process in [here, *here.children(recursive=True)]:
                with suppress(psutil.Error):
                    sizes.append(process.memory_full_info().pss / 1e6)
            most["all"], most["largest"] = max(most["all"], sum(sizes)), max(most["largest"], *sizes)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        over.set()
        watcher.join()
    return most


def ratio(of: Sequence[Round | None], to: Sequence[Round | None], figure: str) -> dict[str, float] | None:
    """The ratio of the totals over the rounds in which both took part, with the bootstrap's middle 95 %."""
    pairs = [(getattr(a, figure), getattr(b, figure)) for a, b in zip(of, to, strict=True) if a and b]
    if not pairs:
        return None
    draw = random.Random(SEED)
    resampled = sorted(
        sum(a for a, _ in some) / max(sum(b for _, b in some), 1e-9)
        for some in (draw.choices(pairs, k=len(pairs)) for _ in range(2000))
    )
    value = sum(a for a, _ in pairs) / max(sum(b for _, b in pairs), 1e-9)
    return {"ratio": value, "low": resampled[50], "high": resampled[-51], "rounds": len(pairs)}


def rows_of(rounds: Mapping[str, Sequence[Round | None]], plain: str) -> list[dict[str, Any]]:
    """One row a contestant: seconds a submission, and what it costs beside plain nbgrader."""
    rows = []
    for name, all_rounds in rounds.items():
        took_part = [one for one in all_rounds if one]
        each = [one.seconds / one.submissions for one in took_part]
        rows.append(
            {
                "name": name,
                "submissions": sum(one.submissions for one in took_part),
                "seconds_each": sum(one.seconds for one in took_part)
                / sum(one.submissions for one in took_part),
                "seconds_each_quartiles": statistics.quantiles(each, n=4) if len(each) > 1 else each * 3,
                "processor_each": sum(one.processor for one in took_part)
                / sum(one.submissions for one in took_part),
                "wall": ratio(all_rounds, rounds[plain], "seconds"),
                "processor": ratio(all_rounds, rounds[plain], "processor"),
            }
        )
    return rows


def markdown(record: Mapping[str, Any]) -> str:
    """The record as a page."""

    def shown(found: Mapping[str, float] | None) -> str:
        return "" if not found else f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"

    machine = record["hardware"]
    lines = [
        "# What grading a class costs",
        "",
        f"Made by `scripts/bench_grading.py` on {record['created']} in {record['minutes']} minutes of grading. "
        f"Machine: {machine['cpu']}, {record['processors']} processors, one thread a kernel, "
        f"Python {machine['python']}; "
        f"load {record['load_before']:.1f} before and {record['load']:.1f} at the end.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
        "",
        f"{record['submissions']} synthetic submissions to {LESSON}, smoke tier, seed {SEED}: {record['mix']}; "
        f"in {record['rounds']} rounds. In a round all contestants grade the same ones, in an order drawn anew. A "
        "ratio is that of the totals, to plain nbgrader, with the middle 95 % of a bootstrap over rounds. Processor: "
        "all that the machine computed meanwhile.",
        "",
        "| who | submissions | seconds each (middle half of the rounds) | wall, to nbgrader | processor seconds each "
        "| processor, to nbgrader |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        low, _, high = row["seconds_each_quartiles"]
        lines.append(
            f"| {row['name']} | {row['submissions']} | {row['seconds_each']:.1f} [{low:.1f}, {high:.1f}] "
            f"| {shown(row['wall'])} | {row['processor_each']:.1f} | {shown(row['processor'])} |"
        )
    sandboxed, speedup = record["sandbox_to_unconfined"], record["two_jobs"]
    lines += [
        "",
        f"- The sandbox alone, to the same path without one: {shown(sandboxed)} (wall).",
        f"- Two jobs to one, the same submissions: {shown(speedup)} of the time.",
        f"- Target: the sandboxed path within {TARGET:.2f} of nbgrader: {record['verdict']}.",
        f"- The same points in both gradebooks for {record['submissions'] - len(record['differ'])} of "
        f"{record['submissions']}" + "".join(f"; {line}" for line in record["differ"]) + ".",
        f"- Before the first submission: {record['start']:.1f} s to start the server of fresh processes, once a class.",
        f"- Peak memory with two jobs, grader and kernels together: {record['memory']['all']:.0f} MB "
        f"(the largest process: {record['memory']['largest']:.0f} MB; shared pages counted once).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--submissions", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--round", type=int, default=6, help="submissions a round (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench", help="default: docs/bench")
    options = parser.parse_args()
    os.environ.update(ONE_THREAD | {"ROBUSTKIT_TIER": "smoke"})  # for plain nbgrader's kernels as for ours
    load_before, tier = os.getloadavg()[0], sandbox.choose("auto")
    packages = ("robustkit", "nbgrader", "nbclient", "jupyter_client", "ipykernel", "torch")
    versions = {name: importlib.metadata.version(name) for name in packages}
    whole = class_of(options.submissions)
    names = list(whole)
    parts = [names[i : i + options.round] for i in range(0, len(names), options.round)]
    with tempfile.TemporaryDirectory() as place, fresh.Server() as server:
        folder = Path(place)
        submitted = [
            hand_in({name: whole[name] for name in part}, folder / f"round-{i}")
            for i, part in enumerate(parts)
        ]
        started = time.perf_counter()
        with suppress(Exception):  # a hop that has nothing to do: what it takes is the server's start
            server.hop("judge", folder, "-o", folder / "records.json")
        start = time.perf_counter() - started

        def ours(name: str, confinement: str, jobs: int, every: int = 1) -> Contestant:
            workspace = workspace_in(folder / name)
            return Contestant(name, workspace, robustkit_way(workspace, confinement, server, jobs), every)

        plain = workspace_in(folder / "nbgrader")
        contestants = [
            Contestant("nbgrader", plain, plain_nbgrader(plain)),
            ours(f"robustkit, {tier}", tier, 1),
            ours("robustkit, no sandbox", sandbox.UNCONFINED, 1, RARE),
            ours(f"robustkit, {tier}, 2 jobs", tier, 2, RARE),
        ]
        rounds = raced(contestants, submitted, json.dumps([options.submissions, options.round, versions]))
        with redirect_stderr(io.StringIO()):
            again = ours("memory", tier, 2)
            memory = peak_memory(lambda: again.grade(submitted[0]))
    nbgrader, confined, bare, two = rounds.values()
    rows = rows_of(rounds, "nbgrader")
    cost = rows[1]["wall"]
    kinds = [name[4:] for name in names]
    record = {
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "minutes": round(
            sum(one.seconds for all_rounds in rounds.values() for one in all_rounds if one) / 60, 1
        ),
        "hardware": asdict(hardware()),
        "processors": os.cpu_count(),
        "load_before": load_before,
        "load": os.getloadavg()[0],
        "versions": versions,
        "seed": SEED,
        "submissions": len(names),
        "mix": ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)),
        "rounds": len(parts),
        "rows": rows,
        "sandbox_to_unconfined": ratio(confined, bare, "seconds"),
        "two_jobs": ratio(two, confined, "seconds"),
        "verdict": "undecided"
        if len(parts) < 5 or cost["low"] <= TARGET < cost["high"]
        else "met"
        if cost["high"] <= TARGET
        else "missed",
        "differ": judged_alike(confined, nbgrader),
        "start": start,
        "memory": memory,
        "measured": {
            name: [one and asdict(one) for one in all_rounds] for name, all_rounds in rounds.items()
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "grading.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "grading.md").write_text(markdown(record))
    KEPT.unlink()
    print(markdown(record))


if __name__ == "__main__":
    main()
