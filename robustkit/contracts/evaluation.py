"""Contracts of an evaluation: a loss to attack with, the worst case image by image, a place on a leaderboard."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from robustkit.contracts.base import Array, Arrays, Contract, Finding, everywhere, numbers, shaped
from robustkit.contracts.oracle import LinearOracle, uniform
from robustkit.device import seeded
from robustkit.leaderboard import Entry, place
from robustkit.results import Interval

# --- margin ---------------------------------------------------------------------------------------

CLASSES = 6


def _draw_logits(seed: int) -> Arrays:
    """Logits of an ordinary size and of a size at which cross-entropy has no gradient; right and wrong answers."""
    generator = seeded(seed, "logits")
    scale = torch.tensor([3.0, 1e4]).repeat_interleave(24)[:, None]
    logits = scale * torch.randn(48, CLASSES, generator=generator)
    y = torch.randint(CLASSES, (48,), generator=generator)
    y[::2] = logits.argmax(1)[::2]
    return {"logits": logits.numpy(), "y": y.numpy()}


def _observe_margin(margin: Any, case: Arrays) -> Arrays:
    leaf = torch.from_numpy(case["logits"].copy()).requires_grad_()
    logits, y = leaf * 1, torch.from_numpy(case["y"].copy())
    value = torch.as_tensor(margin(logits, y))
    kept = np.array_equal(logits.detach(), case["logits"]) and np.array_equal(y, case["y"])
    gradient = torch.autograd.grad(value.sum(), leaf)[0] if value.requires_grad else torch.zeros_like(leaf)
    return {"value": numbers(value), "gradient": numbers(gradient), "kept": np.bool_(kept)}


def _judge_margin(case: Arrays, evidence: Arrays) -> list[Finding]:
    logits, y = case["logits"].astype(np.float64), case["y"]
    rows, found = np.arange(len(y)), []
    shaped(evidence, {"gradient": logits.shape, "kept": ()})
    if evidence["value"].shape != y.shape:
        hint = f"got shape {evidence['value'].shape}; each of the {len(y)} examples has a margin of its own"
        return everywhere(MARGIN, "NOT_PER_EXAMPLE", hint)
    others = logits.copy()
    others[rows, y] = -np.inf
    right = others.max(1) - logits[rows, y]
    got = evidence["value"]

    def is_margin(value: Array) -> bool:
        return bool(np.allclose(value, right, rtol=1e-5, atol=1e-4))

    if is_margin(-got):
        hint = "the margin has the wrong sign: a larger value must favour the attacker"
        found.append(Finding("value", "WRONG_SIGN", hint))
    elif not is_margin(got):
        i = int(np.abs(got - right).argmax())
        hint = f"logits {np.round(logits[i], 2).tolist()}, label {y[i]}: the margin is not {got[i]:.3f}"
        if is_margin(np.where(right > 0, got, right)):
            hint = "only misclassified examples have their margin: among which classes is the maximum taken?"
        found.append(Finding("value", "WRONG_MARGIN", hint))
    expected = np.zeros_like(logits)
    expected[rows, others.argmax(1)] = 1
    expected[rows, y] -= 1
    if not evidence["gradient"].any():
        hint = "no gradient comes back from the margin to the logits: an attack could not follow it"
        found.append(Finding("gradient", "NO_GRADIENT", hint))
    elif not np.allclose(evidence["gradient"], expected, atol=1e-3):
        hint = "the gradient is not plus one at the best wrong logit, minus one at the true one, whatever their size"
        found.append(Finding("gradient", "WRONG_GRADIENT", hint))
    if not evidence["kept"].item():
        hint = "the logits that you were given are not as they were; work on a copy"
        found.append(Finding("value", "INPUT_MODIFIED", hint))
    return found


MARGIN = Contract(
    ("value", "gradient"), _draw_logits, _observe_margin, _judge_margin, essential=("value", "gradient")
)


# --- the worst case, image by image ---------------------------------------------------------------

# Of each kind this many images. Every candidate of an image but one changes no verdict; the one that may is told by
# the kind: it fools the model well inside the ball, or on its surface to within rounding, or beyond ball or box.
_EACH = 6
_KINDS = ("broken", "surface", "beyond_ball", "beyond_box", "safe", "clean_error")
_ATTACKS = 3


def _draw_worst_case(seed: int) -> Arrays:
    """A linear model, images half an eps from its boundary, and for each norm the candidates of three attacks."""
    generator = seeded(seed, "worst case")
    d, n = 16, _EACH * len(_KINDS)
    signs = torch.where(torch.rand(d, generator=generator) < 0.5, -1.0, 1.0)
    w = (0.5 + torch.rand(d, generator=generator)) * signs
    w[0] = 0.0  # a pixel that decides nothing, black or white: it may leave the box, or the ball alone
    case: Arrays = {"w": w.numpy(), "b": np.float32(0.0)}
    for norm, low, high in (("Linf", 0.05, 0.1), ("L2", 0.2, 0.4)):
        eps = round(uniform(generator, low, high, 1).item(), 3)
        along = w.sign() if norm == "Linf" else w / w.norm()
        kind = torch.arange(n) % len(_KINDS)
        y = torch.randint(2, (n,), generator=generator)
        towards = torch.where(y == 1, 1.0, -1.0)[:, None] * along  # raises the true class' logit
        noise = 0.05 * torch.randn(n, d, generator=generator)
        noise = noise - (noise @ w)[:, None] * w / (w @ w)  # within the boundary
        clean_error = kind == _KINDS.index("clean_error")
        x = 0.5 + noise + torch.where(clean_error, -0.5, 0.5)[:, None] * eps * towards
        turn = torch.arange(n) // len(_KINDS)
        x[:, 0] = (turn // 2 % 2).float()
        # A small step that changes no verdict; clean errors are carried back to their class.
        points = (x - 0.2 * eps * towards).expand(_ATTACKS, n, d).clone()
        points[:, clean_error] = (x + 0.9 * eps * towards)[clean_error]
        decisive = torch.randint(_ATTACKS, (n,), generator=generator)
        reach = torch.zeros(n)
        for name, share in {"broken": 0.9, "surface": 1.0, "beyond_ball": 1.4, "beyond_box": 0.8}.items():
            reach[kind == _KINDS.index(name)] = share
        chosen = reach > 0
        changed = x - (reach * eps)[:, None] * towards
        outwards = 2 * x[:, 0] - 1
        changed[:, 0] += 0.4 * eps * outwards * (kind == _KINDS.index("beyond_box"))
        # Of the candidates beyond the ball one in two is there by this pixel alone.
        by_pixel = (kind == _KINDS.index("beyond_ball")) & (turn % 2 == 1)
        changed[by_pixel] = (x - 0.8 * eps * towards)[by_pixel]
        changed[by_pixel, 0] -= (1.6 * eps * outwards)[by_pixel]
        points[decisive[chosen], torch.arange(n)[chosen]] = changed[chosen]
        case |= {
            f"{norm}_x": x.view(n, 1, 4, 4).numpy(),
            f"{norm}_y": y.numpy(),
            f"{norm}_candidates": points.view(_ATTACKS, n, 1, 4, 4).numpy(),
            f"{norm}_eps": np.float64(eps),
        }
    return case


def _observe_worst_case(survives: Any, case: Arrays) -> Arrays:
    seen: Arrays = {}
    for record, norm in (("linf", "Linf"), ("l2", "L2")):
        model = LinearOracle(torch.from_numpy(case["w"]), float(case["b"])).eval()
        x, y = (torch.from_numpy(case[f"{norm}_{part}"].copy()) for part in ("x", "y"))
        candidates = [torch.from_numpy(batch.copy()) for batch in case[f"{norm}_candidates"]]
        seen[record] = numbers(survives(model, x, y, candidates, norm, float(case[f"{norm}_eps"])))
    return seen


def _judge_worst_case(case: Arrays, evidence: Arrays) -> list[Finding]:
    wrong: dict[str, str] = {}
    n = _EACH * len(_KINDS)
    for record, norm in (("linf", "Linf"), ("l2", "L2")):
        got = evidence[record]
        if got.shape != (n,) or not np.isin(got, (0, 1)).all():
            hint = f"expected one yes or no for each of the {n} images, got shape {got.shape}"
            return everywhere(WORST_CASE, "NOT_PER_EXAMPLE", hint)
        for i, kind in enumerate(_KINDS):
            survive = got[i :: len(_KINDS)].astype(bool)
            # Who misses what is broken well inside the ball has not rejected the surface for its rounding.
            if kind == "surface" and "broken" in wrong:
                continue
            if survive.any() if kind in ("broken", "surface", "clean_error") else not survive.all():
                wrong.setdefault(kind, norm)
    return [
        Finding(*_WORST_CASE_TOLD[kind][:2], f"{norm}: {_WORST_CASE_TOLD[kind][2]}")
        for kind, norm in wrong.items()
    ]


_WORST_CASE_TOLD = {
    "broken": ("worst_case", "BREAK_MISSED", "an image that one of the attacks breaks counts as robust"),
    "safe": ("worst_case", "FALSE_BREAK", "an image that no attack breaks does not count as robust"),
    "clean_error": (
        "clean_errors",
        "CLEAN_ERRORS_COUNTED",
        "an image that is misclassified untouched cannot be robust, wherever an attack carries it",
    ),
    "beyond_ball": (
        "valid",
        "BALL_NOT_CHECKED",
        "a candidate outside the ball counts as a success of the attack",
    ),
    "beyond_box": (
        "valid",
        "BOX_NOT_CHECKED",
        "a candidate that is no image, outside [0, 1], counts as a success",
    ),
    "surface": (
        "valid",
        "ROUNDING_REJECTED",
        "a candidate on the ball's surface is thrown away; float32 may carry it a millionth beyond",
    ),
}
WORST_CASE = Contract(
    ("worst_case", "clean_errors", "valid"),
    _draw_worst_case,
    _observe_worst_case,
    _judge_worst_case,
    essential=("worst_case",),
)


# --- a place on a leaderboard ---------------------------------------------------------------------

_ASKED = 8


def _draw_board(seed: int) -> Arrays:
    """A board, and counts to place on it whose share and bounds are no entry's to within 0.05 points."""
    generator = seeded(seed, "board")
    robust = uniform(generator, 35, 75, 40).round(2)
    extra, synthetic = (uniform(generator, 0, 1, 40) < 0.35 for _ in range(2))
    pairs: list[tuple[int, int]] = []
    while len(pairs) < _ASKED:
        n = int(torch.randint(100, 2001, (), generator=generator))
        k = round(n * uniform(generator, 0.4, 0.7, 1).item())
        share = Interval(k, n)
        near = np.abs(np.subtract.outer(100 * np.array([share.share, share.low, share.high]), robust)).min()
        if near > 0.05:
            pairs.append((k, n))
    return {
        "robust": robust,
        "extra_data": extra,
        "synthetic": synthetic,
        "k": np.array([k for k, _ in pairs]),
        "n": np.array([n for _, n in pairs]),
    }


