"""The hops of one submission in a row: run, judge, score, feedback. Files stay between them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from grading import feedback, judge, records
from grading.run import Limits, run_submission
from grading.score import Scorecard, score, write_scorecard
from grading.workspace import ONE_THREAD, ROOT, Workspace, course_secret
from robustkit.errors import RobustkitError
from robustkit.lessons import Lesson


@dataclass(frozen=True)
class Settings:
    """How submissions are run."""

    tier: str = "smoke"
    limits: Limits = field(default_factory=Limits)
    sandbox: str = "auto"  # a tier of grading.sandbox; "none" for submissions that the instructor trusts


def assess(
    notebook: Path, lesson: Lesson, release: Path, into: Path, student: str, secret: Path, settings: Settings
) -> records.Records:
    """Run and judge one notebook; evidence and records.json are written into `into`.

    Raises: RobustkitError when the notebook cannot be graded at all.
    """
    run_submission(
        notebook,
        lesson,
        release,
        into / "evidence",
        student=student,
        secret=course_secret(secret),
        tier=settings.tier,
        limits=settings.limits,
        confinement=settings.sandbox,
    )
    judge_aside(into / "evidence", into / "records.json", secret)
    return records.read_records(into / "records.json")


def assess_aside(
    notebook: Path, lesson: Lesson, release: Path, into: Path, student: str, secret: Path
) -> records.Records:
    """As `assess`, in the smoke tier, with the run in a fresh process too: several can go side by side."""
    arguments: list[str | Path] = [notebook.resolve(), "-o", (into / "evidence").resolve()]
    arguments += ["--release", release.resolve(), "--secret", secret.resolve()]
    _hop("run", *arguments, "--lesson", lesson.id, "--student", student)
    judge_aside(into / "evidence", into / "records.json", secret)
    return records.read_records(into / "records.json")


def judge_aside(evidence: Path, into: Path, secret: Path) -> None:
    """The judge in a fresh process, which has imported nothing and keeps nothing.

    Raises: RobustkitError when it ends without records.
    """
    into.unlink(missing_ok=True)
    _hop("judge", evidence.resolve(), "-o", into.resolve(), "--secret", secret.resolve())


def _hop(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "grading", *map(str, arguments)],
        cwd=ROOT,
        env=ONE_THREAD | os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RobustkitError(
            (done.stderr.strip().splitlines() or [f"{arguments[0]} stopped without a word."])[-1]
        )


def conclude(workspace: Workspace, verdicts: records.Records, manual: Mapping[str, float]) -> Scorecard:
    """Score the verdicts; write scorecard.json and the feedback page."""
    card = score(verdicts, manual)
    write_scorecard(workspace.hop(card.student, card.lesson) / "scorecard.json", card)
    feedback.write_page(card, workspace.page(card.student, card.lesson))
    return card


def refuse(workspace: Workspace, student: str, lesson: Lesson, tier: str, reason: str) -> Scorecard:
    """The zero of a submission that could not be run, with the reason on every page."""
    verdicts = judge.refused(student, lesson, tier, reason)
    records.write(workspace.hop(student, lesson.id) / "records.json", verdicts)
    return conclude(workspace, verdicts, {})
