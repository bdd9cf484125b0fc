"""A bounded number of threads with a bounded queue before them: what does not fit is shed at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from robustkit.serve.refusal import Refused

Result = TypeVar("Result")


class Gate:
    """At most `most` inside at a time, all on one event loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.inside = 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Raises: Refused, 503, when it is full."""
        if self.inside >= self._most:
            raise Refused(503, "the service has all it can do; come again.", retry_after=1)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


class Pool:
    """`workers` threads, and at most `queue` calls that wait for one."""

    def __init__(self, workers: int, queue: int) -> None:
        self._gate = Gate(workers + queue)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="robustkit-serve")

    @property
    def inside(self) -> int:
        """Calls that run or wait."""
        return self._gate.inside

    async def run(self, work: Callable[[], Result]) -> Result:
        """`work()` in one of the threads. Raises: Refused, 503, when the queue is full; what `work` raises."""
        with self._gate.entered():
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Let what is inside finish, take nothing more."""
        self._threads.shutdown()
