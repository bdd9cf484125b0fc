"""Is this robustness real? Checks that tell a robust model from one whose gradients mislead the attack.

`CHECKS`, at the end of this file, is the whole list with its thresholds. Each check is one function over
`Runs`: the same images under a few attacks, each run once and only when a check first asks for it. A
finding does not say that the model is weak; it says that the figure in hand cannot be trusted, and what
to try before it can.

Sources: Athalye, Carlini & Wagner 2018 (arXiv 1802.00420), section 3.1; Carlini et al. 2019 (arXiv
1902.06705); the checks that come with AutoAttack (Croce & Hein 2020, arXiv 2003.01690); the indicators
of Pintor et al. 2022 (arXiv 2106.09947). Thresholds are theirs where they hold, else ours. They must let
honest models pass, and adversarially trained MNIST models do mask a little: on 1,000 test images at
Linf 0.3 five starts of PGD broke 1.7 points more than one, and Square 1.3 points that no gradient attack
did, so that `more-restarts`, `black-box` and `transfer` stand at 3 points where AutoAttack's warning for
Square stands at 0.2.

Statistics: where a check counts images, one or two of them may be chance. It is flagged when its share
is above the threshold, and when so many images would be seen less than once in a hundred audits if the
true share were at the threshold (exact binomial test). With 200 images a threshold of 0.5 points takes
five images, with 1,000 images twelve. A threshold of zero ("any") takes one image.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations

import torch
from scipy.special import bdtrc  # type: ignore[import-untyped]
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from robustkit.attacks import Attack, apgd, fgsm, pgd
from robustkit.attacks.gradient import input_gradient
from robustkit.attacks.noise import noise
from robustkit.attacks.square import square
from robustkit.attacks.transfer import transfer
from robustkit.data import Dataset
from robustkit.device import Model, attackable, hardware, seeded, strict_fp32
from robustkit.errors import RobustkitError
from robustkit.evaluate import check_candidates, predict
from robustkit.losses import Loss, cross_entropy, dlr, margin
from robustkit.results import Audit, Interval, Outcome
from robustkit.threat import Ball, check_batch, look_like_probabilities, white_box

Measured = tuple[Interval | float, str]  # a share of images or a number, and the evidence in one sentence


class NotRun(Exception):
    """A check that has nothing to look at says why; it has not passed."""


@dataclass(frozen=True)
class Budget:
    """What an audit spends on each image: gradient steps, restarts, Square's queries, noise draws."""

    steps: int
    restarts: int
    queries: int
    draws: int


BUDGETS = {
    "smoke": Budget(steps=40, restarts=5, queries=500, draws=500),
    "standard": Budget(steps=40, restarts=5, queries=2_000, draws=2_000),
    "full": Budget(steps=100, restarts=10, queries=5_000, draws=10_000),
}


