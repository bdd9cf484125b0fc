"""Contracts of certification: smoothing's votes, bound, radius and verdict; interval bounds of a network.

To abstain is to return None: it has no radius, and no sum or mean takes it for one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtr, ndtri  # type: ignore[import-untyped]
from torch import Tensor, nn

from robustkit.certify import confidence
from robustkit.contracts.attacks import HINTS, hygiene, side_effects
from robustkit.contracts.base import Array, Arrays, Contract, Finding, numbers, shaped, text
from robustkit.contracts.oracle import SHAPE, LinearOracle, uniform
from robustkit.device import seeded

# --- votes ----------------------------------------------------------------------------------------

N_VOTES = 6007  # a prime: no batch size divides it
_SEEDS = (1, 2, 3, 4, 5)
_VOTES = ("total", "noise", "hygiene")


def _draw_votes(seed: int) -> Arrays:
    """A linear model and two images, one inside the box, one in its corner, with p = Phi(t) on both.

    Most weights share a sign, so that noise which pixels share is too much noise.
    """
    generator = seeded(seed, "votes")
    dimension = int(np.prod(SHAPE))
    signs = np.ones(dimension)
    signs[torch.randperm(dimension, generator=generator)[:6].numpy()] = -1
    w = (uniform(generator, 0.05, 0.25, dimension) * signs).astype(np.float32)
    sigma, t = uniform(generator, 0.3, 0.5, 1).item(), uniform(generator, 0.8, 1.1, 1).item()
    inner = uniform(generator, 0.4, 0.6, dimension).astype(np.float32)
    edge = (w > 0).astype(np.float32)
    scale = sigma * np.linalg.norm(w.astype(np.float64))
    biases = [t * scale - (image.astype(np.float64) - 0.5) @ w for image in (inner, edge)]
    return {
        "w": w,
        "b": np.float32(biases[0]),
        "edge_b": np.float32(biases[1]),
        "sure_b": np.float32(biases[0] - 10 * scale),  # class 1 gets no vote at all
        "x": inner.reshape(1, *SHAPE),
        "y": np.ones(1, dtype=np.int64),
        "edge_x": edge.reshape(1, *SHAPE),
        "sigma": np.float64(sigma),
        "p": np.float64(ndtr(t)),
    }


def _observe_votes(votes: Any, case: Arrays) -> Arrays:
    def count(model: LinearOracle, image: Tensor, seed: int) -> Array:
        return numbers(votes(model, image, N_VOTES, float(case["sigma"]), 2, seeded(seed, "votes")))

    def counts(image: str, bias: str, seed: int = _SEEDS[0]) -> Array:
        model = LinearOracle(torch.from_numpy(case["w"]), float(case[bias])).eval()
        return count(model, torch.from_numpy(case[image][0].copy()), seed)

    def call(model: LinearOracle, x: Tensor, y: Tensor) -> Tensor:
        return torch.from_numpy(count(model, x[0], _SEEDS[0]))

    return {
        "inner": counts("x", "b"),
        "edge": counts("edge_x", "edge_b"),
        "sure": counts("x", "sure_b"),
        "seeds": np.stack([counts("x", "b", seed) for seed in _SEEDS]),
        "seeds_again": np.stack([counts("x", "b", seed) for seed in _SEEDS]),
        "left": text(side_effects(call, case)),
    }


def _judge_votes(case: Arrays, evidence: Arrays) -> list[Finding]:
    """Findings; those that chance decides strike a right program with a probability below 1e-7.

    A share six standard errors off: below 1e-8 for each image. The same count from five seeds: a single
    count has probability below 0.016, four coincidences below 7e-8.
    """
    names = ("inner", "edge", "sure")
    for name in names:
        if evidence[name].shape != (2,):
            hint = f"expected one count for each of the 2 classes, got shape {evidence[name].shape}"
            return [Finding(criterion, "WRONG_SHAPE", hint) for criterion in _VOTES]
    shaped(evidence, dict.fromkeys(("seeds", "seeds_again"), (len(_SEEDS), 2)))
    totals = np.array([evidence[name].sum() for name in names])
    if (np.abs(totals - 1) < 1e-6).all():
        hint = "these are shares; return counts, because a bound needs k and n"
        return [Finding(criterion, "SHARES_NOT_COUNTS", hint) for criterion in _VOTES]
    if all(np.array_equal(evidence[name], evidence["inner"]) for name in names):
        hint = "three models that disagree get the same votes; who casts them?"
        return [Finding(criterion, "MODEL_IGNORED", hint) for criterion in _VOTES]
    found = []
    if (totals != N_VOTES).any() or (evidence["seeds"].sum(1) != N_VOTES).any():
        wrong = next((total for total in totals if total != N_VOTES), totals[0])
        found.append(Finding("total", "TOTAL_NOT_N", f"asked for {N_VOTES} votes, counted {wrong:g}"))
    if reason := _wrong_noise(case, evidence):
        found.append(Finding("noise", *reason))
    found += hygiene(evidence)
    if not np.array_equal(evidence["seeds"], evidence["seeds_again"]):
        found.append(Finding("hygiene", "SEED_IGNORED", HINTS["SEED_IGNORED"]))
    # Votes that are all alike tell nothing of the seed.
    if evidence["inner"].all() and (evidence["seeds"] == evidence["seeds"][0]).all():
        found.append(Finding("hygiene", "SAME_FOR_EVERY_SEED", HINTS["SAME_FOR_EVERY_SEED"]))
    return found


def _wrong_noise(case: Arrays, evidence: Arrays) -> tuple[str, str] | None:
    """Why the shares of votes are not those of Gaussian noise of scale sigma, or None."""
    p = float(case["p"])
    inner, edge, sure = (
        float(evidence[name][1] / max(evidence[name].sum(), 1)) for name in ("inner", "edge", "sure")
    )
    off = max(abs(inner - p), abs(edge - p)) / np.sqrt(p * (1 - p) / N_VOTES)
    if off <= 6 and sure == 0:
        return None
    if inner in (0, 1):
        return "NOISE_SHARED", "every copy votes alike; is each given noise of its own, of mean zero?"
    if edge < 0.3 and 0.6 < inner < 0.97:
        hint = "an image in the corner of the box gets other votes than the theorem says: what becomes of its noise?"
        return "NOISE_CLAMPED", hint
    return "NOISE_SCALE", f"a class that Gaussian noise of scale sigma gives {p:.1%} gets {inner:.1%}"


VOTES = Contract(_VOTES, _draw_votes, _observe_votes, _judge_votes, essential=("noise",), hidden=("p",))


# --- lower bound ----------------------------------------------------------------------------------

_ALPHAS = (0.05, 0.01, 0.001)
_EDGES = ((0, 40), (40, 40), (1000, 1000))  # (k, n)
_BOUND = ("value", "edges")


def _draw_bounds(seed: int) -> Arrays:
    generator = seeded(seed, "bounds")
    n = torch.randint(100, 5000, (6,), generator=generator).numpy()
    n[0] = 20 + n[0] % 40  # small: there an approximation shows
    k = (n * uniform(generator, 0.3, 0.97, 6)).astype(np.int64)
    k[0] = n[0] - 2
    alphas = np.tile(_ALPHAS, 2)[torch.randperm(6, generator=generator).numpy()]
    return {"k": k, "n": n, "alpha": alphas}


def _observe_bounds(lower_bound: Any, case: Arrays) -> Arrays:
    rows = list(zip(case["k"].tolist(), case["n"].tolist(), case["alpha"].tolist(), strict=True))
    edges = np.stack([numbers(lower_bound(k, n, 0.001)) for k, n in _EDGES])
    return {
        "inner": np.stack([numbers(lower_bound(*row)) for row in rows]),
        # A quantile that does not exist is NaN: it costs the edges, not everything.
        "edges": np.where(np.isnan(edges), -1.0, edges),
    }


def _bounds(case: Arrays, share: float = 1.0) -> Array:
    """The lower bounds at `share` * alpha."""
    rows = zip(case["k"].tolist(), case["n"].tolist(), case["alpha"].tolist(), strict=True)
    return np.array([confidence.lower_bound(k, n, share * alpha) for k, n, alpha in rows])


def _judge_bounds(case: Arrays, evidence: Arrays) -> list[Finding]:
    got, edges, found = evidence["inner"], evidence["edges"], []
    if got.shape != case["k"].shape or edges.shape != (len(_EDGES),):
        hint = "expected one number, the lower bound alone"
        return [Finding(criterion, "WRONG_SHAPE", hint) for criterion in _BOUND]

    def near(values: Array) -> bool:
        return bool(np.abs(got - values).max() <= 1e-5)

    if not near(_bounds(case)):
        p, z = case["k"] / case["n"], -ndtri(case["alpha"])
        code, hint = "WRONG_BOUND", f"{case['k'][0]} of {case['n'][0]}: {got[0]:.5f} is not the exact bound"
        if near(_bounds(case, 0.5)):
            code, hint = "TWO_SIDED_BOUND", "half of alpha is spent on an upper bound that nobody needs"
        elif near(p - z * np.sqrt(p * (1 - p) / case["n"])):
            code, hint = (
                "NORMAL_BOUND",
                "this is the normal approximation; a certificate needs an exact bound",
            )
        elif (got > case["k"] / case["n"]).any():
            code, hint = "BOUND_ABOVE_SHARE", "a lower bound lies below the share that was observed"
        found.append(Finding("value", code, hint))
    expected = [confidence.lower_bound(k, n, 0.001) for k, n in _EDGES]
    for (k, n), value, right in zip(_EDGES, edges, expected, strict=True):
        if abs(value - right) > 1e-5:
            found.append(Finding("edges", "EDGE_CASES", f"{k} of {n} votes at alpha 0.001: {value:g}"))
            break
    return found


LOWER_BOUND = Contract(_BOUND, _draw_bounds, _observe_bounds, _judge_bounds)


# --- certified radius -----------------------------------------------------------------------------

_RADIUS = ("value", "abstain")


def _draw_shares(seed: int) -> Arrays:
    generator = seeded(seed, "shares")
    share = np.concatenate(
        [
            uniform(generator, 0.51, 0.8, 3),
            uniform(generator, 0.9, 0.999, 3),
            uniform(generator, 0.05, 0.49, 3),
            np.array([0.5]),
        ]
    )
    return {"share": share, "sigma": uniform(generator, 0.12, 0.9, len(share))}


def _observe_radii(certified_radius: Any, case: Arrays) -> Arrays:
    rows = zip(case["share"].tolist(), case["sigma"].tolist(), strict=True)
    radii = [certified_radius(share, sigma) for share, sigma in rows]
    return {
        "certified": np.array([radius is not None for radius in radii]),
        "radius": np.array([0.0 if radius is None else float(radius) for radius in radii]),
    }


def _judge_radii(case: Arrays, evidence: Arrays) -> list[Finding]:
    share, sigma = case["share"], case["sigma"]
    shaped(evidence, dict.fromkeys(("certified", "radius"), share.shape))
    certified, radius, found = evidence["certified"].astype(bool), evidence["radius"], []
    above = share > 0.5
    quantile = ndtri(share)
    if not certified.any():  # to abstain earns something where something else is certified
        return [
            Finding(criterion, "FALSE_ABSTENTION", "nothing at all is certified") for criterion in _RADIUS
        ]
    if not certified[above].all():
        which = share[above & ~certified][0]
        hint = f"p_lower {which:.3f} is above one half, and certifies something"
        found.append(Finding("value", "FALSE_ABSTENTION", hint))
    elif np.abs(radius - sigma * quantile)[above].max() > 1e-3 * sigma.min():
        code, hint = (
            "WRONG_RADIUS",
            f"p_lower {share[0]:.3f}, sigma {sigma[0]:.3f}: {radius[0]:.4f} is not the radius",
        )
        if np.abs(radius - quantile)[above].max() <= 1e-3:
            code, hint = "SIGMA_IGNORED", "the radius does not grow with the noise; in which units is it?"
        found.append(Finding("value", code, hint))
    if certified[~above].any():
        i = int(np.flatnonzero(~above & certified)[0])
        hint = f"p_lower {share[i]:.3f} certifies nothing, your radius is {radius[i]:.4f}; None says so"
        found.append(Finding("abstain", "ABSTENTION_MISSED", hint))
    return found


CERTIFIED_RADIUS = Contract(_RADIUS, _draw_shares, _observe_radii, _judge_radii, essential=("value",))


# --- certify --------------------------------------------------------------------------------------

CLASSES = 10
# Rows of every case: certified (three), top of the second sample alone, too close to call.
_CLEAR, _REVERSED, _CLOSE = (0, 1, 2), 3, 4
_CERTIFY = ("selection", "estimation", "abstain")


def _spread(k: int, n: int, label: int) -> Array:
    """k votes for a label, the rest over the other classes as evenly as can be."""
    counts = np.full(CLASSES, (n - k) // (CLASSES - 1))
    counts[np.arange(CLASSES) == label] = k
    counts[(label + 1) % CLASSES] += n - counts.sum()
    return counts


def _draw_samples(seed: int) -> Arrays:
    generator = seeded(seed, "samples")
    labels = torch.randperm(CLASSES, generator=generator)[:5].numpy()
    n = 1000 + 10 * int(torch.randint(0, 100, (), generator=generator))
    shares = uniform(generator, 0.7, 0.95, 3)
    first = [_spread(100 if row == 0 else 60, 100, labels[row]) for row in _CLEAR]
    second = [_spread(int(n * share), n, labels[row]) for row, share in zip(_CLEAR, shares, strict=True)]
    first.append(_spread(50, 100, labels[_REVERSED]))
    second.append(_spread(int(0.9 * n), n, (labels[_REVERSED] + 1) % CLASSES))
    first.append(_spread(50, 100, labels[_CLOSE]))
    second.append(_spread(int(n / 2 + 0.5 * np.sqrt(n)), n, labels[_CLOSE]))  # one standard error above 1/2
    return {
        "first": np.stack(first),
        "second": np.stack(second),
        "sigma": uniform(generator, 0.12, 0.9, 5),
        "alpha": np.tile(np.array(_ALPHAS)[torch.randperm(3, generator=generator).numpy()], 2)[:5],
    }


def _observe_certify(certify: Any, case: Arrays) -> Arrays:
    rows = zip(
        torch.from_numpy(case["first"].copy()),
        torch.from_numpy(case["second"].copy()),
        case["sigma"].tolist(),
        case["alpha"].tolist(),
        strict=True,
    )
    answers = [certify(*row) for row in rows]
    pairs = [(-1, 0.0) if answer is None else tuple(answer) for answer in answers]
    return {
        "certified": np.array([answer is not None for answer in answers]),
        "label": np.array([int(label) for label, _ in pairs]),
        "radius": np.array([float(radius) for _, radius in pairs]),
    }


def _radii(case: Arrays, counts: Array, factor: float = 1.0) -> Array:
    """What the clear rows certify for the first sample's class, from these counts at `factor` * alpha."""
    rows = [(counts[row], case["first"][row].argmax(), case["alpha"][row]) for row in _CLEAR]
    bounds = [confidence.lower_bound(int(c[top]), int(c.sum()), factor * a) for c, top, a in rows]
    return np.asarray(case["sigma"][: len(_CLEAR)] * ndtri(np.array(bounds)))


