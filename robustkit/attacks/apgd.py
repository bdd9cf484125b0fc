"""Auto-PGD: projected gradient descent that chooses its own step size, and its targeted form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from robustkit.attacks.gradient import (
    Attempt,
    check_schedule,
    checked,
    input_gradient,
    likeliest,
    score,
    worst_case,
)
from robustkit.device import Model, attackable, confirmed
from robustkit.losses import Loss, TargetedLoss, cross_entropy, dlr_targeted
from robustkit.threat import Ball, check_batch, check_logits, per_example

MOMENTUM = 0.25  # share of the last move in the next one; 1 - alpha in the paper
RHO = 0.75  # share of the steps between two checkpoints that must raise the loss
LARGER, EARLY = (3, 2), 0.3  # in L1: balls of so many eps come first, each for this share of the steps


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 100,
    restarts: int = 1,
    start: Tensor | None = None,
    loss: Loss = cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Auto-PGD: momentum, and a step that is halved, from the best point so far, when progress stalls.

    Source: Croce & Hein 2020 (arXiv 2003.01690), algorithm 1; for L1 balls Croce & Hein 2021 (arXiv
    2103.01208), whose step moves only as many coordinates as the best point so far needed, and which spends
    60 % of the steps in balls of three and of two eps, to find where to begin.
    Differences: a point that is confirmed to fool the model is kept at once and leaves the batch, which
    changes nothing for the others. As in the authors' code the step is halved when at most (not: less
    than) 75 % of the steps raised the loss; unlike it, the first of these rises is counted from the
    start's own loss, not from zero. The start is uniform in the ball, theirs near its surface. In a larger
    ball a point stops where it fools the model, theirs goes on to ever higher loss, further away.
    `pretrained("mnist-pgd")`, L1 eps 10, 100 steps, 200 MNIST test images, seed 0: without larger balls 165
    resist cross-entropy and 164 DLR, with them 128 and 128; pyautoattack's own schedule leaves 125 and 147.
    From the same start pyautoattack, with that one count mended, breaks the same points and reaches the
    same highest loss to 1e-5 on a smooth network; in L1, where rounding decides which coordinates count as
    unchanged, a few points in a hundred differ, by at most 0.1. The tests hold it to that.
    Shapes: x (n, ...), y (n,) -> (n, ...): the point that fools the model, else that of highest loss.
    Units: inputs in [0, 1].
    Randomness: the starts, from `generator` alone; `start` replaces them, and the larger balls, by images.
    Raises: RobustkitError on a batch outside [0, 1], steps or restarts below 1, a start outside the
    ball, restarts from one given start, or unusable logits.
    """
    check_batch(x, y)
    check_schedule(x, ball, steps, restarts, start)

    def attempt(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = None if start is None else start[rows]
        return _attempt(model, x[rows], y[rows, None], ball, given, steps, loss, generator)

    with attackable(model):
        return worst_case(x, [attempt] * restarts)


def apgd_targeted(
    model: Model,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int = 100,
    targets: int = 9,
    start: Tensor | None = None,
    loss: TargetedLoss = dlr_targeted,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Auto-PGD towards each of the `targets` classes that the model finds likeliest after the true one.

    Source: Croce & Hein 2020 (arXiv 2003.01690), section 5: APGD on the targeted DLR loss. A point is
    done once it is misclassified, as whatever class: the targets are a means. Where the model has fewer
    wrong classes than `targets`, all of them are tried.
    Differences, shapes, units, randomness: as `apgd`; each target has a start of its own, or all `start`.
    Raises: as `apgd`, and RobustkitError for `targets` below 1 or a loss that needs more classes.
    """
    check_batch(x, y)
    check_schedule(x, ball, steps, 1, start)

    def attempt(target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        labels, given = torch.stack([y[rows], target[rows]], 1), None if start is None else start[rows]
        return _attempt(model, x[rows], labels, ball, given, steps, loss, generator)

    with attackable(model):
        attempts: list[Attempt] = [partial(attempt, target) for target in likeliest(model, x, y, targets)]
        return worst_case(x, attempts)


def _attempt(
    model: Model,
    clean: Tensor,
    labels: Tensor,
    ball: Ball,
    start: Tensor | None,
    steps: int,
    loss: Callable[..., Tensor],
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A run from `start`, or from a random point; in L1 from what runs in larger balls make of one."""
    stages, early = [(ball, steps)], int(EARLY * steps)
    if start is None and ball.norm == "L1" and early > 0:
        larger = [(replace(ball, eps=times * ball.eps), early) for times in LARGER]
        stages = [*larger, (ball, steps - len(larger) * early)]
    delta = stages[0][0].random(clean, generator) if start is None else start - clean
    for within, steps_within in stages:
        begin = within.candidates(clean, delta)
        found, highest, fooled = _run(model, clean, labels, within, begin, steps_within, loss)
        delta = found - clean
    return found, highest, fooled


def _run(
    model: Model,
    clean: Tensor,
    labels: Tensor,
    ball: Ball,
    start: Tensor,
    steps: int,
    loss: Callable[..., Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """One run from `start`: each example's candidate, its loss, and whether it is confirmed to fool."""
    found = start.clone()
    highest = torch.full((len(clean),), -torch.inf, device=clean.device)
    fooled = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
    course = (_Sparse if ball.norm == "L1" else _Halving)(clean, labels, start, ball)
    checkpoints = course.checkpoints(steps)
    for step in range(steps + 1):
        if step - 1 in checkpoints:
            course.adapt(checkpoints[step - 1])
        if step > 0:
            course.move(MOMENTUM if step > 1 else 0.0)
        goal = course.labels.unbind(1)
        y = goal[0]
        if step == steps:  # the last point needs no gradient
            logits, losses = score(model, course.points, checked(loss), *goal)
        else:
            measure = checked(loss) if step == 0 else loss
            logits, losses, course.gradient = input_gradient(model, course.points, measure, *goal)
        course.observe(losses)
        claimed = logits.argmax(1) != y
        if claimed.any():
            check_logits(logits[claimed], y[claimed])
            leaving = confirmed(model, course.points, y, claimed)
            rows = course.row[leaving]
            found[rows], fooled[rows] = course.points[leaving], True
            course.keep(~leaving)
            if len(course.row) == 0:
                break
    found[course.row], highest[course.row] = course.best, course.highest.to(highest.dtype)
    return found, highest, fooled


class _Course:
    """The tensors of one run, each with a row for every example that is still in the batch."""

    def __init__(self, clean: Tensor, labels: Tensor, start: Tensor, ball: Ball) -> None:
        self.ball = ball
        self.row = torch.arange(len(clean), device=clean.device)  # where in the whole batch
        self.clean = clean
        self.labels = labels  # (m, 1), the true class, or (m, 2), and the target
        self.points = self.best = start
        self.gradient = self.best_gradient = torch.zeros_like(clean)
        self.highest = torch.full((len(clean),), -torch.inf, device=clean.device, dtype=clean.dtype)

    def keep(self, stay: Tensor) -> None:
        """Drop all other examples, from every tensor."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[stay])

    def observe(self, losses: Tensor) -> None:
        """Take in the losses at the present points."""
        improved = losses > self.highest
        image_wise = per_example(improved, self.points)
        self.highest = torch.where(improved, losses, self.highest)
        self.best = torch.where(image_wise, self.points, self.best)
        self.best_gradient = torch.where(image_wise, self.gradient, self.best_gradient)

    def back_to_best(self, chosen: Tensor) -> None:
        image_wise = per_example(chosen, self.points)
        self.points = torch.where(image_wise, self.best, self.points)
        self.gradient = torch.where(image_wise, self.best_gradient, self.gradient)


class _Halving(_Course):
    """Linf and L2: momentum, and a step that is halved where it no longer raises the loss."""

    def __init__(self, clean: Tensor, labels: Tensor, start: Tensor, ball: Ball) -> None:
        super().__init__(clean, labels, start, ball)
        self.previous = start
        self.step = torch.full_like(self.highest, 2 * ball.eps)
        self.losses = torch.full_like(self.highest, torch.inf)
        self.rises = torch.zeros_like(self.highest)  # steps that raised the loss since the checkpoint
        self.halved = torch.ones_like(self.highest, dtype=torch.bool)  # at the last checkpoint
        self.highest_before = self.highest  # at the last checkpoint

    @staticmethod
    def checkpoints(steps: int) -> dict[int, int]:
        """The steps at which progress is looked at, with the number of steps since the last."""
        interval, least, less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
        at, found = interval, {}
        while at < steps:
            found[at] = interval
            interval = max(interval - less, least)
            at += interval
        return found

    def observe(self, losses: Tensor) -> None:
        super().observe(losses)
        self.rises = self.rises + (losses > self.losses)
        self.losses = losses

    def move(self, momentum: float) -> None:
        step = per_example(self.step, self.points) * self.ball.steepest(self.gradient)
        ahead = self.ball.candidates(self.clean, self.points + step - self.clean)
        mixed = self.points + (1 - momentum) * (ahead - self.points)
        mixed = mixed + momentum * (self.points - self.previous)
        self.previous = self.points
        self.points = self.ball.candidates(self.clean, mixed - self.clean)

    def adapt(self, interval: int) -> None:
        stalled = ~self.halved & (self.highest <= self.highest_before)
        self.halved = (self.rises <= RHO * interval) | stalled
        self.step = torch.where(self.halved, self.step / 2, self.step)
        self.highest_before = self.highest
        self.rises = torch.zeros_like(self.rises)
        self.back_to_best(self.halved)


class _Sparse(_Course):
    """L1: steps along the few steepest coordinates, as many as the best point so far suggests."""

    def __init__(self, clean: Tensor, labels: Tensor, start: Tensor, ball: Ball) -> None:
        super().__init__(clean, labels, start, ball)
        self.step = torch.full_like(self.highest, ball.eps)
        self.share = torch.full_like(self.highest, 0.2)  # of the coordinates that a step moves
        self.changed = torch.full_like(self.highest, clean[0].numel())  # pixels, at the last checkpoint

    @staticmethod
    def checkpoints(steps: int) -> dict[int, int]:
        interval = max(int(0.04 * steps), 1)
        return dict.fromkeys(range(interval, steps, interval), interval)

    def move(self, momentum: float) -> None:
        """One projected step; this variant has no momentum."""
        size = self.gradient.flatten(1).abs()
        rank = ((1 - self.share) * size.shape[1]).clamp(0, size.shape[1] - 1).long()
        least = size.sort(1).values.gather(1, rank[:, None])
        direction = self.gradient.sign() * (size >= least).view_as(self.gradient)
        length = direction.flatten(1).abs().sum(1).clamp_min(1)
        step = per_example(self.step / length, self.points) * direction
        self.points = self.ball.candidates(self.clean, self.points + step - self.clean)

    def adapt(self, interval: int) -> None:
        changed = (self.best != self.clean).flatten(1).sum(1).to(self.changed.dtype)
        sparser = changed < 0.95 * self.changed
        self.share = changed / self.clean[0].numel() / 1.5
        self.step = torch.where(sparser, self.ball.eps, self.step / 1.5).clamp_min(self.ball.eps / 10)
        self.changed = changed
        self.back_to_best(sparser)
