"""Attacks by defence: what black-box attackers achieve against `robustkit.serve`, undefended, defended, and adapting.

The real service on sockets of this process, real images, several seeds (each draws other images and other noise); an
attack begins with new accounts, and its results are checked by accounts of their own. Seeds are pooled.

Writes docs/bench/redteam.json and docs/bench/redteam.md after each case. Each case and seed is kept in build/redteam
until the whole is done: run again with the same arguments after an interruption, and it goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from robustkit import data, models
from robustkit.files import write_atomically
from robustkit.models import zoo
from robustkit.serve.redteam.campaign import campaign
from robustkit.serve.redteam.client import granted
from robustkit.serve.redteam.page import cells
from robustkit.serve.redteam.records import Campaign, Run, pooled, read_campaign
from robustkit.serve.server import running
from robustkit.serve.settings import DETECTORS, Settings
from robustkit.threat import Ball

ROOT = Path(__file__).resolve().parents[1]
OUT, PARTS = ROOT / "docs" / "bench", ROOT / "build" / "redteam"
MODEL, SURROGATE = "cifar10-l2-w16", "cifar10-gaussian-0.25-w16"
BALL = Ball("Linf", 16 / 255)  # enough images fall undefended to tell defences apart
RATE = "9999999/minute"


@dataclass(frozen=True)
class Case:
    """One state of the defence, one attacker."""

    attacks: tuple[str, ...]
    mode: str = "reject"
    detectors: tuple[str, ...] = DETECTORS
    output: str = "full"
    adaptive: bool = False
    accounts: int = 1


_ADAPTS = ("square", "simba", "nes", "linear-bandit", "hop-skip-jump", "rotation-translation")
_ALL = (*_ADAPTS, "art-square", "transfer-pgd")
_SEARCHES = ("square", "linear-bandit")
CASES = {
    "off": Case(_ALL, mode="off", detectors=()),
    "on": Case(_ALL),
    "on, adaptive": Case(_ADAPTS, adaptive=True),
    "fingerprints": Case(_SEARCHES, detectors=("fingerprints",)),
    "fingerprints, adaptive": Case(_SEARCHES, detectors=("fingerprints",), adaptive=True),
    "low-frequency": Case(_SEARCHES, detectors=("low-frequency",)),
    "low-frequency, adaptive": Case(_SEARCHES, detectors=("low-frequency",), adaptive=True),
    "ban after 5": Case((*_SEARCHES, "rotation-translation"), mode="ban"),
    "ban after 5, adaptive, 10 keys": Case(
        (*_SEARCHES, "rotation-translation"), mode="ban", adaptive=True, accounts=10
    ),
    "labels alone, off": Case(
        ("square", "hop-skip-jump", "rotation-translation"), mode="off", detectors=(), output="label"
    ),
}


def measured(name: str, case: Case, n: int, queries: int, seed: int) -> Campaign:
    """One case under one seed, on a service of its own."""
    images = data.load("cifar10-jpeg", "test", limit=n, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            Path(folder),
            model=MODEL,
            port=0,
            admin_port=0,
            account_rate=RATE,
            address_rate=RATE,
            mode=case.mode,
            detectors=case.detectors,
            output=case.output,
        )
        with running(settings) as here:
            return campaign(
                granted(here.url, here.admin_url, here.admin, case.accounts),
                images,
                case.attacks,
                BALL,
                queries=queries,
                name=name,
                tier="standard",
                adaptive=case.adaptive,
                surrogate=models.pretrained(SURROGATE),
                seed=seed,
            )


def place(name: str, case: Case, n: int, queries: int, seed: int) -> Path:
    """Where the campaign lies that was measured under just these terms, or will: of these weights and this code."""
    terms = hashlib.sha256(repr((name, case, n, queries, seed, BALL, subject())).encode()).hexdigest()
    return PARTS / f"{terms[:16]}.json"


@cache
def subject() -> str:
    """The weights and the code that are measured, as they were when the bench began."""
    weights = [zoo.card(model)["sha256"] for model in (MODEL, SURROGATE)]
    code = [path.read_bytes() for path in sorted((ROOT / "robustkit").rglob("*.py"))]
    return hashlib.sha256(repr((weights, code)).encode()).hexdigest()


def pool(campaigns: Sequence[Campaign]) -> dict[str, Run]:
    """Attack -> its run over all seeds."""
    attacks = dict.fromkeys(run.attack for one in campaigns for run in one.runs)
    return {
        attack: pooled([run for one in campaigns for run in one.runs if run.attack == attack])
        for attack in attacks
    }


def seeds_apart(campaigns: Sequence[Campaign], attack: str) -> list[float | None]:
    """The success of each seed alone."""
    shares = [run.success() for one in campaigns for run in one.runs if run.attack == attack]
    return [None if share is None else round(share.share, 3) for share in shares]


def minutes(found: dict[str, list[Campaign]]) -> float:
    """What all attempts took."""
    each = (
        one for told in found.values() for campaign in told for run in campaign.runs for one in run.attempts
    )
    return sum(one.seconds for one in each) / 60


def page(found: dict[str, list[Campaign]]) -> str:
    """The table of attacks by defence, as Markdown."""
    first = next(iter(found.values()))[0]
    seeds = sorted({one.seed for each in found.values() for one in each})
    lines = [
        "# Attacks by defence",
        "",
        "Written by `python scripts/bench_redteam.py`. A success is a fresh query, with the bytes that the attack had "
        "sent and by an account of its own, that gets another class, inside the threat model and the budget, on an "
        "image that was right at first. 95 % Wilson intervals over the images of all seeds; n is the number attacked.",
        "",
        f"Black box through the service's HTTP API, {BALL.norm} eps {255 * BALL.eps:g}/255, rotations up to 30 degrees "
        f"with shifts up to 3 pixels, untargeted, at most {first.runs[0].threat.queries} queries an image. Model "
        f"{MODEL}, surrogate {SURROGATE}; {len(first.indices)} images a seed of {first.data}; seeds "
        f"{', '.join(map(str, seeds))}; {first.hardware}; {minutes(found):.0f} minutes in all.",
        "",
        '"On" is both detectors in mode reject. Adaptive attackers tune step and noise to the rejections; their keys '
        "take turns. Square's adaptive form changes a share of coarse blocks; linear-bandit fits a linear model to "
        "all answers and asks where that may fall. Rejected: share of the attack's queries, a cost and no measure of "
        "security.",
        "",
        "| defence and attacker | attack | success | by seed | median queries | rejected | keys burnt |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, each in found.items():
        for attack, run in pool(each).items():
            success, *rest = cells(run)
            apart = ", ".join("-" if one is None else f"{one:.0%}" for one in seeds_apart(each, attack))
            lines.append(f"| {name} | {attack} | {success} | {apart} | {' | '.join(rest)} |")
    left = left_out({(name, attack) for name, each in found.items() for attack in pool(each)})
    return "\n".join([*lines, "", *([f"Not run this time: {left}."] if left else []), ""])


def left_out(ran: set[tuple[str, str]]) -> str:
    """Which attacks of which cases are missing."""
    missing = {
        name: [attack for attack in case.attacks if (name, attack) not in ran] for name, case in CASES.items()
    }
    return "; ".join(f"{name}: {', '.join(attacks)}" for name, attacks in missing.items() if attacks)


def record(found: dict[str, list[Campaign]]) -> dict[str, Any]:
    """Totals of each case, and each attempt on an image that was right at first."""
    first = next(iter(found.values()))[0]
    return {
        "type": "RedTeamBench",
        "data": str(first.data),
        "model": MODEL,
        "surrogate": SURROGATE,
        "images_a_seed": len(first.indices),
        "minutes": round(minutes(found), 1),
        "hardware": asdict(first.hardware),
        "cases": {
            name: [
                {"threat": str(run.threat), "by_seed": seeds_apart(each, attack), **run.record()}
                for attack, run in pool(each).items()
            ]
            for name, each in found.items()
        },
        "attempts": {
            "columns": ["seed", "image", "succeeded", "queries", "rejected", "keys burnt", "size"],
            "rows": {
                f"{name}: {attack}": [
                    [
                        told.seed,
                        one.image,
                        run.succeeded(one),
                        one.queries,
                        one.rejected,
                        one.burnt,
                        one.size,
                    ]
                    for told in each
                    for run in told.runs
                    if run.attack == attack
                    for one in run.attacked
                ]
                for name, each in found.items()
                for attack in pool(each)
            },
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=20, help="for each seed (default 20)")
    parser.add_argument("--queries", type=int, default=250, help="for each image and attack (default 250)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=list(CASES), help="some of them, by name")
    parser.add_argument("--attacks", nargs="*", help="some of those of each case, by name")
    parser.add_argument("--out", type=Path, default=OUT, help="folder (default docs/bench)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.getLogger("robustkit.serve").setLevel(logging.CRITICAL)
    cases = {name: CASES[name] for name in options.cases}
    if options.attacks:
        kept = {
            name: tuple(attack for attack in case.attacks if attack in options.attacks)
            for name, case in cases.items()
        }
        cases = {name: replace(cases[name], attacks=attacks) for name, attacks in kept.items() if attacks}
    found: dict[str, list[Campaign]] = {}
    subject()  # now: the code may be edited while it runs
    jobs = [(seed, name, case) for seed in range(options.seeds) for name, case in cases.items()]
    for seed, name, case in (bar := tqdm(jobs, unit="case", file=sys.stderr)):
        bar.set_description(f"{name}, seed {seed}")
        part = place(name, case, options.images, options.queries, seed)
        if part.exists():
            one = read_campaign(part)
        else:
            one = measured(name, case, options.images, options.queries, seed)
            if not one.stopped:
                PARTS.mkdir(parents=True, exist_ok=True)
                write_atomically(part, f"{one.to_json()}\n".encode())
        found.setdefault(name, []).append(one)
        write_atomically(options.out / "redteam.json", f"{json.dumps(record(found))}\n".encode())
        write_atomically(options.out / "redteam.md", page(found).encode())
        if one.stopped:
            sys.exit(
                f"bench: {one.stopped}; {options.out} holds what was measured until then; run again to go on"
            )
    shutil.rmtree(PARTS, ignore_errors=True)
    print(page(found), file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # between two attacks
        sys.exit("bench: interrupted; run again to go on")
