"""Mutants of smoothing's votes, bound, radius, verdict and accuracy, and of interval bounds."""

from __future__ import annotations

import copy

import torch
from scipy import stats
from torch import nn

from robustkit.device import attackable
from tests.mutants import declare, mutant

# --- votes -------------------------------------------------------------------------------------------


def _count(model, points, num_classes):
    with attackable(model), torch.no_grad():
        return torch.bincount(model(points).argmax(1), minlength=num_classes)


def _copies(x, n):
    return x.expand(n, *x.shape)


def _noise(x, n, sigma, generator):
    return sigma * torch.randn((n, *x.shape), generator=generator)


def _right_votes(model, x, n, sigma, num_classes, generator):
    return _count(model, x + _noise(x, n, sigma, generator), num_classes)


@mutant("votes", noise="NOISE_CLAMPED")
def noisy_images_clamped(model, x, n, sigma, num_classes, generator):
    return _count(model, (x + _noise(x, n, sigma, generator)).clamp(0, 1), num_classes)


@mutant("votes", noise="NOISE_SCALE")
def variance_for_sigma(model, x, n, sigma, num_classes, generator):
    return _right_votes(model, x, n, sigma**2, num_classes, generator)


@mutant("votes", noise="NOISE_SCALE")
def root_of_sigma(model, x, n, sigma, num_classes, generator):
    return _right_votes(model, x, n, sigma**0.5, num_classes, generator)


@mutant("votes", noise="NOISE_SCALE")
def sigma_of_the_lesson(model, x, n, sigma, num_classes, generator):
    return _right_votes(model, x, n, 0.25, num_classes, generator)


@mutant("votes", noise="NOISE_SCALE")
def noise_shared_by_the_pixels(model, x, n, sigma, num_classes, generator):
    noise = sigma * torch.randn(n, 1, 1, 1, generator=generator)
    return _count(model, x + noise, num_classes)


@mutant("votes", noise="NOISE_SHARED")
def no_noise(model, x, n, sigma, num_classes, generator):
    return _count(model, _copies(x, n), num_classes)


@mutant("votes", noise="NOISE_SHARED")
def uniform_noise_that_only_brightens(model, x, n, sigma, num_classes, generator):
    return _count(model, x + sigma * torch.rand((n, *x.shape), generator=generator), num_classes)


@mutant("votes", noise="NOISE_SCALE")
def uniform_noise(model, x, n, sigma, num_classes, generator):
    noise = sigma * (2 * torch.rand((n, *x.shape), generator=generator) - 1)
    return _count(model, x + noise, num_classes)


