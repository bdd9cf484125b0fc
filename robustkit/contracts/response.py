"""The contract of responding to incidents: decisions, their order and their timing, each on a replayed hour and a half.

A responder is asked once a minute. What it sees follows from the recording and from what it did before; the
judge plays its decisions against the recording again, and alone knows who attacked, when, and how. A case holds one
recording of each family that may attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from robustkit.contracts.base import Array, Arrays, Contract, Finding
from robustkit.device import seeded
from robustkit.results import Interval

MINUTES, ACCOUNTS = 100, 24
TRIAGE, TRAINING, LONGEST_BRIDGE = 3, 15, 15  # minutes: until a result, until a candidate, of an ensemble
IN_TIME, SOON, CANARY = 6, 10, 10  # minutes to contain; to bridge; of a canary before it is promoted
FAMILIES = ("Linf", "L2", "rotation-translation", "patch")
CAUSES = ("novel family", "overfitted")
TRAINED = ("Linf",)  # what the champion was trained against
ATTACKING = ("Linf", "rotation-translation", "patch")  # the family of each recording of a case
EARLIER = 0b0011  # candidate 1 is there before the incident: the set of Linf and L2
BARS = ("clean", "worst", "held out", "adaptive")
AUDITED = 60  # answers that people check, each minute

ACTIONS = (
    *("suspect", "stand down", "contain", "snapshot", "throttle", "triage", "diagnose"),
    *("bridge", "retrain", "canary", "promote", "roll back", "close"),
)
_AUDITS = ("champion", "fallback", "ensemble", "good", "bad")
_STATES = {"suspect": "normal", "stand down": "suspect", "bridge": "contain", "canary": "contain"}
_STATES |= {"promote": "recover", "roll back": "recover", "close": "review"}


class Candidate(NamedTuple):
    """A retrained model: its number, what it was trained against, and the gate: bar -> (interval, floor)."""

    number: int
    families: tuple[str, ...]
    bars: dict[str, tuple[Interval, float]]


class Diagnosis(NamedTuple):
    """What triage says of the snapshot: the leading family, how many attacks are of it, how many lie outside the
    trained threat models; None where there is nothing to say.
    """

    family: str
    votes: Interval | None
    outside: Interval | None


class Report(NamedTuple):
    """What the responder sees in one minute.

    `audit` is the share of answers that people found right, of those checked in this minute; `flagged` maps
    each account to its flagged queries in this minute; `triage` is the latest result, None before the first;
    `candidates` are finished, in order; `bridge` minutes are left of the ensemble; `refused` says which actions
    of the minute before were not possible, and why.
    """

    minute: int
    state: str
    serving: str
    audit: Interval
    flagged: dict[str, int]
    triage: Diagnosis | None
    candidates: tuple[Candidate, ...]
    bridge: int
    refused: tuple[str, ...]


# --- the recording -----------------------------------------------------------------------------------


def draw(seed: int) -> Arrays:
    """A recorded incident of each family, as arrays numbered by the family's place in ATTACKING."""
    return {
        f"{name}_{i}": array
        for i, family in enumerate(ATTACKING)
        for name, array in recording(seed, family).items()
    }


def recordings(case: Arrays) -> list[Arrays]:
    return [
        {name.removesuffix(f"_{i}"): array for name, array in case.items() if name.endswith(f"_{i}")}
        for i in range(len(ATTACKING))
    ]


