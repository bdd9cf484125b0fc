"""Contracts of analysing an incident: residuals, registration, families, causes, mixed training, the gate."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.contracts.base import Array, Arrays, Contract, Finding, numbers, shaped
from robustkit.contracts.oracle import uniform
from robustkit.device import seeded
from robustkit.results import Interval
from robustkit.threat import RotationTranslation

_NONE = -1


def _smooth(generator: torch.Generator, n: int, channels: int, side: int) -> Tensor:
    """Pictures without two alike: coarse noise, enlarged. Shapes: -> (n, channels, side, side) in [0, 1]."""
    coarse = torch.rand(n, channels, 5, 5, generator=generator)
    return F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)


# --- residuals ---------------------------------------------------------------------------------------

_SIDE, _QUERIES = 12, 8


def _draw_residuals(seed: int) -> Arrays:
    """Dark and bright noise, one pixel of one channel, a square, and the very same picture again."""
    generator = seeded(seed, "residuals")
    benign = (255 * _smooth(generator, 10, 3, _SIDE)).round().byte().permute(0, 2, 3, 1).numpy()
    rows = torch.randperm(len(benign), generator=generator)[:_QUERIES].numpy()
    queries = benign[rows].astype(np.int64)
    noise = torch.randint(-14, 15, queries.shape, generator=generator).numpy()
    queries[:4] += noise[:4] - 3  # darker in most pixels: unsigned differences wrap around
    queries[4, 5, 6, 1] += 60 if queries[4, 5, 6, 1] < 128 else -60
    queries[5, 2:5, 7:10] = 255 - queries[5, 2:5, 7:10]
    queries[6, :, 3, 2] += np.where(queries[6, :, 3, 2] < 128, 25, -25)
    return {"benign": benign, "queries": queries.clip(0, 255).astype(np.uint8)}


def _observe_residuals(residual: Any, case: Arrays) -> Arrays:
    found = [residual(query.copy(), case["benign"].copy()) for query in case["queries"]]
    return {"found": np.stack([np.stack([numbers(value) for value in row]) for row in found])}


def _sizes(queries: Array, benign: Array) -> Array:
    """Nearest row, share of changed pixels, L2 and L-inf, in units of [0, 1]. Shapes: -> (n, 4)."""
    apart = (queries[:, None].astype(np.float64) - benign[None].astype(np.float64)) / 255
    lengths = np.sqrt(np.square(apart).sum((2, 3, 4)))
    nearest = lengths.argmin(1)
    delta = np.abs(apart[np.arange(len(queries)), nearest])
    changed = (delta > 0).any(3).mean((1, 2))
    return np.stack([nearest, changed, lengths.min(1), delta.max((1, 2, 3))], 1)


def _judge_residuals(case: Arrays, evidence: Arrays) -> list[Finding]:
    queries, benign = case["queries"], case["benign"]
    shaped(evidence, {"found": (len(queries), 4)})
    right, got = _sizes(queries, benign), evidence["found"]
    found = []
    if (got[:, 0] != right[:, 0]).any():
        hint = f"{int((got[:, 0] != right[:, 0]).sum())} of {len(right)} queries have another nearest picture"
        found.append(Finding("nearest", "WRONG_NEAREST", hint))
    delta = np.abs(queries.astype(np.float64) - benign[right[:, 0].astype(int)].astype(np.float64)) / 255
    if not np.allclose(got[:, 1], right[:, 1], atol=1e-6):
        code, hint = "WRONG_SHARE", "the share of pixels that differ in any channel"
        if np.allclose(got[:, 1], (delta > 0).mean((1, 2, 3)), atol=1e-6):
            code, hint = (
                "CHANNELS_COUNTED",
                "a pixel is changed when any of its channels is, and it is one pixel",
            )
        elif np.allclose(got[:, 1], (delta > 0).any(3).sum((1, 2))):
            code, hint = "COUNT_NOT_SHARE", "images of other sizes must be comparable: return the share"
        found.append(Finding("changed", code, hint))
    if not np.allclose(got[:, 2:], right[:, 2:], atol=1e-5):
        code, hint = "WRONG_SIZE", "L2 and L-inf of the residual, in units where images lie in [0, 1]"
        wrapped = (queries - benign[right[:, 0].astype(int)]).astype(np.float64) / 255
        if np.allclose(got[:, 3], wrapped.max((1, 2, 3)), atol=1e-5):
            code, hint = "BYTES_WRAPPED", "3 - 5 is 254 in unsigned bytes"
        elif np.allclose(got[:, 2:], 255 * right[:, 2:], rtol=1e-5):
            code, hint = "GREY_LEVELS", "threat models are stated in units of [0, 1]"
        found.append(Finding("sizes", code, hint))
    return found


RESIDUAL = Contract(("nearest", "changed", "sizes"), _draw_residuals, _observe_residuals, _judge_residuals)


# --- registration ------------------------------------------------------------------------------------


def _draw_turns(seed: int) -> Arrays:
    """Turned and shifted pictures, in whole grey levels; two are as they were."""
    generator = seeded(seed, "turns")
    threat = RotationTranslation(float(torch.randint(20, 41, (), generator=generator)), 2.0)
    references = _smooth(generator, 6, 1, 16)
    lattice = threat.transforms()
    away = lattice[(lattice[:, 0].abs() > threat.degrees / 4) & (lattice[:, 1] != lattice[:, 2])]
    rows = away[torch.randperm(len(away), generator=generator)[:6]]
    rows[4:] = 0.0
    queries = (255 * threat.transformed(references, rows)).round() / 255
    return {
        "degrees": np.float64(threat.degrees),
        "pixels": np.float64(threat.pixels),
        "references": references.numpy(),
        "queries": queries.numpy(),
        "rows": rows.numpy(),
    }


def _observe_turns(register: Any, case: Arrays) -> Arrays:
    threat = RotationTranslation(float(case["degrees"]), float(case["pixels"]))
    pairs = zip(case["queries"], case["references"], strict=True)
    found = [register(torch.from_numpy(q.copy()), torch.from_numpy(r.copy()), threat) for q, r in pairs]
    return {"found": np.stack([np.stack([numbers(value) for value in row]) for row in found])}


def _judge_turns(case: Arrays, evidence: Arrays) -> list[Finding]:
    right, got = case["rows"].astype(np.float64), evidence["found"]
    shaped(evidence, {"found": right.shape})
    wrong = ~np.isclose(got, right, atol=1e-3).all(1)
    found = []
    if wrong[:4].any():
        code, hint = (
            "WRONG_TRANSFORM",
            f"{int(wrong[:4].sum())} of 4 turned pictures come back as something else",
        )
        if np.allclose(got[:4], -right[:4], atol=1e-3):
            code, hint = (
                "WRONG_WAY",
                "that turns the query back; which transform of the reference gives the query?",
            )
        elif np.allclose(got[:4], right[:4][:, [0, 2, 1]], atol=1e-3):
            code, hint = "SHIFTS_SWAPPED", "a row is degrees, pixels to the right, pixels down"
        found.append(Finding("turned", code, hint))
    if wrong[4:].any():
        hint = "a query that is its reference was moved by nothing"
        found.append(Finding("untouched", "IDENTITY_MOVED", hint))
    return found


REGISTER = Contract(
    ("turned", "untouched"),
    _draw_turns,
    _observe_turns,
    _judge_turns,
    essential=("turned",),
    hidden=("rows",),
)


# --- families ----------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What triage measures of an input: see `robustkit.serve.triage.Measures`; `queries` of the same account
    about the same picture.
    """

    linf: float
    window: float
    explained: float
    ratio: float
    bound: float
    queries: int


