"""Import robustbench from the package registry, which does not import as it comes.

robustbench 1.1.1 imports torchvision, whose guard is `_torchvision`; it imports `autoattack`, the name
of the Git package, and depends on `pyautoattack`, the name of the same code on the registry; and it
warns of what it uses from timm and setuptools. Nothing is changed where the real `autoattack` is
installed.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from robustkit._torchvision import import_torchvision
from robustkit.errors import RobustkitError


def import_robustbench() -> ModuleType:
    """robustbench, whole: `robustbench.data`, `.eval`, `.utils` and `.model_zoo` are loaded with it.

    Raises: RobustkitError when it is not installed.
    """
    if find_spec("robustbench") is None:
        raise RobustkitError("robustbench is not installed; `pip install 'robustkit[peers]'` brings it.")
    import_torchvision()
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
        if "autoattack" not in sys.modules and find_spec("autoattack") is None:
            # The submodule too, or a second copy of it would be loaded under the other name.
            for name in ("pyautoattack", "pyautoattack.state"):
                sys.modules[name.removeprefix("py")] = import_module(name)
        import_module("robustbench.eval")
    return import_module("robustbench")
