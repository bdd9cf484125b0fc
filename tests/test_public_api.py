"""The public names: which they are, that they are what their modules hold, and that none costs torch."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib import import_module

import pytest

import robustkit

PUBLIC = {
    "ATTACKS": "evaluate",
    "Attack": "attacks",
    "BPDA": "wrappers",
    "Ball": "threat",
    "DEFENCES": "defences",
    "Dataset": "data",
    "EOT": "wrappers",
    "Evaluation": "results",
    "Interval": "results",
    "LIBRARY": "attacks.library",
    "MODELS": "models",
    "Normalize": "models",
    "Provenance": "results",
    "RECIPES": "recipes",
    "Recipe": "recipes",
    "RobustkitError": "errors",
    "RotationTranslation": "threat",
    "Schedule": "train",
    "TIERS": "device",
    "ThreatModel": "threat",
    "apgd": "attacks",
    "apgd_targeted": "attacks",
    "build": "models",
    "check": "lessons",
    "early_stopped_pgd": "attacks",
    "fab_targeted": "attacks",
    "fgsm": "attacks",
    "find_recipe": "recipes",
    "load": "data",
    "load_weights": "models",
    "noise": "attacks",
    "pgd": "attacks",
    "pick_device": "device",
    "predict": "evaluate",
    "pretrained": "models",
    "read_evaluation": "results",
    "rs_fgsm": "attacks",
    "save_weights": "models",
    "seeded": "device",
    "spatial_grid": "attacks",
    "spatial_random": "attacks",
    "square": "attacks",
    "tier": "device",
    "transfer": "attacks",
    "white_box": "threat",
}
MODULES = {"attacks", "data", "evaluate", "losses", "models", "report", "results", "threat", "train"}


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_public_names_are_these_and_no_others():
    assert robustkit.__all__ == sorted(PUBLIC | dict.fromkeys(MODULES))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_the_object_of_its_module(name):
    assert getattr(robustkit, name) is getattr(import_module(f"robustkit.{PUBLIC[name]}"), name)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_public_module_is_that_module(name):
    assert getattr(robustkit, name) is import_module(f"robustkit.{name}")


@pytest.mark.parametrize(
    "first",
    ["from robustkit import evaluate", "from robustkit.evaluate import evaluate", "from robustkit import *"],
)
def test_evaluate_and_train_are_modules_whatever_was_imported_first(first):
    functions = "r.evaluate.evaluate, r.train.train, r.report.render"
    assert python(f"{first}; import robustkit as r; print(all(map(callable, [{functions}])))") == "True"


def test_a_star_import_brings_exactly_the_public_names():
    code = "import robustkit; from robustkit import *; print(set(robustkit.__all__) - set(dir()))"
    assert python(code) == "set()"


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, robustkit; print(sorted({'torch', 'numpy', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    )
    assert python(code) == "[]"


def test_type_checkers_see_the_names_that_run_time_gives():
    """The imports for type checkers are a second list: it must not drift from the first."""
    import ast
    from pathlib import Path

    tree = ast.parse(Path(robustkit.__file__).read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: node.module for node in guarded.body for alias in node.names}
    assert sorted(seen) == robustkit.__all__
    for name, module in seen.items():
        value = getattr(import_module(module), name)
        assert value is getattr(robustkit, name)


def test_an_unknown_name_is_an_attribute_error_like_any_other():
    with pytest.raises(AttributeError, match="module 'robustkit' has no attribute 'nonsense'"):
        _ = robustkit.nonsense
    assert not hasattr(robustkit, "nonsense")


def test_names_complete_in_a_notebook():
    assert set(robustkit.__all__) <= set(dir(robustkit))
    assert isinstance(robustkit, types.ModuleType)


def test_the_error_is_a_value_error_so_that_plain_python_can_catch_it():
    assert issubclass(robustkit.RobustkitError, ValueError)
