"""What a site asks of robots: robots.txt (RFC 9309), with what it says of training, once a day per origin.

Nobody answers: nothing is fetched. A file of 512 KiB may be made to keep a parser busy for hours, and to be
slow to match. So what concerns other robots is left out before it is parsed, rules are bounded, and they are
parsed in a thread: the event loop goes on.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from protego import Protego
from yarl import URL

from ingest.web.opt_outs import TOKEN, OptOut, robots_txt_rule
from ingest.web.problems import (
    BLOCKED_PORT,
    CONNECT_FAILED,
    DNS_FAILED,
    DNS_NOT_FOUND,
    PRIVATE_ADDRESS,
    PRIVATE_NAME,
    ROBOTS_UNREACHABLE,
    TLS_INVALID,
    UnfetchableError,
)

MOST_BYTES = 512 << 10
MOST_REDIRECTS = 5
LIFE = 24 * 3600.0
# There is such a file, and nothing in it.
_NO_CONTENT = (204, 205)
# Of what is known, in all; what a rule takes, and each byte of it.
_MEMORY_KEPT = 128 << 20
_MEMORY_EACH, _MEMORY_PER_BYTE = 512, 3
# Of the rules for us.
_MOST_RULES = 10_000
_MOST_WILDCARDS = 1000
_MOST_STARS = 2000
_LONGEST_LINE = 16 << 10
# What is parsed, and matched, in far less than a millisecond.
_QUICKLY_PARSED = 1024
_QUICKLY_MATCHED = 100
_SHORT_URL = 1024

_NAMED = "User-agent: "
_USER_AGENT = re.compile(r"\s*user[- ]?agent\s*[:\s]\s*([^#]*)", re.IGNORECASE)
_SITE_WIDE = re.compile(r"\s*(site-?maps?|host)\b", re.IGNORECASE)
# Told as they are: the image itself would meet them too.
_OF_THE_HOST = (
    BLOCKED_PORT,
    PRIVATE_ADDRESS,
    PRIVATE_NAME,
    DNS_NOT_FOUND,
    DNS_FAILED,
    CONNECT_FAILED,
    TLS_INVALID,
)


@dataclass(frozen=True, slots=True)
class Rules:
    """What one origin asks of us.

    Attributes:
        delay: seconds between requests.
        memory: bytes that it takes, about.
    """

    delay: float
    _parsed: Protego | None
    _closed: bool = False
    _count: int = 0
    memory: int = _MEMORY_EACH
    # Each with Disallow where it opts out.
    _signals: Mapping[OptOut, Protego] = field(default_factory=dict)

    def is_slow(self, url: URL) -> bool:
        """Whether to match this URL may take milliseconds, so that others should have their turns between."""
        return self._parsed is not None and (self._count > _QUICKLY_MATCHED or len(str(url)) > _SHORT_URL)

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


NOTHING = Rules(0.0, None, _closed=True)


def rules(text: str) -> Rules:
    """The rules of a robots.txt. One that was made to be slow allows nothing: nobody means well by it."""
    ours: list[str] = []
    wildcards = stars = 0
    for line in _lines_for_us(text):
        if not line.startswith(_NAMED):
            wildcards += "*" in line or "$" in line
            stars += line.count("*")
        ours.append(line)
        if (
            len(line) > _LONGEST_LINE
            or len(ours) > _MOST_RULES
            or wildcards > _MOST_WILDCARDS
            or stars > _MOST_STARS
        ):
            return NOTHING
    if not ours:
        return EVERYTHING
    parsed = Protego.parse("\n".join(ours))
    signals = {
        opt_out: Protego.parse("\n".join(lines))
        for opt_out in (OptOut.CONTENT_SIGNAL, OptOut.CONTENT_USAGE)
        if (lines := _as_disallow(ours, opt_out))
    }
    memory = (1 + len(ours)) * _MEMORY_EACH + sum(map(len, ours)) * _MEMORY_PER_BYTE
    return Rules(
        parsed.crawl_delay(TOKEN) or 0.0,
        parsed,
        _count=len(ours) + stars,
        memory=memory * (1 + len(signals)),
        _signals=signals,
    )


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


def no_rules(error: UnfetchableError) -> bool:
    """Whether a robots.txt that was not given means that there is none (RFC 9309, 2.3.1.3)."""
    status = error.problem.http_status
    return status in _NO_CONTENT or (status is not None and 400 <= status < 500 and status != 429)


def as_told(error: UnfetchableError, *, elsewhere: bool) -> UnfetchableError:
    """What is said of the URLs whose robots.txt gave this error, here or `elsewhere`, where it was moved."""
    if error.problem in _OF_THE_HOST and not elsewhere:
        return error
    return UnfetchableError(ROBOTS_UNREACHABLE, retry_after=error.retry_after)


class Robots:
    """The rules of many origins, for as long as they are believed, in bounded memory."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = ThreadPoolExecutor(max_workers=1, thread_name_prefix="robots")
        self._known: OrderedDict[URL, tuple[float, Rules]] = OrderedDict()
        self._memory = 0

    def known(self, origin: URL) -> Rules | None:
        until, learnt = self._known.get(origin, (0.0, None))
        return learnt if until > self._loop.time() else None

    async def learn(self, origin: URL, data: bytes) -> Rules:
        """From what its robots.txt says, b"" for none."""
        if len(data) <= _QUICKLY_PARSED:
            learnt = _parsed(data)
        else:
            learnt = await self._loop.run_in_executor(self._parser, _parsed, data)
        if replaced := self._known.pop(origin, None):
            self._memory -= replaced[1].memory
        self._known[origin] = (self._loop.time() + LIFE, learnt)
        self._memory += learnt.memory
        while self._memory > _MEMORY_KEPT:
            _, (_, forgotten) = self._known.popitem(last=False)
            self._memory -= forgotten.memory
        return learnt

    def close(self) -> None:
        self._parser.shutdown(cancel_futures=True)


def _parsed(data: bytes) -> Rules:
    return rules(data.decode("utf-8", "replace"))
