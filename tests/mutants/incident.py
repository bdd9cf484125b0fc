"""Wrong answers of lesson 7: residuals, registration, families, causes, mixed training, the gate, the response."""

import numpy as np
import torch
import torch.nn.functional as F

from robustkit.results import Interval
from tests import alternatives, responders
from tests.mutants import declare, mutant

# --- residuals ---------------------------------------------------------------------------------------


def changed(**mistakes):
    """The reference with some of its four values replaced."""

    def residual(query, benign):
        names = ("nearest", "changed", "l2", "linf")
        found = dict(zip(names, alternatives.residual_in_numpy(query, benign), strict=True))
        found |= {name: make(query, benign[found["nearest"]], benign) for name, make in mistakes.items()}
        return tuple(found[name] for name in names)

    return residual


declare(
    "residual",
    "unsigned_bytes_wrap_around",
    changed(linf=lambda q, b, _: (q - b).max() / 255, l2=lambda q, b, _: np.linalg.norm((q - b) / 255)),
    sizes="BYTES_WRAPPED",
)
declare(
    "residual",
    "grey_levels",
    changed(
        linf=lambda q, b, _: np.abs(q.astype(int) - b).max(),
        l2=lambda q, b, _: np.linalg.norm((q.astype(float) - b).ravel()),
    ),
    sizes="GREY_LEVELS",
)
declare(
    "residual", "l1_for_l2", changed(l2=lambda q, b, _: np.abs(q / 255 - b / 255).sum()), sizes="WRONG_SIZE"
)
declare(
    "residual",
    "channels_counted",
    changed(changed=lambda q, b, _: (q != b).mean()),
    changed="CHANNELS_COUNTED",
)
declare(
    "residual",
    "count_for_share",
    changed(changed=lambda q, b, _: (q != b).any(2).sum()),
    changed="COUNT_NOT_SHARE",
)
declare(
    "residual",
    "share_of_large_changes",
    changed(changed=lambda q, b, _: (np.abs(q.astype(int) - b) > 25).any(2).mean()),
    changed="WRONG_SHARE",
)
declare("residual", "always_the_first", changed(nearest=lambda q, b, benign: 0), nearest="WRONG_NEAREST")

# --- registration ------------------------------------------------------------------------------------


def transformed(change):
    def register(query, reference, threat):
        return change(torch.tensor(alternatives.register_in_one_batch(query, reference, threat)))

    return register


declare(
    "register",
    "turns_the_query_back",
    transformed(lambda row: -row),
    turned="WRONG_WAY",
    untouched="NOT_COUNTED",
)
declare("register", "down_before_right", transformed(lambda row: row[[0, 2, 1]]), turned="SHIFTS_SWAPPED")
declare(
    "register",
    "angles_alone",
    transformed(lambda row: row * torch.tensor([1.0, 0, 0])),
    turned="WRONG_TRANSFORM",
)


@mutant("register", untouched="IDENTITY_MOVED")
def register_without_the_identity(query, reference, threat):
    lattice = threat.transforms()
    lattice = lattice[lattice.any(1)]
    turned = threat.transformed(reference.expand(len(lattice), *reference.shape), lattice)
    return lattice[(turned - query).flatten(1).norm(dim=1).argmin()].tolist()


# --- families ----------------------------------------------------------------------------------------


def seen_as(**values):
    return lambda m: alternatives.family_by_rules(m._replace(**values))


declare("family", "no_registration", seen_as(explained=0.0), spatial="SEARCH_NOT_PERTURBATION")
declare("family", "no_window", seen_as(window=1.0), patch="EXPLAINED_AND_MISSED")
declare("family", "no_bound", seen_as(bound=1.0), lp="EXPLAINED_AND_MISSED", sequence="EXPLAINED_AND_MISSED")
declare("family", "no_ratio", seen_as(ratio=0.1), restraint="FAMILY_GUESSED")
declare("family", "single_queries_alone", seen_as(queries=1), sequence="FAMILY_MISSED")
declare("family", "any_repetition_is_an_attack", seen_as(linf=0.5), restraint="FAMILY_MISSED")