def recording(seed: int, leading: str) -> Arrays:
    """One incident: a user who retries a photo early on, then an attack by this family.

    An attack of the trained family that works says that the training was overfitted; any other is novel.
    """
    generator = np.random.default_rng(seeded(seed, f"incident {leading}").initial_seed() % 2**32)
    onset, burst = int(generator.integers(22, 31)), int(generator.integers(6, 12))
    order = generator.permutation(ACCOUNTS)
    attackers, retrying, heavy = order[:5], order[5], order[6]
    flagged = generator.poisson(0.05, (MINUTES, ACCOUNTS))
    flagged[:, heavy] += 2  # false alarms of one heavy user, all day long
    flagged[burst : burst + 5, retrying] += generator.integers(10, 15, 5)
    flagged[onset:, attackers] += generator.integers(5, 11, (MINUTES - onset, len(attackers)))
    rates = np.full((MINUTES, len(_AUDITS)), 0.97)
    rates[onset:] = (0.62, 0.86, 0.92, 0.96, 0.72)
    audits = generator.binomial(AUDITED, rates)
    family = FAMILIES.index(leading)
    held = np.maximum(np.arange(MINUTES) - onset + 1, 0)
    attacks = np.minimum(2 * held, 40)
    # The votes are settled by minute 6 of the attack, what lies outside appears so before, is in doubt at that
    # time, and stays settled from minute 9: who looks at one of the two, or at estimates, decides too early.
    novel = leading not in TRAINED
    share_of_votes = np.where(held < 6, 0.6, 0.9)
    share_beyond = np.where(held < 6, novel, np.where(held < 9, 0.5, 0.85 if novel else 0.15))
    return {
        "flagged": flagged,
        "audits": audits,
        "attacks": attacks,
        "votes": (share_of_votes * attacks).round().astype(np.int64),
        "beyond": (share_beyond * attacks).round().astype(np.int64),
        "leading": np.int64(family),
        "gates": _gates(family, generator),
        "onset": np.int64(onset),
        "attackers": np.isin(np.arange(ACCOUNTS), attackers),
    }


_FLOORS = (0.95, 0.55, 0.5, 0.5)


def _gates(family: int, generator: np.random.Generator) -> Array:
    """For each set of families k of 400 at each bar; -1 where no family is left to hold out. Shapes: -> (16, 4)."""
    rows = np.zeros((2 ** len(FAMILIES), len(BARS)), dtype=np.int64)
    for number in range(len(rows)):
        chosen = [bool(number >> bit & 1) for bit in range(len(FAMILIES))]
        # The earlier candidate was attacked by what was known when it was trained.
        old_and_new = number == EARLIER or (chosen[0] and chosen[family])
        shares = (
            0.985,
            0.68 if old_and_new else 0.05,
            0.6 if sum(chosen) >= 3 else 0.52,  # 0.52 looks like enough, and its interval does not
            0.62 if old_and_new else 0.04,
        )
        rows[number] = [round(400 * share) + int(generator.integers(-3, 4)) for share in shares]
        rows[number, 0] = min(rows[number, 0], 400)
        if all(chosen):
            rows[number, 2] = -1
    return rows


# --- the replay --------------------------------------------------------------------------------------


