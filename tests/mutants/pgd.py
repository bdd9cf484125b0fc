"""Mutants of `pgd(model, x, y, eps, steps, step_size, generator)`."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from tests.mutants import gradient, mutant
from tests.mutants.fgsm import predicted


def _uniform(x, eps, generator):
    return eps * (2 * torch.rand(x.shape, generator=generator) - 1)


def _walk(model, x, y, eps, steps, step_size, points):
    """PGD from `points`, without a mistake."""
    for _ in range(steps):
        moved = points + step_size * gradient(model, points, y).sign()
        points = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
    return points


def _start(x, eps, generator):
    return (x + _uniform(x, eps, generator)).clamp(0, 1)


# --- ball and box ------------------------------------------------------------------------------------


@mutant("pgd", box="BOX_VIOLATED")
def no_clamp(model, x, y, eps, steps, step_size, generator):
    points = x + _uniform(x, eps, generator)
    for _ in range(steps):
        moved = points + step_size * gradient(model, points, y).sign()
        points = x + (moved - x).clamp(-eps, eps)
    return points


@mutant("pgd", ball="EPS_BALL_VIOLATED", closed_form="STEP_TOO_LARGE")
def no_projection(model, x, y, eps, steps, step_size, generator):
    points = _start(x, eps, generator)
    for _ in range(steps):
        points = (points + step_size * gradient(model, points, y).sign()).clamp(0, 1)
    return points


@mutant("pgd", ball="EPS_BALL_VIOLATED", closed_form="STEP_TOO_LARGE")
def last_projection_missing(model, x, y, eps, steps, step_size, generator):
    points = _start(x, eps, generator)
    for _ in range(steps):
        inside = x + (points - x).clamp(-eps, eps)
        points = (inside + step_size * gradient(model, inside, y).sign()).clamp(0, 1)
    return points


@mutant("pgd", ball="EPS_BALL_VIOLATED", closed_form="STEP_TOO_LARGE")
def projects_around_the_last_point(model, x, y, eps, steps, step_size, generator):
    points = _start(x, eps, generator)
    for _ in range(steps):
        delta = (step_size * gradient(model, points, y).sign()).clamp(-eps, eps)
        points = (points + delta).clamp(0, 1)
    return points


@mutant("pgd", closed_form="NOT_STEEPEST", start="START_NOT_UNIFORM", steps="STEP_COUNT")
def projects_onto_the_surface(model, x, y, eps, steps, step_size, generator):
    points = _start(x, eps, generator)
    for _ in range(steps):
        moved = points + step_size * gradient(model, points, y).sign()
        points = (x + eps * (moved - x).sign()).clamp(0, 1)
    return points


# --- start -------------------------------------------------------------------------------------------


@mutant("pgd", start="NO_RANDOM_START")
def no_random_start(model, x, y, eps, steps, step_size, generator):
    return _walk(model, x, y, eps, steps, step_size, x)


@mutant("pgd", start="START_NOT_UNIFORM")
def half_the_ball(model, x, y, eps, steps, step_size, generator):
    return _walk(model, x, y, eps, steps, step_size, _start(x, eps / 2, generator))


@mutant("pgd", start="START_NOT_UNIFORM")
def gaussian_start(model, x, y, eps, steps, step_size, generator):
    start = (eps * torch.randn(x.shape, generator=generator)).clamp(-eps, eps)
    return _walk(model, x, y, eps, steps, step_size, (x + start).clamp(0, 1))


@mutant("pgd", start="START_NOT_UNIFORM")
def corners_of_the_ball(model, x, y, eps, steps, step_size, generator):
    start = eps * torch.randn(x.shape, generator=generator).sign()
    return _walk(model, x, y, eps, steps, step_size, (x + start).clamp(0, 1))


@mutant("pgd", start="START_NOT_UNIFORM")
def darkens_only(model, x, y, eps, steps, step_size, generator):
    start = _uniform(x, eps, generator).clamp(max=0)
    return _walk(model, x, y, eps, steps, step_size, (x + start).clamp(0, 1))


@mutant("pgd", start="START_NOT_UNIFORM")
def one_start_for_every_image(model, x, y, eps, steps, step_size, generator):
    start = _uniform(x[:1], eps, generator)
    return _walk(model, x, y, eps, steps, step_size, (x + start).clamp(0, 1))


@mutant("pgd", start="SAME_FOR_EVERY_SEED")
def generator_of_its_own(model, x, y, eps, steps, step_size, generator):
    start = _start(x, eps, torch.Generator().manual_seed(0))
    return _walk(model, x, y, eps, steps, step_size, start)


@mutant("pgd", start="SAME_FOR_EVERY_SEED")
def generator_reseeded(model, x, y, eps, steps, step_size, generator):
    return _walk(model, x, y, eps, steps, step_size, _start(x, eps, generator.manual_seed(0)))


# --- steps -------------------------------------------------------------------------------------------


@mutant("pgd", steps="STEP_COUNT")
def one_step_too_many(model, x, y, eps, steps, step_size, generator):
    return _walk(model, x, y, eps, steps + 1, step_size, _start(x, eps, generator))


@mutant("pgd", steps="STEP_COUNT")
def one_step_too_few(model, x, y, eps, steps, step_size, generator):
    return _walk(model, x, y, eps, steps - 1, step_size, _start(x, eps, generator))


@mutant("pgd", steps="STEP_COUNT")
def always_ten_steps(model, x, y, eps, steps, step_size, generator):
    return _walk(model, x, y, eps, 10, step_size, _start(x, eps, generator))


@mutant("pgd", closed_form="STEP_TOO_SMALL", steps="STEP_COUNT")
def step_size_of_eps_over_steps(model, x, y, eps, steps, step_size, generator):
    return _walk(model, x, y, eps, steps, 0.99 * eps / steps + 1e-3 * eps, _start(x, eps, generator))


@mutant("pgd", steps="STEP_COUNT")
def step_size_of_the_paper(model, x, y, eps, steps, step_size, generator):
    return _walk(model, x, y, eps, steps, 2.5 * eps / steps, _start(x, eps, generator))


@mutant("pgd", steps="STEP_COUNT")
def step_size_in_units_of_eps(model, x, y, eps, steps, step_size, generator):
    """At .25 * eps^2 a step hardly moves; with 25 times the steps it still arrives."""
    return _walk(model, x, y, eps, 25 * steps, step_size * eps, _start(x, eps, generator))


@mutant("pgd", start="NO_RANDOM_START", closed_form="STEP_TOO_SMALL", steps="STEP_COUNT")
def steps_from_the_image_every_time(model, x, y, eps, steps, step_size, generator):
    points = _start(x, eps, generator)
    for _ in range(steps):
        points = (x + (step_size * gradient(model, points, y).sign()).clamp(-eps, eps)).clamp(0, 1)
    return points


@mutant("pgd", closed_form="GRADIENT_ELSEWHERE")
def gradient_at_the_image(model, x, y, eps, steps, step_size, generator):
    points = _start(x, eps, generator)
    for _ in range(steps):
        moved = points + step_size * gradient(model, x, y).sign()
        points = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
    return points


@mutant("pgd", closed_form="GRADIENT_ELSEWHERE")
def gradient_taken_once(model, x, y, eps, steps, step_size, generator):
    points = _start(x, eps, generator)
    g = gradient(model, points, y)
    for _ in range(steps):
        points = (x + (points + step_size * g.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    return points


@mutant("pgd", closed_form="NOT_STEEPEST", steps="STEP_COUNT")
def noise(model, x, y, eps, steps, step_size, generator):
    """In ball and box, uniform, reproducible; and no attack."""
    return _start(x, eps, generator)


@mutant("pgd", closed_form="WRONG_SIGN", steps="WRONG_SIGN")
def wrong_sign(model, x, y, eps, steps, step_size, generator):
    return _walk(model, x, y, eps, steps, -step_size, _start(x, eps, generator))


@mutant("pgd", closed_form="LABEL_IGNORED")
def predicted_labels(model, x, y, eps, steps, step_size, generator):
    return _walk(model, x, predicted(model, x), eps, steps, step_size, _start(x, eps, generator))


@mutant("pgd", closed_form="NOT_STEEPEST", steps="STEP_COUNT")
def raw_gradient_step(model, x, y, eps, steps, step_size, generator):
    points = _start(x, eps, generator)
    for _ in range(steps):
        moved = points + step_size * gradient(model, points, y)
        points = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
    return points


# --- what is left behind -----------------------------------------------------------------------------


@mutant("pgd", hygiene="SEED_IGNORED")
def global_randomness(model, x, y, eps, steps, step_size, generator):
    start = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    return _walk(model, x, y, eps, steps, step_size, start)


@mutant("pgd", hygiene="SEED_IGNORED", steps="STEP_COUNT")
def global_randomness_and_one_step_too_few(model, x, y, eps, steps, step_size, generator):
    start = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    return _walk(model, x, y, eps, steps - 1, step_size, start)


@mutant("pgd", hygiene="SEED_IGNORED")
def randomness_of_numpy(model, x, y, eps, steps, step_size, generator):
    start = torch.from_numpy(np.random.default_rng().uniform(-eps, eps, x.shape)).float()
    return _walk(model, x, y, eps, steps, step_size, (x + start).clamp(0, 1))


@mutant("pgd", hygiene="GLOBAL_RANDOMNESS", start="SAME_FOR_EVERY_SEED")
def sets_the_global_seed(model, x, y, eps, steps, step_size, generator):
    torch.manual_seed(0)
    start = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    return _walk(model, x, y, eps, steps, step_size, start)


@mutant("pgd", hygiene="EVAL_MODE_MISSING")
def in_whatever_mode_it_came(model, x, y, eps, steps, step_size, generator):
    points = _start(x, eps, generator)
    for _ in range(steps):
        points.requires_grad_(True)
        (g,) = torch.autograd.grad(F.cross_entropy(model(points), y), points)
        points = (x + (points.detach() + step_size * g.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    return points


@mutant("pgd", hygiene="MODE_NOT_RESTORED")
def leaves_eval_mode(model, x, y, eps, steps, step_size, generator):
    model.eval()
    return _walk(model, x, y, eps, steps, step_size, _start(x, eps, generator))


@mutant("pgd", hygiene="MODE_NOT_RESTORED")
def leaves_train_mode(model, x, y, eps, steps, step_size, generator):
    points = _walk(model, x, y, eps, steps, step_size, _start(x, eps, generator))
    model.train()
    return points


@mutant("pgd", hygiene="WEIGHT_GRADIENTS_LEFT")
def weight_gradients_left(model, x, y, eps, steps, step_size, generator):
    was_training = model.training
    model.eval()
    points = _start(x, eps, generator)
    for _ in range(steps):
        points = points.detach().requires_grad_(True)
        F.cross_entropy(model(points), y).backward()
        moved = points.detach() + step_size * points.grad.sign()
        points = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
    model.train(was_training)
    return points


@mutant("pgd", hygiene="INPUT_MODIFIED")
def result_written_into_the_input(model, x, y, eps, steps, step_size, generator):
    return x.copy_(_walk(model, x.clone(), y, eps, steps, step_size, _start(x, eps, generator)))


@mutant("pgd", hygiene="GRAPH_RETURNED")
def returns_a_graph(model, x, y, eps, steps, step_size, generator):
    return _walk(model, x, y, eps, steps, step_size, _start(x, eps, generator).requires_grad_(True))


@mutant("pgd", everywhere="NO_EFFECT")
def keeps_the_best_but_never_updates_it(model, x, y, eps, steps, step_size, generator):
    best = x.clone()
    _walk(model, x, y, eps, steps, step_size, _start(x, eps, generator))
    return best


@mutant("pgd", everywhere="NOT_IMPLEMENTED")
def stub(model, x, y, eps, steps, step_size, generator):
    raise NotImplementedError