def audit(
    model: Model,
    data: Dataset,
    ball: Ball,
    *,
    model_name: str,
    tier: str,
    seed: int = 0,
    surrogate: Model | None = None,
    checks: Sequence[Check] | None = None,
    batch_size: int = 250,
    progress: bool = True,
) -> Audit:
    """Run every check on `data`, or the given ones, and say what each measured against which threshold.

    The model is audited as it is, in eval mode and strict float32, never a faster copy of it: what is
    looked for may not survive the copying. `surrogate`, another model of the same task, makes the
    transfer check possible; without it that check says that it was not run.
    Randomness: follows from (seed, attack, first image of the batch).
    Raises: RobustkitError for a ball of size zero, an unknown tier, an unusable batch or logits.
    """
    if ball.eps == 0:
        raise RobustkitError("an audit needs a ball larger than 0; got eps=0, where there is no attack.")
    if tier not in BUDGETS:
        raise RobustkitError(f"tier {tier!r} is unknown; choose one of {', '.join(BUDGETS)}.")
    check_batch(data.x, data.y)
    runs = Runs(model, data.x, data.y, ball, seed, BUDGETS[tier], surrogate, batch_size)
    bar = tqdm(CHECKS if checks is None else checks, unit="check", disable=not progress, file=sys.stderr)
    outcomes = []
    with attackable(model), strict_fp32():
        for check in bar:
            bar.set_description(check.name)
            outcomes.append(check(runs))
    return Audit(
        model=model_name,
        threat=white_box(ball),
        data=data.provenance,
        indices=tuple(int(i) for i in data.indices),
        outcomes=tuple(outcomes),
        seed=seed,
        tier=tier,
        hardware=hardware(data.x.device),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


@dataclass(frozen=True)
class Check:
    """One measurement, the threshold beyond which it is a finding, and the repair to try then.

    `flag` is ">" or "<": on which side of the threshold the finding lies. Thresholds of shares are in points.
    """

    name: str
    measure: Callable[[Runs], Measured]
    flag: str
    threshold: float
    unit: str
    repair: str

    def __call__(self, runs: Runs) -> Outcome:
        outcome = partial(
            Outcome,
            check=self.name,
            flag=self.flag,
            threshold=self.threshold,
            unit=self.unit,
            repair=self.repair,
        )
        try:
            measured, evidence = self.measure(runs)
        except NotRun as reason:
            return outcome(verdict="not run", measured=None, evidence=str(reason))
        if isinstance(measured, Interval):
            flagged, value = _beyond(measured, self.threshold / 100), 100 * measured.share
        else:
            value = measured
            flagged = value > self.threshold if self.flag == ">" else value < self.threshold
        return outcome(verdict="flagged" if flagged else "passed", measured=value, evidence=evidence)


RARE = 0.01  # how often chance alone may flag a model that sits at the threshold


def _beyond(share: Interval, threshold: float) -> bool:
    """Whether a share is above the threshold, and by more than chance: an exact binomial test.

    >>> [_beyond(Interval(k, 200), 0.005) for k in (1, 4, 5)]
    [False, False, True]
    """
    chance = float(bdtrc(share.k - 1, share.n, threshold))  # of so many images or more
    return share.share > threshold and chance < RARE


# --- the attack runs that the checks share -----------------------------------------------------------


class Trace:
    """Cross-entropy that remembers what an attack saw on its way: each image's margin, step by step."""

    def __init__(self) -> None:
        self.margins: list[Tensor] = []

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        self.margins.append(margin(logits.detach(), y))
        return cross_entropy(logits, y)


@dataclass(frozen=True)
class Path:
    """PGD on every image: where it ended, and the margins on its way, (steps, n)."""

    points: Tensor
    margins: Tensor


@dataclass(frozen=True, eq=False)
class Runs:
    """The images under each attack, run once, when a check first asks.

    Verdicts are bool, (n,): whether the model is wrong; images that it gets wrong untouched count, too.
    """

    model: Model
    x: Tensor
    y: Tensor
    ball: Ball
    seed: int
    budget: Budget
    surrogate: Model | None
    batch_size: int

    def generator(self, *key: str | int) -> torch.Generator:
        return seeded(self.seed, *key, device=self.x.device)

    def logits(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.model(batch) for batch in x.split(self.batch_size)])

    def wrong(self, points: Tensor) -> Tensor:
        """Whether the model is wrong on each of these versions of the images."""
        batches = zip(points.split(self.batch_size), self.y.split(self.batch_size), strict=True)
        return ~torch.cat([predict(self.model, batch, y) for batch, y in batches])

    def attacked(
        self, name: str, attack: Attack, *, ball: Ball | None = None, only: Tensor | None = None
    ) -> Tensor:
        """The attack's candidates; where `only` is False, the images themselves."""
        ball, points = ball or self.ball, self.x.clone()
        rows = torch.arange(len(points), device=points.device) if only is None else only.nonzero()[:, 0]
        for batch in rows.split(self.batch_size) if len(rows) else ():
            x, y, generator = self.x[batch], self.y[batch], self.generator(name, int(batch[0]))
            points[batch] = attack(self.model, x, y, ball, generator=generator)
        check_candidates(name, self.x, points, ball)
        return points

    def breaks(
        self, name: str, attack: Attack, *, ball: Ball | None = None, only: Tensor | None = None
    ) -> Tensor:
        return self.wrong(self.attacked(name, attack, ball=ball, only=only))

    def gradient_attack(
        self, name: str, attack: Attack, *, ball: Ball | None = None, only: Tensor | None = None
    ) -> Tensor:
        self.need_gradient()
        return self.breaks(name, attack, ball=ball, only=only)

    def noisy(self, fraction: float, draw: int = 0) -> Tensor:
        """Every image with uniform noise from a ball of that fraction of eps."""
        small = Ball(self.ball.norm, fraction * self.ball.eps)
        return small.candidates(self.x, small.random(self.x, self.generator("noisy", draw)))

    def gradient(self, x: Tensor, loss: Loss) -> Tensor:
        """The input gradient of the loss at each image, flattened. Raises: NotRun."""
        self.need_gradient()
        batches = zip(x.split(self.batch_size), self.y.split(self.batch_size), strict=True)
        return torch.cat(
            [input_gradient(self.model, images, loss, y)[-1].flatten(1) for images, y in batches]
        )

    def need_gradient(self) -> None:
        if not self.differentiable:
            raise NotRun("the model gives no gradient for its input, so no gradient attack can be run")

    @cached_property
    def differentiable(self) -> bool:
        """Whether any path leads back from the logits to the image."""
        with torch.enable_grad():
            x = self.x[:1].clone().requires_grad_(True)
            logits = self.model(x)
            if not logits.requires_grad:
                return False
            (gradient,) = torch.autograd.grad(logits.sum(), x, allow_unused=True)
        return gradient is not None

    @cached_property
    def clean(self) -> Tensor:
        return self.wrong(self.x)

    @cached_property
    def fgsm(self) -> Tensor:
        return self.gradient_attack("fgsm", fgsm)

    # Plain PGD is cross-entropy from one random start: the attack on which most claims rest. The same
    # name is the same start, so that `more_steps` and `more_restarts` differ from it in what they say.

    @cached_property
    def pgd(self) -> Tensor:
        return self.gradient_attack("pgd", partial(pgd, steps=self.budget.steps))

    @cached_property
    def path(self) -> Path:
        """PGD with twice the steps, and what it met on its way."""
        self.need_gradient()
        trace, steps = Trace(), 2 * self.budget.steps
        points = self.attacked("pgd", partial(pgd, steps=steps, loss=trace))
        batches = range(0, len(trace.margins), steps)
        margins = [torch.stack(trace.margins[i : i + steps]) for i in batches]
        return Path(points, torch.cat(margins, 1))

    @cached_property
    def more_steps(self) -> Tensor:
        return self.wrong(self.path.points)

    @cached_property
    def more_restarts(self) -> Tensor:
        restarts = partial(pgd, steps=self.budget.steps, restarts=self.budget.restarts)
        return self.gradient_attack("pgd", restarts)

    @cached_property
    def white_box(self) -> Tensor:
        """The worst case over every gradient attack; without a gradient, the untouched images alone."""
        if not self.differentiable:
            return self.clean
        broken = self.clean | self.fgsm | self.pgd | self.more_steps | self.more_restarts
        stronger = {
            "pgd-margin": partial(pgd, steps=self.budget.steps, restarts=self.budget.restarts, loss=margin),
            "apgd-ce": partial(apgd, steps=2 * self.budget.steps),
        }
        if self.classes >= LEAST_CLASSES:
            stronger["apgd-dlr"] = partial(apgd, steps=2 * self.budget.steps, loss=dlr)
        for name, attack in stronger.items():
            broken = broken | self.breaks(name, attack, only=~broken)
        return broken

    @cached_property
    def classes(self) -> int:
        return self.logits(self.x[:1]).shape[1]

    # Searches without a gradient, on the images that no gradient attack broke.

    @cached_property
    def square(self) -> Tensor:
        if self.x.dim() != 4:
            raise NotRun("Square searches over squares of an image")
        return self.breaks("square", partial(square, queries=self.budget.queries), only=~self.white_box)

    @cached_property
    def noise(self) -> Tensor:
        return self.breaks("noise", partial(noise, draws=self.budget.draws), only=~self.white_box)

    @cached_property
    def transferred(self) -> Tensor:
        if self.surrogate is None:
            raise NotRun("no surrogate model was given")
        there = transfer(self.surrogate, partial(pgd, steps=self.budget.steps, loss=margin))
        return self.breaks("transfer", there, only=~self.white_box)


