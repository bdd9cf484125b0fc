"""Randomized smoothing, against the linear model on which every probability is known, and against mutants.

On the linear model the smoothed class has share Phi(r / sigma) at L2 distance r from the boundary, so the
distribution of votes, the expected radius and the chance of a wrong certificate are exact.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from robustkit import models
from robustkit.certify import confidence
from robustkit.certify.certificates import (
    ABSTAIN,
    HEADER,
    PUBLISHED,
    Base,
    Certification,
    Row,
    Smoothing,
    average_radius,
    beyond_bound,
    certified_accuracy,
    curve,
    read_certification,
    read_rows,
)
from robustkit.certify.smoothing import BLOCK, base_of, certificate, certified_at, certify, predict, votes
from robustkit.device import prepare, seeded
from robustkit.errors import RobustkitError
from robustkit.results import Interval
from tests.oracle import HARDWARE, PROVENANCE, dataset, everywhere, interior, linear, linear_data, margins

Certifier = Callable[..., tuple[int, float]]


def generator(*key: int | str) -> torch.Generator:
    return seeded("test", *key)


def distances(model, x) -> np.ndarray:
    """Signed L2 distance to the boundary, positive on the side of class 1: the true smoothed radius."""
    return margins(model, x, torch.ones(len(x), dtype=torch.int64)) / float(model.w.detach().norm())


# --- confidence bounds -------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (9, 10), (10, 10), (873, 1000), (99_990, 100_000)])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_bounds_are_scipys_exact_one_sided_interval(k, n, alpha):
    # A two-sided interval at 1 - 2 alpha leaves alpha on each side.
    exact = scipy.stats.binomtest(k, n).proportion_ci(1 - 2 * alpha, method="exact")
    assert confidence.lower_bound(k, n, alpha) == pytest.approx(exact.low, abs=1e-12)
    assert confidence.upper_bound(k, n, alpha) == pytest.approx(exact.high, abs=1e-12)
    if k > 0:
        beta = scipy.stats.beta.ppf(alpha, k, n - k + 1)
        assert confidence.lower_bound(k, n, alpha) == pytest.approx(beta, rel=1e-12)


@pytest.mark.parametrize("p", [0.02, 0.5, 0.61, 0.9, 0.999])
@pytest.mark.parametrize("n", [20, 300])
def test_the_lower_bound_exceeds_a_known_share_at_most_at_its_rate(p, n):
    alpha, draws = 0.05, 50_000
    bound = np.array([confidence.lower_bound(k, n, alpha) for k in range(n + 1)])
    exact = scipy.stats.binom.pmf(np.arange(n + 1), n, p)[bound > p].sum()
    assert exact <= alpha
    seen = (bound[np.random.default_rng(0).binomial(n, p, draws)] > p).mean()
    assert abs(seen - exact) < 4 * math.sqrt(alpha / draws)


@pytest.mark.parametrize("alpha", [0.3, 0.05, 0.001, 0.5])
def test_the_least_n_is_the_first_that_can_certify(alpha):
    least = confidence.least_samples(alpha)
    assert confidence.lower_bound(least, least, alpha) > 0.5
    assert confidence.lower_bound(least - 1, least - 1, alpha) <= 0.5 if least > 1 else True


def test_the_largest_radius_is_the_published_bound():
    # Cohen et al., figure 1 with all votes equal: sigma Phi^-1(alpha^(1/n)), 3.8115 sigma for their settings.
    published = Smoothing(0.5, 100, 100_000, 0.001)
    assert published.largest_radius == pytest.approx(0.5 * scipy.stats.norm.ppf(0.001 ** (1 / 100_000)))
    assert published.largest_radius == pytest.approx(3.8115 * 0.5, abs=1e-4)


# --- the staged test ---------------------------------------------------------------------------------

SIZES = (50, 200, 1_000, 4_000)


def simulate(stages, p: float, runs: int = 20_000, seed: int = 0) -> list[tuple[bool, int]]:
    rng = np.random.default_rng(seed)
    return [confidence.decide(stages, lambda n: rng.binomial(n, p)) for _ in range(runs)]


def exact_rate(stages, p: float) -> float:
    """The probability of "yes" at a known share, by carrying the distribution of open counts along."""
    yes, opened, drawn = 0.0, np.array([1.0]), 0
    for stage in stages:
        more = scipy.stats.binom.pmf(np.arange(stage.n - drawn + 1), stage.n - drawn, p)
        opened, drawn = np.convolve(opened, more), stage.n
        yes += opened[stage.yes :].sum()
        opened[stage.yes :] = 0
        opened[: stage.no + 1] = 0
    return float(yes)


@pytest.mark.parametrize("share", [0.6, 0.84, 0.97])
def test_a_staged_yes_is_wrong_within_its_budget(share):
    alpha, runs = 0.05, 20_000
    stages = confidence.staged_test(share, alpha, sizes=SIZES)
    exact = exact_rate(stages, share)
    assert alpha / 4 < exact <= alpha, "at the boundary the budget is kept, and used"
    assert exact_rate(stages, share - 0.02) < exact
    seen = np.mean([yes for yes, _ in simulate(stages, share, runs)])
    assert abs(seen - exact) < 4 * math.sqrt(alpha / runs)


@pytest.mark.parametrize("share", [0.6, 0.84, 0.97])
def test_a_staged_no_comes_early_to_one_that_deserves_yes_within_its_budget(share):
    beta, runs = 0.05, 20_000
    stages = confidence.staged_test(share, 0.001, beta, SIZES)
    early = np.mean([not yes and n < SIZES[-1] for yes, n in simulate(stages, share, runs)])
    assert 0 < early <= beta + 4 * math.sqrt(beta / runs)


def test_the_staged_checks_reject_tests_that_do_not_split_their_budget():
    unsplit = [confidence.staged_test(0.84, 0.05, sizes=(n,))[0] for n in SIZES]
    assert exact_rate(unsplit, 0.84) > 0.08
    restarted = 1 - (1 - 0.05) ** len(SIZES)  # fresh samples at every stage, full alpha each
    assert restarted > 0.18


def test_a_staged_test_is_quick_when_the_answer_is_clear():
    stages = confidence.staged_test(0.84, 0.001)
    assert {n for _, n in simulate(stages, 0.999, 200)} == {100}
    assert {n for _, n in simulate(stages, 0.5, 200)} == {100}
    assert np.mean([n for _, n in simulate(stages, 0.86, 200)]) > 1_000


@pytest.mark.parametrize("sizes", [(), (10, 10), (100, 10), (0, 10)])
def test_stages_must_rise(sizes):
    with pytest.raises(RobustkitError, match="rising sample sizes"):
        confidence.staged_test(0.6, 0.01, sizes=sizes)


def test_a_radius_that_no_votes_could_certify_is_refused_at_once():
    with pytest.raises(RobustkitError, match="choose a smaller radius or more samples"):
        certified_at(linear(), interior()[0], 5.0, 0.25, generator())
    with pytest.raises(RobustkitError, match="above zero; got 0"):
        certified_at(linear(), interior()[0], 0, 0.25, generator())


# --- the certificate, on the linear model ------------------------------------------------------------


def exact_outcomes(radii: np.ndarray, smoothing: Smoothing) -> tuple[np.ndarray, np.ndarray]:
    """For true radii: the expected certified radius, and the chance that it is larger than the true one."""
    n, n0, sigma = smoothing.n, smoothing.n0, smoothing.sigma
    k = np.arange(n + 1)
    share = scipy.stats.beta.ppf(smoothing.alpha, np.maximum(k, 1e-9), n - k + 1)
    certified = np.where(share >= 0.5, sigma * scipy.stats.norm.ppf(share), 0.0)
    certified[0] = 0.0
    expected, wrong = [], []
    for radius in radii:
        p = scipy.stats.norm.cdf(radius / sigma)
        chosen = scipy.stats.binom.sf(n0 // 2, n0, p)  # n0 is odd in these tests: no tie
        right = scipy.stats.binom.pmf(k, n, p)
        other = scipy.stats.binom.pmf(k, n, 1 - p)
        expected.append(chosen * right @ certified + (1 - chosen) * other @ certified)
        wrong.append(chosen * right @ (certified > radius) + (1 - chosen) * other @ (certified > 0))
    return np.array(expected), np.array(wrong)


def outcomes(certifier: Certifier, model, x, smoothing: Smoothing) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and radii of an implementation, image by image."""
    found = [certifier(model, image, smoothing, generator("image", i)) for i, image in enumerate(x)]
    predictions, radii = zip(*found, strict=True)
    return np.array(predictions), np.nan_to_num(np.array(radii), posinf=1e6)


