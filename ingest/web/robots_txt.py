"""What a site asks of robots: robots.txt (RFC 9309), with what it says of training, once a day per origin.

Nobody answers: nothing is fetched. A file of 512 KiB may be made to keep a parser busy for hours, so what
concerns other robots is left out before it is parsed, and rules that are slow to match are bounded.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from protego import Protego
from yarl import URL

from ingest.web import redirect
from ingest.web.http_client import Answer
from ingest.web.opt_outs import TOKEN, OptOut, robots_txt_rule
from ingest.web.problems import (
    CONNECT_FAILED,
    DNS_FAILED,
    DNS_NOT_FOUND,
    PRIVATE_ADDRESS,
    ROBOTS_UNREACHABLE,
    TLS_INVALID,
    UnfetchableError,
)

MOST_BYTES = 512 << 10
_MOST_REDIRECTS = 5
# There is such a file, and nothing in it.
_NO_CONTENT = (204, 205)
_LIFE = 24 * 3600.0
# Of the texts that are kept, in all; what is made of them takes some twenty times as much.
_BYTES_KEPT = 8 << 20
_BYTES_EACH = 512
_MOST_WILDCARDS = 1000

_NAMED = "User-agent: "
_USER_AGENT = re.compile(r"\s*user[- ]?agent\s*[:\s]\s*([^#]*)", re.IGNORECASE)
_SITE_WIDE = re.compile(r"\s*(site-?maps?|host)\b", re.IGNORECASE)
# Told as they are: the image itself would meet them too.
_OF_THE_HOST = (PRIVATE_ADDRESS, DNS_NOT_FOUND, DNS_FAILED, CONNECT_FAILED, TLS_INVALID)


@dataclass(frozen=True, slots=True)
class Rules:
    """What one origin asks of us.

    Attributes:
        delay: seconds between requests.
    """

    delay: float
    _parsed: Protego | None
    _closed: bool = False
    # Each with Disallow where it opts out.
    _signals: Mapping[OptOut, Protego] = field(default_factory=dict)

    def allow(self, url: URL) -> bool:
        if self._closed or self._parsed is None:
            return not self._closed
        return bool(self._parsed.can_fetch(str(url), TOKEN))

    def opt_out(self, url: URL, heeded: frozenset[OptOut]) -> OptOut | None:
        """The way in which the images below this URL are kept from us, of those that are heeded."""
        for opt_out, signals in self._signals.items():
            if opt_out in heeded and not signals.can_fetch(str(url), TOKEN):
                return opt_out
        return None


EVERYTHING = Rules(0.0, None)


def rules(text: str) -> Rules:
    """The rules of a robots.txt."""
    ours = list(_lines_for_us(text))
    slow = sum(("*" in line or "$" in line) and not line.startswith(_NAMED) for line in ours)
    if slow > _MOST_WILDCARDS:
        # Nobody means well by that many, and matching them would take milliseconds per URL.
        return Rules(0.0, None, _closed=True)
    if not ours:
        return EVERYTHING
    parsed = Protego.parse("\n".join(ours))
    signals = {
        opt_out: Protego.parse("\n".join(lines))
        for opt_out in (OptOut.CONTENT_SIGNAL, OptOut.CONTENT_USAGE)
        if (lines := _as_disallow(ours, opt_out))
    }
    return Rules(parsed.crawl_delay(TOKEN) or 0.0, parsed, _signals=signals)


def _as_disallow(lines: list[str], opt_out: OptOut) -> list[str]:
    """What lines say of training, in words of RFC 9309, which has the same order of paths; [] for nothing."""
    told = False
    made: list[str] = []
    for line in lines:
        rule = robots_txt_rule(line)
        if line.startswith(_NAMED):
            made.append(line)
        elif rule is None or rule[0] is not opt_out:
            made.append("Disallow:")  # it ends a list of names
        else:
            told |= rule[2]
            made.append(f"{'Disallow' if rule[2] else 'Allow'}: {rule[1]}")
    return made if told else []


def _lines_for_us(text: str) -> Iterable[str]:
    """The groups of our token and of all robots, without other robots' names."""
    naming = ours = False
    for line in text.removeprefix("\ufeff").splitlines():
        if named := _USER_AGENT.match(line):
            if not naming:
                naming, ours = True, False
            name = named[1].strip().lower().partition("/")[0]
            if name in ("*", TOKEN):
                ours = True
                yield f"{_NAMED}{name}"
        elif line.strip() and not line.lstrip().startswith("#") and not _SITE_WIDE.match(line):
            naming = False
            if ours:
                yield line


class Robots:
    """The rules of many origins, asked for when they are needed.

    Args:
        ask: one request of an http(s) URL, no redirect followed, its data cut at MOST_BYTES.
        deadline: seconds for one robots.txt, redirects included.
    """

    def __init__(self, ask: Callable[[URL], Awaitable[Answer]], *, deadline: float) -> None:
        self._ask = ask
        self._deadline = deadline
        self._now = asyncio.get_running_loop().time
        self._known: OrderedDict[URL, tuple[float, int, Rules]] = OrderedDict()
        self._bytes_kept = 0
        self._asked: dict[URL, asyncio.Task[Rules]] = {}

    async def rules(self, url: URL) -> Rules:
        """The rules of a URL's origin.

        Raises:
            UnfetchableError: the origin does not tell, now; or its address is forbidden.
        """
        origin = url.origin()
        known = self._known.get(origin)
        if known is not None and known[0] > self._now():
            return known[2]
        task = self._asked.get(origin)
        if task is None:
            task = self._asked[origin] = asyncio.create_task(self._learn(origin))
            # Even if nobody waits for it any more.
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
        # Whoever gives up waiting must not take the answer from the others.
        return await asyncio.shield(task)

    async def close(self) -> None:
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)

    async def _learn(self, origin: URL) -> Rules:
        try:
            async with asyncio.timeout(self._deadline):
                text = await self._text(origin)
        except TimeoutError:
            raise UnfetchableError(ROBOTS_UNREACHABLE) from None
        finally:
            del self._asked[origin]
        learnt = rules(text)
        self._keep(origin, learnt, len(text) if learnt is not EVERYTHING else 0)
        return learnt

    async def _text(self, origin: URL) -> str:
        """What robots.txt says; "" for none."""
        url = origin.with_path("/robots.txt")
        try:
            for _ in range(_MOST_REDIRECTS + 1):
                answer = await self._ask(url)
                if answer.location is None:
                    return answer.data.decode("utf-8", "replace")
                url = redirect.target(url, answer.location)
        except UnfetchableError as error:
            status = error.problem.http_status
            if status in _NO_CONTENT or (status is not None and 400 <= status < 500 and status != 429):
                return ""
            if error.problem in _OF_THE_HOST:
                raise
            raise UnfetchableError(ROBOTS_UNREACHABLE, retry_after=error.retry_after) from error
        # RFC 9309 §2.3.1.2: too many redirects are as if there were no file.
        return ""

    def _keep(self, origin: URL, learnt: Rules, size: int) -> None:
        size += _BYTES_EACH
        if replaced := self._known.pop(origin, None):
            self._bytes_kept -= replaced[1]
        self._known[origin] = (self._now() + _LIFE, size, learnt)
        self._bytes_kept += size
        while self._bytes_kept > _BYTES_KEPT:
            _, (_, freed, _) = self._known.popitem(last=False)
            self._bytes_kept -= freed