_FAMILIES = ("lp", "patch", "rotation-translation", "query sequence", "repeated", "unrelated")
_KINDS = ("lp", "patch", "spatial", "sequence", "restraint")  # the criteria
# criterion, right answer, then the range of each measure; a row is drawn from it
_MEASURED: tuple[tuple[str, str, tuple[tuple[float, float], ...]], ...] = (
    ("lp", "lp", ((0.2, 0.3), (0.9, 1.0), (0.0, 0.1), (0.8, 1.0), (0.2, 0.4), (1, 3))),  # noise everywhere
    ("lp", "lp", ((0.4, 0.7), (0.9, 1.0), (0.0, 0.2), (0.45, 0.65), (0.65, 0.9), (1, 3))),
    ("lp", "lp", ((0.02, 0.04), (0.9, 1.0), (0.0, 0.1), (0.1, 0.3), (0.05, 0.1), (4, 4))),
    ("patch", "patch", ((0.9, 1.0), (0.2, 0.35), (0.0, 0.1), (0.8, 1.0), (0.95, 1.1), (1, 3))),
    ("patch", "patch", ((0.9, 1.0), (0.2, 0.35), (0.0, 0.1), (0.5, 0.6), (0.95, 1.1), (40, 400))),
    (
        "spatial",
        "rotation-translation",
        ((0.8, 1.0), (0.7, 1.0), (0.9, 1.0), (0.0, 0.2), (0.95, 1.6), (1, 3)),
    ),
    (
        "spatial",
        "rotation-translation",
        ((0.8, 1.0), (0.7, 1.0), (0.9, 1.0), (0.0, 0.2), (0.95, 1.6), (50, 775)),
    ),
    ("sequence", "query sequence", ((0.2, 0.3), (0.9, 1.0), (0.0, 0.1), (0.7, 1.0), (0.2, 0.4), (40, 900))),
    ("sequence", "query sequence", ((0.03, 0.1), (0.9, 1.0), (0.0, 0.1), (0.1, 0.3), (0.1, 0.2), (5, 5))),
    ("restraint", "unrelated", ((0.6, 1.0), (0.7, 1.0), (0.1, 0.5), (0.9, 1.0), (0.95, 1.3), (1, 3))),
    ("restraint", "unrelated", ((0.6, 1.0), (0.7, 1.0), (0.7, 0.85), (0.85, 1.0), (0.95, 1.3), (1, 3))),
    ("restraint", "repeated", ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (1, 30))),
    (  # sent again by a phone that packs pictures anew
        "restraint",
        "repeated",
        ((1 / 255, 1 / 255), (0.9, 1.0), (0.0, 0.1), (0.0, 0.02), (0.003, 0.008), (1, 30)),
    ),
)
_EACH = 3


