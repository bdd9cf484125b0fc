"""Mutants of the parts of PGD in two norms: projection, random start, and the whole."""

from __future__ import annotations

import torch

from robustkit.device import attackable
from tests.mutants import mutant

# --- ball_projection -----------------------------------------------------------------------------------


def _lengths(delta):
    return delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def _within(delta, norm, eps):
    if norm == "Linf":
        return delta.clamp(-eps, eps)
    return delta * (eps / _lengths(delta)).clamp(max=1)


def _right_projection(x, candidate, norm, eps):
    return (x + _within(candidate - x, norm, eps)).clamp(0, 1)


@mutant("ball_projection", box="BOX_VIOLATED")
def projection_without_box(x, candidate, norm, eps):
    return x + _within(candidate - x, norm, eps)


@mutant("ball_projection", linf="EPS_BALL_VIOLATED", l2="EPS_BALL_VIOLATED")
def box_only_in_both_norms(x, candidate, norm, eps):
    return candidate.clamp(0, 1)


@mutant("ball_projection", l2="EPS_BALL_VIOLATED")
def norm_ignored(x, candidate, norm, eps):
    return _right_projection(x, candidate, "Linf", eps)


@mutant("ball_projection", l2="EPS_BALL_VIOLATED")
def squared_length(x, candidate, norm, eps):
    if norm == "Linf":
        return _right_projection(x, candidate, norm, eps)
    delta = candidate - x
    shrink = torch.where(_lengths(delta) > eps, eps / _lengths(delta).sqrt(), 1.0)
    return (x + delta * shrink).clamp(0, 1)


@mutant("ball_projection", l2="NOT_NEAREST", inside="INTERIOR_MOVED")
def length_of_the_whole_batch(x, candidate, norm, eps):
    if norm == "Linf":
        return _right_projection(x, candidate, norm, eps)
    delta = candidate - x
    return (x + delta * min(1.0, eps / max(delta.norm().item(), 1e-12))).clamp(0, 1)


@mutant("ball_projection", l2="NOT_NEAREST")
def cube_in_the_ball(x, candidate, norm, eps):
    if norm == "Linf":
        return _right_projection(x, candidate, norm, eps)
    delta = candidate - x
    side = eps / delta[0].numel() ** 0.5
    far = _lengths(delta) > eps
    return (x + torch.where(far, delta.clamp(-side, side), delta)).clamp(0, 1)


@mutant("ball_projection", linf="NOT_NEAREST")
def scaled_in_linf_too(x, candidate, norm, eps):
    delta = candidate - x
    largest = delta.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)
    size = largest if norm == "Linf" else _lengths(delta)
    return (x + delta * (eps / size).clamp(max=1)).clamp(0, 1)


@mutant("ball_projection", inside="INTERIOR_MOVED")
def always_to_the_surface(x, candidate, norm, eps):
    if norm == "Linf":
        return _right_projection(x, candidate, norm, eps)
    delta = candidate - x
    return (x + eps * delta / _lengths(delta)).clamp(0, 1)


@mutant("ball_projection", inside="DIVIDED_BY_ZERO")
def nothing_to_divide_by(x, candidate, norm, eps):
    if norm == "Linf":
        return _right_projection(x, candidate, norm, eps)
    delta = candidate - x
    length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x + delta / length * length.clamp(max=eps)).clamp(0, 1)


@mutant("ball_projection", inside="INPUT_MODIFIED")
def projection_in_place(x, candidate, norm, eps):
    return candidate.copy_(_right_projection(x, candidate, norm, eps))


@mutant("ball_projection", everywhere="WRONG_SHAPE")
def change_flattened(x, candidate, norm, eps):
    return _right_projection(x, candidate, norm, eps).flatten(1)


@mutant("ball_projection", linf="EPS_BALL_VIOLATED", l2="EPS_BALL_VIOLATED", inside="INTERIOR_MOVED")
def change_returned(x, candidate, norm, eps):
    return _within(candidate - x, norm, eps).clamp(0, 1)


# --- random_start --------------------------------------------------------------------------------------


def _cube(x, eps, generator):
    return eps * (2 * torch.rand(x.shape, generator=generator) - 1)


def _direction(x, generator):
    normal = torch.randn(x.shape, generator=generator)
    return normal / _lengths(normal)


def _root(x, generator):
    """The radius, in units of eps, of a point that is uniform over the ball."""
    return torch.rand(len(x), 1, 1, 1, generator=generator) ** (1 / x[0].numel())


def _right_change(x, norm, eps, generator):
    if norm == "Linf":
        return _cube(x, eps, generator)
    return eps * _root(x, generator) * _direction(x, generator)


def _right_start(x, norm, eps, generator):
    return (x + _right_change(x, norm, eps, generator)).clamp(0, 1)


@mutant("random_start", box="BOX_VIOLATED")
def start_without_box(x, norm, eps, generator):
    return x + _right_change(x, norm, eps, generator)


@mutant("random_start", linf="NO_RANDOM_START", l2="NO_RANDOM_START")
def start_at_the_image(x, norm, eps, generator):
    return x.clone()