def _judge_certify(case: Arrays, evidence: Arrays) -> list[Finding]:
    first, second = case["first"], case["second"]
    shaped(evidence, dict.fromkeys(("certified", "label", "radius"), (len(first),)))
    certified = evidence["certified"].astype(bool)
    label, radius, found = evidence["label"], evidence["radius"], []
    clear = list(_CLEAR)
    selected = first.argmax(1)
    if not certified.any():
        return [
            Finding(criterion, "FALSE_ABSTENTION", "nothing at all is certified") for criterion in _CERTIFY
        ]
    if (label[certified] != selected[certified]).any():
        if certified[_REVERSED] and label[_REVERSED] == second[_REVERSED].argmax():
            hint = "the class is the second sample's: the bound is then for the luckiest of ten classes"
            reason = "SELECTION_REUSED", hint
        else:
            reason = "WRONG_CLASS", "the class certified is not the first sample's most frequent"
        found.append(Finding("selection", *reason))
    if not certified[clear].all():
        row = int(np.flatnonzero(~certified[clear])[0])
        hint = f"{second[row].max()} of {second[row].sum()} votes certify something"
        found.append(Finding("estimation", "FALSE_ABSTENTION", hint))
    else:
        found += _estimation(case, radius[clear])
    if certified[_CLOSE] or (certified[_REVERSED] and label[_REVERSED] == selected[_REVERSED]):
        row = _CLOSE if certified[_CLOSE] else _REVERSED
        hint = (
            f"{second[row][selected[row]]} of {second[row].sum()} votes do not show a majority; None says so"
        )
        found.append(Finding("abstain", "ABSTENTION_MISSED", hint))
    return found