def test_ten_thousand_certificates_keep_their_rate_and_lose_little():
    smoothing = Smoothing(0.12, 101, 1_000, 0.001)
    model, x = linear(), interior(n=10_000)
    signed = distances(model, x)
    true = np.abs(signed)
    predictions, radii = outcomes(certificate, model, x, smoothing)
    right = predictions == (signed > 0)
    violations = (predictions != ABSTAIN) & (~right | (radii > true + 1e-6))
    assert violations.sum() <= scipy.stats.binom.ppf(0.9999, len(x), smoothing.alpha)
    grid = np.linspace(0, true.max(), 500)
    error = radii - np.interp(true, grid, exact_outcomes(grid, smoothing)[0])
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(len(x))
    decided = (predictions != ABSTAIN) & (true < smoothing.largest_radius)
    assert (true - radii)[decided].mean() < 0.15 * smoothing.sigma, "the slack that n=1,000 costs"


def mistakes(certifier: Certifier) -> set[str]:
    """What an implementation gets wrong, at an alpha large enough to see it: empty for a right one."""
    found = set()
    model, smoothing = linear(), Smoothing(0.15, 101, 200, 0.2)
    x = torch.cat([interior(n=600), everywhere(n=600)])
    true = distances(model, x)
    predictions, radii = outcomes(certifier, model, x, smoothing)
    expected, wrong = exact_outcomes(np.abs(true), smoothing)
    error = radii - expected
    if abs(error.mean()) > 4 * error.std() / math.sqrt(len(x)):
        found.add("radius")
    violations = (predictions != ABSTAIN) & ((predictions != (true > 0)) | (radii > np.abs(true)))
    if abs(violations.sum() - wrong.sum()) > 4 * math.sqrt((wrong * (1 - wrong)).sum()):
        found.add("violations")
    if not all((radius == 0) for radius in radii[predictions == ABSTAIN]) or (radii < 0).any():
        found.add("abstention")
    # On the boundary nothing may be certified, and a class named only at the rate alpha.
    normal = (model.w / model.w.norm()).detach()
    away = torch.tensor(true[:600], dtype=torch.float32)[:, None] * normal
    edge = x[:600] - away.view(600, 3, 2, 2)
    predictions, _ = outcomes(certifier, model, edge, smoothing)
    _, wrong = exact_outcomes(np.zeros(1), smoothing)
    if abs((predictions != ABSTAIN).mean() - wrong[0]) > 4 * math.sqrt(wrong[0] * (1 - wrong[0]) / 600):
        found.add("boundary")
    return found


