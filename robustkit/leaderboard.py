"""RobustBench: its published figures, where a model would stand among them, and its JSON form.

`additional_data: false` on RobustBench still admits images made by a generative model; the footnote
alone tells. `Leaderboard.select` leaves out both kinds unless asked. Figures here are percentages, as
published. Source: Croce et al. 2021 (arXiv 2010.09670). Needs no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from robustkit.errors import RobustkitError
from robustkit.results import Evaluation, Interval
from robustkit.threat import white_box

EPS = {("cifar10", "Linf"): "8/255", ("cifar10", "L2"): "0.5"}  # as the published files write it
IMAGES = 10_000  # RobustBench measures on the whole test split
# AutoAttack's standard version in an evaluation: whole, its four parts one by one, or our own form of them.
AUTOATTACK, OWN = "autoattack", "standard"  # an attack's name, a protocol's
PARTS = tuple(f"{AUTOATTACK}-{part}" for part in ("apgd-ce", "apgd-t", "fab-t", "square"))

_COPIES = Path(__file__).parent / "leaderboards"
_SYNTHETIC = re.compile(r"synthetic|generated|generative|diffusion|\bDDPM\b|\bEDM\b", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One published model. `robust` is the lowest known figure, by which RobustBench ranks.

    `reported` is what its paper claims, None where that is not known; `unreliable` is RobustBench's
    warning that AutoAttack may overestimate this model.
    """

    id: str
    title: str
    authors: str
    venue: str
    link: str
    architecture: str
    eps: str
    clean: float
    robust: float
    autoattack: float
    reported: float | None
    extra_data: bool
    synthetic: bool
    footnote: str
    unreliable: bool


@dataclass(frozen=True)
class Leaderboard:
    """The entries for one data set and norm, best first; `source` says whose copy it is."""

    dataset: str
    norm: str
    eps: str
    source: str
    entries: tuple[Entry, ...]
    selection: str = "every entry"

    def select(
        self, *, extra_data: bool = False, synthetic: bool = False, architecture: str = ""
    ) -> Leaderboard:
        """The entries that compare like with like: without extra and synthetic images, unless admitted.

        `architecture` keeps those whose architecture has it in its name, whatever the case: "resnet-18"
        finds ResNet-18 and PreActResNet-18.
        """
        kept = tuple(
            entry
            for entry in self.entries
            if (extra_data or not entry.extra_data)
            and (synthetic or not entry.synthetic)
            and architecture.lower() in entry.architecture.lower()
        )
        left_out = [
            name for name, admitted in (("extra", extra_data), ("synthetic", synthetic)) if not admitted
        ]
        words = [f"entries without {' or '.join(left_out)} images" if left_out else "every entry"]
        words += [f"of architecture {architecture!r}"] if architecture else []
        return replace(self, entries=kept, selection=" ".join(words))


@dataclass(frozen=True)
class Standing:
    """Where a robust accuracy would stand: `rank` by its share, `best` and `worst` by its interval.

    `above` and `below` are the entries next to it; `of` counts the entries it was placed among.
    """

    robust: Interval
    rank: int
    best: int
    worst: int
    of: int
    above: Entry | None
    below: Entry | None
    notes: tuple[str, ...] = ()


def load(dataset: str = "cifar10", norm: str = "Linf") -> Leaderboard:
    """The leaderboard of a data set and norm: that of the installed robustbench, else our copy of it.

    Only a checkout of robustbench carries its `model_info`; the registry's package does not. `source`
    says which of the two it was.
    Raises: RobustkitError for a board that does not exist here, or a file that cannot be read.
    """
    if (dataset, norm) not in EPS:
        known = ", ".join(f"{data} {norm}" for data, norm in EPS)
        raise RobustkitError(f"there is no leaderboard for {dataset} {norm}; choose one of: {known}.")
    folder = _installed(dataset, norm)
    if folder is None:
        copy = json.loads((_COPIES / f"{dataset}.json").read_text(encoding="utf-8"))
        records, source = copy[norm], f"robustkit's copy of {copy['source']}; {copy['licence']}"
    else:
        records = {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}
        source = f"model_info of the installed robustbench ({folder})"
    entries = sorted(
        _inherit([_entry(name, record) for name, record in records.items()]),
        key=lambda entry: (-entry.robust, -entry.clean, entry.id),
    )
    return Leaderboard(dataset, norm, EPS[dataset, norm], source, tuple(entries))


