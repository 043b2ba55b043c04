"""Looks that take long, each in the background, one at a time, and only while somebody wants to know."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

PROMPT = 0.5  # seconds that an answer waits for a look; the last one's is told where that takes longer


class Lookout(Generic[T]):
    """What a slow look has found, never older than it takes to look again.

    Args:
        look: is called in a thread, never twice at a time.
        pause: seconds between two looks, at least; four times as long as a look takes if that is more.
    """

    def __init__(self, look: Callable[[], T], *, pause: float) -> None:
        self._look, self._pause = look, pause
        self._found: T | None = None
        self._error: Exception | None = None
        self._due = 0.0
        self._now: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Look again, if that is due; nobody waits."""
        if self._now is None and time.monotonic() >= self._due:
            self._now = asyncio.create_task(self._look_again())

    async def found(self) -> T:
        """What was found: just now if a look is quick, else the time before; only the first is waited for."""
        self.begin()
        if self._now is not None:
            await asyncio.wait({self._now}, timeout=None if self._found is None else PROMPT)
        if self._error is not None:
            raise RuntimeError("the last look failed") from self._error
        assert self._found is not None  # the first look has been waited for
        return self._found

    async def _look_again(self) -> None:
        begun = time.monotonic()
        try:
            self._found, self._error = await asyncio.to_thread(self._look), None
        except Exception as error:  # who looks is told; the next look may do better
            logger.exception("a look failed")
            self._error = error
        ended = time.monotonic()
        self._due = ended + max(self._pause, 4 * (ended - begun))
        self._now = None
