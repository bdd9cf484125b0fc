"""Weights on disk: safetensors, checked before they are read. No pickles."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from robustkit.errors import RobustkitError
from robustkit.files import write_atomically

__all__ = ["load_weights", "save_shards", "save_weights", "write_atomically"]

_MAX_HEADER = 1 << 20  # bytes; the header of a ResNet's file is a few kilobytes


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state of `model` as safetensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.torch.save(_state(model)))


def save_shards(model: nn.Module, path: Path, most: int) -> list[Path]:
    """Write the state of `model` as safetensors, in files of at most `most` bytes of tensors.

    One file is `path`; several are numbered, e.g. name-1of2.safetensors. Returns them in order.
    """
    shards: list[dict[str, Tensor]] = [{}]
    for name, value in _state(model).items():
        if shards[-1] and sum(one.nbytes for one in shards[-1].values()) + value.nbytes > most:
            shards.append({})
        shards[-1][name] = value
    paths = [path]
    if len(shards) > 1:
        paths = [path.with_stem(f"{path.stem}-{i}of{len(shards)}") for i in range(1, len(shards) + 1)]
    for place, shard in zip(paths, shards, strict=True):
        write_atomically(place, safetensors.torch.save(shard))
    return paths


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}


def load_weights(model: nn.Module, *paths: Path) -> nn.Module:
    """Load weights into `model`, after checking names, shapes, types and size from the headers alone.

    Several paths are the shards of one model.
    Raises: RobustkitError, before any tensor is read, when a file is missing, is not safetensors, is
    larger than the model, or they hold other tensors than the model has; and when a value is not finite.
    """
    expected = {name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
    limit = sum(value.nbytes for value in model.state_dict().values()) + _MAX_HEADER
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in paths:
        found |= _header(path, limit)
    files = ", ".join(path.name for path in paths)
    if missing := sorted(expected.keys() - found.keys()):
        raise RobustkitError(
            f"{files} lacks {missing[0]} and is of another architecture; choose the matching model."
        )
    if extra := sorted(found.keys() - expected.keys()):
        raise RobustkitError(f"{files} has the unknown tensor {extra[0]}; choose the matching model.")
    for name, (shape, dtype) in expected.items():
        if found[name] != (shape, _SAFETENSORS_NAMES[dtype]):
            raise RobustkitError(
                f"{name} in {files} is {found[name][1]} {found[name][0]}, the model needs "
                f"{_SAFETENSORS_NAMES[dtype]} {shape}; choose the matching model."
            )
    state: dict[str, Tensor] = {}
    for path in paths:
        try:
            state |= safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise RobustkitError(f"{path.name} is damaged ({error}); make or copy it again.") from error
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise RobustkitError(f"{name} in {files} holds NaN or infinity; train the model again.")
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
