"""Trained models that come with the package: half-precision weights, each with a card that says what it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from robustkit.errors import RobustkitError
from robustkit.models.files import load_weights

WEIGHTS = Path(__file__).parent.parent / "weights"
SHARD = 15 * 2**20  # bytes of tensors in one file, at most


def names(folder: Path = WEIGHTS) -> list[str]:
    """The names that have a card."""
    return sorted(path.stem for path in folder.glob("*.json"))


def card(name: str, folder: Path = WEIGHTS) -> dict[str, Any]:
    """What a trained model is: architecture, recipe, seed, data, threat model, measured accuracies, sha256.

    Raises: RobustkitError for an unknown name.
    """
    if name not in names(folder):
        raise RobustkitError(f"trained model {name!r} is unknown; choose one of {', '.join(names(folder))}.")
    read: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return read


def load(name: str, build: Callable[[str], nn.Module], folder: Path = WEIGHTS) -> nn.Module:
    """The trained model `name`, its weights checked against the sha256 of its card.

    Raises: RobustkitError for an unknown name, or weights that are not those of the card.
    """
    described = card(name, folder)
    paths = [folder / file for file in described.get("files", [f"{name}.safetensors"])]
    found = digest(paths)
    if found != described["sha256"]:
        raise RobustkitError(
            f"{', '.join(path.name for path in paths)} has sha256 {found[:12]}, its card says "
            f"{described['sha256'][:12]}; install robustkit again."
        )
    # Half precision is the storage format alone: the arithmetic is float32, as it was in training.
    return load_weights(build(described["architecture"]).half(), *paths).float().eval()


def digest(paths: Sequence[Path]) -> str:
    """The sha256 of the files' bytes, one after the other. Raises: RobustkitError when one cannot be read."""
    found = hashlib.sha256()
    for path in paths:
        try:
            found.update(path.read_bytes())
        except OSError as error:
            raise RobustkitError(
                f"{path} cannot be read ({error.strerror}); install robustkit again."
            ) from error
    return found.hexdigest()
