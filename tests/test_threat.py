"""Balls, threat models, and the refusals of what no attack can be trusted on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from robustkit.errors import RobustkitError
from robustkit.threat import GOALS, KNOWLEDGE, NORMS, Ball, ThreatModel, check_batch, check_logits, white_box
from tests.oracle import DUAL, ORDER

examples = settings(max_examples=60, deadline=None, derandomize=True)

norms = st.sampled_from(NORMS)
sizes = st.floats(0, 8, width=32)
coordinates = st.floats(-10, 10, width=32).map(lambda value: value if abs(value) > 1e-6 else 0.0)
deltas = arrays.arrays(
    np.float32, arrays.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=coordinates
)


def norm_of(delta: torch.Tensor, norm: str) -> np.ndarray:
    """Each example's norm by NumPy, in float64."""
    flat = delta.double().flatten(1).numpy()
    return np.linalg.norm(flat, ord=ORDER[norm], axis=1)


# --- geometry --------------------------------------------------------------------------------------


@examples
@given(norms, sizes, deltas)
def test_size_is_the_norm_of_each_example_on_its_own(norm, eps, delta):
    found = Ball(norm, eps).size(torch.from_numpy(delta))
    assert found.shape == (len(delta),)
    np.testing.assert_allclose(found.numpy(), norm_of(torch.from_numpy(delta), norm), rtol=1e-5, atol=1e-7)


@examples
@given(norms, sizes, deltas)
def test_projection_lands_in_the_ball_and_leaves_its_inside_alone(norm, eps, delta):
    ball, delta = Ball(norm, eps), torch.from_numpy(delta)
    projected = ball.project(delta)
    sizes_before, sizes_after = norm_of(delta, norm), norm_of(projected, norm)
    assert (sizes_after <= eps * (1 + 1e-5) + 1e-7).all()
    inside = sizes_before <= eps * (1 - 1e-5)
    # Equal, not near: a projection onto the sphere, or one that always rescales, moves these.
    assert torch.equal(projected[torch.from_numpy(inside)], delta[torch.from_numpy(inside)])
    outside = sizes_before > eps
    np.testing.assert_allclose(sizes_after[outside], eps, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ball.project(projected), projected, rtol=1e-5, atol=1e-6)


@examples
@given(norms, st.floats(2**-7, 8, width=32), deltas, st.integers(0, 10))
def test_no_point_of_the_ball_is_nearer_than_the_projection(norm, eps, delta, seed):
    ball, delta = Ball(norm, eps), torch.from_numpy(delta)
    distance = norm_of(delta - ball.project(delta), "L2")
    for rival in (ball.random(delta, torch.Generator().manual_seed(seed)), torch.zeros_like(delta)):
        assert (distance <= norm_of(delta - rival, "L2") * (1 + 1e-5) + 1e-6).all()


@examples
@given(norms, deltas)
def test_the_steepest_step_has_norm_one_and_reaches_the_dual_norm(norm, gradient):
    gradient = torch.from_numpy(gradient)
    step = Ball(norm, 1.0).steepest(gradient)
    moving = (gradient.flatten(1).abs().amax(1) > 0).numpy()
    np.testing.assert_allclose(norm_of(step, norm)[moving], 1, rtol=1e-5)
    assert not step.numpy()[~moving].any()
    # Hoelder: no direction of norm 1 has a larger product with the gradient than its dual norm.
    reached = (step.double() * gradient.double()).flatten(1).sum(1).numpy()
    dual = np.linalg.norm(gradient.double().flatten(1).numpy(), ord=DUAL[norm], axis=1)
    np.testing.assert_allclose(reached, dual, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-12, 1e30])
