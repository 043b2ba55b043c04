"""What hosts say about robots: robots.txt (RFC 9309) and the header X-Robots-Tag."""

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from protego import Protego

from ingest.sources.source import Problem

AGENT = "seer-pipeline"
MAX_BYTES = 512 << 10
_KEEP_SECONDS = 24 * 3600.0
_KEEP_FAILURES_SECONDS = 600.0
_ORIGINS_KEPT = 50_000
_LONGEST_DELAY = 30.0
_OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
# Directives that have a colon themselves; any other word before a colon is a robot's name.
_WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_NAMED = re.compile(r"\s*([A-Za-z0-9_.*-]+)\s*:\s*(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What one origin allows.

    Attributes:
        parsed: its robots.txt; None if it has none: all is allowed.
        problem: why nobody knows: then nothing is allowed for now.
    """

    parsed: Protego | None = None
    problem: Problem | None = None

    def allow(self, url: str) -> bool:
        """Whether we may fetch this."""
        return self.parsed is None or bool(self.parsed.can_fetch(url, AGENT))

    @property
    def delay(self) -> float:
        """Seconds between two requests that it asks for, within reason."""
        asked = None if self.parsed is None else self.parsed.crawl_delay(AGENT)
        return min(_LONGEST_DELAY, float(asked or 0))


def parse(body: bytes) -> Rules:
    """The rules in a robots.txt, whatever its bytes are; what lies beyond 512 KiB is not read."""
    return Rules(parsed=Protego.parse(body[:MAX_BYTES].decode("utf-8", "replace")))


def opts_out(headers: Iterable[str]) -> bool:
    """Whether X-Robots-Tag headers tell us, or everyone, to leave a picture out."""
    for header in headers:
        named = _NAMED.fullmatch(header)
        directives = header
        if named is not None and named[1].lower() not in _WITH_VALUE:
            if named[1].lower() not in (AGENT, "*"):
                continue
            directives = named[2]
        if any(word.strip().lower() in _OPT_OUTS for word in directives.split(",")):
            return True
    return False


class RobotsCache:
    """Rules by origin, fetched once a day at most.

    Args:
        fetch: gets the rules of an origin such as `https://a.org`.
    """

    def __init__(self, fetch: Callable[[str], Awaitable[Rules]]) -> None:
        self._fetch = fetch
        self._known: OrderedDict[str, tuple[float, asyncio.Task[Rules]]] = OrderedDict()

    async def rules(self, origin: str) -> Rules:
        """The origin's rules; several who ask at once wait for one answer."""
        expires, task = self._known.get(origin, (0.0, None))
        if task is None or time.monotonic() > expires:
            task = asyncio.create_task(self._fetched(origin))
            self._known[origin] = time.monotonic() + _KEEP_SECONDS, task
            while len(self._known) > _ORIGINS_KEPT:
                self._known.popitem(last=False)
        return await asyncio.shield(task)

    def close(self) -> None:
        """Stop waiting for answers."""
        for _, task in self._known.values():
            task.cancel()

    async def _fetched(self, origin: str) -> Rules:
        rules = await self._fetch(origin)
        if rules.problem is not None:
            self._known[origin] = time.monotonic() + _KEEP_FAILURES_SECONDS, self._known[origin][1]
        return rules
