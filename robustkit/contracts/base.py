"""What a contract is, and how one is checked.

A contract has three parts, so that the same one serves pytest, the lesson's check cell and the
grader: `draw` makes the case that the examiner supplies, `observe` runs the learner's object on it and
only records, `judge` turns the record into findings. The grader runs `observe` in the learner's kernel
and `judge` in another process; cases and evidence are plain arrays, so that they can travel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Arrays = dict[str, Any]  # of numpy arrays and numpy scalars: what np.savez keeps without pickles

NOT_COUNTED = "NOT_COUNTED"  # the code of what is right, and counts nothing beside what is wrong


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: the criterion it costs, a stable code, and a hint that is not the answer."""

    criterion: str
    code: str
    hint: str


@dataclass(frozen=True)
class Contract:
    """What a learner's object must satisfy, criterion by criterion. See the module docstring.

    Where no criterion of `essential` is met, the others count nothing: a function that does not do its job
    keeps to ball and box easily. `hidden` names what of the case stays with the examiner.
    """

    criteria: tuple[str, ...]
    draw: Callable[[int], Arrays]
    observe: Callable[[Any, Arrays], Arrays]
    judge: Callable[[Arrays, Arrays], list[Finding]]
    essential: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    def given(self, case: Arrays) -> Arrays:
        """The part of the case that the learner's kernel may see."""
        return {name: array for name, array in case.items() if name not in self.hidden}


def numbers(value: Any) -> Array:
    """A tensor, array, list or number as float64."""
    detach = getattr(value, "detach", None)  # torch's: this module needs no torch
    return np.asarray(value if detach is None else detach().numpy(), dtype=np.float64)


def shaped(evidence: Arrays, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises: ValueError for a record whose shape is ours to set, and is another."""
    for name, shape in shapes.items():
        if evidence[name].shape != shape:
            raise ValueError(f"{name} has shape {evidence[name].shape}")


def text(value: object) -> Array:
    """JSON as bytes in an array: words can then travel beside numbers without pickles."""
    plain = json.dumps(value, default=lambda other: other.tolist())  # numpy's and torch's numbers
    return np.frombuffer(plain.encode(), dtype=np.uint8)


def untext(array: Array) -> Any:
    return json.loads(array.tobytes().decode())


def observe_safely(contract: Contract, subject: Any, case: Arrays) -> Arrays:
    """The observation, or the exception that the learner's code raised, as evidence."""
    try:
        return contract.observe(subject, contract.given(case))
    except NotImplementedError:
        return {
            "error": text(
                ["NOT_IMPLEMENTED", "the exercise is still a stub; replace the raise with your code"]
            )
        }
    except Exception as error:  # whatever a learner's function raises is a finding, never our crash
        first = (str(error).strip().splitlines() or [""])[0][:200]
        return {"error": text(["RAISED", f"your code raised {type(error).__name__}: {first}"])}


def judge_safely(contract: Contract, case: Arrays, evidence: Arrays) -> list[Finding]:
    """The findings; evidence that is missing or malformed costs every criterion.

    Fail closed: an exception while judging means that the evidence is not what the contract records.
    """
    try:
        if "error" in evidence:
            code, hint = untext(evidence["error"])
            return everywhere(contract, str(code), str(hint))
        if any(array.dtype.kind not in "biuf" for array in evidence.values()):
            raise TypeError("evidence is numbers alone")
        # Every comparison with NaN is false: a judge that asks "is it too far off?" would be content with it.
        if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in evidence.values()):
            return everywhere(contract, "NOT_FINITE", "the result holds NaN or infinity")
        with np.errstate(over="raise", invalid="raise", divide="raise"):  # nor may a judge make one
            found = contract.judge(case, evidence)
            return found + withheld(contract, found)
    except Exception as error:
        return everywhere(
            contract, "EVIDENCE_MALFORMED", f"the evidence cannot be judged ({type(error).__name__})"
        )


def withheld(contract: Contract, found: list[Finding]) -> list[Finding]:
    """Findings on the criteria that are met, and count nothing because no essential one is."""
    lost = {finding.criterion for finding in found}
    if not contract.essential or not lost.issuperset(contract.essential):
        return []
    hint = f"this counts only beside {' or '.join(contract.essential)}"
    return [Finding(criterion, NOT_COUNTED, hint) for criterion in contract.criteria if criterion not in lost]


@contextmanager
def measuring() -> Iterator[dict[str, tuple[int, int]]]:
    """What a judge measures meanwhile: criterion -> k of n. The points do not depend on it."""
    found: dict[str, tuple[int, int]] = {}
    before = _shares.set(found)
    try:
        yield found
    finally:
        _shares.reset(before)


def measured(criterion: str, k: int, n: int) -> None:
    """Tell whoever listens what a judge has measured for a criterion."""
    _shares.get({})[criterion] = (k, n)


_shares: ContextVar[dict[str, tuple[int, int]]] = ContextVar("shares")


def everywhere(contract: Contract, code: str, hint: str) -> list[Finding]:
    """The same finding on every criterion: nothing was earned."""
    return [Finding(criterion, code, hint) for criterion in contract.criteria]


def examine(contract: Contract, subject: Any, seed: int) -> list[Finding]:
    """Draw, observe and judge in this process: what the lesson's check cell and pytest do."""
    case = contract.draw(seed)
    return judge_safely(contract, case, observe_safely(contract, subject, case))