@dataclass
class Replay:
    """The service as a responder meets it: the recording, and what follows from the decisions so far."""

    case: Arrays
    state: str = "normal"
    bridge_until: int = 0
    serving_candidate: int = 0
    snapshot: int = -1  # minutes of the snapshot, of the one in triage, of the one whose triage is known
    in_triage: int = -1
    triaged: int = -1
    triage_due: int = -1
    retrain_due: int = -1
    training: int = 0
    candidates: list[int] = field(default_factory=lambda: [EARLIER])  # sets of families, by number from 1
    refused: tuple[str, ...] = ()

    def tick(self, minute: int) -> Report:
        """What becomes known at the beginning of a minute."""
        if self.triage_due == minute:
            self.triaged = self.in_triage
        if self.retrain_due == minute:
            self.candidates.append(self.training)
        return Report(
            minute,
            self.state,
            self.serving(minute),
            Interval(int(self.case["audits"][minute, self._audit(minute)]), AUDITED),
            {f"account-{i:02d}": int(k) for i, k in enumerate(self.case["flagged"][minute]) if k},
            None if self.triaged < 0 else self._diagnosis(),
            tuple(self.candidate(number) for number in range(1, len(self.candidates) + 1)),
            max(self.bridge_until - minute, 0) if self.state == "contain" else 0,
            self.refused,
        )

    def serving(self, minute: int) -> str:
        if self.state == "contain":
            return "ensemble" if minute < self.bridge_until else "fallback"
        return "canary" if self.state == "recover" else "champion"

    def _audit(self, minute: int) -> int:
        if self.serving_candidate:
            return _AUDITS.index("good" if self.passes(self.serving_candidate) else "bad")
        return _AUDITS.index(self.serving(minute))

    def _diagnosis(self) -> Diagnosis:
        n = int(self.case["attacks"][self.triaged])
        if n == 0:
            return Diagnosis("unrelated", None, None)
        votes, beyond = int(self.case["votes"][self.triaged]), int(self.case["beyond"][self.triaged])
        return Diagnosis(FAMILIES[int(self.case["leading"])], Interval(votes, n), Interval(beyond, n))

    def candidate(self, number: int) -> Candidate:
        chosen = self.candidates[number - 1]
        families = tuple(name for bit, name in enumerate(FAMILIES) if chosen >> bit & 1)
        shares = zip(BARS, self.case["gates"][chosen].tolist(), _FLOORS, strict=True)
        # Where nothing was held out, nothing was measured: a bar that nobody passes.
        bars = {bar: (Interval(max(k, 0), 400 if k >= 0 else 1), floor) for bar, k, floor in shares}
        return Candidate(number, families, bars)

    def passes(self, number: int) -> bool:
        return all(share.low >= floor for share, floor in self.candidate(number).bars.values())

    def act(self, minute: int, action: str, argument: int) -> str | None:
        """Carry out a decision, or say why not."""
        needed = _STATES.get(action)
        if action == "contain" and self.state not in ("suspect", "review"):
            return f"contain: the incident is in {self.state}; suspect first"
        if needed is not None and self.state != needed:
            return f"{action}: the incident is in {self.state}, not in {needed}"
        if action in ("canary", "promote") and not 1 <= argument <= len(self.candidates):
            return f"{action}: there is no candidate {argument}"
        if action == "promote" and argument != self.serving_candidate:
            return f"promote: candidate {argument} is not the canary"
        if action == "bridge" and not 1 <= argument <= LONGEST_BRIDGE:
            return f"bridge: an ensemble answers for 1 to {LONGEST_BRIDGE} minutes"
        if action == "triage" and self.snapshot < 0:
            return "triage: there is no snapshot to look at"
        if action == "triage" and self.triage_due > minute:
            return "triage: one is going on"
        if action == "retrain" and (self.retrain_due > minute or not 0 < argument < 2 ** len(FAMILIES)):
            return "retrain: one is going on, or no family was named"
        moves = {"suspect": "suspect", "stand down": "normal", "contain": "contain", "canary": "recover"}
        moves |= {"promote": "review", "roll back": "contain", "close": "normal"}
        self.state = moves.get(action, self.state)
        if action in ("contain", "roll back"):
            self.bridge_until, self.serving_candidate = 0, 0
        elif action == "bridge":
            self.bridge_until = minute + argument
        elif action == "snapshot":
            self.snapshot = minute
        elif action == "triage":
            self.triage_due, self.in_triage = minute + TRIAGE, self.snapshot
        elif action == "retrain":
            self.retrain_due, self.training = minute + TRAINING, argument
        elif action == "canary":
            self.serving_candidate = argument
        return None


def encoded(action: Any) -> tuple[int, int]:
    """A decision as two numbers; (-1, 0) for what is none."""
    try:
        name, *arguments = action
        if name == "throttle":
            value = int(str(arguments[0]).removeprefix("account-"))
        elif name == "diagnose":
            value = FAMILIES.index(arguments[0]) * len(CAUSES) + CAUSES.index(arguments[1])
        elif name == "retrain":
            value = sum(1 << FAMILIES.index(family) for family in set(arguments[0]))
        else:
            value = int(arguments[0]) if arguments else 0
        return ACTIONS.index(name), value
    except (TypeError, ValueError, IndexError):
        return -1, 0


