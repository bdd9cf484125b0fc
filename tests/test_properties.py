"""What holds for every shape, norm, dtype and batch: of balls, of attacks, of evaluations."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustkit.attacks import apgd, apgd_targeted, fab_targeted, fgsm, pgd, rs_fgsm
from robustkit.evaluate import evaluate, predict
from robustkit.results import CLEAN
from robustkit.threat import NORMS, TOLERANCE, Ball
from tests.oracle import dataset

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)

CLASSES = 5
SHAPES = ((6,), (1, 4, 4), (3, 5, 4))

ATTACKS = {
    "fgsm": fgsm,
    "rs-fgsm": rs_fgsm,
    "pgd": partial(pgd, steps=3, restarts=2),
    "apgd": partial(apgd, steps=6),
    "apgd-t": partial(apgd_targeted, steps=6, targets=2),
    "fab-t": partial(fab_targeted, steps=6, targets=2),
}


class Net(nn.Module):
    """A small net with all that an attack could disturb: dropout, running statistics, weights that learn."""

    def __init__(self, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Flatten(),
                nn.Linear(torch.Size(shape).numel(), 8),
                nn.BatchNorm1d(8),
                nn.Softplus(),
                nn.Dropout(0.5),
                nn.Linear(8, CLASSES),
            ).to(dtype)
        self.layers[1].weight.requires_grad_(False)
        self.layers.train()
        self.layers[2].eval()  # modes as mixed as flags

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.layers(x)


@st.composite
def balls(draw: st.DrawFn) -> Ball:
    norm = draw(st.sampled_from(NORMS))
    return Ball(norm, draw(st.sampled_from([0.0, 1e-3, 0.1, 0.7])) * {"Linf": 1, "L2": 2, "L1": 4}[norm])


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Images with pixels in the interior and on both walls, labels, and a seed."""
    shape, n = draw(st.sampled_from(SHAPES)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    x = (1.5 * torch.rand(n, *shape, generator=generator, dtype=dtype) - 0.25).clamp(0, 1)
    return x, torch.randint(CLASSES, (n,), generator=generator), seed


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- balls -----------------------------------------------------------------------------------------


@quick
@given(balls(), batches(), st.sampled_from([0.01, 1.0, 100.0]))
def test_a_projection_is_in_the_ball_nearest_and_final(ball, batch, scale):
    x, _, seed = batch
    delta = scale * torch.randn(x.shape, generator=seeded(seed), dtype=x.dtype)
    projected = ball.project(delta)
    assert projected.dtype == delta.dtype
    assert (ball.size(projected) <= ball.eps + TOLERANCE[ball.norm]).all()
    torch.testing.assert_close(ball.project(projected), projected, rtol=1e-5, atol=1e-6)
    inside = ball.size(delta) <= ball.eps
    assert torch.equal(projected[inside], delta[inside])
    other = ball.random(x, seeded(seed))
    assert ((delta - projected).flatten(1).norm(dim=1) <= (delta - other).flatten(1).norm(dim=1) + 1e-4).all()


@quick
@given(balls(), batches(), st.sampled_from([0.01, 1.0, 100.0]))
def test_candidates_lie_in_ball_and_box(ball, batch, scale):
    x, _, seed = batch
    points = ball.candidates(x, scale * torch.randn(x.shape, generator=seeded(seed), dtype=x.dtype))
    assert (points.shape, points.dtype) == (x.shape, x.dtype)
    assert ball.contains(x, points).all()
    assert points.min() >= 0
    assert points.max() <= 1
    assert torch.equal(ball.candidates(x, torch.zeros_like(x)), x)
    assert ball.contains(x, ball.candidates(x, ball.random(x, seeded(seed)))).all()


@quick
@given(balls(), batches(), st.sampled_from([1e-25, 1e-3, 1.0, 1e6]))
def test_the_steepest_step_has_norm_one_and_no_other_rises_faster(ball, batch, scale):
    x, _, seed = batch
    gradient = scale * torch.randn(x.shape, generator=seeded(seed), dtype=x.dtype)
    step = ball.steepest(gradient)
    torch.testing.assert_close(ball.size(step), torch.ones(len(x), dtype=x.dtype))
    rise = (step * gradient).flatten(1).sum(1) / scale
    dual = {"Linf": 1, "L2": 2, "L1": torch.inf}[ball.norm]
    torch.testing.assert_close(rise, (gradient / scale).flatten(1).norm(p=dual, dim=1), rtol=1e-4, atol=1e-6)
    assert torch.equal(ball.steepest(torch.zeros_like(x)), torch.zeros_like(x))


# --- attacks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
@quick
@given(balls(), batches())
def test_an_attack_returns_candidates_and_leaves_everything_as_it_was(name, ball, batch):
    x, y, seed = batch
    model = Net(x.shape[1:], seed, x.dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    images, labels, state = x.clone(), y.clone(), torch.get_rng_state()

    points = ATTACKS[name](model, x, y, ball, generator=seeded(seed))

    assert (points.shape, points.dtype, points.device) == (x.shape, x.dtype, x.device)
    assert not points.requires_grad
    assert ball.contains(x, points).all()
    assert points.min() >= 0
    assert points.max() <= 1
    assert torch.equal(x, images)
    assert torch.equal(y, labels)
    assert points.data_ptr() != x.data_ptr()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    # The generator decides, and nothing else does.
    assert torch.equal(ATTACKS[name](model, x, y, ball, generator=seeded(seed)), points)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "apgd-t"])
