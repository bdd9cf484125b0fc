"""Ship trained models: from the folders of training runs to robustkit/weights.

    python scripts/weights.py runs/mnist-pgd runs/mnist-clean

For each run: half-precision weights, and a card with the run's record and the accuracies measured on the
weights as shipped (PGD-100 with 10 restarts on 1,000 test images, seed 0). The folder's name is the model's.
"""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from robustkit.attacks import Attack
from robustkit.data import Dataset, load
from robustkit.evaluate import ATTACKS, evaluate
from robustkit.models import build, load_weights, pretrained, save_weights, zoo
from robustkit.results import Evaluation, Interval
from robustkit.threat import Ball, white_box
from robustkit.train import find_recipe

MEASURED_WITH: dict[str, Attack] = {"pgd-100x10": ATTACKS["pgd-100x10"]}


def ship(run_dir: Path, images: Dataset) -> None:
    """Write `run_dir.name`.safetensors and .json to the package's weights."""
    run = json.loads((run_dir / "run.json").read_text())
    name, architecture = run_dir.name, find_recipe(run["recipe"]).model
    weights, card = zoo.WEIGHTS / f"{name}.safetensors", zoo.WEIGHTS / f"{name}.json"
    save_weights(load_weights(build(architecture), run_dir / "model.safetensors").half(), weights)
    ball = Ball(**run["ball"])
    described = {
        "name": name,
        "architecture": architecture,
        "format": "float16 safetensors, computed with in float32",
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "threat": str(white_box(ball)),
        "minutes": round(sum(epoch["seconds"] for epoch in run["history"]) / 60, 1),
        **{key: run[key] for key in ("recipe", "schedule", "ball", "data", "n", "seed", "tier", "hardware")},
    }
    card.write_text(
        json.dumps(described, indent=2) + "\n"
    )  # `pretrained` reads it: measured as it is shipped
    result = evaluate(pretrained(name), images, ball, MEASURED_WITH, model_name=name, tier=run["tier"])
    card.write_text(json.dumps(described | {"measured": measured(result)}, indent=2) + "\n")
    print(f"{name}: clean {result.clean}, robust {result.robust}")


def measured(result: Evaluation) -> dict[str, object]:
    """What a reader of the card wants of an evaluation: all but the verdicts one by one."""
    return {
        "clean": share(result.clean),
        "robust": share(result.robust),
        "attacks": [asdict(run) for run in result.attacks],
        "data": asdict(result.data),
        "seed": result.seed,
        "hardware": asdict(result.hardware),
        "created": result.created,
    }


def share(value: Interval) -> dict[str, float]:
    return {"k": value.k, "n": value.n, "low": round(value.low, 4), "high": round(value.high, 4)}


if __name__ == "__main__":
    images = load("mnist", "test", limit=1000)
    for folder in sys.argv[1:]:
        ship(Path(folder), images)