def _draw_measured(seed: int) -> Arrays:
    generator = seeded(seed, "measured")
    kinds = np.repeat(np.arange(len(_MEASURED)), _EACH)[
        torch.randperm(len(_MEASURED) * _EACH, generator=generator).numpy()
    ]
    rows = [[uniform(generator, low, high, 1).item() for low, high in _MEASURED[kind][2]] for kind in kinds]
    return {"rows": np.array(rows), "kinds": kinds}


def _measured(row: list[float]) -> Measured:
    linf, window, explained, ratio, bound, queries = row
    return Measured(linf, window, explained, ratio, bound, round(queries))


def _observe_family(family: Any, case: Arrays) -> Arrays:
    answers = [str(family(_measured(row))) for row in case["rows"].tolist()]
    return {"answers": np.array([_FAMILIES.index(name) if name in _FAMILIES else _NONE for name in answers])}


def _judge_family(case: Arrays, evidence: Arrays) -> list[Finding]:
    shaped(evidence, {"answers": case["kinds"].shape})
    found: dict[tuple[str, str], Finding] = {}
    for kind, row, answer in zip(
        case["kinds"], case["rows"].tolist(), evidence["answers"].tolist(), strict=True
    ):
        criterion, right, _ = _MEASURED[kind]
        if answer == _FAMILIES.index(right):
            continue
        said = "no family of the list" if answer == _NONE else f"{_FAMILIES[int(answer)]!r}"
        one = _measured(row)
        shown = ", ".join(f"{name} {value:.2g}" for name, value in one._asdict().items())
        code = "FAMILY_MISSED"
        if right == "unrelated" and answer != _NONE:
            code = "FAMILY_GUESSED"
        elif said == "'query sequence'":
            code = "SEARCH_NOT_PERTURBATION"
        elif said == "'unrelated'":
            code = "EXPLAINED_AND_MISSED"
        found[criterion, code] = Finding(criterion, code, f"{shown}: you say {said}")
    return list(found.values())