@mutant("family", patch="SEARCH_NOT_PERTURBATION", spatial="SEARCH_NOT_PERTURBATION")
def family_by_counting_queries_first(m):
    return "query sequence" if m.queries >= 31 else alternatives.family_by_rules(m)


# --- causes ------------------------------------------------------------------------------------------


@mutant("cause", undecided="DECIDED_BY_CHANCE")
def cause_by_shares(votes, outside):
    if outside is None or votes.share <= 0.5:
        return "undecided"
    return "novel family" if outside.share > 0.5 else "overfitted"


@mutant("cause", novel="TOO_TIMID", overfitted="TOO_TIMID")
def cause_never_named(votes, outside):
    return "undecided"


@mutant("cause", overfitted="WRONG_CAUSE")
def cause_is_always_novel(votes, outside):
    named = alternatives.cause_by_both_ends(votes, outside)
    return "novel family" if named != "undecided" else named


@mutant("cause", undecided="DECIDED_BY_CHANCE")
def cause_without_the_votes(votes, outside):
    return alternatives.cause_by_both_ends(Interval(99, 100), outside)


# --- mixed training ----------------------------------------------------------------------------------


@mutant("mixed", shares="NO_CLEAN_SHARE")
def mixed_without_clean_images(model, x, y, attacks, generator):
    parts = torch.arange(len(x)).tensor_split(len(attacks))
    met = [attack(model, x[rows], y[rows], generator) for attack, rows in zip(attacks, parts, strict=True)]
    return F.cross_entropy(model(torch.cat(met)), y)


@mutant("mixed", shares="UNEVEN_SHARES")
def mixed_of_half_clean_images(model, x, y, attacks, generator):
    half = len(x) // 2
    parts = torch.arange(half, len(x)).tensor_split(len(attacks))
    met = [attack(model, x[rows], y[rows], generator) for attack, rows in zip(attacks, parts, strict=True)]
    return F.cross_entropy(model(torch.cat([x[:half], *met])), y)


@mutant("mixed", loss="MEAN_OF_MEANS")
def mixed_mean_of_means(model, x, y, attacks, generator):
    untouched, *parts = torch.arange(len(x)).tensor_split(len(attacks) + 1)
    losses = [F.cross_entropy(model(x[untouched]), y[untouched])]
    for attack, rows in zip(attacks, parts, strict=True):
        losses.append(F.cross_entropy(model(attack(model, x[rows], y[rows], generator)), y[rows]))
    return torch.stack(losses).mean()


@mutant("mixed", shares="NOT_ONCE", loss="NOT_ONCE")
def mixed_everything_meets_everything(model, x, y, attacks, generator):
    met = [x, *(attack(model, x, y, generator) for attack in attacks)]
    return F.cross_entropy(model(torch.cat(met)), y.repeat(len(met)))


@mutant("mixed", loss="WRONG_LOSS")
def mixed_labels_out_of_order(model, x, y, attacks, generator):
    untouched, *parts = torch.arange(len(x)).tensor_split(len(attacks) + 1)
    met = [attack(model, x[rows], y[rows], generator) for attack, rows in zip(attacks, parts, strict=True)]
    return F.cross_entropy(model(torch.cat([*met, x[untouched]])), y)


@mutant("mixed", loss="WRONG_GRADIENT")
def mixed_learns_from_clean_images_alone(model, x, y, attacks, generator):
    untouched, *parts = torch.arange(len(x)).tensor_split(len(attacks) + 1)
    met = [attack(model, x[rows], y[rows], generator) for attack, rows in zip(attacks, parts, strict=True)]
    logits = model(torch.cat([x[untouched], *met]))
    learnt = torch.arange(len(x))[:, None] < len(untouched)
    return F.cross_entropy(torch.where(learnt, logits, logits.detach()), y)


# --- the gate ----------------------------------------------------------------------------------------


