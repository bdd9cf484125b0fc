"""Training for certificates: each loss against its formula, and that it buys what it is for."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from robustkit import data, models
from robustkit.certify.bounds import crown_ibp_margins, ibp_margins, verified_accuracy
from robustkit.certify.smoothing import base_of
from robustkit.certify.training import consistency, crown_ibp, gaussian, ibp, smooth_adv
from robustkit.defences import DEFENCES
from robustkit.device import seeded
from robustkit.recipes import RECIPES
from robustkit.threat import Ball
from robustkit.train import Schedule, train
from tests.oracle import linear, linear_data, margins

OURS = [
    name
    for name in DEFENCES
    if name.split("-")[0] in ("gaussian", "consistency", "smoothadv", "ibp", "crown")
]


def batch(n: int = 40):
    model = linear()
    found = linear_data(model, n=n)
    return model, found.x, found.y


def noise(x: torch.Tensor, sigma: float, generator: torch.Generator) -> torch.Tensor:
    return sigma * torch.randn(x.shape, generator=generator)


def test_gaussian_training_is_cross_entropy_under_the_noise():
    model, x, y = batch()
    found = gaussian(model, x, y, Ball("L2", 1), seeded("g"), sigma=0.3)
    expected = F.cross_entropy(model(x + noise(x, 0.3, seeded("g"))), y)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, gaussian(model, x, y, Ball("L2", 1), seeded("h"), sigma=0.3), atol=1e-4)


def test_consistency_is_the_published_sum():
    """Jensen-Shannon of two copies by entropies: H(mean) - mean H, from the definition and not from KL."""
    model, x, y = batch()
    found = consistency(model, x, y, Ball("L2", 1), seeded("c"), sigma=0.3, weight=7.0, entropy=0.25)
    generator = seeded("c")
    each = [model(x + noise(x, 0.3, generator)) for _ in range(2)]
    shares = [torch.distributions.Categorical(logits=logits) for logits in each]
    mean = torch.distributions.Categorical(probs=(shares[0].probs + shares[1].probs) / 2)
    divergence = mean.entropy() - (shares[0].entropy() + shares[1].entropy()) / 2
    # KL(mean || each), averaged, is what the paper writes; it is not the Jensen-Shannon divergence.
    published = sum(torch.distributions.kl_divergence(mean, one) for one in shares) / 2
    assert not torch.allclose(divergence, published, rtol=1e-3)
    expected = (
        F.cross_entropy(torch.cat(each), torch.cat([y, y])) + (7 * published + 0.25 * mean.entropy()).mean()
    )
    assert torch.allclose(found, expected, rtol=1e-4)


def test_smooth_adv_attacks_along_the_normal_of_a_linear_model():
    """Every noisy copy has the same gradient direction there: the attack must reach the ball's edge along it."""
    model, x, y = batch()
    seen = []

    class Watched(torch.nn.Module):
        def forward(self, images):
            seen.append(images.detach().clone())
            return model(images)

    smooth_adv(Watched(), x, y, Ball("L2", 0.1), seeded("s"), sigma=0.3)
    generator = seeded("s")
    first, second = (x + noise(x, 0.3, generator) for _ in range(2))
    assert len(seen) == 2 * 2 + 1
    deltas = [images - start for images, start in zip(seen[-1].chunk(2), (first, second), strict=True)]
    assert torch.allclose(deltas[0], deltas[1], atol=1e-5), "the update uses the noise of the attack"
    assert deltas[0].flatten(1).norm(dim=1) == pytest.approx(torch.full((len(x),), 0.1), abs=1e-4)
    attacked = margins(model, x + deltas[0], y)
    assert attacked == pytest.approx(margins(model, x, y) - 0.1 * float(model.w.detach().norm()), abs=1e-4)


def test_bound_training_goes_from_the_clean_loss_to_the_bounds():
    model = models.build("mnist_cnn", seed=1)
    x, y = torch.rand(8, 1, 28, 28, generator=seeded("x")), torch.arange(8)
    clean = F.cross_entropy(model(x), y)
    for defence in (ibp, crown_ibp):
        start = defence(model, x, y, Ball("Linf", 0.0), seeded("i"), full_eps=0.1)
        assert torch.allclose(start, clean, atol=1e-5)
        end = defence(model, x, y, Ball("Linf", 0.1), seeded("i"), full_eps=0.1, kappa=0.25)
        worst = F.cross_entropy(-ibp_margins(model, x, y, Ball("Linf", 0.1)), y)
        assert torch.allclose(end, 0.25 * clean + 0.75 * worst, rtol=1e-5)
    half = crown_ibp(model, x, y, Ball("Linf", 0.05), seeded("i"), full_eps=0.1)
    ball = Ball("Linf", 0.05)
    mixed = (ibp_margins(model, x, y, ball) + crown_ibp_margins(model, x, y, ball)) / 2
    assert torch.allclose(half, 0.75 * clean + 0.25 * F.cross_entropy(-mixed, y), rtol=1e-4)


@pytest.mark.parametrize("name", OURS)
def test_every_defence_trains_and_leaves_randomness_alone(name):
    model = models.build("mnist_cnn")
    x, y = torch.rand(6, 1, 28, 28, generator=seeded("x")), torch.arange(6)
    before = torch.get_rng_state()
    ball = Ball("Linf" if "ibp" in name else "L2", 0.05)
    first = DEFENCES[name](model, x, y, ball, seeded("d"))
    assert torch.equal(first, DEFENCES[name](model, x, y, ball, seeded("d")))
    first.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_recipes_name_defences_that_fit_their_ball():
    ours = [recipe for recipe in RECIPES.values() if recipe.defence in OURS]
    assert {recipe.defence for recipe in ours} == set(OURS)
    for recipe in ours:
        assert recipe.ball.norm == ("Linf" if "ibp" in recipe.defence else "L2")
        assert {"smoke", "standard"} <= recipe.schedules.keys()
        full_eps = getattr(DEFENCES[recipe.defence], "keywords", {}).get("full_eps")
        assert full_eps in (None, recipe.ball.eps), "the mixture must end where the schedule ends"


def trained(defence, ball: Ball, schedule: Schedule):
    model = models.build("mnist_cnn")
    train(model, data.load("digits", "train", limit=600), defence, ball, schedule, progress=False)
    return model


def test_noise_in_training_keeps_accuracy_under_noise():
    test, sigma = data.load("digits", "test", limit=200), 1.0
    taught = trained(partial(gaussian, sigma=sigma), Ball("L2", 0.5), Schedule(5, 64))
    plain = trained(DEFENCES["clean"], Ball("L2", 0.5), Schedule(3, 64))
    assert base_of(taught, test, sigma, 0).noisy.share > base_of(plain, test, sigma, 0).noisy.share + 0.05


@pytest.mark.slow
def test_training_on_bounds_gives_what_clean_training_cannot():
    test, ball = data.load("digits", "test", limit=100), Ball("Linf", 0.02)
    taught = trained(DEFENCES["ibp-0.1"], Ball("Linf", 0.1), Schedule(6, 64, 2e-3, eps_warmup=1.0))
    plain = trained(DEFENCES["clean"], ball, Schedule(3, 64))
    assert verified_accuracy(plain, test, ball, ibp_margins).share < 0.1
    assert verified_accuracy(taught, test, ball, ibp_margins).share > 0.4