def _estimation(case: Arrays, radius: Array) -> list[Finding]:
    """Judge the radii of the rows that certify."""

    def near(radii: Array) -> bool:
        return bool(np.abs(radius - radii).max() <= 1e-3 * case["sigma"].min())

    second, rows = case["second"], slice(len(_CLEAR))
    share = second[rows].max(1) / second[rows].sum(1)
    if near(_radii(case, second)):
        return []
    if near(_radii(case, second, 0.5)):
        reason = "TWO_SIDED_BOUND", "half of alpha is spent on an upper bound that nobody needs"
    elif near(_radii(case, second + case["first"])):
        reason = "SAMPLES_POOLED", "the votes that chose the class are counted again for its bound"
    elif near(case["sigma"][rows] * ndtri(share)):
        reason = "POINT_ESTIMATE", "the share observed is no bound: at what confidence does this radius hold?"
    else:
        off = radius - _radii(case, second)
        row = int(np.abs(off).argmax())
        side = "above" if off[row] > 0 else "below"
        shown = f"{share[row]:.1%} of {second[row].sum()} votes at alpha {case['alpha'][row]:g}"
        reason = "WRONG_RADIUS", f"the radius of {shown} is {side} what they show"
    return [Finding("estimation", *reason)]


CERTIFY = Contract(
    _CERTIFY, _draw_samples, _observe_certify, _judge_certify, essential=("selection", "estimation")
)


