"""Why a request is not answered: one exception, one form on the wire."""

from __future__ import annotations

from robustkit.errors import RobustkitError


class Refused(RobustkitError):
    """A request that is not answered: an HTTP status, one sentence for the client, when to come again (seconds)."""

    def __init__(self, status: int, sentence: str, retry_after: float | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.retry_after = retry_after