def kept(clean, trained, held_out, adaptive, *, joint=True, alone=False):
    worst = np.logical_and.reduce(list(trained.values()))
    worst = worst if joint else min(trained.values(), key=np.sum)
    attacked = None if adaptive is None else adaptive if alone else worst & adaptive
    return {"clean": clean, "worst": worst, "held_out": held_out, "adaptive": attacked}


def failing(measured, floors, *, lower=True, closed=True):
    for bar, array in measured.items():
        if array is None:
            if closed:
                yield bar
            continue
        share = Interval(int(array.sum()), len(array))
        if (share.low if lower else share.share) < floors[bar]:
            yield bar


@mutant("incident_gate", everywhere="SHARE_NOT_LOWER_END")
def gate_by_shares(clean, trained, held_out, adaptive, floors):
    return list(failing(kept(clean, trained, held_out, adaptive), floors, lower=False))


@mutant("incident_gate", held_out="NOT_CLOSED", adaptive="NOT_CLOSED")
def gate_open_for_what_was_not_measured(clean, trained, held_out, adaptive, floors):
    return list(failing(kept(clean, trained, held_out, adaptive), floors, closed=False))


@mutant("incident_gate", worst="MINIMUM_OF_SHARES", adaptive="MINIMUM_OF_SHARES")
def gate_of_the_weakest_family(clean, trained, held_out, adaptive, floors):
    return list(failing(kept(clean, trained, held_out, adaptive, joint=False), floors))


@mutant("incident_gate", adaptive="ADAPTIVE_ALONE")
def gate_that_forgets_what_adapting_adds_to(clean, trained, held_out, adaptive, floors):
    return list(failing(kept(clean, trained, held_out, adaptive, alone=True), floors))


@mutant("incident_gate", worst="MINIMUM_OF_SHARES", adaptive="MINIMUM_OF_SHARES")
def gate_of_the_first_family(clean, trained, held_out, adaptive, floors):
    first = dict([next(iter(trained.items()))])
    return list(failing(kept(clean, first, held_out, adaptive), floors))


@mutant("incident_gate", everywhere="WRONG_VERDICT")
def gate_that_names_what_passed(clean, trained, held_out, adaptive, floors):
    measured = kept(clean, trained, held_out, adaptive)
    return [bar for bar in measured if bar not in set(failing(measured, floors))]


# --- the response ------------------------------------------------------------------------------------


def but(change):
    """The perfect responder, with its decisions changed on the way out."""

    def respond(report, memory):
        return [
            other for action in responders.perfect(report, memory) for other in change(action, report, memory)
        ]

    return respond


def without(name):
    return but(lambda action, report, memory: [] if action[0] == name else [action])