FAMILY = Contract(_KINDS, _draw_measured, _observe_family, _judge_family, hidden=("kinds",))


# --- causes ------------------------------------------------------------------------------------------

_CAUSES = ("novel family", "overfitted", "undecided")
# (votes k, n), (outside k, n) or None, right answer
_VERDICTS: tuple[tuple[tuple[int, int], tuple[int, int] | None, str], ...] = (
    ((19, 20), (20, 20), "novel family"),
    ((40, 60), (36, 52), "novel family"),
    ((9, 10), (10, 10), "novel family"),
    ((18, 20), (1, 20), "overfitted"),
    ((45, 60), (15, 60), "overfitted"),
    ((30, 30), (0, 30), "overfitted"),
    ((3, 4), (3, 3), "undecided"),  # three of four: as good as a coin
    ((12, 20), (20, 20), "undecided"),
    ((20, 20), (6, 10), "undecided"),
    ((20, 20), (4, 10), "undecided"),
    ((19, 20), None, "undecided"),
    ((5, 20), (0, 20), "undecided"),
)


def _draw_verdicts(seed: int) -> Arrays:
    return {"order": torch.randperm(len(_VERDICTS), generator=seeded(seed, "verdicts")).numpy()}


def _observe_cause(cause: Any, case: Arrays) -> Arrays:
    answers = []
    for i in case["order"].tolist():
        votes, outside, _ = _VERDICTS[i]
        answers.append(str(cause(Interval(*votes), None if outside is None else Interval(*outside))))
    return {"answers": np.array([_CAUSES.index(name) if name in _CAUSES else _NONE for name in answers])}


def _judge_cause(case: Arrays, evidence: Arrays) -> list[Finding]:
    shaped(evidence, {"answers": (len(_VERDICTS),)})
    found: dict[str, Finding] = {}
    for i, answer in zip(case["order"].tolist(), evidence["answers"].tolist(), strict=True):
        votes, outside, right = _VERDICTS[i]
        if answer == _CAUSES.index(right):
            continue
        said = "no cause of the list" if answer == _NONE else f"{_CAUSES[int(answer)]!r}"
        shown = f"votes {Interval(*votes)}, outside {'unknown' if outside is None else Interval(*outside)}"
        code = "DECIDED_BY_CHANCE" if right == "undecided" else "WRONG_CAUSE"
        if said == "'undecided'":
            code = "TOO_TIMID"
        criterion = right.split()[0]
        found[criterion] = Finding(criterion, code, f"{shown}: you say {said}")
    return list(found.values())


CAUSE = Contract(("novel", "overfitted", "undecided"), _draw_verdicts, _observe_cause, _judge_cause)


# --- mixed training ----------------------------------------------------------------------------------

_IMAGES, _ATTACKS = 14, 3


