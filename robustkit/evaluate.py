"""Evaluation: worst case per example over attacks, every verdict given here."""

from __future__ import annotations

import datetime
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from robustkit import __version__
from robustkit.attacks import (
    Attack,
    apgd,
    apgd_targeted,
    fab_targeted,
    fgsm,
    noise,
    pgd,
    rs_fgsm,
    spatial_grid,
    spatial_random,
    square,
)
from robustkit.attacks.library import LIBRARY
from robustkit.attacks.transfer import on_surrogate
from robustkit.data import Dataset
from robustkit.device import Model, Prepared, attackable, digest, hardware, prepare, seeded, strict_fp32
from robustkit.errors import RobustkitError
from robustkit.journal import Done, Journal, opened
from robustkit.losses import dlr, margin
from robustkit.results import CLEAN, AttackRun, Evaluation, Hardware, Provenance
from robustkit.threat import (
    KNOWLEDGE,
    Ball,
    Patch,
    PerturbationSet,
    ThreatModel,
    check_batch,
    check_logits,
    check_no_probabilities,
    check_places,
    check_units,
)

ATTACKS: dict[str, Attack] = {
    "fgsm": fgsm,
    "rs-fgsm": rs_fgsm,
    "pgd-10": partial(pgd, steps=10),
    "pgd-40": partial(pgd, steps=40),
    "pgd-50x10": partial(pgd, steps=50, restarts=10),
    "pgd-100x10": partial(pgd, steps=100, restarts=10),
    "apgd-ce": apgd,
    "apgd-dlr": partial(apgd, loss=dlr),
    "apgd-t": apgd_targeted,
    "fab-t": fab_targeted,
    "square": partial(square, queries=5000),
    "noise": partial(noise, draws=100),
    "spatial-grid": spatial_grid,
    "spatial-random": partial(spatial_random, draws=10),
}


# Lists of attacks with a name; a result made with one says so. `quick` is a first look, `standard` AutoAttack's
# standard four with their settings, by our own engine; its referee is pyautoattack, `autoattack` in the library.
# `fast` has the steps of standard (half of them lost an image in 200), no FAB, which broke nothing that the
# others left, and half of Square's queries, for masked gradients.
PROTOCOLS: dict[str, Mapping[str, Attack]] = {
    "quick": {
        "fgsm": fgsm,
        "apgd-ce-20": partial(apgd, steps=20),
        "apgd-t-20x3": partial(apgd_targeted, steps=20, targets=3),
    },
    "fast": {
        "apgd-ce-100": partial(apgd, steps=100),
        "apgd-t-100x9": partial(apgd_targeted, steps=100, targets=9),
        "square-2500": partial(square, queries=2500),
    },
    "standard": {
        "apgd-ce-100": partial(apgd, steps=100),
        "apgd-t-100x9": partial(apgd_targeted, steps=100, targets=9),
        "fab-t-100x9": partial(fab_targeted, steps=100, targets=9),
        "square-5000": partial(square, queries=5000),
    },
}

# What an attack needs to know, where it is less than everything: an attack, or the function of a partial.
_KNOWLEDGE: list[tuple[Any, str]] = [
    *((attack, "score-based") for attack in (square, noise, spatial_grid, spatial_random)),
    *((LIBRARY[name], "score-based") for name in ("autoattack-square", "art-square", "cleverhans-spsa")),
    *((attack, "label-only") for name, attack in LIBRARY.items() if name.endswith(("jump", "boundary"))),
    (on_surrogate, "transfer"),
]

# A model whose logits change from one call to the next is asked this often for each verdict.
DRAWS = 10

PROBED = 32  # images that a model is tried on before the work begins