@quick
@given(balls(), batches())
def test_an_image_is_attacked_alike_in_any_company(name, ball, batch):
    """In float64, where the order of a sum in a matrix product does not decide a sign."""
    x, y, seed = batch
    x = x.double()
    model = Net(x.shape[1:], seed, x.dtype)
    attack = {
        "fgsm": lambda x, y: fgsm(model, x, y, ball),
        "pgd": lambda x, y: pgd(model, x, y, ball, steps=3, start=x),
        "apgd": lambda x, y: apgd(model, x, y, ball, steps=6, start=x),
        "apgd-t": lambda x, y: apgd_targeted(model, x, y, ball, steps=6, targets=2, start=x),
    }[name]
    together = attack(x, y)
    alone = torch.cat([attack(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)
    torch.testing.assert_close(attack(x.flip(0), y.flip(0)).flip(0), together, rtol=0, atol=1e-9)


# --- evaluations -----------------------------------------------------------------------------------


def on(chosen):
    """FGSM on some images alone, by their first pixel: what the others leave is known."""

    def attack(model, x, y, ball, *, generator=None):
        points = fgsm(model, x, y, ball)
        return torch.where(chosen(x[:, :1, :1, :1]), points, x)

    return attack


@settings(quick, max_examples=15)
@given(balls(), st.integers(0, 1000), st.integers(1, 9), st.permutations(["dark", "light", "pgd"]))
def test_an_evaluation_is_the_worst_case_whatever_order_and_batch(ball, seed, batch_size, order):
    """Deterministic attacks: what all of them break together is the union of what each breaks."""
    x = torch.rand(8, 1, 4, 4, generator=seeded(seed))
    model = Net(x.shape[1:], seed, x.dtype).eval()
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % CLASSES
    data = dataset(x, y, CLASSES)

    def from_image(model, x, y, ball, *, generator=None):
        return pgd(model, x, y, ball, steps=4, start=x)

    attacks = {
        "dark": on(lambda pixel: pixel < 0.6),
        "light": on(lambda pixel: pixel > 0.4),
        "pgd": from_image,
    }
    found = evaluate(
        model,
        data,
        ball,
        {name: attacks[name] for name in order},
        model_name="net",
        tier="smoke",
        batch_size=batch_size,
        progress=False,
    )
    right = predict(model, x, y)
    broken = {name: ~predict(model, attack(model, x, y, ball), y) for name, attack in attacks.items()}
    expected = [
        CLEAN if not right[i] else next((name for name in order if broken[name][i]), None)
        for i in range(len(x))
    ]
    assert list(found.broken_by) == expected
    shares = [found.clean, *(found.robust_after(count) for count in (1, 2, 3))]
    assert [share.k for share in shares] == sorted((share.k for share in shares), reverse=True)
    assert shares[-1] == found.robust