# --- certified accuracy ---------------------------------------------------------------------------

_RADII = (0.0, 0.25, 0.3, 0.5, 0.55)  # 0.25 and 0.5 are radii of images too
_ACCURACY = ("correct", "abstentions", "ties")
_MISTAKES = {
    "correct": (
        "CLEAN_ERRORS_COUNTED",
        "a certificate for the wrong class, however large, is no robust success",
    ),
    "abstentions": ("ABSTENTIONS_DROPPED", "images without a certificate are images all the same"),
    "ties": ("TIES_DROPPED", "a certificate of just this radius holds at this radius"),
}


def _draw_certificates(seed: int) -> Arrays:
    generator = seeded(seed, "certificates")
    n = 60
    y = torch.randint(0, CLASSES, (n,), generator=generator).numpy()
    state = torch.arange(n)[torch.randperm(n, generator=generator)].numpy()  # who errs, who abstains
    label = np.where(state < 12, (y + 1) % CLASSES, y)
    label[state >= 50] = -1  # no certificate
    radius = torch.randint(1, 8, (n,), generator=generator).numpy() / 8
    radius[(state == 0) | (state == 20)], radius[(state == 1) | (state == 21)] = 0.25, 0.5
    radius[state == 2] = 0.875
    return {"y": y, "label": label, "radius": radius}