def test_the_steepest_l2_step_survives_gradients_whose_squares_do_not(scale):
    gradient = scale * torch.tensor([[3.0, -4.0]])
    torch.testing.assert_close(
        Ball("L2", 1.0).steepest(gradient),
        torch.tensor([[0.6, -0.8]]),
        rtol=0.15 if scale < 1e-40 else 1e-5,
        atol=0,
    )


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_fill_the_ball_uniformly(norm):
    ball, n, shape = Ball(norm, 0.5), 4000, (3, 2)
    points = ball.random(torch.zeros(n, *shape), torch.Generator().manual_seed(0))
    dimension = math.prod(shape)
    # In a uniform ball the norm R has P(R <= r) = (r / eps) ** dimension, whichever the norm is.
    radii = norm_of(points, norm)
    assert (radii <= 0.5 * (1 + 1e-6)).all()
    assert stats.kstest((radii / 0.5) ** dimension, "uniform").pvalue > 0.001
    # And no direction is preferred: signs are fair in every coordinate and coordinates do not correlate.
    flat = points.flatten(1).numpy()
    assert abs((flat > 0).mean(0) - 0.5).max() < 4 * 0.5 / n**0.5
    off_diagonal = np.corrcoef(flat.T) - np.eye(dimension)
    assert abs(off_diagonal).max() < 5 / n**0.5


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_come_from_the_generator_alone(norm):
    ball, like = Ball(norm, 0.5), torch.zeros(4, 3)

    def draw(seed: int) -> torch.Tensor:
        return ball.random(like, torch.Generator().manual_seed(seed))

    before = torch.random.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(torch.unique(draw(1), dim=0)) == len(like)  # not one perturbation for the whole batch


@examples
@given(norms, sizes, deltas)
def test_candidates_lie_in_ball_and_box_at_once(norm, eps, delta):
    ball, delta = Ball(norm, eps), torch.from_numpy(delta)
    x = ((delta * 7.3) % 1).clamp(0, 1)
    candidates = ball.candidates(x, delta)
    assert candidates.min() >= 0
    assert candidates.max() <= 1
    assert (norm_of(candidates - x, norm) <= eps * (1 + 1e-5) + 1e-6).all()
    assert ball.contains(x, candidates).all()


def nearest_in_l1_and_box(x: np.ndarray, delta: np.ndarray, eps: float) -> np.ndarray:
    """By bisection in float64 for the amount by which each coordinate shrinks before the walls cut it."""
    room = np.where(delta > 0, 1 - x, x)

    def shrunk(amount: float) -> np.ndarray:
        return np.minimum(np.maximum(np.abs(delta) - amount, 0), room)

    low, high = 0.0, float(np.abs(delta).max())
    if shrunk(0.0).sum() > eps:
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if shrunk(middle).sum() > eps else (low, middle)
    else:
        high = 0.0
    return np.asarray(np.sign(delta) * shrunk(high))


@examples
@given(sizes, deltas)
def test_l1_candidates_are_the_nearest_points_of_ball_and_box(eps, delta):
    x = (torch.from_numpy(delta) * 7.3 % 1).clamp(0, 1)
    found = (Ball("L1", eps).candidates(x, torch.from_numpy(delta)) - x).double().flatten(1).numpy()
    for change, clean, wanted in zip(found, x.double(), delta.astype(np.float64), strict=True):
        expected = nearest_in_l1_and_box(clean.flatten().numpy(), wanted.ravel(), eps)
        np.testing.assert_allclose(change, expected, atol=2e-5)


@pytest.mark.parametrize("eps", [1.0, 10.0, 100.0])
def test_l1_candidates_agree_with_pyautoattack(eps):
    from pyautoattack.autopgd_base import L1_projection

    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.rand(20, 1, 28, 28, generator=generator) - 1).clamp_min(0)  # half black, as digits are
    delta = torch.randn(x.shape, generator=generator)
    theirs = x + delta + L1_projection(x, delta, eps)
    torch.testing.assert_close(Ball("L1", eps).candidates(x, delta), theirs, atol=2e-4, rtol=0)
    # Projecting and clamping in turn would leave part of eps unused at the walls.
    assert (Ball("L1", eps).size(Ball("L1", eps).candidates(x, delta) - x) > 0.999 * eps).all()
    assert (Ball("L1", eps).size((x + Ball("L1", eps).project(delta)).clamp(0, 1) - x) < 0.9 * eps).any()


