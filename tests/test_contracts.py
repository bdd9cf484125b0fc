"""The contracts: every mutant fails as declared, every right answer passes, the examiner is right himself."""

from __future__ import annotations

import ast
import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import robustkit.contracts
import robustkit.defences
from robustkit.attacks import fgsm, pgd, rs_fgsm
from robustkit.contracts import CONTRACTS, examine, judge_safely, models, observe_safely
from robustkit.contracts.base import text
from robustkit.contracts.grader import CLAIMS
from robustkit.contracts.oracle import (
    LinearOracle,
    adversarial_cross_entropy,
    ascent,
    breakable,
    draw_linear,
    oracle,
    valley_oracle,
)
from robustkit.data import load
from robustkit.device import seeded
from robustkit.lessons import LESSONS, VISIBLE_SEED, award, check, collect, find_exercise, save_arrays
from robustkit.losses import cross_entropy
from robustkit.models import build, pretrained
from robustkit.recipes import RECIPES
from robustkit.threat import NORMS, Ball
from robustkit.train import train
from tests.alternatives import ALTERNATIVES
from tests.mutants import all_mutants, masking
from tests.mutants.measures import statement
from tests.mutants.models import scaled, survivors

# Contracts that measure a trained network: slow, and drawn once.
MODELS = ("fgsm_report", "robust_model", "suspects", "cifar_weights")
LOSSLESS = Path(os.environ.get("ROBUSTKIT_DATA") or "unset", "cifar10-lossless-4k.npz").absolute()
MUTANTS = [mutant for mutant in all_mutants() if LOSSLESS.is_file() or mutant.contract != "cifar_weights"]
PREDICTION = {"0.1": 0.9, "0.2": 0.5, "0.3": 0.1}
VALUES = {
    "prediction": PREDICTION,
    "statement": statement(),
    "grader_prediction": dict.fromkeys(CLAIMS, True),
}


@pytest.fixture(scope="module", autouse=True)
def smoke_tier(tmp_path_factory):
    """The embedded digits at the smoke tier, whatever this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUSTKIT_TIER", "smoke")
        patch.setenv("ROBUSTKIT_OFFLINE", "1")
        patch.setenv("ROBUSTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("ROBUSTKIT_DATA", raising=False)
        if LOSSLESS.is_file():  # real photographs, quick to read; without them nothing of CIFAR-10 is judged
            (Path(os.environ["ROBUSTKIT_CACHE"]) / LOSSLESS.name).symlink_to(LOSSLESS)
        patch.setattr(models, "CIFAR_SOURCES", (("cifar10-lossless-4k", "report"),))
        yield


@pytest.fixture(scope="module")
def clean_model():
    return trained("mnist-clean")


@pytest.fixture(scope="module")
def robust_model():
    return trained("mnist-pgd")


def trained(name):
    recipe, model = RECIPES[name], build("mnist_cnn", seed=0)
    train(
        model,
        load("mnist", "train"),
        robustkit.defences.DEFENCES[recipe.defence],
        Ball("Linf", 0.3),
        recipe.schedules["smoke"],
        seed=0,
        recipe=name,
    )
    return model.eval()


@pytest.fixture(scope="module")
def visible_findings(clean_model):
    """A mutant's findings on the visible case; models are measured once."""
    known = {}

    def find(mutant):
        key = mutant.contract, mutant.name
        if key not in known:
            subject = mutant.subject(clean_model) if mutant.contract in MODELS else mutant.subject
            known[key] = examine(CONTRACTS[mutant.contract], subject, VISIBLE_SEED)
        return known[key]

    return find


def costs(findings):
    """Criterion -> codes."""
    found = {}
    for finding in findings:
        found.setdefault(finding.criterion, set()).add(finding.code)
    return found


def as_declared(mutant, findings):
    """The mutant loses just what it must, and is told why."""
    found = costs(findings)
    assert found.keys() == mutant.costs.keys(), findings
    assert all(code in found[criterion] for criterion, code in mutant.costs.items()), findings


