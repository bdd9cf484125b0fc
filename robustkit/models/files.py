"""Weights on disk: safetensors, checked before they are read. No pickles."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from robustkit.errors import RobustkitError
from robustkit.files import write_atomically

__all__ = ["load_weights", "save_weights", "write_atomically"]

_MAX_HEADER = 1 << 20  # bytes; the header of a ResNet's file is a few kilobytes


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state of `model` as safetensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, safetensors.torch.save(state))


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load weights into `model`, after checking names, shapes, types and size from the header alone.

    Raises: RobustkitError, before any tensor is read, when the file is missing, is not safetensors, is
    larger than the model, or holds other tensors than the model has; and when a value is not finite.
    """
    expected = {name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
    found = _header(path, limit=sum(value.nbytes for value in model.state_dict().values()) + _MAX_HEADER)
    if missing := sorted(expected.keys() - found.keys()):
        raise RobustkitError(
            f"{path.name} lacks {missing[0]} and is of another architecture; choose the matching model."
        )
    if extra := sorted(found.keys() - expected.keys()):
        raise RobustkitError(f"{path.name} has the unknown tensor {extra[0]}; choose the matching model.")
    for name, (shape, dtype) in expected.items():
        if found[name] != (shape, _SAFETENSORS_NAMES[dtype]):
            raise RobustkitError(
                f"{name} in {path.name} is {found[name][1]} {found[name][0]}, the model needs "
                f"{_SAFETENSORS_NAMES[dtype]} {shape}; choose the matching model."
            )
    try:
        state = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise RobustkitError(f"{path.name} is damaged ({error}); make or copy it again.") from error
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise RobustkitError(f"{name} in {path.name} holds NaN or infinity; train the model again.")
    model.load_state_dict(state)
    return model


_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def _header(path: Path, limit: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, type) of every tensor in a safetensors file."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise RobustkitError(
                f"{path.name} has {size:,} bytes, at most {limit:,} fit this model; choose the matching one."
            )
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size):
                raise RobustkitError(
                    f"{path.name} is not a safetensors file; save weights with robustkit.save_weights."
                )
            header = json.loads(file.read(length))
        return {
            name: (tuple(entry["shape"]), entry["dtype"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise RobustkitError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, RobustkitError):
            raise
        raise RobustkitError(
            f"{path.name} has an unreadable header; save weights with robustkit.save_weights."
        ) from error