def _certify(
    model,
    image,
    smoothing: Smoothing,
    generator: torch.Generator,
    *,
    sample=votes,
    bound=confidence.lower_bound,
    alpha: float = 1.0,
    radius=confidence.certified_radius,
    reuse: bool = False,
    abstain: bool = True,
) -> tuple[int, float]:
    """CERTIFY once more, with a place for each mistake."""
    chosen = sample(model, image, smoothing.sigma, smoothing.n0, generator)
    counts = sample(model, image, smoothing.sigma, smoothing.n, generator)
    chosen = int((counts if reuse else chosen).argmax())
    share = bound(int(counts[chosen]), smoothing.n, alpha * smoothing.alpha)
    if abstain and share < 0.5:
        return ABSTAIN, 0.0
    return chosen, max(radius(share, smoothing.sigma), 0.0)


def _clamped(model, image, sigma, n, generator):
    noisy = (image + sigma * torch.randn((n, *image.shape), generator=generator)).clamp(0, 1)
    return torch.bincount(model(noisy).argmax(1), minlength=2)


MUTANTS: dict[str, dict] = {
    "two-sided": {"alpha": 0.5},
    "alpha doubled": {"alpha": 2.0},
    "upper bound": {"bound": confidence.upper_bound},
    "no bound at all": {"bound": lambda k, n, alpha: k / n},
    "selection reused": {"reuse": True},
    "noise clamped": {"sample": _clamped},
    "sigma squared": {"radius": lambda share, sigma: confidence.certified_radius(share, sigma**2)},
    "variance for deviation": {"sample": lambda m, x, s, n, g: votes(m, x, s**2, n, g)},
    "radius of share": {"radius": lambda share, sigma: sigma * share},
    "no abstention": {"abstain": False},
    "no noise": {"sample": lambda m, x, s, n, g: votes(m, x, 0.0, n, g)},
}


