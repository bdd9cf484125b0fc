"""Training: the defences' losses in closed form, the schedule, and resuming to the bit."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robustkit import train as training
from robustkit.data import Dataset
from robustkit.defences import DEFENCES, fgsm_at, trades, worst_weights
from robustkit.device import seeded
from robustkit.errors import RobustkitError
from robustkit.results import Interval
from robustkit.threat import Ball
from robustkit.train import Epoch, Schedule, train
from tests.oracle import Linear, dataset, interior, linear, linear_data, margins, strongest

BALL = Ball("Linf", 0.05)


class Restless(nn.Module):
    """A small network with the two layers that make resuming hard: batch statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(4, 2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(x)
        return logits


def restless(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Restless()


@pytest.fixture
def data() -> Dataset:
    return linear_data(linear(), n=120)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- defences --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "exact"), [("clean", True), ("fgsm-at", True), ("pgd-at", True), ("rs-fgsm-at", False)]
)
def test_a_defence_is_the_cross_entropy_at_the_closed_form_candidate(name, exact):
    model = linear()
    x, y = interior(), linear_data(model).y
    candidates = x.numpy() if name == "clean" else strongest(model, x, y, BALL)
    m = margins(model, torch.from_numpy(candidates), y)
    expected = np.log1p(np.exp(-2 * m)).mean()  # logits (-z, z): the loss is log(1 + exp(-2m))
    found = DEFENCES[name](model, x, y, BALL, seeded(0)).item()
    if exact:
        assert found == pytest.approx(expected, rel=2e-3 if name == "pgd-at" else 1e-5)
    else:
        untouched = F.cross_entropy(model(x), y).item()
        assert untouched + 0.5 * (expected - untouched) < found < expected


def one_step_points(model, x, y, ball, generator):
    """Noise of twice the ball's size, one exact step on top, never projected; away from the box's walls."""
    noisy = x + (4 * torch.rand(x.shape, generator=generator) - 2) * ball.eps
    return noisy, margins(model, noisy, y) - ball.eps * model.w.detach().abs().sum().item()


def test_n_fgsm_trains_outside_the_ball_at_the_closed_form_point():
    model = linear()
    x, y = interior(), linear_data(model).y
    _, m = one_step_points(model, x, y, BALL, seeded(0))
    found = DEFENCES["n-fgsm-at"](model, x, y, BALL, seeded(0)).item()
    assert found == pytest.approx(np.log1p(np.exp(-2 * m)).mean(), rel=1e-5)
    seen = []
    model.drop.register_forward_pre_hook(lambda _, images: seen.append(images[0].detach()))
    DEFENCES["n-fgsm-at"](model, x, y, BALL, seeded(0))
    assert (BALL.size(seen[-1] - x) > BALL.eps + 1e-6).float().mean() > 0.9
    assert (BALL.size(seen[-1] - x) <= 3 * BALL.eps + 1e-6).all()


@pytest.mark.parametrize("beta", [1.0, 6.0])
def test_trades_is_the_closed_form_cross_entropy_and_divergence(beta):
    """On the linear model the divergence is largest at the end of the ball to which the start points."""
    model = linear()
    x, y = interior(), linear_data(model).y
    start = 0.001 * torch.empty_like(x).normal_(generator=seeded(0))
    w = model.w.detach()
    side = np.sign((start.flatten(1) @ w).numpy())
    z = (2 * y.numpy() - 1) * margins(model, x, y)
    end = z + side * BALL.eps * w.abs().sum().item()

    def log_probabilities(z):
        return -np.stack([np.logaddexp(0, 2 * z), np.logaddexp(0, -2 * z)], 1)

    p, q = log_probabilities(z), log_probabilities(end)
    expected = np.log1p(np.exp(-2 * margins(model, x, y))).mean() + beta * (np.exp(p) * (p - q)).sum(1).mean()
    found = trades(model, x, y, BALL, seeded(0), steps=10, step_size=0.25, beta=beta).item()
    assert found == pytest.approx(expected, rel=1e-3)


