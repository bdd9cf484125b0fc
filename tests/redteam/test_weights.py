"""Submitted weights whose robustness is fake, not theirs, or no weights at all: the whole path, no points."""

from __future__ import annotations

import nbformat
import pytest

from grading import judge, mutate, notebooks, run, sandbox
from grading.mutants import Mutant
from grading.score import score
from grading.workspace import DEMO_SECRET, repository
from robustkit.lessons import LESSONS

WORKSPACE = repository()
LESSON = LESSONS["01-mnist-fgsm"]
EXERCISE = "s1_robust_model_check"

CLEAN = """
robust_model = build("mnist_cnn", seed=0)
train(robust_model, training, clean, BALL, RECIPES["mnist-clean"].schedules[TIER], seed=0, progress=False)
"""
# What the learner's object says of itself when it is asked for its weights.
LYING = """
import numpy as np
class Lying(torch.nn.Sequential):
    def state_dict(self, *args, **kwargs):
        honest = super().state_dict(*args, **kwargs)
        {says}
robust_model = Lying(*build("mnist_cnn", seed=0))
"""
HOSTILE = {
    "takes_the_weights_of_the_package": (
        'from robustkit.models import pretrained\nrobust_model = pretrained("mnist-pgd")',
        "SHIPPED_WEIGHTS",
    ),
    "multiplies_its_logits_by_a_thousand": (
        f"{CLEAN}\nwith torch.no_grad():\n    robust_model[-1].weight *= 1000\n    robust_model[-1].bias *= 1000",
        "MASKED_GRADIENTS",
    ),
    "saturates_its_first_layer": (
        f"{CLEAN}\nwith torch.no_grad():\n    robust_model[0].weight *= 1e12\n    robust_model[0].bias *= 1e12",
        "MASKED_GRADIENTS",
    ),
    "shrinks_its_logits_to_denormal_numbers": (
        f"{CLEAN}\nwith torch.no_grad():\n    robust_model[-1].weight *= 1e-38\n    robust_model[-1].bias *= 1e-38",
        "NOT_ROBUST",
    ),
    "trains_against_one_step_that_it_knows": (
        """
from robustkit.defences import fgsm_at
from robustkit.train import Schedule
robust_model = build("mnist_cnn", seed=0)
train(robust_model, training, fgsm_at, BALL, Schedule(12, 64, peak_lr=0.02), seed=0, progress=False)
""",
        "",
    ),
    "gives_nan_for_weights": (
        LYING.format(says="return {name: value * float('nan') for name, value in honest.items()}"),
        "NOT_FINITE",
    ),
    "gives_infinite_weights": (
        LYING.format(says="return {name: value + float('inf') for name, value in honest.items()}"),
        "NOT_FINITE",
    ),
    "gives_weights_of_other_shapes": (
        LYING.format(says="return {name: value[None] for name, value in honest.items()}"),
        "WRONG_ARCHITECTURE",
    ),
    "gives_more_arrays_than_are_read": (
        LYING.format(says="return honest | {f'more{i}': torch.zeros(1) for i in range(2000)}"),
        "EVIDENCE_MALFORMED",
    ),
    "looks_for_the_images_it_will_be_judged_on": (
        LYING.format(
            says="""
        with np.load("case.npz") as case:
            if list(case): raise RuntimeError("there is something to train on")
        return honest"""
        ),
        "NOT_ROBUST",
    ),
}
SAMPLE = {"takes_the_weights_of_the_package", "looks_for_the_images_it_will_be_judged_on"}


@pytest.mark.skipif(not sandbox.available(), reason="no sandbox works on this machine")
@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one in SAMPLE else pytest.mark.redteam) for one in HOSTILE]
)
def test_fake_weights_earn_nothing(name, tmp_path, monkeypatch, record_property):
    record_property("name", name)
    record_property("attempts", f"weights: {name.replace('_', ' ')}")
    record_property("tier", sandbox.choose("auto"))
    record_property("points that are honest", 0)
    monkeypatch.setenv("ROBUSTKIT_TIER", "smoke")
    source, code = HOSTILE[name]
    solution = notebooks.read_release(WORKSPACE.source(LESSON.id))
    batch = {EXERCISE: Mutant(EXERCISE, "hostile", source, "")}
    path = tmp_path / "submission.ipynb"
    nbformat.write(mutate.submission(solution, LESSON, batch), path)
    run.run_submission(
        path,
        LESSON,
        WORKSPACE.release(LESSON.id),
        tmp_path / "evidence",
        student="mallory",
        secret=DEMO_SECRET,
    )
    card = score(judge.judge(tmp_path / "evidence", DEMO_SECRET), {})
    exercise = next(one for one in card.exercises if one.id == EXERCISE)
    record_property("points", exercise.points)
    assert exercise.points == 0, exercise
    assert code in (*exercise.codes, "")