declare(
    "response",
    "retrains_first",
    responders.retrains_first,
    isolate="TOO_LATE",
    bridge="NO_BRIDGE",
    order="RETRAINED_FIRST",
)
declare(
    "response",
    "blocks_everyone",
    responders.blocks_everyone,
    **{"proportion": "BENIGN_BLOCKED", "cause": "NOT_NAMED", "bridge": "NO_BRIDGE"},
    **{"mix": "NOT_PROMOTED", "gate": "NOT_PROMOTED", "order": "NOT_CLOSED"},
)
declare(
    "response",
    "panicking",
    responders.panicking,
    **{"isolate": "FALSE_ALARM", "proportion": "BENIGN_BLOCKED", "cause": "NOT_NAMED", "bridge": "NO_BRIDGE"},
    **{"mix": "FAMILY_LEFT_OUT", "gate": "FAILED_BAR_SERVED", "order": "RETRAINED_FIRST"},
)
declare(
    "response",
    "ignoring",
    responders.ignoring,
    **{
        "isolate": "NEVER_CONTAINED",
        "evidence": "NO_EVIDENCE",
        "proportion": "ATTACKERS_LEFT",
        "cause": "NOT_NAMED",
    },
    **{"bridge": "NO_BRIDGE", "mix": "NOT_PROMOTED", "gate": "NOT_PROMOTED", "order": "NOT_CLOSED"},
)
declare("response", "no_bridge", without("bridge"), bridge="NO_BRIDGE")
declare(
    "response",
    "snapshot_at_leisure",
    but(
        lambda action, report, memory: (
            [] if action[0] == "snapshot" and report.minute <= memory["contained"] + 2 else [action]
        )
    ),
    evidence="EVIDENCE_TOO_LATE",
)
declare("response", "nobody_throttled", without("throttle"), proportion="ATTACKERS_LEFT")
declare("response", "never_closed", without("close"), order="NOT_CLOSED")
declare("response", "cause_kept_to_itself", without("diagnose"), cause="NOT_NAMED", order="RETRAINED_FIRST")
declare(
    "response",
    "ensemble_that_ends_early",
    but(
        lambda action, report, memory: (
            [("bridge", 10)] * (memory.setdefault("bridged", report.minute) == report.minute)
            if action[0] == "bridge"
            else [action]
        )
    ),
    bridge="BRIDGE_ENDED",
)
declare(
    "response",
    "throttles_whoever_was_flagged",
    but(
        lambda action, report, memory: (
            [("throttle", account) for account in report.flagged] if action[0] == "throttle" else [action]
        )
    ),
    proportion="BENIGN_BLOCKED",
)
declare(
    "response",
    "wrong_cause",
    but(
        lambda action, report, memory: (
            [("diagnose", action[1], "overfitted" if action[2] != "overfitted" else "novel family")]
            if action[0] == "diagnose"
            else [action]
        )
    ),
    cause="WRONG_CAUSE",
)
declare(
    "response",
    "forgets_the_old_family",
    but(
        lambda action, report, memory: (
            [("retrain", ["L2", "rotation-translation", "patch"])] if action[0] == "retrain" else [action]
        )
    ),
    mix="NOT_PROMOTED",
    gate="NOT_PROMOTED",
    order="NOT_CLOSED",
)


@mutant("response", gate="FAILED_BAR_SERVED", mix="NOT_DIVERSE")
def promotes_what_failed_by_little(report, memory):
    """Two families, and 52 % of 50 % needed looks like enough."""
    if report.state == "recover":
        return [("promote", 2)] if report.minute >= memory["canary"] + 10 else []
    actions = [action for action in responders.perfect(report, memory) if action[0] != "retrain"]
    if "cause" in memory and "family" not in memory:
        memory["family"] = report.triage.family
        mix = dict.fromkeys(("Linf", memory["family"], "L2"))
        actions.append(("retrain", list(mix)[:2]))
    if len(report.candidates) > 1 and report.state == "contain":
        memory["canary"] = report.minute
        actions.append(("canary", 2))
    return actions


@mutant("response", gate="FAILED_BAR_SERVED", mix="NOT_DIVERSE", bridge="NO_BRIDGE")
def takes_what_is_there_by_its_shares(report, memory):
    """Last week's candidate, which passes every bar by the estimate."""
    during = report._replace(state="contain" if report.state == "recover" else report.state)
    actions = [a for a in responders.perfect(during, memory) if a[0] not in ("canary", "promote")]
    if report.state == "contain":
        memory["canary"] = report.minute
        actions.append(("canary", 1))
    if report.state == "recover" and report.minute >= memory["canary"] + 10:
        actions.append(("promote", 1))
    return actions


@mutant("response", order="CANARY_TOO_SHORT")
def canary_of_a_minute(report, memory):
    if report.state == "recover":
        return [("promote", 2)]
    return responders.perfect(report, memory)


@mutant("response", cause="CAUSE_GUESSED")
def names_the_cause_by_the_first_two_attacks(report, memory):
    actions = [action for action in responders.perfect(report, memory) if action[0] != "diagnose"]
    seen = report.triage
    if seen and seen.votes and "named" not in memory:
        memory["named"] = True
        cause = "novel family" if seen.outside.share > 0.5 else "overfitted"
        actions.append(("diagnose", seen.family, cause))
    return actions
