"""Lesson 7: the replay ranks responders as it must; its cases tell mistakes apart; the notebook through the judge."""

from __future__ import annotations

import itertools

import nbformat
import numpy as np
import pytest

from grading.workspace import repository
from robustkit.contracts import CONTRACTS, examine, response
from robustkit.lessons import LESSONS, award
from robustkit.results import Interval
from robustkit.serve import incident
from tests import judged, responders

LESSON = LESSONS["07-incident"]
SEEDS = range(12)


def points(respond, seed):
    findings = examine(CONTRACTS["response"], respond, seed)
    return sum(award(LESSON.exercise("s7_respond_check"), findings).values())


@pytest.mark.parametrize("seed", SEEDS)
def test_responders_rank_as_they_must(seed):
    """Perfect, retrains first, blocks everyone, panics, ignores: in this order, on every incident."""
    scores = [points(respond, seed) for respond in responders.RANKED]
    assert scores[0] == 16
    assert all(better > worse for better, worse in itertools.pairwise(scores)), scores
    assert scores[-1] == 0


def test_incidents_differ_in_what_matters():
    drawn = [response.recordings(response.draw(seed)) for seed in range(40)]
    for recorded in drawn:
        assert [response.FAMILIES[int(one["leading"])] for one in recorded] == list(response.ATTACKING)
    cases = [one for recorded in drawn for one in recorded]
    assert len({int(case["onset"]) for case in cases}) > 5
    assert len({tuple(np.flatnonzero(case["attackers"])) for case in cases}) > 30
    for case in cases:
        onset, guilty = int(case["onset"]), case["attackers"]
        audits = [[Interval(int(k), response.AUDITED) for k in row] for row in case["audits"]]
        # What a sound decision rests on is there: never a minute of wrong answers before, and at once after.
        assert all(row[0].high > 0.9 for row in audits[:onset])
        assert any(row[0].high < 0.9 for row in audits[onset : onset + 2])
        assert case["flagged"][:onset].max() >= 10  # the user who retries is louder than any attacker
        assert case["flagged"][onset:, guilty].min() >= 5
        assert case["flagged"][onset:, ~guilty].max() < 5
        assert (
            case["flagged"][:onset, ~guilty].sum(0).max()
            > case["flagged"][onset : onset + 5, guilty].sum(0).max()
        )


def test_the_gate_of_a_replay_passes_three_families_with_the_old_and_the_new():
    for seed, leading in itertools.product(range(10), response.ATTACKING):
        case = response.recording(seed, leading)
        family, replay = int(case["leading"]), response.Replay(case)
        replay.candidates = list(range(1, 16))
        for number, chosen in enumerate(replay.candidates, 1):
            names = {name for bit, name in enumerate(response.FAMILIES) if chosen >> bit & 1}
            assert replay.passes(number) == (len(names) == 3 and {"Linf", response.FAMILIES[family]} <= names)


def test_the_replay_moves_as_the_incident_machine_does():
    """What the replay allows is what the service's machine allows."""
    moves = {
        "suspect": ("normal", "suspect"),
        "stand down": ("suspect", "normal"),
        "contain": ("suspect", "contain"),
        "canary": ("contain", "recover"),
        "roll back": ("recover", "contain"),
        "promote": ("recover", "review"),
        "close": ("review", "normal"),
    }
    legal = {(before.value, after.value) for before, to in incident.NEXT.items() for after in to}
    assert set(moves.values()) <= legal
    for action, state in itertools.product(moves, incident.State):
        replay = response.Replay(
            response.recording(0, "patch"), state=state.value, candidates=[7], serving_candidate=1
        )
        refused = replay.act(30, action, 1)
        wanted = (state.value, moves[action][1])
        assert (refused is None) == (
            moves[action][0] == state.value or (action == "contain" and wanted in legal and state == "review")
        )
        if refused:
            assert replay.state == state.value


def test_decisions_that_are_none_are_refused_and_told():
    told = []

    def odd(report, memory):
        told.extend(report.refused)
        return [
            ("dance",),
            ("throttle",),
            7,
            ("retrain", ["fog"]),
            ("promote", 1),
            ("bridge", 30),
            ("triage",),
        ]

    assert response.replayed(response.recording(0, "patch"), odd).shape[1] == 3
    assert any("('dance',) is no action" in one for one in told)
    assert any("bridge: the incident is in normal" in one for one in told)
    assert any("there is no snapshot" in one for one in told)


