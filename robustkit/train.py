"""Training: recipes, and the one loop that runs them, resumable to the step."""

from __future__ import annotations

import io
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from robustkit import scale
from robustkit.attacks import fgsm, pgd
from robustkit.data import Dataset
from robustkit.defences import DEFENCES, Defence
from robustkit.device import digest, hardware, modes_kept, seeded, strict_fp32
from robustkit.errors import RobustkitError
from robustkit.files import write_atomically
from robustkit.models.files import save_weights
from robustkit.results import Hardware, Interval, Provenance
from robustkit.threat import Ball

MONITORED = 256  # training images on which FGSM and PGD are compared after each epoch
ALARM_GAP = 0.20  # FGSM accuracy minus PGD accuracy that no honest model shows
CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: epochs, batch size, and the peak of a triangular learning rate for Adam.

    `shards` is into how many parts a batch is cut, for as many ranks of a torchrun or fewer; the weights
    depend on it, and not on who computes which part.
    `eps_warmup` is the share of the run over which eps grows from zero: PGD training on MNIST at
    eps 0.3 otherwise often stays at the loss of a constant answer (2.30).
    Raises: RobustkitError unless epochs, batch size and learning rate are positive, and every shard has an
    image.
    """

    epochs: int
    batch_size: int = 128
    peak_lr: float = 5e-3
    eps_warmup: float = 0.0
    shards: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.peak_lr > 0 or not 0 <= self.eps_warmup <= 1:
            raise RobustkitError(
                f"epochs, batch size and learning rate must be positive and eps_warmup in [0, 1]; got {self}."
            )
        if not 1 <= self.shards <= self.batch_size:
            raise RobustkitError(
                f"a batch of {self.batch_size} images has 1 to {self.batch_size} shards; got {self.shards}."
            )

    def learning_rate(self, done: float) -> float:
        """The rate when the share `done` of the run is over: up to the peak at 30 %, then down to zero."""
        return self.peak_lr * (done / 0.3 if done < 0.3 else (1 - done) / 0.7)

    def eps(self, eps: float, done: float) -> float:
        return eps if done >= self.eps_warmup else eps * done / self.eps_warmup


@dataclass(frozen=True)
class Epoch:
    """One epoch of the history: mean loss, seconds, and accuracies on the monitored training images."""

    number: int
    loss: float
    seconds: float
    clean: Interval
    fgsm: Interval
    pgd: Interval

    @property
    def alarm(self) -> bool:
        """FGSM looks far better than PGD: the sign of catastrophic overfitting."""
        return self.fgsm.share - self.pgd.share > ALARM_GAP


@dataclass(frozen=True)
class Run:
    """What a training run was and did; `run.json` beside the weights."""

    recipe: str
    schedule: Schedule
    ball: Ball
    data: Provenance
    n: int
    seed: int
    tier: str
    hardware: Hardware
    history: tuple[Epoch, ...] = field(default=())

    @property
    def seconds(self) -> float:
        return sum(epoch.seconds for epoch in self.history)

    @property
    def alarms(self) -> tuple[int, ...]:
        """The epochs that ended with an alarm."""
        return tuple(epoch.number for epoch in self.history if epoch.alarm)


def train(
    model: nn.Module,
    data: Dataset,
    defence: Defence,
    ball: Ball,
    schedule: Schedule,
    *,
    seed: int = 0,
    recipe: str = "custom",
    tier: str = "standard",
    run_dir: Path | None = None,
    progress: bool = True,
) -> Run:
    """Train `model` in place, and return the history.

    With a `run_dir`, a checkpoint is written every 30 seconds and at each epoch's end; the same call with
    the same directory goes on from it and gives the identical weights, because the order of the images
    and the attack's random numbers are derived from (seed, step). An interruption writes none: it falls
    inside a step, where weights, batch statistics and the step number need not agree.
    Under torchrun the shards of each batch are shared among the ranks, with the weights of one process,
    bit for bit; rank 0 writes the files, in a directory that all ranks see.
    After each epoch FGSM and PGD-10 are compared on 256 training images, and a gap over 20 points is
    warned of: catastrophic overfitting usually happens within one or two epochs.

    Source: Wong, Rice & Kolter 2020 (arXiv 2001.03994) for the triangular schedule; Adam.
    Randomness: `seed` alone; torch's global generator is restored.
    Raises: RobustkitError when the directory holds a checkpoint of another run, when the loss stops
    being finite, when the shards cannot be shared evenly among the ranks, and when these do not start
    from the same weights, data and settings.
    """
    if schedule.shards % scale.world():
        raise RobustkitError(
            f"{schedule.shards} shards cannot be shared evenly among {scale.world()} ranks; make the shards a "
            f"multiple, e.g. --shards {scale.world()}, or start fewer ranks."
        )
    if len(data) < schedule.shards:
        raise RobustkitError(
            f"{len(data)} images cannot fill {schedule.shards} shards; make fewer, or train on more images."
        )
    device = next(model.parameters()).device
    run = Run(recipe, schedule, ball, data.provenance, len(data), seed, tier, hardware(device))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=schedule.peak_lr)
    batches = max(len(data) // schedule.batch_size, 1)
    total = schedule.epochs * batches
    progress_made = _Progress()
    checkpoint = None if run_dir is None else run_dir / "checkpoint.pt"
    if checkpoint is not None and checkpoint.exists():
        progress_made = _resume(checkpoint, run, model, optimizer)
    _check_same_start(run, model, progress_made)
    first = scale.rank() == 0  # the rank that writes and talks

    bar = tqdm(
        total=total,
        initial=progress_made.step,
        desc=recipe,
        unit="step",
        disable=not (progress and first),
        file=sys.stderr,
    )
    saved = started = time.perf_counter()
    order = torch.empty(0, dtype=torch.int64)
    try:
        while progress_made.step < total:
            step = progress_made.step
            epoch, batch = divmod(step, batches)
            if batch == 0 or len(order) == 0:
                order = torch.randperm(len(data), generator=seeded(seed, "order", epoch)).to(device)
            chosen = order[batch * schedule.batch_size : (batch + 1) * schedule.batch_size]
            loss = _step(
                model, optimizer, data.x[chosen], data.y[chosen], defence, ball, schedule, step, total, seed
            )
            progress_made.step += 1
            progress_made.losses += loss
            bar.update()
            if batch + 1 == batches:
                now = time.perf_counter()
                reached = replace(ball, eps=schedule.eps(ball.eps, (step + 1) / total))
                seconds = progress_made.seconds + now - started
                shares = _monitor(model, data, reached, seed, epoch)
                record = Epoch(epoch + 1, progress_made.losses / batches, seconds, *shares)
                progress_made = _Progress(progress_made.step, 0.0, 0.0, (*progress_made.history, record))
                started = now
                bar.set_postfix(
                    loss=f"{record.loss:.3f}",
                    clean=f"{record.clean.share:.2f}",
                    pgd=f"{record.pgd.share:.2f}",
                )
                if record.alarm and progress and first:
                    bar.write(
                        f"warning: epoch {epoch + 1}: FGSM accuracy {record.fgsm.share:.0%}, PGD-10 accuracy "
                        f"{record.pgd.share:.0%} on {record.pgd.n} training images: catastrophic overfitting",
                        file=sys.stderr,
                    )
            if (
                first
                and checkpoint is not None
                and (batch + 1 == batches or time.perf_counter() - saved > CHECKPOINT_SECONDS)
            ):
                saved = time.perf_counter()
                _save(checkpoint, run, model, optimizer, progress_made, saved - started)
    finally:
        bar.close()
    run = replace(run, history=progress_made.history)
    model.eval()
    if first and run_dir is not None:
        save_weights(model, run_dir / "model.safetensors")
        write_atomically(run_dir / "run.json", (json.dumps(_record(run), indent=2) + "\n").encode())
    return run


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    defence: Defence,
    ball: Ball,
    schedule: Schedule,
    step: int,
    total: int,
    seed: int,
) -> float:
    """One update of the weights; everything random in it follows from (seed, step, shard).

    Each shard of the batch starts from the same weights and buffers. What it leads to (gradients, buffers
    and loss, in one vector) is averaged by its number of images, in the order of the shards, so that the
    sum does not depend on which rank computed what. As with any data parallelism, BatchNorm sees a shard
    at a time.
    """
    done = step / total
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate(done)
    model.train()
    ball = replace(ball, eps=schedule.eps(ball.eps, done))
    parts = torch.arange(len(x), device=x.device).tensor_split(schedule.shards)
    before = [buffer.clone() for buffer in model.buffers()]
    shares: list[Tensor] = []
    for turn in range(0, schedule.shards, scale.world()):
        shard = turn + scale.rank()
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
        optimizer.zero_grad()
        rows = parts[shard]
        loss = _loss(model, x[rows], y[rows], defence, ball, seed, step, shard)
        loss.backward()
        found = torch.cat([value.flatten() for value in [*_averaged(model), loss.detach()]])
        shares += scale.gathered(found * (len(rows) / len(x)))
    values = _averaged(model)
    *averages, loss = reduce(torch.add, shares).split([*(value.numel() for value in values), 1])
    if not torch.isfinite(loss):
        raise RobustkitError(
            f"the loss is {loss.item()} at step {step}; lower peak_lr, now {schedule.peak_lr:g}."
        )
    for value, average in zip(values, averages, strict=True):
        value.copy_(average.view(value.shape))
    optimizer.step()
    return float(loss)


def _loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    defence: Defence,
    ball: Ball,
    seed: int,
    step: int,
    shard: int,
) -> Tensor:
    """The defence's loss on one shard."""
    key = (step, shard) if shard else (step,)  # a batch that is one shard keeps the stream it always had
    generator = seeded(seed, "attack", *key, device=x.device)
    with torch.random.fork_rng(devices=[]):  # dropout in a model draws from the global generator
        torch.manual_seed(seed * 1_000_003 + step + shard * 500_009)
        return defence(model, x, y, ball, generator)


