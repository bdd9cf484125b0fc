"""Losses against their definitions: one value per example, larger for the attacker."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from robustkit.errors import RobustkitError
from robustkit.losses import cross_entropy, dlr, dlr_targeted, margin, towards

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


MANY = torch.tensor([[2.0, 1.0, -1.0, 0.5], [4.0, 0.0, 1.0, 3.0], [-3.0, 5.0, 5.5, 0.0]])


def test_dlr_is_the_margin_over_the_spread_of_the_three_largest():
    # By hand: (1 - 2) / (2 - 0.5), (4 - 1) / (4 - 1), (5.5 - 5) / (5.5 - 0).
    torch.testing.assert_close(dlr(MANY, Y), torch.tensor([-2 / 3, 1.0, 0.5 / 5.5]))


def test_targeted_dlr_is_the_targets_lead_over_the_spread_of_the_four_largest():
    target = torch.tensor([3, 1, 0])
    # (0.5 - 2) / (2 - (0.5 - 1) / 2), (0 - 1) / (4 - (1 + 0) / 2), (-3 - 5) / (5.5 - (0 - 3) / 2).
    torch.testing.assert_close(dlr_targeted(MANY, Y, target), torch.tensor([-1.5 / 2.25, -1 / 3.5, -8 / 7]))


@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_the_ratio_is_blind_to_shift_and_scale_of_the_logits(scale):
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(50) % 6
    moved = scale * logits + 7 * scale
    torch.testing.assert_close(dlr(moved, y), dlr(logits, y), rtol=1e-3, atol=1e-4)
    target = (y + 1) % 6
    torch.testing.assert_close(
        dlr_targeted(moved, y, target), dlr_targeted(logits, y, target), rtol=1e-3, atol=1e-4
    )
    assert torch.equal(dlr(logits, y) > 0, logits.argmax(1) != y)


def test_the_ratio_of_equal_logits_is_zero_not_nan():
    flat = torch.zeros(2, 4)
    assert dlr(flat, Y[:2]).tolist() == [0, 0]
    assert dlr_targeted(flat, Y[:2], Y[:2] + 1).tolist() == [0, 0]


def test_too_few_classes_for_a_ratio_are_refused_with_the_remedy():
    with pytest.raises(RobustkitError, match=r"dlr needs at least 3 classes; the model has 2\. Use margin\."):
        dlr(LOGITS[:, :2], Y[:1])
    with pytest.raises(RobustkitError, match=r"dlr_targeted needs at least 4 classes; the model has 3\."):
        dlr_targeted(LOGITS, Y, Y)


def test_a_loss_turned_towards_a_target_is_positive_exactly_where_the_target_is_predicted():
    logits = torch.randn(500, 5, generator=torch.Generator().manual_seed(0))
    y, target = torch.arange(500) % 5, (torch.arange(500) + 2) % 5
    assert torch.equal(towards(margin)(logits, y, target) > 0, logits.argmax(1) == target)
    expected = log_softmax(logits.double().numpy(), axis=1)[np.arange(500), target.numpy()]
    np.testing.assert_allclose(towards(cross_entropy)(logits, y, target).numpy(), expected, rtol=1e-4)


def test_losses_leave_their_arguments_alone():
    logits, y = LOGITS.clone(), Y.clone()
    margin(logits, y), cross_entropy(logits, y), dlr(logits, y)
    assert torch.equal(logits, LOGITS)
    assert torch.equal(y, Y)