# --- the checks --------------------------------------------------------------------------------------


def _share(mask: Tensor) -> Interval:
    return Interval(int(mask.sum()), len(mask))


def _net(more: Tensor, less: Tensor) -> Interval:
    """By how many images of the batch `more` breaks more than `less`; 0 where it breaks fewer."""
    return Interval(max(0, int(more.sum()) - int(less.sum())), len(more))


def randomised(runs: Runs) -> Measured:
    """Does the same image always get the same logits? Of norm 1, over five passes, as in AutoAttack."""
    passes = torch.stack([torch.nn.functional.normalize(runs.logits(runs.x), dim=1) for _ in range(5)])
    change = float((passes - passes[0]).abs().max())
    labels = int((passes.argmax(2) != passes[0].argmax(1)).any(0).sum())
    return change, f"five passes over the same images gave other predictions on {labels} of {len(runs.x)}"


def probabilities(runs: Runs) -> Measured:
    """Are these logits, or has a softmax been left in the model?"""
    share = _share(look_like_probabilities(runs.logits(runs.x)))
    return share, f"the output lies in [0, 1] and sums to 1 on {share.k} of {share.n} images"


class _Watch(TorchFunctionMode):
    """Counts the calls of autograd made inside, by whatever way."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += func in (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)
        return func(*args, **(kwargs or {}))


def test_time_optimisation(runs: Runs) -> Measured:
    """Does a forward pass run an optimiser of its own?"""
    with _Watch() as watch:
        runs.logits(runs.x[:2])
    return float(watch.calls), f"one forward pass called autograd {watch.calls} times"


def zero_gradients(runs: Runs) -> Measured:
    """Is there a gradient? The margin's, at images and at noise: no loss can be blamed when it vanishes."""
    if not runs.differentiable:
        return Interval(len(runs.x), len(runs.x)), "no path leads back from the logits to the image"
    zero = torch.zeros_like(runs.clean)
    for points in (runs.x, runs.noisy(1.0)):
        zero |= runs.gradient(points, margin).abs().amax(1) == 0
    share = _share(zero)
    return share, f"the gradient of the margin is exactly zero at {share.k} of {share.n} images"


