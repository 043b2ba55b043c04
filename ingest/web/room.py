"""Memory that large bodies share, so that slow ones hold no more of it than has come."""

import asyncio
from collections import OrderedDict


class Room:
    """So many bytes, for bodies as they grow; the oldest may have more, so that one always comes to its end.

    Used within one event loop.
    """

    def __init__(self, size: int) -> None:
        self._left = size
        # By body, from the oldest to the youngest.
        self._taken: OrderedDict[object, int] = OrderedDict()
        self._waiting: dict[object, tuple[int, asyncio.Future[None]]] = {}

    def take(self, body: object, size: int) -> bool:
        """Take so many bytes for this body, if it need not wait."""
        taken = self._taken.setdefault(body, 0)
        if (self._waiting or self._left < size) and next(iter(self._taken)) is not body:
            return False
        self._taken[body] = taken + size
        self._left -= size
        return True

    async def wait(self, body: object, size: int) -> None:
        """Take so many bytes as soon as those of other bodies are free."""
        granted = asyncio.get_running_loop().create_future()
        self._waiting[body] = size, granted
        try:
            await granted
        finally:
            self._waiting.pop(body, None)

    def leave(self, body: object) -> None:
        """Give back all that this body has, also if it has nothing."""
        self._left += self._taken.pop(body, 0)
        oldest = next(iter(self._taken), None)
        for each in [each for each in self._taken if each in self._waiting]:
            size, granted = self._waiting[each]
            if each is not oldest and self._left < size:
                break
            del self._waiting[each]
            self._taken[each] += size
            self._left -= size
            if not granted.done():
                granted.set_result(None)