# --- adversarial weights ---------------------------------------------------------------------------


def small_net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(4, 2))


def test_awp_gives_loss_and_gradient_at_the_weights_moved_by_hand():
    model, x = small_net(), interior(n=30)
    y = (x[:, 0, 0, 0] > 0.5).long()

    def loss(m):
        return F.cross_entropy(m(x), y)

    by_hand = copy.deepcopy(model)
    loss(by_hand).backward()
    with torch.no_grad():
        for value in by_hand.parameters():
            if value.dim() > 1:
                value += 0.05 * value.norm() * value.grad / value.grad.norm()
            value.grad = None
        by_hand[1].load_state_dict(model[1].state_dict())  # as if there had been no first pass
    expected = loss(by_hand)
    expected.backward()

    before = {name: value.clone() for name, value in model.named_parameters()}
    untouched = loss(copy.deepcopy(model))
    found = worst_weights(model, loss, 0.05)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found > untouched
    for (name, value), other in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(value, before[name]), "the weights themselves stay"
    for buffer, other in zip(model.buffers(), by_hand.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)
    assert model[1].num_batches_tracked == 1  # one pass counts, not two


def test_awp_of_size_zero_is_the_loss_alone():
    model, calls = small_net(), []

    def loss(m):
        calls.append(m)
        return F.cross_entropy(m(interior(n=4)), torch.tensor([0, 1, 0, 1]))

    worst_weights(model, loss, 0.0)
    assert calls == [model]


# Bounds know no dropout, which is how this test tells the modes apart; AWP passes twice in train mode.
@pytest.mark.parametrize("name", [name for name in DEFENCES if "ibp" not in name and "awp" not in name])
def test_a_defence_trains_in_train_mode_and_leaves_gradients_on_the_weights_alone(name):
    model = Linear(linear().w.detach()).train()
    modes = []
    model.drop.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    x, y = interior(), linear_data(linear()).y
    kept = x.clone()
    loss = DEFENCES[name](model, x, y, BALL, seeded(0))
    assert loss.dim() == 0
    assert modes[-1]  # the loss is taken in train mode,
    assert not any(modes[:-1])  # the attack aims at the deployed model,
    assert model.training  # and the mode comes back
    assert model.w.grad is None
    loss.backward()
    assert model.w.grad is not None
    assert torch.equal(x, kept)


# --- schedules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"rise": 0.0}, {"rise": 1.0}, {"ema": 1.0}, {"ema": -0.1}, {"watched": 0}, {"ema": math.nan}]
)
def test_shares_that_are_none_are_refused(change):
    with pytest.raises(RobustkitError, match="rise must lie between 0 and 1"):
        Schedule(1, **change)


def test_sgd_decays_matrices_and_kernels_alone():
    optimizer = training.OPTIMIZERS["sgd"](restless(), 0.1)
    decayed, others = optimizer.param_groups
    assert [tuple(value.shape) for value in decayed["params"]] == [(4, 3, 2, 2), (2, 4)]
    assert {value.dim() for value in others["params"]} == {1}
    assert (decayed["weight_decay"], others["weight_decay"]) == (5e-4, 0.0)
    assert decayed["nesterov"]
    with pytest.raises(RobustkitError, match="optimizer 'lion' is unknown; choose one of adam, sgd"):
        Schedule(1, optimizer="lion")


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    schedule = Schedule(epochs=2, peak_lr=0.01)
    assert [schedule.learning_rate(done) for done in (0, 0.15, 0.3, 0.65, 1)] == pytest.approx(
        [0, 0.005, 0.01, 0.005, 0]
    )


def test_eps_grows_over_the_warm_up_and_stays():
    schedule = Schedule(epochs=2, eps_warmup=0.5)
    assert [schedule.eps(0.3, done) for done in (0, 0.25, 0.5, 1)] == pytest.approx([0, 0.15, 0.3, 0.3])
    assert Schedule(epochs=2).eps(0.3, 0) == 0.3


