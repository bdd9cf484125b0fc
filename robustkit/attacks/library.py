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
        with warnings.catch_warnings():  # of what has moved in SciPy since
            warnings.simplefilter("ignore")
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


def _check(name: str, model: Model, x: Tensor, y: Tensor, ball: Ball, norms: tuple[str, ...]) -> int:
    """Refuse what a peer cannot do; how many logits the model gives, from one image. Raises: RobustkitError."""
    check_batch(x, y)
    if ball.norm not in norms:
        raise RobustkitError(f"{name} has no {ball.norm} form; give it a Ball with {' or '.join(norms)}.")
    with torch.no_grad(), attackable(model):
        logits = model(x[:1])
    check_logits(logits, y.max()[None])
    return logits.shape[1]


# --- AutoAttack, as pyautoattack packages it --------------------------------------------------------


def _autoattack(
    part: str | None, model: Model, x: Tensor, y: Tensor, ball: Ball, generator: torch.Generator | None
) -> Tensor:
    name = f"autoattack-{part}" if part else "autoattack"
    classes = _check(name, model, x, y, ball, ("Linf", "L2", "L1"))
    if part in (None, "square") and x.dim() != 4:
        raise RobustkitError(
            f"{name} changes squares of images, shape (n, channels, height, width); got {tuple(x.shape)}."
        )
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


# --- shared by the other adapters -------------------------------------------------------------------

LP = ("Linf", "L2")
ORDER = {"Linf": np.inf, "L2": 2, "L1": 1}  # as NumPy, CleverHans and ART write a norm


def _step_size(ball: Ball, steps: int, step_size: float | None) -> float:
    """The step of a PGD adapter, with the default of our own `pgd`."""
    if steps < 1:
        raise RobustkitError(f"steps must be at least 1; got {steps}.")
    return 2.5 * ball.eps / steps if step_size is None else step_size


