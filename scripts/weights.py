"""Ship trained models: from the folders of training runs to robustkit/weights.

    python scripts/weights.py runs/mnist-pgd runs/cifar10-l2-w16 --n 200

For each run: half-precision weights, and a card with the run's record and what was measured on the weights as
shipped, seed 0: clean and robust accuracy on test images, an audit, and the certificates that the training was
for. CIFAR-10 models are measured on the JPEG mirror's test split and on lossless images that neither trained
nor selected them, and in a ball that they were not trained for. The folder's name is the model's.
A section of the card that stands is not made again, and an evaluation that was cut short goes on.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from robustkit.attacks import Attack
from robustkit.audit import audit
from robustkit.certify.bounds import crown_ibp_margins, ibp_margins, verified_accuracy
from robustkit.certify.certificates import Certification, Smoothing
from robustkit.certify.smoothing import certify
from robustkit.data import Dataset, load
from robustkit.defences import DEFENCES
from robustkit.device import pick_device
from robustkit.evaluate import ATTACKS, PROTOCOLS, evaluate
from robustkit.models import build, load_weights, pretrained, zoo
from robustkit.models.files import save_shards
from robustkit.recipes import Recipe, find_recipe
from robustkit.results import Audit, Evaluation, Interval
from robustkit.threat import Ball, white_box

Section = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Effort:
    """How many images are attacked, audited and certified, and with how many noisy samples each."""

    n: int
    audited: int
    certified: int
    samples: int


@dataclass(frozen=True)
class Test:
    """On what the models of a data set are measured: the section of the card, the images, the attacks."""

    section: str
    dataset: str
    split: str
    attacks: Mapping[str, Attack]


_PGD = {"pgd-50x10": ATTACKS["pgd-50x10"]}
_MNIST = Test("measured", "mnist", "test", {"pgd-100x10": ATTACKS["pgd-100x10"]})
_JPEG = Test("measured", "cifar10-jpeg", "test", {**_PGD, **PROTOCOLS["fast"]})
_LOSSLESS = Test("lossless", "cifar10-lossless-4k", "report", _PGD)
_PUBLISHED = Test("measured", "cifar10", "test", _JPEG.attacks)
TESTS = {"mnist": [_MNIST], "cifar10-jpeg": [_JPEG, _LOSSLESS], "cifar10": [_PUBLISHED]}

SURROGATES = {"mnist": "mnist-clean"}  # for the audit: a model of the task that was trained without a defence
OTHER_BALL = {"L2": Ball("Linf", 8 / 255), "Linf": Ball("L2", 0.5)}
NOTES = {
    "preact_resnet10_w16": "a small network, what minutes or an hour of one CPU core buy: for practice, far below what "
    "is published for this ball, and nothing to defend a service with"
}


def ship(run_dir: Path, effort: Effort, into: Path) -> None:
    """Write the weights and the card of the model `run_dir.name` into a folder."""
    run = json.loads((run_dir / "run.json").read_text())
    name, recipe = run_dir.name, find_recipe(run["recipe"])
    card, trained = into / f"{name}.json", load_weights(build(recipe.model), run_dir / "model.safetensors")
    files = save_shards(trained.half(), into / f"{name}.safetensors", zoo.SHARD)
    ball = reported(Ball(**run["ball"]))
    kept = ("recipe", "schedule", "ball", "data", "held_out", "n", "seed", "tier", "precision", "hardware")
    described: dict[str, Any] = {
        "name": name,
        "architecture": recipe.model,
        "format": "float16 safetensors, computed with in float32",
        "files": [path.name for path in files],
        "sha256": zoo.digest(files),
        "threat": str(white_box(ball)),
        "note": NOTES.get(recipe.model, ""),
        "minutes": round(sum(epoch["seconds"] for epoch in run["history"]) / 60, 1),
        **{key: run[key] for key in kept},
    }
    if card.exists() and (before := zoo.card(name, into))["sha256"] == described["sha256"]:
        described = before | described
    _write(card, described)
    model = zoo.load(name, build, into).to(pick_device())  # everything is measured on the weights as shipped
    for section, make in sections(model, run_dir, recipe, ball, effort, run["tier"]).items():
        if section not in described:
            described[section] = make()
            _write(card, described)
            print(f"{name}: {section}: {summary(described[section])}")


def sections(
    model: nn.Module, run_dir: Path, recipe: Recipe, ball: Ball, effort: Effort, tier: str
) -> dict[str, Section]:
    """What is measured for the card, in the order of what matters most."""
    place, name = pick_device(), run_dir.name

    def attacked(test: Test, ball: Ball, attacks: Mapping[str, Attack], section: str) -> dict[str, Any]:
        images = load(test.dataset, test.split, limit=effort.n, device=place)
        journal = run_dir / f"{section}.partial"
        result = evaluate(model, images, ball, attacks, model_name=name, tier=tier, journal=journal)
        journal.unlink()
        return measured(result)

    tests = TESTS[recipe.dataset]
    made: dict[str, Section] = {
        test.section: partial(attacked, test, ball, test.attacks, test.section) for test in tests
    }
    first = tests[0]

    def certified() -> dict[str, Any]:
        images = load(first.dataset, first.split, limit=effort.certified, device=place)
        return certificates(recipe, model, images, tier, effort.samples)

    def checked() -> dict[str, Any]:
        images = load(first.dataset, first.split, limit=effort.audited, device=place)
        surrogate = pretrained(SURROGATES[recipe.dataset]).to(place) if recipe.dataset in SURROGATES else None
        return audited(audit(model, images, ball, model_name=name, tier=tier, surrogate=surrogate))

    made |= {"certified": certified, "audit": checked}
    if recipe.dataset != "mnist" and "sigma" not in settings(recipe):
        made["other_ball"] = partial(attacked, first, OTHER_BALL[ball.norm], _PGD, "other_ball")
    return made


def reported(trained: Ball) -> Ball:
    """The ball that figures are for: CIFAR-10's L2 models train at 128/255 and are reported at 0.5."""
    return Ball("L2", 0.5) if trained == Ball("L2", 128 / 255) else trained