def _observe_certified_accuracy(certified_accuracy: Any, case: Arrays) -> Arrays:
    pairs = zip(case["label"].tolist(), case["radius"].tolist(), strict=True)
    certificates = [None if label < 0 else (label, radius) for label, radius in pairs]
    y = torch.from_numpy(case["y"].copy())
    return {"shares": np.stack([numbers(certified_accuracy(list(certificates), y, r)) for r in _RADII])}


def _judge_certified_accuracy(case: Arrays, evidence: Arrays) -> list[Finding]:
    got = evidence["shares"]
    if got.shape != (len(_RADII),):
        hint = f"expected one number for each radius, got shape {got.shape[1:]}"
        return [Finding(criterion, "WRONG_SHAPE", hint) for criterion in _ACCURACY]
    # Fewest mistakes first: with none the answer is right.
    for mistakes in sorted(itertools.product((False, True), repeat=3), key=sum):
        if np.abs(got - _accuracies(case, *mistakes)).max() < 1e-6:
            made = [name for name, mistake in zip(_ACCURACY, mistakes, strict=True) if mistake]
            return [Finding(name, *_MISTAKES[name]) for name in made]
    hint = f"{got[1]:.3f} is not the share of all images that are certified at 0.25 for the right class"
    return [Finding(criterion, "WRONG_SHARE", hint) for criterion in _ACCURACY]


