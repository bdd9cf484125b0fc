"""Training: the one loop that every recipe runs, resumable to the step."""

from __future__ import annotations

import copy
import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from robustkit import scale
from robustkit.attacks import fgsm, pgd
from robustkit.data import Dataset
from robustkit.defences import Defence
from robustkit.device import digest, fastest, hardware, modes_kept, seeded, strict_fp32
from robustkit.errors import RobustkitError
from robustkit.files import write_atomically
from robustkit.models.files import save_weights
from robustkit.results import Hardware, Interval, Provenance
from robustkit.threat import Ball

ALARM_GAP = 0.20  # FGSM accuracy minus PGD accuracy that no honest model shows
CHECKPOINT_SECONDS = 30.0
SETTLED = 2048  # training images from which the averaged weights get their batch statistics


def _adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


def _sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Nesterov momentum 0.9; weight decay 5e-4 on matrices and kernels, none on biases and norms."""
    decayed = [value for value in model.parameters() if value.dim() > 1]
    others = [value for value in model.parameters() if value.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {"adam": _adam, "sgd": _sgd}


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: epochs, batch size, optimizer, and the peak of a triangular learning rate.

    The rate rises to its peak over the share `rise` of the run, and falls to zero over the rest.
    `shards` is into how many parts a batch is cut, for as many ranks of a torchrun or fewer; the weights
    depend on it, and not on who computes which part.
    `eps_warmup` is the share of the run over which eps grows from zero: PGD training on MNIST at
    eps 0.3 otherwise often stays at the loss of a constant answer (2.30).
    `ema` is the decay of the moving average of the weights that the run leaves; 0 leaves the last weights.
    `bf16` trains in bfloat16, with float32 weights and statistics, where the device has units for it.
    `watched` is on how many images the run is watched after each epoch.
    Raises: RobustkitError unless epochs, batch size and learning rate are positive, shares are shares, the
    optimizer is known, and every shard has an image.
    """

    epochs: int
    batch_size: int = 128
    peak_lr: float = 5e-3
    eps_warmup: float = 0.0
    shards: int = 1
    optimizer: str = "adam"
    rise: float = 0.3
    ema: float = 0.0
    bf16: bool = False
    watched: int = 256

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.peak_lr > 0 or not 0 <= self.eps_warmup <= 1:
            raise RobustkitError(
                f"epochs, batch size and learning rate must be positive and eps_warmup in [0, 1]; got {self}."
            )
        if not (0 < self.rise < 1 and 0 <= self.ema < 1 and self.watched >= 1):
            raise RobustkitError(
                f"rise must lie between 0 and 1, ema be 0 or larger and below 1, watched at least 1; got {self}."
            )
        if self.optimizer not in OPTIMIZERS:
            raise RobustkitError(
                f"optimizer {self.optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}."
            )
        if not 1 <= self.shards <= self.batch_size:
            raise RobustkitError(
                f"a batch of {self.batch_size} images has 1 to {self.batch_size} shards; got {self.shards}."
            )

    def learning_rate(self, done: float) -> float:
        """The rate when the share `done` of the run is over."""
        return self.peak_lr * (done / self.rise if done < self.rise else (1 - done) / (1 - self.rise))

    def eps(self, eps: float, done: float) -> float:
        return eps if done >= self.eps_warmup else eps * done / self.eps_warmup

    def precision(self, device: torch.device) -> torch.dtype:
        return fastest(device) if self.bf16 else torch.float32


