"""What the gradient attacks share: the input gradient, and the worst of several attempts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from robustkit.device import Model
from robustkit.errors import RobustkitError
from robustkit.threat import Ball, check_logits

# An attempt attacks some rows of a batch, and returns for each its candidate, that candidate's loss, and
# whether it is confirmed to fool the model.
Attempt = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def input_gradient(
    model: Model, x: Tensor, loss: Callable[..., Tensor], *labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and each example's loss at `x`, and its gradient there: one forward and one backward pass.

    Summing the losses, not averaging them, keeps an example's gradient independent of the batch size.
    Shapes: x (n, ...), labels as `loss` takes them -> logits (n, classes), losses (n,), gradient (n, ...).
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        losses = loss(logits, *labels)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    return logits.detach(), losses.detach(), gradient


def score(model: Model, x: Tensor, loss: Callable[..., Tensor], *labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and each example's loss at `x`: one forward pass."""
    with torch.no_grad():
        logits = model(x)
        return logits, loss(logits, *labels)


def checked(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`loss`, on logits that have been looked at first. Raises: RobustkitError on unusable logits.

    For an attack's first and last step: in between, the look would cost a pass over the logits and a wait
    for the device.
    """

    def loss_of_checked(logits: Tensor, *labels: Tensor) -> Tensor:
        for label in labels:
            check_logits(logits.detach(), label)
        return loss(logits, *labels)

    return loss_of_checked


def worst_case(x: Tensor, attempts: Iterable[Attempt]) -> Tensor:
    """The worst of several attempts: each is spent only on examples that no earlier one fooled.

    Among failures the candidate of highest loss is kept.
    Shapes: x (n, ...) -> (n, ...); an attempt gets the rows that are left, (m,).
    """
    best, highest = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)
    left = torch.arange(len(x), device=x.device)
    for attempt in attempts:
        candidates, losses, fooled = attempt(left)
        better = fooled | (losses > highest[left])
        best[left[better]], highest[left[better]] = candidates[better], losses[better].to(highest.dtype)
        left = left[~fooled]
        if len(left) == 0:
            break
    return best


def likeliest(model: Model, x: Tensor, y: Tensor, targets: int) -> tuple[Tensor, ...]:
    """The wrong classes that the model finds likeliest, best first: all of them where it has fewer than `targets`.

    Shapes: x (n, ...), y (n,) -> `targets` times (n,). Raises: RobustkitError for `targets` below 1, or unusable
    logits.
    """
    if targets < 1:
        raise RobustkitError(f"targets must be at least 1; got {targets}.")
    with torch.no_grad():
        logits = model(x)
    check_logits(logits, y)
    wrong = logits.scatter(1, y[:, None], -torch.inf)
    return wrong.topk(min(targets, logits.shape[1] - 1), dim=1).indices.unbind(1)


def check_schedule(x: Tensor, ball: Ball, steps: int, restarts: int, start: Tensor | None) -> None:
    """Refuse settings that mean nothing. Raises: RobustkitError."""
    if steps < 1 or restarts < 1:
        raise RobustkitError(f"steps and restarts must be at least 1; got {steps} and {restarts}.")
    if start is not None and restarts > 1:
        raise RobustkitError(f"{restarts} restarts from one given start are the same run; leave `start` out.")
    if start is not None and not ball.contains(x, start).all():
        raise RobustkitError(f"start must lie within {ball} of x; project it with Ball.candidates first.")


def check_target(y: Tensor, target: Tensor) -> None:
    """Refuse targets that are not a wrong class for each example. Raises: RobustkitError."""
    if target.shape != y.shape or target.dtype != torch.int64:
        raise RobustkitError(
            f"target must be one int64 class for each example, shape {tuple(y.shape)}; got {target.dtype} of "
            f"shape {tuple(target.shape)}."
        )
    if target.min().item() < 0 or (target == y).any():
        raise RobustkitError("target must be a class other than the true one, 0 or larger; draw it again.")