@pytest.mark.parametrize("norm", NORMS)
def test_contains_allows_rounding_and_nothing_more(norm):
    ball = Ball(norm, 0.25)
    x = torch.full((3, 4), 0.5)
    step = 0.25 * ball.steepest(torch.ones(3, 4))
    candidate = x + step * torch.tensor([[1.0], [1 + 1e-6], [1.001]])
    assert ball.contains(x, candidate).tolist() == [True, True, False]


def test_contains_refuses_nan():
    x = torch.full((1, 2), 0.5)
    assert not Ball("Linf", 0.5).contains(x, torch.tensor([[0.5, math.nan]])).any()


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "eps", "words"),
    [
        ("L0", 0.1, "choose one of Linf, L2, L1"),
        ("linf", 0.1, "'linf' is unknown"),
        ("Linf", -0.1, "got -0.1"),
        ("L2", math.nan, "finite"),
        ("L2", math.inf, "finite"),
    ],
)
def test_a_ball_that_means_nothing_is_refused(norm, eps, words):
    with pytest.raises(RobustkitError, match=words):
        Ball(norm, eps)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"knowledge": "psychic"}, "choose one of white-box"),
        ({"goal": "chaos"}, "choose one of untargeted, targeted"),
        ({"queries": 0}, "at least 1"),
    ],
)
def test_a_threat_model_that_means_nothing_is_refused(change, words):
    good = {"ball": Ball("Linf", 0.1), "knowledge": "white-box", "goal": "untargeted", "queries": None}
    with pytest.raises(RobustkitError, match=words):
        ThreatModel(**(good | change))


def test_a_threat_model_reads_as_one_full_sentence():
    assert str(white_box(Ball("L2", 0.5))) == (
        "L2 eps=0.5 on inputs in [0, 1], white-box, untargeted, no query limit"
    )
    limited = ThreatModel(Ball("Linf", 8 / 255), KNOWLEDGE[1], GOALS[1], 100)
    assert str(limited).endswith("score-based, targeted, at most 100 queries per example")


X, Y = torch.full((3, 1, 2, 2), 0.5), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (X - 2, Y, r"x must lie in \[0, 1\]; got \[-1.5, -1.5\]. Put normalisation inside the model"),
        (X + 0.50001, Y, "got"),
        (X * math.inf, Y, "must lie in"),
        (torch.where(torch.arange(12).view_as(X) == 5, math.nan, X), Y, "NaN"),
        (X[:0], Y[:0], r"non-empty batch.*\(0, 1, 2, 2\)"),
        (torch.tensor([0.5]), Y[:1], "non-empty batch"),
        ((255 * X).to(torch.uint8), Y, "Divide integer images by 255"),
        (X, Y[:2], r"shape \(3,\); got \(2,\)"),
        (X, Y[:, None], r"got \(3, 1\)"),
        (X, Y.float(), "int64"),
        (X, Y - 1, "negative; got -1"),
    ],
)
def test_a_batch_that_cannot_be_trusted_is_refused_in_a_sentence(x, y, words):
    with pytest.raises(RobustkitError, match=words) as caught:
        check_batch(x, y)
    assert "\n" not in str(caught.value)


def test_a_good_batch_passes_at_the_very_walls_of_the_box():
    check_batch(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (torch.zeros(3), "logits of shape"),
        (torch.zeros(2, 5), "logits of shape"),
        (torch.zeros(3, 2), "label 2 is out of range: the model has 2 classes"),
        (torch.full((3, 3), math.nan), "NaN logits"),
    ],
)
def test_logits_that_decide_nothing_are_refused(logits, words):
    with pytest.raises(RobustkitError, match=words):
        check_logits(logits, Y)