@pytest.mark.parametrize(
    "decisions", [np.zeros((3, 2)), np.zeros((20_000, 3)), np.full((1, 3), np.nan), np.array([[5, 99, 0]])]
)
def test_forged_decisions_earn_nothing(decisions):
    """Evidence is decisions alone: what they lead to, the judge plays again."""
    from robustkit.contracts import judge_safely

    contract = CONTRACTS["response"]
    case = contract.draw(1)
    forged = contract.observe(responders.perfect, case) | {"decisions_1": decisions}
    found = judge_safely(contract, case, forged)
    assert {finding.criterion for finding in found} == set(contract.criteria)


def test_the_attacker_is_not_in_the_case_that_the_kernel_sees():
    contract = CONTRACTS["response"]
    given = contract.given(contract.draw(0))
    assert not [name for name in given if name.startswith(("onset", "attackers"))]
    assert len([name for name in given if name.startswith("flagged")]) == 3


def solved(wrong):
    """The released notebook with the reference solutions, but for some; only what is judged is kept."""
    solution = nbformat.read(repository().source(LESSON.id), 4)
    answers = {
        cell.metadata["nbgrader"]["grade_id"]: cell.source
        for cell in solution.cells
        if cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("solution")
    }
    setup = next(cell for cell in solution.cells if "setup" in cell.metadata.get("tags", []))
    return judged.answered(LESSON.id, answers | wrong, setup.source)


WRONG = {
    "s7_residual": (
        "def residual(query, benign):\n"
        "    apart = np.abs(query.astype(float) - benign)\n"
        "    i = apart.sum((1, 2, 3)).argmin()\n"
        "    return i, (apart[i] > 0).any(2).mean(), np.sqrt((apart[i] ** 2).sum()), apart[i].max()\n",
        {"sizes": "GREY_LEVELS"},
    ),
    "s7_cause": (
        "def cause(votes, outside):\n    return 'novel family'\n",
        {"overfitted": "WRONG_CAUSE", "undecided": "DECIDED_BY_CHANCE"},
    ),
    "s7_respond": (
        "def respond(report, memory):\n"
        "    if report.audit.high < 0.9 and not memory:\n"
        "        memory['done'] = True\n"
        "        everyone = [('throttle', f'account-{i:02d}') for i in range(24)]\n"
        "        return [('suspect',), ('contain',), ('snapshot',), *everyone]\n",
        {
            **{"proportion": "BENIGN_BLOCKED", "cause": "NOT_NAMED", "bridge": "NO_BRIDGE"},
            **{"mix": "NOT_PROMOTED", "gate": "NOT_PROMOTED", "order": "NOT_CLOSED"},
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [{}, WRONG], ids=["reference", "wrong"])
def test_answers_through_sandbox_and_judge(tmp_path, wrong):
    """The reference gets full marks; wrong answers lose what they must, and are told why."""
    submission = solved({cell: source for cell, (source, _) in wrong.items()})
    lost = judged.lost(LESSON.id, submission, tmp_path)
    assert lost == {exercise: costs for exercise, (_, costs) in wrong.items()}


def cause_given(known, family):
    """Names what the recording will show, in the first minute in which triage says this much about it."""
    case = response.recording(5, family)
    cause = "overfitted" if family == "Linf" else "novel family"

    def respond(report, memory):
        votes = report.triage.votes if report.triage else None
        if report.minute > case["onset"] and known(votes) and not memory:
            memory["named"] = True
            return [("diagnose", family, cause)]
        return [("snapshot",), ("triage",)] if report.minute >= case["onset"] else []

    found = response.judge_recording(case, response.replayed(case, respond))
    return {finding.code for finding in found if finding.criterion == "cause"}


@pytest.mark.parametrize("family", response.ATTACKING)
def test_a_right_guess_is_a_guess_until_the_votes_carry_it(family):
    assert cause_given(lambda votes: True, family) == {"CAUSE_GUESSED"}
    assert cause_given(lambda votes: votes is not None and votes.low <= 0.5, family) == {"CAUSE_GUESSED"}
    assert cause_given(lambda votes: votes is not None and votes.low > 0.5, family) == set()