# --- mutants -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mutant",
    [mutant for mutant in MUTANTS if mutant.contract not in MODELS],
    ids=lambda mutant: f"{mutant.contract}-{mutant.name}",
)
def test_a_mutant_loses_just_what_its_mistake_costs(mutant):
    for seed in range(5):
        as_declared(mutant, examine(CONTRACTS[mutant.contract], mutant.subject, seed))


@pytest.mark.parametrize(
    "mutant",
    [mutant for mutant in MUTANTS if mutant.contract in MODELS],
    ids=lambda mutant: f"{mutant.contract}-{mutant.name}",
)
def test_a_wrong_model_loses_just_what_it_must(mutant, visible_findings):
    as_declared(mutant, visible_findings(mutant))


def test_there_are_mutants_of_every_contract():
    every = all_mutants()
    assert {mutant.contract for mutant in every} == set(CONTRACTS)
    assert len({(mutant.contract, mutant.name) for mutant in every}) == len(every)
    lost = {(mutant.contract, criterion) for mutant in every for criterion in mutant.costs}
    assert lost == {
        (name, criterion) for name, contract in CONTRACTS.items() for criterion in contract.criteria
    }


def test_a_mutant_that_is_right_would_be_noticed():
    """The test of the tests of the tests."""
    right = next(mutant for mutant in MUTANTS if mutant.name == "no_clamp")
    with pytest.raises(AssertionError):
        as_declared(right, [])


# --- useless answers ----------------------------------------------------------------------------------

USELESS = {
    "first argument": lambda *given: given[0],
    "second argument": lambda *given: given[1],
    "nothing": lambda *given: None,
    "zero": lambda *given: 0.0,
    "one": lambda *given: 1.0,
    "a pair": lambda *given: (0.0, 1.0),
    "an empty list": lambda *given: [],
    "zeros": lambda *given: torch.zeros_like(given[0]),
    "grey": lambda *given: torch.full_like(given[0], 0.5),
    "an image, darker": lambda *given: next(0.99 * one for one in given if getattr(one, "ndim", 0) == 4),
    "the image, again": lambda *given: next(one.clone() for one in given if getattr(one, "ndim", 0) == 4),
}


@pytest.mark.parametrize("name", [name for name in CONTRACTS if name not in (*MODELS, *VALUES)])
def test_what_does_not_do_its_job_earns_nothing(name):
    contract = CONTRACTS[name]
    for label, subject in USELESS.items():
        lost = {finding.criterion for finding in examine(contract, subject, 3)}
        assert lost == set(contract.criteria), label


def test_what_is_withheld_says_beside_what_it_counts():
    contract = CONTRACTS["projection"]
    findings = examine(contract, lambda x, candidate, eps: candidate.clamp(0, 1), 0)
    assert costs(findings) == {
        "ball": {"EPS_BALL_VIOLATED"},
        "box": {"NOT_COUNTED"},
        "inside": {"NOT_COUNTED"},
    }
    assert findings[-1].hint == "this counts only beside ball"


def test_essential_and_hidden_parts_are_parts():
    for contract in CONTRACTS.values():
        assert set(contract.essential) <= set(contract.criteria)
        assert set(contract.hidden) <= contract.draw(0).keys()


def test_the_kernel_is_given_no_answer():
    """What a case holds beside the learner's arguments stays outside: the seed, the probability, the kind."""
    given = {name: contract.given(contract.draw(0)).keys() for name, contract in CONTRACTS.items()}
    assert given["robust_model"] == given["fgsm_report"] == given["cifar_weights"] == set()
    assert "p" not in given["votes"]
    assert given["suspects"] == set()
    assert "kind" not in given["diagnosis"]
    assert given["alarms"] == {"accuracies"}


# --- right answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alternative", ALTERNATIVES, ids=lambda alternative: f"{alternative.contract}-{alternative.name}"
)
def test_a_right_answer_in_another_style_gets_full_marks(alternative):
    for seed in range(10):
        assert examine(CONTRACTS[alternative.contract], alternative.subject, seed) == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"queries": 1000},
        {"interval": (0.891, 0.926)},  # rounded for the page
        {"n": np.int64(1000), "robust_accuracy": torch.tensor(0.91, dtype=torch.float64)},
        {"n": 1, "robust_accuracy": 1.0, "interval": (0.2065, 1.0)},
    ],
)
def test_a_right_statement_gets_full_marks(changes):
    assert examine(CONTRACTS["statement"], statement(**changes), 0) == []