def _starts(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each image one of another class: uniform noise, or another image of the batch; and whether there is.

    The first of 100 noise images, then of the batch, that the model does not put in class `y`.
    """
    pool = torch.cat([torch.rand(100, *x.shape[1:], device=x.device), x])
    with torch.no_grad():
        other = model(pool).argmax(1) != y[:, None]
    return pool[other.int().argmax(1)], other.any(1)


def _only(rows: Tensor, x: Tensor, attack: Callable[[], Tensor]) -> Tensor:
    """`x` with some rows attacked, none where there are none: peers stumble over empty batches."""
    found = x.clone()
    if rows.any():
        found[rows] = attack()
    return found


def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What a minimum-norm attack works on; the others are their own nearest adversarial points."""
    with torch.no_grad():
        logits: Tensor = model(x)
    return logits.argmax(1) == y


# --- CleverHans -------------------------------------------------------------------------------------


def cleverhans_fgsm(
    model: Model, x: Tensor, y: Tensor, ball: Ball, *, generator: torch.Generator | None = None
) -> Tensor:
    """CleverHans' fast gradient method: one step of size eps.

    Source: Goodfellow et al. 2015 (arXiv 1412.6572); cleverhans.torch.attacks.fast_gradient_method.
    Shapes, units: as `robustkit.attacks.fgsm`. Randomness: none.
    Raises: RobustkitError for unusable input, or a missing library.
    """
    _check("cleverhans-fgsm", model, x, y, ball, tuple(ORDER))
    module = _peer("cleverhans.torch.attacks.fast_gradient_method")

    def attack(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        found: Tensor = module.fast_gradient_method(
            model, x, ball.eps, ORDER[ball.norm], clip_min=0.0, clip_max=1.0, y=y
        )
        return found

    return _borrow(attack, model, x, y, ball, generator)


def cleverhans_pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 40,
    step_size: float | None = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """CleverHans' projected gradient descent.

    Source: Madry et al. 2018 (arXiv 1706.06083); cleverhans.torch.attacks.projected_gradient_descent.
    Difference: its L2 start is uniform in the cube of half-side eps, then clipped to the ball.
    Shapes, units: as `robustkit.attacks.pgd`, whose default step it gets. Randomness: the start.
    Raises: RobustkitError for norms other than Linf and L2, a step longer than eps, unusable input, or a
    missing library.
    """
    _check("cleverhans-pgd", model, x, y, ball, LP)
    step = _step_size(ball, steps, step_size)
    if step > ball.eps:
        raise RobustkitError(f"cleverhans-pgd takes no step longer than eps; got {step:.4g} for {ball}.")
    module = _peer("cleverhans.torch.attacks.projected_gradient_descent")

    def attack(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        found: Tensor = module.projected_gradient_descent(
            model,
            x,
            ball.eps,
            step,
            steps,
            ORDER[ball.norm],
            clip_min=0.0,
            clip_max=1.0,
            y=y,
            rand_init=random_start,
            sanity_checks=False,  # NumPy asserts on tensors; the judge measures anyway
        )
        return found

    return _borrow(attack, model, x, y, ball, generator)


def cleverhans_cw_l2(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 1000,
    searches: int = 5,
    step_size: float = 5e-3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """CleverHans' Carlini-Wagner attack in L2, a minimum-norm attack; its points are projected into the ball.

    Source: Carlini & Wagner 2017 (arXiv 1608.04644); cleverhans.torch.attacks.carlini_wagner_l2, with
    `steps` for each of `searches` binary searches over the constant.
    Shapes, units: as `robustkit.attacks.pgd`. Randomness: none.
    Raises: RobustkitError for norms other than L2, unusable input, or a missing library.
    """
    classes = _check("cleverhans-cw-l2", model, x, y, ball, ("L2",))
    module = _peer("cleverhans.torch.attacks.carlini_wagner_l2")

    def attack(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        rows = _right(model, x, y)
        return _only(
            rows,
            x,
            lambda: module.carlini_wagner_l2(
                model,
                x[rows],
                classes,
                y=y[rows],
                lr=step_size,
                max_iterations=steps,
                binary_search_steps=searches,
            ),
        )

    return _borrow(attack, model, x, y, ball, generator)


def cleverhans_spsa(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 40,
    samples: int = 128,
    generator: torch.Generator | None = None,
) -> Tensor:
    """CleverHans' SPSA: gradients estimated from `samples` pairs of scores a step, one image at a time.

    Source: Uesato et al. 2018 (arXiv 1802.05666); cleverhans.torch.attacks.spsa.
    Shapes, units: as `robustkit.attacks.pgd`. Randomness: from `generator`.
    Raises: RobustkitError for norms other than Linf and L2, unusable input, or a missing library.
    """
    _check("cleverhans-spsa", model, x, y, ball, LP)
    module = _peer("cleverhans.torch.attacks.spsa")

    def attack(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        found: Tensor = module.spsa(
            model,
            x,
            ball.eps,
            steps,
            norm=ORDER[ball.norm],
            clip_min=0.0,
            clip_max=1.0,
            y=y,
            spsa_samples=samples,
            sanity_checks=False,
        )
        return found

    return _borrow(attack, model, x, y, ball, generator)


def cleverhans_hop_skip_jump(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 64,
    generator: torch.Generator | None = None,
) -> Tensor:
    """CleverHans' HopSkipJump in L2: labels alone, one image at a time; projected into the ball.

    Source: Chen, Jordan & Wainwright 2020 (arXiv 1904.02144);
    cleverhans.torch.attacks.hop_skip_jump_attack, whose Linf form does not run on current torch.
    Difference: where noise gives no other class, the start is another image of the batch; CleverHans
    alone stops there with an assertion.
    Shapes, units: as `robustkit.attacks.pgd`. Randomness: from `generator`.
    Raises: RobustkitError for norms other than L2, unusable input, or a missing library.
    """
    _check("cleverhans-hop-skip-jump", model, x, y, ball, ("L2",))
    module = _peer("cleverhans.torch.attacks.hop_skip_jump_attack")

    def attack(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        starts, found = _starts(model, x, y)
        rows = _right(model, x, y) & found
        return _only(
            rows,
            x,
            lambda: module.hop_skip_jump_attack(
                model,
                x[rows],
                2,
                image_target=starts[rows][:, None],
                constraint=2,
                num_iterations=steps,
                verbose=False,
            ),
        )

    return _borrow(attack, model, x, y, ball, generator)


# --- Adversarial Robustness Toolbox -----------------------------------------------------------------


def _art(
    name: str,
    classes: int,
    settings: dict[str, Any],
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    generator: torch.Generator | None,
) -> Tensor:
    """The candidates of the ART attack of this class name."""
    kind = getattr(_peer("art.attacks.evasion"), name)

    def attack(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        peer = kind(_art_classifier(model, x, classes), norm=ORDER[ball.norm], batch_size=len(x), **settings)
        labels = nn.functional.one_hot(y, classes).cpu().numpy()
        return torch.from_numpy(peer.generate(x.cpu().numpy(), labels))

    return _borrow(attack, model, x, y, ball, generator)


def _art_classifier(model: nn.Module, x: Tensor, classes: int) -> Any:
    return _peer("art.estimators.classification").PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        tuple(x.shape[1:]),
        classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if x.is_cuda else "cpu",
    )


def art_fgsm(
    model: Model, x: Tensor, y: Tensor, ball: Ball, *, generator: torch.Generator | None = None
) -> Tensor:
    """ART's fast gradient method: one step of size eps.

    Source: Goodfellow et al. 2015 (arXiv 1412.6572); art.attacks.evasion.FastGradientMethod.
    Shapes, units: as `robustkit.attacks.fgsm`. Randomness: none.
    Raises: RobustkitError for norms other than Linf and L2, unusable input, or a missing library.
    """
    classes = _check("art-fgsm", model, x, y, ball, LP)
    return _art("FastGradientMethod", classes, {"eps": ball.eps}, model, x, y, ball, generator)


def art_pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 40,
    step_size: float | None = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """ART's projected gradient descent.

    Source: Madry et al. 2018 (arXiv 1706.06083); art.attacks.evasion.ProjectedGradientDescent.
    Shapes, units: as `robustkit.attacks.pgd`, whose default step it gets. Randomness: the start.
    Raises: RobustkitError for norms other than Linf and L2, unusable input, or a missing library.
    """
    classes = _check("art-pgd", model, x, y, ball, LP)
    settings = {
        "eps": ball.eps,
        "eps_step": _step_size(ball, steps, step_size),
        "max_iter": steps,
        "num_random_init": int(random_start),
        "verbose": False,
    }
    return _art("ProjectedGradientDescent", classes, settings, model, x, y, ball, generator)


def art_square(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    queries: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """ART's Square Attack: by scores alone.

    Source: Andriushchenko et al. 2020 (arXiv 1912.00049); art.attacks.evasion.SquareAttack.
    Shapes, units: as `robustkit.attacks.square`. Randomness: from `generator`.
    Raises: RobustkitError for norms other than Linf and L2, unusable input, or a missing library.
    """
    classes = _check("art-square", model, x, y, ball, LP)
    settings = {"eps": ball.eps, "max_iter": queries, "verbose": False}
    return _art("SquareAttack", classes, settings, model, x, y, ball, generator)


def art_hop_skip_jump(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 50,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """ART's HopSkipJump: labels alone, one image at a time; its points are projected into the ball.

    Source: Chen, Jordan & Wainwright 2020 (arXiv 1904.02144); art.attacks.evasion.HopSkipJump. Difference:
    the start is noise or another image of the batch, which costs 100 predictions and one for each image, or `start`,
    images of other classes, which costs none; ART alone draws it from a state that cannot be seeded.
    Shapes, units: as `robustkit.attacks.pgd`. Randomness: from `generator`.
    Raises: RobustkitError for norms other than Linf and L2, unusable input, or a missing library.
    """
    classes = _check("art-hop-skip-jump", model, x, y, ball, LP)
    kind = _peer("art.attacks.evasion").HopSkipJump

    def attack(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        starts, found = (
            _starts(model, x, y)
            if start is None
            else (start.to(x), torch.full_like(y, True, dtype=torch.bool))
        )
        rows = _right(model, x, y) & found
        peer = kind(_art_classifier(model, x, classes), norm=ORDER[ball.norm], max_iter=steps, verbose=False)
        return _only(
            rows,
            x,
            lambda: torch.from_numpy(
                peer.generate(x[rows].cpu().numpy(), x_adv_init=starts[rows].cpu().numpy())
            ).to(x.device),
        )

    return _borrow(attack, model, x, y, ball, generator)


# --- Foolbox ----------------------------------------------------------------------------------------


def foolbox_fgsm(
    model: Model, x: Tensor, y: Tensor, ball: Ball, *, generator: torch.Generator | None = None
) -> Tensor:
    """Foolbox' fast gradient method: one step of size eps.

    Source: Goodfellow et al. 2015 (arXiv 1412.6572); foolbox.attacks.FGSM, FGM in L2.
    Shapes, units: as `robustkit.attacks.fgsm`. Randomness: none.
    Raises: RobustkitError for norms other than Linf and L2, unusable input, or a missing library.
    """
    _check("foolbox-fgsm", model, x, y, ball, LP)
    foolbox = _peer("foolbox")

    def attack(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        peer = {"Linf": foolbox.attacks.FGSM, "L2": foolbox.attacks.FGM}[ball.norm]()
        found: Tensor = peer(_foolbox_model(model, x), x, y, epsilons=ball.eps)[1]
        return found

    return _borrow(attack, model, x, y, ball, generator)


def foolbox_pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 40,
    step_size: float | None = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Foolbox' projected gradient descent.

    Source: Madry et al. 2018 (arXiv 1706.06083); foolbox.attacks.LinfPGD, L2PGD.
    Shapes, units: as `robustkit.attacks.pgd`, whose default step it gets. Randomness: the start.
    Raises: RobustkitError for norms other than Linf and L2, unusable input, or a missing library.
    """
    _check("foolbox-pgd", model, x, y, ball, LP)
    step = _step_size(ball, steps, step_size)
    foolbox = _peer("foolbox")

    def attack(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        kind = {"Linf": foolbox.attacks.LinfPGD, "L2": foolbox.attacks.L2PGD}[ball.norm]
        peer = kind(abs_stepsize=step, steps=steps, random_start=random_start)
        found: Tensor = peer(_foolbox_model(model, x), x, y, epsilons=ball.eps)[1]
        return found

    return _borrow(attack, model, x, y, ball, generator)


def foolbox_ddn(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Foolbox' DDN, a minimum-norm attack in L2; its points are projected into the ball.

    Source: Rony et al. 2019 (arXiv 1811.09600); foolbox.attacks.DDNAttack.
    Shapes, units: as `robustkit.attacks.pgd`. Randomness: none.
    Raises: RobustkitError for norms other than L2, unusable input, or a missing library.
    """
    _check("foolbox-ddn", model, x, y, ball, ("L2",))
    foolbox = _peer("foolbox")

    def attack(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        rows = _right(model, x, y)
        peer = foolbox.attacks.DDNAttack(steps=steps)
        return _only(rows, x, lambda: peer(_foolbox_model(model, x), x[rows], y[rows], epsilons=None)[1])

    return _borrow(attack, model, x, y, ball, generator)


def foolbox_boundary(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 5000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Foolbox' Boundary Attack: brute force along the boundary, by labels alone; projected into the ball.

    Source: Brendel, Rauber & Bethge 2018 (arXiv 1712.04248); foolbox.attacks.BoundaryAttack. Differences:
    5,000 steps where Foolbox takes 25,000; the start is noise or another image of the batch, where
    Foolbox alone stops with an error when noise gives no other class.
    Shapes, units: as `robustkit.attacks.pgd`. Randomness: from `generator`.
    Raises: RobustkitError for norms other than L2, unusable input, or a missing library.
    """
    _check("foolbox-boundary", model, x, y, ball, ("L2",))
    foolbox = _peer("foolbox")

    def attack(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        starts, found = _starts(model, x, y)
        rows = _right(model, x, y) & found
        peer = foolbox.attacks.BoundaryAttack(steps=steps)
        return _only(
            rows,
            x,
            lambda: peer(
                _foolbox_model(model, x), x[rows], y[rows], epsilons=None, starting_points=starts[rows]
            )[1],
        )

    return _borrow(attack, model, x, y, ball, generator)


def _foolbox_model(model: nn.Module, x: Tensor) -> Any:
    return _peer("foolbox").PyTorchModel(model, bounds=(0, 1), device=x.device)


LIBRARY: dict[str, Attack] = {
    "autoattack": autoattack,
    **{f"autoattack-{part}": partial(autoattack_part, part=part) for part in AUTOATTACK_PARTS},
    "cleverhans-fgsm": cleverhans_fgsm,
    "cleverhans-pgd": partial(cleverhans_pgd, steps=40),
    "cleverhans-cw-l2": partial(cleverhans_cw_l2, steps=1000),
    "cleverhans-spsa": partial(cleverhans_spsa, steps=40),
    "cleverhans-hop-skip-jump": partial(cleverhans_hop_skip_jump, steps=64),
    "art-fgsm": art_fgsm,
    "art-pgd": partial(art_pgd, steps=40),
    "art-square": partial(art_square, queries=5000),
    "art-hop-skip-jump": partial(art_hop_skip_jump, steps=50),
    "foolbox-fgsm": foolbox_fgsm,
    "foolbox-pgd": partial(foolbox_pgd, steps=40),
    "foolbox-ddn": partial(foolbox_ddn, steps=100),
    "foolbox-boundary": partial(foolbox_boundary, steps=5000),
}