def test_the_reference_makes_no_mistake():
    assert mistakes(certificate) == set()
    assert mistakes(_certify) == set()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_makes_one(name):
    assert mistakes(partial(_certify, **MUTANTS[name]))


def test_prediction_abstains_at_the_boundary_and_is_wrong_within_alpha():
    model, smoothing = linear(), Smoothing(0.15, 1, 100, 0.1)
    x = interior(n=600)
    true = distances(model, x)
    found = np.array([predict(model, image, smoothing, generator("p", i)) for i, image in enumerate(x)])
    assert ((found != ABSTAIN) & (found != (true > 0))).mean() <= smoothing.alpha
    sure = np.abs(true) > 0.1
    assert (found[sure] == (true > 0)[sure]).mean() > 0.99
    edge = x[0] - true[0] * (model.w / model.w.norm()).detach().view(3, 2, 2)
    named = np.mean([predict(model, edge, smoothing, generator("e", i)) != ABSTAIN for i in range(600)])
    exact = 2 * scipy.stats.binom.cdf(41, 100, 0.5)  # 41 or fewer: the two-sided test at 0.1 rejects
    assert abs(named - exact) < 4 * math.sqrt(exact / 600)


def test_certified_at_agrees_with_the_truth_and_with_its_budget():
    model, sigma, radius = linear(), 0.15, 0.1
    x = interior(n=400)
    true = np.abs(distances(model, x))
    found = [
        certified_at(model, image, radius, sigma, generator("at", i), stages=SIZES)
        for i, image in enumerate(x)
    ]
    yes = np.array([one.certified for one in found])
    assert not yes[true < radius].any()
    assert yes[true > radius + 0.03].mean() > 0.98
    samples = np.array([one.samples for one in found])
    assert set(samples) <= {100 + size for size in SIZES}
    assert samples.mean() < SIZES[-1] / 2


# --- randomness, batches, modes ----------------------------------------------------------------------


def test_the_noise_does_not_depend_on_the_batch_size():
    seen: list[torch.Tensor] = []

    def model(x):
        seen.append(x.clone())
        return x.flatten(1)[:, :2]

    image = interior()[0]
    drawn = []
    for batch_size in (BLOCK, 2 * BLOCK, 40 * BLOCK):
        seen.clear()
        votes(model, image, 0.3, 1_111, generator(), batch_size=batch_size)
        drawn.append(torch.cat(seen))
    assert len(drawn[0]) == 1_111
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    noise = (drawn[0] - image).flatten().numpy() / 0.3
    assert scipy.stats.kstest(noise, "norm").pvalue > 1e-3
    assert drawn[0].min() < 0
    assert drawn[0].max() > 1


