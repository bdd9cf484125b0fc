"""Wrong evaluators, each with one mistake, and the test that must notice: the tests of the tests."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

import robustkit.evaluate
import robustkit.journal
from robustkit.errors import RobustkitError
from robustkit.results import Evaluation, Interval
from tests import killed, oracle, test_evaluate, test_journal, test_results
from tests.test_evaluate import BALL


class Mutant(NamedTuple):
    mistake: str
    module: types.ModuleType
    old: str
    new: str
    noticed_by: Callable[..., None]


EVALUATE, JOURNAL = robustkit.evaluate, robustkit.journal

rules = partial(test_evaluate.test_an_attack_that_breaks_the_rules_is_refused_by_name, words="left its ball")
another = partial(
    test_journal.test_the_journal_of_another_evaluation_is_refused_and_kept,
    model=oracle.linear(),
    changes={"seed": 2},
    words="seed",
)

MUTANTS = [
    Mutant(
        "the attack's word is taken: every candidate counts as a success",
        EVALUATE,
        "rows[~torch.stack(right).all(0)]",
        "rows",
        test_evaluate.test_an_attack_that_does_nothing_breaks_nothing,
    ),
    Mutant(
        "the attack's word is taken: the model that it searched gives the verdict",
        EVALUATE,
        "predict(self.model, candidates, y)",
        "predict(self.search, candidates, y)",
        test_evaluate.test_a_search_model_cannot_talk_its_way_to_success_either,
    ),
    Mutant(
        "the labels that decide can be changed by the attack",
        EVALUATE,
        "y.clone()",
        "y",
        test_evaluate.test_an_attack_cannot_talk_its_way_to_success,
    ),
    Mutant(
        "distances are measured from what the attack made of the image",
        EVALUATE,
        "x.clone(), y",
        "x, y",
        partial(rules, change=lambda x, ball: x.mul_(0).add_(0.5)),
    ),
    Mutant(
        "candidates are not measured",
        EVALUATE,
        "            check_candidates(job.attack, x, candidates, self.ball)\n",
        "",
        partial(rules, change=lambda x, ball: x - 1.01 * ball.eps),
    ),
    Mutant(
        "survivors are not filtered",
        EVALUATE,
        "enumerate(broken_by) if verdict is None]",
        "enumerate(broken_by)]",
        test_evaluate.test_later_attacks_meet_survivors_only_and_the_worst_case_counts,
    ),
    Mutant(
        "an attack can take back what an earlier one broke",
        EVALUATE,
        "                        broken_by[row] = name\n",
        "                        broken_by[:] = [None if v == list(attacks)[0] else v for v in broken_by]\n"
        "                        broken_by[row] = name\n",
        test_evaluate.test_later_attacks_meet_survivors_only_and_the_worst_case_counts,
    ),
    Mutant(
        "a broken image is put down to the first attack",
        EVALUATE,
        "broken_by[row] = name",
        "broken_by[row] = name if name == CLEAN else next(iter(attacks))",
        test_evaluate.test_later_attacks_meet_survivors_only_and_the_worst_case_counts,
    ),
    Mutant(
        "randomness comes from the clock",
        EVALUATE,
        "key = self.seed, job.attack, job.rows[0]",
        "key = self.seed, job.attack, time.perf_counter_ns()",
        test_evaluate.test_randomness_follows_from_the_seed_alone,
    ),
    Mutant(
        "one right draw of several is enough",
        EVALUATE,
        ".all(0)",
        ".any(0)",
        test_evaluate.test_a_model_that_draws_at_random_gets_repeated_draws_and_the_notes_say_so,
    ),
    Mutant(
        "a tie counts for the model",
        EVALUATE,
        "margin(logits, y) < 0",
        "margin(logits, y) <= 0",
        test_evaluate.test_a_tie_counts_against_the_model,
    ),
    Mutant(
        "predictions in train mode",
        EVALUATE,
        "strict_fp32(), attackable(model):",
        "strict_fp32():",
        test_evaluate.test_predictions_are_made_in_eval_mode_and_the_mode_comes_back,
    ),
    Mutant(
        "predictions in whatever precision is on",
        EVALUATE,
        "torch.no_grad(), strict_fp32(), ",
        "torch.no_grad(), ",
        test_evaluate.test_predictions_are_made_in_full_float32_inside_autocast,
    ),
    Mutant(
        "the weakest knowledge is told",
        EVALUATE,
        "return min(map(of",
        "return max(map(of",
        test_evaluate.test_the_threat_model_says_the_strongest_knowledge_that_was_used,
    ),
    Mutant(
        "out of memory, the failed batch is skipped",
        EVALUATE,
        "size = min(size, len(left)) // 2",
        "left = left[size:]",
        test_evaluate.test_out_of_memory_halves_the_batches_and_the_notes_say_so,
    ),
    Mutant(
        "the seconds before the kill are forgotten",
        EVALUATE,
        "sum(done.seconds for",
        "max(done.seconds for",
        test_journal.test_seconds_are_summed_over_the_interruptions,
    ),
    Mutant(
        "finished batches are done again",
        EVALUATE,
        "left = _without(rows, before)",
        "left = list(rows)",
        test_journal.test_a_kill_at_any_byte_of_the_journal_resumes_to_the_same_result,
    ),
    Mutant(
        "finished batches are skipped, and what they broke is forgotten",
        EVALUATE,
        "    yield from before\n",
        "",
        test_journal.test_a_kill_at_any_byte_of_the_journal_resumes_to_the_same_result,
    ),
    Mutant(
        "the journal replays another attack's batches",
        JOURNAL,
        "takewhile(lambda done: done.attack == attack,",
        "takewhile(lambda done: True,",
        test_journal.test_a_kill_at_any_byte_of_the_journal_resumes_to_the_same_result,
    ),
    Mutant(
        "a line cut by the kill is kept",
        JOURNAL,
        'there[: there.rfind(b"\\n") + 1]',
        "there",
        test_journal.test_a_kill_at_any_byte_of_the_journal_resumes_to_the_same_result,
    ),
    Mutant(
        "new lines are written behind the cut one",
        JOURNAL,
        "journal.file.truncate(len(whole))",
        "pass",
        test_journal.test_a_kill_at_any_byte_of_the_journal_resumes_to_the_same_result,
    ),
    Mutant(
        "lines stay in memory until the end",
        JOURNAL,
        "    file.flush()\n",
        "",
        test_journal.test_jobs_may_come_back_in_any_order_and_be_killed_in_it,
    ),
    Mutant("any journal will do", JOURNAL, "    if different:", "    if False:", another),
    Mutant(
        "a journal that cannot be true is believed",
        JOURNAL,
        "if len(set(met)) < len(met) or",
        "if False and",
        partial(
            test_journal.test_a_journal_that_cannot_be_true_is_refused,
            change=lambda lines: [*lines[:8], lines[7], *lines[8:]],
        ),
    ),
]


def source(module: types.ModuleType) -> str:
    return Path(module.__file__).read_text()


def built(name: str, text: str, monkeypatch) -> types.ModuleType:
    """A module of that name from its source, in the place of the real one for as long as the test runs."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(text, f"<mutant of {name}>", "exec"), vars(module))
    return module


