"""Wrong models and reports: functions from a trained clean model to what would be handed in."""

from __future__ import annotations

import copy

import torch
from torch import nn

from robustkit.attacks import fgsm
from robustkit.contracts.models import EPSILONS, N_REPORT
from robustkit.data import load
from robustkit.device import tier
from robustkit.models import build, pretrained
from robustkit.threat import Ball
from tests.mutants import mutant


def scaled(model, factor):
    """The same decisions at every point, but cross-entropy's gradient underflows."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model[-1].weight *= factor
        model[-1].bias *= factor
    return model


def survivors(model, split="test", labels=None):
    """(k, n) for each eps, as the exercise asks for them."""
    data = load("mnist", split)
    x, y = data.x[: N_REPORT[tier()]], data.y[: N_REPORT[tier()]]
    report = {}
    for eps in EPSILONS:
        candidates = fgsm(model, x, y, Ball("Linf", eps))
        with torch.no_grad():
            report[eps] = int((model(candidates).argmax(1) == y).sum()), len(y)
    return report


# --- the clean model and its report ------------------------------------------------------------------


@mutant("fgsm_report", counts="REPORT_NOT_REPRODUCED")
def counts_of_the_training_images(clean):
    report = survivors(clean, "train")
    n = survivors(clean)[0.1][1]
    return clean, {eps: (k - 10, n) for eps, (k, _) in report.items()}


@mutant("fgsm_report", counts="WRONG_N")
def k_and_n_swapped(clean):
    return clean, {eps: (n, k) for eps, (k, n) in survivors(clean).items()}


@mutant("fgsm_report", counts="REPORT_NOT_REPRODUCED")
def fooled_instead_of_surviving(clean):
    return clean, {eps: (n - k, n) for eps, (k, n) in survivors(clean).items()}


@mutant("fgsm_report", counts="WRONG_N")
def fewer_images(clean):
    return clean, {eps: (k // 2, n // 2) for eps, (k, n) in survivors(clean).items()}


@mutant("fgsm_report", everywhere="REPORT_INCOMPLETE")
def one_eps_missing(clean):
    report = survivors(clean)
    del report[0.2]
    return clean, report


@mutant("fgsm_report", counts="REPORT_NOT_REPRODUCED")
def wishful_counts(clean):
    return clean, {eps: (n, n) for eps, (_, n) in survivors(clean).items()}


@mutant("fgsm_report", clean="MODEL_TOO_WEAK")
def honest_report_on_an_untrained_model(clean):
    model = build("mnist_cnn", seed=1)
    return model, survivors(model)


@mutant("fgsm_report", everywhere="RAISED")
def no_report(clean):
    return clean, None


@mutant("fgsm_report", everywhere="WRONG_ARCHITECTURE")
def another_architecture_reported(clean):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    return model, survivors(model)


# --- the robust model --------------------------------------------------------------------------------


@mutant("robust_model", pgd_half="NOT_ROBUST", pgd_full="NOT_ROBUST")
def clean_model(clean):
    return clean


@mutant("robust_model", pgd_half="MASKED_GRADIENTS", pgd_full="MASKED_GRADIENTS")
def saturated_logits(clean):
    return scaled(clean, 1e4)


@mutant("robust_model", pgd_half="MASKED_GRADIENTS", pgd_full="MASKED_GRADIENTS")
def logits_times_a_thousand(clean):
    return scaled(clean, 1e3)


@mutant("robust_model", pgd_half="NOT_ROBUST", pgd_full="NOT_ROBUST")
def logits_almost_too_small_for_float32(clean):
    """Every margin is a denormal number, and its gradient underflows to zero on the way back."""
    return scaled(clean, 1e-38)


@mutant("robust_model", pgd_half="MASKED_GRADIENTS", pgd_full="MASKED_GRADIENTS")
def scale_hidden_between_the_layers(clean):
    """Huge first weights, tiny ones in the middle, huge ones at the end."""
    model = scaled(clean, 1e20)
    with torch.no_grad():
        for index, factor in ((0, 1e15), (2, 1e-30)):
            model[index].weight *= factor
        model[0].bias *= 1e15
        model[2].bias *= 1e-15
        model[5].bias *= 1e-15
        model[7].bias *= 1e-15
    return model


@mutant("robust_model", everywhere="SHIPPED_WEIGHTS")
def weights_of_the_package(clean):
    return pretrained("mnist-pgd")


@mutant("robust_model", everywhere="SHIPPED_WEIGHTS")
def weights_of_the_package_permuted_and_rescaled(clean):
    model = scaled(pretrained("mnist-pgd"), 7.0)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model[5].weight.copy_(3 * model[5].weight[order])
        model[5].bias.copy_(3 * model[5].bias[order])
        model[7].weight.copy_(model[7].weight[:, order] / 3)
    return model


@mutant("robust_model", clean="CLEAN_ACCURACY_LOW", pgd_half="NOT_ROBUST", pgd_full="NOT_ROBUST")
def one_class_for_everything(clean):
    """Saturated by a bias: no candidate changes the answer."""
    model = scaled(clean, 1.0)
    with torch.no_grad():
        model[-1].bias[3] += 1e6
    return model


@mutant("robust_model", everywhere="NOT_FINITE")
def infinite_weights(clean):
    return scaled(clean, float("inf"))


@mutant("robust_model", clean="CLEAN_ACCURACY_LOW", pgd_half="NOT_ROBUST", pgd_full="NOT_ROBUST")
def untrained(clean):
    return build("mnist_cnn", seed=1)


@mutant("robust_model", clean="CLEAN_ACCURACY_LOW", pgd_half="NOT_ROBUST", pgd_full="NOT_ROBUST")
def zeros(clean):
    model = copy.deepcopy(clean)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@mutant("robust_model", everywhere="NOT_FINITE")
def nan_weights(clean):
    return scaled(clean, float("nan"))


@mutant("robust_model", everywhere="EVIDENCE_MALFORMED")
def overflowing_weights(clean):
    """Infinite logits: no verdict on them would mean anything."""
    model = scaled(clean, 1e30)
    with torch.no_grad():
        model[0].weight *= 1e30
    return model


@mutant("robust_model", everywhere="WRONG_ARCHITECTURE")
def another_architecture(clean):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


@mutant("robust_model", everywhere="WRONG_ARCHITECTURE")
def wider_layer(clean):
    model = copy.deepcopy(clean)
    model[-3] = nn.Linear(32 * 7 * 7, 128)
    model[-1] = nn.Linear(128, 10)
    return model


@mutant("robust_model", everywhere="WRONG_ARCHITECTURE")
def an_extra_layer(clean):
    return nn.Sequential(*copy.deepcopy(clean), nn.Linear(10, 10))


@mutant("robust_model", everywhere="WRONG_ARCHITECTURE")
def float64_weights(clean):
    return copy.deepcopy(clean).double()


@mutant("robust_model", everywhere="RAISED")
def a_function(clean):
    return lambda x: clean(x)