@mutant("votes", total="TOTAL_NOT_N")
def last_batch_forgotten(model, x, n, sigma, num_classes, generator):
    return _right_votes(model, x, n // 1000 * 1000, sigma, num_classes, generator)


@mutant("votes", total="TOTAL_NOT_N")
def last_batch_full(model, x, n, sigma, num_classes, generator):
    return _right_votes(model, x, -(-n // 1000) * 1000, sigma, num_classes, generator)


@mutant("votes", everywhere="SHARES_NOT_COUNTS")
def shares_of_the_votes(model, x, n, sigma, num_classes, generator):
    return _right_votes(model, x, n, sigma, num_classes, generator) / n


@mutant("votes", everywhere="WRONG_SHAPE")
def classes_without_votes_left_out(model, x, n, sigma, num_classes, generator):
    return _right_votes(model, x, n, sigma, 0, generator)


@mutant("votes", everywhere="MODEL_IGNORED")
def all_votes_for_class_one(model, x, n, sigma, num_classes, generator):
    return torch.tensor([0, n])


@mutant("votes", everywhere="WRONG_SHAPE")
def winner_alone(model, x, n, sigma, num_classes, generator):
    return _right_votes(model, x, n, sigma, num_classes, generator).argmax()


@mutant("votes", hygiene="GLOBAL_RANDOMNESS")
def votes_from_the_global_state(model, x, n, sigma, num_classes, generator):
    return _right_votes(model, x, n, sigma, num_classes, None)


@mutant("votes", hygiene="SAME_FOR_EVERY_SEED")
def votes_from_a_seed_of_its_own(model, x, n, sigma, num_classes, generator):
    return _right_votes(model, x, n, sigma, num_classes, torch.Generator().manual_seed(0))


@mutant("votes", hygiene="SEED_IGNORED")
def votes_from_a_fresh_seed(model, x, n, sigma, num_classes, generator):
    fresh = torch.Generator()
    fresh.seed()
    return _right_votes(model, x, n, sigma, num_classes, fresh)


@mutant("votes", hygiene="EVAL_MODE_MISSING")
def votes_in_the_mode_it_came_in(model, x, n, sigma, num_classes, generator):
    with torch.no_grad():
        labels = model(x + _noise(x, n, sigma, generator)).argmax(1)
    return torch.bincount(labels, minlength=num_classes)


@mutant("votes", hygiene="MODE_NOT_RESTORED")
def votes_that_leave_eval_mode(model, x, n, sigma, num_classes, generator):
    model.eval()
    return _right_votes(model, x, n, sigma, num_classes, generator)


@mutant("votes", hygiene="INPUT_MODIFIED")
def noise_added_to_the_image_itself(model, x, n, sigma, num_classes, generator):
    counts = _right_votes(model, x, n, sigma, num_classes, generator)
    x += _noise(x, 1, sigma, generator)[0]
    return counts


# --- lower bound -------------------------------------------------------------------------------------


def _right_bound(k, n, alpha):
    return stats.beta.ppf(alpha, k, n - k + 1) if k else 0.0


@mutant("lower_bound", value="TWO_SIDED_BOUND", edges="EDGE_CASES")
def two_sided_bound(k, n, alpha):
    return stats.binomtest(k, n).proportion_ci(1 - alpha, method="exact").low


@mutant("lower_bound", value="NORMAL_BOUND", edges="EDGE_CASES")
def normal_bound(k, n, alpha):
    p = k / n
    return p - stats.norm.isf(alpha) * (p * (1 - p) / n) ** 0.5


@mutant("lower_bound", value="WRONG_BOUND", edges="EDGE_CASES")
def wilson_bound(k, n, alpha):
    return stats.binomtest(k, n).proportion_ci(1 - 2 * alpha, method="wilson").low


@mutant("lower_bound", value="WRONG_BOUND", edges="EDGE_CASES")
def beta_of_the_upper_bound(k, n, alpha):
    return stats.beta.ppf(alpha, k + 1, n - k) if k < n else 1.0


@mutant("lower_bound", value="BOUND_ABOVE_SHARE", edges="EDGE_CASES")
def upper_for_lower(k, n, alpha):
    return stats.beta.ppf(1 - alpha, k + 1, n - k) if k < n else 1.0


@mutant("lower_bound", value="BOUND_ABOVE_SHARE", edges="EDGE_CASES")
def confidence_for_alpha(k, n, alpha):
    return _right_bound(k, n, 1 - alpha)


@mutant("lower_bound", value="WRONG_BOUND")
def alpha_of_the_lesson(k, n, alpha):
    return _right_bound(k, n, 0.001)  # that of the edges


@mutant("lower_bound", value="WRONG_BOUND", edges="EDGE_CASES")
def share_for_bound(k, n, alpha):
    return k / n


@mutant("lower_bound", edges="EDGE_CASES")
def no_votes_forgotten(k, n, alpha):
    return stats.beta.ppf(alpha, k, n - k + 1)  # NaN for k = 0


@mutant("lower_bound", edges="EDGE_CASES")
def all_votes_are_certainty(k, n, alpha):
    return 1.0 if k == n else _right_bound(k, n, alpha)


@mutant("lower_bound", everywhere="WRONG_SHAPE")
def both_bounds(k, n, alpha):
    return [_right_bound(k, n, alpha), 1.0]


# --- certified radius --------------------------------------------------------------------------------


def _right_radius(p_lower, sigma):
    return sigma * stats.norm.ppf(p_lower) if p_lower > 0.5 else None


@mutant("certified_radius", abstain="ABSTENTION_MISSED")
def negative_radius(p_lower, sigma):
    return sigma * stats.norm.ppf(p_lower)


@mutant("certified_radius", abstain="ABSTENTION_MISSED")
def radius_zero_for_abstention(p_lower, sigma):
    return max(sigma * stats.norm.ppf(p_lower), 0.0)


@mutant("certified_radius", abstain="ABSTENTION_MISSED")
def one_half_certifies(p_lower, sigma):
    return sigma * stats.norm.ppf(p_lower) if p_lower >= 0.5 else None


@mutant("certified_radius", value="SIGMA_IGNORED")
def radius_in_standard_deviations(p_lower, sigma):
    return stats.norm.ppf(p_lower) if p_lower > 0.5 else None


@mutant("certified_radius", value="WRONG_RADIUS")
def radius_by_the_variance(p_lower, sigma):
    return sigma**2 * stats.norm.ppf(p_lower) if p_lower > 0.5 else None


@mutant("certified_radius", value="WRONG_RADIUS")
def distribution_for_quantile(p_lower, sigma):
    return sigma * stats.norm.cdf(p_lower) if p_lower > 0.5 else None


@mutant("certified_radius", value="WRONG_RADIUS")
def half_the_gap_between_both_classes(p_lower, sigma):
    """The two-class formula with a share of zero for the runner-up."""
    return sigma / 2 * stats.norm.ppf(p_lower) if p_lower > 0.5 else None


@mutant("certified_radius", value="FALSE_ABSTENTION")
def abstains_below_one_sigma(p_lower, sigma):
    return _right_radius(p_lower, sigma) if p_lower > stats.norm.cdf(1) else None


@mutant("certified_radius", everywhere="FALSE_ABSTENTION")
def certifies_nothing(p_lower, sigma):
    return None


@mutant("certified_radius", everywhere="RAISED")
def radius_in_a_list(p_lower, sigma):
    return [sigma * stats.norm.ppf(p_lower)] if p_lower > 0.5 else None


# --- certify -----------------------------------------------------------------------------------------


def _certify(chosen_from, counts, sigma, alpha, bound=_right_bound):
    label = int(chosen_from.argmax())
    radius = _right_radius(bound(int(counts[label]), int(counts.sum()), alpha), sigma)
    return None if radius is None else (label, radius)


@mutant("certify", selection="SELECTION_REUSED")
def class_of_the_second_sample(counts0, counts, sigma, alpha):
    return _certify(counts, counts, sigma, alpha)


@mutant("certify", selection="SELECTION_REUSED")
def class_of_both_samples(counts0, counts, sigma, alpha):
    return _certify(counts0 + counts, counts, sigma, alpha)


@mutant("certify", selection="WRONG_CLASS")
def label_off_by_one(counts0, counts, sigma, alpha):
    answer = _certify(counts0, counts, sigma, alpha)
    return None if answer is None else (answer[0] + 1, answer[1])


@mutant("certify", estimation="SAMPLES_POOLED")
def bound_from_both_samples(counts0, counts, sigma, alpha):
    return _certify(counts0, counts0 + counts, sigma, alpha)


@mutant("certify", estimation="FALSE_ABSTENTION")
def bound_from_the_first_sample(counts0, counts, sigma, alpha):
    return _certify(counts0, counts0, sigma, alpha)


@mutant("certify", estimation="TWO_SIDED_BOUND")
def half_of_alpha(counts0, counts, sigma, alpha):
    return _certify(counts0, counts, sigma, alpha / 2)


@mutant("certify", estimation="POINT_ESTIMATE", abstain="ABSTENTION_MISSED")
def share_without_a_bound(counts0, counts, sigma, alpha):
    return _certify(counts0, counts, sigma, alpha, lambda k, n, alpha: min(k / n, 1 - 1e-9))


@mutant("certify", estimation="WRONG_RADIUS", abstain="ABSTENTION_MISSED")
def radius_from_the_upper_bound(counts0, counts, sigma, alpha):
    return _certify(
        counts0, counts, sigma, alpha, lambda k, n, alpha: stats.beta.ppf(1 - alpha, k + 1, n - k)
    )


@mutant("certify", estimation="WRONG_RADIUS")
def votes_of_the_first_sample_in_n(counts0, counts, sigma, alpha):
    n = int(counts0.sum() + counts.sum())
    return _certify(counts0, counts, sigma, alpha, lambda k, _, alpha: _right_bound(k, n, alpha))


@mutant("certify", abstain="ABSTENTION_MISSED")
def never_abstains(counts0, counts, sigma, alpha):
    label = int(counts0.argmax())
    bound = _right_bound(int(counts[label]), int(counts.sum()), alpha)
    return label, sigma * stats.norm.ppf(max(bound, 0.001))


@mutant("certify", abstain="ABSTENTION_MISSED")
def abstains_with_radius_zero(counts0, counts, sigma, alpha):
    return _certify(counts0, counts, sigma, alpha) or (int(counts0.argmax()), 0.0)


@mutant("certify", estimation="FALSE_ABSTENTION")
def both_samples_must_certify(counts0, counts, sigma, alpha):
    return _certify(counts0, counts0, sigma, alpha) and _certify(counts0, counts, sigma, alpha)


@mutant("certify", estimation="WRONG_RADIUS")
def certified_at_the_alpha_of_the_lesson(counts0, counts, sigma, alpha):
    return _certify(counts0, counts, sigma, 0.001)


@mutant("certify", everywhere="FALSE_ABSTENTION")
def abstains_always(counts0, counts, sigma, alpha):
    return None


# --- certified accuracy ------------------------------------------------------------------------------


def _right(certificate, label, r):
    return certificate is not None and certificate[0] == label and certificate[1] >= r


@mutant("certified_accuracy", ties="TIES_DROPPED")
def strictly_larger_radius(certificates, y, r):
    pairs = zip(certificates, y.tolist(), strict=True)
    return sum(_right(c, label, r) and c[1] > r for c, label in pairs) / len(y)


@mutant("certified_accuracy", abstentions="ABSTENTIONS_DROPPED")
def share_of_the_certified(certificates, y, r):
    pairs = zip(certificates, y.tolist(), strict=True)
    return sum(_right(c, label, r) for c, label in pairs) / sum(c is not None for c in certificates)


@mutant("certified_accuracy", correct="CLEAN_ERRORS_COUNTED")
def radius_alone(certificates, y, r):
    return sum(c is not None and c[1] >= r for c in certificates) / len(y)


@mutant(
    "certified_accuracy",
    correct="CLEAN_ERRORS_COUNTED",
    abstentions="ABSTENTIONS_DROPPED",
    ties="TIES_DROPPED",
)
def radius_alone_among_the_certified(certificates, y, r):
    radii = [c[1] for c in certificates if c is not None]
    return sum(radius > r for radius in radii) / len(radii)


@mutant("certified_accuracy", everywhere="WRONG_SHARE")
def abstentions_count_as_right(certificates, y, r):
    pairs = zip(certificates, y.tolist(), strict=True)
    return sum(c is None or _right(c, label, r) for c, label in pairs) / len(y)


@mutant("certified_accuracy", everywhere="WRONG_SHARE")
def number_certified(certificates, y, r):
    return sum(_right(c, label, r) for c, label in zip(certificates, y.tolist(), strict=True))


@mutant("certified_accuracy", everywhere="WRONG_SHARE")
def radius_ignored(certificates, y, r):
    return sum(_right(c, label, 0) for c, label in zip(certificates, y.tolist(), strict=True)) / len(y)


@mutant("certified_accuracy", everywhere="WRONG_SHAPE")
def verdict_for_each_image(certificates, y, r):
    return [_right(c, label, r) for c, label in zip(certificates, y.tolist(), strict=True)]


# --- interval of a linear layer ----------------------------------------------------------------------


def _right_interval(weight, bias, lower, upper):
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    spread = radius @ weight.abs().T
    return centre @ weight.T + bias - spread, centre @ weight.T + bias + spread


@mutant("interval_linear", everywhere="BOUNDS_CROSSED")
def signs_of_the_weights_ignored(weight, bias, lower, upper):
    return lower @ weight.T + bias, upper @ weight.T + bias


@mutant("interval_linear", everywhere="BOUND_ESCAPED")
def crossed_bounds_sorted(weight, bias, lower, upper):
    a, b = signs_of_the_weights_ignored(weight, bias, lower, upper)
    return torch.minimum(a, b), torch.maximum(a, b)


@mutant("interval_linear", everywhere="BIAS_IGNORED")
def bias_forgotten(weight, bias, lower, upper):
    return _right_interval(weight, 0 * bias, lower, upper)


@mutant("interval_linear", tight="BOUND_LOOSE")
def bias_as_an_uncertainty(weight, bias, lower, upper):
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    spread = radius @ weight.abs().T + bias.abs()
    return centre @ weight.T - spread, centre @ weight.T + spread


@mutant("interval_linear", everywhere="BOUND_ESCAPED")
def centre_only(weight, bias, lower, upper):
    centre = (lower + upper) / 2 @ weight.T + bias
    return centre, centre


@mutant("interval_linear", tight="BOUND_LOOSE")
def width_for_radius(weight, bias, lower, upper):
    centre, width = (lower + upper) / 2 @ weight.T + bias, (upper - lower) @ weight.abs().T
    return centre - width, centre + width


@mutant("interval_linear", tight="BOUND_LOOSE")
def widest_input_for_all(weight, bias, lower, upper):
    centre, radius = (lower + upper) / 2, ((upper - lower) / 2).amax(1, keepdim=True)
    spread = radius * weight.abs().sum(1)
    return centre @ weight.T + bias - spread, centre @ weight.T + bias + spread


@mutant("interval_linear", everywhere="BOUNDS_VACUOUS")
def plus_minus_a_million(weight, bias, lower, upper):
    ones = torch.ones(len(lower), len(weight))
    return -1e6 * ones, 1e6 * ones


@mutant("interval_linear", everywhere="WRONG_SHAPE")
def bounds_for_the_batch(weight, bias, lower, upper):
    a, b = _right_interval(weight, bias, lower, upper)
    return a.amin(0), b.amax(0)


# --- interval bound propagation ----------------------------------------------------------------------


def _box(x, eps):
    return (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)


def _magnitudes(layer):
    layer = copy.deepcopy(layer)
    layer.weight.data.abs_()
    layer.bias.data.zero_()
    return layer


def _propagate(model, lower, upper, magnitudes=_magnitudes, width=0.5):
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.ReLU | nn.Flatten):
                lower, upper = layer(lower), layer(upper)
            else:
                centre, spread = layer((lower + upper) / 2), magnitudes(layer)(width * (upper - lower))
                lower, upper = centre - spread, centre + spread
    return lower, upper


@mutant("ibp", everywhere="BOUND_ESCAPED")
def both_corners_through_the_network(model, x, eps):
    """What signs_of_the_weights_ignored comes to, layer by layer."""
    lower, upper = _box(x, eps)
    return model(lower), model(upper)


@mutant("ibp", everywhere="BOUND_ESCAPED")
def logits_of_the_image_alone(model, x, eps):
    return model(x), model(x)


@mutant("ibp", everywhere="BOUND_ESCAPED")
def half_of_eps(model, x, eps):
    return _propagate(model, *_box(x, eps / 2))


@mutant("ibp", tight="BOUND_LOOSE")
def biases_in_the_radius(model, x, eps):
    def magnitudes(layer):
        layer = copy.deepcopy(layer)
        layer.weight.data.abs_()
        layer.bias.data.abs_()
        return layer

    return _propagate(model, *_box(x, eps), magnitudes)


@mutant("ibp", everywhere="BOUND_ESCAPED")
def weights_of_the_radius_signed(model, x, eps):
    def signed(layer):
        layer = copy.deepcopy(layer)
        layer.bias.data.zero_()
        return layer

    lower, upper = _propagate(model, *_box(x, eps), signed)
    return torch.minimum(lower, upper), torch.maximum(lower, upper)


@mutant("ibp", tight="BOX_IGNORED")
def box_of_the_images_ignored(model, x, eps):
    return _propagate(model, x - eps, x + eps)


@mutant("ibp", tight="BOUND_LOOSE")
def widths_through_the_layers(model, x, eps):
    return _propagate(model, *_box(x, eps), width=1.0)


@mutant("ibp", sound="WEIGHTS_CHANGED")
def weights_made_positive_in_place(model, x, eps):
    def magnitudes(layer):
        layer.weight.data.abs_()
        return _magnitudes(layer)

    return _propagate(model, *_box(x, eps), magnitudes)


@mutant("ibp", everywhere="WRONG_SHAPE")
def lowest_logit_of_each_image(model, x, eps):
    lower, upper = _propagate(model, *_box(x, eps))
    return lower.amin(1), upper.amax(1)


declare("ibp", "bounds_of_nothing", lambda model, x, eps: (None, None), everywhere="NOT_FINITE")
declare(
    "ibp",
    "bounds_far_away",
    lambda model, x, eps: (model(x) - 1e6, model(x) + 1e6),
    everywhere="BOUNDS_VACUOUS",
)