def test_samples_are_independent_of_each_other_and_of_the_selection():
    seen: list[torch.Tensor] = []

    def model(x):
        seen.append(x.clone())
        return x.flatten(1)[:, :2]

    certificate(model, interior()[0], Smoothing(0.3, 100, 1_000), generator())
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 1_100


def test_rows_do_not_depend_on_batch_size_or_order():
    model = models.pretrained("mnist-clean")
    x = torch.rand(6, 1, 28, 28, generator=generator("x"))
    data = replace(dataset(x, torch.zeros(6, dtype=torch.int64)), indices=tuple(range(10, 16)))
    smoothing = Smoothing(0.5, 100, 1_000)

    def rows(data, batch_size=BLOCK):
        made = certify(
            model, data, smoothing, model_name="m", tier="smoke", batch_size=batch_size, progress=False
        )
        return {row.index: replace(row, seconds=0) for row in made.rows}

    first = rows(data)
    assert rows(data, 4 * BLOCK) == first
    assert rows(data.take([4, 0, 2])) == {i: first[i] for i in (14, 10, 12)}
    assert len({row.radius for row in first.values()}) > 1


def test_noise_drawn_ahead_is_the_generators_in_order_and_no_more_than_is_used():
    seen: list[torch.Tensor] = []

    def model(x):
        seen.append(x.clone())
        return x.flatten(1)[:, :2]

    image, mine, plain = interior()[0], generator(), generator()
    for n in (100, 250, 777, 1_000):
        seen.clear()
        votes(model, image, 0.3, n, mine)
        sizes = [250] * (n // 250) + [n % 250] * (n % 250 > 0)
        noise = torch.cat(
            [torch.empty(size, *image.shape).normal_(0, 0.3, generator=plain) for size in sizes]
        )
        assert torch.equal(torch.cat(seen), noise.add_(image))
        assert torch.equal(mine.get_state(), plain.get_state())


@pytest.mark.parametrize("call", [1, 2, 4])
def test_whoever_fails_is_heard_and_leaves_no_thread(call, monkeypatch):
    def failing(work):
        calls = iter(range(1, 99))

        def fails(*arguments, **settings):
            if next(calls) == call:
                raise ArithmeticError("on purpose")
            return work(*arguments, **settings)

        return fails

    threads, model = threading.active_count(), linear()
    with pytest.raises(ArithmeticError, match="on purpose"):
        votes(failing(model), interior()[0], 0.3, 1_000, generator())
    monkeypatch.setattr(torch.Tensor, "normal_", failing(torch.Tensor.normal_))
    with pytest.raises(ArithmeticError, match="on purpose"):
        votes(model, interior()[0], 0.3, 1_000, generator())
    assert threading.active_count() == threads


def test_the_model_is_left_as_it_was_and_votes_in_eval_mode():
    model = linear().train()
    before = torch.get_rng_state()
    first = votes(model, interior()[0], 0.1, 500, generator())
    assert torch.equal(first, votes(model, interior()[0], 0.1, 500, generator()))
    assert model.training
    assert model.w.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [0, -250, 100, 251])
def test_a_batch_size_that_would_change_the_noise_is_refused(size):
    with pytest.raises(RobustkitError, match="multiple of 250"):
        votes(linear(), interior()[0], 0.1, 500, generator(), batch_size=size)


# --- the file of rows --------------------------------------------------------------------------------


def run(path, data=None, model=None, **settings):
    return certify(
        model or linear(),
        data or linear_data(linear(), n=8),
        settings.pop("smoothing", Smoothing(0.12, 20, 300)),
        model_name="m",
        tier="smoke",
        rows=path,
        progress=False,
        **settings,
    )