def saturated_loss(runs: Runs) -> Measured:
    """Has cross-entropy a gradient wherever the margin has one?"""
    flat = runs.gradient(runs.x, cross_entropy).abs().amax(1) == 0
    share = _share(flat & (runs.gradient(runs.x, margin).abs().amax(1) > 0))
    return share, f"cross-entropy has no gradient, and the margin has one, at {share.k} of {share.n} images"


def constant_output(runs: Runs) -> Measured:
    """Do different images get different logits? A detector's refusal is the same for all."""
    points = [runs.noisy(1.0)] + ([runs.path.points] if runs.differentiable else [])
    same = torch.zeros_like(runs.clean)
    for versions in points:
        _, inverse, counts = runs.logits(versions).unique(dim=0, return_inverse=True, return_counts=True)
        same |= counts[inverse] > 1
    share = _share(same)
    return share, f"{share.k} of {share.n} perturbed images got exactly the logits of another image"


def unstable_loss(runs: Runs) -> Measured:
    """Does the loss change smoothly? The margin, for the relative change of a loss near zero explodes.

    A ratio of means, not a mean of ratios, for the same reason.
    """
    start = margin(runs.logits(runs.x), runs.y)
    draws = [margin(runs.logits(runs.noisy(0.1, draw)), runs.y) for draw in range(100)]
    change = float((torch.stack(draws) - start).abs().mean() / start.abs().mean())
    return change, f"noise of a tenth of eps changes the margin by {change:.1%} of its size"


def gradient_alignment(runs: Runs) -> Measured:
    """Is the loss nearly linear in the ball? Where it is not, one step proves nothing (GradAlign)."""
    here, there = (runs.gradient(points, cross_entropy) for points in (runs.x, runs.noisy(1.0)))
    known = (here.abs().amax(1) > 0) & (there.abs().amax(1) > 0)
    if not known.any():
        raise NotRun("no image has a gradient of cross-entropy to compare")
    cosine = float(torch.nn.functional.cosine_similarity(here[known], there[known]).mean())
    return cosine, f"the gradients at an image and at noise in its ball have cosine {cosine:.2f}, on average"


def fgsm_beats_pgd(runs: Runs) -> Measured:
    """Does one step break more than many do?"""
    net = _net(runs.fgsm, runs.pgd)
    return net, f"FGSM breaks {int(runs.fgsm.sum())} images and PGD {int(runs.pgd.sum())} of {net.n}"