def _accuracies(case: Arrays, errors_counted: bool, abstentions_dropped: bool, ties_dropped: bool) -> Array:
    """The shares at every radius, with these mistakes."""
    certified = case["label"] >= 0
    right = certified if errors_counted else case["label"] == case["y"]
    holds = np.greater if ties_dropped else np.greater_equal
    n = certified.sum() if abstentions_dropped else len(certified)
    return np.array([(right & holds(case["radius"], r)).sum() / n for r in _RADII])


CERTIFIED_ACCURACY = Contract(
    _ACCURACY, _draw_certificates, _observe_certified_accuracy, _judge_certified_accuracy
)


# --- interval bounds ------------------------------------------------------------------------------

_INTERVAL = ("sound", "tight")
_SLACK = 1e-4  # of float32, on values around one


def _draw_layer(seed: int) -> Arrays:
    generator = seeded(seed, "layer")
    weight, lower = torch.randn(5, 8, generator=generator), torch.randn(6, 8, generator=generator)
    bias = torch.randn(5, generator=generator)
    upper = lower + torch.rand(6, 8, generator=generator)
    arrays = {"weight": weight, "bias": bias, "lower": lower, "upper": upper}
    return {name: value.numpy() for name, value in arrays.items()}


def _observe_layer(interval_linear: Any, case: Arrays) -> Arrays:
    given = [torch.from_numpy(case[name].copy()) for name in ("weight", "bias", "lower", "upper")]
    lower, upper = interval_linear(*given)
    return {"lower": numbers(lower), "upper": numbers(upper)}


def _linear(weight: Array, bias: Array, lower: Array, upper: Array) -> tuple[Array, Array]:
    """The exact range: each output takes its extremes at the corner that the weights' signs choose."""
    positive, negative = np.maximum(weight, 0).T, np.minimum(weight, 0).T
    return lower @ positive + upper @ negative + bias, upper @ positive + lower @ negative + bias


def _escape(lower: Array, upper: Array, reached: Sequence[Array]) -> float:
    """By how much values that are reached lie outside the bounds."""
    return max(float(np.maximum(lower - value, value - upper).max()) for value in reached)


