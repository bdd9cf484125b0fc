"""Randomized smoothing: classify by votes under Gaussian noise, and certify an L2 radius from the votes.

Source of all of it: Cohen, Rosenfeld & Kolter 2019 (arXiv 1902.02918), figure 1 and section 3.2.
The noise of an image depends on its generator alone: it is drawn in blocks of a fixed size, so that the
batch size changes nothing. Noise is not clamped into [0, 1]: the proof is about Gaussian noise.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from scipy.stats import binomtest  # type: ignore[import-untyped]
from torch import Tensor
from tqdm import tqdm

from robustkit.certify.certificates import ABSTAIN, Base, Certification, Row, Smoothing, rows_file
from robustkit.certify.confidence import (
    STAGES,
    certified_radius,
    decide,
    lower_bound,
    share_for,
    staged_test,
)
from robustkit.data import Dataset
from robustkit.device import Model, Prepared, attackable, hardware, prepare, seeded, strict_fp32
from robustkit.errors import RobustkitError
from robustkit.results import Interval
from robustkit.threat import check_batch, check_logits

BLOCK = 250  # noisy copies drawn at a time; on CPUs, also the batch at which a small CNN stays in the cache


def votes(
    model: Model,
    image: Tensor,
    sigma: float,
    n: int,
    generator: torch.Generator,
    *,
    batch_size: int = BLOCK,
) -> Tensor:
    """How often the model gives each class to `n` noisy copies of one image.

    On a CPU another thread draws the next copies meanwhile: torch draws normal numbers on one core, and for a
    small model that takes a quarter of a pass.
    Shapes: image (c, h, w) -> (classes,) int64, on the CPU. Units: sigma in input units.
    Randomness: `generator` alone, on the device of `image`; whatever the batch size, the noise is the same.
    Raises: RobustkitError when the batch size is no multiple of BLOCK, or the model does not return a
    finite row of logits for each copy.
    """
    _check_batch_size(batch_size)
    copies = torch.empty((2, min(batch_size, n), *image.shape), device=image.device, dtype=image.dtype)
    counts = torch.zeros((), dtype=torch.int64, device=image.device)

    def draw(start: int) -> Tensor:
        batch = copies[start // batch_size % 2, : n - start]
        for block in batch.split(BLOCK):
            block.normal_(0.0, sigma, generator=generator)
        return batch

    with torch.no_grad(), strict_fp32(), attackable(model), ThreadPoolExecutor(1) as aside:
        ahead = aside.submit if image.device.type == "cpu" else _at_once
        coming = _at_once(draw, 0)
        for start in range(0, n, batch_size):
            batch, following = coming.result(), start + batch_size
            if following < n:
                coming = ahead(draw, following)
            logits = model(batch.add_(image))
            _check_votes(logits, len(batch))
            counts = counts + torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return counts.cpu()


def _at_once(work: Callable[[int], Tensor], start: int) -> Future[Tensor]:
    """As `submit` of a pool, in this thread."""
    done: Future[Tensor] = Future()
    done.set_result(work(start))
    return done


def predict(
    model: Model,
    image: Tensor,
    smoothing: Smoothing,
    generator: torch.Generator,
    *,
    batch_size: int = BLOCK,
) -> int:
    """The smoothed classifier's class, or ABSTAIN; another class than its true one with probability <= alpha.

    Source: PREDICT. Shapes, randomness, raises: as `votes`; n0 is not used.
    """
    counts = votes(model, image, smoothing.sigma, smoothing.n, generator, batch_size=batch_size)
    first, second = counts.topk(2).values.tolist()
    decided = binomtest(first, first + second, 0.5).pvalue <= smoothing.alpha
    return int(counts.argmax()) if decided else ABSTAIN


def certificate(
    model: Model,
    image: Tensor,
    smoothing: Smoothing,
    generator: torch.Generator,
    *,
    batch_size: int = BLOCK,
) -> tuple[int, float]:
    """A class and an L2 radius within which the smoothed classifier keeps it, or ABSTAIN and 0.

    Source: CERTIFY. n0 samples choose the class and n others bound its share from below, at level alpha
    one-sided: samples that had chosen the class would flatter it.
    Shapes, units, randomness, raises: as `votes`; the radius is in input units.
    """
    chosen = votes(model, image, smoothing.sigma, smoothing.n0, generator, batch_size=batch_size).argmax()
    counts = votes(model, image, smoothing.sigma, smoothing.n, generator, batch_size=batch_size)
    share = lower_bound(int(counts[chosen]), smoothing.n, smoothing.alpha)
    return (ABSTAIN, 0.0) if share < 0.5 else (int(chosen), certified_radius(share, smoothing.sigma))


@dataclass(frozen=True)
class Decision:
    """The answer to "certified at this radius?": the class, the verdict, and the samples that it took."""

    prediction: int
    certified: bool
    samples: int


def certified_at(
    model: Model,
    image: Tensor,
    radius: float,
    sigma: float,
    generator: torch.Generator,
    *,
    n0: int = 100,
    alpha: float = 0.001,
    beta: float = 0.001,
    stages: Sequence[int] = STAGES,
    batch_size: int = BLOCK,
) -> Decision:
    """Whether the smoothed classifier keeps its class within `radius`, with as few samples as the answer needs.

    Source: CERTIFY with the Clopper-Pearson bound taken at each stage at alpha / stages (union bound):
    a false "certified" has probability at most alpha, as in `certificate`; see `confidence.staged_test`.
    Shapes, units, randomness: as `votes`.
    Raises: as `votes`; RobustkitError for a radius that is not positive or that no votes could certify.
    """
    if not radius > 0:
        raise RobustkitError(f"the radius to certify must be above zero; got {radius}.")
    plan = staged_test(share_for(radius, sigma), alpha, beta, stages)
    chosen = votes(model, image, sigma, n0, generator, batch_size=batch_size).argmax()
    verdict, drawn = decide(
        plan,
        lambda n: int(votes(model, image, sigma, n, generator, batch_size=batch_size)[chosen]),
    )
    return Decision(int(chosen), verdict, n0 + drawn)


def certify(
    model: Model,
    data: Dataset,
    smoothing: Smoothing,
    *,
    model_name: str,
    tier: str,
    seed: int = 0,
    notes: tuple[str, ...] = (),
    rows: Path | None = None,
    batch_size: int = BLOCK,
    progress: bool = True,
) -> Certification:
    """A certificate for every image, one flushed line each in the file `rows`.

    The same call with the same file goes on where it stopped and gives the same rows, whatever the batch
    size, because the noise of an image follows from (seed, its index). The base classifier is `model`
    as `device.prepare` makes it, and the record names its precision.
    Randomness: `seed` alone.
    Raises: RobustkitError on unusable images or logits, and when the file is the log of something else.
    """
    check_batch(data.x, data.y)
    _check_batch_size(batch_size)
    base_model = prepare(model, data.x[:BLOCK])
    base = base_of(base_model, data, smoothing.sigma, seed)
    if base.warning and progress:
        print(f"robustkit: {base.warning}.", file=sys.stderr)
    settings = {
        "model": model_name,
        "precision": base.precision,
        "smoothing": asdict(smoothing),
        "data": data.provenance.sha256,
        "images": hashlib.sha256(json.dumps(data.indices).encode()).hexdigest()[:16],
        "seed": seed,
        "notes": list(notes),
    }
    with (
        rows_file(rows, settings) as (done, append),
        tqdm(
            total=len(data),
            initial=len(done),
            desc="certify",
            unit="image",
            disable=not progress,
            file=sys.stderr,
        ) as bar,
    ):
        if [row.index for row in done] != list(data.indices[: len(done)]):
            raise RobustkitError(f"the rows in {rows} are not those of these images in order; delete it.")
        for position in range(len(done), len(data)):
            done.append(_certify(base_model, data, position, smoothing, seed, batch_size))
            append(done[-1])
            bar.update()
            bar.set_postfix(right=f"{sum(row.correct for row in done) / len(done):.1%}")
    return Certification(
        model=model_name,
        base=base,
        smoothing=smoothing,
        norm="L2",
        data=data.provenance,
        rows=tuple(done),
        seed=seed,
        tier=tier,
        hardware=hardware(data.x.device),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        notes=notes,
    )


def _certify(
    model: Model, data: Dataset, position: int, smoothing: Smoothing, seed: int, batch_size: int
) -> Row:
    started = time.perf_counter()
    index, label, image = int(data.indices[position]), int(data.y[position]), data.x[position]
    generator = seeded(seed, "certify", index, device=image.device)
    try:
        prediction, radius = certificate(model, image, smoothing, generator, batch_size=batch_size)
    except RobustkitError as error:
        raise RobustkitError(f"image {index}: {error}") from error
    seconds = round(time.perf_counter() - started, 3)
    return Row(index, label, prediction, radius, prediction == label, seconds)


def base_of(model: Model, data: Dataset, sigma: float, seed: int) -> Base:
    """The base classifier's precision, and its accuracy on the images with and without one draw of the noise."""
    clean: list[int] = []
    noisy: list[int] = []
    with torch.no_grad(), strict_fp32(), attackable(model):
        for chosen in torch.arange(len(data), device=data.x.device).split(BLOCK):
            x, y = data.x[chosen], data.y[chosen]
            noise = torch.empty_like(x).normal_(
                0.0, sigma, generator=seeded(seed, "noisy", int(chosen[0]), device=x.device)
            )
            for images, right in ((x, clean), (x + noise, noisy)):
                logits = model(images)
                check_logits(logits, y)
                right.append(int((logits.argmax(1) == y).sum()))
    return Base(precision_of(model), Interval(sum(clean), len(data)), Interval(sum(noisy), len(data)))


def precision_of(model: Model) -> str:
    """The arithmetic in which the model votes: that of its search copy, if it is a prepared one."""
    dtype = getattr(model.search, "dtype", torch.float32) if isinstance(model, Prepared) else torch.float32
    return str(dtype).removeprefix("torch.")


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1 or batch_size % BLOCK:
        raise RobustkitError(
            f"the batch size must be a multiple of {BLOCK}, the noise's block; got {batch_size}."
        )


def _check_votes(logits: Tensor, n: int) -> None:
    """Refuse logits that are no votes. Raises: RobustkitError."""
    if logits.dim() != 2 or len(logits) != n or logits.shape[1] < 2:
        raise RobustkitError(
            f"the model must return logits of shape ({n}, classes); got {tuple(logits.shape)}."
        )
    if logits.isnan().any():
        raise RobustkitError("the model returned NaN logits, and a NaN is no vote; check its weights.")
