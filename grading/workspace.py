"""Where a course keeps its files, and the secret that its hidden cases are drawn from."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from robustkit.errors import RobustkitError

ROOT = Path(__file__).resolve().parents[1]
DEMO_SECRET = b"the demo's cases are the same everywhere"

# What the instructor's own folder gathers: never in git, never in a copy.
PRIVATE = (
    "gradebook.db*",
    "secret",
    "submitted",
    "autograded",
    "feedback",
    "records",
    "exchange",
    ".build-*",
    "rk-*",
)

# Where `collect` finds whose notebook it is.
LAYOUTS = (
    "STUDENT/LESSON/LESSON.ipynb, STUDENT/LESSON.ipynb, STUDENT.ipynb, STUDENT_..._LESSON.ipynb as Canvas and "
    "Moodle name downloads (STUDENT is what stands before the first _), and Moodle's "
    "STUDENT_NUMBER_assignsubmission_file/LESSON.ipynb"
)

# One thread for each kernel and judge: runs that go side by side must not fight over the cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # a caller who sets it knows better

_STUDENT = re.compile(r"[\w.@ ,'-]{1,80}", re.ASCII)


@dataclass(frozen=True)
class Workspace:
    """The folders of one course. `private` is the instructor's own and never reaches a learner.

    `database` is the gradebook's URL where that is not a file in `private`; it may hold a password.
    """

    solutions: Path
    course: Path
    submitted: Path
    private: Path
    database: str = field(default="", repr=False)

    @property
    def autograded(self) -> Path:
        return self.private / "autograded"

    @property
    def feedback(self) -> Path:
        return self.private / "feedback"

    @property
    def records(self) -> Path:
        return self.private / "records"

    @property
    def gradebook(self) -> Path:
        """The SQLite file that is the gradebook where `database` names no other."""
        return self.private / "gradebook.db"

    @property
    def gradebook_url(self) -> str:
        return self.database or f"sqlite:///{self.gradebook.resolve()}"

    @property
    def secret(self) -> Path:
        return self.private / "secret"

    def source(self, lesson: str) -> Path:
        return self.solutions / lesson / f"{lesson}.ipynb"

    def release(self, lesson: str) -> Path:
        return self.course / lesson / f"{lesson}.ipynb"

    def submission(self, student: str, lesson: str) -> Path:
        return self.submitted / student / lesson / f"{lesson}.ipynb"

    def hop(self, student: str, lesson: str) -> Path:
        """The folder of one graded submission: evidence, records.json, scorecard.json."""
        return self.records / student / lesson

    def page(self, student: str, lesson: str) -> Path:
        """The learner's feedback page, where nbgrader's formgrader and exchange look for it."""
        return self.feedback / student / lesson / f"{lesson}.html"


def repository() -> Workspace:
    """The workspace of this clone: solutions/, course/, the instructor's files under grading/, and the gradebook
    at the URL in ROBUSTKIT_GRADEBOOK, if any.
    """
    return Workspace(
        ROOT / "solutions",
        ROOT / "course",
        ROOT / "grading" / "submitted",
        ROOT / "grading",
        os.environ.get("ROBUSTKIT_GRADEBOOK", ""),
    )


def check_student(name: str) -> str:
    """`name`, when it can be a folder and a gradebook id. Raises: RobustkitError otherwise."""
    if not _STUDENT.fullmatch(name) or name.startswith(".") or name.strip() != name:
        raise RobustkitError(
            f"the student id {name[:80]!r} is unusable: letters, digits, spaces and . , ' @ _ - only, at most 80; "
            "rename the folder."
        )
    return name


def course_secret(path: Path) -> bytes:
    """The secret at `path`, made at the first call, readable by its owner alone.

    Raises: RobustkitError when it is too short to be one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        secret = path.read_bytes()
        if len(secret) < 16:
            raise RobustkitError(
                f"{path.name} holds {len(secret)} bytes, a course secret has 32; restore it from a backup "
                "(deleting it draws new cases, so that old grades cannot be replayed)."
            ) from None
        return secret
    with os.fdopen(handle, "wb") as file:
        secret = secrets.token_bytes(32)
        file.write(secret)
    return secret


def case_seed(secret: bytes, student: str, lesson: str, exercise: str) -> int:
    """The seed of one student's hidden case: 63 bits of an HMAC, so that public source tells nothing."""
    message = json.dumps([student, lesson, exercise]).encode()
    return int.from_bytes(hmac.digest(secret, message, hashlib.sha256)[:8], "big") >> 1
