"""Pictures by URL: many at a time, few per host, within a deadline each, and nothing that was asked not to.

An event loop in a thread of its own does the work; outside there is an iterator. What has ended waits to be
taken, and when that is too much nothing new is begun: memory is bounded whatever hosts send.
"""

import asyncio
import email.utils
import queue
import random
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Generic, NamedTuple, Self, TypeVar
from urllib.parse import urljoin, urlsplit

from cluster.errors import UserError
from ingest.addresses import parse_networks
from ingest.hosts import Host, Hosts
from ingest.http_client import Answer, HttpClient
from ingest.robots import AGENT, RobotsCache, Rules, parse
from ingest.sources.source import Problem

Token = TypeVar("Token")

_WINDOW = 65_536  # requests known at a time: enough that slow sites do not hold up the others
_UNTAKEN_BYTES = 64 << 20
_LONGEST_WAIT = 120.0  # what a host that asks for more is not asked again for
_FAILURES = 5  # connections in a row that come to nothing, after which a host is given up
_LOST = frozenset({"connect_failed", "connection_lost", "deadline", "dns_failed"})
_ROBOTS_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class FetchSettings:
    """What decides which bytes a URL gives; part of a crawl's fingerprint.

    Attributes:
        deadline: seconds that one attempt may take, redirects included.
        attempts: how often a URL is tried, if it may succeed later.
        max_redirects: how many are followed.
        robots: whether robots.txt is heeded.
        x_robots: whether X-Robots-Tag is heeded.
        allow_private: networks, as CIDR, that may be asked though they are not public.
    """

    deadline: float = 20.0
    attempts: int = 3
    max_redirects: int = 5
    robots: bool = True
    x_robots: bool = True
    allow_private: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parse_networks(self.allow_private)
        if self.deadline <= 0 or self.attempts < 1 or self.max_redirects < 0:
            raise UserError(
                "--deadline and --attempts must be greater than 0, --max-redirects not less than 0"
            )


@dataclass(frozen=True, kw_only=True)
class Politeness:
    """How hosts are asked; changes no result.

    Attributes:
        contact: where webmasters reach whoever crawls: a URL or an e-mail address.
        per_host: connections to a host at a time.
        per_host_rate: requests to a host per second; None: as many as two connections give.
        connections: at a time, over all hosts.
    """

    contact: str = ""
    per_host: int = 2
    per_host_rate: float | None = None
    connections: int = 256

    def __post_init__(self) -> None:
        if self.per_host < 1 or self.connections < 1 or (self.per_host_rate or 1) <= 0:
            raise UserError("--per-host, --per-host-rate and --connections must be greater than 0")

    @property
    def agent(self) -> str:
        """The User-Agent."""
        return f"{AGENT}/0.1 (+{self.contact})"


class Fetched(NamedTuple):
    """What came of a URL.

    Attributes:
        body: its bytes, or why there are none.
        http_status: of the last answer; None without any.
        bytes_read: over the network, of the last answer's body.
        host: who was asked last.
    """

    body: bytes | Problem
    http_status: int | None
    bytes_read: int
    host: str


@dataclass(slots=True)
class _Request(Generic[Token]):
    token: Token
    url: str
    first_url: str
    attempt: int = 1
    redirects: int = 0
    used: float = 0.0