def _entries(case: Arrays) -> list[Entry]:
    """The board as the kit's entries, best first."""
    rows = zip(case["robust"], case["extra_data"], case["synthetic"], strict=True)
    entries = [
        Entry(
            id=f"model-{i}",
            title="",
            authors="",
            venue="",
            link="",
            architecture="",
            eps="8/255",
            clean=90.0,
            robust=float(robust),
            autoattack=float(robust),
            reported=None,
            extra_data=bool(extra),
            synthetic=bool(synthetic),
            footnote="",
            unreliable=False,
        )
        for i, (robust, extra, synthetic) in enumerate(rows)
    ]
    return sorted(entries, key=lambda entry: -entry.robust)


def _observe_standing(standing: Any, case: Arrays) -> Arrays:
    pairs = zip(case["k"].tolist(), case["n"].tolist(), strict=True)
    return {"ranks": np.stack([numbers(tuple(standing(k, n, _entries(case)))) for k, n in pairs])}


def _judge_standing(case: Arrays, evidence: Arrays) -> list[Finding]:
    ranks = evidence["ranks"]
    if ranks.shape != (_ASKED, 3):
        return everywhere(STANDING, "WRONG_SHAPE", "expected three ranks: the best, its own, the worst")
    admits = {
        (extra, synthetic): [
            e for e in _entries(case) if (extra or not e.extra_data) and (synthetic or not e.synthetic)
        ]
        for extra in (False, True)
        for synthetic in (False, True)
    }
    expected = {}
    for admitted, entries in admits.items():
        places = [place(Interval(int(k), int(n)), entries) for k, n in zip(case["k"], case["n"], strict=True)]
        expected[admitted] = np.array([(p.best, p.rank, p.worst) for p in places])
    # Among which entries were these ranks counted? Those that explain the most of them.
    counted = max(expected, key=lambda admitted: int((ranks == expected[admitted]).sum()))
    right, found = expected[counted], []
    if not (ranks == right).any():
        return everywhere(
            STANDING, "WRONG_RANK", f"{ranks[0].tolist()} are not the ranks of a model on this board"
        )
    if counted != (False, False):
        which = " and ".join(
            name for name, admitted in zip(("extra", "synthetic"), counted, strict=True) if admitted
        )
        hint = f"models trained with {which} images are counted; the one to be placed had none"
        found.append(Finding("comparable", "INCOMPARABLE_COUNTED", hint))
    if (ranks[:, 1] != right[:, 1]).any():
        hint = "the rank of its share is off: one more than the number of entries that are better"
        found.append(Finding("rank", "WRONG_RANK", hint))
    if (ranks[:, [0, 2]] != right[:, [0, 2]]).any():
        swapped = (ranks[:, [2, 0]] == right[:, [0, 2]]).all()
        hint = (
            "the best rank is that of the interval's upper end"
            if swapped
            else "the best and the worst rank are off"
        )
        found.append(Finding("interval", "RANKS_SWAPPED" if swapped else "WRONG_RANKS", hint))
    return found


STANDING = Contract(
    ("comparable", "rank", "interval"), _draw_board, _observe_standing, _judge_standing, essential=("rank",)
)