def replayed(case: Arrays, respond: Any) -> Array:
    """A responder's decisions on one recording, as rows (minute, action, argument). Shapes: -> int64 (n, 3)."""
    replay, rows = Replay(case), []
    memory: dict[Any, Any] = {}
    for minute in range(MINUTES):
        report = replay.tick(minute)
        refused = []
        for action in list(respond(report, memory) or ())[:100]:
            code, argument = encoded(action)
            if code < 0:
                refused.append(f"{action!r:.60} is no action; they are {', '.join(ACTIONS)}")
                continue
            rows.append((minute, code, argument))
            if (why := replay.act(minute, ACTIONS[code], argument)) is not None:
                refused.append(why)
        replay.refused = tuple(refused)
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def observe(respond: Any, case: Arrays) -> Arrays:
    return {f"decisions_{i}": replayed(one, respond) for i, one in enumerate(recordings(case))}


# --- judging -----------------------------------------------------------------------------------------


@dataclass
class Course:
    """What happened, in the judge's own replay of the decisions: minutes of what was carried out."""

    moves: list[tuple[int, str, int]] = field(default_factory=list)
    known: list[bool] = field(default_factory=list)  # for each: whether triage had settled the family by then
    stops: list[int] = field(default_factory=list)  # minutes in containment without an ensemble
    passed: dict[int, bool] = field(default_factory=dict)
    families: dict[int, set[str]] = field(default_factory=dict)

    def of(self, *names: str) -> list[tuple[int, int]]:
        return [(minute, argument) for minute, name, argument in self.moves if name in names]


def course(case: Arrays, decisions: Sequence[Sequence[int]]) -> Course:
    replay, told = Replay(case), Course()
    for minute in range(MINUTES):
        report = replay.tick(minute)
        for row_minute, code, argument in decisions:
            if row_minute != minute or not 0 <= code < len(ACTIONS):
                continue
            name = ACTIONS[code]
            if replay.act(minute, name, argument) is None:
                told.moves.append((minute, name, argument))
                votes = report.triage.votes if report.triage else None
                told.known.append(votes is not None and votes.low > 0.5)
        if replay.state == "contain" and minute >= replay.bridge_until:
            told.stops.append(minute)
    for number in range(1, len(replay.candidates) + 1):
        told.passed[number] = replay.passes(number)
        told.families[number] = set(replay.candidate(number).families)
    return told


def judge(case: Arrays, evidence: Arrays) -> list[Finding]:
    found: dict[str, Finding] = {}
    for i, one in enumerate(recordings(case)):
        decisions = evidence[f"decisions_{i}"]
        if decisions.ndim != 2 or decisions.shape[1] != 3 or len(decisions) > 100 * MINUTES:
            raise ValueError("one row of three numbers for each decision")
        for finding in judge_recording(one, decisions.astype(np.int64)):
            told = replace(finding, hint=f"{finding.hint} (the incident by {ATTACKING[i]})")
            found.setdefault(finding.criterion, told)
    return list(found.values())


def judge_recording(case: Arrays, decisions: Array) -> list[Finding]:
    onset, told = int(case["onset"]), course(case, decisions.tolist())
    contained = [minute for minute, _ in told.of("contain")]
    answered = next((minute for minute in contained if minute >= onset), None)
    judged = (
        ("isolate", _isolate(contained, onset)),
        ("evidence", _evidence(told, onset, answered)),
        ("proportion", _proportion(case, told, onset)),
        ("cause", _cause(case, told)),
        ("bridge", _bridge(told, answered)),
        ("mix", _mix(case, told)),
        ("gate", _gate(told)),
        ("order", _order(told)),
    )
    return [Finding(criterion, *lost) for criterion, lost in judged if lost]


_Lost = tuple[str, str] | None


def _isolate(contained: list[int], onset: int) -> _Lost:
    if not contained:
        return "NEVER_CONTAINED", "people were finding wrong answers for the rest of the recording"
    if contained[0] < onset:
        return (
            "FALSE_ALARM",
            f"minute {contained[0]}: many flags of one account, and the answers were still right",
        )
    if contained[0] > onset + IN_TIME:
        return "TOO_LATE", f"minute {contained[0]} is more than {IN_TIME} after the answers began to go wrong"
    return None