def says_synthetic(footnote: str) -> bool:
    """Whether a footnote tells of images made by a model. Words decide: a denial would count as well."""
    return _SYNTHETIC.search(footnote) is not None


def fallen(entries: Iterable[Entry], by: float = 10.0) -> tuple[Entry, ...]:
    """The entries that later attacks took `by` points or more from, the deepest fall first."""
    falls = {entry: entry.reported - entry.robust for entry in entries if entry.reported is not None}
    return tuple(sorted((entry for entry in falls if falls[entry] >= by), key=lambda entry: -falls[entry]))


def place(robust: Interval, entries: Iterable[Entry]) -> Standing:
    """Where a robust accuracy would stand among entries: a model stands before its equals."""
    ordered = sorted(entries, key=lambda entry: -entry.robust)

    def ahead(share: float) -> int:
        # Rounded as published, so that the same count of images is a tie and not a hair's breadth.
        return sum(entry.robust > round(100 * share, 2) for entry in ordered)

    rank = ahead(robust.share)
    return Standing(
        robust=robust,
        rank=rank + 1,
        best=ahead(robust.high) + 1,
        worst=ahead(robust.low) + 1,
        of=len(ordered),
        above=ordered[rank - 1] if rank else None,
        below=ordered[rank] if rank < len(ordered) else None,
    )


def standing(evaluation: Evaluation, board: Leaderboard) -> Standing:
    """Where an evaluated model would stand; `notes` hold what makes it less than a RobustBench figure.

    Raises: RobustkitError when the two cannot be compared: another norm, eps, threat model, data set
    or split, or attacks weaker than AutoAttack's standard four, whose figure is an upper bound alone.
    """
    _comparable(evaluation, board)
    return replace(place(evaluation.robust, board.entries), notes=_reservations(evaluation))


def to_robustbench(
    evaluation: Evaluation,
    *,
    title: str | None = None,
    authors: str | None = None,
    venue: str | None = None,
    link: str | None = None,
    architecture: str | None = None,
    additional_data: bool | None = None,
    forward_passes: int | None = None,
    footnote: str = "",
) -> dict[str, Any]:
    """The evaluation as a file of RobustBench's `model_info`; what is not given stays null, as in its own tool.

    Synthetic images belong in `footnote`: it is the only place where RobustBench tells of them. What
    sets the figure apart from RobustBench's (fewer images, other pixels, our own code) is added to it.
    Raises: RobustkitError when the figure is none that RobustBench ranks; see `standing`.
    """
    board = load("cifar10", evaluation.threat.ball.norm)
    _comparable(evaluation, board)
    robust = f"{100 * evaluation.robust.share:.2f}"
    return {
        "link": link,
        "name": title,
        "authors": authors,
        "additional_data": additional_data,
        "number_forward_passes": forward_passes,
        "dataset": board.dataset,
        "venue": venue,
        "architecture": architecture,
        "eps": board.eps,
        "clean_acc": f"{100 * evaluation.clean.share:.2f}",
        "reported": robust,
        "autoattack_acc": robust,
        "footnote": " ".join(filter(None, (footnote, *_reservations(evaluation)))),
        "unreliable": False,
    }


# --- what may be compared ---------------------------------------------------------------------------


def _comparable(evaluation: Evaluation, board: Leaderboard) -> None:
    """Raises: RobustkitError, with the one difference that forbids a comparison."""
    over, _, under = board.eps.partition("/")
    ball, data = evaluation.threat.ball, evaluation.data
    eps = float(over) / float(under or 1)
    ranked = f"RobustBench ranks {board.dataset} at {board.norm} eps={board.eps}"
    if ball.norm != board.norm or not math.isclose(ball.eps, eps, rel_tol=1e-6):
        raise RobustkitError(f"not comparable: measured at {ball}; {ranked}.")
    if evaluation.threat != white_box(ball):
        raise RobustkitError(
            f"not comparable: measured with {evaluation.threat}; {ranked}, white-box, without limits."
        )
    if data.dataset not in ("CIFAR-10", "CIFAR-10 (JPEG mirror)") or data.split != "test":
        raise RobustkitError(
            f"not comparable: measured on {data.dataset} {data.split}; {ranked}, on the test split."
        )
    missing = _missing(evaluation)
    if missing and evaluation.protocol != OWN:
        attacks = ", ".join(run.name for run in evaluation.attacks)
        raise RobustkitError(
            f"not comparable: measured with {attacks}, which bounds from above what RobustBench ranks, "
            f"AutoAttack's standard version; evaluate with {', '.join(missing)} as well, or with protocol {OWN}."
        )