@pytest.mark.parametrize(
    "value", [PREDICTION, {0.1: 1, 0.2: 1, 0.3: 0}, {"0.1": 0.5, "0.2": 0.5, "0.3": 0.5}]
)
def test_any_prediction_that_can_be_true_gets_full_marks(value):
    assert examine(CONTRACTS["prediction"], value, 0) == []


def test_an_honest_report_gets_full_marks(clean_model):
    assert examine(CONTRACTS["fgsm_report"], (clean_model, survivors(clean_model)), 0) == []


def test_suspects_that_are_broken_get_full_marks():
    for seed in range(3):
        assert examine(CONTRACTS["suspects"], masking.broken(), seed) == []


@pytest.mark.slow
def test_a_robust_model_gets_full_marks(robust_model):
    assert examine(CONTRACTS["robust_model"], robust_model, 0) == []
    # Large logits are no fault, only no defence.
    assert examine(CONTRACTS["robust_model"], scaled(robust_model, 100.0), 1) == []


def test_saturation_alone_hides_a_model_from_cross_entropy(clean_model):
    """Why the judge attacks the margin too: without it, scaled logits would pass for a defence."""
    model, ball = scaled(clean_model, 1e4), Ball("Linf", 0.3)
    data = load("mnist", "test", limit=100)
    candidates = pgd(
        model, data.x, data.y, ball, steps=40, step_size=0.02, loss=cross_entropy, generator=seeded(0)
    )
    with torch.no_grad():
        survive = (model(candidates).argmax(1) == data.y).float().mean()
    assert survive > 0.5


# --- the oracle against brute force -------------------------------------------------------------------


def small_case(seed, pixels=8, n=40):
    generator = seeded(seed, "brute force")
    w = torch.randn(pixels, generator=generator)
    x = 0.3 + 0.4 * torch.rand(n, pixels, generator=generator)
    y = torch.randint(0, 2, (n,), generator=generator)
    b = 0.1 * torch.randn((), generator=generator)
    return {"w": w.numpy(), "b": np.float32(b.item()), "x": x.numpy(), "y": y.numpy()}


@pytest.mark.parametrize("seed", range(3))
def test_breakable_is_what_every_corner_of_the_ball_says(seed):
    """A linear score takes its extremes at the corners, so that trying all of them settles it."""
    case, seen = small_case(seed), set()
    model = oracle(case).eval()
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)))
    for eps in (0.0, 0.05, 0.1, 0.2):
        verdicts = breakable(case, case["x"], case["y"], eps)
        for image, label, verdict in zip(torch.from_numpy(case["x"]), case["y"], verdicts, strict=True):
            with torch.no_grad():
                fooled = bool((model(image + eps * corners).argmax(1) != label).any())
            assert verdict in (-1, int(fooled))
            seen.add(int(verdict))
    assert {0, 1} <= seen


def test_ascent_is_the_sign_of_the_gradient():
    case = draw_linear(0)
    model, x = oracle(case).eval(), torch.from_numpy(case["x"]).requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(x), torch.from_numpy(case["y"]), reduction="sum")
    np.testing.assert_array_equal(torch.autograd.grad(loss, x)[0].sign().numpy(), ascent(case, case["y"]))