@mutant("random_start", l2="NO_RANDOM_START")
def start_in_linf_alone(x, norm, eps, generator):
    return _right_start(x, norm, eps, generator) if norm == "Linf" else x.clone()


@mutant("random_start", l2="EPS_BALL_VIOLATED")
def cube_in_l2(x, norm, eps, generator):
    return (x + _cube(x, eps, generator)).clamp(0, 1)


@mutant("random_start", l2="START_NOT_UNIFORM")
def cube_cut_to_the_ball(x, norm, eps, generator):
    return (x + _within(_cube(x, eps, generator), norm, eps)).clamp(0, 1)


@mutant("random_start", l2="START_NOT_UNIFORM")
def uniform_radius(x, norm, eps, generator):
    if norm == "Linf":
        return _right_start(x, norm, eps, generator)
    radius = torch.rand(len(x), 1, 1, 1, generator=generator)
    return (x + eps * radius * _direction(x, generator)).clamp(0, 1)


@mutant("random_start", l2="START_NOT_UNIFORM")
def always_on_the_sphere(x, norm, eps, generator):
    if norm == "Linf":
        return _right_start(x, norm, eps, generator)
    return (x + eps * _direction(x, generator)).clamp(0, 1)


@mutant("random_start", l2="START_NOT_UNIFORM")
def one_direction_for_all(x, norm, eps, generator):
    if norm == "Linf":
        return _right_start(x, norm, eps, generator)
    return (x + eps * _root(x, generator) * _direction(x[:1], generator)).clamp(0, 1)


@mutant("random_start", linf="START_NOT_UNIFORM")
def darkens_only(x, norm, eps, generator):
    change = _right_change(x, norm, eps, generator)
    return (x + (change.clamp(max=0) if norm == "Linf" else change)).clamp(0, 1)


@mutant("random_start", linf="START_NOT_UNIFORM")
def one_start_for_all_images(x, norm, eps, generator):
    change = _right_change(x[:1] if norm == "Linf" else x, norm, eps, generator)
    return (x + change).clamp(0, 1)


@mutant("random_start", linf="START_NOT_UNIFORM")
def one_value_for_all_pixels(x, norm, eps, generator):
    if norm == "L2":
        return _right_start(x, norm, eps, generator)
    return (x + eps * (2 * torch.rand(len(x), 1, 1, 1, generator=generator) - 1)).clamp(0, 1)


@mutant("random_start", linf="SAME_FOR_EVERY_SEED", l2="SAME_FOR_EVERY_SEED")
def start_with_a_seed_of_its_own(x, norm, eps, generator):
    return _right_start(x, norm, eps, torch.Generator().manual_seed(0))


@mutant("random_start", hygiene="GLOBAL_RANDOMNESS")
def start_from_the_global_state(x, norm, eps, generator):
    return _right_start(x, norm, eps, None)


@mutant("random_start", hygiene="INPUT_MODIFIED")
def start_in_place(x, norm, eps, generator):
    return x.copy_(_right_start(x, norm, eps, generator))


@mutant("random_start", everywhere="NOT_IMPLEMENTED")
def start_left_open(x, norm, eps, generator):
    raise NotImplementedError


# --- pgd_lp --------------------------------------------------------------------------------------------


def _steepest(gradient, norm):
    if norm == "Linf":
        return gradient.sign()
    return gradient / _lengths(gradient)


def _gradient(model, points, y, loss):
    with attackable(model):
        points = points.detach().requires_grad_(True)
        losses = loss(model(points), y)
        return torch.autograd.grad(losses.sum(), points)[0], losses.detach()


def _run(model, x, y, norm, eps, steps, step_size, loss, generator, steepest=_steepest, start=_right_start):
    points = start(x, norm, eps, generator)
    for _ in range(steps):
        moved = points + step_size * steepest(_gradient(model, points, y, loss)[0], norm)
        points = _right_projection(x, moved, norm, eps)
    return points


def _best(runs, model, y, loss):
    """Of several runs, image by image, the candidate of the highest loss."""
    losses = torch.stack([_gradient(model, points, y, loss)[1] for points in runs])
    return torch.stack(runs)[losses.argmax(0), torch.arange(len(y))]