def more_steps(runs: Runs) -> Measured:
    """Do twice as many steps, from the same starts, break more?"""
    net = _net(runs.more_steps, runs.pgd)
    return net, f"twice as many steps from the same starts break {net.k} more of {net.n} images"


def more_restarts(runs: Runs) -> Measured:
    """Do more random starts break more?"""
    net = _net(runs.more_restarts, runs.pgd)
    return net, f"{runs.budget.restarts} starts instead of one break {net.k} more of {net.n} images"


def incomplete_optimisation(runs: Runs) -> Measured:
    """Was the loss still rising at the end? Pintor et al.: by what share of its rise in the last ten steps.

    Of the margin, not of cross-entropy: the latter is nearly flat at the start of every path, so that
    most of its rise comes late on a healthy one, too.
    """
    survivors = ~runs.more_steps
    if not survivors.any():
        raise NotRun("PGD leaves no image unbroken")
    highest = runs.path.margins[:, survivors].cummax(0).values
    gained = (highest[-1] - highest[-11]) / (highest[-1] - highest[0]).clamp_min(1e-12)
    share = float(gained.mean())
    return share, f"on images that PGD leaves, its last 10 steps bring {share:.1%} of the rise of the margin"


def silent_success(runs: Runs) -> Measured:
    """Did an attack pass through a success and return a failure?"""
    share = _share((runs.path.margins > 0).any(0) & ~runs.white_box)
    return (
        share,
        f"PGD met on its way, and no attack returned, what fools the model on {share.k} of {share.n} images",
    )


FRACTIONS = (0.25, 0.5, 0.75)  # of eps; the sweep also has 0 and 1


def eps_sweep(runs: Runs) -> Measured:
    """Does a larger ball break more? The largest rise in accuracy between any two sizes, FGSM's and PGD's."""
    worst, evidence = Interval(0, len(runs.x)), "neither FGSM's nor PGD's accuracy rises with eps"
    runs.need_gradient()
    attacks: dict[str, Attack] = {"FGSM": fgsm, "PGD": partial(pgd, steps=runs.budget.steps)}
    for name, attack in attacks.items():
        balls = [Ball(runs.ball.norm, fraction * runs.ball.eps) for fraction in FRACTIONS]
        smaller = [runs.breaks(name, attack, ball=ball) for ball in balls]
        curve = [runs.clean, *smaller, runs.fgsm if name == "FGSM" else runs.pgd]
        for i, j in combinations(range(len(curve)), 2):
            rise = _net(curve[i], curve[j])
            if rise.k > worst.k:
                sizes = [f"{fraction * runs.ball.eps:.3g}" for fraction in (0, *FRACTIONS, 1)]
                worst = rise
                evidence = (
                    f"{name} breaks {rise.k} fewer of {rise.n} images at eps={sizes[j]} than at {sizes[i]}"
                )
    return worst, evidence


def large_eps(runs: Runs) -> Measured:
    """Is nothing left where every image can be made the same grey? Linf, whatever the audit's norm."""
    left = _share(
        ~runs.gradient_attack(
            "pgd", partial(pgd, steps=runs.budget.steps, restarts=5), ball=Ball("Linf", 0.5)
        )
    )
    return left, f"PGD leaves {left.k} of {left.n} images at Linf eps=0.5, where every image can be made grey"


def unbounded(runs: Runs) -> Measured:
    """Does PGD succeed where it may change the image into any other?"""
    left = _share(
        ~runs.gradient_attack(
            "pgd", partial(pgd, steps=runs.budget.steps, restarts=5), ball=Ball("Linf", 1.0)
        )
    )
    return left, f"PGD leaves {left.k} of {left.n} images although it may change them into anything"


def black_box(runs: Runs) -> Measured:
    """Does Square, which sees scores alone, break what no gradient attack did?"""
    gained = _share(runs.square & ~runs.white_box)
    return (
        gained,
        f"Square, which sees only logits, breaks {gained.k} of {gained.n} images that gradients did not",
    )


def transfer_gain(runs: Runs) -> Measured:
    """Do points made on a surrogate break what no gradient attack did?"""
    gained = _share(runs.transferred & ~runs.white_box)
    return (
        gained,
        f"points made on the surrogate break {gained.k} of {gained.n} images that gradients did not",
    )


