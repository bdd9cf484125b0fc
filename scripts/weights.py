"""Ship trained models: from the folders of training runs to robustkit/weights.

    python scripts/weights.py runs/mnist-pgd runs/mnist-clean

For each run: half-precision weights, and a card with the run's record and what was measured on the weights as
shipped, seed 0: accuracy under PGD-100 with 10 restarts on 1,000 test images, an audit on 200, and the
certificates that the training was for (smoothing on 500 images, interval bounds on 1,000). The folder's name
is the model's.
"""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from torch import nn

from robustkit.attacks import Attack
from robustkit.audit import audit
from robustkit.certify.bounds import crown_ibp_margins, ibp_margins, verified_accuracy
from robustkit.certify.certificates import Certification, Smoothing
from robustkit.certify.smoothing import certify
from robustkit.data import Dataset, load
from robustkit.defences import DEFENCES
from robustkit.evaluate import ATTACKS, evaluate
from robustkit.models import build, load_weights, pretrained, save_weights, zoo
from robustkit.recipes import Recipe, find_recipe
from robustkit.results import Audit, Evaluation, Interval
from robustkit.threat import Ball, white_box

MEASURED_WITH: dict[str, Attack] = {"pgd-100x10": ATTACKS["pgd-100x10"]}
AUDITED, SMOOTHED = 200, 500  # images; an audit's surrogate is the model trained without a defence
SURROGATE = "mnist-clean"


def ship(run_dir: Path, images: Dataset) -> None:
    """Write `run_dir.name`.safetensors and .json to the package's weights."""
    run = json.loads((run_dir / "run.json").read_text())
    name, recipe = run_dir.name, find_recipe(run["recipe"])
    weights, card = zoo.WEIGHTS / f"{name}.safetensors", zoo.WEIGHTS / f"{name}.json"
    save_weights(load_weights(build(recipe.model), run_dir / "model.safetensors").half(), weights)
    ball = Ball(**run["ball"])
    described: dict[str, object] = {
        "name": name,
        "architecture": recipe.model,
        "format": "float16 safetensors, computed with in float32",
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "threat": str(white_box(ball)),
        "minutes": round(sum(epoch["seconds"] for epoch in run["history"]) / 60, 1),
        **{key: run[key] for key in ("recipe", "schedule", "ball", "data", "n", "seed", "tier", "hardware")},
    }
    _write(card, described)  # `pretrained` reads it: everything is measured on the weights as shipped
    model, tier = pretrained(name), run["tier"]
    evaluation = evaluate(model, images, ball, MEASURED_WITH, model_name=name, tier=tier)
    print(f"{name}: clean {evaluation.clean}, robust {evaluation.robust}")
    described["measured"] = measured(evaluation)
    _write(card, described)
    part, surrogate = images.take(range(AUDITED)), pretrained(SURROGATE)
    checked = audit(model, part, ball, model_name=name, tier=tier, surrogate=surrogate)
    described["audit"] = audited(checked)
    _write(card, described)
    described["certified"] = certificates(recipe, model, images, tier)
    _write(card, described)


def _write(card: Path, described: dict[str, object]) -> None:
    card.write_text(json.dumps(described, indent=2) + "\n")


def certificates(recipe: Recipe, model: nn.Module, images: Dataset, tier: str) -> dict[str, object]:
    """The certificates that the recipe trains for, by smoothing or by interval bounds; empty for others."""
    settings = getattr(DEFENCES[recipe.defence], "keywords", {})
    if "sigma" in settings:
        part = images.take(range(SMOOTHED))
        made = certify(model, part, Smoothing(settings["sigma"]), model_name=recipe.name, tier=tier)
        return {
            "by": "randomized smoothing",
            "smoothing": asdict(made.smoothing),
            "largest_radius": made.smoothing.largest_radius,
            "precision": made.base.precision,
            "under_noise": share(made.base.noisy),
            **made.summary(),
            **source(made),
        }
    if "full_eps" in settings:
        bounds = {"IBP": ibp_margins, "CROWN-IBP": crown_ibp_margins}
        return {
            "by": "interval bounds",
            "threat": f"every perturbation in {recipe.ball}, inputs in [0, 1]; bounds in float64",
            "verified": {
                by: share(verified_accuracy(model, images, recipe.ball, margins))
                for by, margins in bounds.items()
            },
            "data": asdict(images.provenance),
        }
    return {}


def audited(result: Audit) -> dict[str, object]:
    """The verdicts of an audit, and the evidence of its findings."""
    verdicts = {outcome.check: outcome.verdict for outcome in result.outcomes}
    findings = {outcome.check: outcome.evidence for outcome in result.findings}
    return {"n": result.n, "findings": findings, "verdicts": verdicts, **source(result)}


def measured(result: Evaluation) -> dict[str, object]:
    """What a reader of the card wants of an evaluation: all but the verdicts one by one."""
    return {
        "clean": share(result.clean),
        "robust": share(result.robust),
        "attacks": [asdict(run) for run in result.attacks],
        **source(result),
    }


def source(result: Evaluation | Audit | Certification) -> dict[str, object]:
    """Where figures are from."""
    return {
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
