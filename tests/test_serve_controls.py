"""The map of controls names what is there, ids that are known, and leaves nothing out."""

import ast
import copy
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

import robustkit.serve
from robustkit.serve import manifests
from robustkit.serve.pipeline import Pipeline
from robustkit.serve.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
MAP = tomllib.loads((ROOT / "docs" / "controls.toml").read_text())
# What carries, and guards nothing by itself.
PLUMBING = {"problems", "refusal", "redteam"}
# Which stage of the pipeline stands in which module.
STAGES = {
    "accounts": "auth",
    "router": "routing",
    "metrics": "metrics",
    "posture": "incident",
    "detectors": "detectors",
    "answers": "cache",
    "quarantine": "quarantine",
}
# Settings that decide about security, by what their names hold; the rest say where things lie and how often.
GUARDING = re.compile(
    r"rate|most_|seconds|ban_|queue|readers|workers|output|mode|detectors|cache$|bounds|verify|trusted|admin"
)
NOT_GUARDING = {"refresh_seconds", "tidy_seconds", "ban_seconds", "model"}


def wrong(told):
    """What in the map is not true, or lacks."""
    found = []
    known = {**told["atlas"]["techniques"], **told["atlas"]["mitigations"]}
    risks = told["owasp"]["risks"]
    tests = {}
    modules, settings, rules = set(), set(), set()
    for control in told["control"]:
        name = control["name"]
        found += [f"{name}: {id_}" for id_ in control["atlas"] if id_ not in known]
        found += [f"{name}: {id_}" for id_ in control["owasp"] if id_ not in risks]
        if not control["where"] or not control["tests"]:
            found.append(f"{name}: nowhere, or never tested")
        for place in control["where"]:
            module, _, what = place.partition(":")
            modules.add(module)
            owner, _, attribute = what.partition(".")
            try:
                held = getattr(importlib.import_module(f"robustkit.serve.{module}"), owner)
            except (ImportError, AttributeError):
                found.append(f"{name}: {place}")
                continue
            if attribute and attribute not in {field.name for field in fields(held)}:
                found.append(f"{name}: {place}")
            settings.add(attribute)
        for test in control["tests"]:
            file, _, function = test.partition("::")
            path = ROOT / "tests" / file
            if file not in tests:
                body = ast.parse(path.read_text()).body if path.exists() else []
                tests[file] = {node.name for node in body if isinstance(node, ast.FunctionDef)}
            if function not in tests[file] or not function.startswith("test_"):
                found.append(f"{name}: {test}")
        rules |= set(control.get("manifest", []))
    found += [f"rule {rule}" for rule in rules ^ set(manifests.RULES)]
    asked = {name for name in (field.name for field in fields(Settings)) if GUARDING.search(name)}
    found += [f"setting {name}" for name in asked - NOT_GUARDING - settings]
    there = {module.name for module in pkgutil.iter_modules(robustkit.serve.__path__)}
    found += [f"module {name}" for name in there - PLUMBING - modules]
    return found


def test_every_name_in_the_map_is_true_and_nothing_is_left_out():
    assert wrong(MAP) == []
    stages = {field.name for field in fields(Pipeline)} - {"settings", "engine"}
    assert stages == set(STAGES)
    named = {place.partition(":")[0] for control in MAP["control"] for place in control["where"]}
    assert set(STAGES.values()) <= named


def test_the_page_is_made_of_the_map():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "controls.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_ids_have_the_form_of_their_source_and_a_licence():
    for kind, form in (("techniques", r"AML\.T\d{4}(\.\d{3})?"), ("mitigations", r"AML\.M\d{4}")):
        assert all(re.fullmatch(form, id_) and name for id_, name in MAP["atlas"][kind].items())
    assert all(re.fullmatch(r"ML(0[1-9]|10)", id_) for id_ in MAP["owasp"]["risks"])
    assert "Apache-2.0" in MAP["atlas"]["source"]
    assert "licensed under" in MAP["owasp"]["source"]


def first(told, key, value):
    told["control"][0][key] = value


MUTANTS = {
    "an id that nobody knows": lambda told: first(told, "atlas", ["AML.T9999"]),
    "a risk that nobody knows": lambda told: first(told, "owasp", ["ML11"]),
    "a module that is not there": lambda told: first(told, "where", ["walls:Wall"]),
    "a setting that is not there": lambda told: first(told, "where", ["settings:Settings.most_walls"]),
    "a test that is not there": lambda told: first(told, "tests", ["test_serve_app.py::test_walls"]),
    "a control without a test": lambda told: first(told, "tests", []),
    "a rule of manifests left out": lambda told: told["control"].pop(),
    "a stage left out": lambda told: told["control"].pop(3),
}


@pytest.mark.parametrize("mutate", MUTANTS.values(), ids=MUTANTS)
def test_a_map_that_is_not_true_is_found_out(mutate):
    told = copy.deepcopy(MAP)
    mutate(told)
    assert wrong(told) != []