def timeless(path):
    return [replace(row, seconds=0) for row in read_rows(path)]


def test_killed_anywhere_the_file_is_completed_to_the_same_rows(tmp_path):
    path = tmp_path / "rows.tsv"
    whole = run(path)
    text = path.read_text()
    assert text.splitlines()[1] == HEADER
    assert list(read_rows(path)) == list(whole.rows), (
        "what is written is what is certified, to the last digit"
    )
    for cut in (0, 5, text.index("\n") + 1, text.index("\n") + 9, len(text) - 60, len(text) - 1, len(text)):
        path.write_text(text[:cut])
        kept = text[:cut].rsplit("\n", 1)[0].splitlines()[2:]
        again = run(path)
        assert [replace(row, seconds=0) for row in again.rows] == [
            replace(row, seconds=0) for row in whole.rows
        ]
        assert path.read_text().splitlines()[2 : 2 + len(kept)] == kept, "rows that stood keep their seconds"
        assert list(read_rows(path)) == list(again.rows)


def test_each_row_is_on_disk_before_the_next_image_begins(tmp_path):
    path, net, calls = tmp_path / "rows.tsv", linear(), []

    def model(x):  # a function, which `prepare` passes through: every call counted is one of the run
        return net(x)

    def dying(x):
        calls.append(len(x))
        if len(calls) > 2 + 3 * 3:  # two for the base, three for each of three images
            raise KeyboardInterrupt
        return model(x)

    with pytest.raises(KeyboardInterrupt):
        run(path, model=dying)
    stopped = path.read_text()
    assert len(stopped.splitlines()) == 2 + 3
    run(path, model=model)
    whole = tmp_path / "whole.tsv"
    run(whole, model=model)
    assert path.read_text().startswith(stopped)
    assert timeless(path) == timeless(whole)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"smoothing": Smoothing(0.13, 20, 300)}, {"notes": ("other",)}, {"data": "other"}],
    ids=str,
)
def test_a_file_of_another_run_is_not_continued(tmp_path, change):
    path = tmp_path / "rows.tsv"
    run(path)
    before = path.read_text()
    if "data" in change:
        change = {"data": linear_data(linear(), n=9)}
    with pytest.raises(RobustkitError, match="other settings; choose another file"):
        run(path, **change)
    assert path.read_text() == before


@pytest.mark.parametrize("content", [b"the only copy\n", b"\xff\xfe\x00\n"])
def test_a_file_that_is_no_log_is_left_alone(tmp_path, content):
    path = tmp_path / "thesis.txt"
    path.write_bytes(content)
    with pytest.raises(RobustkitError, match="other settings"):
        run(path)
    assert path.read_bytes() == content


def test_rows_that_were_tampered_with_are_not_continued(tmp_path):
    path = tmp_path / "rows.tsv"
    run(path)
    lines = path.read_text().splitlines(keepends=True)
    for changed in (lines[:3] + lines[4:], [*lines, lines[-1]], [*lines[:2], *lines[3:1:-1]]):
        path.write_text("".join(changed))
        with pytest.raises(RobustkitError, match="not those of these images in order"):
            run(path)
    path.write_text("".join([*lines[:4], "half a row\n"]))
    with pytest.raises(RobustkitError, match="line 5 is not a row"):
        run(path)


# --- published logs ----------------------------------------------------------------------------------

# Made here, in the published form: seconds in both spellings, an abstention, a wrong one, a tie at 0.5.
LOG = f"""{PUBLISHED}
0\t3\t3\t0.5\t1\t15.4
20\t8\t8\t0.4999\t1\t0:00:13.7
40\t1\t-1\t0.0\t0\t0:01:00.25
60\t2\t5\t0.9\t0\t14
80\t2\t2\t0.0123\t1\t1:00:01
"""