@mutant("pgd_lp", restarts="RESTARTS_WASTED")
def restarts_ignored(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    return _run(model, x, y, norm, eps, steps, step_size, loss, generator)


@mutant("pgd_lp", restarts="RESTARTS_WASTED")
def last_restart_kept(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    for _ in range(restarts):
        points = _run(model, x, y, norm, eps, steps, step_size, loss, generator)
    return points


@mutant("pgd_lp", restarts="RESTARTS_WASTED")
def best_restart_of_the_batch(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    runs = [_run(model, x, y, norm, eps, steps, step_size, loss, generator) for _ in range(restarts)]
    return max(runs, key=lambda points: _gradient(model, points, y, loss)[1].sum().item())


@mutant("pgd_lp", restarts="RESTARTS_WASTED")
def lowest_loss_kept(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    runs = [_run(model, x, y, norm, eps, steps, step_size, loss, generator) for _ in range(restarts)]
    return _best(runs, model, y, lambda logits, y: -loss(logits, y))


@mutant("pgd_lp", restarts="RESTARTS_WASTED")
def every_restart_from_the_same_start(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    state = generator.get_state()
    runs = []
    for _ in range(restarts):
        generator.set_state(state)
        runs.append(_run(model, x, y, norm, eps, steps, step_size, loss, generator))
    return _best(runs, model, y, loss)


@mutant("pgd_lp", restarts="RESTARTS_UNASKED", steps="STEP_COUNT")
def always_ten_restarts(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    runs = [_run(model, x, y, norm, eps, steps, step_size, loss, generator) for _ in range(10)]
    return _best(runs, model, y, loss)


@mutant("pgd_lp", loss="LOSS_IGNORED")
def cross_entropy_whatever_is_asked(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    def fixed(logits, y):
        return torch.nn.functional.cross_entropy(logits, y, reduction="none")

    runs = [_run(model, x, y, norm, eps, steps, step_size, fixed, generator) for _ in range(restarts)]
    return _best(runs, model, y, fixed)


def _restarted(**changes):
    """PGD that is right but for one of its parts."""

    def attack(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
        runs = [
            _run(model, x, y, norm, eps, steps, step_size, loss, generator, **changes)
            for _ in range(restarts)
        ]
        return _best(runs, model, y, loss)

    return attack


@mutant("pgd_lp", l2="NOT_STEEPEST")
def sign_in_l2(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    def steepest(gradient, norm):
        return gradient.sign()

    return _restarted(steepest=steepest)(model, x, y, norm, eps, steps, step_size, restarts, loss, generator)


@mutant("pgd_lp", l2="WRONG_SIGN")
def descends_in_l2(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    def steepest(gradient, norm):
        return _steepest(gradient, norm) * (1 if norm == "Linf" else -1)

    return _restarted(steepest=steepest)(model, x, y, norm, eps, steps, step_size, restarts, loss, generator)


@mutant("pgd_lp", l2="LABEL_IGNORED")
def predicted_labels_in_l2(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    if norm == "L2":
        with attackable(model), torch.no_grad():
            y = model(x).argmax(1)
    return _restarted()(model, x, y, norm, eps, steps, step_size, restarts, loss, generator)


@mutant("pgd_lp", start="NO_RANDOM_START")
def start_at_the_image_in_l2(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    return _restarted(start=start_in_linf_alone)(
        model, x, y, norm, eps, steps, step_size, restarts, loss, generator
    )


@mutant("pgd_lp", start="NO_RANDOM_START", restarts="RESTARTS_WASTED")
def no_random_start(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    return _restarted(start=start_at_the_image)(
        model, x, y, norm, eps, steps, step_size, restarts, loss, generator
    )


@mutant("pgd_lp", ball="EPS_BALL_VIOLATED", l2="NOT_STEEPEST")
def linf_projection_in_l2(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    if norm == "Linf":
        return _restarted()(model, x, y, norm, eps, steps, step_size, restarts, loss, generator)
    points = _right_start(x, norm, eps, generator)
    for _ in range(steps):
        moved = points + step_size * _steepest(_gradient(model, points, y, loss)[0], norm)
        points = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
    return points


@mutant("pgd_lp", box="BOX_VIOLATED")
def no_box_in_l2(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    if norm == "Linf":
        return _restarted()(model, x, y, norm, eps, steps, step_size, restarts, loss, generator)
    points = x + _right_change(x, norm, eps, generator)
    for _ in range(steps):
        moved = points + step_size * _steepest(_gradient(model, points, y, loss)[0], norm)
        points = x + _within(moved - x, norm, eps)
    return points


@mutant("pgd_lp", steps="STEP_COUNT")
def one_step_short(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    return _restarted()(model, x, y, norm, eps, steps - 1, step_size, restarts, loss, generator)


@mutant("pgd_lp", closed_form="GRADIENT_ELSEWHERE", restarts="RESTARTS_WASTED")
def gradient_at_the_image(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    def once():
        points = _right_start(x, norm, eps, generator)
        for _ in range(steps):
            moved = points + step_size * _steepest(_gradient(model, x, y, loss)[0], norm)
            points = _right_projection(x, moved, norm, eps)
        return points

    return _best([once() for _ in range(restarts)], model, y, loss)


@mutant("pgd_lp", hygiene="MODE_NOT_RESTORED")
def leaves_eval_mode(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    model.eval()
    return _restarted()(model, x, y, norm, eps, steps, step_size, restarts, loss, generator)


@mutant("pgd_lp", hygiene="SEED_IGNORED")
def starts_from_the_global_state(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    return _restarted()(model, x, y, norm, eps, steps, step_size, restarts, loss, None)


@mutant("pgd_lp", everywhere="NO_EFFECT")
def image_returned(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    return x.clone()


@mutant("pgd_lp", everywhere="NOT_IMPLEMENTED")
def left_open(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    raise NotImplementedError
