"""Mutants of `rs_fgsm(model, x, y, eps, generator)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.mutants import gradient, mutant
from tests.mutants.fgsm import predicted


def _uniform(x, eps, generator):
    return eps * (2 * torch.rand(x.shape, generator=generator) - 1)


def _finish(model, x, y, eps, start, step=1.25):
    g = gradient(model, x + start, y)
    return (x + (start + step * eps * g.sign()).clamp(-eps, eps)).clamp(0, 1)


@mutant("rs_fgsm", everywhere="NO_EFFECT")
def noise(model, x, y, eps, generator):
    """In ball and box, uniform, reproducible; and no attack."""
    return (x + _uniform(x, eps, generator)).clamp(0, 1)


@mutant("rs_fgsm", start="START_NOT_UNIFORM", step="STEP_SIZE")
def towards_grey(model, x, y, eps, generator):
    """Raises the loss a little without a look at the model."""
    return x + eps * (0.5 - x).sign() * (x != 0.5)


@mutant("rs_fgsm", everywhere="WRONG_SIGN")
def wrong_sign(model, x, y, eps, generator):
    return _finish(model, x, y, eps, _uniform(x, eps, generator), step=-1.25)


@mutant("rs_fgsm", box="BOX_VIOLATED")
def no_clamp(model, x, y, eps, generator):
    start = _uniform(x, eps, generator)
    return x + (start + 1.25 * eps * gradient(model, x + start, y).sign()).clamp(-eps, eps)


@mutant("rs_fgsm", ball="EPS_BALL_VIOLATED")
def no_projection(model, x, y, eps, generator):
    start = _uniform(x, eps, generator)
    return (x + start + 1.25 * eps * gradient(model, x + start, y).sign()).clamp(0, 1)


@mutant("rs_fgsm", start="NO_RANDOM_START")
def plain_fgsm(model, x, y, eps, generator):
    return _finish(model, x, y, eps, torch.zeros_like(x), step=1.0)


@mutant("rs_fgsm", start="NO_RANDOM_START")
def steps_from_the_image(model, x, y, eps, generator):
    """The gradient is taken at the start, which is then forgotten."""
    g = gradient(model, x + _uniform(x, eps, generator), y)
    return (x + eps * g.sign()).clamp(0, 1)


@mutant("rs_fgsm", start="START_NOT_UNIFORM")
def half_the_ball(model, x, y, eps, generator):
    return _finish(model, x, y, eps, _uniform(x, eps / 2, generator))


@mutant("rs_fgsm", start="START_NOT_UNIFORM")
def brightens_only(model, x, y, eps, generator):
    return _finish(model, x, y, eps, eps * torch.rand(x.shape, generator=generator))


@mutant("rs_fgsm", start="START_NOT_UNIFORM")
def gaussian_start(model, x, y, eps, generator):
    start = (eps * torch.randn(x.shape, generator=generator)).clamp(-eps, eps)
    return _finish(model, x, y, eps, start)


@mutant("rs_fgsm", start="START_NOT_UNIFORM")
def narrow_gaussian_start(model, x, y, eps, generator):
    start = (eps * 3**-0.5 * torch.randn(x.shape, generator=generator)).clamp(-eps, eps)
    return _finish(model, x, y, eps, start)


@mutant("rs_fgsm", start="START_NOT_UNIFORM", step="STEP_SIZE")
def r_fgsm(model, x, y, eps, generator):
    """Tramer et al. 2018: a random sign step of eps / 2, then FGSM with the other half."""
    start = eps / 2 * torch.randn(x.shape, generator=generator).sign()
    return _finish(model, x, y, eps, start, step=0.5)


@mutant("rs_fgsm", start="START_NOT_UNIFORM")
def one_start_for_every_image(model, x, y, eps, generator):
    return _finish(model, x, y, eps, _uniform(x[:1], eps, generator).expand_as(x))


@mutant("rs_fgsm", start="START_NOT_UNIFORM")
def one_offset_for_every_pixel(model, x, y, eps, generator):
    return _finish(model, x, y, eps, _uniform(x[:, :1, :1, :1], eps, generator).expand_as(x))


@mutant("rs_fgsm", start="START_CLIPPED")
def start_clamped_into_the_box(model, x, y, eps, generator):
    start = (x + _uniform(x, eps, generator)).clamp(0, 1) - x
    return _finish(model, x, y, eps, start)


@mutant("rs_fgsm", start="SAME_FOR_EVERY_SEED")
def generator_of_its_own(model, x, y, eps, generator):
    return _finish(model, x, y, eps, _uniform(x, eps, torch.Generator().manual_seed(0)))


@mutant("rs_fgsm", step="STEP_SIZE")
def step_of_eps(model, x, y, eps, generator):
    return _finish(model, x, y, eps, _uniform(x, eps, generator), step=1.0)


@mutant("rs_fgsm", step="STEP_SIZE")
def step_of_two_eps(model, x, y, eps, generator):
    return _finish(model, x, y, eps, _uniform(x, eps, generator), step=2.0)


@mutant("rs_fgsm", step="STEP_SIZE")
def step_in_input_units(model, x, y, eps, generator):
    return _finish(model, x, y, eps, _uniform(x, eps, generator), step=1.25 / eps)


@mutant("rs_fgsm", step="GRADIENT_ELSEWHERE")
def gradient_at_the_image(model, x, y, eps, generator):
    start = _uniform(x, eps, generator)
    return (x + (start + 1.25 * eps * gradient(model, x, y).sign()).clamp(-eps, eps)).clamp(0, 1)


@mutant("rs_fgsm", step="LABEL_IGNORED")
def predicted_labels(model, x, y, eps, generator):
    return _finish(model, x, predicted(model, x), eps, _uniform(x, eps, generator))


@mutant("rs_fgsm", hygiene="SEED_IGNORED")
def global_randomness(model, x, y, eps, generator):
    return _finish(model, x, y, eps, torch.empty_like(x).uniform_(-eps, eps))


@mutant("rs_fgsm", hygiene="SEED_IGNORED", step="STEP_SIZE")
def global_randomness_and_a_short_step(model, x, y, eps, generator):
    return _finish(model, x, y, eps, torch.empty_like(x).uniform_(-eps, eps), step=1.0)


@mutant("rs_fgsm", hygiene="EVAL_MODE_MISSING")
def in_whatever_mode_it_came(model, x, y, eps, generator):
    start = _uniform(x, eps, generator)
    x_in = (x + start).requires_grad_(True)
    (g,) = torch.autograd.grad(F.cross_entropy(model(x_in), y), x_in)
    return (x + (start + 1.25 * eps * g.sign()).clamp(-eps, eps)).clamp(0, 1)


@mutant("rs_fgsm", everywhere="NO_EFFECT")
def no_op(model, x, y, eps, generator):
    return x.clone()