def test_a_published_log_is_read_row_by_row(tmp_path):
    path = tmp_path / "sigma_0.50"
    path.write_text(LOG)
    rows = read_rows(path)
    assert [row.seconds for row in rows] == [15.4, 13.7, 60.25, 14, 3601]
    assert [row.prediction for row in rows] == [3, 8, ABSTAIN, 5, 2]
    assert certified_accuracy(rows, 0.0) == Interval(3, 5)
    assert certified_accuracy(rows, 0.5) == Interval(1, 5), "a radius equal to r counts: >=, not >"
    assert average_radius(rows) == pytest.approx((0.5 + 0.4999 + 0.0123) / 5)
    assert [radius for radius, _ in curve(rows)] == [0, 0.25, 0.5, 0.75]
    assert [share.k for _, share in curve(rows)] == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda log: log.replace("\t1\t15.4", "\t15.4"), "line 2 is not a row"),
        (lambda log: log.replace("0.4999", "nan"), "line 3 is not a row.*radius must be a finite"),
        (lambda log: log.replace("0.4999", "-0.1"), "line 3 is not a row"),
        (lambda log: log.replace("0:01:00.25", "a minute"), "line 4 is not a row.*a minute is no time"),
        (lambda log: log.replace("60\t2\t5\t0.9\t0", "60\t2\t5\t0.9\t1"), "line 5 .*is not correct"),
        (lambda log: log.replace("0.0123\t1", "0.0123\t2"), "line 6 .*correct must be 0 or 1"),
        (lambda log: log.replace("\t", " "), "not a certification log"),
        (lambda log: "", "begins with 'an empty file'"),
        (lambda log: PUBLISHED, "a header and no row"),
        (lambda log: log + "\x00\n", "line 7 is not a row"),
    ],
)
def test_a_malformed_log_is_named_with_its_line(tmp_path, damage, words):
    path = tmp_path / "log"
    path.write_text(damage(LOG))
    with pytest.raises(RobustkitError, match=words) as raised:
        read_rows(path)
    assert str(path) in str(raised.value)


def test_a_log_that_claims_more_than_its_samples_prove_is_found(tmp_path):
    path = tmp_path / "log"
    path.write_text(LOG)
    rows = read_rows(path)
    # All of n=100,000 votes at alpha 0.001 prove 3.81 sigma: 0.457 at sigma 0.12, 0.953 at 0.25.
    assert [row.index for row in beyond_bound(rows, Smoothing(0.12, n=100_000))] == [0, 20, 60]
    assert beyond_bound(rows, Smoothing(0.25, n=100_000)) == ()


# --- the record --------------------------------------------------------------------------------------


def certification(rows=None, **changes) -> Certification:
    rows = rows if rows is not None else (Row(0, 1, 1, 0.3, True, 1.0), Row(7, 1, ABSTAIN, 0.0, False, 1.5))
    base = Base("float32", Interval(2, 2), Interval(2, 2))
    made = Certification(
        *("m", base, Smoothing(0.25, 100, 1_000), "L2", PROVENANCE, rows),
        **{"seed": 0, "tier": "smoke", "hardware": HARDWARE, "created": "2026-01-02T03:04:05+00:00"},
    )
    return replace(made, **changes)


def test_the_record_survives_json_and_derives_its_totals(tmp_path):
    made = certification(notes=("a note",))
    assert Certification.from_json(made.to_json()) == made
    assert made.summary()["abstained"] == 1
    assert made.summary()["average_certified_radius"] == pytest.approx(0.15)
    (tmp_path / "c.json").write_text(made.to_json())
    assert read_certification(tmp_path / "c.json") == made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": ()}, "at least one row"),
        ({"norm": "Linf"}, "certifies L2 balls"),
        ({"rows": (Row(3, 1, 1, 0.7, True, 1.0),)}, "image 3 claims radius 0.7000, .* prove 0.6158 at most"),
    ],
)
def test_a_record_that_cannot_be_true_is_not_built(changes, words):
    with pytest.raises(RobustkitError, match=words):
        certification(**changes)


