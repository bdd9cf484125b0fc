"""Triage: what was done to the inputs in quarantine, told from the inputs and the benign queries alone.

Each input is laid beside the benign query, or the first query of the same account, that explains it best:
as it is, turned and shifted, or but for one square. Where nothing explains it the answer is "unrelated": one
input whose original nobody has seen cannot be told from a new photograph.
"""

from __future__ import annotations

import io
import itertools
import math
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.errors import RobustkitError
from robustkit.files import write_atomically
from robustkit.results import Interval
from robustkit.serve.quarantine import Quarantine
from robustkit.threat import Patch, PerturbationSet, RotationTranslation

LP, PATCH, SPATIAL, SEQUENCE = "lp", "patch", "rotation-translation", "query sequence"
REPEATED, UNRELATED = "repeated", "unrelated"  # a benign query again; nothing that we have seen
ATTACKS = (LP, PATCH, SPATIAL, SEQUENCE)
FAMILIES = (*ATTACKS, REPEATED, UNRELATED)

MOST_HELD, MOST_BENIGN = 256, 1000  # inputs and benign queries that are laid beside each other
_MOST_BYTES = 1 << 30
_NEAREST, _TURNED = 2, 8  # references looked at closely: so many in each norm, so many turned and shifted

# Where one family ends. Set on training images; what they are worth on others, scripts/bench_triage.py says.
GREY = 1.5 / 255  # two roundings to whole grey levels, and half of one for the decoder
WINDOW = 0.5  # side of a patch, as a share of the image's
BOUND = 0.6  # L-inf to the reference, over that to the next one: noise is bounded, other pictures are not
EXPLAINED = 0.6  # share of the residual's energy that turning and shifting takes away,
TURNED = 0.5  # when what is left is that much smaller than beside the next reference
RATIO = 0.75  # the same where nothing was turned
SEQUENCE_LENGTH = 5  # different inputs of one account about one image


@dataclass(frozen=True)
class Stream:
    """Recorded queries in order of arrival: what was asked, by whom, when, and whether it is in quarantine.

    Shapes: images uint8 (n, height, width, channels), account (n,) text, at (n,) seconds, held (n,) bool.
    Raises: RobustkitError for other shapes or types.
    """

    images: np.ndarray[Any, Any]
    account: np.ndarray[Any, Any]
    at: np.ndarray[Any, Any]
    held: np.ndarray[Any, Any]

    def __post_init__(self) -> None:
        n = len(self.images)
        sound = self.images.dtype == np.uint8 and self.images.ndim == 4 and self.images.shape[3] in (1, 3)
        sound = sound and self.account.dtype.kind == "U" and self.held.dtype == np.bool_
        sound = sound and all(one.shape == (n,) for one in (self.account, self.at, self.held))
        if not (sound and self.at.dtype.kind in "iuf"):
            raise RobustkitError(
                f"a stream needs uint8 images (n, height, width, 1 or 3), and an account, a time and a quarantine "
                f"mark for each; got {self.images.dtype} {self.images.shape}, {self.account.dtype} "
                f"{self.account.shape}, {self.at.shape}, {self.held.shape}. Write it with triage.write_stream."
            )