@dataclass(frozen=True)
class Epoch:
    """One epoch of the history: mean loss, seconds, and accuracies on the images that are watched."""

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
    """What a training run was and did; `run.json` beside the weights.

    `held_out` says where the watched images are from; without it they are training images.
    """

    recipe: str
    schedule: Schedule
    ball: Ball
    data: Provenance
    n: int
    seed: int
    tier: str
    hardware: Hardware
    precision: str = "float32"
    held_out: Provenance | None = None
    history: tuple[Epoch, ...] = field(default=())

    @property
    def seconds(self) -> float:
        return sum(epoch.seconds for epoch in self.history)

    @property
    def selected(self) -> int:
        """The epoch whose weights the run leaves: the most robust on held-out images, else the last.

        Only epochs that reached the largest eps are compared; of equals the later one stays.
        """
        if self.held_out is None:
            return self.history[-1].number

        def worth(epoch: Epoch) -> tuple[float, int, int]:
            reached = self.schedule.eps(self.ball.eps, epoch.number / self.schedule.epochs)
            return reached, epoch.pgd.k, epoch.number

        return max(self.history, key=worth).number

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
    held_out: Dataset | None = None,
    seed: int = 0,
    recipe: str = "custom",
    tier: str = "standard",
    run_dir: Path | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    progress: bool = True,
) -> Run:
    """Train `model` in place, and return the history.

    With a `run_dir`, a checkpoint is written every 30 seconds and at each epoch's end; the same call with
    the same directory goes on from it and gives the identical weights, because the order of the images
    and the attack's random numbers are derived from (seed, step). An interruption writes none: it falls
    inside a step, where weights, batch statistics and the step number need not agree.
    Under torchrun the shards of each batch are shared among the ranks, with the weights of one process,
    bit for bit; rank 0 writes the files, in a directory that all ranks see.
    After each epoch FGSM and PGD-10 are compared on `schedule.watched` training images, and a gap over 20
    points is warned of: catastrophic overfitting usually happens within one or two epochs. With `held_out`
    that is done on those images instead, and `model` gets the weights of the epoch that was the most robust
    on them (`Run.selected`): never give it test images.
    With `schedule.ema` what is watched, selected and left is the moving average of the weights.
    `on_epoch` is called with each epoch that ends, on rank 0.

    Source: Wong, Rice & Kolter 2020 (arXiv 2001.03994) for the triangular schedule; Rice, Wong & Kolter 2020
    (arXiv 2002.11569) for the selection; Izmailov et al. 2018 (arXiv 1803.05407) for averaging weights and
    giving the average batch statistics of its own.
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
    precision = str(schedule.precision(device)).removeprefix("torch.")
    origin = None if held_out is None else held_out.provenance
    run = Run(
        *(recipe, schedule, ball, data.provenance, len(data), seed, tier, hardware(device), precision, origin)
    )
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = OPTIMIZERS[schedule.optimizer](model, schedule.peak_lr)
    state = _State(model, optimizer, copy.deepcopy(model) if schedule.ema else model)
    batches = max(len(data) // schedule.batch_size, 1)
    total = schedule.epochs * batches
    watched = _watched(data, schedule.watched, seed) if held_out is None else held_out
    progress_made = _Progress()
    checkpoint = None if run_dir is None else run_dir / "checkpoint.pt"
    if checkpoint is not None and checkpoint.exists():
        progress_made = _resume(checkpoint, run, state)
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
            loss = _step(model, optimizer, *data.batch(chosen), defence, ball, schedule, step, total, seed)
            _follow(state.average, model, min(schedule.ema, (1 + step) / (10 + step)))
            progress_made.step += 1
            progress_made.losses += loss
            bar.update()
            if batch + 1 == batches:
                now = time.perf_counter()
                reached = replace(ball, eps=schedule.eps(ball.eps, (step + 1) / total))
                seconds = progress_made.seconds + now - started
                if state.average is not model:
                    _settle(state.average, model, data, defence, reached, schedule, seed, epoch)
                shares = _monitor(state.average, watched, reached, seed, epoch)
                record = Epoch(epoch + 1, progress_made.losses / batches, seconds, *shares)
                progress_made = _Progress(progress_made.step, 0.0, 0.0, (*progress_made.history, record))
                if held_out and replace(run, history=progress_made.history).selected == record.number:
                    state.selected = _copied(state.average)
                started = now
                if on_epoch and first:
                    on_epoch(record)
                bar.set_postfix(
                    loss=f"{record.loss:.3f}",
                    clean=f"{record.clean.share:.2f}",
                    pgd=f"{record.pgd.share:.2f}",
                )
                if record.alarm and progress and first:
                    bar.write(
                        f"warning: epoch {epoch + 1}: FGSM accuracy {record.fgsm.share:.0%}, PGD-10 accuracy "
                        f"{record.pgd.share:.0%} on {record.pgd.n} images: catastrophic overfitting",
                        file=sys.stderr,
                    )
            if (
                first
                and checkpoint is not None
                and (batch + 1 == batches or time.perf_counter() - saved > CHECKPOINT_SECONDS)
            ):
                saved = time.perf_counter()
                _save(checkpoint, run, state, progress_made, saved - started)
    finally:
        bar.close()
    run = replace(run, history=progress_made.history)
    model.load_state_dict(state.selected or state.average.state_dict())
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
        loss = _loss(model, x[rows], y[rows], defence, ball, schedule, seed, step, shard)
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
    schedule: Schedule,
    seed: int,
    step: int,
    shard: int,
) -> Tensor:
    """The defence's loss on one shard."""
    key = (step, shard) if shard else (step,)  # a batch that is one shard keeps the stream it always had
    generator = seeded(seed, "attack", *key, device=x.device)
    precision = schedule.precision(x.device)
    with (
        torch.random.fork_rng(devices=[]),  # dropout in a model draws from the global generator
        torch.autocast(x.device.type, precision, enabled=precision != torch.float32),
    ):
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


