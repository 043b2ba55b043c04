"""Hundreds of ranges in flight, none of which holds up the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from obstore import Bytes

IN_FLIGHT = 256
# An answer that is so many times later than usual is asked for again; each time with twice the patience.
_LATE = 4.0
_LEAST_PATIENCE_SECONDS, _MOST_PATIENCE_SECONDS = 0.5, 60.0
_TRIES_IN_TIME = 6  # then the store's own patience counts
_SLOW_BYTES_PER_SECOND = 2 << 20
_WEIGHT_OF_NEWEST = 0.05

# Of a unit's tar, so many ranges: where they start, and their sizes.
Read = Callable[[int, Sequence[int], Sequence[int]], Awaitable[Sequence["bytes | Bytes"]]]


class Requests:
    """Reads ranges through `read(unit, starts, sizes)`, so many at once, first come, first served.

    `read` itself repeats what fails for a reason that passes.

    Attributes:
        sent: how many ranges were asked for, again ones included.
        usual: seconds that an answer takes, of late.
    """

    def __init__(self, read: Read, *, in_flight: int = IN_FLIGHT) -> None:
        self._read = read
        self._most, self._free = in_flight, in_flight
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.sent, self.usual = 0, 1.0

    @contextlib.asynccontextmanager
    async def turn(self, count: int = 1) -> AsyncIterator[None]:
        """Wait until so many more ranges may be in flight."""
        count = min(count, self._most)
        if self._waiting or self._free < count:
            granted = asyncio.get_running_loop().create_future()
            self._waiting.append((count, granted))
            await granted
        else:
            self._free -= count
        try:
            yield
        finally:
            self._free += count
            while self._waiting and self._waiting[0][0] <= self._free:
                count, granted = self._waiting.popleft()
                if not granted.cancelled():
                    self._free -= count
                    granted.set_result(None)

    async def read(self, unit: int, starts: Sequence[int], sizes: Sequence[int]) -> Sequence[bytes | Bytes]:
        """The ranges; of each fewer bytes where the tar ends. In one's own `turn`.

        Raises:
            OSError, UserError: as the store's, when it has given up.
        """
        patience = max(_LATE * self.usual, _LEAST_PATIENCE_SECONDS) + sum(sizes) / _SLOW_BYTES_PER_SECOND
        for _ in range(_TRIES_IN_TIME):
            limit = asyncio.timeout(min(patience, _MOST_PATIENCE_SECONDS))
            try:
                async with limit:
                    return await self._timed(unit, starts, sizes)
            except TimeoutError:  # a file system's, too, is called so
                if not limit.expired():
                    raise
                patience *= 2
        return await self._timed(unit, starts, sizes)

    async def _timed(self, unit: int, starts: Sequence[int], sizes: Sequence[int]) -> Sequence[bytes | Bytes]:
        began = asyncio.get_running_loop().time()
        self.sent += len(starts)
        try:
            return await self._read(unit, starts, sizes)
        finally:
            seconds = asyncio.get_running_loop().time() - began
            self.usual += _WEIGHT_OF_NEWEST * (seconds - self.usual)
