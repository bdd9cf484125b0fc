"""Mutants of the audit by hand: diagnosis, expectation over transformation, BPDA, the broken suspects."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from robustkit.attacks import pgd
from robustkit.contracts.masking import BALL, N_SUSPECTS, suspects
from robustkit.data import load
from robustkit.device import attackable, seeded, tier
from robustkit.losses import cross_entropy, margin
from robustkit.threat import Ball
from robustkit.wrappers import BPDA, EOT
from tests.mutants import declare, mutant

# --- diagnosis -----------------------------------------------------------------------------------------


def _gradient(model, x, y, loss):
    with attackable(model):
        x = x.clone().requires_grad_(True)
        return torch.autograd.grad(loss(model(x), y).sum(), x)[0].flatten(1)


def _draws(model, x):
    with torch.no_grad():
        return not torch.equal(model(x), model(x))


def _zero(model, x, y, loss):
    """The share of zero gradients among the images that are read right."""
    with torch.no_grad():
        right = model(x).argmax(1) == y
    return (_gradient(model, x, y, loss) == 0).all(1)[right].float().mean()


def _right_diagnosis(model, x, y):
    if _draws(model, x):
        return "random"
    if _zero(model, x, y, margin) > 0.5:
        return "shattered"
    return "saturated" if _zero(model, x, y, cross_entropy) > 0.5 else "honest"


@mutant("diagnosis", random="WRONG_DIAGNOSIS")
def asked_once(model, x, y):
    if _zero(model, x, y, margin) > 0.5:
        return "shattered"
    return "saturated" if _zero(model, x, y, cross_entropy) > 0.5 else "honest"


@mutant("diagnosis", shattered="WRONG_DIAGNOSIS")
def cross_entropy_alone(model, x, y):
    if _draws(model, x):
        return "random"
    return "saturated" if _zero(model, x, y, cross_entropy) > 0.5 else "honest"


@mutant("diagnosis", saturated="WRONG_DIAGNOSIS")
def zero_gradients_are_all_one(model, x, y):
    if _draws(model, x):
        return "random"
    return "shattered" if _zero(model, x, y, cross_entropy) > 0.5 else "honest"


@mutant("diagnosis", saturated="WRONG_DIAGNOSIS")
def wrong_labels_counted_too(model, x, y):
    found = _right_diagnosis(model, x, y)
    zero = (_gradient(model, x, y, cross_entropy) == 0).all(1).float().mean()
    return "honest" if found == "saturated" and zero < 0.5 else found


@mutant("diagnosis", honest="FALSE_ALARM")
def one_saturated_image_is_enough(model, x, y):
    found = _right_diagnosis(model, x, y)
    return "saturated" if found == "honest" and _zero(model, x, y, cross_entropy) > 0 else found


@mutant("diagnosis", honest="FALSE_ALARM")
def one_pixel_without_gradient_is_enough(model, x, y):
    found = _right_diagnosis(model, x, y)
    zero = (_gradient(model, x, y, margin) == 0).any(1).float().mean()
    return "shattered" if found == "honest" and zero > 0.5 else found


@mutant("diagnosis", honest="FALSE_ALARM")
def large_logits_are_suspect(model, x, y):
    found = _right_diagnosis(model, x, y)
    return "saturated" if found == "honest" and model(x).abs().max() > 0.5 else found


@mutant("diagnosis", honest="UNKNOWN_KIND")
def another_word_for_honest(model, x, y):
    return _right_diagnosis(model, x, y).replace("honest", "robust")


@mutant("diagnosis", everywhere="ALWAYS_THE_SAME")
def trusts_everybody(model, x, y):
    return "honest"


@mutant("diagnosis", everywhere="NOT_IMPLEMENTED")
def no_diagnosis(model, x, y):
    raise NotImplementedError


# --- eot -----------------------------------------------------------------------------------------------


@mutant("eot", fresh="WRONG_DRAWS", gradient="WRONG_GRADIENT", mean="NOT_COUNTED")
def one_call_many_times(model, draws):
    def mean(x):
        once = model(x)
        return torch.stack([once for _ in range(draws)]).mean(0)

    return mean


@mutant("eot", fresh="WRONG_DRAWS", gradient="WRONG_GRADIENT", mean="NOT_COUNTED")
def same_draw_every_time(model, draws):
    def mean(x):
        logits = []
        for _ in range(draws):
            torch.manual_seed(0)
            logits.append(model(x))
        return torch.stack(logits).mean(0)

    return mean


@mutant("eot", fresh="WRONG_DRAWS", gradient="WRONG_GRADIENT", mean="NOT_COUNTED")
def a_fifth_of_the_draws(model, draws):
    return EOT(model, draws // 5)


@mutant("eot", fresh="WRONG_DRAWS")
def one_draw_too_few(model, draws):
    return EOT(model, draws - 1)


@mutant("eot", mean="NOT_THE_MEAN", fresh="WRONG_DRAWS", gradient="WRONG_GRADIENT")
def sum_of_the_draws(model, draws):
    return lambda x: torch.stack([model(x) for _ in range(draws)]).sum(0)


@mutant("eot", mean="NOT_THE_MEAN", fresh="WRONG_DRAWS", gradient="WRONG_GRADIENT")
def mean_of_the_probabilities(model, draws):
    return lambda x: torch.stack([model(x).softmax(1) for _ in range(draws)]).mean(0)


@mutant("eot", gradient="NO_GRADIENT")
def draws_without_gradients(model, draws):
    def mean(x):
        with torch.no_grad():
            return torch.stack([model(x) for _ in range(draws)]).mean(0)

    return mean


@mutant("eot", gradient="WRONG_GRADIENT")
def gradient_of_the_last_draw(model, draws):
    def mean(x):
        with torch.no_grad():
            logits = [model(x) for _ in range(draws - 1)]
        last = model(x)
        value = torch.stack([*logits, last.detach()]).mean(0)
        return value + last - last.detach()

    return mean


@mutant("eot", mean="NOT_THE_MEAN", fresh="WRONG_DRAWS", gradient="NO_GRADIENT")
def votes_counted(model, draws):
    return lambda x: 0 * model(x) + sum(F.one_hot(model(x).argmax(1), 2) for _ in range(draws)) / draws


@mutant("eot", everywhere="WRONG_SHAPE")
def draws_stacked(model, draws):
    return lambda x: torch.stack([model(x) for _ in range(draws)])


# --- bpda ----------------------------------------------------------------------------------------------


@mutant("bpda", value="NOT_COUNTED", gradient="NO_GRADIENT")
def part_as_it_is(part, model):
    return lambda x: model(part(x))


@mutant("bpda", value="PART_SKIPPED", gradient="GRADIENT_ELSEWHERE")
def part_left_out(part, model):
    return model


@mutant("bpda", value="NOT_COUNTED", gradient="GRADIENT_ELSEWHERE")
def gradient_at_the_untouched_image(part, model):
    def through(x):
        plain = model(x)
        return model(part(x)).detach() + plain - plain.detach()

    return through


@mutant("bpda", value="PART_SKIPPED", gradient="GRADIENT_ELSEWHERE")
def detached_the_wrong_way_round(part, model):
    return lambda x: model(x + (part(x) - x) * 0)


@mutant("bpda", value="WRONG_VALUE", gradient="GRADIENT_ELSEWHERE")
def halfway(part, model):
    return lambda x: model((x + part(x)) / 2)


@mutant("bpda", value="WRONG_VALUE", gradient="GRADIENT_ELSEWHERE")
def part_applied_twice_over(part, model):
    return lambda x: model(x + part(x).detach())


@mutant("bpda", value="WRONG_VALUE")
def logits_doubled_going_forward(part, model):
    right = BPDA(part)

    def through(x):
        logits = model(right(x))
        return logits + logits.detach()

    return through


@mutant("bpda", everywhere="WRONG_SHAPE")
def image_for_logits(part, model):
    return BPDA(part)


# --- suspects ------------------------------------------------------------------------------------------


def _images():
    data = load("mnist", "test")
    n = min(N_SUSPECTS[tier()], len(data))
    return data.x[:n], data.y[:n]


def _attacked(model, loss=margin, ball=BALL):
    x, y = _images()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return pgd(model, x, y, ball, steps=30, loss=loss, generator=seeded(0, "suspects"))


@cache
def _broken():
    models = suspects()
    return [
        _attacked(models["A"]),
        _attacked(EOT(models["B"], 16)),
        _attacked(nn.Sequential(BPDA(models["C"].part), models["C"].network)),
    ]


def broken(**changes):
    """Candidates that break all three, in the order of their names; or some of them changed."""
    return dict(zip("ABC", _broken(), strict=True)) | changes


# Functions of a trained model, as all mutants of models are; these have models of their own.


@mutant("suspects", A="NOT_BROKEN")
def cross_entropy_on_the_confident(model):
    return broken(A=_attacked(suspects()["A"], cross_entropy))


@mutant("suspects", B="NOT_BROKEN")
def one_draw_at_a_time(model):
    return broken(B=_attacked(suspects()["B"], cross_entropy))


@mutant("suspects", C="NOT_BROKEN")
def through_the_quantiser(model):
    return broken(C=_attacked(suspects()["C"]))


@mutant("suspects", A="NOT_BROKEN", B="NOT_BROKEN", C="NOT_BROKEN")
def images_untouched(model):
    return broken(**dict.fromkeys("ABC", _images()[0]))


@mutant("suspects", A="EPS_BALL_VIOLATED")
def a_larger_ball(model):
    return broken(A=_attacked(suspects()["A"], ball=Ball("L2", 3.0)))


@mutant("suspects", C="BOX_VIOLATED")
def brighter_than_white(model):
    x, _ = _images()
    candidates = broken()["C"].clone()
    candidates[0] = x[0]
    candidates[0, 0, 14, 14] = 1.1
    return broken(C=candidates)


@mutant("suspects", B="WRONG_SHAPE")
def some_images_missing(model):
    return broken(B=broken()["B"][:10])


@mutant("suspects", everywhere="RAISED")
def only_a(model):
    return {"A": broken()["A"]}


declare("suspects", "left_open", lambda model: None, everywhere="RAISED")
