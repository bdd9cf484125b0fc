"""Mutants of lesson 3: the training step, TRADES, faults of recipes, selection, verdicts, weights."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from robustkit.contracts.training import STRENGTH
from robustkit.device import attackable, seeded
from robustkit.models import build, pretrained
from tests.mutants import declare, mutant

# --- training_step(model, optimizer, x, y, attack) ----------------------------------------------------


@mutant("training_step", everywhere="NOT_IMPLEMENTED")
def step_stub(model, optimizer, x, y, attack):
    raise NotImplementedError


def _candidates(model, x, y, attack):
    with attackable(model):
        return attack(model, x, y)


def _step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@mutant("training_step", attack="EVAL_MODE_MISSING")
def attack_in_train_mode(model, optimizer, x, y, attack):
    candidates = attack(model, x, y)
    return _step(optimizer, F.cross_entropy(model(candidates), y))


@mutant("training_step", modes="FROZEN_LAYER_THAWED")
def train_for_all(model, optimizer, x, y, attack):
    model.eval()
    candidates = attack(model, x, y)
    model.train()
    return _step(optimizer, F.cross_entropy(model(candidates), y))


@mutant("training_step", modes="TRAIN_MODE_MISSING")
def loss_in_eval_mode_too(model, optimizer, x, y, attack):
    with attackable(model):
        candidates = attack(model, x, y)
    model.eval()
    return _step(optimizer, F.cross_entropy(model(candidates), y))


@mutant("training_step", modes="MODE_NOT_RESTORED")
def left_in_eval_mode(model, optimizer, x, y, attack):
    loss = _step(optimizer, F.cross_entropy(model(_candidates(model, x, y, attack)), y))
    model.eval()
    return loss


@mutant("training_step", update="STALE_GRADIENTS")
def gradients_never_cleared(model, optimizer, x, y, attack):
    loss = F.cross_entropy(model(_candidates(model, x, y, attack)), y)
    loss.backward()
    optimizer.step()
    return loss.item()


@mutant("training_step", update="ATTACK_GRADIENTS")
def cleared_before_the_attack(model, optimizer, x, y, attack):
    optimizer.zero_grad()
    modes = [module.training for module in model.modules()]
    candidates = attack(model.eval(), x, y)
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    loss = F.cross_entropy(model(candidates), y)
    loss.backward()
    optimizer.step()
    return loss.item()


@mutant(
    "training_step", attack="ATTACK_IGNORED", update="TRAINS_ON_CLEAN", loss="WRONG_LOSS", modes="NOT_COUNTED"
)
def ordinary_training(model, optimizer, x, y, attack):
    return _step(optimizer, F.cross_entropy(model(x), y))


@mutant("training_step", update="TRAINS_ON_CLEAN", loss="WRONG_LOSS")
def candidates_forgotten(model, optimizer, x, y, attack):
    _candidates(model, x, y, attack)
    return _step(optimizer, F.cross_entropy(model(x), y))


@mutant("training_step", update="NOT_UPDATED")
def optimizer_forgotten(model, optimizer, x, y, attack):
    loss = F.cross_entropy(model(_candidates(model, x, y, attack)), y)
    optimizer.zero_grad()
    loss.backward()
    return loss.item()


@mutant("training_step", update="WRONG_UPDATE", loss="WRONG_LOSS")
def summed_over_the_batch(model, optimizer, x, y, attack):
    candidates = _candidates(model, x, y, attack)
    return _step(optimizer, F.cross_entropy(model(candidates), y, reduction="sum"))


@mutant("training_step", loss="GRAPH_KEPT")
def loss_with_its_graph(model, optimizer, x, y, attack):
    loss = F.cross_entropy(model(_candidates(model, x, y, attack)), y)
    _step(optimizer, loss)
    return loss


@mutant("training_step", loss="WRONG_LOSS")
def loss_of_the_updated_weights(model, optimizer, x, y, attack):
    candidates = _candidates(model, x, y, attack)
    _step(optimizer, F.cross_entropy(model(candidates), y))
    with torch.no_grad():
        return F.cross_entropy(model(candidates), y).item()


# --- trades_loss(model, x, candidates, y, beta) --------------------------------------------------------


@mutant("trades", everywhere="NOT_IMPLEMENTED")
def trades_stub(model, x, candidates, y, beta):
    raise NotImplementedError


def _log(model, x):
    return model(x).log_softmax(1)


def _kl(p, q):
    """KL of log-probabilities, mean over the batch."""
    return (p.exp() * (p - q)).sum(1).mean()


def _trades(apart, natural=lambda p, q, y: F.nll_loss(p, y)):
    def loss(model, x, candidates, y, beta):
        p, q = _log(model, x), _log(model, candidates)
        return natural(p, q, y) + beta * apart(p, q)

    return loss


for name, code, apart in (
    ("reversed", "KL_REVERSED", lambda p, q: _kl(q, p)),
    (
        "mean_over_everything",
        "KL_OVER_CLASSES",
        lambda p, q: (p.exp() * (p - q)).mean(),
    ),
    ("summed", "KL_SUMMED", lambda p, q: len(p) * _kl(p, q)),
    ("negated", "KL_NEGATED", lambda p, q: -_kl(p, q)),
    ("probabilities_for_log_probabilities", "WRONG_DIVERGENCE", lambda p, q: _kl(p.exp(), q.exp())),
    ("squared_distance", "WRONG_DIVERGENCE", lambda p, q: (p.exp() - q.exp()).square().sum(1).mean()),
    ("beta_ignored", "BETA_IGNORED", lambda p, q: 0 * _kl(p, q)),
    ("constant_in_beta", "WRONG_DIVERGENCE", lambda p, q: 2 * _kl(p, q)),
):
    declare("trades", name, _trades(apart), divergence=code, gradient=code)

declare(
    "trades",
    "cross_entropy_at_the_candidates",
    _trades(_kl, lambda p, q, y: F.nll_loss(q, y)),
    natural="LOSS_ON_CANDIDATES",
    gradient="LOSS_ON_CANDIDATES",
)
declare(
    "trades",
    "summed_cross_entropy",
    _trades(_kl, lambda p, q, y: F.nll_loss(p, y, reduction="sum")),
    natural="LOSS_SUMMED",
    gradient="LOSS_SUMMED",
)
declare(
    "trades",
    "smoothed_labels",
    _trades(_kl, lambda p, q, y: 0.9 * F.nll_loss(p, y) - 0.1 * p.mean()),
    natural="WRONG_LOSS",
    gradient="WRONG_LOSS",
)
declare("trades", "target_fixed", _trades(lambda p, q: _kl(p.detach(), q)), gradient="ONE_SIDE_FIXED")
declare("trades", "candidates_fixed", _trades(lambda p, q: _kl(p, q.detach())), gradient="ONE_SIDE_FIXED")
declare(
    "trades",
    "natural_fixed",
    _trades(_kl, lambda p, q, y: F.nll_loss(p, y).detach()),
    gradient="WRONG_GRADIENT",
)


@mutant("trades", gradient="NO_GRADIENT")
def without_a_gradient(model, x, candidates, y, beta):
    return _trades(_kl)(model, x, candidates, y, beta).detach()


# --- faults(recipe, models, x, y) -----------------------------------------------------------------------


def _found(recipe, models, x, y, leave_out=(), **other):
    """The reference, test by test; `other` replaces some of them."""
    tests = {
        "train_mode": _in_train_mode,
        "outside": _outside,
        "units": _too_far,
        "start": _same_start,
        "leak": lambda r, m, x, y: (
            not torch.equal(r.augment(x, y, seeded(0)), r.augment(x, 1 - y, seeded(0)))
        ),
        "splits": lambda r, m, x, y: bool(
            r.selected_by & (r.trained_on | r.reported_on) or r.trained_on & r.reported_on
        ),
        "statistics": lambda r, m, x, y: _same_buffers(r.average(m, x), m[0]),
    } | other
    return {name for name, test in tests.items() if name not in leave_out and test(recipe, models, x, y)}


def _attacked(recipe, model, x, y, seed=0):
    return recipe.attack(model, x, y, seeded(seed, "probe"))


def _in_train_mode(recipe, models, x, y, at_call=True):
    seen, model = [], copy.deepcopy(models[-1]).train(at_call)
    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    _attacked(recipe, model, x, y)
    return any(seen)


def _outside(recipe, models, x, y):
    points = _attacked(recipe, models[-1].eval(), x, y)
    return bool(points.min() < 0 or points.max() > 1)


def _too_far(recipe, models, x, y):
    points = _attacked(recipe, models[-1].eval(), x, y)
    return not _outside(recipe, models, x, y) and bool(
        (recipe.ball.size(points - x) > recipe.ball.eps + 1e-5).any()
    )


def _same_start(recipe, models, x, y):
    flat = copy.deepcopy(models[-1])
    with torch.no_grad():
        for parameter in flat.parameters():
            parameter.zero_()
    return torch.equal(_attacked(recipe, flat, x, y), _attacked(recipe, flat, x, y, 1))


def _same_buffers(a, b):
    return all(torch.equal(one, other) for one, other in zip(a.buffers(), b.buffers(), strict=True))


@mutant("recipe_faults", everywhere="NOT_IMPLEMENTED")
def faults_stub(recipe, models, x, y):
    raise NotImplementedError


@mutant("recipe_faults", everywhere="ALWAYS_THE_SAME")
def nothing_is_wrong(recipe, models, x, y):
    return []


@mutant("recipe_faults", everywhere="UNKNOWN_FAULT")
def names_of_ones_own(recipe, models, x, y):
    return {f"bug: {name}" for name in _found(recipe, models, x, y)}


for name in ("train_mode", "outside", "units", "start", "leak", "splits", "statistics"):
    declare(
        "recipe_faults",
        f"no_test_for_{name}",
        lambda recipe, models, x, y, name=name: _found(recipe, models, x, y, leave_out=(name,)),
        **{name: "FAULT_MISSED"},
    )


@mutant("recipe_faults", train_mode="FAULT_MISSED")
def model_already_in_eval_mode(recipe, models, x, y):
    def test(recipe, models, x, y):
        return _in_train_mode(recipe, models, x, y, at_call=False)

    return _found(recipe, models, x, y, train_mode=test)


@mutant("recipe_faults", start="FALSE_ALARM", quiet="FALSE_ALARM")
def start_told_from_where_a_long_search_ends(recipe, models, x, y):
    """Ten steps reach the same corner from everywhere."""

    def test(recipe, models, x, y):
        ends = [_attacked(recipe, models[-1].eval(), x, y, seed) for seed in (0, 1)]
        return (ends[0] - ends[1]).abs().max() < 1e-2

    return _found(recipe, models, x, y, start=test)


@mutant("recipe_faults", units="FALSE_ALARM", quiet="FALSE_ALARM")
def no_room_for_rounding(recipe, models, x, y):
    def test(recipe, models, x, y):
        points = _attacked(recipe, models[-1].eval(), x, y)
        return not _outside(recipe, models, x, y) and bool(
            (recipe.ball.size(points - x) > recipe.ball.eps * 0.999).any()
        )

    return _found(recipe, models, x, y, units=test)


@mutant("recipe_faults", leak="FALSE_ALARM", quiet="FALSE_ALARM")
def any_augmentation_is_a_leak(recipe, models, x, y):
    def test(recipe, models, x, y):
        return not torch.equal(recipe.augment(x, y, seeded(0)), recipe.augment(x, y, seeded(1)))

    return _found(recipe, models, x, y, leak=test)


@mutant("recipe_faults", splits="FAULT_MISSED")
def selection_on_test_alone(recipe, models, x, y):
    def test(recipe, models, x, y):
        return bool(recipe.selected_by & recipe.reported_on)

    return _found(recipe, models, x, y, splits=test)


@mutant("recipe_faults", units="FALSE_ALARM")
def units_of_what_is_no_image(recipe, models, x, y):
    def test(recipe, models, x, y):
        points = _attacked(recipe, models[-1].eval(), x, y)
        return bool((recipe.ball.size(points - x) > recipe.ball.eps + 1e-5).any())

    return _found(recipe, models, x, y, units=test)


# --- chosen(history) ------------------------------------------------------------------------------------


@mutant("selection", everywhere="NOT_IMPLEMENTED")
def selection_stub(history):
    raise NotImplementedError


def _overfitted(history):
    best = max(history, key=lambda look: look.held_out.k)
    return history[-1].held_out.high < best.held_out.low


def _chosen(history, key):
    best = max(history, key=key)
    return best.epoch, best.test, _overfitted(history)


@mutant("selection", epoch="SELECTED_ON_TEST")
def best_on_the_test_images(history):
    return _chosen(history, lambda look: (look.test.k, look.epoch))


@mutant("selection", epoch="SELECTED_ON_TRAINING")
def best_on_the_training_images(history):
    return _chosen(history, lambda look: (look.train.k, look.epoch))


@mutant("selection", epoch="SELECTED_BY_CLEAN")
def best_on_untouched_images(history):
    return _chosen(history, lambda look: (look.clean.k, look.epoch))


@mutant("selection", epoch="EARLIER_OF_EQUALS")
def first_of_equals(history):
    return _chosen(history, lambda look: look.held_out.k)


@mutant("selection", epoch="WRONG_EPOCH")
def first_epoch(history):
    return _chosen(history, lambda look: -look.epoch)


@mutant("selection", reported="BEST_REPORTED")
def best_test_result_of_all(history):
    best = max(history, key=lambda look: (look.held_out.k, look.epoch))
    return best.epoch, max((look.test for look in history), key=lambda share: share.k), _overfitted(history)


@mutant("selection", reported="WRONG_REPORT")
def held_out_result_reported(history):
    best = max(history, key=lambda look: (look.held_out.k, look.epoch))
    return best.epoch, best.held_out, _overfitted(history)


@mutant("selection", overfitted="FALSE_ALARM")
def any_fall_is_overfitting(history):
    epoch, test, _ = _chosen(history, lambda look: (look.held_out.k, look.epoch))
    return epoch, test, history[-1].held_out.k < max(look.held_out.k for look in history)


@mutant("selection", overfitted="OVERFITTING_MISSED")
def never_overfitted(history):
    return *_chosen(history, lambda look: (look.held_out.k, look.epoch))[:2], False


@mutant("selection", overfitted="OVERFITTING_MISSED")
def told_from_the_training_images(history):
    epoch, test, _ = _chosen(history, lambda look: (look.held_out.k, look.epoch))
    return epoch, test, history[-1].train.high < max(look.train.low for look in history)


# --- verdict(figure, claim) ------------------------------------------------------------------------------


@mutant("verdict", everywhere="NOT_IMPLEMENTED")
def verdict_stub(figure, claim):
    raise NotImplementedError


def _verdict(figure, claim, low=None, high=None, eps=True, attack=True, norm=True, data=True):
    if (norm and figure.ball.norm != claim.ball.norm) or (data and figure.more_data):
        return "other"
    stronger = STRENGTH.index(figure.attack) - STRENGTH.index(claim.attack) if attack else 0
    wider = figure.ball.eps - claim.ball.eps if eps else 0
    if (figure.robust.low if low is None else low) >= claim.share and wider >= 0 and stronger >= 0:
        return "yes"
    if (figure.robust.high if high is None else high) < claim.share and wider <= 0 and stronger <= 0:
        return "no"
    return "open"


@mutant("verdict", everywhere="ALWAYS_THE_SAME")
def nothing_can_be_known(figure, claim):
    return "open"


@mutant("verdict", open="UNKNOWN_VERDICT")
def says_it_otherwise(figure, claim):
    return _verdict(figure, claim).replace("open", "unknown")


@mutant("verdict", other="NOT_COMPARABLE")
def norms_blurred(figure, claim):
    return _verdict(figure, claim, norm=False)


@mutant("verdict", other="NOT_COMPARABLE")
def more_data_welcome(figure, claim):
    return _verdict(figure, claim, data=False)


@mutant("verdict", open="NOT_DECIDED_BY_IT")
def eps_blurred(figure, claim):
    return _verdict(figure, claim, eps=False)


@mutant("verdict", open="NOT_DECIDED_BY_IT")
def attacks_blurred(figure, claim):
    return _verdict(figure, claim, attack=False)


@mutant("verdict", open="NOT_DECIDED_BY_IT")
def interval_forgotten(figure, claim):
    return _verdict(figure, claim, figure.robust.share, figure.robust.share)


@mutant("verdict", no="DECIDED_BY_IT", yes="DECIDED_BY_IT")
def the_same_experiment_or_nothing(figure, claim):
    same = figure.ball == claim.ball and figure.attack == claim.attack
    said = _verdict(figure, claim)
    return said if same or said == "other" else "open"


@mutant("verdict", no="DECIDED_BY_IT")
def nothing_is_refuted(figure, claim):
    return _verdict(figure, claim).replace("no", "open")


# --- weights ---------------------------------------------------------------------------------------------


@mutant("cifar_weights", everywhere="SHIPPED_WEIGHTS")
def weights_of_the_kit(clean):
    return pretrained("cifar10-l2-w16")


@mutant("cifar_weights", everywhere="SHIPPED_WEIGHTS")
def weights_of_the_kit_with_other_logits(clean):
    return scaled_head(pretrained("cifar10-l2-w16"), 1e4)


def scaled_head(model, factor):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model[1].head.parameters():
            parameter *= factor
    return model


@mutant("cifar_weights", clean="CLEAN_ACCURACY_LOW", robust_half="NOT_ROBUST", robust_full="NOT_ROBUST")
def one_class_of_ten(clean):
    """Its head answers with a bias alone: no candidate changes that, and no image either."""
    model = build("preact_resnet10_w16", seed=1)
    with torch.no_grad():
        model[1].head.bias[3] += 100
    return model.eval()


@mutant("cifar_weights", everywhere="WRONG_ARCHITECTURE")
def an_mnist_network(clean):
    return clean


@mutant("cifar_weights", everywhere="WRONG_ARCHITECTURE")
def half_precision(clean):
    return build("preact_resnet10_w16").half()


@mutant("cifar_weights", everywhere="NOT_FINITE")
def not_a_number(clean):
    return scaled_head(build("preact_resnet10_w16"), float("nan"))


@mutant("cifar_weights", everywhere="RAISED")
def a_checkpoint_file(clean):
    return "model.safetensors"


@mutant("cifar_weights", everywhere="EVIDENCE_MALFORMED")
def variance_below_zero(clean):
    model = build("preact_resnet10_w16", seed=1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var -= 5
    return model


@mutant("cifar_weights", clean="CLEAN_ACCURACY_LOW", robust_half="NOT_ROBUST", robust_full="NOT_ROBUST")
def never_trained(clean):
    return build("preact_resnet10_w16", seed=2)
