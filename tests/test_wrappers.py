"""BPDA and EOT against closed forms on masked linear models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from robustkit.attacks import fgsm, pgd, transfer
from robustkit.attacks.gradient import input_gradient
from robustkit.device import seeded
from robustkit.errors import RobustkitError
from robustkit.losses import cross_entropy, margin
from robustkit.threat import Ball
from robustkit.wrappers import BPDA, EOT
from tests.oracle import Linear, interior, linear, margins, strongest

LEVELS = 63


def quantise(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 64 grey levels: the gradient is zero almost everywhere."""
    return (x * LEVELS).round() / LEVELS


def labelled(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


# --- BPDA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_bpda_reaches_the_closed_form_where_plain_pgd_gets_nothing(norm):
    x, bare = interior(), linear()
    masked = nn.Sequential(linear_after(quantise), bare)
    y = labelled(masked, x)
    ball = Ball(norm, 0.1)
    _, _, gradient = input_gradient(masked, x, cross_entropy, y)
    assert (gradient == 0).all()
    settings = {"steps": 20, "step_size": 0.1, "start": x}
    assert torch.equal(pgd(masked, x, y, ball, **settings), x)
    repaired = nn.Sequential(BPDA(quantise), bare)
    found = transfer(repaired, fgsm)(masked, x, y, ball)
    np.testing.assert_allclose(found.numpy(), strongest(bare, x, y, ball), atol=1e-6)
    found = pgd(repaired, x, y, ball, **settings)
    np.testing.assert_allclose(found.numpy(), strongest(bare, x, y, ball), atol=1e-5)
    # ... and what is found counts on the masked model itself: nearly all that the bare one loses.
    limit = margins(bare, torch.from_numpy(strongest(bare, x, y, ball)), y) < 0
    broken = (labelled(masked, found) != y).numpy()
    assert limit.sum() > 20
    assert (broken == limit).mean() > 0.95


def linear_after(function) -> nn.Module:
    class Part(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    return Part()


def test_bpda_changes_no_value():
    """Bit for bit: straight-through sums such as soft + (hard - soft) are off by a rounding."""
    x = torch.rand(50, 3, 8, 8, generator=seeded(0))
    assert torch.equal(BPDA(quantise)(x), quantise(x))
    assert torch.equal(BPDA(quantise, lambda x: 7.3 * x.exp())(x), quantise(x))


def test_bpda_differentiates_the_replacement_and_never_the_part():
    x = torch.rand(5, 4, generator=seeded(0)).requires_grad_()

    def part(x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return x * 1000

    (plain,) = torch.autograd.grad(BPDA(part)(x).sum(), x)
    assert torch.equal(plain, torch.ones_like(x))
    (cubic,) = torch.autograd.grad(BPDA(part, lambda x: x**3)(x).sum(), x)
    torch.testing.assert_close(cubic, 3 * x.detach() ** 2)


def test_bpda_is_a_module_whose_part_is_inside():
    wrapped = BPDA(nn.Dropout(0.5), nn.Identity())
    assert not wrapped.eval().part.training
    assert copy.deepcopy(wrapped)(torch.ones(2, 2)).tolist() == [[1, 1], [1, 1]]


def test_bpda_refuses_a_replacement_of_another_shape():
    with pytest.raises(RobustkitError, match=r"shape \(2, 4\) where the part gives \(2, 1\)"):
        BPDA(lambda x: x[:, :1])(torch.rand(2, 4))


# --- EOT -------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """The linear model behind a random mask on its input: mean logits are those of half the weights."""

    def __init__(self, bare: Linear) -> None:
        super().__init__()
        self.bare, self.calls = bare, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.bare(x * torch.bernoulli(torch.full_like(x, 0.5)))


def gradient_error(draws: int, seed: int) -> float:
    """How far the gradient of the margin is from its closed form, in units of its length."""
    x = interior(n=40)
    model = Noisy(linear())
    y = labelled(model.bare, x)
    _, _, found = input_gradient(EOT(model, draws, seeded(seed)), x, margin, y)
    # margin = -(2y - 1) 2z, and the mask halves the mean weight.
    exact = -(2 * y - 1)[:, None] * model.bare.w.detach()
    return ((found.flatten(1) - exact).norm(dim=1) / exact.norm(dim=1)).mean().item()


def test_eot_recovers_the_closed_form_gradient_as_draws_grow():
    errors = [gradient_error(draws, 0) for draws in (1, 4, 16, 64, 256)]
    # Mask entries 0 or 2 of mean 1: standard deviation 1 a coordinate, so 1 / sqrt(draws) in all.
    for draws, error in zip((1, 4, 16, 64, 256), errors, strict=True):
        assert error == pytest.approx(draws**-0.5, rel=0.1)


def test_eot_averages_logits_over_fresh_draws():
    model = Noisy(linear())
    x = interior(n=6)
    wrapped = EOT(model, 8, seeded(1))
    found = wrapped(x)
    assert model.calls == 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=seeded(1))))
        single = torch.stack([model(x) for _ in range(8)])
    assert single.std(0).min() > 0  # the draws differ
    torch.testing.assert_close(found, single.mean(0))
    assert not torch.equal(wrapped(x), found)  # and so do those of the next call


def test_eot_draws_from_its_generator_alone_or_lets_the_model_draw_on():
    model, x = Noisy(linear()), interior(n=6)
    state = torch.random.get_rng_state()
    first = EOT(model, 4, seeded(2))(x)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert torch.equal(EOT(model, 4, seeded(2))(x), first)
        torch.manual_seed(99)
        free = EOT(model, 4)(x)
        torch.manual_seed(99)
        assert torch.equal(EOT(model, 4)(x), free)
        assert not torch.equal(EOT(model, 4)(x), free)


def test_eot_makes_an_attack_on_a_randomised_model_the_closed_form_one():
    x, bare = interior(n=60), linear()
    y = labelled(bare, x)
    model, ball = Noisy(bare), Ball("L2", 0.1)
    best = torch.from_numpy(strongest(bare, x, y, ball)).float()

    def alignment(attacked: nn.Module) -> float:
        found = transfer(attacked, fgsm)(model, x, y, ball)
        a, b = (found - x).flatten(1), (best - x).flatten(1)
        return nn.functional.cosine_similarity(a, b).mean().item()

    once, often = alignment(EOT(model, 1, seeded(0))), alignment(EOT(model, 200, seeded(0)))
    assert once == pytest.approx(0.71, abs=0.07)  # 1 / sqrt(2)
    assert often > 0.99


def test_eot_refuses_no_draws():
    with pytest.raises(RobustkitError, match="at least 1; got 0"):
        EOT(linear(), 0)