def _judge_layer(case: Arrays, evidence: Arrays) -> list[Finding]:
    weight, bias, low, high = (case[name].astype(np.float64) for name in ("weight", "bias", "lower", "upper"))
    exact = _linear(weight, bias, low, high)
    lower, upper = evidence["lower"], evidence["upper"]
    if lower.shape != exact[0].shape or upper.shape != exact[0].shape:
        hint = f"expected two arrays of shape {exact[0].shape}, got {lower.shape} and {upper.shape}"
        return [Finding(criterion, "WRONG_SHAPE", hint) for criterion in _INTERVAL]
    if _off((lower, upper), exact) <= _SLACK:
        return []
    if _vacuous((lower, upper), exact):
        return [Finding(criterion, *_SAYS_NOTHING) for criterion in _INTERVAL]
    escape = _escape(lower, upper, exact)
    if _off((lower, upper), _linear(weight, 0 * bias, low, high)) <= _SLACK:
        reason = "BIAS_IGNORED", "the bounds are those of the layer without its bias"
    elif (lower > upper).any():
        reason = "BOUNDS_CROSSED", "a lower bound lies above its upper bound; which weights turn them around?"
    elif escape > _SLACK:
        reason = "BOUND_ESCAPED", f"a point of the box gives a value {escape:.3f} outside the bounds"
    else:
        return [Finding("tight", "BOUND_LOOSE", "the bounds hold, and are wider than they need be")]
    return [Finding(criterion, *reason) for criterion in _INTERVAL]


def _off(got: Sequence[Array], expected: Sequence[Array]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(got, expected, strict=True))


_SAYS_NOTHING = "BOUNDS_VACUOUS", "the bounds are so wide that they say nothing"


def _vacuous(got: Sequence[Array], expected: Sequence[Array]) -> bool:
    """Whether bounds hold only because they are far away: a hundred times as wide as they should be, or all alike."""
    alike = all(bool((side == side[0]).all()) for side in got)
    return alike or bool((got[1] - got[0]).mean() > 100 * (expected[1] - expected[0]).mean())


INTERVAL_LINEAR = Contract(_INTERVAL, _draw_layer, _observe_layer, _judge_layer)


# --- interval bound propagation -------------------------------------------------------------------

_NETWORKS = ("mixed", "monotone")
_LAYERS = ("conv", "first", "second", "out")  # three linear ones: what an even number undoes shows as well
_WEIGHTS = tuple(f"{layer}.{kind}" for layer in _LAYERS for kind in ("weight", "bias"))


def _draw_network(seed: int) -> Arrays:
    """Weights, an eps, and images of which the first half keeps away from the edge of the box."""
    generator = seeded(seed, "network")
    eps = uniform(generator, 0.06, 0.12, 1).item()
    shapes = [(2, 1, 3, 3), (2,), (12, 18), (12,), (8, 12), (8,), (3, 8), (3,)]
    weights = [0.5 * torch.randn(shape, generator=generator) for shape in shapes]
    weights[1::2] = [0.05 + bias.abs() for bias in weights[1::2]]  # no layer is dead
    x = torch.rand(8, 1, 6, 6, generator=generator)
    x[:4] = 0.2 + 0.6 * x[:4]
    return {
        **{name: value.numpy() for name, value in zip(_WEIGHTS, weights, strict=True)},
        "x": x.numpy(),
        "eps": np.float64(eps),
    }


def _weights(case: Arrays, network: str) -> list[Tensor]:
    """The drawn weights; all positive in the monotone network, where interval bounds are attained."""
    drawn = [torch.from_numpy(case[name].copy()) for name in _WEIGHTS]
    return [value.abs() if network == "monotone" and value.dim() > 1 else value for value in drawn]


def _network(case: Arrays, network: str) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):  # the layers' first weights come from the global state
        model = nn.Sequential(
            nn.Conv2d(1, 2, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(18, 12),
            nn.ReLU(),
            nn.Linear(12, 8),
            nn.ReLU(),
            nn.Linear(8, 3),
        )
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), _weights(case, network), strict=True):
            parameter.copy_(value)
    return model.eval()


