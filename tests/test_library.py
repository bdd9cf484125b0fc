"""Attacks of other libraries: the same as calling those libraries, under our rules."""

from __future__ import annotations

import pytest
import torch
from pyautoattack import AutoAttack
from torch import nn

from robustkit.attacks.library import AUTOATTACK_PARTS, LIBRARY
from robustkit.device import seeded
from robustkit.threat import Ball


def trained(classes: int = 10, n: int = 12) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small convolutional net that fits its 120 points, and `n` of them: some robust, some not."""
    x = torch.rand(120, 1, 8, 8, generator=seeded("points"))
    centres = torch.rand(classes, 1, 8, 8, generator=seeded("centres"))
    y = torch.arange(120) % classes
    x = (0.4 * centres[y] + 0.6 * x).clamp(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, classes)
        )
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    optimiser.zero_grad()
    return model.eval(), x[:n], y[:n]


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    return trained()


def right(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x).argmax(1) == y


def drawn_seed(*key: int) -> int:
    """The seed that an adapter draws from `seeded(*key)`."""
    return int(torch.randint(2**31, (), generator=seeded(*key)))


SIZES = {"Linf": 0.06, "L2": 0.35}  # about half of the small model's points break


# --- AutoAttack ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "norm"), [*((part, "Linf") for part in AUTOATTACK_PARTS), ("apgd-ce", "L2"), ("fab-t", "L2")]
)
def test_a_part_of_autoattack_is_that_part_of_the_standard_protocol(small, part, norm):
    model, x, y = small
    with torch.random.fork_rng(devices=[]):
        whole = AutoAttack(model, norm=norm, eps=SIZES[norm], seed=drawn_seed(7), version="standard")
        whole.attacks_to_run = [part]
        theirs, _ = whole.run_standard_evaluation(x, y)
    ours = LIBRARY[f"autoattack-{part}"](model, x, y, Ball(norm, SIZES[norm]), generator=seeded(7))
    broken = ~right(model, theirs, y)
    assert 0 < int(broken.sum()) < len(x)
    assert torch.equal(~right(model, ours, y), broken)
    torch.testing.assert_close(ours[broken], theirs[broken], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.08), ("L2", 0.4)])
def test_the_four_parts_in_turn_are_the_whole_protocol(small, norm, eps):
    """As `evaluate` runs them: each on the survivors of those before."""
    model, x, y = small
    ball = Ball(norm, eps)
    with torch.random.fork_rng(devices=[]):
        theirs, _ = AutoAttack(model, norm=norm, eps=eps, seed=drawn_seed(1)).run_standard_evaluation(x, y)
    parts, broken = x.clone(), {}
    for part in AUTOATTACK_PARTS:
        left = right(model, parts, y)
        parts[left] = LIBRARY[f"autoattack-{part}"](model, x[left], y[left], ball, generator=seeded(1))
        broken[part] = int((left & ~right(model, parts, y)).sum())
    survivors = right(model, theirs, y)
    assert 0 < int(survivors.sum()) < len(x)
    assert broken["apgd-ce"] > 0
    torch.testing.assert_close(parts[~survivors], theirs[~survivors], atol=1e-6, rtol=0)
    assert torch.equal(right(model, parts, y), survivors)


def test_the_whole_protocol_is_pyautoattacks_own(small):
    model, x, y = small
    ball = Ball("Linf", 0.12)  # everything breaks, so that this is quick
    with torch.random.fork_rng(devices=[]):
        theirs, _ = AutoAttack(model, eps=ball.eps, seed=drawn_seed(1)).run_standard_evaluation(x, y)
    assert torch.equal(LIBRARY["autoattack"](model, x, y, ball, generator=seeded(1)), theirs)
    assert not right(model, theirs, y).any()