class _Witness(nn.Module):
    """A linear model that remembers, of its last passes in train mode, which images it saw, and as what.

    The first pixel of an image is its number, the second the attack that it met: 0 for none.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append(x.detach()[:, 0, 0, :2].clone())
        return x.flatten(1) @ self.weight


def _draw_mixed(seed: int) -> Arrays:
    generator = seeded(seed, "mixed")
    x = torch.rand(_IMAGES, 1, 3, 3, generator=generator)
    x[:, 0, 0, 0] = torch.arange(_IMAGES) / _IMAGES
    x[:, 0, 0, 1] = 0.0
    return {
        "x": x.numpy(),
        "y": torch.randint(0, 4, (_IMAGES,), generator=generator).numpy(),
        "weight": torch.randn(9, 4, generator=generator).numpy(),
        "shift": torch.rand(_ATTACKS, generator=generator).numpy(),
    }


def _attack(number: int, shift: float, labels: Tensor) -> Any:
    """An attack that leaves its mark: the second pixel tells its number, the last moves.

    Raises: ValueError where the labels are not those of its images.
    """

    def attack(model: Any, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        own = labels[(x[:, 0, 0, 0] * _IMAGES).round().long()]
        if not isinstance(generator, torch.Generator) or not torch.equal(torch.as_tensor(y), own):
            raise ValueError("attack(model, x, y, generator) wants some images and the labels of just these")
        candidates = x.clone()
        candidates[:, 0, 0, 1] = (number + 1) / 10
        candidates[:, 0, 2, 2] = shift
        return candidates

    return attack


def _observe_mixed(mixed_loss: Any, case: Arrays) -> Arrays:
    model = _Witness(torch.from_numpy(case["weight"].copy()))
    x, y = torch.from_numpy(case["x"].copy()), torch.from_numpy(case["y"].copy())
    attacks = [_attack(number, float(shift), y.clone()) for number, shift in enumerate(case["shift"])]
    loss = mixed_loss(model, x, y, attacks, seeded(0, "mixed"))
    (gradient,) = torch.autograd.grad(loss, [model.weight])
    seen = torch.cat(model.seen)
    return {"loss": numbers(loss), "gradient": gradient.numpy(), "seen": seen.numpy().astype(np.float64)}


def _judge_mixed(case: Arrays, evidence: Arrays) -> list[Finding]:
    shaped(evidence, {"loss": (), "gradient": case["weight"].shape})
    number = (evidence["seen"][:, 0] * _IMAGES).round().astype(int)
    met = (evidence["seen"][:, 1] * 10).round().astype(int)
    if sorted(number.tolist()) != list(range(_IMAGES)):
        code, hint = (
            "NOT_ONCE",
            f"{len(number)} images reached the loss, of a batch of {_IMAGES}: each counts once",
        )
        return [Finding(criterion, code, hint) for criterion in ("shares", "loss")]
    found = []
    counts = np.bincount(met, minlength=_ATTACKS + 1)
    if counts[0] == 0:
        hint = "nothing of the batch stays as it is; what keeps clean accuracy up?"
        found.append(Finding("shares", "NO_CLEAN_SHARE", hint))
    elif len(counts) != _ATTACKS + 1 or counts.max() - counts.min() > 1:
        hint = f"untouched and by attack: {counts.tolist()}; equal shares differ by one image at most"
        found.append(Finding("shares", "UNEVEN_SHARES", hint))
    x = torch.from_numpy(case["x"].copy())
    x[number, 0, 0, 1] = torch.from_numpy(met / 10).float()
    for attack in range(1, _ATTACKS + 1):
        x[number[met == attack], 0, 2, 2] = float(case["shift"][attack - 1])
    weight = torch.from_numpy(case["weight"].copy()).requires_grad_()
    each = F.cross_entropy(x.flatten(1) @ weight, torch.from_numpy(case["y"]), reduction="none")
    (gradient,) = torch.autograd.grad(each.mean(), [weight])
    if not np.allclose(evidence["loss"], each.mean().item(), rtol=1e-4):
        code, hint = (
            "WRONG_LOSS",
            "the mean cross-entropy over all images of the batch, each with its own label",
        )
        parts = [
            each[torch.from_numpy(number[met == part])].mean()
            for part in range(_ATTACKS + 1)
            if (met == part).any()
        ]
        if np.allclose(evidence["loss"], torch.stack(parts).mean().item(), rtol=1e-4):
            code, hint = "MEAN_OF_MEANS", "shares of unequal size: the mean of their means is another number"
        found.append(Finding("loss", code, hint))
    elif not np.allclose(evidence["gradient"], gradient.numpy(), atol=1e-5):
        found.append(Finding("loss", "WRONG_GRADIENT", "the loss is right, and its gradient is not"))
    return found


MIXED = Contract(("shares", "loss"), _draw_mixed, _observe_mixed, _judge_mixed)


# --- the gate ----------------------------------------------------------------------------------------

_BARS = ("clean", "worst", "held_out", "adaptive")
_KEPT = 300


def _draw_gates(seed: int) -> Arrays:
    """For each bar cases just passed and just failed: by the interval, by the joint count, by what is missing."""
    generator = seeded(seed, "gates")

    def flags(k: int) -> Array:
        kept = np.zeros(_KEPT, dtype=bool)
        kept[torch.randperm(_KEPT, generator=generator).numpy()[:k]] = True
        return kept

    cases = []
    for case in range(8):
        arrays = {
            "clean": flags(int(torch.randint(270, 295, (), generator=generator))),
            "first": flags(int(torch.randint(220, 250, (), generator=generator))),
            "second": flags(int(torch.randint(220, 250, (), generator=generator))),
            "held_out": flags(int(torch.randint(170, 220, (), generator=generator))),
            "adaptive": flags(int(torch.randint(200, 240, (), generator=generator))),
        }
        joint = arrays["first"] & arrays["second"]
        measured = (arrays["clean"], joint, arrays["held_out"], joint & arrays["adaptive"])
        floors = []
        for bar, kept in enumerate(measured):
            share = Interval(int(kept.sum()), _KEPT)
            # Passed by little, failed by less than half of the interval, failed by the share itself. Never by less
            # than the digits in which two formulas for an interval agree.
            nearby = (share.low - 0.001, (share.low + share.share) / 2, share.share + 0.01)
            floors.append(nearby[(case + bar) % 3])
        cases.append((arrays, floors))
    kept = np.stack([np.stack(list(arrays.values())) for arrays, _ in cases])
    missing = np.zeros((len(cases), 5), dtype=bool)
    missing[6, 3] = missing[7, 4] = True
    return {"kept": kept, "floors": np.array([floors for _, floors in cases]), "missing": missing}


def _observe_gates(gate: Any, case: Arrays) -> Arrays:
    failed = []
    for kept, floors, missing in zip(case["kept"], case["floors"].tolist(), case["missing"], strict=True):
        clean, first, second, held_out, adaptive = (
            None if gone else row.copy() for row, gone in zip(kept, missing, strict=True)
        )
        named = gate(
            clean,
            {"Linf": first, "spatial": second},
            held_out,
            adaptive,
            dict(zip(_BARS, floors, strict=True)),
        )
        failed.append([bar in set(named) for bar in _BARS])
    return {"failed": np.array(failed)}


def _gates(
    case: Arrays, *, lower: bool = True, joint: bool = True, alone: bool = False, closed: bool = True
) -> Array:
    """Which bars fail; the other arguments make the mistakes that have a name. Shapes: -> (cases, 4)."""
    rows = []
    for (clean, first, second, held_out, adaptive), floors, missing in zip(
        case["kept"].astype(bool), case["floors"], case["missing"], strict=True
    ):
        worst = first & second if joint else min((first, second), key=np.sum)
        measured = (clean, worst, held_out, adaptive if alone else worst & adaptive)
        shares = [Interval(int(kept.sum()), _KEPT) for kept in measured]
        failed = [
            (one.low if lower else one.share) < floor for one, floor in zip(shares, floors, strict=True)
        ]
        for bar, place in ((2, 3), (3, 4)):
            failed[bar] = closed if missing[place] else failed[bar]
        rows.append(failed)
    return np.array(rows)


def _judge_gates(case: Arrays, evidence: Arrays) -> list[Finding]:
    right, got = _gates(case), evidence["failed"].astype(bool)
    shaped(evidence, {"failed": right.shape})
    mistakes = (
        ("SHARE_NOT_LOWER_END", "a floor is met by the lower end of the interval", _gates(case, lower=False)),
        ("NOT_CLOSED", "what was not measured has not passed", _gates(case, closed=False)),
        ("MINIMUM_OF_SHARES", "the attacker chooses the family for each image", _gates(case, joint=False)),
        ("ADAPTIVE_ALONE", "who adapts may also use what the others used", _gates(case, alone=True)),
    )
    found = []
    for bar, name in enumerate(_BARS):
        if (got[:, bar] != right[:, bar]).any():
            # Several mistakes can come to the same verdicts: each of them is named.
            known = [(code, why) for code, why, wrong in mistakes if (got[:, bar] == wrong[:, bar]).all()]
            other = f"{int((got[:, bar] != right[:, bar]).sum())} of {len(right)} verdicts are wrong"
            found += [Finding(name, *one) for one in known or [("WRONG_VERDICT", other)]]
    return found


GATE = Contract(_BARS, _draw_gates, _observe_gates, _judge_gates)
