"""Right answers in styles that are not ours: each must get full marks, or a contract is too narrow."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import hmac
import json
import math
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import robustkit.attacks
import robustkit.defences
import robustkit.device
import robustkit.evaluate
import robustkit.leaderboard
import robustkit.losses
import robustkit.results
import robustkit.wrappers
from robustkit.contracts.response import CANARY
from robustkit.device import attackable
from robustkit.results import Interval
from robustkit.threat import Ball
from tests import responders


@dataclass(frozen=True)
class Alternative:
    contract: str
    name: str
    subject: Any


ALTERNATIVES: list[Alternative] = []


def right(contract: str):
    def register(function):
        ALTERNATIVES.append(Alternative(contract, function.__name__, function))
        return function

    return register


@contextlib.contextmanager
def eval_mode(model):
    """What many write for themselves: eval, then back to the mode of the root."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def frozen(model):
    """For libraries that call .backward(): the weights must not collect gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        with eval_mode(model):
            yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)


@contextlib.contextmanager
def seeded_from(generator):
    """For libraries that draw from torch's global state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        yield


# --- FGSM --------------------------------------------------------------------------------------------


@right("fgsm")
def fgsm_of_robustkit(model, x, y, eps):
    return robustkit.attacks.fgsm(model, x, y, Ball("Linf", eps))


@right("fgsm")
def fgsm_with_func_grad(model, x, y, eps):
    with eval_mode(model):
        gradient = torch.func.grad(lambda x: F.cross_entropy(model(x), y))(x)
    return (x + eps * gradient.sign()).clamp(0, 1).detach()


@right("fgsm")
def fgsm_with_vjp(model, x, y, eps):
    with eval_mode(model):
        loss, pull_back = torch.func.vjp(lambda x: F.cross_entropy(model(x), y, reduction="none"), x)
        (gradient,) = pull_back(torch.ones_like(loss))
    return torch.clip(x + eps * torch.sign(gradient), min=0.0, max=1.0).detach()


@right("fgsm")
def fgsm_with_vmap(model, x, y, eps):
    def loss(image, label):
        return F.cross_entropy(model(image[None]), label[None])

    with eval_mode(model):
        gradients = torch.func.vmap(torch.func.grad(loss))(x, y)
    return (x + eps * gradients.sign()).clamp(0, 1).detach()


@right("fgsm")
def fgsm_with_backward(model, x, y, eps):
    with frozen(model):
        delta = torch.zeros_like(x, requires_grad=True)
        F.cross_entropy(model(x + delta), y).backward()
    candidates = x.clone()
    candidates += eps * delta.grad.sign()
    return candidates.clamp_(0, 1)


@right("fgsm")
def fgsm_through_numpy(model, x, y, eps):
    with eval_mode(model):
        images = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(images), y, reduction="sum"), images)
    candidates = np.clip(x.numpy() + eps * np.sign(gradient.numpy()), 0, 1)
    return torch.from_numpy(candidates.astype(np.float32))


@right("fgsm")
def fgsm_image_by_image(model, x, y, eps):
    candidates = []
    with eval_mode(model):
        for image, label in zip(x.split(1), y.split(1), strict=True):
            image = image.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(F.nll_loss(model(image).log_softmax(1), label), image)
            candidates.append(torch.min(torch.max(image + eps * gradient.sign(), 0 * image), 0 * image + 1))
    return torch.cat(candidates).detach()


@right("fgsm")
def fgsm_with_the_margin(model, x, y, eps):
    """Two classes: the margin rises in the same direction as cross-entropy."""
    with eval_mode(model), torch.enable_grad():
        images = x.detach().requires_grad_(True)
        logits = model(images)
        margin = logits.gather(1, 1 - y[:, None]) - logits.gather(1, y[:, None])
        gradient = torch.autograd.grad(margin.sum(), images)[0]
    return torch.where(gradient > 0, x + eps, torch.where(gradient < 0, x - eps, x)).clamp(0, 1)


@right("fgsm")
def fgsm_of_cleverhans(model, x, y, eps):
    attack = pytest.importorskip("cleverhans.torch.attacks.fast_gradient_method").fast_gradient_method
    with frozen(model):
        return attack(model, x, eps, np.inf, clip_min=0, clip_max=1, y=y).detach()


@right("fgsm")
def fgsm_of_foolbox(model, x, y, eps):
    foolbox = pytest.importorskip("foolbox")
    with frozen(model):
        attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        return attack.run(wrapped, x, foolbox.criteria.Misclassification(y), epsilon=eps)


# --- random-start FGSM -------------------------------------------------------------------------------


@right("rs_fgsm")
def rs_fgsm_of_robustkit(model, x, y, eps, generator):
    return robustkit.attacks.rs_fgsm(model, x, y, Ball("Linf", eps), generator=generator)


@right("rs_fgsm")
def rs_fgsm_in_the_style_of_the_paper(model, x, y, eps, generator):
    """delta is the variable, as in the authors' training script."""
    with frozen(model):
        delta = torch.empty_like(x).uniform_(-eps, eps, generator=generator).requires_grad_()
        F.cross_entropy(model(x + delta), y).backward()
        delta.data = torch.clamp(delta + 1.25 * eps * torch.sign(delta.grad), -eps, eps)
        delta.data = torch.max(torch.min(1 - x, delta.data), 0 - x)
    return x + delta.detach()


@right("rs_fgsm")
def rs_fgsm_with_func_grad(model, x, y, eps, generator):
    start = x + torch.empty_like(x).uniform_(-eps, eps, generator=generator)
    with eval_mode(model):
        gradient = torch.func.grad(lambda x: F.cross_entropy(model(x), y))(start).detach()
    stepped = start + 1.25 * eps * gradient.sign()
    return torch.minimum(torch.maximum(stepped, x - eps), x + eps).clamp(0, 1)


@right("rs_fgsm")
def rs_fgsm_from_numpy_noise(model, x, y, eps, generator):
    noise = np.random.default_rng(generator.initial_seed()).uniform(-eps, eps, x.shape).astype(np.float32)
    with eval_mode(model):
        start = (x + torch.from_numpy(noise)).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(start), y), start)
    stepped = start.detach().numpy() + np.float32(1.25 * eps) * np.sign(gradient.numpy())
    low, high = np.maximum(x.numpy() - np.float32(eps), 0), np.minimum(x.numpy() + np.float32(eps), 1)
    return torch.from_numpy(np.clip(stepped, low, high))


# --- PGD ---------------------------------------------------------------------------------------------


@right("pgd")
def pgd_of_robustkit(model, x, y, eps, steps, step_size, generator):
    ball = Ball("Linf", eps)
    return robustkit.attacks.pgd(model, x, y, ball, steps=steps, step_size=step_size, generator=generator)


@right("pgd")
def pgd_with_bounds_computed_once(model, x, y, eps, steps, step_size, generator):
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    points = x + torch.empty_like(x).uniform_(-eps, eps, generator=generator)
    with eval_mode(model):
        for _ in range(steps):
            gradient = torch.func.grad(lambda x: F.cross_entropy(model(x), y))(points).detach()
            points = torch.clamp(points + step_size * gradient.sign(), low, high)
    return points


@right("pgd")
def pgd_with_a_delta(model, x, y, eps, steps, step_size, generator):
    """delta.data and .grad.zero_(), as in many tutorials."""
    with frozen(model):
        delta = (2 * eps * torch.rand(x.shape, generator=generator) - eps).requires_grad_()
        for _ in range(steps):
            F.cross_entropy(model(x + delta), y, reduction="sum").backward()
            delta.data = (delta.data + step_size * delta.grad.sign()).clamp(-eps, eps)
            delta.data = (x + delta.data).clamp(0, 1) - x
            delta.grad.zero_()
    return (x + delta.detach()).clamp(0, 1)


@right("pgd")
def pgd_image_by_image(model, x, y, eps, steps, step_size, generator):
    starts = x + eps * (torch.rand(x.shape, generator=generator) * 2 - 1)
    done = torch.empty_like(x)
    with eval_mode(model):
        for i in range(len(x)):
            point = starts[i : i + 1].clamp(0, 1)
            for _ in range(steps):
                point = point.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), y[i : i + 1]), point)
                point = point.detach() + step_size * gradient.sign()
                point = torch.max(torch.min(point, x[i : i + 1] + eps), x[i : i + 1] - eps).clamp(0, 1)
            done[i] = point[0].detach()
    return done


@right("pgd")
def pgd_that_keeps_its_best_point(model, x, y, eps, steps, step_size, generator):
    points = (x + eps * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
    best, highest = points.clone(), torch.full((len(x),), -math.inf)
    with eval_mode(model):
        for step in range(steps + 1):
            points.requires_grad_()
            losses = F.cross_entropy(model(points), y, reduction="none")
            better = losses.detach() > highest
            best[better], highest[better] = points.detach()[better], losses.detach()[better]
            if step == steps:
                return best
            (gradient,) = torch.autograd.grad(losses.sum(), points)
            delta = points.detach() + step_size * gradient.sign() - x
            points = (x + delta.clamp(-eps, eps)).clamp(0, 1)
    return None


@right("pgd")
def pgd_of_cleverhans(model, x, y, eps, steps, step_size, generator):
    attack = pytest.importorskip("cleverhans.torch.attacks.projected_gradient_descent")
    with frozen(model), seeded_from(generator):
        return attack.projected_gradient_descent(
            model, x, eps, step_size, steps, np.inf, clip_min=0, clip_max=1, y=y, sanity_checks=False
        ).detach()


@right("pgd")
def pgd_of_foolbox(model, x, y, eps, steps, step_size, generator):
    foolbox = pytest.importorskip("foolbox")
    with frozen(model), seeded_from(generator):
        attack = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=steps, random_start=True)
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        return attack.run(wrapped, x, foolbox.criteria.Misclassification(y), epsilon=eps)


# --- adversarial loss --------------------------------------------------------------------------------