def test_the_adversarial_loss_and_its_gradients_are_those_of_the_oracle():
    case = draw_linear(1)
    model = oracle(case).eval()
    torch.nn.functional.cross_entropy(
        model(torch.from_numpy(case["x"])), torch.from_numpy(case["y"])
    ).backward()
    _, gradient_w, gradient_b = adversarial_cross_entropy(case, case["x"])
    np.testing.assert_allclose(model.w.grad.numpy(), gradient_w.numpy(), atol=1e-6)
    np.testing.assert_allclose(model.b.grad.numpy(), gradient_b.numpy(), atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_a_case_tells_attacks_apart(seed):
    """Images at every distance from the boundary, some mislabelled, none near the box; a valley that turns."""
    case = draw_linear(seed)
    eps = float(case["eps"])
    verdicts = breakable(case, case["x"], case["y"], eps)
    assert min((verdicts == 1).sum(), (verdicts == 0).sum()) >= 8
    assert (breakable(case, case["x"], case["y"], 0.0) == 1).sum() == 8
    assert case["x"].min() > eps
    assert case["x"].max() < 1 - eps
    assert set(np.unique(case["corner_x"])) == {0.0, 1.0}
    x = torch.from_numpy(case["valley_x"]).requires_grad_()
    (gradient,) = torch.autograd.grad(valley_oracle(case).eval()(x)[:, 1].sum(), x)
    np.testing.assert_array_equal(gradient.sign().numpy(), np.sign(case["valley_x"] - 0.5))


# --- draw, observe, judge ----------------------------------------------------------------------------

DRAWN = [name for name, contract in CONTRACTS.items() if contract.draw(0)]


def subject_of(name, clean_model):
    """Some right answer to a contract."""
    if name == "suspects":
        return masking.broken()
    if name == "cifar_weights":
        return pretrained("cifar10-l2-w16")
    if name in MODELS:
        return (clean_model, survivors(clean_model)) if name == "fgsm_report" else clean_model
    if name in VALUES:
        return VALUES[name]
    return next(a.subject for a in ALTERNATIVES if a.contract == name)


def same(a, b):
    return a.keys() == b.keys() and all(
        np.array_equal(a[key], b[key]) and np.asarray(a[key]).dtype == np.asarray(b[key]).dtype for key in a
    )


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_draw_depends_on_its_seed_alone(name):
    torch.manual_seed(1)
    first = CONTRACTS[name].draw(3)
    torch.manual_seed(2)
    assert same(first, CONTRACTS[name].draw(3))
    assert name in VALUES or not same(first, CONTRACTS[name].draw(4))


@pytest.mark.parametrize("name", CONTRACTS)
def test_cases_and_evidence_travel_without_pickles(name, clean_model, tmp_path):
    contract, subject = CONTRACTS[name], subject_of(name, clean_model)
    case = contract.draw(0)
    save_arrays(tmp_path / "case.npz", case)
    with np.load(tmp_path / "case.npz", allow_pickle=False) as stored:
        travelled = dict(stored)
    assert same(case, travelled)
    evidence = observe_safely(contract, subject, travelled)
    assert "error" not in evidence
    save_arrays(tmp_path / "evidence.npz", evidence)
    with np.load(tmp_path / "evidence.npz", allow_pickle=False) as stored:
        returned = dict(stored)
    assert same(evidence, returned)
    assert judge_safely(contract, case, evidence) == judge_safely(contract, travelled, returned)


@pytest.mark.parametrize("name", CONTRACTS)
def test_judging_changes_nothing_and_says_the_same_again(name, clean_model):
    contract = CONTRACTS[name]
    case = contract.draw(0)
    evidence = observe_safely(contract, subject_of(name, clean_model), case)
    before = {key: np.array(value) for key, value in {**case, **evidence}.items()}
    random_state = torch.random.get_rng_state()
    first = judge_safely(contract, case, evidence)
    assert judge_safely(contract, case, evidence) == first
    assert same(before, {**case, **evidence})
    if name not in MODELS:  # those build a network, whose first weights come from the global state
        assert torch.equal(random_state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "name", ["fgsm", "rs_fgsm", "pgd", "votes", "ibp", "pgd_lp", "random_start", "diagnosis", "eot"]
)
def test_observing_leaves_the_learners_random_state_alone(name, clean_model):
    random_state = torch.random.get_rng_state()
    examine(CONTRACTS[name], subject_of(name, clean_model), 0)
    assert torch.equal(random_state, torch.random.get_rng_state())


# --- evidence is not believed ------------------------------------------------------------------------


def nothing_earned(name, case, evidence):
    contract = CONTRACTS[name]
    findings = judge_safely(contract, case, evidence)
    assert {finding.criterion for finding in findings} == set(contract.criteria), findings
    assert all(finding.code and finding.hint for finding in findings)


def malformed(array):
    """The same array, broken in every way that a forger or a bug might find."""
    array = np.asarray(array)
    yield "object", np.array([{"a": 1}, None], dtype=object)
    yield "words", np.array(["full marks"])
    yield "complex", array.astype(complex)
    yield "doubled", np.stack([array, array])
    yield "empty", np.zeros(0, dtype=array.dtype)
    yield "not an array", None
    yield "a list", array.tolist()
    if array.dtype.kind == "f":
        for label, value in (("nan", np.nan), ("infinite", np.inf)):
            broken = array.copy()
            broken.flat[0] = value
            yield label, broken


@pytest.mark.parametrize("name", CONTRACTS)
def test_malformed_evidence_earns_nothing(name, clean_model):
    contract = CONTRACTS[name]
    case = contract.draw(0)
    evidence = observe_safely(contract, subject_of(name, clean_model), case)
    nothing_earned(name, case, {})
    nothing_earned(name, case, None)
    nothing_earned(name, case, [evidence])
    for key, value in evidence.items():
        nothing_earned(name, case, {k: v for k, v in evidence.items() if k != key})
        for label, broken in malformed(value):
            if label in ("doubled", "empty") and key in SHAPES_NAMED:
                findings = judge_safely(contract, case, evidence | {key: broken})
                assert {finding.criterion for finding in findings} >= SHAPES_NAMED[key], (key, label)
            else:
                nothing_earned(name, case, evidence | {key: broken})


# These shapes are a learner's to get wrong, and cost what they answer for.
SHAPES_NAMED = {
    "Linf": {"Linf"},
    "L2": {"L2"},
    "report": {"counts"},
    "forwards": {"modes"},
    **{name: {name} for name in "ABC"},
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_huge_evidence_earns_nothing_it_should_not(name, clean_model):
    contract = CONTRACTS[name]
    case = contract.draw(0)
    evidence = observe_safely(contract, subject_of(name, clean_model), case)
    heavy = name in ("robust_model", "cifar_weights")  # each costs a measurement
    keys = sorted(evidence)[:2] if heavy else evidence
    for key in keys:
        value = np.asarray(evidence[key])
        if value.dtype.kind == "f":
            for sign in (1, -1):
                huge = np.full_like(value, sign * np.finfo(value.dtype).max)
                assert judge_safely(contract, case, evidence | {key: huge}), key
        elif value.dtype.kind in "iu":
            huge = np.full_like(value, np.iinfo(value.dtype).max)
            assert judge_safely(contract, case, evidence | {key: huge}), key


@pytest.mark.parametrize(
    "error",
    [
        np.zeros(0, dtype=np.uint8),
        np.full(8, 255, dtype=np.uint8),
        text("no pair"),
        text(["only a code"]),
        text({"a": 1, "b": 2}),
        text([None, None]),
        np.frombuffer(b"[" * 100_000, dtype=np.uint8),
        np.array([None]),
        "a string",
        None,
    ],
    ids=repr,
)
def test_an_error_report_earns_nothing_whatever_it_says(error):
    for name, contract in CONTRACTS.items():
        nothing_earned(name, contract.draw(0), {"error": error})


@pytest.mark.parametrize("forged", [{}, "", None, ["NO_SUCH_CODE"], [["INPUT_MODIFIED"]], 0])
def test_a_forged_list_of_side_effects_earns_nothing(forged, clean_model):
    for name in ("fgsm", "rs_fgsm", "pgd", "pgd_lp", "votes"):
        case = CONTRACTS[name].draw(0)
        evidence = observe_safely(CONTRACTS[name], subject_of(name, clean_model), case)
        nothing_earned(name, case, evidence | {"left": text(forged)})


@pytest.mark.parametrize("name", ["prediction", "statement", "alarms"])
@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_words_make_a_judge_raise(name, data):
    words = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=8,
    )
    key = "alarms" if name == "alarms" else "value"
    value = data.draw(words)
    if name == "statement" and data.draw(st.booleans()):
        value = statement(
            **data.draw(st.dictionaries(st.sampled_from(sorted(statement())), words, min_size=1))
        )
    judge_safely(CONTRACTS[name], CONTRACTS[name].draw(0), {key: text(value)})


# --- codes and hints ---------------------------------------------------------------------------------

SOLUTION_SOURCE = re.compile(
    r"\.sign\(|autograd\.grad|clamp\(|clip\(|\.eval\(|\.train\(|\.detach\(|requires_grad|import "
)


def test_every_code_in_the_contracts_is_met_by_a_mutant_and_has_a_hint_without_the_answer(visible_findings):
    folder = Path(robustkit.contracts.__file__).parent
    written = {
        node.value
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", node.value)
    }
    written -= {"LABEL_LEAKING"}  # the name of an alarm, not a code
    written -= {"NO_IMAGES"}  # a machine's lack, not a learner's mistake: tests/test_lesson_cifar.py
    met = set()
    for mutant in MUTANTS:
        for finding in visible_findings(mutant):
            met.add(finding.code)
            assert len(finding.hint) > 10
            assert "\n" not in finding.hint
            assert not SOLUTION_SOURCE.search(finding.hint), finding
    assert met - {"RAISED"} == written


# --- lessons -----------------------------------------------------------------------------------------


def test_the_lessons_award_what_the_contracts_judge():
    for lesson in LESSONS.values():
        for exercise in lesson.exercises:
            assert set(exercise.points) == set(CONTRACTS[exercise.contract].criteria)


@pytest.mark.parametrize("exercise_id", [e.id for lesson in LESSONS.values() for e in lesson.exercises])
def test_an_exercise_awards_each_criterion_on_its_own(exercise_id):
    exercise = find_exercise(exercise_id)
    assert sum(award(exercise, []).values()) == exercise.total
    for mutant in MUTANTS:
        if mutant.contract == exercise.contract and mutant.contract not in MODELS:
            earned = award(exercise, examine(CONTRACTS[mutant.contract], mutant.subject, 7))
            kept = {criterion for criterion, points in earned.items() if points}
            assert kept == set(exercise.points) - set(mutant.costs)


def test_a_check_prints_points_and_hints(capsys):
    mutant = next(m for m in MUTANTS if (m.contract, m.name) == ("fgsm", "no_clamp"))
    assert check("s1_fgsm_check", mutant.subject) == 4
    printed = capsys.readouterr().out
    assert "MISS box: 0/1" in printed
    assert "BOX_VIOLATED: pixels reach [-0." in printed
    assert "FGSM: 4 of 5 points on the visible check" in printed


def test_collecting_records_what_is_missing():
    exercise = find_exercise("s1_fgsm_check")
    case = CONTRACTS["fgsm"].draw(0)
    evidence = collect(exercise, {}, case)
    assert costs(judge_safely(CONTRACTS["fgsm"], case, evidence)) == {
        key: {"NOT_FOUND"} for key in exercise.points
    }


# --- the kit's own attacks, under a stricter contract ------------------------------------------------

OWN = {
    "fgsm": fgsm,
    "rs_fgsm": rs_fgsm,
    "pgd": lambda *args, **kwargs: pgd(*args, steps=3, step_size=0.01, restarts=2, **kwargs),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", OWN.values(), ids=OWN)
@pytest.mark.parametrize("modes", list(itertools.product((True, False), repeat=2)))
def test_own_attacks_restore_mixed_modes_one_by_one(attack, norm, modes):
    """Fine-tuning with a frozen BatchNorm is such a mixture; model.train(was_training) destroys it."""
    case = draw_linear(0)
    model = LinearOracle(torch.from_numpy(case["w"]), float(case["b"]))
    model.training, model.drop.training = modes
    model.w.requires_grad_(False)  # and frozen weights stay frozen
    x, y = torch.from_numpy(case["x"]), torch.from_numpy(case["y"])
    first = attack(model, x, y, Ball(norm, 0.1), generator=seeded(1))
    assert (model.training, model.drop.training) == modes
    assert not any(model.forwards)
    assert not model.w.requires_grad
    assert model.b.requires_grad
    assert torch.equal(first, attack(model, x, y, Ball(norm, 0.1), generator=seeded(1)))
    assert attack is fgsm or not torch.equal(first, attack(model, x, y, Ball(norm, 0.1), generator=seeded(2)))