def _averaged(model: nn.Module) -> list[Tensor]:
    """What the shards of a batch lead to and is averaged: gradients, and buffers that are not counters."""
    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    return gradients + [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def _check_same_start(run: Run, model: nn.Module, progress: _Progress) -> None:
    """Ranks that started apart would average what does not belong together. Raises: RobustkitError."""
    if scale.world() == 1:
        return
    start = f"{_identity(run)} {progress.step} {digest(model.state_dict().values())}"
    if len(set(scale.shared(lambda: start))) > 1:
        raise RobustkitError(
            "the ranks do not start from the same weights, data, settings and checkpoint; give them the same "
            "arguments and a run folder that all of them see."
        )


def _monitor(
    model: nn.Module, data: Dataset, ball: Ball, seed: int, epoch: int
) -> tuple[Interval, Interval, Interval]:
    """Clean, FGSM and PGD-10 accuracy on the same training images, in the ball that training has reached."""
    chosen = torch.randperm(len(data), generator=seeded(seed, "monitor"))[:MONITORED].to(data.x.device)
    x, y = data.x[chosen], data.y[chosen]

    def share(images: Tensor) -> Interval:
        with torch.no_grad(), strict_fp32(), modes_kept(model):
            model.eval()
            return Interval(int((model(images).argmax(1) == y).sum()), len(y))

    stronger = pgd(model, x, y, ball, steps=10, generator=seeded(seed, "monitor", epoch, device=x.device))
    return share(x), share(fgsm(model, x, y, ball)), share(stronger)


@dataclass
class _Progress:
    """How far a run is: the part of a checkpoint that is not tensors."""

    step: int = 0
    losses: float = 0.0  # summed over the running epoch
    seconds: float = 0.0  # spent on the running epoch before the last resume
    history: tuple[Epoch, ...] = ()


def _record(run: Run) -> dict[str, Any]:
    return {"type": "Run", **asdict(run)}


def _identity(run: Run) -> str:
    """What must agree for a checkpoint to belong to a run."""
    record = _record(run)
    for changing in ("history", "hardware"):
        del record[changing]
    del record["data"]["source"]  # what was downloaded at the start is in the cache at the resumption
    return json.dumps(record, sort_keys=True)


def _save(
    path: Path,
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: _Progress,
    running: float,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(
        {
            "identity": _identity(run),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "progress": json.dumps(asdict(replace(progress, seconds=progress.seconds + running))),
        },
        buffer,
    )
    write_atomically(path, buffer.getvalue())


def _resume(path: Path, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> _Progress:
    try:
        state = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
        same = state["identity"] == _identity(run)
        stored = json.loads(state["progress"])
        progress = _Progress(
            stored["step"], stored["losses"], stored["seconds"], tuple(map(_epoch, stored["history"]))
        )
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise RobustkitError(f"{path} is not a readable checkpoint; delete it to start again.") from error
    if not same:
        raise RobustkitError(
            f"{path} belongs to a run with other settings; choose another directory or delete it."
        )
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise RobustkitError(
            f"{path} belongs to another model; choose another directory or delete it."
        ) from error
    return progress


def _epoch(record: dict[str, Any]) -> Epoch:
    shares = {name: Interval(**record[name]) for name in ("clean", "fgsm", "pgd")}
    return Epoch(
        record["number"], record["loss"], record["seconds"], shares["clean"], shares["fgsm"], shares["pgd"]
    )


# --- recipes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A named training run: data set, model, defence, ball, and a schedule for each tier."""

    name: str
    dataset: str
    model: str
    defence: str
    ball: Ball
    schedules: dict[str, Schedule]
    limits: dict[str, int | None]  # training images used in each tier; None is all of them


_MNIST = Ball("Linf", 0.3)
_MNIST_LIMITS: dict[str, int | None] = {"smoke": 1400, "standard": None, "full": None}


def _mnist(
    name: str, defence: str, smoke: Schedule, standard: Schedule, full: Schedule, ball: Ball = _MNIST
) -> Recipe:
    schedules = {"smoke": smoke, "standard": standard, "full": full}
    return Recipe(name, "mnist", "mnist_cnn", defence, ball, schedules, _MNIST_LIMITS)


# For certificates: smoothing is about L2, interval bounds hold up to eps 0.1 on this small network.
_L2, _SMALL = Ball("L2", 0.5), Ball("Linf", 0.1)
_NOISE = (Schedule(6, 64), Schedule(4), Schedule(20))
_BOUNDS = (
    Schedule(12, 64, 2e-3, eps_warmup=0.7),
    Schedule(20, 128, 2e-3, eps_warmup=0.7),
    Schedule(60, 128, 2e-3, eps_warmup=0.7),
)


# The smoke tier has about 20 steps an epoch: small batches, and eps grown from zero, or one-step
# training at eps 0.3 never leaves the constant answer.
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _mnist("mnist-clean", "clean", Schedule(4, 64), Schedule(2), Schedule(5)),
        _mnist("mnist-fgsm", "fgsm-at", Schedule(8, 64, eps_warmup=0.3), Schedule(3), Schedule(10)),
        _mnist(
            "mnist-rs-fgsm",
            "rs-fgsm-at",
            Schedule(8, 64, eps_warmup=0.3),
            Schedule(5, eps_warmup=0.2),
            Schedule(15, eps_warmup=0.2),
        ),
        _mnist(
            "mnist-pgd",
            "pgd-at",
            Schedule(12, 64, eps_warmup=0.5),
            Schedule(12, eps_warmup=0.3),
            Schedule(40, eps_warmup=0.3),
        ),
        _mnist("mnist-gaussian-0.25", "gaussian-0.25", *_NOISE, _L2),
        _mnist("mnist-gaussian-0.5", "gaussian-0.5", *_NOISE, _L2),
        _mnist("mnist-consistency-0.25", "consistency-0.25", *_NOISE, _L2),
        _mnist("mnist-consistency-0.5", "consistency-0.5", *_NOISE, _L2),
        _mnist("mnist-smoothadv-0.25", "smoothadv-0.25", *_NOISE, _L2),
        _mnist("mnist-ibp", "ibp-0.1", *_BOUNDS, _SMALL),
        _mnist("mnist-crown-ibp", "crown-ibp-0.1", *_BOUNDS, _SMALL),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe by name. Raises: RobustkitError, naming the nearest one."""
    if name in RECIPES:
        return RECIPES[name]
    import difflib

    near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
    raise RobustkitError(f"recipe {name!r} is unknown; did you mean {near!r}? All: {', '.join(RECIPES)}.")


def defence_of(recipe: Recipe) -> Defence:
    return DEFENCES[recipe.defence]
