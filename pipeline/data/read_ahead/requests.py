"""Hundreds of ranges in flight, none of which holds up the others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from obstore import Bytes

logger = logging.getLogger(__name__)

IN_FLIGHT = 256
# An answer that is late by so much is asked for again, beside the first: one of the two will come.
_LATE = 4.0
_LEAST_PATIENCE_SECONDS, _MOST_PATIENCE_SECONDS = 0.5, 60.0
_MOST_COPIES = 4
_WEIGHT_OF_NEWEST = 0.05

Read = Callable[[int, int, int], Awaitable["bytes | Bytes"]]


class Requests:
    """Reads ranges through `read(unit, start, size)`, so many at once, first come, first served.

    `read` itself repeats what fails for a reason that passes.

    Attributes:
        sent: how many there were, repeated ones included.
    """

    def __init__(self, read: Read, *, in_flight: int = IN_FLIGHT) -> None:
        self._read = read
        self._free = asyncio.Semaphore(in_flight)
        self.usual = 1.0  # seconds that an answer takes, of late
        self.sent = 0

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a free place among those in flight."""
        async with self._free:
            yield

    async def read(self, unit: int, start: int, size: int) -> bytes | Bytes:
        """The range; fewer bytes where the tar ends. In one's own `turn`.

        Raises:
            OSError, UserError: as the store's, when it has given up.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        patience = min(max(_LATE * self.usual, _LEAST_PATIENCE_SECONDS), _MOST_PATIENCE_SECONDS)
        copies: set[asyncio.Future[bytes | Bytes]] = set()
        try:
            while True:
                if len(copies) < _MOST_COPIES:
                    self.sent += 1
                    copies.add(asyncio.ensure_future(self._read(unit, start, size)))
                done, waiting = await asyncio.wait(
                    copies, timeout=patience, return_when=asyncio.FIRST_COMPLETED
                )
                for answer in done:
                    if answer.exception() is None or not waiting:
                        self._note(loop.time() - began)
                        return answer.result()
                copies -= done
                patience = min(2 * patience, _MOST_PATIENCE_SECONDS)
        finally:
            for copy in copies:
                copy.cancel()

    def _note(self, seconds: float) -> None:
        self.usual += _WEIGHT_OF_NEWEST * (seconds - self.usual)
