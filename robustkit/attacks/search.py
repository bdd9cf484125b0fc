"""Random search: the one loop that all attacks without gradients share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustkit.device import Model, Prepared, attackable, confirmed
from robustkit.errors import RobustkitError
from robustkit.losses import margin
from robustkit.threat import check_batch, check_logits, per_example

# (query, clean images, best points so far) -> the points to ask the model about, one for each image
Proposal = Callable[[int, Tensor, Tensor], Tensor]


# Queries after which claims made on a prepared model's quick half are looked at, in one pass.
ASKED_EVERY = 10


def random_search(model: Model, x: Tensor, y: Tensor, queries: int, propose: Proposal) -> Tensor:
    """Of `queries` proposals for each example, the one of highest margin; fooled examples leave.

    The model is asked once a query, for the examples that are left, and no gradient is taken. On a prepared
    model an example near the boundary may claim success at every query: claims wait, so that the model itself
    is asked about all of them at once, and until then the search goes on.
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
    every = ASKED_EVERY if isinstance(model, Prepared) else 1
    claims: list[tuple[Tensor, Tensor]] = []  # which examples, and the points that are said to fool the model
    with torch.no_grad(), attackable(model):
        for query in range(queries):
            points = propose(query, clean, current)
            logits = model(points)
            if query == 0:  # later it would only make the device wait; the judge looks at the end
                check_logits(logits, labels)
            losses = margin(logits, labels)
            better = losses > highest
            current = torch.where(per_example(better, points), points, current)
            highest = torch.where(better, losses, highest)
            claimed = logits.argmax(1) != labels
            if claimed.any():
                claims.append((left[claimed], points[claimed]))
            if claims and (query % every == every - 1 or query == queries - 1):
                rows, said = (torch.cat(parts) for parts in zip(*claims, strict=True))
                fooled = confirmed(model, said, y[rows], torch.ones_like(rows, dtype=torch.bool))
                verdicts = fooled.split([len(some) for some, _ in claims])
                for (some, these), held in zip(reversed(claims), reversed(verdicts), strict=True):
                    best[some[held]] = these[held]  # an example's first success is written last
                stay, claims = ~torch.isin(left, rows[fooled]), []
                left, clean, labels = left[stay], clean[stay], labels[stay]
                current, highest = current[stay], highest[stay]
                if len(left) == 0:
                    break
    best[left] = current
    return best
