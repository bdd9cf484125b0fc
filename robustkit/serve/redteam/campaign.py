"""A campaign: each attack on each image, and every success asked about again."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

from robustkit.data import Dataset
from robustkit.device import Model, hardware, seeded
from robustkit.errors import RobustkitError
from robustkit.serve.redteam.attacks import (
    KNOWLEDGE,
    RESAMPLED,
    SPATIAL,
    Dial,
    QueryAttack,
    check,
    chosen,
    resampled,
)
from robustkit.serve.redteam.client import Access, Answer, Client, decoded, png
from robustkit.serve.redteam.oracle import Oracle, Over, image, once, pixels, within
from robustkit.serve.redteam.records import Attempt, Campaign, Run
from robustkit.threat import Ball, RotationTranslation, ThreatModel, check_batch, check_units


def campaign(
    access: Access,
    data: Dataset,
    names: Sequence[str],
    ball: Ball,
    *,
    queries: int,
    name: str,
    tier: str,
    adaptive: bool = False,
    pace: float = 0.0,
    surrogate: Model | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Campaign:
    """Attack every image of `data` by every attack of these names, at most `queries` queries an image and attack.

    The untouched images are asked about first, and every success once more, the same bytes: with fresh keys, so that
    neither is in what a detector remembers of the attacker. Rotation-translation has a threat model of its own: up to
    30 degrees, and a tenth of the side. `adaptive` attacks follow the rejections (`attacks.Dial`), and their keys take
    turns query by query. When interrupted, or when the service goes away, what was measured until then is returned,
    and `stopped` says why.
    Shapes: data.x (n, c, h, w) in whole grey levels. Units: `pace` in seconds between queries.
    Randomness: `seed`, and what the service draws.
    Raises: RobustkitError for an unknown attack, a budget below 1, images that no file can hold, or a service that
    cannot be asked about the untouched images.
    """
    check(names, surrogate)
    check_batch(data.x, data.y)
    check_units(ball, data.x)
    levels = 255 * data.x
    if (levels - levels.round()).abs().max() > 1e-3:
        raise RobustkitError(
            "the images are not in whole grey levels; a service gets files of 8 bits a channel."
        )
    side = RotationTranslation(30.0, round(0.1 * data.x.shape[-1]))
    threats = {
        one: ThreatModel(side if one == SPATIAL else ball, KNOWLEDGE[one], "untargeted", queries)
        for one in names
    }
    model, before = _scouted(access, data)
    scores = any(answer is not None and answer.scores is not None for answer in before)
    told = [i for i, answer in enumerate(before) if answer is not None]
    others = data.x[told], torch.tensor([answer.index for answer in before if answer is not None])
    attacks = chosen(names, ball, others, adaptive=adaptive, surrogate=surrogate)
    runs = {one: Run(one, threats[one], (), "not reached") for one in names}
    stopped, keys = "", 0
    with tqdm(total=len(names) * len(data), unit="image", disable=not progress, file=sys.stderr) as bar:
        try:
            for one, attack in attacks.items():
                bar.set_description(one)
                runs[one] = replace(runs[one], skipped="")
                if KNOWLEDGE[one] == "score-based" and not scores:
                    runs[one] = replace(runs[one], skipped=_NO_SCORES.format(one))
                    bar.write(f"robustkit: {runs[one].skipped}", file=sys.stderr)
                    bar.update(len(data))
                    continue
                mine = access.keys()
                keys = len(mine)
                turn = 1 if adaptive else None
                dial = Dial(0.25) if adaptive and one in RESAMPLED else None
                with Client(access.url, mine, turn=turn, pace=pace) as client:
                    for i, answer in enumerate(before):
                        attempt = _attempt(
                            access, client, data, i, answer, threats[one], one, attack, dial, seed
                        )
                        runs[one] = replace(runs[one], attempts=(*runs[one].attempts, attempt))
                        bar.update()
        except KeyboardInterrupt:
            stopped = "interrupted"
        except RobustkitError as error:
            stopped = str(error)
    return Campaign(
        name=name,
        model=model,
        output="scores" if scores else "labels",
        adaptive=adaptive,
        keys=keys,
        data=data.provenance,
        indices=data.indices,
        runs=tuple(runs[one] for one in names),
        seed=seed,
        tier=tier,
        hardware=hardware(data.x.device),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        notes=(access.note,) if access.note else (),
        stopped=stopped,
    )


_NO_SCORES = (
    "{} needs a score for every class and this service tells labels alone; hop-skip-jump, transfer-pgd and "
    "rotation-translation do without."
)


def _scouted(access: Access, data: Dataset) -> tuple[str, list[Answer | None]]:
    """What the service serves, and what it says about the untouched images. Raises: RobustkitError."""
    with Client(access.url, [access.fresh()]) as scout:
        model = scout.target()
        return model, [scout.ask(png(pixels(x))) for x in data.x]


def _told(access: Access, body: bytes) -> int | None:
    """The class that a fresh query about these bytes gets; None when it is rejected."""
    with Client(access.url, [access.fresh()]) as witness:
        answer = witness.ask(body)
    return None if answer is None else answer.index


def _attempt(
    access: Access,
    client: Client,
    data: Dataset,
    position: int,
    before: Answer | None,
    threat: ThreatModel,
    name: str,
    attack: QueryAttack,
    dial: Dial | None,
    seed: int,
) -> Attempt:
    """One attack on one image, and the verdict on what it had sent."""
    x, y = data.x[position][None], data.y[position][None]
    label, original = int(y), pixels(x[0])
    generator = seeded(seed, name, data.indices[position])
    counted, started = replace(client.counts), time.monotonic()
    oracle = Oracle(
        client,
        original,
        label,
        threat.ball,
        classes=len(data.classes),
        budget=threat.queries or 1,
        known=before,
        forms=resampled(x, threat.ball, dial, generator) if dial and isinstance(threat.ball, Ball) else once,
    )
    if before is not None and before.index == label:
        with suppress(Over):
            oracle(attack(oracle, x, y, threat.ball, generator=generator))
    after, inside, size = None, False, None
    if oracle.found is not None:
        after = _told(access, oracle.found)
        sent = decoded(oracle.found)
        inside = within(threat.ball, original, sent)
        if isinstance(threat.ball, Ball):
            size = float(threat.ball.size((image(sent) - image(original))[None]))
    spent = {field: value - getattr(counted, field) for field, value in asdict(client.counts).items()}
    return Attempt(
        image=data.indices[position],
        label=label,
        before=None if before is None else before.index,
        after=after,
        inside=inside,
        size=size,
        queries=oracle.queries,
        rejected=oracle.rejected,
        burnt=spent["burnt"],
        throttled=spent["throttled"],
        shed=spent["shed"],
        seconds=round(time.monotonic() - started, 3),
    )