class Fetcher(Generic[Token]):
    """Fetches URLs; a context manager.

    Args:
        settings: what may be fetched.
        politeness: how.
        max_bytes: larger bodies are refused.
    """

    def __init__(self, settings: FetchSettings, politeness: Politeness, *, max_bytes: int) -> None:
        self._settings = settings
        self._politeness = politeness
        self._max_bytes = max_bytes
        self._ended: queue.SimpleQueue[tuple[Token, Fetched] | BaseException | None] = queue.SimpleQueue()
        self._untaken = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop = asyncio.new_event_loop()
        self._main: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            with suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._cancel)
            self._thread.join()
        self._loop.close()

    def run(self, requests: Iterable[tuple[Token, str]]) -> Iterator[tuple[Token, Fetched]]:
        """Every request with what came of it, in the order in which they end. May be called once.

        `requests` is read in the loop's thread, thousands ahead.
        """
        self._thread = threading.Thread(target=self._run, args=(iter(requests),), name="fetcher", daemon=True)
        self._thread.start()
        while (ended := self._ended.get()) is not None:
            if isinstance(ended, BaseException):
                raise ended
            with self._lock:
                before = self._untaken
                self._untaken -= _size(ended[1])
                room = before > _UNTAKEN_BYTES // 2 >= self._untaken
            if room:
                self._loop.call_soon_threadsafe(self._room.set)
            yield ended

    def _cancel(self) -> None:
        if self._main is not None:
            self._main.cancel()

    def _run(self, requests: Iterator[tuple[Token, str]]) -> None:
        asyncio.set_event_loop(self._loop)
        self._main = self._loop.create_task(self._fetch_all(requests))
        try:
            self._loop.run_until_complete(self._main)
            self._ended.put(None)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._ended.put(error)
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())

    async def _fetch_all(self, requests: Iterator[tuple[Token, str]]) -> None:
        politeness = self._politeness
        self._room = asyncio.Event()
        self._room.set()
        self._requests = requests
        self._under_way = 0
        self._exhausted = False
        self._finished = asyncio.Event()
        rate = politeness.per_host_rate
        self._hosts = Hosts[_Request[Token]](per_host=politeness.per_host, interval=1 / rate if rate else 0.0)
        allowed = parse_networks(self._settings.allow_private)
        async with HttpClient(
            allowed=allowed, agent=politeness.agent, connections=politeness.connections
        ) as client:
            self._client = client
            self._robots = RobotsCache(self._fetch_rules)
            self._take_requests()
            workers = [asyncio.create_task(self._work()) for _ in range(politeness.connections)]
            finished = asyncio.create_task(self._finished.wait())
            try:
                done, _ = await asyncio.wait([finished, *workers], return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # a worker ends only by an error
            finally:
                self._robots.close()
                for task in [finished, *workers]:
                    task.cancel()
                await asyncio.gather(finished, *workers, return_exceptions=True)

    def _take_requests(self) -> None:
        """Fill the window up."""
        while not self._exhausted and self._under_way < _WINDOW:
            following = next(self._requests, None)
            if following is None:
                self._exhausted = True
            else:
                token, url = following
                self._under_way += 1
                self._hosts.add(_host_of(url), _Request(token, url, url))
        if self._exhausted and self._under_way == 0:
            self._finished.set()

    async def _work(self) -> None:
        while True:
            await self._room.wait()
            host, request = await self._hosts.next()
            try:
                await self._advance(host, request)
            finally:
                self._hosts.done(host)

    async def _advance(self, host: Host[_Request[Token]], request: _Request[Token]) -> None:
        """One step of a request: a denial, an answer, or a redirect that waits at its own host."""
        denial = None if host.failures < _FAILURES else Problem("failed", "host_unreachable", retryable=True)
        if denial is None and self._settings.robots:
            denial = await self._denied(host, request.url)
        if denial is not None:
            self._end(request, Answer(body=denial))
            return
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._settings.deadline - request.used):
                answer = await self._client.get(
                    request.url, max_bytes=self._max_bytes, x_robots=self._settings.x_robots
                )
        except TimeoutError:
            answer = Answer(body=Problem("failed", "deadline", retryable=True))
        request.used += time.monotonic() - started
        self._judge_host(host, answer)
        if answer.redirect is not None:
            self._follow(request, answer)
        elif isinstance(answer.body, Problem) and answer.body.retryable:
            self._try_again(host, request, answer)
        else:
            self._end(request, answer)

    async def _denied(self, host: Host[_Request[Token]], url: str) -> Problem | None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            return None  # the client says what is wrong with it
        rules = await self._robots.rules(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")
        if rules.problem is not None:
            return rules.problem
        host.interval = max(host.interval, rules.delay)
        return None if rules.allow(url) else Problem("rejected", "robots_disallowed")

    def _judge_host(self, host: Host[_Request[Token]], answer: Answer) -> None:
        lost = isinstance(answer.body, Problem) and answer.http_status is None and answer.body.reason in _LOST
        host.failures = host.failures + 1 if lost else 0
        if answer.wait is not None:
            self._hosts.leave_alone(host, min(_LONGEST_WAIT, seconds_to_wait(answer.wait)))

    def _follow(self, request: _Request[Token], answer: Answer) -> None:
        request.redirects += 1
        if request.redirects > self._settings.max_redirects:
            problem = Problem("failed", "too_many_redirects", http_status=answer.http_status)
            self._end(request, replace(answer, body=problem))
            return
        try:
            request.url = urljoin(request.url, answer.redirect or "")
        except ValueError:
            request.url = ""
        self._hosts.add(_host_of(request.url), request, first=True)

    def _try_again(self, host: Host[_Request[Token]], request: _Request[Token], answer: Answer) -> None:
        too_long = answer.wait is not None and seconds_to_wait(answer.wait) > _LONGEST_WAIT
        if request.attempt >= self._settings.attempts or host.failures >= _FAILURES or too_long:
            self._end(request, answer)
            return
        pause = 2.0 ** (request.attempt - 1) * random.uniform(0.5, 1.5)
        request.attempt += 1
        request.url, request.redirects, request.used = request.first_url, 0, 0.0
        asyncio.get_running_loop().call_later(pause, self._hosts.add, _host_of(request.url), request)

    def _end(self, request: _Request[Token], answer: Answer) -> None:
        fetched = Fetched(answer.body, answer.http_status, answer.bytes_read, _host_of(request.url))
        with self._lock:
            self._untaken += _size(fetched)
            if self._untaken > _UNTAKEN_BYTES:
                self._room.clear()
        self._ended.put((request.token, fetched))
        self._under_way -= 1
        if self._exhausted or self._under_way < _WINDOW // 2:
            self._take_requests()

    async def _fetch_rules(self, origin: str) -> Rules:
        """robots.txt of an origin: without one everything is allowed; without an answer, nothing."""
        url = f"{origin}/robots.txt"
        answer = Answer(body=b"")
        try:
            async with asyncio.timeout(self._settings.deadline):
                for _ in range(1 + self._settings.max_redirects):
                    answer = await self._client.get(url, max_bytes=_ROBOTS_BYTES, x_robots=False)
                    if answer.redirect is None:
                        break
                    url = urljoin(url, answer.redirect)
        except (TimeoutError, ValueError):
            return Rules(problem=Problem("failed", "robots_unreachable", retryable=True))
        if isinstance(answer.body, bytes):
            return Rules() if answer.redirect is not None else parse(answer.body)
        if answer.http_status is None:
            return Rules(problem=answer.body)
        if answer.http_status < 500 and not answer.body.retryable and answer.body.reason.startswith("http_"):
            return Rules()
        return Rules(
            problem=Problem("failed", "robots_unreachable", retryable=True, http_status=answer.http_status)
        )


def seconds_to_wait(text: str) -> float:
    """The value of a Retry-After header: seconds, or a date; 0 if it is neither."""
    if text.strip().isdecimal():
        return float(text[:12])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).netloc.rpartition("@")[2].lower()
    except ValueError:
        return ""


def _size(fetched: Fetched) -> int:
    return 1_000 + (len(fetched.body) if isinstance(fetched.body, bytes) else 0)
