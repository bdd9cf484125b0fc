"""Recipes: complete, found by name or read from a file, and a smoke recipe that survives a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from robustkit import data
from robustkit.augment import AUGMENTATIONS
from robustkit.defences import DEFENCES
from robustkit.device import seeded
from robustkit.errors import RobustkitError
from robustkit.models import MODELS
from robustkit.recipes import RECIPES, defence_of, find_recipe, read_recipe
from robustkit.threat import Ball
from tests.oracle import interior, linear

REAL = Path(os.environ.get("ROBUSTKIT_DATA") or "unset")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_complete(name):
    recipe = RECIPES[name]
    assert recipe.name == name
    assert set(recipe.schedules) == set(recipe.limits) == {"smoke", "standard", "full"}
    assert recipe.model in MODELS
    assert recipe.defence in DEFENCES
    assert recipe.augmentation in AUGMENTATIONS
    assert recipe.split in data._RECIPES[recipe.dataset].files
    if recipe.held_out:
        dataset, split = recipe.held_out
        assert split in data._RECIPES[dataset].files


def test_no_recipe_selects_on_what_is_reported_or_trains_on_what_it_selects_by():
    """Held-out images are not those of `report` nor of any test split; cifar10-jpeg's train is without them."""
    for recipe in RECIPES.values():
        assert "test" not in (recipe.split, *(recipe.held_out or ()))
        if recipe.dataset == "cifar10-jpeg":
            assert recipe.held_out in (None, ("cifar10-lossless-4k", "select"))


def test_a_recipe_attacks_the_augmented_images():
    model, x = linear(), interior(n=8)
    recipe = replace(RECIPES["cifar10-l2-smoke"], defence="clean")
    view = AUGMENTATIONS[recipe.augmentation](x, seeded(3))
    y = torch.zeros(8, dtype=torch.int64)
    found = defence_of(recipe)(model, x, y, Ball("L2", 0.5), seeded(3))
    assert torch.equal(found, torch.nn.functional.cross_entropy(model(view), y))


# --- by name, or from a file -----------------------------------------------------------------------


def test_an_unknown_recipe_names_the_nearest():
    assert find_recipe("mnist-pgd") is RECIPES["mnist-pgd"]
    with pytest.raises(RobustkitError, match=r"recipe 'mnist-fsgm' is unknown; did you mean 'mnist-fgsm'\?"):
        find_recipe("mnist-fsgm")


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_file_changes_what_it_says_and_keeps_the_rest(tmp_path):
    path = written(
        tmp_path,
        """
        base = "cifar10-l2"
        dataset = "cifar10"
        split = "fit"
        model = "preact_resnet10_w16"
        augmentation = "strong"
        held_out = ["cifar10", "select"]
        limit = 500
        [ball]
        eps = 0.25
        [schedule]
        epochs = 3
        """,
    )
    base, found = RECIPES["cifar10-l2"], find_recipe(str(path))
    assert (found.name, found.dataset, found.split) == ("mine", "cifar10", "fit")
    assert (found.model, found.augmentation) == ("preact_resnet10_w16", "strong")
    assert found.held_out == ("cifar10", "select")
    assert found.ball == Ball("L2", 0.25)
    assert set(found.limits.values()) == {500}
    for tier, schedule in found.schedules.items():
        assert schedule == replace(base.schedules[tier], epochs=3)
    assert found.defence == base.defence
    assert read_recipe(written(tmp_path, 'base = "cifar10-l2"\nheld_out = []')).held_out is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bass = 1", r"key of mine.toml 'bass' is unknown; did you mean 'base'\?"),
        ("limit = 3", "mine.toml has no base"),
        ('base = "cifar10-12"', "recipe 'cifar10-12' is unknown; did you mean 'cifar10-l2'"),
        (
            'base = "mnist-pgd"\nmodel = "preact_resnet"',
            "model 'preact_resnet' is unknown; did you mean 'preact_",
        ),
        ('base = "mnist-pgd"\ndefence = "tradess"', "did you mean 'trades'"),
        ('base = "mnist-pgd"\naugmentation = "flip"', "did you mean 'flip-crop'"),
        ('base = "mnist-pgd"\n[schedule]\nepoch = 3', r"key of \[schedule\] in mine.toml 'epoch'.*'epochs'"),
        ('base = "mnist-pgd"\n[ball]\nepsilon = 1', r"key of \[ball\] in mine.toml 'epsilon'.*'eps'"),
        ('base = "mnist-pgd"\n[ball]\nnorm = "L3"', "norm 'L3' is unknown"),
        ('base = "mnist-pgd"\n[ball]\neps = "large"', "mine.toml has a value of the wrong type"),
        ('base = "mnist-pgd"\n[schedule]\nepochs = "many"', "mine.toml has a value of the wrong type"),
        ('base = "mnist-pgd"\n[schedule]\noptimizer = "lbfgs"', "optimizer 'lbfgs' is unknown"),
        ('base = "mnist-pgd"\nschedule = 3', "mine.toml has a value of the wrong type"),
        ('base = "mnist-pgd"\nlimit = "all"', "mine.toml has a value of the wrong type"),
        ('base = "mnist-pgd"\nheld_out = "cifar10"', "mine.toml has a value of the wrong type"),
        ("base = [", "is no TOML"),
    ],
)
def test_a_file_that_means_nothing_is_refused_in_a_sentence(text, words, tmp_path):
    with pytest.raises(RobustkitError, match=words) as caught:
        read_recipe(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(RobustkitError, match="cannot be read"):
        find_recipe(str(tmp_path / "mine.toml"))


# --- a smoke run -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not (REAL / "cifar10-lossless-4k.npz").is_file(), reason="ROBUSTKIT_DATA names no folder with CIFAR-10"
)
def test_a_killed_run_with_averaged_weights_resumes_to_those_of_an_uninterrupted_one(tmp_path):
    """The smoke recipe on lossless images: one half trains, some of the other select."""
    recipe = written(
        tmp_path,
        """
        base = "cifar10-l2-smoke"
        dataset = "cifar10-lossless-4k"
        split = "report"
        """,
    )
    command = [sys.executable, "-m", "robustkit", "train", recipe, "--out"]

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *more], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )

    with start("cut") as killed:
        checkpoint, limit = tmp_path / "cut" / "checkpoint.pt", time.monotonic() + 120
        while not checkpoint.exists() and killed.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        killed.kill()
        assert killed.wait(30) == -signal.SIGKILL  # it was at work, not done
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    for arguments in (("cut", "--resume"), ("whole",)):
        with start(*arguments) as run:
            _, err = run.communicate(timeout=240)
            assert run.returncode == 0, err
    files = [tmp_path / folder / "model.safetensors" for folder in ("cut", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