@right("adversarial_loss")
def loss_of_robustkit(model, x, y, eps):
    return robustkit.defences.fgsm_at(model, x, y, Ball("Linf", eps), torch.Generator())


@right("adversarial_loss")
def loss_as_mean_of_losses(model, x, y, eps):
    candidates = fgsm_with_func_grad(model, x, y, eps)
    return F.cross_entropy(model(candidates), y, reduction="none").mean()


@right("adversarial_loss")
def loss_from_log_probabilities(model, x, y, eps):
    candidates = fgsm_through_numpy(model, x, y, eps)
    model.train()
    return -model(candidates).log_softmax(1)[torch.arange(len(y)), y].sum() / len(y)


@right("adversarial_loss")
def loss_over_candidates_image_by_image(model, x, y, eps):
    return torch.nn.CrossEntropyLoss()(model(fgsm_image_by_image(model, x, y, eps)), y)


# --- lesson 3 -----------------------------------------------------------------------------------------


@right("training_step")
def step_of_the_reference(model, optimizer, x, y, attack):
    with attackable(model):
        candidates = attack(model, x, y)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(candidates), y)
    loss.backward()
    optimizer.step()
    return loss.item()


@right("training_step")
def step_with_modes_by_hand(model, optimizer, x, y, attack):
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = False
    candidates = attack(model, x, y).detach()
    for module, mode in modes.items():
        module.training = mode
    for parameter in model.parameters():
        parameter.grad = None
    loss = -model(candidates).log_softmax(1)[torch.arange(len(y)), y].mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@right("training_step")