def _evidence(told: Course, onset: int, answered: int | None) -> _Lost:
    taken = [minute for minute, _ in told.of("snapshot")]
    if not any(minute >= onset for minute in taken):
        return "NO_EVIDENCE", "no snapshot holds anything of the attack"
    if answered is None or not any(onset <= minute <= answered + 2 for minute in taken):
        return "EVIDENCE_TOO_LATE", "what was in memory at the containment was not kept"
    return None


def _proportion(case: Arrays, told: Course, onset: int) -> _Lost:
    guilty = set(np.flatnonzero(case["attackers"]).tolist())
    throttled = {account for _, account in told.of("throttle")}
    if len(throttled - guilty) > 1:
        return "BENIGN_BLOCKED", f"{len(throttled - guilty)} accounts that attacked nobody were throttled"
    early = {account for minute, account in told.of("throttle") if minute <= onset + IN_TIME + SOON}
    if len(early & guilty) < 0.8 * len(guilty):
        return "ATTACKERS_LEFT", f"{len(early & guilty)} of {len(guilty)} attackers were throttled in time"
    return None


def _cause(case: Arrays, told: Course) -> _Lost:
    named = [
        (argument, known)
        for (_, name, argument), known in zip(told.moves, told.known, strict=True)
        if name == "diagnose"
    ]
    if not named:
        return "NOT_NAMED", "the incident was never given a cause"
    family = int(case["leading"])
    right = family * len(CAUSES) + CAUSES.index("overfitted" if family == 0 else "novel family")
    if named[-1][0] != right:
        return "WRONG_CAUSE", "the quarantine speaks for another family or another cause"
    if not named[-1][1]:
        return "CAUSE_GUESSED", "named before the votes of a triage, at the lower end, were most of them"
    return None


def _bridge(told: Course, answered: int | None) -> _Lost:
    bridges = [minute for minute, _ in told.of("bridge") if answered is not None and minute >= answered]
    if not bridges or bridges[0] > (answered or 0) + SOON:
        return "NO_BRIDGE", f"{SOON} minutes after the containment the fallback answered alone"
    gaps = [minute for minute in told.stops if minute >= bridges[0]]
    if gaps:
        return "BRIDGE_ENDED", f"the ensemble ended before a canary took over: minute {gaps[0]}"
    return None


def _mix(case: Arrays, told: Course) -> _Lost:
    promoted = told.of("promote")
    if not promoted:
        return "NOT_PROMOTED", "nothing better than the champion went into service"
    families = told.families[promoted[-1][1]]
    if not families.issuperset({*TRAINED, FAMILIES[int(case["leading"])]}):
        return (
            "FAMILY_LEFT_OUT",
            "what attacked today, or what was withstood yesterday, was not trained against",
        )
    if len(families) < 3:
        return "NOT_DIVERSE", "the next family will be new again"
    return None


def _gate(told: Course) -> _Lost:
    if not told.of("promote"):
        return "NOT_PROMOTED", "no candidate went through the gate"
    failed = [number for _, number in told.of("canary", "promote") if not told.passed[number]]
    if failed:
        return "FAILED_BAR_SERVED", f"candidate {failed[0]} met users and had not passed every bar"
    return None


def _order(told: Course) -> _Lost:
    diagnosed, retrained, promoted = (told.of(name) for name in ("diagnose", "retrain", "promote"))
    if retrained and (not diagnosed or retrained[0][0] < diagnosed[0][0]):
        return "RETRAINED_FIRST", "trained before it was known against what"
    if not promoted or not told.of("close"):
        return "NOT_CLOSED", "an incident ends with a model in service, and with its review"
    canary = max(minute for minute, _ in told.of("canary"))
    if promoted[-1][0] - canary < CANARY:
        return "CANARY_TOO_SHORT", f"{promoted[-1][0] - canary} minutes of canary; {CANARY} show something"
    return None


RESPONSE = Contract(
    ("isolate", "evidence", "proportion", "cause", "bridge", "mix", "gate", "order"),
    draw,
    observe,
    judge,
    hidden=tuple(f"{name}_{i}" for name in ("onset", "attackers") for i in range(len(ATTACKING))),
)
