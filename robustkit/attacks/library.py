"""Attacks of other libraries under our signature, so that one can be swapped for another.

    LIBRARY["autoattack-square"](model, x, y, ball, generator=...) -> Tensor

Whatever the peer does, an adapter here keeps the house rules: candidates inside ball and box in the
shape and dtype of `x` (the point that a minimum-norm attack finds is projected into the ball); modes and
`requires_grad` as they were; nothing printed; the global random states of torch, numpy and Python seeded
from `generator` and put back. The model is handed over in eval mode and frozen: no weight gradients are
left in `.grad`, and none are computed, which also makes the peers faster than their users see them
(those that call `backward` compute weight gradients and throw them away). Peers use the process's
random state, so only one runs at a time, also when threads share the work. The libraries are imported at
their first use.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustkit.attacks import Attack
from robustkit.device import Model, Prepared, attackable, confirmed
from robustkit.errors import RobustkitError
from robustkit.threat import Ball, check_batch, check_logits

_ALONE = threading.Lock()


def _peer(module: str) -> Any:
    """A peer's module. Raises: RobustkitError when its library is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise RobustkitError(
            f"{module.split('.')[0]} is not installed ({error}); pip install 'robustkit[peers]'."
        ) from error


class _Handed(nn.Module):
    """A model as the peers want it: a module, float32 in and out."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.dtype)).float()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No print, progress bar, warning or log record of a peer; a debugger's trace function put back."""
    loggers = [logging.getLogger(name) for name in ("auto-attack", "art")]
    levels, trace = [logger.level for logger in loggers], sys.gettrace()
    sink = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.settrace(trace)  # pyautoattack's check of the model switches tracing off
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """The global random states start from `seed` inside, and are put back."""
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002  what peers draw from
    try:
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)


def _classes(model: Model, x: Tensor, y: Tensor) -> int:
    """How many logits the model gives, from one image; refuses labels and logits that no peer would."""
    with torch.no_grad(), attackable(model):
        logits = model(x[:1])
    check_logits(logits, y.max()[None])
    return logits.shape[1]


def _borrow(
    attack: Callable[[nn.Module, Tensor, Tensor, int], Tensor],
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    generator: torch.Generator | None,
) -> Tensor:
    """The candidates of a peer's `attack(model, x, y, seed)`, found under the rules of this module.

    A prepared model is searched on its quick half. A point that the peer dropped because it fooled that
    half alone goes back into the attack, on the strict one.
    """
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**31, (), generator=generator, device=device))

    def found(model: Model, x: Tensor, y: Tensor) -> Tensor:
        with (
            _ALONE,
            attackable(model),
            _quiet(),
            _random_state(seed),
            torch.enable_grad(),
        ):
            points = attack(_Handed(model, x.dtype).eval(), x.detach().float().clone(), y.clone(), seed)
        points = points.detach().to(x)
        # FAB divides by gradients, which may be zero: NaN pixels are no candidate.
        return ball.candidates(x, torch.where(points.isfinite(), points, x) - x)

    candidates = found(model, x, y)
    if isinstance(model, Prepared):
        with torch.no_grad(), attackable(model):
            claimed = model(candidates).argmax(1) != y
        lost = claimed & ~confirmed(model, candidates, y, claimed)
        if lost.any():
            candidates[lost] = found(model.strict, x[lost], y[lost])
    return candidates


def _check(name: str, x: Tensor, y: Tensor, ball: Ball, norms: tuple[str, ...]) -> None:
    """Refuse what a peer cannot do. Raises: RobustkitError."""
    check_batch(x, y)
    if ball.norm not in norms:
        raise RobustkitError(f"{name} has no {ball.norm} form; give it a Ball with {' or '.join(norms)}.")


# --- AutoAttack, as pyautoattack packages it --------------------------------------------------------


def _autoattack(
    part: str | None, model: Model, x: Tensor, y: Tensor, ball: Ball, generator: torch.Generator | None
) -> Tensor:
    name = f"autoattack-{part}" if part else "autoattack"
    _check(name, x, y, ball, ("Linf", "L2", "L1"))
    if part in (None, "square") and x.dim() != 4:
        raise RobustkitError(
            f"{name} changes squares of images, shape (n, channels, height, width); got {tuple(x.shape)}."
        )
    classes = _classes(model, x, y)
    if part in (None, "apgd-t") and classes < 4:
        raise RobustkitError(
            f"{name} divides by the gap between the first and the fourth logit; the model has {classes}. "
            "Use autoattack-apgd-ce."
        )
    module = _peer("pyautoattack")

    def attack(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        whole = module.AutoAttack(model, norm=ball.norm, eps=ball.eps, seed=seed, device=x.device)
        for targeted in (whole.apgd_targeted, whole.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        whole.apgd.loss, whole.fab.targeted = "ce", True
        parts = {
            "apgd-ce": whole.apgd,
            "apgd-t": whole.apgd_targeted,
            "fab-t": whole.fab,
            "square": whole.square,
        }
        found: Tensor = (
            parts[part].perturb(x, y) if part else whole.run_standard_evaluation(x, y, batch_size=len(x))[0]
        )
        return found

    return _borrow(attack, model, x, y, ball, generator)


AUTOATTACK_PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")


def autoattack_part(
    model: Model, x: Tensor, y: Tensor, ball: Ball, *, part: str, generator: torch.Generator | None = None
) -> Tensor:
    """One of the four attacks of AutoAttack's standard protocol, with that protocol's settings.

    Source: Croce & Hein 2020 (arXiv 2003.01690), as packaged by pyautoattack: APGD-CE and targeted APGD
    (9 targets) with 100 steps, targeted FAB with 100 steps, Square with 5,000 queries. Run one after the
    other on the survivors, with the same seed, they are its `run_standard_evaluation`. Difference: a
    model of fewer than 10 classes is attacked towards each of the others, where pyautoattack fails.
    Shapes: x (n, ...), y (n,) -> (n, ...); Square needs images. Units: inputs in [0, 1].
    Randomness: the peer's seed is drawn from `generator`.
    Raises: RobustkitError for an unknown part, a batch outside [0, 1], unusable logits, fewer than four
    classes (apgd-t), or when pyautoattack is not installed.
    """
    if part not in AUTOATTACK_PARTS:
        raise RobustkitError(f"part {part!r} is unknown; choose one of {', '.join(AUTOATTACK_PARTS)}.")
    return _autoattack(part, model, x, y, ball, generator)


def autoattack(
    model: Model, x: Tensor, y: Tensor, ball: Ball, *, generator: torch.Generator | None = None
) -> Tensor:
    """The whole standard protocol of AutoAttack: its four parts, each on what survived the earlier ones.

    Source, shapes, units, randomness, raises: as `autoattack_part`.
    """
    return _autoattack(None, model, x, y, ball, generator)


LIBRARY: dict[str, Attack] = {
    "autoattack": autoattack,
    **{f"autoattack-{part}": partial(autoattack_part, part=part) for part in AUTOATTACK_PARTS},
}