def _missing(evaluation: Evaluation) -> list[str]:
    """The parts of AutoAttack, as its own code has them, that were not run."""
    attacks = [run.name for run in evaluation.attacks]
    return [] if AUTOATTACK in attacks else [name for name in PARTS if name not in attacks]


def _reservations(evaluation: Evaluation) -> tuple[str, ...]:
    """What a reader must know before putting the figure beside a published one."""
    data, notes = evaluation.data, []
    if _missing(evaluation):
        notes.append(
            f"AutoAttack's four attacks in robustkit's own form (protocol {OWN}), not AutoAttack's code."
        )
    if not data.exact:
        notes.append(f"NOT the images that RobustBench measures on: {data.dataset}, {data.note}.")
    if evaluation.n < IMAGES:
        notes.append(
            f"Measured on {evaluation.n:,} images, 95 % interval {evaluation.robust}; "
            f"RobustBench measures on {IMAGES:,}."
        )
    return tuple(notes)


# --- published files --------------------------------------------------------------------------------


def _installed(dataset: str, norm: str) -> Path | None:
    """The folder of published files in an installed robustbench, in the package or beside it."""
    found = find_spec("robustbench")
    for package in (found.submodule_search_locations or ()) if found else ():
        for root in (Path(package), Path(package).parent):
            folder = root / "model_info" / dataset / norm
            if any(folder.glob("*.json")):
                return folder
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RobustkitError(f"{path} is not JSON ({error}); install robustbench afresh.") from error
    if not isinstance(record, dict):
        raise RobustkitError(f"{path} holds no model; install robustbench afresh.")
    return record


def _entry(name: str, record: Mapping[str, Any]) -> Entry:
    """A published file as an `Entry`. Numbers there are strings, and optional keys often missing."""

    def text(key: str) -> str:
        return " ".join(str(record.get(key) or "").replace("<br>", " ").split())

    try:
        autoattack = float(record["autoattack_acc"])
        return Entry(
            id=name,
            title=text("name"),
            authors=text("authors"),
            venue=text("venue"),
            link=text("link"),
            architecture=text("architecture"),
            eps=text("eps"),
            clean=float(record["clean_acc"]),
            robust=float(record.get("external") or autoattack),
            autoattack=autoattack,
            reported=None if record.get("reported") is None else float(record["reported"]),
            extra_data=bool(record["additional_data"]),
            synthetic=says_synthetic(text("footnote")),
            footnote=text("footnote"),
            unreliable=bool(record.get("unreliable")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RobustkitError(
            f"the published file of {name} is not one that RobustBench writes ({error!r}); "
            "install robustbench afresh."
        ) from error


def _inherit(entries: list[Entry]) -> list[Entry]:
    """A model built on another one, which its footnote names, has seen the images of that one."""
    made = [entry.id for entry in entries if entry.synthetic]
    return [
        replace(entry, synthetic=entry.synthetic or any(name in entry.footnote for name in made))
        for entry in entries
    ]


def record(board: Leaderboard, found: Standing | None = None) -> dict[str, Any]:
    """A board, and a standing on it, as JSON."""
    entries = [{"rank": rank, **asdict(entry)} for rank, entry in enumerate(board.entries, 1)]
    told: dict[str, Any] = {"type": "Leaderboard", **asdict(board), "entries": entries}
    if found is not None:
        robust = {"share": found.robust.share, "low": found.robust.low, "high": found.robust.high}
        told["standing"] = {**asdict(found), "robust": {**asdict(found.robust), **robust}}
    return told
