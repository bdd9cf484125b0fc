"""Many requests at a time over real sockets: in a closed loop, or at a rate that no answer slows down.

Plain asyncio: a client that costs as much as the service cannot ask for ten times what it can do.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

_PATIENCE = 60.0  # seconds for one answer


@dataclass(frozen=True)
class Reply:
    """What became of one request: its HTTP status, 0 without an answer, and whether it says when to come again."""

    status: int
    retry_after: bool = False


class Customer:
    """Asks one service, as one account; connections are kept and used again."""

    def __init__(self, url: str, api_key: str) -> None:
        self._host, port = url.removeprefix("http://").rsplit(":", 1)
        self._port = int(port)
        self._head = (
            f"POST /v1/classify HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: Bearer {api_key}\r\nContent-Length: "
        ).encode()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        for _, writer in self._idle:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in self._idle), return_exceptions=True)

    async def ask(self, body: bytes) -> Reply:
        """Send one picture on a connection that is free, or on a new one."""
        stream = self._idle.pop() if self._idle else None
        try:
            async with asyncio.timeout(_PATIENCE):
                if stream is None:
                    stream = await asyncio.open_connection(self._host, self._port)
                stream[1].write(self._head + b"%d\r\n\r\n" % len(body) + body)
                head = (await stream[0].readuntil(b"\r\n\r\n")).lower()
                length = re.search(rb"\r\ncontent-length: (\d+)", head)
                await stream[0].readexactly(int(length[1]) if length else 0)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            if stream:
                stream[1].close()
            return Reply(0)
        if b"\r\nconnection: close" in head:
            stream[1].close()
        else:
            self._idle.append(stream)
        return Reply(int(head.split(b" ", 2)[1]), b"\r\nretry-after: " in head)


async def closed(
    customer: Customer, bodies: Iterator[bytes], connections: int, seconds: float
) -> list[Reply]:
    """The answers when each of so many connections sends its next picture as soon as it has its answer."""
    end = time.monotonic() + seconds

    async def one() -> list[Reply]:
        return [await customer.ask(body) for body in iter(lambda: _next(bodies, end), None)]

    return [
        reply for replies in await asyncio.gather(*(one() for _ in range(connections))) for reply in replies
    ]


def _next(bodies: Iterator[bytes], end: float) -> bytes | None:
    return next(bodies, None) if time.monotonic() < end else None


async def opened(customer: Customer, bodies: Sequence[bytes], rate: float) -> tuple[list[Reply], float]:
    """The answers when pictures are sent at `rate` a second, whatever comes back; and the rate that was reached."""
    start, asked = time.monotonic(), []
    for i, body in enumerate(bodies):
        await asyncio.sleep(max(0.0, start + i / rate - time.monotonic()))
        asked.append(asyncio.create_task(customer.ask(body)))
    reached = len(bodies) / (time.monotonic() - start)
    return await asyncio.gather(*asked), reached