@pytest.mark.parametrize("text", ["", "[]", '{"type": "Evaluation"}', '{"type": "Certification"}', "\xff"])
def test_a_file_that_is_no_certification_is_one_sentence(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RobustkitError, match=r"c\.json") as raised:
        read_certification(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sigma": 0}, "sigma must be a finite number above zero; got 0"),
        ({"sigma": math.nan}, "sigma must be"),
        ({"sigma": 0.25, "alpha": 0}, "alpha must lie between 0 and 1"),
        ({"sigma": 0.25, "alpha": 1}, "alpha must lie between 0 and 1"),
        ({"sigma": 0.25, "n0": 0}, "n0 must be at least 1"),
        ({"sigma": 0.25, "n": 9}, "n=9 samples can certify no radius at alpha 0.001.*10 is the least"),
    ],
)
def test_settings_that_certify_nothing_are_refused(settings, words):
    with pytest.raises(RobustkitError, match=words):
        Smoothing(**settings)
    assert Smoothing(0.25, n=10).largest_radius > 0


# --- models that will not do -------------------------------------------------------------------------


def test_votes_that_are_nan_name_the_image():
    data = replace(linear_data(linear(), n=4), indices=(5, 6, 7, 8))

    def model(x):
        logits = linear()(x)
        return torch.where((x.flatten(1) == data.x[2].flatten()).any(1)[:, None], torch.nan, logits)

    class Breaks(nn.Module):
        def forward(self, x):
            return model(x) if len(x) == 4 else torch.full((len(x), 2), torch.nan)

    with pytest.raises(RobustkitError, match="NaN logits"):
        certify(model, data, Smoothing(0.1), model_name="m", tier="smoke", progress=False)
    with pytest.raises(RobustkitError, match=r"the model returned NaN logits"):
        votes(Breaks(), data.x[0], 0.1, 100, generator())
    calls = []

    def later(x):
        calls.append(1)
        return linear()(x) * (1 if len(calls) < 5 else torch.nan)

    with pytest.raises(RobustkitError, match="image 6: the model returned NaN"):
        certify(later, data, Smoothing(0.1, 10, 200), model_name="m", tier="smoke", progress=False)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 3)])
def test_a_model_without_votes_is_refused(shape):
    with pytest.raises(RobustkitError, match=r"logits of shape \(3, classes\)"):
        votes(lambda x: torch.zeros(shape), interior()[0], 0.1, 3, generator())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_precision_in_which_the_votes_were_cast_is_recorded(dtype, monkeypatch):
    """A bfloat16 base classifier is another network: the record says which one was certified."""
    monkeypatch.setattr("robustkit.certify.smoothing.prepare", partial(prepare, precision=dtype))
    data = dataset(torch.rand(2, 1, 28, 28, generator=generator("x")), torch.zeros(2, dtype=torch.int64))
    made = certify(
        *(models.pretrained("mnist-clean"), data, Smoothing(0.25, 10, 250)),
        **{"model_name": "m", "tier": "smoke", "progress": False},
    )
    assert made.base.precision == str(dtype).removeprefix("torch.")


def test_a_model_that_was_not_trained_for_the_noise_is_told_so(capsys):
    model = linear()
    x = interior(n=200)
    with torch.no_grad():
        data = dataset(x, model(x).argmax(1))
    assert base_of(model, data, 0.01, seed=0).warning is None
    base = base_of(model, data, 5.0, seed=0)
    assert base.clean == Interval(200, 200)
    assert 0.3 < base.noisy.share < 0.7
    certify(model, data.take(range(20)), Smoothing(5.0, 10, 50), model_name="m", tier="smoke")
    assert "under the noise: it was not trained for this sigma" in capsys.readouterr().err
