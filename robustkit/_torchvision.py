"""Import torchvision even where its compiled operators cannot load.

The registry's torchvision is built against CUDA; beside a CPU-only torch its operators do not load
and the import fails with `operator torchvision::nms does not exist`. Data sets, transforms and
models need none of them. Declaring the two schemas that torchvision registers fake kernels for is
enough, and is done only when a plain import fails. Every import of torchvision goes through here.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: torch.library.Library | None = None  # must outlive the import: its schemas go when it does


def import_torchvision() -> ModuleType:
    """torchvision, with its operator schemas declared first when they cannot be loaded."""
    global _library
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or _library is not None:
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # the failed import leaves half-made modules behind
        _library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS.values():
            _library.define(schema)
        import torchvision
    return torchvision
