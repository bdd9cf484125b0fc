"""Recipes: named training runs, each a short configuration of the one loop in `train.py`.

robustkit train cifar10-l2          by name
robustkit train mine.toml           from a file that says what differs from a named one
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.augment import AUGMENTATIONS, Augmentation
from robustkit.defences import DEFENCES, Defence
from robustkit.errors import RobustkitError
from robustkit.models import MODELS
from robustkit.threat import Ball
from robustkit.train import Schedule


@dataclass(frozen=True)
class Recipe:
    """A named training run: data, model, defence, ball, and a schedule for each tier.

    `held_out` is the data set and split by which the checkpoint is selected; None leaves the last weights.
    """

    name: str
    dataset: str
    model: str
    defence: str
    ball: Ball
    schedules: dict[str, Schedule]
    limits: dict[str, int | None]  # training images used in each tier; None is all of them
    split: str = "train"
    held_out: tuple[str, str] | None = None
    augmentation: str = "none"


# --- MNIST -----------------------------------------------------------------------------------------

_MNIST = Ball("Linf", 0.3)
_MNIST_LIMITS: dict[str, int | None] = {"smoke": 1400, "standard": None, "full": None}


def _mnist(
    name: str, defence: str, smoke: Schedule, standard: Schedule, full: Schedule, ball: Ball = _MNIST
) -> Recipe:
    schedules = {"smoke": smoke, "standard": standard, "full": full}
    return Recipe(name, "mnist", "mnist_cnn", defence, ball, schedules, _MNIST_LIMITS)


# For certificates: smoothing is about L2, interval bounds hold up to eps 0.1 on this small network.
_L2, _SMALL = Ball("L2", 0.5), Ball("Linf", 0.1)
_NOISE = (Schedule(6, 64), Schedule(4), Schedule(20))
_BOUNDS = (
    Schedule(12, 64, 2e-3, eps_warmup=0.7),
    Schedule(20, 128, 2e-3, eps_warmup=0.7),
    Schedule(60, 128, 2e-3, eps_warmup=0.7),
)

# --- CIFAR-10 --------------------------------------------------------------------------------------

# A little more than 0.5, at which robustness is reported: what training rounds is then no point lost.
_TRAINED_L2, _LINF = Ball("L2", 128 / 255), Ball("Linf", 8 / 255)
_LONG = Schedule(
    120, 512, 0.2, optimizer="sgd", rise=0.05, ema=0.995, bf16=True, watched=2_000
)  # for a GPU: PreAct-18, PGD-10
_SHORT = Schedule(30, 256, 0.2, optimizer="sgd", rise=0.4, ema=0.99, bf16=True, watched=1_000)  # one step
_TINY = Schedule(4, 128, 0.1, optimizer="sgd", rise=0.3, ema=0.99, bf16=True, watched=500)  # one CPU core
_HOUR = Schedule(50, 128, 0.1, optimizer="sgd", rise=0.2, ema=0.995, bf16=True, watched=500)  # bf16 units
_SMOKE = Schedule(2, 32, 0.1, optimizer="sgd", ema=0.9, watched=64)  # is the machinery whole?
_SELECTED_BY = ("cifar10-lossless-4k", "select")


def _cifar10(
    name: str,
    defence: str,
    ball: Ball,
    schedule: Schedule,
    *,
    model: str = "preact_resnet18",
    augmentation: str = "flip-crop",
    held_out: tuple[str, str] | None = _SELECTED_BY,
) -> Recipe:
    schedules = {"smoke": _SMOKE, "standard": schedule, "full": schedule}
    limits = {"smoke": 256, "standard": None, "full": None}
    return Recipe(
        name,
        "cifar10-jpeg",
        model,
        defence,
        ball,
        schedules,
        limits,
        held_out=held_out,
        augmentation=augmentation,
    )


def _smoke_alone(recipe: Recipe) -> Recipe:
    """The smoke tier's schedule in every tier."""
    tiers = tuple(recipe.schedules)
    return replace(recipe, schedules=dict.fromkeys(tiers, _SMOKE), limits=dict.fromkeys(tiers, 256))