def put_in_place(mutant: Mutant | None, monkeypatch) -> None:
    """Every test of this file's tests then meets the mutant; without one, an unchanged copy."""
    texts = {module: source(module) for module in (JOURNAL, EVALUATE)}
    if mutant is not None:
        assert texts[mutant.module].count(mutant.old) == 1, "the mutant has lost its place in the source"
        texts[mutant.module] = texts[mutant.module].replace(mutant.old, mutant.new)
    copies = {module: built(module.__name__, text, monkeypatch) for module, text in texts.items()}
    for tests in (test_evaluate, test_journal, killed):
        for name, value in vars(tests).items():
            if getattr(value, "__module__", None) == EVALUATE.__name__:
                monkeypatch.setattr(tests, name, getattr(copies[EVALUATE], name))
    measure = partial(copies[EVALUATE].evaluate, **test_evaluate.measure.keywords)
    monkeypatch.setattr(test_evaluate, "measure", measure)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("journal") / "whole.partial"
    found = killed.measured(oracle.linear(), path)
    return path.read_bytes(), found


def noticed(test: Callable[..., None], **fixtures: object) -> str:
    """What the test complains about; empty when it passes."""
    inner = test.func if isinstance(test, partial) else test
    wanted = inner.__code__.co_varnames[: inner.__code__.co_argcount]
    try:
        test(**{name: value for name, value in fixtures.items() if name in wanted})
    except (Exception, pytest.fail.Exception, AssertionError) as error:
        return repr(error)
    return ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mistake)
def test_the_mistake_is_noticed(mutant, monkeypatch, whole, tmp_path):
    put_in_place(mutant, monkeypatch)
    assert noticed(mutant.noticed_by, whole=whole, tmp_path=tmp_path)


@pytest.mark.parametrize("test", {id(mutant.noticed_by): mutant.noticed_by for mutant in MUTANTS}.values())
def test_without_a_mistake_nothing_is_noticed(test, monkeypatch, whole, tmp_path):
    put_in_place(None, monkeypatch)
    assert noticed(test, whole=whole, tmp_path=tmp_path) == ""


def test_the_mean_over_attacks_is_no_worst_case(monkeypatch):
    def mean(one: Evaluation) -> Interval:
        left = [one.n - one.broken_by.count(run.name) for run in one.attacks]
        return Interval(sum(left) // len(left), one.n)

    monkeypatch.setattr(Evaluation, "robust", property(mean))
    assert noticed(test_results.test_totals_follow_from_the_record_example_by_example)


def test_an_evaluation_is_not_hidden_by_an_error_of_the_harness():
    """`noticed` would take a typing mistake for a success: the errors that it may see are these."""
    assert noticed(lambda: None) == ""
    with pytest.raises(RobustkitError):
        test_evaluate.measure(oracle.linear(), oracle.linear_data(oracle.linear()), BALL, {})