def settings(recipe: Recipe) -> dict[str, Any]:
    """What the recipe fixes of its defence, e.g. the noise."""
    fixed: dict[str, Any] = getattr(DEFENCES[recipe.defence], "keywords", {})
    return fixed


def summary(section: dict[str, Any]) -> str:
    kept = {key: section[key] for key in ("clean", "robust", "under_noise", "findings") if key in section}
    return json.dumps(kept or list(section))


def _write(card: Path, described: dict[str, Any]) -> None:
    card.write_text(json.dumps(described, indent=2) + "\n")


def certificates(
    recipe: Recipe, model: nn.Module, images: Dataset, tier: str, samples: int
) -> dict[str, object]:
    """The certificates that the recipe trains for, by smoothing or by interval bounds; empty for others."""
    fixed = settings(recipe)
    if "sigma" in fixed:
        smoothing = Smoothing(fixed["sigma"], n=samples)
        made = certify(model, images, smoothing, model_name=recipe.name, tier=tier)
        return {
            "by": "randomized smoothing",
            "smoothing": asdict(made.smoothing),
            "largest_radius": made.smoothing.largest_radius,
            "precision": made.base.precision,
            "under_noise": share(made.base.noisy),
            **made.summary(),
            **source(made),
        }
    if "full_eps" in fixed:
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
        "attacks": [
            asdict(run) | {"accuracy_after": share(result.robust_after(count))}
            for count, run in enumerate(result.attacks, 1)
        ],
        "threat": str(result.threat),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of training runs")
    parser.add_argument("--n", type=int, default=1000, help="images that are attacked (default 1000)")
    parser.add_argument("--audited", type=int, default=200, help="images of the audit (default 200)")
    parser.add_argument("--certified", type=int, default=500, help="images that are certified (default 500)")
    parser.add_argument("--samples", type=int, default=10_000, help="noisy samples for each (default 10000)")
    parser.add_argument(
        "--into", type=Path, default=zoo.WEIGHTS, metavar="FOLDER", help="default: the package's"
    )
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    effort = Effort(options.n, options.audited, options.certified, options.samples)
    for run_dir in options.runs:
        ship(run_dir, effort, options.into)


if __name__ == "__main__":
    main()
