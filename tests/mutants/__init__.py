"""Wrong programs, and what each must cost: the tests of the contracts.

A mutant is a reference function with one mistake. Its declaration names the criteria that the mistake
must cost, each with the code that the learner must read; every other criterion must be kept, because
partial credit is a promise, unless no essential one is: then `declare` adds that the rest is withheld.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from robustkit.contracts import CONTRACTS
from robustkit.device import attackable


@dataclass(frozen=True)
class Mutant:
    """A wrong answer to one exercise; `costs` maps each lost criterion to a code it must be given."""

    contract: str
    name: str
    subject: Any
    costs: dict[str, str]


MUTANTS: list[Mutant] = []


def declare(contract: str, name: str, subject: Any, everywhere: str = "", **costs: str) -> None:
    """Register a wrong answer; `everywhere` is the code when no criterion at all must be earned."""
    if everywhere:
        costs = dict.fromkeys(CONTRACTS[contract].criteria, everywhere)
    assert costs.keys() <= set(CONTRACTS[contract].criteria), name
    assert costs, name
    essential = CONTRACTS[contract].essential
    if essential and costs.keys() >= set(essential):  # nothing else counts then
        costs = dict.fromkeys(CONTRACTS[contract].criteria, "NOT_COUNTED") | costs
    MUTANTS.append(Mutant(contract, name, subject, costs))


def mutant(contract: str, everywhere: str = "", **costs: str) -> Callable[[Any], Any]:
    """`declare` for a function, under its own name."""

    def register(function: Any) -> Any:
        declare(contract, function.__name__, function, everywhere, **costs)
        return function

    return register


def all_mutants() -> list[Mutant]:
    """Every mutant of every module in this folder."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    return MUTANTS


def gradient(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The input gradient as it should be taken: the part that a mutant with another mistake gets right."""
    with attackable(model):
        x = x.detach().clone().requires_grad_(True)
        return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]
