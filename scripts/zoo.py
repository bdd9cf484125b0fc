"""Train the CIFAR-10 models of the kit on a GPU and ship them with their cards, in chunks of any length.

    python scripts/zoo.py                    until all is done
    python scripts/zoo.py --minutes 8        a chunk; the same command again goes on where it stopped

A run goes on from its checkpoint, which is at most 30 seconds old, to the weights of an uninterrupted one; an
evaluation goes on from its journal. What is done is not done again.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

TRAINED = ("cifar10-l2", "cifar10-linf", "cifar10-gaussian-0.25")
UNFINISHED = 3


def commands(recipe: str, out: Path, measure: list[str]) -> Iterator[list[str]]:
    """What is left to do for a recipe: its training, unless it is done, and its card."""
    run_dir = out / recipe
    if not (run_dir / "run.json").exists():
        yield [
            sys.executable,
            "-m",
            "robustkit",
            "train",
            recipe,
            "--tier",
            "full",
            "--resume",
            "--tensorboard",
            "--out",
            str(run_dir),
        ]
    yield [sys.executable, str(Path(__file__).with_name("weights.py")), str(run_dir), *measure]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "recipes", nargs="*", default=TRAINED, metavar="RECIPE", help=f"default: {', '.join(TRAINED)}"
    )
    parser.add_argument("--minutes", type=float, help="stop after so long (default: when all is done)")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="FOLDER", help="where the runs go")
    options, measure = parser.parse_known_args()  # the others are those of weights.py
    end = time.monotonic() + 60 * options.minutes if options.minutes else None
    for recipe in options.recipes:
        for command in commands(recipe, options.out, measure):
            try:
                left = None if end is None else max(end - time.monotonic(), 0.0)
                done = subprocess.run(command, timeout=left, check=False)
            except subprocess.TimeoutExpired:
                print(f"{recipe}: not finished; the same command goes on.", file=sys.stderr)
                return UNFINISHED
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
