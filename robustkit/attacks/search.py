"""Random search: the one loop that all attacks without gradients share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustkit.device import Model, attackable, confirmed
from robustkit.errors import RobustkitError
from robustkit.losses import margin
from robustkit.threat import check_batch, check_logits, per_example

# (query, clean images, best points so far) -> the points to ask the model about, one for each image
Proposal = Callable[[int, Tensor, Tensor], Tensor]


def random_search(model: Model, x: Tensor, y: Tensor, queries: int, propose: Proposal) -> Tensor:
    """Of `queries` proposals for each example, the one of highest margin; fooled examples leave.

    The model is asked once a query, for the examples that are left, and no gradient is taken.
    Shapes: x (n, ...), y (n,) -> (n, ...). Randomness: whatever `propose` draws.
    Raises: RobustkitError on a batch outside [0, 1], fewer than one query, or unusable logits.
    """
    check_batch(x, y)
    if queries < 1:
        raise RobustkitError(f"a search needs at least 1 query per example; got {queries}.")
    x = x.detach()
    best, left = x.clone(), torch.arange(len(x), device=x.device)
    clean, labels, current = x, y, x
    highest = torch.full((len(x),), -torch.inf, device=x.device)
    with torch.no_grad(), attackable(model):
        for query in range(queries):
            points = propose(query, clean, current)
            logits = model(points)
            if query == 0:  # later it would only make the device wait; the judge looks at the end
                check_logits(logits, labels)
            losses = margin(logits, labels)
            fooled = confirmed(model, points, labels, logits.argmax(1) != labels)
            better = fooled | (losses > highest)
            current = torch.where(per_example(better, points), points, current)
            highest = torch.where(better, losses, highest)
            if fooled.any():
                best[left[fooled]] = current[fooled]
                stay = ~fooled
                left, clean, labels = left[stay], clean[stay], labels[stay]
                current, highest = current[stay], highest[stay]
                if len(left) == 0:
                    break
    best[left] = current
    return best
