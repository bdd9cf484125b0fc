"""Interval and CROWN-IBP bounds, against exact minima from mixed-integer programs and against attacks."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from robustkit import data, models
from robustkit.attacks import pgd
from robustkit.certify import bounds
from robustkit.certify.bounds import (
    ROUNDING,
    crown_ibp_margins,
    ibp_margins,
    proved,
    relaxation,
    verified_accuracy,
)
from robustkit.device import seeded
from robustkit.errors import RobustkitError
from robustkit.evaluate import predict
from robustkit.losses import margin
from robustkit.models import Normalize
from robustkit.threat import Ball
from tests.oracle import dataset, interior, linear_data
from tests.oracle import linear as linear_oracle

METHODS = [ibp_margins, crown_ibp_margins]


def tiny(seed: int, kind: str) -> tuple[nn.Sequential, torch.Size]:
    """Networks small enough to be solved exactly, with every kind of layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "linear":
            net = nn.Sequential(
                *(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
            )
            return net.double(), torch.Size((4,))
        net = nn.Sequential(
            Normalize((0.3, 0.6), (0.2, 0.4)),
            nn.Sequential(nn.Conv2d(2, 2, 2, stride=2, padding=1), nn.ReLU()),
            nn.Conv2d(2, 3, 2, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, 3, bias=seed % 2 == 0),
        )
        return net.double(), torch.Size((2, 4, 5))  # width 5: a column the strided convolution never reads


def affine(layers: list[nn.Module], shape: torch.Size) -> tuple[np.ndarray, np.ndarray, torch.Size]:
    """The matrix and offset of a chain without ReLU, by evaluating it on the basis."""
    chain = nn.Sequential(*layers)
    with torch.no_grad():
        offset = chain(torch.zeros(1, *shape, dtype=torch.float64))
        columns = chain(torch.eye(shape.numel(), dtype=torch.float64).view(-1, *shape)) - offset
    return columns.flatten(1).T.numpy(), offset.flatten().numpy(), offset.shape[1:]


def exact_margin(net: nn.Sequential, x: torch.Tensor, y: int, other: int, ball: Ball) -> float:
    """The minimum of logit y less logit `other` over the box: a mixed-integer program, one binary a ReLU.

    Each unit v = relu(z), z in [l, u], becomes v >= 0, v >= z, v <= u b, v <= z - l (1 - b).
    """
    chains: list[list[nn.Module]] = [[]]
    for layer in (part for block in net for part in (block if isinstance(block, nn.Sequential) else [block])):
        if isinstance(layer, nn.ReLU):
            chains.append([])
        else:
            chains[-1].append(layer)
    pieces, shape = [], x.shape
    for chain in chains:
        matrix, offset, shape = affine(chain, shape)
        pieces.append((matrix, offset))
    d, hidden = x.numel(), [len(offset) for _, offset in pieces[:-1]]
    total = d + 2 * sum(hidden)  # inputs, then (values, binaries) of each layer
    flat = x.flatten().numpy()
    least, most, integral = np.zeros(total), np.ones(total), np.zeros(total)
    least[:d], most[:d] = np.clip(flat - ball.eps, 0, 1), np.clip(flat + ball.eps, 0, 1)
    rows, low, high = [], [], []
    before, at = slice(0, d), d
    for (matrix, offset), size in zip(pieces[:-1], hidden, strict=True):
        for i in range(size):
            value, binary = at + i, at + size + i
            z, v, b = np.zeros(total), np.eye(1, total, value)[0], np.eye(1, total, binary)[0]
            z[before] = matrix[i]
            ends = np.stack([matrix[i] * least[before], matrix[i] * most[before]])
            smallest, largest = ends.min(0).sum() + offset[i], ends.max(0).sum() + offset[i]
            rows += [v - z, v - max(largest, 0) * b, v - z - min(smallest, 0) * b]
            low += [offset[i], -np.inf, -np.inf]
            high += [np.inf, 0.0, offset[i] - min(smallest, 0)]
            most[value], integral[binary] = max(largest, 0), 1
        before, at = slice(at, at + size), at + 2 * size
    matrix, offset = pieces[-1]
    cost = np.zeros(total)
    cost[before] = matrix[y] - matrix[other]
    solved = milp(
        cost,
        constraints=LinearConstraint(np.array(rows), low, high),
        bounds=Bounds(least, most),
        integrality=integral,
    )
    assert solved.success, solved.message
    return float(solved.fun + offset[y] - offset[other])


CASES = [(seed, "linear", eps) for seed in range(4) for eps in (0.02, 0.1, 0.3)]
CASES += [(seed, "conv", eps) for seed in (0, 1) for eps in (0.02, 0.1)]


def case(seed: int, kind: str) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    net, shape = tiny(seed, kind)
    x = torch.rand((3, *shape), generator=seeded(seed, kind), dtype=torch.float64)
    return net, x, torch.tensor([0, 1, 2])


def gaps(margins, seed: int, kind: str, eps: float) -> torch.Tensor:
    """Exact minimum less bound, for every image and wrong class: never negative for a sound bound."""
    net, x, y = case(seed, kind)
    with torch.no_grad():
        found = margins(net, x, y, Ball("Linf", eps))
    assert found.shape == (3, 3)
    assert (found.diagonal().abs() < 1e-12).all(), "the true class has margin zero to itself"
    exact = [
        [exact_margin(net, x[i], int(y[i]), j, Ball("Linf", eps)) for j in range(3) if j != y[i]]
        for i in range(3)
    ]
    return torch.tensor(exact) - torch.stack([found[i][torch.arange(3) != y[i]] for i in range(3)])


@pytest.mark.parametrize(("seed", "kind", "eps"), CASES)
def test_no_bound_exceeds_the_exact_minimum(seed, kind, eps):
    intervals, crown = (gaps(method, seed, kind, eps) for method in METHODS)
    assert intervals.min() > -1e-6
    assert crown.min() > -1e-6
    assert max(intervals.max(), crown.max()) < 1, "and the bounds are not empty"


def test_the_relaxation_is_tighter_on_the_whole_though_not_everywhere():
    loose, tight = (
        torch.stack([gaps(method, seed, "linear", 0.1).mean() for seed in range(4)]) for method in METHODS
    )
    assert tight.mean() < 0.2 * loose.mean()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_crown_ibp_is_exact_while_no_relu_changes_state(kind):
    for seed in range(4):
        assert gaps(crown_ibp_margins, seed, kind, 1e-5).abs().max() < 1e-7


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_at_eps_zero_both_are_the_margins_themselves(method, kind):
    net, x, y = case(1, kind)
    with torch.no_grad():
        logits = net(x)
        found = method(net, x, y, Ball("Linf", 0.0))
    assert torch.allclose(found, logits.gather(1, y[:, None]) - logits, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_on_a_linear_model_both_are_the_closed_form(method):
    """z - eps ||w||_1 away from the walls: elision alone makes interval arithmetic exact."""
    oracle = linear_oracle()
    data = linear_data(oracle)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([-oracle.w, oracle.w]))
        net[1].bias.copy_(torch.stack([-oracle.b, oracle.b]))
        found = method(net, data.x, data.y, Ball("Linf", 0.2))
    other = found.gather(1, 1 - data.y[:, None]).squeeze(1)
    z = (data.x.flatten(1) @ oracle.w + oracle.b).detach()
    expected = 2 * ((2 * data.y - 1) * z - 0.2 * oracle.w.detach().abs().sum())
    assert torch.allclose(other, expected, atol=1e-5)


def test_the_box_is_cut_where_images_end():
    net, x, y = case(0, "linear")
    white = torch.ones_like(x)
    with torch.no_grad():
        wide = ibp_margins(net, white, y, Ball("Linf", 1.0))
        assert torch.equal(wide, ibp_margins(net, white, y, Ball("Linf", 9.0)))


LOWER = torch.tensor([-2.0, -1.0, 0.5, -3.0, -1.0, 0.0, -1.0], dtype=torch.float64)
UPPER = torch.tensor([1.0, 2.0, 3.0, -1.0, 0.0, 2.0, 1.0], dtype=torch.float64)


def holds(lines) -> bool:
    """Whether ReLU lies between the lines all along their intervals."""
    below, above, intercept = lines(LOWER, UPPER)
    z = LOWER + torch.linspace(0, 1, 21, dtype=torch.float64)[:, None] * (UPPER - LOWER)
    relu = z.relu()
    return bool(((below * z <= relu + 1e-12) & (relu <= above * z + intercept + 1e-12)).all())


def test_the_lines_hold_relu_and_touch_it():
    assert holds(relaxation)
    _, above, intercept = relaxation(LOWER, UPPER)
    assert torch.allclose(above * UPPER + intercept, UPPER.relu())
    assert torch.allclose(above * LOWER + intercept, LOWER.relu())


WRONG_LINES = {
    "no intercept": lambda lower, upper: (*relaxation(lower, upper)[:2], torch.zeros_like(lower)),
    "lines exchanged": lambda lower, upper: tuple(relaxation(lower, upper)[i] for i in (1, 0, 2)),
    "always active": lambda lower, upper: (
        torch.ones_like(lower),
        torch.ones_like(lower),
        torch.zeros_like(lower),
    ),
}


@pytest.mark.parametrize("name", WRONG_LINES)
def test_wrong_lines_do_not_hold_relu(name):
    assert not holds(WRONG_LINES[name])


@pytest.mark.parametrize("name", ["no intercept", "always active"])
def test_a_wrong_relaxation_is_found_unsound(name, monkeypatch):
    monkeypatch.setattr(bounds, "relaxation", WRONG_LINES[name])
    assert gaps(crown_ibp_margins, 0, "linear", 0.3).min() < -1e-3


def test_intervals_without_absolute_weights_are_found_unsound(monkeypatch):
    def signed(weight, lower, upper):
        return (weight @ lower[:, :, None]).squeeze(2)

    monkeypatch.setattr(bounds, "_lowest", signed)
    assert gaps(ibp_margins, 0, "linear", 0.3).min() < -1e-3


# --- soundness against attacks -----------------------------------------------------------------------


@pytest.mark.parametrize(("method", "eps"), [(ibp_margins, 0.004), (crown_ibp_margins, 0.01)])
def test_no_attack_breaks_what_is_proved(method, eps):
    """A trained network, images near its boundary included, 3 restarts each: over a thousand tries."""
    model, ball = models.pretrained("mnist-clean"), Ball("Linf", eps)
    x = data.load("digits", "test").x
    with torch.no_grad():
        y = model(x).argmax(1)
        lower = method(model, x, y, ball)
    sure = proved(lower, y)
    assert 20 < int(sure.sum()) < len(x) - 20
    for restart in range(3):
        tried = pgd(
            *(model, x, y, ball), steps=10, loss=margin, generator=seeded("restart", restart, method.__name__)
        )
        with torch.no_grad():
            logits = model(tried)
        reached = logits.gather(1, y[:, None]) - logits
        assert (reached >= lower - 1e-4).all(), "every margin, broken or not, stays above its bound"
        assert predict(model, tried, y)[sure].all()
        assert not predict(model, tried, y).all(), "the attack does break images that are not proved"


def test_verified_accuracy_counts_right_and_proved_images():
    model, ball = models.pretrained("mnist-clean"), Ball("Linf", 0.01)
    x = data.load("digits", "test", limit=60).x
    with torch.no_grad():
        y = model(x).argmax(1)
    share = verified_accuracy(model, dataset(x, y), ball, batch_size=7)
    assert 0 < share.k < 60
    assert verified_accuracy(model, dataset(x, y), ball) == share
    assert verified_accuracy(model, dataset(x, (y + 1) % 10), ball).k == 0, "what is wrong is not verified"
    assert verified_accuracy(model, dataset(x, y), ball, ibp_margins).k <= share.k
    assert next(model.parameters()).dtype == torch.float32


def test_a_margin_that_rounding_could_take_is_not_proved():
    y = torch.tensor([0, 0])
    assert proved(torch.tensor([[0.0, ROUNDING / 2], [0.0, 2 * ROUNDING]]), y).tolist() == [False, True]


# --- what has no bound -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Sequential(nn.Flatten(), nn.SiLU(), nn.Linear(12, 2)), "no bound is known for SiLU"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.ReLU()), "last layer must be nn.Linear"),
        (nn.Sequential(), "last layer must be nn.Linear"),
        (
            nn.Sequential(nn.Conv2d(3, 1, 1, padding_mode="reflect"), nn.Flatten(), nn.Linear(4, 2)),
            "no bound is known for Conv2d",
        ),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_models_without_a_bound_are_refused(net, words, method):
    with pytest.raises(RobustkitError, match=words):
        method(net, interior(n=2), torch.tensor([0, 1]), Ball("Linf", 0.1))


@pytest.mark.parametrize("method", METHODS)
def test_other_norms_are_refused(method):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(RobustkitError, match="for Linf balls; got L2"):
        method(net, interior(n=2), torch.tensor([0, 1]), Ball("L2", 0.1))


def test_padding_by_name_is_refused_where_it_would_be_guessed():
    net = nn.Sequential(nn.Conv2d(3, 1, 3, padding="same"), nn.Flatten(), nn.Linear(4, 2))
    run = partial(crown_ibp_margins, net, interior(n=2), torch.tensor([0, 1]), Ball("Linf", 0.1))
    with pytest.raises(RobustkitError, match="padding 'same' has no bound"):
        run()