def predict(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """Whether each example is classified right, in strict float32 and eval mode.

    A tie between the true class and another counts against the model.
    Shapes: (n, ...), (n,) -> bool (n,). Raises: RobustkitError on unusable logits.
    """
    logits = _strict_logits(model, x)
    check_logits(logits, y)
    return margin(logits, y) < 0


def _strict_logits(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad(), strict_fp32(), attackable(model):
        return model(x)


@dataclass(frozen=True)
class Job:
    """One batch for one attack: its name, and the positions in the data of the images to attack."""

    attack: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Attacker:
    """The work of an evaluation: a job in, the positions of the images that it broke out.

    Attacks search on `search`, which `device.prepare` made of `model`; verdicts come from `model`. An
    image is broken when any of `draws` predictions of its candidate is wrong. Everything random, the
    model's own draws from torch's global generator included, follows from (seed, attack, first row), so
    it does not matter where or when, or in which order, jobs are done.
    """

    model: Model
    search: Model
    data: Dataset
    ball: PerturbationSet
    attacks: Mapping[str, Attack]
    seed: int
    draws: int = 1

    def __call__(self, job: Job) -> list[int]:
        rows = torch.tensor(job.rows, device=self.data.x.device)
        x, y = self.data.x[rows], self.data.y[rows]
        key = self.seed, job.attack, job.rows[0]
        generator = seeded(*key, device=x.device)
        with _global_random_state(x.device, *key):
            # Copies: an attack that changes its input in place would otherwise be measured from there.
            candidates = self.attacks[job.attack](
                self.search, x.clone(), y.clone(), self.ball, generator=generator
            )
            check_candidates(job.attack, x, candidates, self.ball)
            right = [predict(self.model, candidates, y) for _ in range(self.draws)]
        return rows[~torch.stack(right).all(0)].tolist()


@contextmanager
def _global_random_state(device: torch.device, *key: int | str) -> Iterator[None]:
    """torch's global generators seeded by `key` inside, for models that draw from them; as before outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seeded(*key, "model").initial_seed())
        yield


class Runner(Protocol):
    """Who does the jobs of one attack: this process in turn, or others; pairs come back in any order."""

    def __call__(
        self, work: Callable[[Job], list[int]], jobs: Sequence[Job]
    ) -> Iterator[tuple[Job, list[int]]]: ...


def in_turn(work: Callable[[Job], list[int]], jobs: Sequence[Job]) -> Iterator[tuple[Job, list[int]]]:
    """One job after the other, here."""
    for job in jobs:
        yield job, work(job)


def evaluate(
    model: Model,
    data: Dataset,
    ball: PerturbationSet,
    attacks: Mapping[str, Attack],
    *,
    model_name: str,
    tier: str,
    seed: int = 0,
    batch_size: int = 250,
    runner: Runner = in_turn,
    journal: Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Robust accuracy as the worst case over `attacks`, example by example.

    Attacks run in the given order; each meets only the examples that survived the earlier ones. An
    attack proposes candidates; `Attacker` measures them against the ball and predicts them again
    in strict float32, so that nothing an attack says about its own success counts.
    With `journal`, every finished batch is one line of that file: the same call after a kill goes on
    from there, in batches of the size that it was begun with, and gives the result of an uninterrupted
    one, but for the seconds. The file stays; remove it once the result is stored.
    When memory runs out the batches are halved, and the notes say so.
    A model whose logits change from call to call gets `DRAWS` predictions for each verdict, clean ones
    included, and one wrong prediction breaks the image: the attacker may try again. The notes say so.
    Source: Croce & Hein 2020 (arXiv 2003.01690), section 5, for the worst case per example.
    Randomness: each batch's generator follows from (seed, attack, first example).
    Raises: RobustkitError when there is no attack, when batch, ball or model are unusable (see `threat`),
    when an attack returns another shape, NaN, or a candidate outside the ball or the box, or when
    `journal` is that of another evaluation.
    """
    if not attacks:
        raise RobustkitError("an evaluation needs at least one attack; give one, e.g. fgsm.")
    if CLEAN in attacks:
        raise RobustkitError(f"an attack cannot be called {CLEAN!r}, the name of no attack; rename it.")
    if batch_size < 1:
        raise RobustkitError(f"batch_size must be at least 1; got {batch_size}.")
    check_places(model, data.x, data.y)
    check_batch(data.x, data.y)
    check_units(ball, data.x)
    search = prepare(model, data.x[:batch_size])
    model = model.strict if isinstance(model, Prepared) else model
    with _global_random_state(data.x.device, seed, "probe"):
        probe, again = (_strict_logits(model, data.x[:PROBED]) for _ in range(2))
    check_logits(probe, data.y[:PROBED], classes=len(data.classes))
    check_no_probabilities(probe)
    steady = _agree(probe, again)
    settings = {name: _parameters(attack) for name, attack in attacks.items()}
    draws = 1 if steady else DRAWS
    work = Attacker(model, search, data, ball, {CLEAN: _untouched, **attacks}, seed, draws)
    header = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": asdict(hardware(data.x.device)),
        "data": asdict(data.provenance),
        "batch_size": batch_size,
        "identity": {
            "robustkit": __version__,
            "model": model_name,
            "weights": digest(model.state_dict().values()) if isinstance(model, nn.Module) else "",
            "logits": probe[:4].nan_to_num().flatten().tolist() if steady else None,
            "images": digest([data.x, data.y, torch.tensor(data.indices)]),
            "ball": repr(ball),
            "attacks": [[name, _origin(attack), settings[name]] for name, attack in attacks.items()],
            "seed": seed,
            "tier": tier,
        },
    }
    broken_by: list[str | None] = [None] * len(data)
    with opened(journal, header) as record:
        for number, name in enumerate(work.attacks):
            left = [row for row, verdict in enumerate(broken_by) if verdict is None]
            label = f"{name} ({number}/{len(attacks)})" if number else name
            with tqdm(
                total=len(left), desc=label, unit="image", disable=not progress, file=sys.stderr
            ) as bar:
                for done in _finish(work, name, left, record, runner):
                    for row in done.broken:
                        broken_by[row] = name
                    bar.update(len(done.rows))
                    bar.set_postfix(robust=f"{broken_by.count(None) / len(broken_by):.1%}")
    return Evaluation(
        model=model_name,
        threat=ThreatModel(ball, strongest_knowledge(attacks), goal="untargeted", queries=None),
        data=Provenance(**record.header["data"]),
        indices=tuple(int(i) for i in data.indices),
        attacks=tuple(
            AttackRun(name, settings[name], sum(done.seconds for done in record.done if done.attack == name))
            for name in attacks
        ),
        broken_by=tuple(broken_by),
        seed=seed,
        tier=tier,
        hardware=Hardware(**record.header["hardware"]),
        created=record.header["created"],
        notes=tuple(_notes(model, steady, record, data.x.device)),
        protocol=_protocol_of(attacks),
    )


def _finish(
    work: Attacker, attack: str, rows: Sequence[int], journal: Journal, runner: Runner
) -> Iterator[Done]:
    """All jobs of one attack on `rows`: those in the journal first, then the others, which are written there.

    Out of memory, the batches that are left are halved, for later attacks as well.
    """
    size = min([journal.header["batch_size"], *(done.batch_size for done in journal.done)])
    before = journal.of(attack, rows)
    yield from before
    left = _without(rows, before)
    started = time.perf_counter()
    while left:
        jobs = [Job(attack, tuple(left[i : i + size])) for i in range(0, len(left), size)]
        try:
            for job, broken in runner(work, jobs):
                now = time.perf_counter()
                done = Done(attack, job.rows, tuple(broken), now - started, size)
                journal.write(done)
                left, started = _without(left, [done]), now
                yield done
        except torch.OutOfMemoryError as error:
            size = min(size, len(left)) // 2
            if size == 0:
                raise RobustkitError(
                    f"{attack} runs out of memory on a single image; "
                    "use a device with more memory, or a smaller model."
                ) from error


def _without(rows: Sequence[int], finished: Sequence[Done]) -> list[int]:
    gone = {row for done in finished for row in done.rows}
    return [row for row in rows if row not in gone]


def _untouched(
    model: Model, x: Tensor, y: Tensor, ball: PerturbationSet, *, generator: torch.Generator | None = None
) -> Tensor:
    """The attack behind the verdict "clean": no perturbation."""
    return x


def _agree(logits: Tensor, again: Tensor) -> bool:
    """Whether two answers to the same images differ by rounding alone, as sums in another order do."""
    scale = logits[logits.isfinite()].abs().amax().item() if logits.isfinite().any() else 0.0
    return torch.allclose(logits, again, rtol=0, atol=1e-4 * scale)


def _notes(model: Model, steady: bool, journal: Journal, device: torch.device) -> Iterator[str]:
    """What a reader must know about how the figure came about."""
    if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
        yield "the model came in train mode and was evaluated in eval mode"
    if not steady:
        yield (
            f"the model's logits change from call to call: an image counts as broken when any of {DRAWS} "
            "predictions is wrong, clean ones included"
        )
    begun, here = Hardware(**journal.header["hardware"]), hardware(device)
    if begun != here:
        yield f"begun on {begun}, and gone on with on {here}"
    largest, smallest = journal.header["batch_size"], min(done.batch_size for done in journal.done)
    if smallest < largest:
        yield f"out of memory: batches went down from {largest} to {smallest} images"


def check_candidates(name: str, x: Tensor, candidates: Tensor, ball: PerturbationSet) -> None:
    """Refuse candidates that the threat model does not allow. Raises: RobustkitError."""
    if not isinstance(candidates, Tensor) or candidates.dtype != x.dtype:
        found = candidates.dtype if isinstance(candidates, Tensor) else type(candidates).__name__
        raise RobustkitError(
            f"attack {name!r} returned {found} for images of {x.dtype}; return a tensor of those."
        )
    if candidates.shape != x.shape:
        raise RobustkitError(
            f"attack {name!r} returned shape {tuple(candidates.shape)} for images of shape {tuple(x.shape)}; "
            "it must return one candidate per image."
        )
    if not torch.isfinite(candidates).all():
        raise RobustkitError(
            f"attack {name!r} returned NaN or infinite pixels; no verdict can be given on them."
        )
    low, high = candidates.min().item(), candidates.max().item()
    if low < 0 or high > 1:
        raise RobustkitError(
            f"attack {name!r} left the box [0, 1]: pixels in [{low:.3g}, {high:.3g}]; clamp them."
        )
    inside = ball.contains(x, candidates)
    if not inside.all():
        if isinstance(ball, Ball):
            size = ball.size(candidates - x).max().item()
            reason = f"{ball.norm} distance {size:.4g}, allowed {ball.eps:.4g}; project with Ball.candidates."
        elif isinstance(ball, Patch):
            reason = f"pixels changed outside of one {ball}; change those of a single square."
        else:
            reason = (
                "no transform of the lattice gives them; build them with RotationTranslation.transformed."
            )
        raise RobustkitError(
            f"attack {name!r} left its ball on {int((~inside).sum())} of {len(x)} images: {reason}"
        )


def _parameters(attack: Attack) -> dict[str, Any]:
    """The settings that a partial fixes; a plain function runs with its documented defaults."""
    if not isinstance(attack, partial):
        return {}
    return {key: _setting(value) for key, value in attack.keywords.items()}


def _setting(value: Any) -> Any:
    """A setting as JSON has it, and the same in every process: no address in memory."""
    if value is None or isinstance(value, int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}, weights sha256 {digest(value.state_dict().values())[:16]}"
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}, sha256 {digest([value])[:16]}"
    return getattr(value, "__name__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _function(attack: Attack) -> Any:
    return attack.func if isinstance(attack, partial) else attack


def _origin(attack: Attack) -> str:
    """Where the code of an attack is."""
    function = _function(attack)
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def strongest_knowledge(attacks: Mapping[str, Attack]) -> str:
    """What the most knowing of the attacks needs: the `knowledge` of an evaluation's threat model."""

    def of(attack: Attack) -> str:
        is_it = (name for one, name in _KNOWLEDGE if one is attack or one is _function(attack))
        return next(is_it, KNOWLEDGE[0])

    return min(map(of, attacks.values()), key=KNOWLEDGE.index)


def _protocol_of(attacks: Mapping[str, Attack]) -> str | None:
    """The name of the protocol that consists of these attacks, in this order."""
    names = [name for name, of in PROTOCOLS.items() if [*of.items()] == [*attacks.items()]]
    return names[0] if names else None


def find_protocol(name: str) -> Mapping[str, Attack]:
    """A protocol by name. Raises: RobustkitError for one that is unknown."""
    if name not in PROTOCOLS:
        raise RobustkitError(f"protocol {name!r} is unknown; choose from {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def find_attacks(names: str) -> dict[str, Attack]:
    """Attacks from a comma-separated list of names. Raises: RobustkitError for one that is unknown."""
    known, chosen = ATTACKS | LIBRARY, {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in known:
            raise RobustkitError(f"attack {name!r} is unknown; choose from {', '.join(known)}.")
        chosen[name] = known[name]
    return chosen