def step_with_gradients_set(model, optimizer, x, y, attack):
    with robustkit.device.modes_kept(model):
        candidates = attack(model.eval(), x.clone(), y)
    loss = F.nll_loss(model(candidates).log_softmax(1), y)
    parameters = list(model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()
    return loss.detach().numpy()


@right("trades")
def trades_in_one_pass(model, x, candidates, y, beta):
    natural, attacked = model(torch.cat([x, candidates])).chunk(2)
    apart = F.kl_div(attacked.log_softmax(1), natural.softmax(1), reduction="batchmean")
    return F.cross_entropy(natural, y) + beta * apart


@right("trades")
def trades_by_its_formula(model, x, candidates, y, beta):
    p, q = model(x).softmax(1), model(candidates).softmax(1)
    apart = (p * (p / q).log()).sum(1)
    return (beta * apart - p[torch.arange(len(y)), y].log()).mean()


@right("trades")
def trades_with_distributions(model, x, candidates, y, beta):
    p, q = (torch.distributions.Categorical(logits=model(images)) for images in (x, candidates))
    return -p.log_prob(y).mean() + beta * torch.distributions.kl_divergence(p, q).mean()


@right("trades")
def trades_as_the_kit_has_it(model, x, candidates, y, beta):
    log_p, log_q = model(x).log_softmax(1), model(candidates).log_softmax(1)
    return F.nll_loss(log_p, y) + beta * F.kl_div(log_q, log_p, reduction="sum", log_target=True) / len(x)


@right("recipe_faults")
def faults_by_experiment(recipe, models, x, y):
    found = set()
    watched, modes = copy.deepcopy(models[0]).train(), []
    watched.register_forward_hook(lambda module, given, out: modes.append(module.training))
    points = recipe.attack(watched, x, y, torch.Generator().manual_seed(0))
    if True in modes:
        found.add("train_mode")
    if ((points < 0) | (points > 1)).any():
        found.add("outside")
    elif recipe.ball.size(points - x).max() > 1.01 * recipe.ball.eps:
        found.add("units")
    blind = copy.deepcopy(models[0])
    blind[-1].weight.data *= 0
    one, other = (recipe.attack(blind, x, y, torch.Generator().manual_seed(i)) for i in (5, 6))
    if (one == other).all():
        found.add("start")
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    if (recipe.augment(x, y, seeds[0]) != recipe.augment(x, y.flip(0), seeds[1])).any():
        found.add("leak")
    sets = recipe.trained_on, recipe.selected_by, recipe.reported_on
    if sum(map(len, sets)) > len(frozenset.union(*sets)):
        found.add("splits")
    mean = next(
        m for m in recipe.average(models, x).modules() if isinstance(m, torch.nn.BatchNorm1d)
    ).running_mean
    if (mean == models[0][1].running_mean).all():
        found.add("statistics")
    return sorted(found)


@right("recipe_faults")
def faults_from_batch_statistics(recipe, models, x, y):
    """Another witness of train mode: a pass in it moves BatchNorm's running mean."""
    model = copy.deepcopy(models[1]).train()
    before = model[1].running_mean.clone()
    points = recipe.attack(model, x, y, torch.Generator().manual_seed(1))
    outside = bool(points.min() < 0) or bool(points.max() > 1)
    flat = torch.nn.Sequential(*copy.deepcopy(models[1]), torch.nn.Linear(2, 2)).eval()
    flat[-1].weight.data.zero_()
    start = recipe.attack(flat, x, y, torch.Generator().manual_seed(1))
    again = recipe.attack(flat, x, y, torch.Generator().manual_seed(2))
    views = [recipe.augment(x, torch.full_like(y, i), torch.Generator().manual_seed(4)) for i in (0, 1)]
    average = recipe.average(models, x)
    tests = {
        "train_mode": not torch.equal(before, model[1].running_mean),
        "outside": outside,
        "units": not outside and not bool(recipe.ball.contains(x, points).all()),
        "start": torch.equal(start, again),
        "leak": not torch.equal(*views),
        "splits": not (
            recipe.trained_on.isdisjoint(recipe.selected_by)
            and recipe.trained_on.isdisjoint(recipe.reported_on)
            and recipe.selected_by.isdisjoint(recipe.reported_on)
        ),
        "statistics": torch.equal(average[1].running_mean, models[0][1].running_mean),
    }
    return [name for name, is_so in tests.items() if is_so]


@right("selection")
def chosen_by_sorting(history):
    ranked = sorted(history, key=lambda look: (look.held_out.share, look.epoch))
    best, last = ranked[-1], history[-1]
    return best.epoch, best.test, last.held_out.bounds[1] < best.held_out.bounds[0]


@right("selection")
def chosen_backwards(history):
    best = max(reversed(history), key=lambda look: look.held_out.k)
    return torch.tensor(best.epoch), best.test, np.bool_(best.held_out.low > history[-1].held_out.high)


@right("verdict")
def verdict_by_what_is_implied(figure, claim):
    """Whoever is right against more is right against less; whoever falls to less falls to more."""
    order = {"FGSM": 0, "PGD-20": 1, "PGD-50x10": 2, "AutoAttack": 3}
    if figure.more_data or figure.ball.norm != claim.ball.norm:
        return "other"
    pairs = (figure.ball.eps, claim.ball.eps), (order[figure.attack], order[claim.attack])
    if all(a >= b for a, b in pairs) and claim.share <= figure.robust.low:
        return "yes"
    return "no" if all(a <= b for a, b in pairs) and claim.share > figure.robust.high else "open"


# --- measures ----------------------------------------------------------------------------------------


@right("distance")
def distance_with_linalg(x, z, norm):
    order = {"Linf": torch.inf, "L2": 2}[norm]
    return torch.linalg.vector_norm(x - z, ord=order, dim=(1, 2, 3))


@right("distance")
def distance_with_numpy(x, z, norm):
    delta = np.abs(x.numpy().astype(float) - z.numpy()).reshape(len(x), -1)
    return delta.max(1) if norm == "Linf" else np.sqrt(np.square(delta).sum(1))


@right("distance")
def distance_in_a_list(x, z, norm):
    return [(a - b).norm(p=float("inf") if norm == "Linf" else 2).item() for a, b in zip(x, z, strict=True)]


@right("projection")
def project_with_min_and_max(x, candidate, eps):
    return torch.max(torch.min(candidate, (x + eps).clamp(max=1)), (x - eps).clamp(min=0))


@right("projection")
def project_box_first(x, candidate, eps):
    return torch.clamp(candidate.clamp(0, 1), x - eps, x + eps)


@right("projection")
def project_in_numpy(x, candidate, eps):
    return np.clip(np.clip(candidate.numpy(), x.numpy() - eps, x.numpy() + eps), 0, 1)


@right("robust_accuracy")
def robust_accuracy_in_a_loop(correct, fooled):
    survivors = sum(bool(c) and not any(map(bool, f)) for c, f in zip(correct, fooled.T, strict=True))
    return survivors / len(correct)


@right("robust_accuracy")
def robust_accuracy_with_products(correct, fooled):
    return (correct.float() * (1 - fooled.float()).prod(0)).mean()


@right("robust_accuracy")
def robust_accuracy_in_numpy(correct, fooled):
    return np.logical_and(correct.numpy(), ~fooled.numpy().any(axis=0)).mean()


@right("interval")
def wilson_of_scipy(k, n):
    return stats.binomtest(k, n).proportion_ci(method="wilson")


@right("interval")
def wilson_as_roots(k, n):
    """The bounds are the roots of (p - k/n)^2 = z^2 p (1 - p) / n."""
    p, c = k / n, stats.norm.ppf(0.975) ** 2 / n
    return sorted(np.roots([1 + c, -2 * p - c, p * p]).real.round(12))


@right("interval")
def wilson_as_tensor(k, n):
    p, z = torch.tensor(k / n, dtype=torch.float64), 1.96
    root = z * torch.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return torch.stack([p + z**2 / (2 * n) - root, p + z**2 / (2 * n) + root]) / (1 + z**2 / n)


@right("interval")
def wilson_as_array(k, n):
    z = 1.959964
    centre, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return np.array([max(centre - half, 0), min(centre + half, 1)])


@right("curve")
def curve_as_tensor(model, x, y, epsilons, attack):
    with torch.no_grad():
        alive = model(x).argmax(1).eq(y)
        return torch.stack([(alive & (model(attack(model, x, y, e)).argmax(1) == y)).sum() for e in epsilons])


@right("curve")
def curve_that_attacks_survivors_only(model, x, y, epsilons, attack):
    kept = model(x).argmax(1) == y
    return [int((model(attack(model, x[kept], y[kept], eps)).argmax(1) == y[kept]).sum()) for eps in epsilons]


@right("alarms")
def alarms_as_tuple(clean, fgsm, pgd):
    return tuple(
        name
        for name, raised in (("MASKED_GRADIENTS", fgsm - pgd > 0.2), ("LABEL_LEAKING", fgsm > clean + 0.01))
        if raised
    )


@right("alarms")
def alarms_in_points(clean, fgsm, pgd):
    found = {"LABEL_LEAKING"} if 100 * (fgsm - clean) >= 1 else set()
    return found | {"MASKED_GRADIENTS"} if round(100 * (fgsm - pgd), 6) > 20 else found


# --- smoothing ---------------------------------------------------------------------------------------


@right("votes")
def votes_in_batches(model, x, n, sigma, num_classes, generator):
    counts = torch.zeros(num_classes, dtype=torch.long)
    with eval_mode(model), torch.no_grad():
        for start in range(0, n, 512):
            noise = torch.randn((min(512, n - start), *x.shape), generator=generator)
            labels = model(x[None] + sigma * noise).argmax(1)
            counts += torch.bincount(labels, minlength=num_classes)
    return counts


@right("votes")
def votes_by_one_hot(model, x, n, sigma, num_classes, generator):
    batch = x.repeat(n, 1, 1, 1)
    with eval_mode(model), torch.inference_mode():
        logits = model(torch.normal(batch, sigma, generator=generator))
    return F.one_hot(logits.argmax(1), num_classes).sum(0).tolist()


@right("votes")
def votes_from_numpy_noise(model, x, n, sigma, num_classes, generator):
    random = np.random.default_rng(generator.initial_seed())
    noise = random.normal(0, sigma, (n, *x.shape)).astype(np.float32)
    with eval_mode(model):
        labels = model(x + torch.from_numpy(noise)).argmax(1).numpy()
    return np.array([(labels == label).sum() for label in range(num_classes)])


@right("lower_bound")
def lower_bound_of_scipy(k, n, alpha):
    return stats.binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low


@right("lower_bound")
def lower_bound_from_beta(k, n, alpha):
    return torch.tensor(0.0 if k == 0 else stats.beta.ppf(alpha, k, n - k + 1), dtype=torch.float64)


@right("lower_bound")
def lower_bound_by_bisection(k, n, alpha):
    """The share at which k or more successes have probability alpha."""
    low, high = 0.0, k / n
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if stats.binom.sf(k - 1, n, middle) < alpha else (low, middle)
    return low


@right("certified_radius")
def radius_of_scipy(p_lower, sigma):
    radius = sigma * stats.norm.ppf(p_lower)
    return radius if radius > 0 else None


@right("certified_radius")
def radius_of_torch(p_lower, sigma):
    if p_lower <= 0.5:
        return None
    return torch.distributions.Normal(0.0, sigma).icdf(torch.tensor(p_lower))


@right("certified_radius")
def radius_of_both_classes(p_lower, sigma):
    normal = statistics.NormalDist()
    gap = normal.inv_cdf(p_lower) - normal.inv_cdf(1 - p_lower)
    return sigma / 2 * gap if gap > 0 else None


@right("certify")
def certify_with_scipy(counts0, counts, sigma, alpha):
    label = counts0.argmax().item()
    k, n = counts[label].item(), counts.sum().item()
    return (label, sigma * stats.norm.ppf(p)) if (p := lower_bound_of_scipy(k, n, alpha)) > 0.5 else None


@right("certify")
def certify_with_tensors(counts0, counts, sigma, alpha):
    label = torch.argmax(counts0)
    radius = radius_of_torch(
        lower_bound_from_beta(int(counts[label]), int(counts.sum()), alpha).item(), sigma
    )
    return None if radius is None else [label, radius]


@right("certify")
def certify_when_both_samples_agree(counts0, counts, sigma, alpha):
    """A class that holds a majority of the second sample is its most frequent."""
    label = int(np.argmax(counts0.numpy()))
    if label != int(np.argmax(counts.numpy())):
        return None
    p = lower_bound_by_bisection(int(counts[label]), int(counts.numpy().sum()), alpha)
    return (np.int64(label), radius_of_both_classes(p, sigma)) if p > 0.5 else None


@right("certified_accuracy")
def certified_accuracy_in_a_loop(certificates, y, r):
    hits = 0
    for certificate, label in zip(certificates, y, strict=True):
        if certificate is not None and certificate[0] == label and certificate[1] >= r:
            hits += 1
    return hits / len(certificates)


@right("certified_accuracy")
def certified_accuracy_in_numpy(certificates, y, r):
    rows = np.array([(-1, -1.0) if c is None else c for c in certificates])
    return ((rows[:, 0] == y.numpy()) & (rows[:, 1] >= r)).mean()


@right("certified_accuracy")
def certified_accuracy_in_torch(certificates, y, r):
    labels = torch.tensor([-1 if c is None else c[0] for c in certificates])
    radii = torch.tensor([-torch.inf if c is None else c[1] for c in certificates])
    return (labels.eq(y) & radii.ge(r)).double().mean()


# --- a certification log -----------------------------------------------------------------------------


def _largest(sigma, n, alpha):
    return sigma * stats.norm.ppf(alpha ** (1 / n))


@right("certification_log")
def log_read_row_by_row(rows, sigma, n, alpha):
    radii = [certify_radius(k, n, alpha, sigma) for k in range(n // 2, n + 1)]
    faults, seen = {}, set()
    for i, (index, label, prediction, radius, correct) in enumerate(rows):
        if index in seen:
            faults[i] = "repeated"
        elif prediction == -1:
            if radius > 0 or correct:
                faults[i] = "abstained"
        elif correct != (prediction == label):
            faults[i] = "verdict"
        elif radius > _largest(sigma, n, alpha) + 1e-5:
            faults[i] = "bound"
        elif min(abs(radius - possible) for possible in radii) > 1e-5:
            faults[i] = "votes"
        seen.add(index)
    return faults


def certify_radius(k, n, alpha, sigma):
    return sigma * stats.norm.ppf(lower_bound_of_scipy(k, n, alpha))


@right("certification_log")
def log_read_backwards(rows, sigma, n, alpha):
    """From a radius to its share, and from the share to the votes that must be whole."""
    votes = np.arange(1, n + 1)
    bounds = stats.beta.ppf(alpha, votes, n - votes + 1)
    faults = {}
    for i in reversed(range(len(rows))):
        index, label, prediction, radius, correct = rows[i]
        share = stats.norm.cdf(radius / sigma)
        votes_needed = np.interp(share, bounds, votes)
        off = np.abs(sigma * stats.norm.ppf(bounds[round(votes_needed) - 1]) - radius)
        if prediction == -1 and (radius, correct) != (0.0, False):
            faults[np.int64(i)] = "abstained"
        elif prediction != -1 and (label == prediction) is not correct:
            faults[i] = "verdict"
        elif radius - 1e-5 > _largest(sigma, n, alpha):
            faults[i] = "bound"
        elif prediction != -1 and off > 1e-5:
            faults[i] = "votes"
        elif index in {row[0] for row in rows[:i]}:
            faults[i] = "repeated"
    return faults


@right("certification_log")
def log_read_by_columns(rows, sigma, n, alpha):
    index, label, prediction, radius, correct = (np.array(column) for column in zip(*rows, strict=True))
    k = np.arange(n // 2, n + 1)
    grid = sigma * stats.norm.ppf(stats.beta.ppf(alpha, k, n - k + 1))
    faults = dict.fromkeys(np.flatnonzero(np.abs(radius[:, None] - grid).min(1) > 1e-5), "votes")
    for i in np.flatnonzero(prediction == -1):
        faults.pop(i, None)
    faults |= dict.fromkeys(np.flatnonzero(radius > grid[-1] + 1e-5), "bound")
    faults |= dict.fromkeys(
        np.flatnonzero((prediction != -1) & (correct != (prediction == label))), "verdict"
    )
    faults |= dict.fromkeys(np.flatnonzero((prediction == -1) & ((radius != 0) | correct)), "abstained")
    later = set(range(len(rows))) - set(np.unique(index, return_index=True)[1])
    return faults | dict.fromkeys(later, "repeated")


# --- interval bounds ---------------------------------------------------------------------------------


@right("interval_linear")
def interval_by_centre_and_radius(weight, bias, lower, upper):
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    middle, spread = F.linear(centre, weight, bias), F.linear(radius, weight.abs())
    return middle - spread, middle + spread


@right("interval_linear")
def interval_by_signs(weight, bias, lower, upper):
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    return (
        lower @ positive.T + upper @ negative.T + bias,
        upper @ positive.T + lower @ negative.T + bias,
    )


@right("interval_linear")
def interval_term_by_term(weight, bias, lower, upper):
    a = weight.numpy()[None] * lower.numpy()[:, None]
    b = weight.numpy()[None] * upper.numpy()[:, None]
    return np.minimum(a, b).sum(2) + bias.numpy(), np.maximum(a, b).sum(2) + bias.numpy()


def _affine(layer, x, weight, bias):
    if isinstance(layer, torch.nn.Conv2d):
        return F.conv2d(x, weight, bias, layer.stride, layer.padding)
    return F.linear(x, weight, bias)


@right("ibp")
def ibp_by_centre_and_radius(model, x, eps):
    lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    for layer in model:
        if hasattr(layer, "weight"):
            middle = layer((lower + upper) / 2)
            spread = _affine(layer, (upper - lower) / 2, layer.weight.abs(), None)
            lower, upper = middle - spread, middle + spread
        else:
            lower, upper = layer(lower), layer(upper)
    return lower, upper


@right("ibp")
def ibp_by_signs(model, x, eps):
    lower, upper = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    with torch.no_grad():
        for layer in model.children():
            if not isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                lower, upper = layer(lower), layer(upper)
                continue
            positive, negative = F.relu(layer.weight), -F.relu(-layer.weight)
            lower, upper = (
                _affine(layer, lower, positive, layer.bias) + _affine(layer, upper, negative, None),
                _affine(layer, upper, positive, layer.bias) + _affine(layer, lower, negative, None),
            )
    return lower.numpy(), upper.numpy()


@right("ibp")
def ibp_through_matrices(model, x, eps):
    """Each affine layer as the matrix of its derivative, in float64 numpy."""
    sides = [np.clip(x.double().numpy() + shift, 0, 1) for shift in (-eps, eps)]
    for layer in copy.deepcopy(model).double():
        if hasattr(layer, "weight"):
            zero = torch.zeros(sides[0][:1].shape, dtype=torch.float64)
            at_zero = layer(zero)[0].detach().numpy()
            matrix = torch.autograd.functional.jacobian(layer, zero).reshape(at_zero.size, -1).numpy()
            lower, upper = (side.reshape(len(side), -1) for side in sides)
            low = lower @ np.maximum(matrix, 0).T + upper @ np.minimum(matrix, 0).T
            high = upper @ np.maximum(matrix, 0).T + lower @ np.minimum(matrix, 0).T
            sides = [side.reshape(len(x), *at_zero.shape) + at_zero for side in (low, high)]
        else:
            sides = [layer(torch.from_numpy(side)).numpy() for side in sides]
    return sides


# --- choosing a defence ------------------------------------------------------------------------------


def _changed(record):
    """Whether a certificate and an answer that it rules out are in the same record."""
    if record.certificate is None:
        return False
    label, radius = record.certificate
    answers = {record.clean} | ({record.attacked} if record.size < radius else set())
    return bool(answers - {label, None})


@right("sandwich")
def sandwich_in_a_loop(records, eps):
    clean, empirical, certified, impossible = 0, 0, 0, []
    for position, (label, untouched, attacked, _, certificate) in enumerate(records):
        if untouched == label:
            clean += 1
            empirical += attacked == label
        if certificate is not None and certificate[0] == label and not certificate[1] < eps:
            certified += 1
        if _changed(records[position]):
            impossible.append(position)
    return clean, empirical, certified, impossible


@right("sandwich")
def sandwich_in_numpy(records, eps):
    y, clean, attacked = (np.array([-1 if row[i] is None else row[i] for row in records]) for i in range(3))
    size = np.array([record.size for record in records])
    held = np.array([(-1, -1.0) if r.certificate is None else r.certificate for r in records])
    proved, radius = held[:, 0], held[:, 1]
    other = ((clean >= 0) & (clean != proved)) | ((attacked >= 0) & (attacked != proved) & (size < radius))
    counts = [
        (clean == y).sum(),
        ((clean == y) & (attacked == y)).sum(),
        ((proved == y) & (radius >= eps)).sum(),
    ]
    return (*counts, np.flatnonzero((proved >= 0) & other))


@right("sandwich")
def sandwich_by_comprehensions(records, eps):
    robust = [r for r in records if r.label == r.clean == r.attacked]
    proofs = [r for r in records if r.certificate and r.certificate[0] == r.label and r.certificate[1] >= eps]
    clean = torch.tensor([r.label == r.clean for r in records]).sum()
    return [clean, len(robust), len(proofs), {i for i, r in enumerate(records) if _changed(r)}]


@right("covers")
def covers_by_cases(claimed, needed, d):
    if claimed.norm == "L2" and needed.norm == "Linf":
        return claimed.eps >= needed.eps * math.sqrt(d)
    return claimed.eps >= needed.eps


@right("covers")
def covers_by_the_farthest_point(claimed, needed, d):
    """The corner of a box is its farthest point in L2; a point on an axis that of a round ball in Linf."""
    farthest = torch.full((1, d), needed.eps, dtype=torch.float64)
    if needed.norm == "L2":
        farthest[:, 1:] = 0
    return (claimed.size(farthest) <= claimed.eps + 1e-9).item()


@right("covers")
def covers_by_a_table(claimed, needed, d):
    stretch = {("Linf", "Linf"): 1, ("L2", "L2"): 1, ("Linf", "L2"): 1, ("L2", "Linf"): d**0.5}
    return needed.eps * stretch[claimed.norm, needed.norm] <= claimed.eps


def _paired_parts(a, b):
    return (a & ~b).sum().item(), (b & ~a).sum().item(), len(a)


@right("paired")
def paired_by_the_formula(a, b):
    only_a, only_b, n = _paired_parts(a, b)
    difference = (only_a - only_b) / n
    half = 1.96 * math.sqrt(only_a + only_b - (only_a - only_b) ** 2 / n) / n
    p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return difference, difference - half, difference + half, p


@right("paired")
def paired_by_bootstrap(a, b):
    step = a.numpy().astype(int) - b.numpy().astype(int)
    random = np.random.default_rng(0)
    means = step[random.integers(0, len(step), (5000, len(step)))].mean(1)
    only_a, only_b = int((step > 0).sum()), int((step < 0).sum())
    p = min(1.0, 2 * stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5))
    return step.mean(), *np.quantile(means, [0.025, 0.975]), p


@right("paired")
def paired_as_a_t_test_and_a_sum(a, b):
    step = a.double() - b.double()
    mean, error = step.mean(), step.std() / math.sqrt(len(step))
    only_a, only_b, _ = _paired_parts(a, b)
    m = only_a + only_b
    tail = sum(math.comb(m, k) for k in range(min(only_a, only_b) + 1)) / 2**m
    return [mean, mean - 1.96 * error, mean + 1.96 * error, min(1, 2 * tail)]


def _amortised(training, passes, per_pass, decisions):
    return training / decisions + passes * per_pass


def _first_whole(a, b):
    (train_a, run_a), (train_b, run_b) = a, b
    if run_a == run_b:
        return 0 if train_a <= train_b else None
    if run_a > run_b:
        return None
    return max(0, math.ceil((train_a - train_b) / (run_b - run_a)))


def _by_search(a, b):
    """Totals compared number by number, by doubling and halving."""
    if a[1] > b[1] or (a[1] == b[1] and a[0] > b[0]):
        return None
    high = 1
    while a[0] + high * a[1] > b[0] + high * b[1]:
        high *= 2
    low = -1
    while high - low > 1:
        middle = (low + high) // 2
        if a[0] + middle * a[1] <= b[0] + middle * b[1]:
            high = middle
        else:
            low = middle
    return high


def _in_torch(a, b):
    gap = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    if gap[1] > 0 or (gap[1] == 0 and gap[0] > 0):
        return None
    return 0 if gap[0] <= 0 else torch.ceil(gap[0] / -gap[1])


ALTERNATIVES += [
    Alternative("cost", "cost_by_the_formula", (_amortised, _first_whole)),
    Alternative("cost", "cost_by_search", (lambda t, p, s, m: (t + m * p * s) / m, _by_search)),
    Alternative(
        "cost",
        "cost_in_torch",
        (lambda t, p, s, m: torch.tensor(t / m + p * s, dtype=torch.float64), _in_torch),
    ),
]


def _route_by_cases(certificate, empirical, eps):
    match certificate:
        case (label, radius) if radius >= eps:
            return label, "certified"
        case (label, _) if label == empirical:
            return empirical, "checked"
    return None, "review"


def _route_with_a_default(certificate, empirical, eps):
    label, radius = certificate or (None, -1.0)
    if label is not None and not radius < eps:
        return torch.tensor(label), "certified"
    agreed = label is not None and label == empirical
    return (label if agreed else None), ("checked" if agreed else "review")


def _route_by_table(certificate, empirical, eps):
    proved = certificate is not None and certificate[1] >= eps
    agreed = certificate is not None and certificate[0] == empirical
    lane = "certified" if proved else "checked" if agreed else "review"
    return {"certified": certificate and certificate[0], "checked": empirical, "review": None}[lane], lane


def _guaranteed_in_a_loop(certificates, y, eps):
    count = 0
    for certificate, label in zip(certificates, y, strict=True):
        # What is left of the radius after the attacker has moved the image by eps.
        if certificate is not None and certificate[0] == label and certificate[1] - eps >= eps:
            count += 1
    return count


def _guaranteed_in_torch(certificates, y, eps):
    labels = torch.tensor([-1 if c is None else c[0] for c in certificates])
    radii = torch.tensor([0.0 if c is None else c[1] for c in certificates], dtype=torch.float64)
    return ((labels == y) & (radii >= 2 * eps)).sum()


ALTERNATIVES += [
    Alternative("route", "route_by_cases", (_route_by_cases, _guaranteed_in_a_loop)),
    Alternative("route", "route_with_a_default", (_route_with_a_default, _guaranteed_in_torch)),
    Alternative("route", "route_by_table", (_route_by_table, _guaranteed_in_a_loop)),
]


@right("admissible")
def admissible_in_a_loop(need, offers, d):
    names = []
    for offer in offers:
        if offer.seconds > need.seconds or offer.clean.low < need.clean:
            continue
        for claim in offer.claims:
            if need.guarantee and claim.kind != "certified":
                continue
            if covers_by_cases(claim.ball, need.ball, d) and claim.share.low >= need.robust:
                names.append(offer.name)
                break
    return names


@right("admissible")
def admissible_in_one_norm(need, offers, d):
    """Stricter than it need be: a claim in another norm never counts."""
    kinds = {"certified"} if need.guarantee else {"certified", "empirical"}
    return {
        name
        for name, clean, claims, seconds in offers
        if clean.low >= need.clean
        and seconds <= need.seconds
        and any(
            kind in kinds
            and ball.norm == need.ball.norm
            and ball.eps >= need.ball.eps
            and share.low >= need.robust
            for kind, ball, share in claims
        )
    }


@right("admissible")
def admissible_by_filters(need, offers, d):
    def robust(offer):
        lows = [
            claim.share.low
            for claim in offer.claims
            if covers_by_a_table(claim.ball, need.ball, d)
            and (claim.kind == "certified" or not need.guarantee)
        ]
        return max(lows, default=0.0)

    fast = filter(lambda offer: offer.seconds <= need.seconds, offers)
    return tuple(o.name for o in fast if o.clean.low >= need.clean and robust(o) >= need.robust)


# --- lesson 8: forgeries, numbers, seeds, graders ------------------------------------------------------


@right("grader_forgery")
def forged_in_numpy(question):
    x = np.array(question["x"])
    n = len(x)
    return {
        "verdict": {"candidates": x, "fooled": np.ones(n, dtype=bool)},
        "nan": {"candidates": np.full(x.shape, np.nan), "fooled": [1] * n},
        "few": {"candidates": x[:2], "fooled": [True] * 2},
        "crash": "no dictionary",
    }


@right("grader_forgery")
def forged_by_cutting_pixels(question):
    x = question["x"]
    spoiled = [list(row) for row in x]
    for row in spoiled:
        row[0] = float("nan")
    return {
        "verdict": {"candidates": [[p + 0.1 for p in row] for row in x], "fooled": ["yes"] * len(x)},
        "nan": {"candidates": spoiled, "fooled": [True] * len(x)},
        "few": {"candidates": [[] for _ in x], "fooled": [True] * len(x)},
        "crash": {"candidates": [], "fooled": []},
    }


@right("grader_forgery")
def forged_with_words(question):
    n = len(question["x"])
    return {
        "crash": {"candidates": [["x"]], "fooled": [True]},
        "few": {"candidates": question["x"], "fooled": [True]},
        "nan": {"candidates": [[math.nan] * 4 for _ in range(n)], "fooled": [True] * n},
        "verdict": {"candidates": question["x"], "fooled": [2] * n},
    }


@right("grader_number")
def number_by_exact_type(value, maximum):
    if type(value) is not int and type(value) is not float:
        return 0.0
    return float(value) if 0 <= value <= maximum else 0.0


@right("grader_number")
def number_refused_early(value, maximum):
    if isinstance(value, bool) or value.__class__ not in {int, float}:
        return 0
    if value != value or value < 0 or value > maximum:
        return 0
    return value


@right("grader_number")
def number_by_isfinite(value, maximum):
    try:
        number = float(value) if type(value) in (float, int) else math.nan
    except OverflowError:
        return np.float64(0)
    return np.float64(number) if math.isfinite(number) and 0.0 <= number <= maximum else np.float64(0)


@right("grader_seeds")
def seed_of_json(secret, student, exercise):
    message = json.dumps({"student": student, "exercise": exercise}).encode()
    return int.from_bytes(hmac.new(secret, message, hashlib.sha256).digest()[:7], "little")


@right("grader_seeds")
def seed_with_lengths(secret, student, exercise):
    parts = [part.encode() for part in (student, exercise)]
    message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return int(hmac.digest(secret, message, "sha512").hex()[:15], 16)


@right("grader_seeds")
def seed_in_two_steps(secret, student, exercise):
    of_student = hashlib.blake2b(student.encode(), key=secret).digest()
    digest = hashlib.blake2b(exercise.encode(), key=of_student, digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**63


@right("grader")
def grader_in_loops(question, evidence):
    try:
        rows = [[float(pixel) for pixel in row] for row in evidence["candidates"]]
        if [len(row) for row in rows] != [len(row) for row in question["x"]]:
            return 0.0
        if not all(math.isfinite(pixel) for row in rows for pixel in row):
            return 0.0
    except Exception:
        return 0.0
    earned = 0
    for x, z, y in zip(question["x"], rows, question["y"], strict=True):
        score = sum(w * pixel for w, pixel in zip(question["w"], z, strict=True)) + question["b"]
        near = all(abs(after - before) <= question["eps"] for before, after in zip(x, z, strict=True))
        earned += near and (score > 0) != bool(y)
    return 4.0 * earned / len(rows)


@right("grader")
def grader_in_torch(question, evidence):
    x = torch.tensor(question["x"], dtype=torch.float64)
    try:
        z = torch.tensor(evidence["candidates"], dtype=torch.float64)
    except Exception:
        return 0.0
    if z.shape != x.shape or not bool(torch.isfinite(z).all()):
        return 0.0
    labels = (z @ torch.tensor(question["w"], dtype=torch.float64) + question["b"] > 0).long()
    fooled = (labels != torch.tensor(question["y"])) & ((z - x).abs().amax(1) <= question["eps"])
    return 4 * fooled.double().mean().item()


@right("grader")
def grader_that_fails_closed_around_everything(question, evidence):
    try:
        z = np.asarray(evidence["candidates"], dtype=np.float64)
        x, w, y = (np.asarray(question[key]) for key in "xwy")
        if (z - x).shape != z.shape or len(z) != len(x) or np.isnan(z.sum()) or np.isinf(z).any():
            return 0.0
        near = np.abs(z - x).max(axis=1) <= question["eps"] * (1 + 1e-6)
        return float(4 * np.mean(near & ((z @ w + question["b"] > 0) != y)))
    except Exception:
        return 0.0


# --- PGD in two norms, part by part ---------------------------------------------------------------------


@right("ball_projection")
def projection_of_the_ball(x, candidate, norm, eps):
    return Ball(norm, eps).candidates(x, candidate - x)


@right("ball_projection")
def projection_in_numpy(x, candidate, norm, eps):
    low, delta = x.numpy(), (candidate - x).numpy()
    if norm == "Linf":
        return np.clip(np.clip(candidate.numpy(), low - eps, low + eps), 0, 1)
    for one in delta:
        one *= min(1.0, eps / max(np.sqrt((one**2).sum()), 1e-9))
    return np.clip(low + delta, 0, 1)


@right("ball_projection")
def projection_with_where(x, candidate, norm, eps):
    delta = candidate - x
    size = delta.flatten(1).norm(p=2 if norm == "L2" else math.inf, dim=1)[:, None, None, None]
    if norm == "L2":
        nearest = torch.where(size > eps, eps * delta / (size + 1e-12), delta)
    else:
        nearest = torch.minimum(torch.maximum(delta, torch.tensor(-eps)), torch.tensor(eps))
    return torch.clip(x + nearest, 0, 1)


@right("ball_projection")
def projection_by_renorm(x, candidate, norm, eps):
    """In the other order for Linf: where each coordinate is alone, it does not matter."""
    if norm == "Linf":
        return candidate.clamp(0, 1).clamp(x - eps, x + eps)
    flat = torch.renorm((candidate - x).flatten(1), 2, 0, eps)
    return (x + flat.view_as(x)).clamp(0, 1)


@right("ball_projection")
def projection_onto_both_at_once(x, candidate, norm, eps):
    """In L2 the nearest point of ball and box: shrink by a factor found by bisection, then cut."""
    if norm == "Linf":
        return candidate.clamp(x - eps, x + eps).clamp(0, 1)
    low, high = torch.zeros(len(x), 1, 1, 1), torch.ones(len(x), 1, 1, 1)

    def cut(share):
        return (x + share * (candidate - x)).clamp(0, 1)

    if_inside = (cut(high) - x).flatten(1).norm(dim=1) <= eps
    for _ in range(60):
        middle = (low + high) / 2
        fits = ((cut(middle) - x).flatten(1).norm(dim=1) <= eps)[:, None, None, None]
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return torch.where(if_inside[:, None, None, None], cut(torch.ones(1)), cut(low))


@right("random_start")
def start_of_the_ball(x, norm, eps, generator):
    ball = Ball(norm, eps)
    return ball.candidates(x, ball.random(x, generator))


@right("random_start")
def start_from_exponentials(x, norm, eps, generator):
    """A ball in d dimensions is the shadow of a sphere in d + 2."""
    if norm == "Linf":
        return (x + torch.empty_like(x).uniform_(-eps, eps, generator=generator)).clamp(0, 1)
    normal = torch.randn(len(x), x[0].numel() + 2, generator=generator)
    inside = (normal / normal.norm(dim=1, keepdim=True))[:, :-2]
    return (x + eps * inside.view_as(x)).clamp(0, 1)


@right("random_start")
def start_by_rejection(x, norm, eps, generator):
    """Draw from the cube until the ball is hit: fine in four dimensions."""
    draws = eps * (2 * torch.rand(x.shape, generator=generator) - 1)
    while norm == "L2" and (outside := draws.flatten(1).norm(dim=1) > eps).any():
        draws[outside] = eps * (2 * torch.rand(draws[outside].shape, generator=generator) - 1)
    return (x + draws).clamp(0, 1)


@right("random_start")
def start_from_numpy(x, norm, eps, generator):
    rng = np.random.default_rng(generator.initial_seed())
    d = x[0].numel()
    if norm == "Linf":
        change = rng.uniform(-eps, eps, (len(x), d))
    else:
        direction = rng.standard_normal((len(x), d))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        change = eps * direction * rng.random((len(x), 1)) ** (1 / d)
    return (x + torch.from_numpy(change.astype(np.float32)).view_as(x)).clamp(0, 1)


@right("pgd_lp")
def pgd_lp_of_robustkit(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    options = {"steps": steps, "step_size": step_size, "restarts": restarts}
    return robustkit.attacks.pgd(model, x, y, Ball(norm, eps), loss=loss, generator=generator, **options)


@right("pgd_lp")
def pgd_lp_early_stopped(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    """The kit's other one would stop at a success; here the best loss is kept along the way."""
    ball, best = Ball(norm, eps), x.clone()
    highest = torch.full((len(x),), -math.inf)
    with frozen(model):
        for _ in range(restarts):
            points = ball.candidates(x, ball.random(x, generator))
            for _ in range(steps):
                points = points.detach().requires_grad_()
                loss(model(points), y).sum().backward()
                moved = points.detach() + step_size * ball.steepest(points.grad) - x
                points = ball.candidates(x, moved)
            losses = loss(model(points), y)
            better = losses > highest
            best[better], highest[better] = points[better], losses[better]
    return best


@right("pgd_lp")
def pgd_lp_restart_only_what_resists(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    found = x.clone()
    with eval_mode(model):
        for i in range(restarts):
            with torch.no_grad():
                left = (model(found).argmax(1) == y).nonzero()[:, 0] if i else torch.arange(len(x))
            if len(left) == 0:
                break
            clean, labels = x[left], y[left]
            delta = Ball(norm, eps).random(clean, generator)
            for _ in range(steps):
                points = (clean + delta).clamp(0, 1).requires_grad_()
                (gradient,) = torch.autograd.grad(loss(model(points), labels).mean(), points)
                flat = gradient.flatten(1)
                if norm == "Linf":
                    step, bound = flat.sign(), None
                else:
                    step, bound = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-20), eps
                delta = points.detach() - clean + step_size * step.view_as(clean)
                if bound is None:
                    delta = delta.clamp(-eps, eps)
                else:
                    delta = torch.renorm(delta.flatten(1), 2, 0, bound).view_as(clean)
            found[left] = (clean + delta).clamp(0, 1)
    return found


@right("pgd_lp")
def pgd_lp_with_all_restarts_at_once(model, x, y, norm, eps, steps, step_size, restarts, loss, generator):
    ball, n = Ball(norm, eps), len(x)
    many, labels = x.repeat(restarts, 1, 1, 1), y.repeat(restarts)
    points = ball.candidates(many, ball.random(many, generator))
    with eval_mode(model):
        for _ in range(steps):
            gradient = torch.func.grad(lambda p: loss(model(p), labels).sum())(points).detach()
            points = ball.candidates(many, points - many + step_size * ball.steepest(gradient))
        with torch.no_grad():
            losses = loss(model(points), labels).view(restarts, n)
    return points.view(restarts, n, *x.shape[1:])[losses.argmax(0), torch.arange(n)]


# --- evaluation -------------------------------------------------------------------------------------------


@right("margin")
def margin_of_robustkit(logits, y):
    return robustkit.losses.margin(logits, y)


@right("margin")
def margin_by_masking(logits, y):
    is_true = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(is_true, -math.inf).max(1).values - logits[is_true]


@right("margin")
def margin_of_the_two_largest(logits, y):
    first, second = logits.topk(2, dim=1).values.unbind(1)
    true = logits[torch.arange(len(y)), y]
    return torch.where(logits.argmax(1) == y, second, first) - true


@right("margin")
def margin_of_log_probabilities(logits, y):
    """The normaliser cancels."""
    return robustkit.losses.margin(logits.double().log_softmax(1), y)


@right("margin")
def margin_example_by_example(logits, y):
    margins = []
    for row, label in zip(logits, y.tolist(), strict=True):
        margins.append(torch.cat([row[:label], row[label + 1 :]]).max() - row[label])
    return torch.stack(margins)


@right("worst_case")
def worst_case_with_the_ball(model, x, y, candidates, norm, eps):
    survives = robustkit.evaluate.predict(model, x, y)
    for candidate in candidates:
        image = ((candidate >= 0) & (candidate <= 1)).flatten(1).all(1)
        counts = Ball(norm, eps).contains(x, candidate) & image
        survives &= robustkit.evaluate.predict(model, candidate, y) | ~counts
    return survives


@right("worst_case")
def worst_case_in_numpy(model, x, y, candidates, norm, eps):
    def right(batch):
        with torch.no_grad():
            return (model(batch).argmax(1) == y).numpy()

    broken = np.zeros(len(x), dtype=bool)
    for candidate in candidates:
        change = (candidate - x).flatten(1).double().numpy()
        size = np.linalg.norm(change, ord=np.inf if norm == "Linf" else 2, axis=1)
        flat = candidate.flatten(1).numpy()
        broken |= ~right(candidate) & (size < eps + 1e-4) & (flat.min(1) >= 0) & (flat.max(1) <= 1)
    return right(x) & ~broken


@right("worst_case")
def worst_case_image_by_image(model, x, y, candidates, norm, eps):
    def fooled(image, label):
        with torch.no_grad():
            return model(image[None]).argmax(1).item() != label

    def allowed(image, candidate):
        change = (candidate - image).flatten()
        size = change.abs().max() if norm == "Linf" else change.pow(2).sum().sqrt()
        return size <= eps * 1.0001 and candidate.min() >= 0 and candidate.max() <= 1

    verdicts = []
    for i, label in enumerate(y.tolist()):
        tries = [x[i], *(candidate[i] for candidate in candidates if allowed(x[i], candidate[i]))]
        verdicts.append(not any(fooled(image, label) for image in tries))
    return verdicts


@right("worst_case")
def worst_case_by_replacing_what_is_not_allowed(model, x, y, candidates, norm, eps):
    stacked = torch.stack([x, *candidates])
    change = (stacked - x).flatten(2)
    size = change.abs().amax(2) if norm == "Linf" else change.norm(dim=2)
    allowed = (size <= eps + 1e-5) & (stacked.flatten(2).amin(2) >= 0) & (stacked.flatten(2).amax(2) <= 1)
    stacked = torch.where(allowed[..., None, None, None], stacked, x)
    with torch.no_grad():
        answers = model(stacked.flatten(0, 1)).argmax(1).view(len(stacked), len(x))
    return (answers == y).all(0).int()


@right("standing")
def standing_of_the_kit(k, n, entries):
    fair = [entry for entry in entries if not (entry.extra_data or entry.synthetic)]
    placed = robustkit.leaderboard.place(robustkit.results.Interval(k, n), fair)
    return placed.best, placed.rank, placed.worst


@right("standing")
def standing_by_bisection(k, n, entries):
    scores = np.sort([-e.robust for e in entries if not e.extra_data and not e.synthetic])
    share = robustkit.results.Interval(k, n)
    return [int(np.searchsorted(scores, -100 * s)) + 1 for s in (share.high, share.share, share.low)]


@right("standing")
def standing_with_a_wilson_interval_of_its_own(k, n, entries):
    fair = [entry.robust / 100 for entry in entries if not entry.synthetic if not entry.extra_data]
    bounds = stats.binomtest(k, n).proportion_ci(method="wilson")
    return tuple(sum(r > share for r in fair) + 1 for share in (bounds.high, k / n, bounds.low))


# --- masking ----------------------------------------------------------------------------------------------


def _input_gradient(model, x, y, loss):
    x = x.clone().requires_grad_(True)
    with eval_mode(model):
        return torch.autograd.grad(loss(model(x), y).sum(), x)[0]


@right("diagnosis")
def diagnosis_by_gradients(model, x, y):
    with torch.no_grad():
        if (model(x) != model(x)).any():
            return "random"
    if not _input_gradient(model, x, y, robustkit.losses.margin).any():
        return "shattered"
    flat = _input_gradient(model, x, y, robustkit.losses.cross_entropy).flatten(1)
    with torch.no_grad():
        flat = flat[model(x).argmax(1) == y]
    return "saturated" if (flat.abs().amax(1) < 1e-12).float().mean() > 0.5 else "honest"


@right("diagnosis")
def diagnosis_by_small_changes(model, x, y):
    """A staircase answers a tiny change as if there were none; a saturated softmax is exactly one."""
    with torch.no_grad():
        logits = model(x)
        if len({model(x)[0, 0].item() for _ in range(3)}) > 1:
            return "random"
        same = (model(x + 1e-5) == logits).all(1).float().mean()
        sure = (logits.softmax(1).amax(1) == 1).float().mean()
    if same > 0.3:
        return "shattered"
    return "saturated" if sure > 0.5 else "honest"


@right("diagnosis")
def diagnosis_by_the_share_of_zeros(model, x, y):
    answers = [model(x).detach() for _ in range(2)]
    if not torch.allclose(*answers, rtol=1e-6, atol=1e-6):
        return "random"
    right = answers[0].argmax(1) == y
    gradients = {
        name: _input_gradient(model, x, y, getattr(robustkit.losses, name))[right].flatten(1)
        for name in ("margin", "cross_entropy")
    }
    zero = {name: (gradient == 0).all(1).float().mean() for name, gradient in gradients.items()}
    if zero["margin"] > 0.9:
        return "shattered"
    return "saturated" if zero["cross_entropy"] > 0.5 else "honest"


@right("eot")
def eot_of_robustkit(model, draws):
    return robustkit.wrappers.EOT(model, draws)


@right("eot")
def eot_in_one_large_batch(model, draws):
    def mean(x):
        return model(x.repeat_interleave(draws, 0)).view(len(x), draws, -1).mean(1)

    return mean


@right("eot")
def eot_with_a_running_sum(model, draws):
    def mean(x):
        total = model(x)
        for _ in range(draws - 1):
            total = total + model(x)
        return total / draws

    return mean


@right("bpda")
def bpda_of_robustkit(part, model):
    return torch.nn.Sequential(robustkit.wrappers.BPDA(part), model)


@right("bpda")
def bpda_by_adding_what_the_part_changes(part, model):
    return lambda x: model(x + (part(x) - x).detach())


@right("bpda")
def bpda_with_a_function_of_its_own(part, model):
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return part(x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    return lambda x: model(Straight.apply(x))


@right("bpda")
def bpda_with_a_hook(part, model):
    def through(x):
        passed = part(x.detach())
        return model(x - x.detach() + passed)

    return through


# --- lesson 7: triage, the gate, the response ---------------------------------------------------------


@right("residual")
def residual_in_numpy(query, benign):
    apart = (benign.astype(float) - query) / 255
    nearest = int(np.argmin((apart**2).sum((1, 2, 3))))
    delta = np.abs(apart[nearest])
    return nearest, (delta.max(2) > 0).mean(), np.sqrt((delta**2).sum()), delta.max()


@right("residual")
def residual_in_torch(query, benign):
    apart = (torch.from_numpy(benign).double() - torch.from_numpy(query).double()).div(255)
    lengths = apart.flatten(1).norm(dim=1)
    delta = apart[lengths.argmin()]
    return lengths.argmin(), delta.ne(0).any(2).double().mean(), lengths.min(), delta.abs().max()


@right("residual")
def residual_in_loops(query, benign):
    best = (0, 0.0, math.inf, 0.0)
    for i, picture in enumerate(benign.tolist()):
        pixels = [
            [abs(a - b) / 255 for a, b in zip(one, other, strict=True)]
            for line, row in zip(query.tolist(), picture, strict=True)
            for one, other in zip(line, row, strict=True)
        ]
        length = math.sqrt(sum(value**2 for pixel in pixels for value in pixel))
        if length < best[2]:
            best = (i, sum(max(p) > 0 for p in pixels) / len(pixels), length, max(map(max, pixels)))
    return best


@right("register")
def register_in_one_batch(query, reference, threat):
    lattice = threat.transforms()
    turned = threat.transformed(reference.expand(len(lattice), *reference.shape), lattice)
    return tuple(lattice[(turned - query).flatten(1).norm(dim=1).argmin()].tolist())


@right("register")
def register_one_by_one(query, reference, threat):
    def distance(row):
        return float((threat.transformed(reference[None], row[None])[0] - query).abs().sum())

    return min(threat.transforms(), key=distance)


@right("register")
def register_from_the_identity(query, reference, threat):
    best, least = (0.0, 0.0, 0.0), float((reference - query).square().sum())
    for rows in threat.transforms().split(100):
        found = threat.transformed(reference.repeat(len(rows), 1, 1, 1), rows)
        errors = (found - query).square().sum((1, 2, 3))
        if float(errors.min()) < least:
            best, least = tuple(rows[errors.argmin()].numpy()), float(errors.min())
    return best


@right("family")
def family_by_rules(m):
    if m.linf <= 1.5 / 255:
        return "repeated"
    if m.window <= 0.5:
        return "patch"
    if m.explained >= 0.6 and m.ratio <= 0.5:
        return "rotation-translation"
    if m.bound <= 0.6 or (m.ratio <= 0.75 and m.explained < 0.6):
        return "query sequence" if m.queries >= 5 else "lp"
    return "unrelated"


@right("family")
def family_by_what_is_left(m):
    near = m.bound < 0.5 or m.ratio < 0.7
    if m.linf < 2 / 255:
        return "repeated"
    if not near and m.window > 0.6:
        return "unrelated"
    noise = "lp" if m.queries < 5 else "query sequence"
    return "patch" if m.window < 0.6 else "rotation-translation" if m.explained > 0.5 else noise


@right("family")
def family_by_table(m):
    table = {
        "repeated": m.linf < 0.005,
        "patch": m.window < 0.4,
        "rotation-translation": m.explained > 0.87,
        "query sequence": m.queries > 4 and (m.bound < 0.5 or m.ratio < 0.8),
        "lp": m.bound < 0.5 or m.ratio < 0.8,
    }
    return next((name for name, holds in table.items() if holds), "unrelated")


@right("cause")
def cause_by_both_ends(votes, outside):
    if outside is None or votes.low <= 0.5:
        return "undecided"
    if outside.low > 0.5:
        return "novel family"
    return "overfitted" if outside.high < 0.5 else "undecided"


@right("cause")
def cause_by_bounds(votes, outside):
    low, high = outside.bounds if outside else (0.0, 1.0)
    if min(votes.bounds) > 0.5 and not low <= 0.5 <= high:
        return ("overfitted", "novel family")[low > 0.5]
    return "undecided"


@right("cause")
def cause_by_formula(votes, outside):
    def ends(k, n, z=1.96):
        centre, spread = (
            (k + z * z / 2) / (n + z * z),
            z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z),
        )
        return centre - spread, centre + spread

    verdict = "undecided"
    if outside is not None and ends(votes.k, votes.n)[0] > 1 / 2:
        low, high = ends(outside.k, outside.n)
        verdict = "novel family" if low > 1 / 2 else "overfitted" if high < 1 / 2 else verdict
    return verdict


@right("mixed")
def mixed_by_parts(model, x, y, attacks, generator):
    untouched, *parts = torch.arange(len(x)).tensor_split(len(attacks) + 1)
    met = [attack(model, x[rows], y[rows], generator) for attack, rows in zip(attacks, parts, strict=True)]
    return F.cross_entropy(model(torch.cat([x[untouched], *met])), y)


@right("mixed")
def mixed_in_turn(model, x, y, attacks, generator):
    candidates = x.clone()
    for number, attack in enumerate(attacks, 1):
        rows = slice(number, None, len(attacks) + 1)
        candidates[rows] = attack(model, x[rows], y[rows], generator)
    return F.cross_entropy(model(candidates), y)


@right("mixed")
def mixed_at_random_in_passes(model, x, y, attacks, generator):
    parts = torch.randperm(len(x), generator=generator).tensor_split(len(attacks) + 1)
    total = F.cross_entropy(model(x[parts[0]]), y[parts[0]], reduction="sum")
    for attack, rows in zip(attacks, parts[1:], strict=True):
        candidates = attack(model, x[rows], y[rows], generator)
        total = total + F.cross_entropy(model(candidates), y[rows], reduction="sum")
    return total / len(x)


@right("incident_gate")
def gate_in_numpy(clean, trained, held_out, adaptive, floors):
    worst = np.logical_and.reduce(list(trained.values()))
    kept = {"clean": clean, "worst": worst, "held_out": held_out}
    kept["adaptive"] = None if adaptive is None else worst & adaptive
    return [
        bar
        for bar, array in kept.items()
        if array is None or Interval(int(array.sum()), len(array)).low < floors[bar]
    ]


@right("incident_gate")
def gate_image_by_image(clean, trained, held_out, adaptive, floors):
    n, failed = len(clean), set()

    def look(bar, *records):
        if any(record is None for record in records):
            failed.add(bar)
            return
        survived = sum(all(record[i] for record in records) for i in range(n))
        if not Interval(survived, n).low >= floors[bar]:
            failed.add(bar)

    look("clean", clean)
    look("worst", *trained.values())
    look("held_out", held_out)
    look("adaptive", *trained.values(), adaptive)
    return failed


@right("incident_gate")
def gate_by_exclusion(clean, trained, held_out, adaptive, floors):
    failed = dict.fromkeys(floors, True)
    broken = sum((~kept).astype(int) for kept in trained.values()) > 0
    measured = {"clean": clean, "worst": ~broken}
    if held_out is not None:
        measured["held_out"] = held_out
    if adaptive is not None:
        measured["adaptive"] = ~(broken | ~adaptive)
    for bar, kept in measured.items():
        failed[bar] = bool(floors[bar] > Interval(int(np.count_nonzero(kept)), kept.size).bounds[0])
    return tuple(bar for bar in failed if failed[bar])


right("response")(responders.perfect)


@right("response")
def response_that_waits_and_learns(report, memory):
    """Two bad minutes before it contains; begins with two families, and adds one when the gate stops them."""
    actions, bad = [], report.audit.high < 0.9
    memory["bad"] = memory.get("bad", 0) + bad if bad else 0
    rates = memory.setdefault("rates", {})
    for account, k in report.flagged.items():
        rates.setdefault(account, []).append(k)
    if report.state == "normal" and memory["bad"] >= 1 and "over" not in memory:
        actions.append(("suspect",))
    if report.state == "suspect":
        actions.append(("contain",) if memory["bad"] >= 2 else ("stand down",))
        actions.append(("snapshot",))
    if report.state != "contain":
        if report.state == "recover" and report.minute - memory["canary"] >= 12:
            actions.append(("promote", memory["number"]))
        if report.state == "review":
            memory["over"] = True
            actions.append(("close",))
        return actions
    if report.bridge <= 2:
        actions.append(("bridge", 12))
    loud = [
        account for account, seen in rates.items() if np.mean(seen[-3:]) > 4 and account in report.flagged
    ]
    actions += [("throttle", account) for account in loud if account not in memory.setdefault("done", [])]
    memory["done"] += loud
    found = report.triage
    if "families" not in memory:
        if (
            found is None
            or found.votes is None
            or found.votes.low < 0.55
            or abs(found.outside.share - 0.5) < 0.3
        ):
            return [*actions, ("snapshot",), ("triage",)]
        family = found.family
        actions.append(("diagnose", family, "novel family" if found.outside.share > 0.5 else "overfitted"))
        memory["families"], memory["looked"] = [*dict.fromkeys(["Linf", family])], len(report.candidates)
        return [*actions, ("retrain", memory["families"])]
    if len(report.candidates) > memory["looked"]:
        memory["looked"] = len(report.candidates)
        newest = report.candidates[-1]
        if all(share.low >= floor for share, floor in newest.bars.values()):
            memory.update(canary=report.minute, number=newest.number)
            actions.append(("canary", newest.number))
        else:
            left = [f for f in ("L2", "rotation-translation", "patch") if f not in memory["families"]]
            memory["families"] = memory["families"] + left[: max(3 - len(memory["families"]), 1)]
            actions.append(("retrain", memory["families"]))
    return actions


@right("response")
def response_by_a_plan(report, memory):
    """Looks into the burst of flags, finds the answers right, and stands down; then works a list off."""
    minute, wrong = report.minute, report.audit.share < 0.8
    if report.state == "normal":
        loud = any(k > 8 for k in report.flagged.values()) and "over" not in memory
        return [("suspect",), ("snapshot",)] if loud or (wrong and "over" not in memory) else []
    if report.state == "suspect":
        if not wrong:
            return [("stand down",)]
        memory["start"] = minute
        return [("snapshot",), ("contain",), ("bridge", 10), ("triage",)]
    if report.state == "contain":
        plan = [
            ("throttle", account)
            for account, k in report.flagged.items()
            if k > 4 and minute < memory["start"] + 6
        ]
        since = minute - memory["start"]
        if since % 10 == 9:
            plan.append(("bridge", 15))
        if since < 12 and since % 4 == 0:
            plan += [("snapshot",), ("triage",)]
        if since == 14:
            memory["family"] = report.triage.family
            cause = "novel family" if report.triage.outside.low > 0.5 else "overfitted"
            third = "patch" if memory["family"] != "patch" else "L2"
            mix = {"Linf", memory["family"], third} | ({"L2"} if memory["family"] == "Linf" else set())
            plan += [("diagnose", memory["family"], cause), ("retrain", mix)]
        for candidate in report.candidates:
            if min(share.low - floor for share, floor in candidate.bars.values()) >= 0:
                memory["canary"] = minute
                return [*plan, ("canary", candidate.number)]
        return plan
    if report.state == "recover":
        return [("promote", len(report.candidates))] if minute > memory["canary"] + CANARY else []
    memory["over"] = True
    return [("close",)]


# --- guarding a service ------------------------------------------------------------------------------


@right("query_detector")
def blurred_by_mean_pooling(memory, account, image, capacity):
    small = image.reshape(4, image.shape[0] // 4, 4, image.shape[1] // 4, 3).mean((1, 3)).ravel()
    name = hashlib.sha256(image.tobytes()).digest()
    kept = memory.get(account, [])
    if any(name == other for other, _ in kept):
        return False
    near = any(np.abs(small - other).max() < 15 for _, other in kept)
    memory[account] = [*kept, (name, small)][-capacity:]
    return near


@right("query_detector")
def nearest_in_a_matrix(memory, account, image, capacity):
    kept = memory.setdefault(account, [])
    point = torch.from_numpy(image).flatten().double()
    if not kept:
        kept.append(point)
        return False
    nearest = torch.cdist(point[None], torch.stack(kept))[0].min() / len(point) ** 0.5
    if nearest == 0:
        return False
    kept.insert(0, point)
    while len(kept) > capacity:
        kept.pop()
    return bool(nearest < 12)


@right("query_detector")
def correlation_of_pixels(memory, account, image, capacity):
    """Flagged by likeness; exact repeats are known by their bytes."""
    kept = memory.setdefault(account, {})
    centred = image.astype(float).ravel() - image.mean()
    centred /= np.linalg.norm(centred) + 1e-9
    key = image.tobytes()
    if key in kept:
        return np.bool_(False)
    alike = np.bool_(any(centred @ other > 0.95 for other in kept.values()))
    kept[key] = centred
    if len(kept) > capacity:
        del kept[next(iter(kept))]
    return alike


def _bound(k, n):
    return stats.binomtest(k, n).proportion_ci(0.90, "exact").high if n else 1.0


@right("benign")
def binomtest_of_ninety_per_cent(flags, repeats, rate):
    seen = flags[~repeats]
    upper = _bound(int(seen.sum()), len(seen))
    return seen.sum(), len(seen), upper, upper <= rate


@right("benign")
def bisection_of_the_tail(flags, repeats, rate):
    pairs = [flag for flag, again in zip(flags.tolist(), repeats.tolist(), strict=True) if not again]
    k, n, low, high = sum(pairs), len(pairs), 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if stats.binom.cdf(k, n, middle) > 0.05 else (low, middle)
    return k, n, high, bool(high <= rate)


@right("benign")
def beta_quantile(flags, repeats, rate):
    n = len(flags) - np.count_nonzero(repeats)
    k = np.count_nonzero(flags & ~repeats)
    upper = 1.0 if k == n else stats.beta(k + 1, n - k).ppf(0.95)
    return k, n, upper, np.bool_(upper <= rate)


@right("achieved")
def successes_as_a_list(attempts, eps, budget):
    attacked = [a for a in attempts if a.before == a.label]
    queries = sorted(
        a.queries
        for a in attacked
        if a.after not in (None, a.label) and a.size <= eps and a.queries <= budget
    )
    return len(queries), len(attacked), statistics.median(queries) if queries else None


@right("achieved")
def column_by_column(attempts, eps, budget):
    rows = np.array([(a.label, a.before, -1 if a.after is None else a.after, a.queries) for a in attempts])
    inside = np.array([a.size <= eps + 1e-6 for a in attempts])
    fair = rows[:, 0] == rows[:, 1]
    broken = fair & inside & (rows[:, 2] >= 0) & (rows[:, 2] != rows[:, 0]) & (rows[:, 3] <= budget)
    return broken.sum(), fair.sum(), np.median(rows[broken, 3]) if broken.any() else None


@right("achieved")
def one_pass(attempts, eps, budget):
    n, queries = 0, []
    for a in attempts:
        if a.before != a.label:
            continue
        n += 1
        if a.after is None or a.after == a.label or a.size > eps or a.queries > budget:
            continue
        queries.append(a.queries)
    return torch.tensor(len(queries)), n, torch.tensor(queries).double().quantile(0.5) if queries else None


@right("evasion")
def halving(passes, low, high, queries):
    best = None
    size = high
    for _ in range(queries):
        if passes(size):
            best = high = size
        else:
            low = size
        if best is None:
            return None
        size = (low + high) / 2
    return best


@right("evasion")
def halving_the_ratio(passes, low, high, queries):
    if not passes(high):
        return None
    for _ in range(queries - 1):
        middle = math.sqrt(low * high)
        if passes(middle):
            high = middle
        else:
            low = middle
    return high


@right("evasion")
def thirds_first(passes, low, high, queries):
    """Spends a query on a third of the range before it halves."""
    left = queries - 1
    if not passes(high):
        return None
    if passes(low + (high - low) / 3):
        high = low + (high - low) / 3
    else:
        low = low + (high - low) / 3
    for _ in range(left - 1):
        middle = low + 0.5 * (high - low)
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


@right("pod")
def every_field_set(pod, digest):
    pod = copy.deepcopy(pod)
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    for host in ("hostNetwork", "hostPID", "hostIPC"):
        spec[host] = False
    spec["automountServiceAccountToken"] = False
    container["securityContext"] = {
        "runAsNonRoot": True,
        "runAsUser": 20000,
        "runAsGroup": 20000,
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container["resources"] = {
        "limits": {"cpu": 1, "memory": "2Gi", "ephemeral-storage": "500Mi"},
        "requests": {"cpu": 1},
    }
    container["image"] = container["image"].partition("@")[0].removesuffix(":latest") + "@sha256:" + digest
    container["volumeMounts"] = [
        {**mount, "readOnly": True} if mount["mountPath"] == "/models" else mount
        for mount in container["volumeMounts"]
    ]
    return pod


@right("pod")
def through_json(pod, digest):
    pod = json.loads(json.dumps(pod))
    (container,) = pod["spec"]["containers"]
    general, own = pod["spec"].setdefault("securityContext", {}), container.get("securityContext", {})
    general.update(runAsNonRoot=True, runAsUser=10001, seccompProfile={"type": "RuntimeDefault"})
    own = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    container.update(securityContext=own, image=f"registry.example/robustkit@sha256:{digest}")
    limits = {"cpu": "1", "memory": "1Gi", "ephemeral-storage": "1Gi"}
    container["resources"] = {**container.get("resources", {}), "limits": limits}
    container["volumeMounts"][0]["readOnly"] = True
    for key in [key for key in pod["spec"] if key.startswith("host")]:
        del pod["spec"][key]
    return {**pod, "spec": {**pod["spec"], "automountServiceAccountToken": False}}


@right("pod")
def only_what_is_wrong(pod, digest):
    pod = copy.deepcopy(pod)
    spec, container = pod["spec"], pod["spec"]["containers"][0]
    general, own = spec["securityContext"], container["securityContext"]
    if own.get("runAsUser") == 0:
        del own["runAsUser"]
    if general.get("runAsUser") == 0:
        del general["runAsUser"]
    own["runAsNonRoot"] = True
    own.pop("privileged", None)
    own["allowPrivilegeEscalation"] = False
    own["capabilities"] = {"drop": ["ALL"], "add": []}
    own["seccompProfile"] = {"type": "RuntimeDefault"}
    own["readOnlyRootFilesystem"] = True
    spec |= dict.fromkeys(("hostNetwork", "hostPID", "hostIPC", "automountServiceAccountToken"), False)
    for mount in container["volumeMounts"]:
        if mount["name"] == "models":
            mount["readOnly"] = True
    limits = container.setdefault("resources", {}).setdefault("limits", {})
    for name, most in {"cpu": "2", "memory": "1Gi", "ephemeral-storage": "1Gi"}.items():
        limits.setdefault(name, most)
    if not container["image"].endswith(digest):
        container["image"] = f"registry.example/robustkit@sha256:{digest}"
    return pod


def _wilson(k, n):
    """The two ends of Wilson's interval, by hand."""
    z = 1.959964
    middle, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return middle - half, middle + half


@right("canary")
def by_hand(counts, bounds):
    worst = "promote"
    for name, bound in bounds.items():
        k, n = counts[name]
        low, high = _wilson(k, n) if n else (0.0, 1.0)
        if low > bound:
            return "rollback"
        if high > bound:
            worst = "wait"
    return worst


@right("canary")
def exact_intervals(counts, bounds):
    """Clopper and Pearson instead of Wilson: a little wider."""
    lows, highs = {}, {}
    for name, (k, n) in counts.items():
        ends = stats.binomtest(k, n).proportion_ci() if n else None
        lows[name], highs[name] = (ends.low, ends.high) if ends else (0, 1)
    if any(lows[name] > bounds[name] for name in bounds):
        return "rollback"
    return "promote" if all(highs[name] <= bounds[name] for name in bounds) else "wait"


@right("canary")
def metric_by_metric(counts, bounds):
    def verdict(name):
        k, n = counts[name]
        if n == 0:
            return "wait"
        low, high = _wilson(k, n)
        return "rollback" if low > bounds[name] else "promote" if high <= bounds[name] else "wait"

    verdicts = {verdict(name) for name in counts}
    return next(word for word in ("rollback", "wait", "promote") if word in verdicts)