# --- averaged weights -------------------------------------------------------------------------------


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's; an average that is the model itself stays."""
    for value, latest in zip(average.parameters(), model.parameters(), strict=True):
        if value is not latest:
            value.lerp_(latest, 1 - decay)


def _settle(
    average: nn.Module,
    model: nn.Module,
    data: Dataset,
    defence: Defence,
    ball: Ball,
    schedule: Schedule,
    seed: int,
    epoch: int,
) -> None:
    """Give the averaged weights batch statistics of their own, from the passes that training makes.

    The model's belong to other weights, and an average of them over time to none at all.
    """
    for buffer, latest in zip(average.buffers(), model.buffers(), strict=True):
        buffer.copy_(latest)
    norms = [
        layer for layer in average.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the plain mean over all batches since the counter was zero
        norm.num_batches_tracked.zero_()  # type: ignore[union-attr]
    rows = torch.randperm(len(data), generator=seeded(seed, "settle", epoch))[:SETTLED].to(data.x.device)
    average.train()
    for number, chosen in enumerate(rows.tensor_split(max(len(rows) // schedule.batch_size, 1))):
        _loss(average, *data.batch(chosen), defence, ball, schedule, seed, -1 - epoch, number)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


# --- watching --------------------------------------------------------------------------------------


def _watched(data: Dataset, n: int, seed: int) -> Dataset:
    return data.take(torch.randperm(len(data), generator=seeded(seed, "monitor"))[:n].tolist())


def _monitor(
    model: nn.Module, watched: Dataset, ball: Ball, seed: int, epoch: int
) -> tuple[Interval, Interval, Interval]:
    """Clean, FGSM and PGD-10 accuracy on the same images, in the ball that training has reached."""
    generator = seeded(seed, "monitor", epoch, device=watched.x.device)
    right = torch.zeros(3, dtype=torch.int64)
    for rows in torch.arange(len(watched), device=watched.x.device).split(256):
        x, y = watched.batch(rows)
        stronger = pgd(model, x, y, ball, steps=10, generator=generator)
        with torch.no_grad(), strict_fp32(), modes_kept(model):
            model.eval()
            each = [model(images).argmax(1) == y for images in (x, fgsm(model, x, y, ball), stronger)]
        right += torch.stack(each).sum(1).cpu()
    clean, fast, strong = (Interval(int(k), len(watched)) for k in right)
    return clean, fast, strong


# --- checkpoints -----------------------------------------------------------------------------------


@dataclass
class _State:
    """The tensors of a run; `average` is `model` itself where weights are not averaged."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: nn.Module
    selected: dict[str, Tensor] | None = None


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


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


def _save(path: Path, run: Run, state: _State, progress: _Progress, running: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(
        {
            "identity": _identity(run),
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "average": state.average.state_dict(),
            "selected": state.selected,
            "progress": json.dumps(asdict(replace(progress, seconds=progress.seconds + running))),
        },
        buffer,
    )
    write_atomically(path, buffer.getvalue())


def _resume(path: Path, run: Run, state: _State) -> _Progress:
    _check_size(path, state.model)
    try:
        read = torch.load(path, map_location=next(state.model.parameters()).device, weights_only=True)
        same = read["identity"] == _identity(run)
        stored = json.loads(read["progress"])
        progress = _Progress(
            stored["step"], stored["losses"], stored["seconds"], tuple(map(_epoch, stored["history"]))
        )
        finite = all(bool(value.isfinite().all()) for value in read["model"].values())
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise RobustkitError(f"{path} is not a readable checkpoint; delete it to start again.") from error
    if not same:
        raise RobustkitError(
            f"{path} belongs to a run with other settings; choose another directory or delete it."
        )
    if not finite:
        raise RobustkitError(f"{path} holds NaN or infinity; delete it to start again.")
    try:
        state.model.load_state_dict(read["model"])
        state.optimizer.load_state_dict(read["optimizer"])
        state.average.load_state_dict(read["average"])
        state.selected = read["selected"]
    except (RuntimeError, ValueError, KeyError) as error:
        raise RobustkitError(
            f"{path} belongs to another model; choose another directory or delete it."
        ) from error
    return progress


def _check_size(path: Path, model: nn.Module) -> None:
    """Refuse, unread, what is larger than weights, average, selection and two moments. Raises: RobustkitError."""
    size, limit = path.stat().st_size, 6 * sum(v.nbytes for v in model.state_dict().values()) + 2**24
    if size > limit:
        raise RobustkitError(
            f"{path} has {size:,} bytes, at most {limit:,} fit this model; choose another directory or delete it."
        )


def _epoch(record: dict[str, Any]) -> Epoch:
    shares = {name: Interval(**record[name]) for name in ("clean", "fgsm", "pgd")}
    return Epoch(
        record["number"], record["loss"], record["seconds"], shares["clean"], shares["fgsm"], shares["pgd"]
    )