def noise_gain(runs: Runs) -> Measured:
    """Does the best of many draws of noise break what no gradient attack did?"""
    gained = _share(runs.noise & ~runs.white_box)
    draws = f"{runs.budget.draws:,} draws of noise"
    return gained, f"the best of {draws} breaks {gained.k} of {gained.n} images that gradients did not"


def pgd_gap(runs: Runs) -> Measured:
    """How far is the figure of PGD with restarts from the worst case over all attacks?"""
    worst = runs.white_box | runs.square
    gap = _share(worst & ~runs.more_restarts)
    return gap, f"the worst case over all attacks breaks {gap.k} of {gap.n} images that PGD did not"


LEAST_CLASSES = 4


def dlr_validity(runs: Runs) -> Measured:
    """Can the DLR loss mean anything? Four classes are needed."""
    if runs.classes < LEAST_CLASSES:
        raise NotRun(
            f"the DLR loss needs {LEAST_CLASSES} classes and the model has {runs.classes}: "
            "figures that rest on it mean nothing here, and the margin took its place"
        )
    return float(runs.classes), f"the model has {runs.classes} classes, enough for the DLR loss"


# Repairs: what to attack instead, before the figure is believed.
BPDA = "BPDA: keep the step that breaks the gradient in the forward pass, replace its backward pass."
EOT = "EOT: attack the mean over the model's draws, and judge on fresh ones."
LOGITS = "Drop the softmax from the model and attack its logits."
MARGIN = "Attack with the margin or the DLR loss: the scale of the logits cannot hide their gradient."
DETECTOR = "Drop the detector, or whatever answers with a constant; attack the classifier, then both at once."
UNROLL = "Differentiate through the inner optimiser, or replace its backward pass (BPDA)."
SMOOTH = "EOT if it is random; BPDA or a smooth stand-in if it is not."
HARDER = "More steps, more restarts, APGD and the margin loss, until another doubling gains nothing."
KEEP = "Return the worst point of the path, not the last."
WORST = "Report the worst case over attacks, image by image, not PGD's figure."

# The whole list. The first five look at the model alone, the next four at its gradients, then come
# attacks by gradient and attacks without. `>` and `<`: on which side of the threshold a finding lies.
# fmt: off
CHECKS: tuple[Check, ...] = (
    Check("randomised", randomised, ">", 1e-4, "in logits of norm 1", EOT),
    Check("probabilities", probabilities, ">", 0.5, "points", LOGITS),
    Check("test-time-optimisation", test_time_optimisation, ">", 0, "calls of autograd", UNROLL),
    Check("constant-output", constant_output, ">", 0, "points", DETECTOR),
    Check("dlr-validity", dlr_validity, "<", LEAST_CLASSES, "classes", MARGIN),

    Check("zero-gradients", zero_gradients, ">", 0, "points", BPDA),
    Check("saturated-loss", saturated_loss, ">", 0, "points", MARGIN),
    Check("unstable-loss", unstable_loss, ">", 0.1, "of the margin", SMOOTH),
    Check("gradient-alignment", gradient_alignment, "<", 0.3, "cosine", HARDER),

    Check("fgsm-beats-pgd", fgsm_beats_pgd, ">", 0.5, "points", HARDER),
    Check("more-steps", more_steps, ">", 0.5, "points", HARDER),
    Check("more-restarts", more_restarts, ">", 3, "points", HARDER),
    Check("incomplete-optimisation", incomplete_optimisation, ">", 0.05, "of the rise", HARDER),
    Check("silent-success", silent_success, ">", 0, "points", KEEP),
    Check("eps-sweep", eps_sweep, ">", 0.5, "points", HARDER),
    Check("large-eps", large_eps, ">", 1, "points", BPDA),
    Check("unbounded", unbounded, ">", 0, "points", BPDA),

    Check("black-box", black_box, ">", 3, "points", BPDA),
    Check("transfer", transfer_gain, ">", 3, "points", BPDA),
    Check("noise", noise_gain, ">", 0, "points", BPDA),
    Check("pgd-gap", pgd_gap, ">", 3, "points", WORST),
)
# fmt: on
