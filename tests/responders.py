"""Scripted responders to the replayed incident of lesson 7: one that does well, and four ways to do badly."""

from __future__ import annotations

from robustkit.contracts.response import FAMILIES


def perfect(report, memory):
    """Evidence before action, the smallest action that holds, nothing into service that has not passed."""
    actions = []
    if report.state == "normal" and "closed" not in memory and report.audit.high < 0.9:
        actions += [("suspect",), ("contain",), ("snapshot",)]
        memory["contained"] = report.minute
    if "contained" not in memory:
        return actions
    if report.minute == memory["contained"] + 3:
        actions.append(("bridge", 15))
    if report.state == "contain" and report.bridge == 1:
        actions.append(("bridge", 15))
    if report.minute <= memory["contained"] + 8:
        actions += [("throttle", account) for account, k in report.flagged.items() if k >= 5]
    diagnosis = report.triage
    if "cause" not in memory:
        if diagnosis and diagnosis.votes and diagnosis.votes.low > 0.5 and diagnosis.outside:
            beyond = diagnosis.outside
            if beyond.low > 0.5 or beyond.high < 0.5:
                memory["cause"] = "novel family" if beyond.low > 0.5 else "overfitted"
                actions.append(("diagnose", diagnosis.family, memory["cause"]))
                extra = next(f for f in ("rotation-translation", "L2") if f != diagnosis.family)
                actions.append(
                    (
                        "retrain",
                        sorted({"Linf", diagnosis.family, extra, *(["L2"] * (diagnosis.family == "Linf"))}),
                    )
                )
        if "cause" not in memory:
            actions += [("snapshot",), ("triage",)]
    passed = [c for c in report.candidates if all(share.low >= floor for share, floor in c.bars.values())]
    if report.state == "contain" and passed:
        actions.append(("canary", passed[-1].number))
        memory["canary"] = report.minute
    if report.state == "recover" and report.minute >= memory["canary"] + 10:
        actions.append(("promote", passed[-1].number))
    if report.state == "review":
        actions.append(("close",))
        memory["closed"] = True
    return actions


def retrains_first(report, memory):
    """Trains at the first sign, and isolates when the candidate is there: too late, and against a guess."""
    if report.audit.high >= 0.9 and "bad" not in memory:
        return []
    first = memory.setdefault("bad", report.minute)
    if report.minute == first:
        return [("retrain", ["Linf", "rotation-translation", "patch"])]
    if report.minute < first + 15:
        return []
    return perfect(report, memory)


def blocks_everyone(report, memory):
    """Contains in time, and throttles whoever is there."""
    if report.audit.high >= 0.9 or "done" in memory:
        return []
    memory["done"] = True
    everyone = [("throttle", f"account-{i:02d}") for i in range(24)]
    return [("suspect",), ("contain",), ("snapshot",), *everyone]


def panicking(report, memory):
    """Contains at the first burst of flags, throttles all that was flagged, promotes what it trained."""
    actions = [("snapshot",)] if report.minute % 20 == 0 else []
    if report.state == "normal" and max(report.flagged.values(), default=0) >= 5:
        actions += [("suspect",), ("contain",), ("snapshot",), ("retrain", list(FAMILIES[1:]))]
        actions += [("throttle", account) for account in report.flagged]
    if len(report.candidates) > 1 and report.state == "contain":
        actions.append(("canary", report.candidates[-1].number))
    if report.state == "recover":
        actions.append(("promote", report.candidates[-1].number))
    if report.state == "review":
        actions.append(("close",))
    return actions


def ignoring(report, memory):
    """Waits for the weekend."""
    return []


RANKED = (perfect, retrains_first, blocks_everyone, panicking, ignoring)
