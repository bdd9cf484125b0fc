"""How often triage names the right family: a confusion table over seeds, on real images and real attacks.

    python scripts/bench_triage.py --seeds 5 --out docs/bench/triage.json

Each account counts once. "Seen" attackers ask about the untouched image first, "unseen" ones never do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from robustkit import data, models
from robustkit.device import hardware
from robustkit.files import write_atomically
from robustkit.results import Interval
from robustkit.serve import replay
from robustkit.serve.triage import FAMILIES, UNRELATED, triage

SUBJECTS = {"MNIST": ("mnist", "mnist-pgd"), "CIFAR-10": ("cifar10-lossless-4k", "cifar10-l2-w16")}


def confusion(subject: str, split: str, seen: float, seeds: int, each: int) -> dict[str, Counter[str]]:
    """Attacker -> how many of its accounts were given which family."""
    name, weights = SUBJECTS[subject]
    model = models.pretrained(weights)
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for seed in range(seeds):
        images = data.load(name, split, limit=700, seed=seed)
        attackers = replay.attackers(images.x.shape[-1])
        stream, truth = replay.record(model, images, attackers, each=each, benign=500, seen=seen, seed=seed)
        groups = triage(stream).groups
        for account, attacker in truth.items():
            own = [group for group in groups if group.account == account]
            if own:
                found[attacker][max(own, key=lambda group: len(group.inputs)).family] += 1
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--each", type=int, default=8, help="accounts of each attacker in each stream")
    parser.add_argument("--split", choices=("held-out", "tuning"), default="held-out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record: dict[str, object] = {"hardware": str(hardware()), "seeds": options.seeds, "tables": []}
    splits = {
        "held-out": {"MNIST": "test", "CIFAR-10": "report"},
        "tuning": {"MNIST": "train", "CIFAR-10": "select"},
    }
    for subject, split in splits[options.split].items():
        for condition, seen in (("seen", 1.0), ("unseen", 0.0)):
            started = time.perf_counter()
            table = confusion(subject, split, seen, options.seeds, options.each)
            seconds = time.perf_counter() - started
            print(f"\n{subject} ({split}), originals {condition}, {options.seeds} seeds, {seconds:.0f} s")
            print(f"{'':14s}" + "".join(f"{family[:12]:>14s}" for family in FAMILIES))
            for attacker, counts in table.items():
                print(f"{attacker:14s}" + "".join(f"{counts[family]:14d}" for family in FAMILIES))
            # One input whose original nobody has seen cannot be told from a new picture.
            truth = {
                name: one.family if seen or one.searching else UNRELATED
                for name, one in replay.attackers(28).items()
            }
            right = sum(counts[truth[name]] for name, counts in table.items() if name in truth)
            n = sum(counts.total() for name, counts in table.items() if name in truth)
            print(f"named right: {Interval(right, n)}", file=sys.stdout)
            tables = record["tables"]
            assert isinstance(tables, list)
            tables.append(
                {"data": subject, "split": split, "originals": condition, "seconds": seconds, "table": table}
                | {"right": Interval(right, n).record()}
            )
    if options.out:
        write_atomically(options.out, (json.dumps(record, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