# MNIST's smoke tier has about 20 steps an epoch: small batches, and eps grown from zero, or one-step
# training at eps 0.3 never leaves the constant answer.
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _mnist("mnist-clean", "clean", Schedule(4, 64), Schedule(2), Schedule(5)),
        _mnist("mnist-fgsm", "fgsm-at", Schedule(8, 64, eps_warmup=0.3), Schedule(3), Schedule(10)),
        _mnist(
            "mnist-rs-fgsm",
            "rs-fgsm-at",
            Schedule(8, 64, eps_warmup=0.3),
            Schedule(5, eps_warmup=0.2),
            Schedule(15, eps_warmup=0.2),
        ),
        _mnist(
            "mnist-pgd",
            "pgd-at",
            Schedule(12, 64, eps_warmup=0.5),
            Schedule(12, eps_warmup=0.3),
            Schedule(40, eps_warmup=0.3),
        ),
        _mnist("mnist-gaussian-0.25", "gaussian-0.25", *_NOISE, _L2),
        _mnist("mnist-gaussian-0.5", "gaussian-0.5", *_NOISE, _L2),
        _mnist("mnist-consistency-0.25", "consistency-0.25", *_NOISE, _L2),
        _mnist("mnist-consistency-0.5", "consistency-0.5", *_NOISE, _L2),
        _mnist("mnist-smoothadv-0.25", "smoothadv-0.25", *_NOISE, _L2),
        _mnist("mnist-ibp", "ibp-0.1", *_BOUNDS, _SMALL),
        _mnist("mnist-crown-ibp", "crown-ibp-0.1", *_BOUNDS, _SMALL),
        # The three that `make zoo` trains.
        _cifar10("cifar10-l2", "pgd-10-l2-awp", _TRAINED_L2, _LONG),
        _cifar10("cifar10-linf", "pgd-10-linf-awp", _LINF, _LONG),
        _cifar10("cifar10-gaussian-0.25", "gaussian-0.25", _L2, _LONG, held_out=None),
        # Other roads to the same place.
        _cifar10("cifar10-l2-pgd", "pgd-10-l2-at", _TRAINED_L2, _LONG),
        _cifar10("cifar10-l2-strong", "pgd-10-l2-awp", _TRAINED_L2, _LONG, augmentation="strong"),
        _cifar10("cifar10-l2-one-step", "one-step-l2-at", _TRAINED_L2, _SHORT),
        _cifar10("cifar10-linf-trades", "trades-awp", _LINF, _LONG),
        _cifar10("cifar10-linf-rs-fgsm", "rs-fgsm-at", _LINF, _SHORT),
        _cifar10("cifar10-linf-n-fgsm", "n-fgsm-at", _LINF, _SHORT),
        # For one CPU core, and for a test.
        _cifar10("cifar10-l2-w16", "one-step-l2-at", _TRAINED_L2, _TINY, model="preact_resnet10_w16"),
        _cifar10("cifar10-l2-w16-long", "one-step-l2-at", _TRAINED_L2, _HOUR, model="preact_resnet10_w16"),
        _cifar10(
            "cifar10-gaussian-0.25-w16",
            "gaussian-0.25",
            _L2,
            _TINY,
            model="preact_resnet10_w16",
            held_out=None,
        ),
        _smoke_alone(
            _cifar10("cifar10-l2-smoke", "pgd-2-at", _TRAINED_L2, _SMOKE, model="preact_resnet10_w4")
        ),
    )
}

# --- by name, or from a file -----------------------------------------------------------------------


def find_recipe(name: str) -> Recipe:
    """The recipe by name, or read from a file whose name ends in .toml.

    Raises: RobustkitError for an unknown name or key, naming the nearest one, and for a file that is none.
    """
    if name.endswith(".toml"):
        return read_recipe(Path(name))
    return RECIPES[_known(name, RECIPES, "recipe")]


def read_recipe(path: Path) -> Recipe:
    """A recipe from a TOML file: `base`, the name of a recipe, and whatever differs from it.

        base = "cifar10-l2"
        dataset = "cifar10"
        split = "fit"
        held_out = ["cifar10", "select"]
        [ball]
        eps = 0.25
        [schedule]
        epochs = 60

    The file's name is the recipe's; what [schedule] and `limit` (training images) say counts in every tier.
    Raises: RobustkitError for a file that cannot be read, an unknown key or name, naming the nearest one, or
    a value that means nothing.
    """
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RobustkitError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RobustkitError(f"{path} is no TOML ({error}); write it as `KEY = VALUE` lines.") from error
    plain = ("dataset", "split", "model", "defence", "augmentation")
    for key in told:
        _known(key, ("base", *plain, "held_out", "limit", "ball", "schedule"), f"key of {path.name}")
    if "base" not in told:
        raise RobustkitError(
            f'{path.name} has no base; name the recipe it starts from, e.g. base = "cifar10-l2".'
        )
    base = RECIPES[_known(told["base"], RECIPES, "recipe")]
    for key, names in (("model", MODELS), ("defence", DEFENCES), ("augmentation", AUGMENTATIONS)):
        if key in told:
            _known(told[key], names, key)
    changes: dict[str, Any] = {key: told[key] for key in plain if key in told}
    try:
        if "held_out" in told:
            changes["held_out"] = _pair(told["held_out"])
        if "limit" in told:
            changes["limits"] = dict.fromkeys(base.limits, int(told["limit"]))
        changes["ball"] = _changed(base.ball, told.get("ball", {}), f"key of [ball] in {path.name}")
        changes["schedules"] = {
            tier: _changed(one, told.get("schedule", {}), f"key of [schedule] in {path.name}")
            for tier, one in base.schedules.items()
        }
    except RobustkitError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise RobustkitError(
            f"{path.name} has a value of the wrong type ({error}); see {base.name}."
        ) from error
    return replace(base, name=path.stem, **changes)


def _pair(told: list[str]) -> tuple[str, str] | None:
    """Data set and split, or None for an empty list. Raises: TypeError."""
    if not isinstance(told, list) or len(told) not in (0, 2):
        raise TypeError(f"{told!r} is no [data set, split]")
    return (told[0], told[1]) if told else None


def _changed(record: Any, changes: Mapping[str, Any], what: str) -> Any:
    """A dataclass with some fields changed. Raises: RobustkitError for a field that it has not."""
    for key in changes:
        _known(key, [one.name for one in fields(record)], what)
    return replace(record, **changes)


def _known(name: str, names: Iterable[str], what: str) -> str:
    """`name`, if it is one of `names`. Raises: RobustkitError, naming the nearest one."""
    known = list(names)
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
    raise RobustkitError(f"{what} {name!r} is unknown; did you mean {near!r}? All: {', '.join(known)}.")


def defence_of(recipe: Recipe) -> Defence:
    """What the loop minimises: the recipe's defence on augmented images."""
    return partial(_on_augmented, AUGMENTATIONS[recipe.augmentation], DEFENCES[recipe.defence])


def _on_augmented(
    augment: Augmentation,
    defence: Defence,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    generator: torch.Generator,
) -> Tensor:
    return defence(model, augment(x, generator), y, ball, generator)
