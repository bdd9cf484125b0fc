"""Mutants of solutions, and the command that grades them: what is made, what shares a submission, what survives."""

from __future__ import annotations

import dataclasses

import pytest

from grading import mutate, notebooks
from grading.mutants import BEGIN, END, Mutant, equivalent, mutants
from grading.workspace import repository
from robustkit.contracts import CONTRACTS
from robustkit.errors import RobustkitError
from robustkit.lessons import LESSONS

WORKSPACE = repository()
FIRST, SECOND = LESSONS["00-start-here"], LESSONS["01-mnist-fgsm"]

CELL = f"""\
LIMIT = 3
def f(model, x, eps):
    {BEGIN}
    with attackable(model):
        low = x.detach() - eps
    if low > 0 and eps == 2:
        low = low.sum(1, keepdim=True)
    return g(low, -eps), "a"
    {END}
"""


@pytest.fixture(scope="module", autouse=True)
def smoke_tier():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUSTKIT_TIER", "smoke")
        yield


def solution_of(lesson):
    return notebooks.read_release(WORKSPACE.source(lesson.id))


# --- operators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "line"),
    [
        ("context", "if True:"),
        ("no detach", "low = x - eps"),
        ("arithmetic", "low = x.detach() + eps"),
        ("dropped", "pass"),
        ("branch", "if not (low > 0 and eps == 2):"),
        ("boolean", "if low > 0 or eps == 2:"),
        ("comparison", "if low >= 0 and eps == 2:"),
        ("comparison", "if low < 0 and eps == 2:"),
        ("comparison", "if low > 0 and eps != 2:"),
        ("constant", "if low > 1 and eps == 2:"),
        ("constant", "if low > 0 and eps == 1:"),
        ("no sum", "low = low"),
        ("constant", "low = low.sum(0, keepdim=True)"),
        ("no keepdim", "low = low.sum(1)"),
        ("constant", "low = low.sum(1, keepdim=False)"),
        ("twin", "low = low.mean(1, keepdim=True)"),
        ("sign", 'return g(low, eps), "a"'),
        ("swapped", 'return g(-eps, low), "a"'),
        ("swapped", 'return "a", g(low, -eps)'),
        ("constant", 'return g(low, -eps), "?"'),
        ("dropped", "return"),
    ],
)
def test_an_operator_changes_one_line(operator, line):
    assert any(m.operator == operator and f"+ {line}" in m.diff.splitlines() for m in mutants("e", CELL))


def test_mutants_differ_compile_and_keep_to_the_solution():
    found = mutants("e", CELL)
    assert len({m.diff for m in found}) == len({m.source for m in found}) == len(found)
    for m in found:
        compile(m.source, m.diff, "exec")
        assert m.source.startswith("LIMIT = 3\ndef f(model, x, eps):\n")
        assert f"{BEGIN}\n" in m.source


def test_range_is_off_by_one_on_both_sides():
    lines = "\n".join(m.diff for m in mutants("e", f"{BEGIN}\nfor i in range(n):\n    f(i)\n{END}\n"))
    assert "+ for i in range(n + 1):" in lines
    assert "+ for i in range(n - 1):" in lines


def test_every_equivalent_mutant_is_a_mutant_and_has_its_reason():
    generated = {
        (exercise.id, mutant.diff)
        for lesson in LESSONS.values()
        if WORKSPACE.source(lesson.id).exists()
        for exercise in lesson.exercises
        for mutant in mutants(exercise.id, mutate._source(solution_of(lesson), exercise))
    }
    reviewed = equivalent()
    assert reviewed.keys() <= generated, reviewed.keys() - generated
    assert all(len(reason.split()) >= 6 for reason in reviewed.values())


# --- submissions -------------------------------------------------------------------------------------


def reference_of(lesson, *names):
    return mutate.references(solution_of(lesson), lesson, set(names))


def test_a_submission_holds_what_its_exercise_needs_and_no_more():
    source = str(mutate.submission(solution_of(SECOND), SECOND, reference_of(SECOND, "s1_rs_fgsm_check")))
    assert "def rs_fgsm(" in source
    assert "TIER = tier()" in source
    for other in ("def pgd(", "train(clean_model", "plt.subplots"):
        assert other not in source


def test_an_exercise_that_stands_on_a_mutated_one_gets_its_reference():
    batch = reference_of(SECOND, "s1_fgsm_check", "s1_loss_check")
    wrong = dataclasses.replace(batch["s1_fgsm_check"], source="def fgsm(*a): return None")
    handed_in = mutate.submission(solution_of(SECOND), SECOND, batch | {"s1_fgsm_check": wrong})
    sources = [cell.source for cell in handed_in.cells]
    at = sources.index(wrong.source)
    assert sources[at + 1] == 'check("s1_fgsm_check", fgsm)'
    assert sources[at + 2] == batch["s1_fgsm_check"].source
    assert any("def fgsm_loss" in source for source in sources[at + 3 :])


