"""Mutants of `fgsm_loss(model, x, y, eps)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.mutants import gradient, mutant
from tests.mutants.fgsm import predicted


def _fgsm(model, x, y, eps):
    return (x + eps * gradient(model, x, y).sign()).clamp(0, 1)


@mutant("adversarial_loss", everywhere="NOT_IMPLEMENTED")
def stub(model, x, y, eps):
    raise NotImplementedError


@mutant("adversarial_loss", loss="TRAINS_ON_CLEAN", gradient="TRAINS_ON_CLEAN", modes="EVAL_MODE_MISSING")
def clean_loss(model, x, y, eps):
    return F.cross_entropy(model(x), y)


@mutant("adversarial_loss", loss="TRAINS_ON_CLEAN", gradient="TRAINS_ON_CLEAN")
def candidates_made_and_forgotten(model, x, y, eps):
    _fgsm(model, x, y, eps)
    return F.cross_entropy(model(x), y)


@mutant("adversarial_loss", loss="MIXED_LOSS", gradient="MIXED_LOSS")
def half_and_half(model, x, y, eps):
    candidates = _fgsm(model, x, y, eps)
    return 0.5 * F.cross_entropy(model(x), y) + 0.5 * F.cross_entropy(model(candidates), y)


@mutant("adversarial_loss", loss="LOSS_SUMMED")
def summed(model, x, y, eps):
    return F.cross_entropy(model(_fgsm(model, x, y, eps)), y, reduction="sum")


@mutant("adversarial_loss", loss="LOSS_VALUE", gradient="LOSS_VALUE")
def wrong_sign(model, x, y, eps):
    return F.cross_entropy(model(_fgsm(model, x, y, -eps)), y)


@mutant("adversarial_loss", loss="LOSS_VALUE", gradient="LOSS_VALUE")
def negated(model, x, y, eps):
    return -F.cross_entropy(model(_fgsm(model, x, y, eps)), y)


@mutant("adversarial_loss", loss="LOSS_VALUE", gradient="LOSS_VALUE")
def step_of_rs_fgsm(model, x, y, eps):
    return F.cross_entropy(model(_fgsm(model, x, y, 1.25 * eps)), y)


@mutant("adversarial_loss", loss="LOSS_VALUE", gradient="LOSS_VALUE")
def predicted_labels(model, x, y, eps):
    return F.cross_entropy(model(_fgsm(model, x, predicted(model, x), eps)), y)


@mutant("adversarial_loss", loss="LOSS_VALUE", gradient="LOSS_VALUE")
def label_smoothing(model, x, y, eps):
    return F.cross_entropy(model(_fgsm(model, x, y, eps)), y, label_smoothing=0.1)


@mutant("adversarial_loss", gradient="NO_GRADIENT")
def detached(model, x, y, eps):
    return F.cross_entropy(model(_fgsm(model, x, y, eps)), y).detach()


@mutant("adversarial_loss", gradient="NO_GRADIENT")
def weights_frozen_for_the_loss(model, x, y, eps):
    model.requires_grad_(False)
    return F.cross_entropy(model(_fgsm(model, x, y, eps)), y)


@mutant("adversarial_loss", everywhere="RAISED")
def a_number(model, x, y, eps):
    return F.cross_entropy(model(_fgsm(model, x, y, eps)), y).item()


@mutant("adversarial_loss", everywhere="RAISED")
def one_loss_per_example(model, x, y, eps):
    return F.cross_entropy(model(_fgsm(model, x, y, eps)), y, reduction="none")


@mutant("adversarial_loss", everywhere="NOT_FINITE")
def nan(model, x, y, eps):
    return F.cross_entropy(model(_fgsm(model, x, y, eps)), y) * float("nan")


@mutant("adversarial_loss", gradient="WEIGHT_GRADIENTS_LEFT")
def weight_gradients_left(model, x, y, eps):
    x_in = x.clone().requires_grad_(True)
    F.cross_entropy(model.eval()(x_in), y).backward()
    candidates = (x + eps * x_in.grad.sign()).clamp(0, 1)
    return F.cross_entropy(model.train()(candidates), y)


@mutant("adversarial_loss", gradient="WEIGHT_GRADIENTS_ERASED")
def weight_gradients_erased(model, x, y, eps):
    loss = weight_gradients_left(model, x, y, eps)
    model.zero_grad()
    return loss


@mutant("adversarial_loss", gradient="WEIGHT_GRADIENTS_LEFT")
def calls_backward_itself(model, x, y, eps):
    loss = F.cross_entropy(model(_fgsm(model, x, y, eps)), y)
    loss.backward(retain_graph=True)
    return loss


@mutant("adversarial_loss", modes="EVAL_MODE_MISSING")
def candidates_in_train_mode(model, x, y, eps):
    x_in = x.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(F.cross_entropy(model(x_in), y), x_in)
    return F.cross_entropy(model((x + eps * g.sign()).clamp(0, 1)), y)


@mutant("adversarial_loss", modes="TRAIN_MODE_MISSING")
def loss_in_eval_mode(model, x, y, eps):
    model.eval()
    return F.cross_entropy(model(_fgsm(model, x, y, eps)), y)


@mutant("adversarial_loss", modes="TRAIN_MODE_MISSING")
def model_left_in_eval_mode(model, x, y, eps):
    loss = F.cross_entropy(model(_fgsm(model, x, y, eps)), y)
    model.eval()
    return loss


@mutant("adversarial_loss", loss="INPUT_MODIFIED")
def in_place(model, x, y, eps):
    x.copy_(_fgsm(model, x, y, eps))
    return F.cross_entropy(model(x), y)