@pytest.mark.parametrize(
    "change", [{"epochs": 0}, {"batch_size": 0}, {"peak_lr": 0.0}, {"peak_lr": math.nan}, {"eps_warmup": 1.5}]
)
def test_a_schedule_that_means_nothing_is_refused(change):
    with pytest.raises(RobustkitError, match="must be positive"):
        Schedule(**({"epochs": 1} | change))


# --- the loop --------------------------------------------------------------------------------------


def test_training_sees_every_image_once_an_epoch_in_another_order_with_the_scheduled_eps(data):
    seen, sizes = [], []

    def spy(model, x, y, ball, generator):
        seen.append(x[:, 0, 0, 0])
        sizes.append(ball.eps)
        return F.cross_entropy(model(x), y)

    train(restless(), data, spy, BALL, Schedule(2, 40, eps_warmup=0.5), progress=False)
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert torch.equal(first.sort().values, data.x[:, 0, 0, 0].sort().values)
    assert torch.equal(second.sort().values, first.sort().values)
    assert not torch.equal(first, second)
    assert sizes == pytest.approx([0, BALL.eps / 3, 2 * BALL.eps / 3, *[BALL.eps] * 3])


def test_training_learns_what_can_be_learnt_and_tells_its_history(data):
    model = Linear(torch.zeros(12))
    run = train(
        model,
        data,
        DEFENCES["clean"],
        BALL,
        Schedule(30, 20, peak_lr=0.05),
        recipe="mine",
        tier="smoke",
        progress=False,
    )
    assert (run.recipe, run.tier, run.n, len(run.history)) == ("mine", "smoke", 120, 30)
    assert run.history[-1].loss < run.history[0].loss
    assert run.history[-1].clean.share > 0.7  # of at most 0.9: every tenth label is wrong
    assert run.history[-1].clean.n == 120  # fewer than the 256 that are monitored at most
    assert [epoch.number for epoch in run.history] == list(range(1, 31))
    for epoch in run.history:
        assert epoch.clean.k >= epoch.pgd.k
    assert not model.training


