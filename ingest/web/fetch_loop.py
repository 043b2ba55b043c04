"""The event loop's part of fetching: which URL is asked for when, and what follows from the answer.

A redirect queues at the host that it points to, like any other URL; a URL that may succeed later queues again
after a pause.
"""

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import aiohttp
from yarl import URL

from ingest.problem import PROBLEMS, Problem
from ingest.web import redirect
from ingest.web.addresses import AddressPolicy, CheckedResolver
from ingest.web.host_queues import Hosts, SlowHost
from ingest.web.http_client import Answer, HttpClient
from ingest.web.opt_outs import image_opt_out
from ingest.web.problems import (
    DEADLINE,
    FETCHER_ERROR,
    NOT_HTTP_URL,
    ROBOTS_DISALLOWED,
    UnfetchableError,
    after_answer,
)
from ingest.web.robots_txt import MOST_BYTES, Robots
from ingest.web.settings import FetchSettings
from ingest.web.url import http_url

Token = TypeVar("Token")

_BACK_OFF = 1.0
# Finished and not yet taken: beyond this, nothing new is asked for.
_BYTES_WAITING = 32 << 20
_SLOWEST = 5
# Trouble with the host rather than with the URL; an answer of any other kind shows that it is well.
_STRIKES = frozenset(
    "dns_failed connect_failed reset deadline robots_unreachable http_429 http_503".split()  # noqa: SIM905
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A body, whatever it is: its kind is not believed, and not looked at here."""

    data: bytes
    http_status: int


Outcome = Fetched | Problem
Report = Callable[[tuple[Token, Outcome] | BaseException], None]


def _tell_bug(errand: "_Errand[Token]", task: asyncio.Task[None]) -> None:
    """Whoever waits for outcomes must not wait for ever."""
    if not task.cancelled() and (error := task.exception()) is not None:
        errand.report(error)


@dataclass(slots=True, eq=False)
class _Errand(Generic[Token]):
    """A URL on its way; `url` is where redirects have led, `spent` seconds of this try."""

    token: Token
    start: URL
    url: URL
    report: Report[Token]
    tries: int = 1
    redirects: int = 0
    spent: float = 0.0


class FetchLoop(Generic[Token]):
    """Everything that happens in the event loop's thread (but `taken`)."""

    def __init__(
        self, settings: FetchSettings, policy: AddressPolicy, agent: str, nameservers: Sequence[str]
    ) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._resolver = CheckedResolver(policy, nameservers=nameservers)
        self._client = HttpClient(agent=agent, policy=policy, resolver=self._resolver)
        self._robots = Robots(self._ask_robots, deadline=settings.deadline)
        self._hosts: Hosts[_Errand[Token]] = Hosts(
            per_host=settings.per_host, rate=settings.per_host_rate, idle_limit=settings.connections
        )
        self._tasks: set[asyncio.Task[None]] = set()
        # Of URLs that pause before they are tried again.
        self._pauses: dict[_Errand[Token], asyncio.TimerHandle] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._bytes_waiting = 0
        self._bytes_lock = threading.Lock()

    def add(
        self,
        requests: list[tuple[Token, str | Problem]],
        report: Report[Token],
    ) -> None:
        now = self._loop.time()
        for token, asked in requests:
            if isinstance(asked, Problem):
                report((token, asked))
                continue
            try:
                url = http_url(asked)
            except UnfetchableError as error:
                report((token, error.problem))
            else:
                self._hosts.add(url.raw_host or "", _Errand(token, url, url, report), now)
        self.pump()

    def taken(self, outcome: Outcome) -> bool:
        """An outcome has been taken, in any thread; True if that makes room for new requests: call `pump`."""
        size = len(outcome.data) if isinstance(outcome, Fetched) else 0
        with self._bytes_lock:
            was_full = self._bytes_waiting >= _BYTES_WAITING
            self._bytes_waiting -= size
            return was_full and self._bytes_waiting < _BYTES_WAITING

    def pump(self) -> None:
        """Begin whatever may begin now."""
        now = self._loop.time()
        while len(self._tasks) < self._settings.connections and self._bytes_waiting < _BYTES_WAITING:
            turn = self._hosts.take(now)
            if turn is None:
                break
            host, errand, refusal = turn
            if refusal is not None:
                self._finish(errand, refusal)
                continue
            task = self._loop.create_task(self._work(host, errand))
            self._tasks.add(task)
            task.add_done_callback(partial(_tell_bug, errand))
        when = self._hosts.next_time()
        if self._alarm is not None and self._alarm.when() != when:
            self._alarm.cancel()
            self._alarm = None
        if when is not None and self._alarm is None:
            self._alarm = self._loop.call_at(when, self._wake)

    def _wake(self) -> None:
        self._alarm = None
        self.pump()

    async def slowest_hosts(self) -> list[SlowHost]:
        return self._hosts.slowest(_SLOWEST)

    async def abandon(self) -> None:
        """Forget all URLs."""
        for _ in self._hosts.clear():
            pass
        for pause in self._pauses.values():
            pause.cancel()
        self._pauses.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with self._bytes_lock:
            self._bytes_waiting = 0

    async def close(self) -> None:
        await self.abandon()
        if self._alarm is not None:
            self._alarm.cancel()
        await self._robots.close()
        await self._client.close()
        await self._resolver.close()

    async def _work(self, host: str, errand: _Errand[Token]) -> None:
        """One request of one host, and what follows from it."""
        try:
            outcome = await self._request(host, errand)
            if outcome is not None:
                self._hosts.answered(host)
                self._finish(errand, outcome)
        except UnfetchableError as error:
            self._failed(host, errand, error)
        except Exception:
            # A bug of ours or of a library, shown by some server's bytes: it costs a row, not the crawl.
            logger.exception("cannot fetch %s", errand.url)
            self._finish(errand, FETCHER_ERROR)
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.discard(task)
            self._hosts.done(host, self._loop.time())
            if not task.cancelling():
                self.pump()

    async def _request(self, host: str, errand: _Errand[Token]) -> Fetched | None:
        """The errand's outcome; None if it queues again, here or elsewhere."""
        begun = self._loop.time()
        if self._settings.robots:
            rules = await self._robots.rules(errand.url)
            if not rules.allow(errand.url):
                raise UnfetchableError(ROBOTS_DISALLOWED)
            if (reason := rules.opt_out(errand.url, self._settings.heeded)) is not None:
                raise UnfetchableError(PROBLEMS[reason.value])
            now = self._loop.time()
            if rules.delay and self._hosts.slow_down(host, rules.delay, begun=begun, now=now):
                self._hosts.add(host, errand, now, first=True)
                return None
        answer = await self._answer(host, errand)
        if answer.location is None:
            return Fetched(answer.data, answer.status)
        self._hosts.answered(host)
        self._redirect(errand, answer)
        return None

    async def _answer(self, host: str, errand: _Errand[Token]) -> Answer:
        begun = self._loop.time()
        try:
            async with asyncio.timeout(self._settings.deadline - errand.spent) as deadline:
                return await self._client.get(
                    errand.url,
                    keep_alive=self._hosts.keep_alive(host, begun),
                    judge=self._judge,
                    body=lambda response: self._client.whole_body(
                        response, max_bytes=self._settings.max_bytes, deadline=deadline
                    ),
                )
        except TimeoutError:
            raise UnfetchableError(DEADLINE) from None
        finally:
            errand.spent += self._loop.time() - begun

    def _judge(self, response: aiohttp.ClientResponse) -> None:
        reason = image_opt_out(lambda name: response.headers.getall(name, ()), self._settings.heeded)
        if reason is not None:
            raise after_answer(reason.value, response.status, rejected=True)

    async def _ask_robots(self, url: URL) -> Answer:
        return await self._client.get(
            url,
            keep_alive=True,
            judge=lambda response: None,
            body=lambda response: self._client.start_of_body(response, max_bytes=MOST_BYTES),
        )

    def _redirect(self, errand: _Errand[Token], answer: Answer) -> None:
        """Queue at the host that a redirect points to."""
        assert answer.location is not None
        errand.redirects += 1
        if errand.redirects > self._settings.max_redirects:
            raise after_answer("too_many_redirects", answer.status)
        try:
            errand.url = redirect.target(errand.url, answer.location)
        except UnfetchableError as error:
            reason = "redirect_not_http" if error.problem is NOT_HTTP_URL else "redirect_bad_url"
            raise after_answer(reason, answer.status, rejected=True) from None
        self._hosts.add(errand.url.raw_host or "", errand, self._loop.time())

    def _failed(self, host: str, errand: _Errand[Token], error: UnfetchableError) -> None:
        """Try again later, or report."""
        now = self._loop.time()
        problem = error.problem
        if problem.reason in _STRIKES:
            self._hosts.strike(host, now)
        elif problem.http_status is not None:
            self._hosts.answered(host)
        pause = _BACK_OFF * 2 ** (errand.tries - 1) * random.uniform(0.5, 1.5)
        if error.retry_after is not None or problem.http_status == 429:
            self._hosts.wait(host, pause if error.retry_after is None else error.retry_after, now)
        if not problem.retryable or errand.tries >= self._settings.attempts:
            self._finish(errand, problem)
            return
        errand.tries, errand.redirects, errand.spent, errand.url = errand.tries + 1, 0, 0.0, errand.start
        self._pauses[errand] = self._loop.call_later(pause, self._resume, errand)

    def _resume(self, errand: _Errand[Token]) -> None:
        del self._pauses[errand]
        self._hosts.add(errand.url.raw_host or "", errand, self._loop.time())
        self.pump()

    def _finish(self, errand: _Errand[Token], outcome: Outcome) -> None:
        if isinstance(outcome, Fetched):
            with self._bytes_lock:
                self._bytes_waiting += len(outcome.data)
        errand.report((errand.token, outcome))