def test_a_stand_in_takes_the_place_of_what_takes_minutes():
    source = str(mutate.submission(solution_of(SECOND), SECOND, reference_of(SECOND, "s1_statement_check")))
    assert "take(range(50))" in source
    assert "robust_model" not in source


def test_batches_hold_one_mutant_of_each_exercise():
    def one(exercise, diff):
        return Mutant(exercise, "constant", "", diff)

    todo = [one("a", "1"), one("a", "2"), one("b", "3"), one("a", "4"), one("b", "5")]
    batches = mutate._batches(todo)
    assert [sorted(m.diff for m in batch.values()) for batch in batches] == [["1", "3"], ["2", "5"], ["4"]]


def test_a_sample_takes_the_exercises_in_turn_and_follows_its_seed():
    found = [[Mutant(name, "", "", f"{name}{i}") for i in range(9)] for name in "abc"]
    first = mutate._sampled(found, 6, 0)
    assert sorted(m.exercise for m in first) == list("aabbcc")
    assert first == mutate._sampled(found, 6, 0) != mutate._sampled(found, 6, 1)


# --- the whole path ----------------------------------------------------------------------------------


def test_a_sample_of_lesson_0_is_killed_alone_and_together_and_not_graded_twice(tmp_path, monkeypatch):
    """What `make mutate` does for every mutant; and that mutants which share a submission do not disturb each other."""
    journal = tmp_path / "journal.jsonl"
    verdicts = mutate.mutate(WORKSPACE, FIRST, journal, sample=6, seed=0)
    assert len(verdicts) == 6
    assert all(verdict.killed for verdict in verdicts), mutate.report(verdicts, FIRST)
    assert (
        str(mutate.kills(verdicts, "all"))
        == "all: 100.0 % [61.0, 100.0] (n=6) killed, 0 survived, 0 equivalent"
    )
    sources = {
        m.diff: m
        for exercise in FIRST.exercises
        for m in mutants(exercise.id, mutate._source(solution_of(FIRST), exercise))
    }
    together = verdicts[1]
    alone = mutate.grade_batch(WORKSPACE, FIRST, {together.exercise: sources[together.diff]}, sandbox="auto")
    assert alone == [together]

    def never(*arguments, **options):
        raise AssertionError("graded twice")

    monkeypatch.setattr(mutate, "grade_batch", never)
    with journal.open("a") as file:
        file.write('{"exercise": "s0_dist')  # a line that a kill cut short
    assert mutate.mutate(WORKSPACE, FIRST, journal, sample=6, seed=0) == verdicts


def test_a_check_that_sees_nothing_is_seen(monkeypatch):
    """The wrong grader: a judge without findings lets every mutant live; report and table show it as a diff."""
    blind = dataclasses.replace(CONTRACTS["distance"], judge=lambda case, evidence: [])
    monkeypatch.setitem(CONTRACTS, "distance", blind)
    exercise = FIRST.exercise("s0_distance_check")
    mutant = next(
        m for m in mutants(exercise.id, mutate._source(solution_of(FIRST), exercise)) if m.operator == "twin"
    )
    verdicts = mutate.grade_batch(WORKSPACE, FIRST, {exercise.id: mutant}, sandbox="auto")
    assert [verdict.survived for verdict in verdicts] == [True]
    lines = mutate.report(verdicts, FIRST)
    assert lines[0].startswith("Distances: 0.0 %")
    assert "amin(1)" in lines[-1]
    page = mutate.table([(FIRST, verdicts)])
    assert "| 00-start-here | Distances | 0.0 % [0.0, 79.3] (n=1) | 1 | 0 |" in page
    assert f"```diff\n{mutant.diff.strip()}\n```" in page


def test_a_reference_that_loses_points_is_told_first():
    lost = mutate.Verdict("s0_distance_check", "reference", "", 1.0, 2.0, ("WRONG_DISTANCE",))
    with pytest.raises(RobustkitError, match="the reference solution of s0_distance_check earns 1 of 2"):
        mutate._check_reference([lost], "auto")


def test_a_mutant_with_a_reason_is_counted_apart_unless_it_loses_points():
    lives = mutate.Verdict("e", "constant", "d", 2.0, 2.0, ())
    assert mutate._with_reason(lives, "no mistake").survived is False
    assert mutate.kills([lives, mutate._with_reason(lives, "no mistake")], "all") == mutate.Kills(
        "all", 0, 1, 1
    )
    dies = dataclasses.replace(lives, points=1.0)
    assert mutate._with_reason(dies, "no mistake").reason == ""
