"""The audit of audits: every planted fake trips a check that is right about it, honest models trip none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from scipy.stats import binom
from torch import nn

from robustkit import cli, data
from robustkit.attacks import pgd
from robustkit.attacks.transfer import transfer
from robustkit.audit import BUDGETS, CHECKS, Runs, _beyond, audit
from robustkit.audit import Path as AttackPath
from robustkit.data import Dataset
from robustkit.device import seeded
from robustkit.errors import RobustkitError
from robustkit.evaluate import predict
from robustkit.losses import margin
from robustkit.models import pretrained, save_weights
from robustkit.results import Audit, Evaluation, Interval, Outcome
from robustkit.threat import Ball
from robustkit.wrappers import BPDA, EOT
from tests import fakes
from tests.oracle import linear, linear_data

EPS = Ball("Linf", 0.3)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    """Twenty embedded digits that the ordinary model gets right: enough, because fakes are gross."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ROBUSTKIT_DATA", raising=False)
        drawn = data.load("digits", "test", limit=60, seed=0)
    chosen = predict(pretrained("mnist-clean"), drawn.x, drawn.y).nonzero()[:20, 0]
    return Dataset(drawn.x[chosen], drawn.y[chosen], tuple(range(20)), drawn.provenance, drawn.classes)


@pytest.fixture(autouse=True)
def same_draws() -> Iterator[None]:
    """Random fakes draw from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def audited(model: nn.Module, images: Dataset, ball: Ball = EPS, **settings) -> Audit:
    return audit(model, images, ball, model_name="a model", tier="smoke", progress=False, **settings)


def findings(found: Audit) -> set[str]:
    return {outcome.check for outcome in found.findings}


def measured(found: Audit) -> dict[str, float | None]:
    return {outcome.check: outcome.measured for outcome in found.outcomes}


# --- fakes ---------------------------------------------------------------------------------------------

# For each fake, the checks that name what is wrong with it.
RIGHT = {
    fakes.LargeLogits: {"saturated-loss", "pgd-gap"},
    fakes.Quantised: {"zero-gradients", "black-box", "pgd-gap"},
    fakes.Compressed: {"zero-gradients", "black-box"},
    fakes.ZeroGradient: {"zero-gradients", "black-box", "pgd-gap"},
    fakes.Sharpened: {"probabilities", "zero-gradients", "constant-output"},
    fakes.Probabilities: {"probabilities"},
    fakes.DropoutOn: {"randomised"},
    fakes.Resized: {"randomised"},
    fakes.Detector: {"constant-output", "zero-gradients"},
    fakes.Purified: {"test-time-optimisation", "zero-gradients"},
}
# A model has these properties or has not: they must be found on the right fakes, and on no other.
PROPERTIES = {"randomised", "probabilities", "test-time-optimisation", "constant-output", "zero-gradients"}
PROPERTIES |= {"saturated-loss"}


@pytest.mark.parametrize("fake", RIGHT, ids=lambda fake: fake.__name__)
def test_a_planted_fake_trips_the_right_checks(fake, digits):
    found = audited(fake(pretrained("mnist-clean")).eval(), digits)
    assert findings(found) >= RIGHT[fake]
    assert findings(found) & PROPERTIES == RIGHT[fake] & PROPERTIES
    for outcome in found.findings:
        assert outcome.measured is not None
        assert outcome.evidence
        assert outcome.repair


def test_fgsm_training_is_found_out_by_its_own_attack(digits):
    """Catastrophic overfitting: FGSM breaks fewer images than it leaves untouched, PGD breaks all."""
    found = audited(pretrained("mnist-fgsm"), digits)
    assert findings(found) == {"gradient-alignment", "eps-sweep"}
    (sweep,) = (outcome for outcome in found.findings if outcome.check == "eps-sweep")
    assert sweep.evidence.startswith("FGSM breaks ")


def test_without_a_gradient_the_checks_that_need_one_say_so(digits):
    need = {"saturated-loss", "gradient-alignment", "fgsm-beats-pgd", "more-steps", "more-restarts"}
    need |= {"incomplete-optimisation", "silent-success", "eps-sweep", "large-eps", "unbounded", "pgd-gap"}
    only = [check for check in CHECKS if check.name in need]
    found = audited(fakes.Compressed(pretrained("mnist-clean")).eval(), digits, checks=only)
    assert len(found.outcomes) == len(need)
    for outcome in found.outcomes:
        assert outcome.verdict == "not run"
        assert "gives no gradient" in outcome.evidence


def test_points_of_a_surrogate_break_a_masked_model(digits):
    base = pretrained("mnist-clean")
    only = [check for check in CHECKS if check.name == "transfer"]
    found = audited(fakes.ZeroGradient(base).eval(), digits, surrogate=base, checks=only)
    assert findings(found) == {"transfer"}
    # On itself as the surrogate, an honest model loses nothing that gradient attacks left.
    assert findings(audited(base, digits, surrogate=base, checks=only)) == set()


# --- honest models -------------------------------------------------------------------------------------

real = pytest.mark.skipif(
    not (Path(os.environ.get("ROBUSTKIT_DATA") or "unset") / "MNIST/raw").is_dir(),
    reason="ROBUSTKIT_DATA names no folder with MNIST",
)


@real
def test_an_adversarially_trained_model_trips_none():
    found = audited(pretrained("mnist-pgd"), data.load("mnist", "test", limit=60, seed=0))
    assert findings(found) == set()
    # And not because nothing was attacked: what was not run needs a surrogate.
    assert [one.check for one in found.outcomes if one.verdict == "not run"] == ["transfer"]


@real
@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_an_adversarially_trained_model_trips_none_on_other_images(seed):
    images = data.load("mnist", "test", limit=150, seed=seed)
    assert findings(audited(pretrained("mnist-pgd"), images, seed=seed)) == set()


@real
@pytest.mark.slow
def test_one_step_training_that_held_may_only_be_told_that_pgd_flatters_it():
    images = data.load("mnist", "test", limit=100, seed=1)
    assert findings(audited(pretrained("mnist-rs-fgsm"), images, seed=1)) <= {"pgd-gap"}


def test_an_undefended_model_is_honest(digits):
    assert findings(audited(pretrained("mnist-clean"), digits)) == set()


def test_a_smoothed_model_with_fixed_draws_is_honest(digits):
    assert findings(audited(fakes.Smoothed(pretrained("mnist-clean"), (1, 28, 28)).eval(), digits)) == set()


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_on_a_linear_model_every_number_is_known(norm):
    """One gradient everywhere: PGD is optimal, nothing can beat it, and no loss is flat."""
    model = linear()
    eps = {"Linf": 0.05, "L2": 0.15, "L1": 0.4}[norm]
    found = audited(model, linear_data(model, n=30), Ball(norm, eps))
    numbers = measured(found)
    assert findings(found) == set()
    assert numbers["gradient-alignment"] == pytest.approx(1, abs=1e-5)
    assert numbers["incomplete-optimisation"] == pytest.approx(0, abs=0.02)
    zero = {"randomised", "zero-gradients", "fgsm-beats-pgd", "more-steps", "more-restarts", "eps-sweep"}
    assert {numbers[name] for name in zero | {"large-eps", "unbounded", "noise", "silent-success"}} == {0.0}
    assert {name for name, number in numbers.items() if number is None} == {"transfer", "dlr-validity"}


# --- repairs -------------------------------------------------------------------------------------------


def share_left(model: nn.Module, images: Dataset, points: torch.Tensor, times: int = 1) -> float:
    """Robust accuracy on candidates, averaged over the draws of a random model."""
    verdicts = [predict(model, points, images.y).float().mean().item() for _ in range(times)]
    return sum(verdicts) / times


SEARCH = partial(pgd, steps=20)


@pytest.mark.parametrize(
    ("fake", "broken"), [(fakes.Quantised, fakes.quantise), (fakes.Compressed, fakes.jpeg)]
)
def test_bpda_brings_a_broken_gradient_back(fake, broken, digits):
    base = pretrained("mnist-clean")
    model = fake(base).eval()
    x, y = digits.x, digits.y
    honest = share_left(base, digits, SEARCH(base, x, y, EPS, generator=seeded(0)))
    noisy = share_left(model, digits, EPS.candidates(x, EPS.random(x, seeded(0))))  # PGD without a gradient
    around = transfer(nn.Sequential(BPDA(broken), base), SEARCH)
    repaired = share_left(model, digits, around(model, x, y, EPS, generator=seeded(0)))
    assert noisy > 0.7
    assert abs(repaired - honest) <= 0.1


def test_the_margin_brings_a_saturated_loss_back(digits):
    base = pretrained("mnist-clean")
    model = fakes.LargeLogits(base).eval()
    x, y = digits.x, digits.y
    honest = share_left(base, digits, SEARCH(base, x, y, EPS, generator=seeded(0)))
    flattered = share_left(model, digits, SEARCH(model, x, y, EPS, generator=seeded(0)))
    repaired = share_left(model, digits, SEARCH(model, x, y, EPS, loss=margin, generator=seeded(0)))
    assert flattered > 0.7
    assert abs(repaired - honest) <= 0.1


@pytest.mark.parametrize(
    ("fake", "base", "eps", "gain"),
    [(fakes.DropoutOn, "mnist-pgd", 0.2, 0.2), (fakes.Resized, "mnist-clean", 0.05, 0.03)],
)
def test_eot_sees_through_random_draws(fake, base, eps, gain, digits):
    model, ball, (x, y) = fake(pretrained(base)).eval(), Ball("Linf", eps), (digits.x, digits.y)
    single = share_left(model, digits, SEARCH(model, x, y, ball, generator=seeded(0)), times=20)
    mean = transfer(EOT(model, draws=10), SEARCH)
    repaired = share_left(model, digits, mean(model, x, y, ball, generator=seeded(0)), times=20)
    assert repaired < single - gain


# --- the checks one by one -----------------------------------------------------------------------------


def planted(n: int = 200, **verdicts: int) -> Runs:
    """Runs whose attacks broke the first so many of n images: what is compared with what, and which way."""
    runs = Runs(linear(), torch.zeros(n, 3, 2, 2), torch.zeros(n, dtype=torch.int64), EPS, 0,
                BUDGETS["smoke"], None, 50)  # fmt: skip
    for name, count in verdicts.items():
        runs.__dict__[name] = torch.arange(n) < count
    return runs


def check(name: str, runs: Runs) -> Outcome:
    (chosen,) = (check for check in CHECKS if check.name == name)
    return chosen(runs)


@pytest.mark.parametrize(
    ("name", "more", "less"),
    [
        ("fgsm-beats-pgd", "fgsm", "pgd"),
        ("more-steps", "more_steps", "pgd"),
        ("more-restarts", "more_restarts", "pgd"),
        ("black-box", "square", "white_box"),
        ("noise", "noise", "white_box"),
        ("transfer", "transferred", "white_box"),
        ("pgd-gap", "white_box", "more_restarts"),
    ],
)
def test_a_comparison_counts_the_images_that_the_right_attack_gained(name, more, less):
    rest = {"square": 0} if name == "pgd-gap" else {}
    found = check(name, planted(**{less: 40, more: 70}, **rest))
    assert (found.verdict, found.measured) == ("flagged", 15.0)
    found = check(name, planted(**{less: 70, more: 40}, **rest))
    assert (found.verdict, found.measured) == ("passed", 0.0)


def test_a_success_on_the_way_that_no_attack_returned_is_silent():
    runs = planted(n=4, white_box=1)
    # Four paths of three steps: returned, passed through, never met, a tie.
    margins = torch.tensor([[-1.0, -1, -1, -1], [1, 1, -1, 0], [1, -1, -1, -1]])
    runs.__dict__["path"] = AttackPath(torch.zeros(4, 3, 2, 2), margins)
    assert check("silent-success", runs).measured == 25.0


def test_a_path_has_each_images_own_margins_whatever_the_batch():
    images = linear_data(linear(), n=10)
    runs = Runs(linear(), images.x, images.y, Ball("Linf", 0.1), 0, BUDGETS["smoke"], None, 4)
    steps = 2 * BUDGETS["smoke"].steps
    assert runs.path.margins.shape == (steps, 10)
    with torch.no_grad():  # a linear model: the last margin but one is already the final one
        expected = margin(linear()(runs.path.points), images.y)
    torch.testing.assert_close(runs.path.margins[-1], expected, atol=1e-4, rtol=0)


def test_the_last_steps_are_weighed_against_the_whole_rise():
    runs = planted(n=3, more_steps=1)  # the first image is broken: its path does not count
    rising, settled = torch.linspace(-1, 1, 21), torch.cat([torch.linspace(-1, 1, 11), torch.ones(10)])
    runs.__dict__["path"] = AttackPath(torch.zeros(3, 3, 2, 2), torch.stack([rising, rising, settled], 1))
    assert check("incomplete-optimisation", runs).measured == pytest.approx(0.25)  # a half and nothing


def test_chance_is_an_exact_binomial_test():
    for n, threshold in [(40, 0.005), (200, 0.005), (200, 0.03), (1_000, 0.002), (10_000, 0.03)]:
        first = next(k for k in range(n) if _beyond(Interval(k, n), threshold))
        assert binom.sf(first - 1, n, threshold) < 0.01 <= binom.sf(first - 2, n, threshold)
    assert _beyond(Interval(1, 200), 0.0)
    assert not _beyond(Interval(0, 200), 0.0)


# --- manners and records -------------------------------------------------------------------------------


def test_an_audit_leaves_everything_as_it_was_and_repeats_itself():
    model = linear()
    model.train()
    images, state = linear_data(model.eval(), n=20), torch.random.get_rng_state()
    model.train()
    first = audited(model, images, Ball("Linf", 0.05))
    assert model.training
    assert model.w.requires_grad
    assert torch.equal(torch.random.get_rng_state(), state)
    again = audited(model, images, Ball("Linf", 0.05), batch_size=20)
    assert replace(again, created=first.created) == first


def test_an_audit_survives_its_json():
    model = linear()
    found = audited(model, linear_data(model, n=8), Ball("L2", 0.1))
    assert Audit.from_json(found.to_json()) == found
    record = json.loads(found.to_json())
    assert record["summary"] == {"n": 8, "findings": []}
    with pytest.raises(RobustkitError, match="holds 'Audit', not 'Evaluation'"):
        Evaluation.from_json(found.to_json())
    del record["seed"]
    with pytest.raises(RobustkitError, match="make it again with `robustkit audit`"):
        Audit.from_json(json.dumps(record))


def test_a_record_cannot_contradict_itself():
    model = linear()
    outcome = audited(model, linear_data(model, n=5), Ball("L2", 0.1), checks=CHECKS[:1]).outcomes[0]
    with pytest.raises(RobustkitError, match="has a measured value exactly when it was run"):
        replace(outcome, measured=None)
    with pytest.raises(RobustkitError, match="verdict 'fine' is unknown"):
        replace(outcome, verdict="fine")


def test_what_cannot_be_audited_is_refused():
    model = linear()
    images = linear_data(model, n=5)
    with pytest.raises(RobustkitError, match="larger than 0; got eps=0"):
        audited(model, images, Ball("Linf", 0))
    with pytest.raises(RobustkitError, match="tier 'huge' is unknown"):
        audit(model, images, EPS, model_name="", tier="huge")


def test_the_command_says_what_it_measured_and_fails_on_findings(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("ROBUSTKIT_DATA", raising=False)
    monkeypatch.setenv("ROBUSTKIT_OFFLINE", "1")
    weights = tmp_path / "mnist-fgsm" / "model.safetensors"
    save_weights(pretrained("mnist-fgsm"), weights)
    arguments = ["audit", str(weights), "--data", "digits", "--n", "8", "--tier", "smoke"]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    stored = (weights.parent / "audit.json").read_text()
    found = Audit.from_json(stored)
    assert "eps-sweep" in findings(found)
    for outcome in found.outcomes:
        assert outcome.check in out
    assert all(f"Try: {one.repair}" in out for one in found.findings)
    assert "transfer was not run: no surrogate model was given." in out
    assert cli.main([*arguments, "--surrogate", str(weights), "--json"]) == 1
    again = Audit.from_json(capsys.readouterr().out)
    assert measured(again)["transfer"] == 0.0

    save_weights(pretrained("mnist-clean"), weights)
    assert cli.main(arguments) == 0
    assert "no findings" in capsys.readouterr().out