def write_stream(folder: Path, stream: Stream) -> None:
    """Write a stream into a folder, for `robustkit triage FOLDER`: arrays, never pickles."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        images=stream.images,
        account=stream.account,
        at=stream.at,
        held=stream.held,
        allow_pickle=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "stream.npz", buffer.getvalue())


def read_stream(folder: Path) -> Stream:
    """The stream in a folder. Raises: RobustkitError when there is none, or it is damaged or too large."""
    path = folder / "stream.npz"
    remedy = "export the quarantine again"
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _MOST_BYTES:
            raise RobustkitError(
                f"{path} unpacks to {size:,} bytes, at most {_MOST_BYTES:,} are read; {remedy}."
            )
        with np.load(path, allow_pickle=False) as arrays:
            return Stream(*(arrays[name] for name in ("images", "account", "at", "held")))
    except OSError as error:
        raise RobustkitError(f"{path} cannot be read ({error.strerror or error}); {remedy}.") from error
    except (KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise RobustkitError(f"{path} is no recorded stream ({error}); {remedy}.") from error


def collected(quarantine: Quarantine, benign: Sequence[np.ndarray[Any, Any]], *, since: float = 0) -> Stream:
    """What lies in quarantine, behind benign images to compare it with: a probe set, or queries let through.

    Shapes: benign (height, width, channels) uint8 each, of the size of the model's input.
    Raises: RobustkitError when there is nothing on one of the two sides, and for sizes that differ.
    """
    items = quarantine.items(since=since)
    images = [*benign, *(quarantine.read(item.digest) for item in items)]
    if not items or not len(benign) or len({image.shape for image in images}) > 1:
        raise RobustkitError(
            f"triage needs quarantined and benign images of one shape; got {len(items)} and {len(benign)}, of "
            f"{sorted({image.shape for image in images})}."
        )
    first = items[0].at
    return Stream(
        np.stack(images),
        np.array([*[""] * len(benign), *(item.account for item in items)]),
        np.array([*[first] * len(benign), *(item.at for item in items)]),
        np.arange(len(images)) >= len(benign),
    )


@dataclass(frozen=True)
class Measures:
    """How an input differs from the query that explains it best, its reference.

    Units: pixels in [0, 1]; `l0` is the share of pixels that changed, `window` the side of the smallest square
    that holds 98 % of the residual's energy, as a share of the image's side; `high` the share of its energy
    beyond a quarter of a cycle a pixel; `explained` the share that turning the reference by `degrees`
    and shifting it by (`right`, `down`) pixels takes away; `ratio` how far the reference is from the input,
    explained as well as can be, over how far the next other reference is; `bound` the same of L-inf, unexplained.
    """

    reference: int  # position in the stream
    l0: float
    l2: float
    linf: float
    high: float
    window: float
    degrees: float
    right: float
    down: float
    explained: float
    ratio: float
    bound: float


def family_of(measures: Measures) -> str:
    """The family of perturbations that these measures speak for, of one input on its own."""
    if measures.linf <= GREY:
        return REPEATED
    if measures.window <= WINDOW:
        return PATCH
    if measures.bound <= BOUND:
        return LP
    if measures.explained >= EXPLAINED:
        return SPATIAL if measures.ratio <= TURNED else UNRELATED
    return LP if measures.ratio <= RATIO else UNRELATED


@dataclass(frozen=True)
class Group:
    """The inputs of one account about one reference: one attack, as far as we can see, or one user.

    `family` is that of most of its inputs, `votes` how many of them; of the account's inputs in quarantine,
    `queries` are different from each other, looked at or not;
    `step` is the median L2 distance from one to the next, over the median distance to the reference: small
    where somebody searches. `outside` is whether most of its inputs lie in no trained threat model; None where
    that cannot be said.
    """

    account: str
    reference: int
    inputs: tuple[int, ...]
    family: str
    votes: Interval
    queries: int
    step: float
    outside: bool | None
    typical: Measures


@dataclass(frozen=True)
class Triage:
    """The diagnosis of a quarantine: its groups, and what they come to.

    A share counts groups, not inputs: one attacker who sends 700 queries is one attacker.
    """

    groups: tuple[Group, ...]
    trained: tuple[str, ...]
    held: int
    looked_at: int

    @property
    def attacks(self) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.family in ATTACKS)

    @property
    def family(self) -> str:
        """The family of most attacks; "unrelated" where there is none."""
        counted = Counter(group.family for group in self.attacks)
        return counted.most_common(1)[0][0] if counted else UNRELATED

    def share(self, family: str) -> Interval | None:
        """How many of the attacks are of this family; None without attacks."""
        if not self.attacks:
            return None
        return Interval(sum(group.family == family for group in self.attacks), len(self.attacks))

    @property
    def outside(self) -> Interval | None:
        """How many of the attacks lie outside every trained threat model; None where no group can say."""
        known = [group.outside for group in self.attacks if group.outside is not None]
        return Interval(sum(known), len(known)) if known else None

    def record(self) -> dict[str, Any]:
        """For programs."""
        shares = {family: self.share(family) for family in ATTACKS}
        return {
            "type": "Triage",
            "family": self.family,
            "trained": list(self.trained),
            "held": self.held,
            "looked_at": self.looked_at,
            "families": {family: share.record() for family, share in shares.items() if share},
            "outside": None if self.outside is None else self.outside.record(),
            "groups": [asdict(group) for group in self.groups],
        }


def triage(stream: Stream, trained: Sequence[PerturbationSet] = ()) -> Triage:
    """Name what was done to the quarantined inputs, and whether the trained threat models contain it.

    At most MOST_HELD inputs are looked at, as many of each account as there is room for, spread evenly over
    its queries; beside the latest MOST_BENIGN different benign queries, and the first query of the account.
    Source: registration by search over turned and shifted references; the ratio to the next reference is
    Lowe's test (2004, IJCV 60:91, section 7.1); sequences by account are what stateful detectors look
    at (Chen et al. 2019, arXiv 1907.05587).
    Randomness: none. Raises: RobustkitError when nothing is in quarantine.
    """
    if not stream.held.any():
        raise RobustkitError("nothing of this stream is in quarantine; triage needs at least one held input.")
    rows = _spread(stream)
    measured = measure(stream, rows)
    groups: dict[tuple[str, int], list[int]] = {}
    for i, row in enumerate(rows):
        # What nothing explains belongs to its account alone.
        reference = -1 if family_of(measured[i]) == UNRELATED else measured[i].reference
        groups.setdefault((str(stream.account[row]), reference), []).append(i)
    found = [
        _group(
            account, reference, [rows[i] for i in members], [measured[i] for i in members], stream, trained
        )
        for (account, reference), members in groups.items()
    ]
    return Triage(
        tuple(sorted(found, key=lambda group: (-len(group.inputs), group.inputs))),
        tuple(str(one) for one in trained),
        int(stream.held.sum()),
        len(rows),
    )


def pixels(images: np.ndarray[Any, Any]) -> Tensor:
    """Stored images as the model sees them. Shapes: uint8 (n, h, w, c) -> (n, c, h, w) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div_(255)