def test_a_seed_decides_everything_and_global_state_decides_nothing(data):
    def trained(seed: int) -> nn.Module:
        model = restless()
        train(model, data, DEFENCES["rs-fgsm-at"], BALL, Schedule(1, 20), seed=seed, progress=False)
        return model

    torch.manual_seed(1)
    first = trained(1)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again = trained(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert same_weights(first, again)
    assert not same_weights(first, trained(2))


def test_each_step_is_in_train_mode_with_random_numbers_of_its_own(data):
    drawn = []

    def spy(model, x, y, ball, generator):
        assert model.training
        drawn.append(torch.rand((), generator=generator).item())
        return F.cross_entropy(model(x), y)

    train(restless().eval(), data, spy, BALL, Schedule(2, 20), progress=False)
    assert len(set(drawn)) == len(drawn) == 12


def test_a_loss_that_is_not_finite_stops_the_run(data):
    def broken(model, x, y, ball, generator):
        return F.cross_entropy(model(x), y) * math.nan

    with pytest.raises(RobustkitError, match=r"loss is nan at step 0; lower peak_lr, now 0\.005"):
        train(restless(), data, broken, BALL, Schedule(1, 20), progress=False)


def test_the_alarm_is_a_large_gap_between_fgsm_and_pgd_and_nothing_else():
    def epoch(fgsm: int, pgd: int) -> Epoch:
        return Epoch(1, 1.0, 1.0, Interval(100, 100), Interval(fgsm, 100), Interval(pgd, 100))

    assert epoch(95, 10).alarm
    assert epoch(71, 50).alarm
    assert not epoch(70, 50).alarm
    assert not epoch(10, 95).alarm
    assert not epoch(5, 5).alarm


# --- shards ----------------------------------------------------------------------------------------


def step_of(shards: int, model: nn.Module, data: Dataset, defence=DEFENCES["clean"]) -> float:
    optimizer = torch.optim.Adam(model.parameters())
    return training._step(
        model, optimizer, data.x, data.y, defence, BALL, Schedule(1, 120, shards=shards), 0, 1, 0
    )


def test_uneven_shards_weigh_by_their_images():
    """Five shards of 13 and 12 images: the mean over all of them is that of the batch."""
    data = linear_data(linear(), n=62)
    model = Linear(linear().w.detach())
    model.drop.p = 0.0
    whole = F.cross_entropy(model(data.x), data.y)
    expected = torch.autograd.grad(whole, model.w)[0]
    assert step_of(5, model, data) == pytest.approx(whole.item(), rel=1e-6)
    assert model.w.grad is not None
    torch.testing.assert_close(model.w.grad, expected, rtol=1e-5, atol=1e-7)


def test_batch_statistics_start_from_the_same_buffers_and_are_averaged():
    data = linear_data(linear(), n=31)  # shards of 16 and 15
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    step_of(2, model, data)
    statistics = model[0]
    assert statistics.num_batches_tracked == 1
    torch.testing.assert_close(statistics.running_mean, 0.1 * data.x.mean((0, 2, 3)))
    variances = [part.var((0, 2, 3)) for part in (data.x[:16], data.x[16:])]
    torch.testing.assert_close(
        statistics.running_var, 0.9 + 0.1 * (16 * variances[0] + 15 * variances[1]) / 31
    )


def test_each_shard_has_random_numbers_of_its_own_and_the_first_those_of_an_uncut_batch(data):
    def drawn(shards: int) -> list[tuple[float, float]]:
        found = []

        def spy(model, x, y, ball, generator):
            found.append((torch.rand((), generator=generator).item(), torch.rand(()).item()))
            return F.cross_entropy(model(x), y)

        step_of(shards, restless(), data, spy)
        return found

    three = drawn(3)
    assert drawn(1) == three[:1]
    for draws in zip(*three, strict=True):
        assert len(set(draws)) == 3


@pytest.mark.parametrize("shards", [0, -1, 21])
def test_shards_without_images_are_refused(shards, data):
    with pytest.raises(RobustkitError, match="a batch of 20 images has 1 to 20 shards"):
        Schedule(1, 20, shards=shards)
    with pytest.raises(RobustkitError, match="3 images cannot fill 4 shards"):
        train(restless(), data.take(range(3)), DEFENCES["clean"], BALL, Schedule(1, 20, shards=4))


# --- averaged weights, selection -------------------------------------------------------------------


def test_the_average_follows_the_weights_by_its_decay():
    model, average = Linear(torch.full((12,), 1.0)), Linear(torch.zeros(12))
    for _ in range(3):
        training._follow(average, model, 0.9)
    torch.testing.assert_close(average.w.detach(), torch.full((12,), 1 - 0.9**3))
    training._follow(model, model, 0.0)  # no average
    assert torch.equal(model.w.detach(), torch.ones(12))


def statistics_of(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = model.net[0](x)
    return inputs.mean((0, 2, 3)), inputs.var((0, 2, 3))


@pytest.mark.parametrize("batch_size", [500, 40])
def test_averaged_weights_get_batch_statistics_of_their_own(batch_size):
    data = linear_data(linear(), n=120)
    model, average = restless(1), restless(2)
    for _ in range(3):
        model(data.x)  # other weights, other statistics
    training._settle(average, model, data, DEFENCES["clean"], BALL, Schedule(1, batch_size), 0, 0)
    mean, variance = statistics_of(average, data.x)
    norm = average.net[1]
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance, rtol=0.05, atol=0)  # batch by batch, then the mean
    assert norm.momentum == 0.1
    for copied in (model.net[1].running_mean, torch.zeros(4)):  # what a copy, or nothing at all, would give
        assert (copied - mean).abs().max() > 0.01


def test_a_run_with_an_average_leaves_the_average_with_its_own_statistics(data):
    model = restless()
    train(model, data, DEFENCES["clean"], BALL, Schedule(3, 40, optimizer="sgd", ema=0.9), progress=False)
    last = restless()
    train(last, data, DEFENCES["clean"], BALL, Schedule(3, 40, optimizer="sgd"), progress=False)
    assert not same_weights(model, last)
    mean, variance = statistics_of(model, data.x)
    torch.testing.assert_close(model.net[1].running_mean, mean)
    torch.testing.assert_close(model.net[1].running_var, variance, rtol=0.05, atol=0)


@pytest.fixture
def contrary() -> Dataset:
    """Held-out images on which learning makes things worse: the last epoch is not the best."""
    held_out = linear_data(linear(), seed=1, n=100)
    return replace(held_out, y=1 - held_out.y)


def right(model: nn.Module, data: Dataset) -> int:
    return int((model(data.x).argmax(1) == data.y).sum())


def test_the_run_leaves_the_weights_of_the_epoch_that_was_best_on_held_out_images(data, contrary):
    def trained(held_out: Dataset | None):
        model, schedule = Linear(torch.zeros(12)), Schedule(6, 20, peak_lr=0.3)
        return model, train(model, data, DEFENCES["clean"], BALL, schedule, held_out=held_out, progress=False)

    model, run = trained(contrary)
    robust = [epoch.pgd.k for epoch in run.history]
    assert run.selected == robust.index(max(robust)) + 1 < 6
    assert run.held_out == contrary.provenance
    assert right(model, contrary) == run.history[run.selected - 1].clean.k > run.history[-1].clean.k
    blind, run = trained(None)
    assert run.selected == 6
    assert right(blind, contrary) < right(model, contrary)


def test_epochs_before_eps_is_reached_are_not_selected_however_robust_they_look(data, contrary):
    schedule = Schedule(6, 20, peak_lr=0.3, eps_warmup=0.9)
    model = Linear(torch.zeros(12))
    run = train(model, data, DEFENCES["clean"], BALL, schedule, held_out=contrary, progress=False)
    assert run.history[1].pgd.k > run.history[-1].pgd.k  # in a smaller ball
    assert run.selected == 6
    assert right(model, contrary) == run.history[-1].clean.k


def test_stored_bytes_train_to_the_same_weights_as_the_images_they_are(data):
    stored = (data.x * 255).round().to(torch.uint8)
    weights = []
    for x in (stored, stored.float() / 255):
        model = restless()
        train(model, replace(data, x=x), DEFENCES["rs-fgsm-at"], BALL, Schedule(1, 20), progress=False)
        weights.append(model)
    assert same_weights(*weights)


def test_bfloat16_is_for_the_passes_and_float32_for_weights_and_statistics(data, monkeypatch):
    monkeypatch.setattr(training, "fastest", lambda device: torch.bfloat16)
    seen = []

    def watch(model, x, y, ball, generator):
        logits = model(x)
        seen.append((x.dtype, logits.dtype))
        return F.cross_entropy(logits, y)

    def trained(schedule: Schedule):
        model = restless()
        return model, train(model, data, watch, BALL, schedule, progress=False)

    half, run = trained(Schedule(1, 40, bf16=True))
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert {value.dtype for value in half.state_dict().values()} == {torch.float32, torch.int64}
    assert run.precision == "bfloat16"
    full, run = trained(Schedule(1, 40))
    assert run.precision == "float32"
    assert not same_weights(half, full)
    for value, other in zip(half.parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=0.1, atol=0.01)


# --- resuming --------------------------------------------------------------------------------------

SCHEDULE = Schedule(3, 20, eps_warmup=0.5)  # six steps an epoch


def interrupted_at(step: int, defence=DEFENCES["rs-fgsm-at"]):
    """The defence, but Ctrl-C falls into the middle of that step: after the forward pass in train mode."""
    calls = iter(range(10**6))

    def attempt(model, x, y, ball, generator):
        loss = defence(model, x, y, ball, generator)
        if next(calls) == step:
            raise KeyboardInterrupt
        return loss

    return attempt


@pytest.mark.parametrize("every_step", [True, False], ids=["checkpoint each step", "checkpoint each epoch"])
@pytest.mark.parametrize("step", [0, 1, 6, 8, 17])
def test_an_interrupted_run_resumes_to_identical_weights(step, every_step, data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0 if every_step else 1e9)
    whole = restless()
    expected = train(
        whole, data, DEFENCES["rs-fgsm-at"], BALL, SCHEDULE, run_dir=tmp_path / "whole", progress=False
    )

    with pytest.raises(KeyboardInterrupt):
        train(
            restless(), data, interrupted_at(step), BALL, SCHEDULE, run_dir=tmp_path / "cut", progress=False
        )
    assert not (tmp_path / "cut" / "model.safetensors").exists()  # nothing that looks finished

    steps = []

    def counted(*arguments):
        steps.append(1)
        return DEFENCES["rs-fgsm-at"](*arguments)

    resumed = restless(seed=9)  # the weights must come from the checkpoint
    if step == 0 or (step < 6 and not every_step):
        resumed = restless()  # nothing was saved: from the beginning
    found = train(resumed, data, counted, BALL, SCHEDULE, run_dir=tmp_path / "cut", progress=False)
    assert len(steps) == 18 - (step if every_step else step // 6 * 6)
    assert same_weights(resumed, whole)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    still = {"seconds": 0.0}
    assert [replace(epoch, **still) for epoch in found.history] == [
        replace(epoch, **still) for epoch in expected.history
    ]


@pytest.mark.parametrize("step", [4, 8, 17])
def test_averages_and_the_selection_survive_an_interruption(step, data, contrary, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    schedule = Schedule(3, 20, peak_lr=0.5, optimizer="sgd", ema=0.9)

    def start(model: nn.Module, defence, folder: str):
        settings = {"held_out": contrary, "run_dir": tmp_path / folder, "progress": False}
        return train(model, data, defence, BALL, schedule, **settings)

    whole, cut = restless(), restless(seed=9)
    run = start(whole, DEFENCES["clean"], "whole")
    assert run.selected == 2  # an epoch that is over when the last interruption falls
    with pytest.raises(KeyboardInterrupt):
        start(restless(), interrupted_at(step, DEFENCES["clean"]), "cut")
    again = start(cut, DEFENCES["clean"], "cut")
    assert same_weights(cut, whole)
    assert again.selected == run.selected


def test_a_finished_run_resumes_to_itself_without_a_step(data, tmp_path):
    first = restless()
    run = train(first, data, DEFENCES["clean"], BALL, SCHEDULE, run_dir=tmp_path, progress=False)
    again = restless(seed=9)
    assert (
        train(again, data, interrupted_at(0), BALL, SCHEDULE, run_dir=tmp_path, progress=False).history
        == run.history
    )
    assert same_weights(first, again)


def test_data_downloaded_at_the_start_and_cached_at_the_resumption_are_the_same_run(data, tmp_path):
    def from_source(source: str) -> Dataset:
        return replace(data, provenance=replace(data.provenance, source=source))

    with pytest.raises(KeyboardInterrupt):
        train(
            restless(),
            from_source("download"),
            interrupted_at(8),
            BALL,
            SCHEDULE,
            run_dir=tmp_path,
            progress=False,
        )
    run = train(
        restless(),
        from_source("cache"),
        DEFENCES["rs-fgsm-at"],
        BALL,
        SCHEDULE,
        run_dir=tmp_path,
        progress=False,
    )
    assert run.data.source == "cache"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"schedule": Schedule(4, 20)},
        {"ball": Ball("L2", 0.05)},
        {"recipe": "another"},
        {"tier": "full"},
        {"data": "other pixels"},
        {"data": "fewer"},
    ],
    ids=str,
)
def test_a_checkpoint_of_other_settings_is_refused(change, data, tmp_path):
    good = {"data": data, "ball": BALL, "schedule": SCHEDULE}

    def start(defence, **settings):
        settings = good | settings
        positional = [settings.pop(name) for name in ("data", "ball", "schedule")]
        return train(
            restless(), positional[0], defence, *positional[1:], run_dir=tmp_path, progress=False, **settings
        )

    with pytest.raises(KeyboardInterrupt):
        start(interrupted_at(8))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    if change.get("data") == "other pixels":
        change = {"data": replace(data, provenance=replace(data.provenance, sha256="1" * 64))}
    elif change.get("data") == "fewer":
        change = {"data": data.take(range(100))}
    with pytest.raises(RobustkitError, match=r"checkpoint\.pt belongs to a run with other settings"):
        start(DEFENCES["clean"], **change)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_another_architecture_is_refused(data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(restless(), data, interrupted_at(8), BALL, SCHEDULE, run_dir=tmp_path, progress=False)
    with pytest.raises(RobustkitError, match="belongs to another model"):
        train(linear(), data, DEFENCES["clean"], BALL, SCHEDULE, run_dir=tmp_path, progress=False)


def test_a_checkpoint_with_nan_or_too_large_is_refused_in_a_sentence(data, tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train(restless(), data, interrupted_at(8), BALL, SCHEDULE, run_dir=tmp_path, progress=False)
    state = torch.load(path, weights_only=True)
    state["model"]["net.0.weight"][0] = math.nan
    torch.save(state, path)
    with pytest.raises(RobustkitError, match=r"checkpoint\.pt holds NaN or infinity; delete it"):
        train(restless(), data, DEFENCES["clean"], BALL, SCHEDULE, run_dir=tmp_path, progress=False)
    with path.open("ab") as file:
        file.truncate(2**25)  # as a file that was swapped for a larger model's; a hole, no bytes on the disk
    with pytest.raises(RobustkitError, match=r"has 33,554,432 bytes, at most 16,\d{3},\d{3} fit this model"):
        train(restless(), data, DEFENCES["clean"], BALL, SCHEDULE, run_dir=tmp_path, progress=False)


@pytest.mark.parametrize("how", ["cut", "empty", "pickle", "another record"])
def test_a_damaged_checkpoint_is_refused_in_a_sentence(how, data, tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train(restless(), data, interrupted_at(8), BALL, SCHEDULE, run_dir=tmp_path, progress=False)
    content = path.read_bytes()
    path.write_bytes(
        {"cut": content[: len(content) // 2], "pickle": b"cos\nsystem\n(S'true'\ntR."}.get(how, b"")
    )
    if how == "another record":
        torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(RobustkitError, match=r"not a readable checkpoint; delete it to start again"):
        train(restless(), data, DEFENCES["clean"], BALL, SCHEDULE, run_dir=tmp_path, progress=False)


def test_run_json_holds_the_whole_history(data, tmp_path):
    run = train(restless(), data, fgsm_at, BALL, SCHEDULE, run_dir=tmp_path, progress=False)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["type"] == "Run"
    assert record["ball"] == {"norm": "Linf", "eps": 0.05}
    assert record["data"]["sha256"] == data.provenance.sha256
    assert [epoch["clean"]["k"] for epoch in record["history"]] == [epoch.clean.k for epoch in run.history]


def test_the_labels_of_a_batch_stay_with_their_images():
    x = interior(n=40)
    y = (x[:, 0, 0, 0] > 0.5).long()

    def watch(model, images, labels, ball, generator):
        assert torch.equal(labels, (images[:, 0, 0, 0] > 0.5).long())
        return F.cross_entropy(model(images), labels)

    train(restless(), dataset(x, y), watch, BALL, Schedule(2, 10), progress=False)