def _observe_network(ibp_bounds: Any, case: Arrays) -> Arrays:
    seen: Arrays = {}
    for network in _NETWORKS:
        model = _network(case, network)
        lower, upper = ibp_bounds(model, torch.from_numpy(case["x"].copy()), float(case["eps"]))
        seen[f"{network}_lower"], seen[f"{network}_upper"] = numbers(lower), numbers(upper)
        kept = zip(model.parameters(), _weights(case, network), strict=True)
        seen[f"{network}_kept"] = np.bool_(all(torch.equal(after, before) for after, before in kept))
    return seen


def _convolution(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, stride=2, padding=1)


def _propagate(case: Arrays, network: str, low: Array, high: Array) -> tuple[Array, Array]:
    """Plain interval bounds of the logits in float64; those of a point are its logits."""
    kernel, offset, *rest = (value.double() for value in _weights(case, network))
    lower, upper = torch.from_numpy(low), torch.from_numpy(high)
    none = torch.zeros_like(offset)
    rising, falling = kernel.clamp_min(0), kernel.clamp_max(0)
    a = _convolution(rising, offset, lower) + _convolution(falling, none, upper)
    b = _convolution(rising, offset, upper) + _convolution(falling, none, lower)
    low, high = a.flatten(1).numpy(), b.flatten(1).numpy()
    for weight, bias in zip(rest[::2], rest[1::2], strict=True):
        low, high = _linear(weight.numpy(), bias.numpy(), np.maximum(low, 0), np.maximum(high, 0))
    return low, high


def _reached(case: Arrays, network: str, low: Array, high: Array) -> list[Array]:
    """The logits at the box's extreme corners and at random ones."""
    random = np.random.default_rng(0)
    points = [low, high, *(np.where(random.random(low.shape) < 0.5, low, high) for _ in range(50))]
    return [_propagate(case, network, point, point)[0] for point in points]


def _judge_network(case: Arrays, evidence: Arrays) -> list[Finding]:
    x, eps, found = case["x"].astype(np.float64), float(case["eps"]), {}
    low, high = np.clip(x - eps, 0, 1), np.clip(x + eps, 0, 1)
    for network in _NETWORKS:
        lower, upper = evidence[f"{network}_lower"], evidence[f"{network}_upper"]
        shaped(evidence, {f"{network}_kept": ()})
        if lower.shape != (len(x), 3) or upper.shape != (len(x), 3):
            hint = f"expected two arrays of shape {(len(x), 3)}, got {lower.shape} and {upper.shape}"
            return [Finding(criterion, "WRONG_SHAPE", hint) for criterion in _INTERVAL]
        if not evidence[f"{network}_kept"].item():
            found["sound"] = "WEIGHTS_CHANGED", HINTS["WEIGHTS_CHANGED"]
        exact = _propagate(case, network, low, high)
        if _vacuous((lower, upper), exact):
            return [Finding(criterion, *_SAYS_NOTHING) for criterion in _INTERVAL]
        escape = _escape(lower, upper, _reached(case, network, low, high))
        if escape > _SLACK:
            hint = f"an image inside the ball has a logit {escape:.3f} outside your bounds"
            found["sound"] = found["tight"] = "BOUND_ESCAPED", hint
        elif _off((lower, upper), exact) > _SLACK:
            code, hint = "BOUND_LOOSE", "the bounds are not those of interval arithmetic, layer by layer"
            if _off((lower, upper), _propagate(case, network, x - eps, x + eps)) <= _SLACK:
                code, hint = "BOX_IGNORED", "the bounds also cover points that are no images"
            found.setdefault("tight", (code, hint))
    return [Finding(criterion, *reason) for criterion, reason in found.items()]


IBP = Contract(_INTERVAL, _draw_network, _observe_network, _judge_network)
