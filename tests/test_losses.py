"""Losses against their definitions: one value per example, larger for the attacker."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from robustkit.losses import cross_entropy, margin

LOGITS = torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.0, 0.0], [-3.0, 5.0, 5.5]])
Y = torch.tensor([0, 2, 1])


def test_cross_entropy_is_minus_the_log_probability_example_by_example():
    expected = -log_softmax(LOGITS.double().numpy(), axis=1)[np.arange(3), Y.numpy()]
    np.testing.assert_allclose(cross_entropy(LOGITS, Y).numpy(), expected, rtol=1e-6)


def test_margin_is_the_best_wrong_logit_minus_the_true_one():
    assert margin(LOGITS, Y).tolist() == [-1.0, 0.0, 0.5]


def test_margin_is_positive_exactly_on_mistakes():
    logits = torch.randn(500, 7, generator=torch.Generator().manual_seed(0))
    y = torch.randint(7, (500,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(margin(logits, y) > 0, logits.argmax(1) != y)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_margin_keeps_its_gradient_where_cross_entropy_loses_it(scale):
    logits = (scale * torch.tensor([[1.0, 0.0]])).requires_grad_()
    y = torch.tensor([0])
    (kept,) = torch.autograd.grad(margin(logits, y).sum(), logits)
    (vanishing,) = torch.autograd.grad(cross_entropy(logits, y).sum(), logits)
    assert kept.tolist() == [[-1.0, 1.0]]
    p = 1 / (1 + math.exp(min(scale, 700)))
    torch.testing.assert_close(vanishing, torch.tensor([[-p, p]]), atol=1e-7, rtol=1e-5)


def test_losses_leave_their_arguments_alone():
    logits, y = LOGITS.clone(), Y.clone()
    margin(logits, y), cross_entropy(logits, y)
    assert torch.equal(logits, LOGITS)
    assert torch.equal(y, Y)
