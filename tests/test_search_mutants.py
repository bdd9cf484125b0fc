"""Wrong searches, each with one mistake, and the test that must notice: the tests of the tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

import pytest

from tests import test_search, test_spatial
from tests.test_evaluate_mutants import Mutant, built, noticed, source
from tests.test_library import trained

# In the order in which they need each other.
MODULES = [import_module(f"robustkit.attacks.{name}") for name in ("search", "square", "noise", "spatial")]
SEARCH, SQUARE, NOISE, SPATIAL = MODULES


def of(test: Callable[..., None], **arguments: object) -> Callable[..., None]:
    return partial(test, **arguments)


scripted = test_search.test_the_search_keeps_the_highest_margin_and_the_first_point_that_fools
believed = test_search.test_a_point_that_fools_only_the_quick_half_of_a_prepared_model_stays
waiting = test_search.test_claims_wait_and_are_looked_at_together
first = test_search.test_a_confirmed_success_is_kept_whatever_was_claimed_before
spent = of(test_search.test_square_spends_its_queries_and_no_gradient, norm="Linf")
schedule = test_search.test_the_share_is_halved_at_the_papers_marks_rescaled
places = test_search.test_each_example_draws_its_own_square_from_every_position
signs = test_search.test_each_channel_of_a_square_has_a_sign_of_its_own
painted = test_search.test_linf_starts_from_stripes_and_then_paints_squares_of_one_sign
linf, l2, l1 = (of(test_search.test_a_step_is_pyautoattacks, norm=norm) for norm in ("Linf", "L2", "L1"))
drawn = test_spatial.test_random_draws_are_the_lattices_each_example_its_own_and_the_worst_is_kept
nearest = test_spatial.test_the_grid_returns_the_nearest_miss_where_nothing_fools
last = of(test_spatial.test_the_grid_finds_the_one_transform_that_fools, row=774)

MUTANTS = [
    Mutant(
        "the lowest margin is kept",
        SEARCH,
        "better = losses > highest",
        "better = losses < highest",
        scripted,
    ),
    Mutant(
        "the last proposal is kept",
        SEARCH,
        "better = losses > highest",
        "better = losses == losses",
        scripted,
    ),
    Mutant(
        "the first proposal is kept",
        SEARCH,
        "better = losses > highest",
        "better = highest == -torch.inf",
        scripted,
    ),
    Mutant(
        "a success is kept only where its margin is the highest",
        SEARCH,
        "claimed = logits.argmax(1) != labels",
        "claimed = (logits.argmax(1) != labels) & better",
        test_search.test_a_confirmed_success_is_kept_whatever_was_claimed_before,
    ),
    Mutant(
        "the quick half is believed",
        SEARCH,
        "confirmed(model, said, y[rows], torch.ones_like(rows, dtype=torch.bool))",
        "torch.ones_like(rows, dtype=torch.bool)",
        believed,
    ),
    Mutant("whoever is fooled stays", SEARCH, "~torch.isin(left, rows[fooled])", "left >= 0", spent),
    Mutant("the last claims are not looked at", SEARCH, " or query == queries - 1", "", believed),
    Mutant("every claim is looked at on its own", SEARCH, "ASKED_EVERY if", "1 if", waiting),
    Mutant("claims are looked at twice", SEARCH, "rows[fooled]), []", "rows[fooled]), claims", waiting),
    Mutant(
        "the last success is kept",
        SEARCH,
        "zip(reversed(claims), reversed(verdicts)",
        "zip(claims, verdicts",
        first,
    ),
    Mutant("gradients are recorded", SEARCH, "with torch.no_grad(), ", "with ", spent),
    Mutant("one query too many", SEARCH, "range(queries)", "range(queries + 1)", spent),
    Mutant("survivors are given back untouched", SEARCH, "    best[left] = current\n", "", scripted),
    Mutant("labels out of step", SEARCH, "labels[stay]", "labels[: len(left[stay])]", scripted),
    Mutant("images out of step", SEARCH, "clean[stay]", "clean[: len(left[stay])]", scripted),
    Mutant("margins out of step", SEARCH, "highest[stay]", "highest[: len(left)]", scripted),
    Mutant("points out of step", SEARCH, "current[stay], highest", "current[: len(left)], highest", scripted),
    Mutant("halved a query early", SQUARE, "* 10_000 > mark", "* 10_000 >= mark", schedule),
    Mutant("sides are cut off, not rounded", SQUARE, "max(round(math", "max(int(math", schedule),
    Mutant("a square larger than the image", SQUARE, "min(side, height, width)", "side", schedule),
    Mutant("bumps without a middle", SQUARE, "side += 1 - side % 2", "pass", l2),
    Mutant("the schedule is a query ahead", SQUARE, "(query - 1) / queries", "query / queries", l2),
    Mutant("the schedule is not rescaled", SQUARE, "(query - 1) / queries", "(query - 1) / 10_000", linf),
    Mutant("never in the last row", SQUARE, "height - side + 1", "max(height - side, 1)", places),
    Mutant("never in the last column", SQUARE, "width - side + 1", "max(width - side, 1)", places),
    Mutant("one row for the batch", SQUARE, "height - side + 1, (n,", "height - side + 1, (1,", places),
    Mutant("rows as long as columns", SQUARE, "* width + left", "* height + left", places),
    Mutant(
        "one sign for all channels",
        SQUARE,
        "_signs((*x.shape[:2], 1), x, generator)\n    painted",
        "_signs((len(x), 1, 1), x, generator)\n    painted",
        signs,
    ),
    Mutant("stripes lie down", SQUARE, "(n, channels, 1, width)", "(n, channels, x.shape[2], 1)", painted),
    Mutant("stripes of noise", SQUARE, "(n, channels, 1, width)", "x.shape", painted),
    Mutant(
        "painted on the best point",
        SQUARE,
        "(x.flatten(2).gather(2, cells)",
        "(best.flatten(2).gather(2, cells)",
        linf,
    ),
    Mutant("what two windows share counts twice", SQUARE, "_mass(rest.gather", "_mass(delta.gather", l2),
    Mutant("the second window keeps its mass", SQUARE, "rest.scatter(2, there, 0.0)", "rest", l2),
    Mutant(
        "what is unused of eps stays unused", SQUARE, "room = unused / x.shape[1] + freed", "room = freed", l2
    ),
    Mutant("every L2 channel gets all that is unused", SQUARE, "unused / x.shape[1]", "unused", l2),
    Mutant("every L1 channel gets its share", SQUARE, "room * x.shape[1]", "room", l1),
    Mutant(
        "the old bump is forgotten",
        SQUARE,
        "_unit(added + _unit(window, order), order)",
        "_unit(added, order)",
        l2,
    ),
    Mutant("the old bump is not scaled", SQUARE, "added + _unit(window, order)", "added + window", l1),
    Mutant(
        "L1 bumps as flat as those of L2",
        SQUARE,
        "** (4 // order)",
        "** 2",
        of(test_search.test_a_bump_is_pyautoattacks, side=12, norm="L1"),
    ),
    Mutant(
        "no valley",
        SQUARE,
        "-_hill",
        "_hill",
        of(test_search.test_a_bump_is_pyautoattacks, side=7, norm="L2"),
    ),
    Mutant(
        "all bumps upright",
        SQUARE,
        "generator=generator, device=x.device) < 0.5",
        "generator=generator, device=x.device) < 2",
        test_search.test_bumps_lie_and_stand,
    ),
    Mutant(
        "noise around the best point",
        NOISE,
        "ball.candidates(clean, ",
        "ball.candidates(best, ",
        of(test_search.test_noise_is_the_worst_of_uniform_points, norm="Linf"),
    ),
    Mutant(
        "one draw of noise",
        NOISE,
        "y, draws, propose",
        "y, 1, propose",
        of(test_search.test_noise_is_the_worst_of_uniform_points, norm="L2"),
    ),
    Mutant(
        "one transform for the batch",
        SPATIAL,
        "lattice[rows])",
        "lattice[rows[:1]].expand(len(clean), 3))",
        drawn,
    ),
    Mutant(
        "half of the lattice is drawn from",
        SPATIAL,
        "torch.randint(len(lattice)",
        "torch.randint(len(lattice) // 2",
        drawn,
    ),
    Mutant(
        "turns upon turns",
        SPATIAL,
        "transformed(clean, lattice[rows])",
        "transformed(best, lattice[rows])",
        of(test_spatial.test_random_draws_stay_on_the_lattice),
    ),
    Mutant("one draw", SPATIAL, "y, draws, propose", "y, 1, propose", drawn),
    Mutant(
        "the grid turns upon turns",
        SPATIAL,
        "transformed(clean, lattice[query]",
        "transformed(best, lattice[query]",
        nearest,
    ),
    Mutant(
        "the grid stops before its end",
        SPATIAL,
        "y, len(lattice), propose",
        "y, len(lattice) - 1, propose",
        last,
    ),
    Mutant(
        "the grid without turns",
        SPATIAL,
        "lattice[query].expand",
        "(lattice[query] * torch.tensor([0, 1, 1])).expand",
        last,
    ),
    Mutant(
        "the grid without shifts",
        SPATIAL,
        "lattice[query].expand",
        "(lattice[query] * torch.tensor([1, 0, 0])).expand",
        last,
    ),
]


@pytest.fixture(scope="module")
def small():
    return trained(n=40)


def put_in_place(mutant: Mutant | None, monkeypatch) -> None:
    """The tests then meet the mutant, and copies of what it is used by; without one, unchanged copies."""
    for module in MODULES:
        text = source(module)
        if mutant is not None and module is mutant.module:
            assert text.count(mutant.old) == 1, "the mutant has lost its place in the source"
            text = text.replace(mutant.old, mutant.new)
        copy = built(module.__name__, text, monkeypatch)
        for tests in (test_search, test_spatial):
            for name, value in vars(tests).items():
                if value is module:
                    monkeypatch.setattr(tests, name, copy)
                elif getattr(value, "__module__", None) == module.__name__:
                    monkeypatch.setattr(tests, name, getattr(copy, value.__name__))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mistake)
def test_the_mistake_is_noticed(mutant, monkeypatch, small):
    put_in_place(mutant, monkeypatch)
    assert noticed(mutant.noticed_by, small=small, monkeypatch=monkeypatch)


@pytest.mark.parametrize("test", {id(mutant.noticed_by): mutant.noticed_by for mutant in MUTANTS}.values())
def test_without_a_mistake_nothing_is_noticed(test, monkeypatch, small):
    put_in_place(None, monkeypatch)
    assert noticed(test, small=small, monkeypatch=monkeypatch) == ""