def _spread(stream: Stream) -> list[int]:
    """The held inputs to look at: of every account as many as there is room for, evenly over its queries."""
    by_account: dict[str, list[int]] = {}
    for row in np.flatnonzero(stream.held).tolist():
        by_account.setdefault(str(stream.account[row]), []).append(row)
    room = max(MOST_HELD // len(by_account), 1)
    chosen: list[int] = []
    for rows in by_account.values():
        places = np.linspace(0, len(rows) - 1, min(room, len(rows))).round().astype(int)
        chosen += [rows[place] for place in places]
    return sorted(chosen)[:MOST_HELD]


def _group(
    account: str,
    reference: int,
    rows: list[int],
    measured: list[Measures],
    stream: Stream,
    trained: Sequence[PerturbationSet],
) -> Group:
    (family, votes), *_ = Counter(family_of(one) for one in measured).most_common(1)
    images = pixels(stream.images[rows])
    own = np.flatnonzero(stream.held & (stream.account == account)).tolist()
    queries = len({stream.images[row].tobytes() for row in own})
    residual = np.median([one.l2 for one in measured])
    steps = [float((b - a).norm()) for a, b in itertools.pairwise(images)]
    if family == LP and queries >= SEQUENCE_LENGTH:
        family = SEQUENCE
    typical = min(measured, key=lambda one: abs(one.l2 - residual))
    inside = [any(_inside(one, threat, images[0]) for threat in trained) for one in measured]
    known = bool(trained) and family in ATTACKS
    return Group(
        account,
        reference,
        tuple(rows),
        family,
        Interval(votes, len(rows)),
        queries,
        float(np.median(steps) / max(residual, 1e-6)) if steps else 0.0,
        sum(inside) * 2 <= len(rows) if known else None,
        typical,
    )


def _inside(measures: Measures, threat: PerturbationSet, image: Tensor) -> bool:
    """Whether the measured perturbation lies in a trained threat model, up to whole grey levels."""
    if isinstance(threat, RotationTranslation):
        small = abs(measures.degrees) <= threat.degrees + 1.5
        small = small and max(abs(measures.right), abs(measures.down)) <= threat.pixels + 0.5
        return small and measures.explained >= EXPLAINED
    if isinstance(threat, Patch):
        return measures.window * image.shape[-1] <= threat.side + 0.5
    if threat.norm == "Linf":
        return measures.linf <= threat.eps + GREY
    return threat.norm == "L2" and measures.l2 <= threat.eps + GREY * math.sqrt(image.numel())


# --- measuring ---------------------------------------------------------------------------------------


def measure(stream: Stream, rows: Sequence[int]) -> list[Measures]:
    """The measures of these inputs of a stream, each beside the reference that explains it best."""
    images = pixels(stream.images)
    benign = _different(stream)
    firsts = {str(account): int(row) for row, account in reversed(list(enumerate(stream.account)))}
    candidates = _candidates(images[rows], images[benign])
    pairs: list[tuple[int, int]] = []  # (place among rows, position of the reference)
    for i, row in enumerate(rows):
        chosen = {benign[k] for k in candidates[i].tolist()} | {firsts[str(stream.account[row])]}
        pairs += [(i, reference) for reference in sorted(chosen - {row})]
    if len({place for place, _ in pairs}) < len(rows):
        raise RobustkitError("there is nothing to compare with; record benign queries beside the quarantine.")
    inputs = images[[rows[i] for i, _ in pairs]]
    references = images[[reference for _, reference in pairs]]
    transforms, plain, registered = register(inputs, references)
    return [
        _measures(inputs[k], references[k], [pairs[j][1] for j in k], transforms[k], plain[k], registered[k])
        for k in ([j for j, (place, _) in enumerate(pairs) if place == i] for i in range(len(rows)))
    ]


def _measures(
    inputs: Tensor,
    references: Tensor,
    positions: list[int],
    transforms: Tensor,
    plain: Tensor,
    registered: Tensor,
) -> Measures:
    """The measures of one input beside its candidates, in the order of these. Shapes: (k, c, h, w), ..., (k,)."""
    left = torch.minimum(plain, registered)
    residuals = inputs - references
    largest, windows = residuals.flatten(1).abs().amax(1), _windows(residuals.square().sum(1))
    # The nearest is not always the origin: one square can be far away, and so can noise in every pixel. But other
    # pictures differ in many places, and somewhere by much.
    bounded = int(largest.argmin())
    others = largest[_apart(references, bounded, plain)]
    if float(windows.min()) <= WINDOW:
        best = int(windows.argmin())
    elif len(others) and float(largest[bounded]) <= BOUND * float(others.min()):
        best = bounded
    else:
        best = int(left.argmin())
    apart = _apart(references, best, plain)
    # Where all candidates are one picture, seen again and again, that is what explains it; one alone says nothing.
    ratio = bound = 0.0 if len(positions) > 1 else 1.0
    if apart.any():
        ratio = math.sqrt(float(left[best]) / max(float(left[apart].min()), 1e-12))
        bound = float(largest[best]) / max(float(largest[apart].min()), 1e-12)
    explained = 1 - float(registered[best]) / max(float(plain[best]), 1e-12)
    degrees, right, down = transforms[best].tolist()
    window = float(windows[best])
    return Measures(
        positions[best], *_shape(residuals[best]), window, degrees, right, down, explained, ratio, bound
    )


def _apart(references: Tensor, best: int, plain: Tensor) -> Tensor:
    """Which references are pictures of something else: the nearer ones are the best, seen again."""
    return (references - references[best]).flatten(1).square().sum(1) > 0.25 * plain[best]


def _different(stream: Stream) -> list[int]:
    """The latest benign queries, each image once."""
    seen: dict[bytes, int] = {}
    for row in reversed(np.flatnonzero(~stream.held).tolist()):
        seen.setdefault(stream.images[row].tobytes(), row)
        if len(seen) == MOST_BENIGN:
            break
    return sorted(seen.values())


def _candidates(inputs: Tensor, benign: Tensor) -> Tensor:
    """For each input the benign images nearest to it, in three norms and turned. Shapes: -> (n, up to 14)."""
    # A patch is large in few places, noise small in all: each norm overlooks something else.
    each = [torch.cdist(inputs.flatten(1), benign.flatten(1), p=p) for p in (1.0, 2.0, math.inf)]
    small, turned = _thumbnails(inputs), _thumbnails(benign)
    lattice = _lattice(small).transforms().view(31, 25, 3)[::2].reshape(-1, 3)
    threat = _lattice(small)
    distances = torch.full((len(inputs), len(benign)), torch.inf)
    for start in range(0, len(benign), 64):
        part = turned[start : start + 64]
        grown = threat.transformed(part.repeat_interleave(len(lattice), 0), lattice.repeat(len(part), 1))
        apart = torch.cdist(small.flatten(1), grown.flatten(1))
        distances[:, start : start + 64] = apart.view(len(inputs), len(part), -1).amin(2)
    looked_at = [(one, _NEAREST) for one in each] + [(distances, _TURNED)]
    return torch.cat([one.topk(min(few, len(benign)), largest=False).indices for one, few in looked_at], 1)


def _thumbnails(images: Tensor) -> Tensor:
    """Grey, and half as wide and high."""
    return F.avg_pool2d(images.mean(1, keepdim=True), 2)


def _lattice(images: Tensor) -> RotationTranslation:
    """How far to look: 45 degrees and 15 % of the side, more than the threat models of the literature."""
    return RotationTranslation(45.0, 0.15 * images.shape[-1])


def register(inputs: Tensor, references: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The turn and shift of each reference that brings it nearest to its input, by search from coarse to fine.

    Returns transforms (n, 3) as `RotationTranslation` has them, and the energy of the residual without
    and with them. Energies count pixels that come from inside the image: what an attacker fills in is his choice.
    Shapes: (n, c, h, w) twice -> (n, 3), (n,), (n,).
    """
    threat = _lattice(inputs)
    small, thumbnails = _thumbnails(inputs), _thumbnails(references)
    coarse = _lattice(small)
    lattice = coarse.transforms().view(31, 25, 3)[::3].reshape(-1, 3)
    lattice = torch.cat([torch.zeros(1, 3), lattice])  # of equals the first is taken: the identity
    scale = torch.tensor([1.0, 2.0, 2.0])
    best, energy = torch.zeros(len(inputs), 3), torch.full((len(inputs),), torch.inf)
    for transform in lattice:
        found = _residual(coarse, small, thumbnails, transform.expand(len(inputs), 3))
        better = found < energy - 1e-9
        best[better], energy[better] = transform * scale, found[better]
    energy = _residual(threat, inputs, references, best)
    untouched = _residual(threat, inputs, references, torch.zeros_like(best))
    best[untouched <= energy] = 0.0
    energy = torch.minimum(energy, untouched)
    step = torch.tensor([4.0, 1.0, 1.0])
    while step[0] > 0.2:
        for axis in (0, 1, 2, 0, 1, 2):
            for sign in (-1, 1):
                moved = best.clone()
                moved[:, axis] += sign * step[axis]
                found = _residual(threat, inputs, references, moved)
                better = found < energy
                best[better], energy[better] = moved[better], found[better]
        step = step / 2
    valid = _valid(threat, inputs, best)
    plain = ((inputs - references).square() * valid).flatten(1).sum(1) / valid.flatten(1).mean(1)
    return best, plain, energy


def _valid(threat: RotationTranslation, like: Tensor, transforms: Tensor) -> Tensor:
    """Which pixels of the turned image come from inside the reference. Shapes: -> (n, 1, h, w)."""
    return (threat.transformed(torch.ones_like(like[:, :1]), transforms) > 0.99).float()


def _residual(threat: RotationTranslation, inputs: Tensor, references: Tensor, transforms: Tensor) -> Tensor:
    """The energy between inputs and turned references, over the share of pixels that can be compared."""
    valid = _valid(threat, inputs, transforms)
    apart = (inputs - threat.transformed(references, transforms)).square() * valid
    return apart.flatten(1).sum(1) / valid.flatten(1).mean(1).clamp_min(0.1)


def _shape(residual: Tensor) -> tuple[float, float, float, float]:
    """L0, L2 and L-inf of a residual, and its share of high frequencies. Shapes: (c, h, w)."""
    changed = float((residual.abs().amax(0) > GREY).float().mean())
    spectrum = torch.fft.fft2(residual).abs().square().sum(0)
    rows, columns = (torch.fft.fftfreq(side) for side in residual.shape[1:])
    fast = rows[:, None].square() + columns[None, :].square() > 0.25**2
    high = float(spectrum[fast].sum() / spectrum.sum().clamp_min(1e-12))
    return changed, float(residual.norm()), float(residual.abs().max()), high


def _windows(energy: Tensor) -> Tensor:
    """The side of the smallest square with 98 % of the energy, as a share of the image's. Shapes: (n, h, w) -> (n,)."""
    side = min(energy.shape[1:])
    sums = F.pad(energy, (1, 0, 1, 0)).cumsum(1).cumsum(2)
    found = torch.ones(len(energy))
    for size in range(side - 1, 0, -1):
        inside = (
            sums[:, size:, size:] - sums[:, :-size, size:] - sums[:, size:, :-size] + sums[:, :-size, :-size]
        )
        found[inside.flatten(1).amax(1) >= 0.98 * sums[:, -1, -1]] = size / side
    return found.where(sums[:, -1, -1] > 0, 0.0)
