"""The event loop's part of fetching: which URL is asked for when, and what follows from the answer.

A URL queues at its host once robots.txt allows it, and so does the question for robots.txt. A redirect of
either queues at the host that it points to; a URL that may succeed later queues again after a pause.
"""

import asyncio
import logging
import math
import random
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Generic, TypeVar

import aiohttp
from yarl import URL

from ingest.problem import PROBLEMS, Problem
from ingest.web import redirect
from ingest.web.addresses import AddressPolicy
from ingest.web.errands import Errand, Fetched, Job, Outcome, Question, Report
from ingest.web.host_queues import Hosts, SlowHost
from ingest.web.http_client import Answer, HttpClient
from ingest.web.opt_outs import image_opt_out
from ingest.web.problems import (
    DEADLINE,
    FETCHER_ERROR,
    GIVEN_UP,
    NOT_HTTP_URL,
    ROBOTS_DISALLOWED,
    UnfetchableError,
    after_answer,
)
from ingest.web.resolver import CheckedResolver
from ingest.web.robots_txt import LIFE, MOST_BYTES, MOST_REDIRECTS, Robots, Rules, as_told, no_rules
from ingest.web.settings import FetchSettings
from ingest.web.turns import Turn
from ingest.web.url import http_url

Token = TypeVar("Token")

_BACK_OFF = 1.0
# Finished and not yet taken: beyond this, nothing new is asked for.
_BYTES_WAITING = 32 << 20
# Trouble with the host rather than with the URL; an answer of any other kind shows that it is well.
_STRIKES = frozenset(
    "dns_failed connect_failed reset deadline robots_unreachable http_429 http_503".split()  # noqa: SIM905
)

logger = logging.getLogger(__name__)


class FetchLoop(Generic[Token]):
    """Everything that happens in the event loop's thread (but `taken` and `is_idle`)."""

    def __init__(
        self, settings: FetchSettings, policy: AddressPolicy, agent: str, nameservers: Sequence[str]
    ) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._resolver = CheckedResolver(policy, nameservers=nameservers)
        self._client = HttpClient(
            agent=agent, policy=policy, resolver=self._resolver, per_address=settings.per_address
        )
        self._robots = Robots()
        self._questions: dict[URL, Question[Token]] = {}
        self._limits = settings.limits()
        self._hosts: Hosts[Job[Token]] = Hosts(
            self._limits, per_address=settings.per_address, idle_limit=settings.connections
        )
        self._tasks: set[asyncio.Task[None]] = set()
        # Of URLs that pause before they are tried again.
        self._pauses: dict[Errand[Token], asyncio.TimerHandle] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._bytes_waiting = 0
        self._bytes_lock = threading.Lock()
        left = math.inf if settings.give_up_at is None else settings.give_up_at - time.time()
        self._gave_up = left <= 0
        if 0 < left < math.inf:
            self._loop.call_later(left, self._give_up)

    def add(
        self,
        requests: list[tuple[Token, str | Problem]],
        report: Report[Token],
    ) -> None:
        for token, asked in requests:
            if isinstance(asked, Problem):
                report((token, asked))
                continue
            if self._gave_up:
                report((token, GIVEN_UP))
                continue
            try:
                url = http_url(asked)
            except UnfetchableError as error:
                report((token, error.problem))
            else:
                self._queue(Errand(token, url, url, report))
        self.pump()

    def taken(self, outcome: Outcome) -> bool:
        """An outcome has been taken, in any thread; True if that makes room for new requests: call `pump`."""
        size = len(outcome.data) if isinstance(outcome, Fetched) else 0
        with self._bytes_lock:
            was_full = self._bytes_waiting >= _BYTES_WAITING
            self._bytes_waiting -= size
            return was_full and self._bytes_waiting < _BYTES_WAITING

    def is_idle(self) -> bool:
        """Whether there could be more requests under way; to be asked in any thread."""
        return len(self._tasks) < self._settings.connections and self._bytes_waiting < _BYTES_WAITING

    def pump(self) -> None:
        """Begin whatever may begin now."""
        now = self._loop.time()
        while self.is_idle():
            turn = self._hosts.take(now)
            if turn is None:
                break
            if turn.refusal is not None:
                self._refuse(turn.job, turn.refusal)
                continue
            task = self._loop.create_task(self._work(turn))
            self._tasks.add(task)
            task.add_done_callback(partial(self._ended, turn))
        when = self._hosts.next_time()
        if self._alarm is not None and self._alarm.when() != when:
            self._alarm.cancel()
            self._alarm = None
        if when is not None and self._alarm is None:
            self._alarm = self._loop.call_at(when, self._wake)

    def _ended(self, turn: Turn[Job[Token]], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._hosts.done(turn, self._loop.time())
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            # Whoever waits for outcomes must not wait for ever.
            for errand in (turn.job,) if isinstance(turn.job, Errand) else turn.job.waiting:
                errand.report(error)
        self.pump()

    def _wake(self) -> None:
        self._alarm = None
        self.pump()

    async def slowest_hosts(self, aside: Mapping[str, int]) -> list[SlowHost]:
        return self._hosts.slowest(aside)

    async def abandon(self) -> None:
        """Forget all URLs."""
        for _ in self._hosts.clear():
            pass
        for pause in self._pauses.values():
            pause.cancel()
        self._pauses.clear()
        self._questions.clear()
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
        self._robots.close()
        await self._client.close()
        await self._resolver.close()

    def _give_up(self) -> None:
        """The time is over: what is under way comes to its end, all else fails."""
        self._gave_up = True
        waiting = list(self._pauses)
        for pause in self._pauses.values():
            pause.cancel()
        self._pauses.clear()
        for job in list(self._hosts.clear()):
            if isinstance(job, Errand):
                waiting.append(job)
            else:
                waiting += self._questions.pop(job.origin).waiting
        for question in self._questions.values():
            waiting += question.waiting
            question.waiting.clear()
        for errand in waiting:
            self._finish(errand, GIVEN_UP)

    def _queue(self, errand: Errand[Token]) -> None:
        """At its host; or among those who wait to hear what its origin asks of robots."""
        if self._gave_up:
            self._finish(errand, GIVEN_UP)
            return
        if self._settings.robots:
            origin = errand.url.origin()
            rules = self._robots.known(origin)
            if rules is None or rules.is_slow(errand.url):
                question = self._questions.get(origin)
                if question is None:
                    question = self._questions[origin] = Question(origin, origin.with_path("/robots.txt"))
                    self._hosts.add(errand.host, question, self._loop.time())
                question.waiting.append(errand)
                return
            if not self._is_allowed(errand, rules):
                return
        self._hosts.add(errand.host, errand, self._loop.time())

    def _is_allowed(self, errand: Errand[Token], rules: Rules) -> bool:
        """Whether its origin lets it be asked for; if not, it is finished."""
        problem: Problem | None = None
        try:
            if not rules.allow(errand.url):
                problem = ROBOTS_DISALLOWED
            elif (reason := rules.opt_out(errand.url, self._settings.heeded)) is not None:
                problem = PROBLEMS[reason.value]
        except Exception:
            logger.exception("cannot match %s", errand.url)
            problem = FETCHER_ERROR
        if problem is not None:
            self._finish(errand, problem)
            return False
        errand.allowed_at = self._loop.time()
        if rules.delay:
            self._hosts.slow_down(errand.host, rules.delay, errand.allowed_at)
        return True

    def _refuse(self, job: Job[Token], refusal: Problem) -> None:
        """The host whose turn it would be is left alone."""
        if isinstance(job, Errand):
            self._finish(job, refusal)
        elif job.redirects:
            self._unanswered(job, as_told(UnfetchableError(refusal), elsewhere=True))
        else:
            del self._questions[job.origin]
            for errand in job.waiting:
                self._finish(errand, refusal)

    async def _work(self, turn: Turn[Job[Token]]) -> None:
        """One request of one host, and what follows from it."""
        job = turn.job
        try:
            places = self._resolver.places_known(turn.name) or await self._look_up(turn.name, job)
            if self._hosts.settle(turn, places, self._loop.time()):
                if isinstance(job, Errand):
                    await self._fetch(turn.name, job)
                else:
                    await self._ask(turn.name, job)
        except UnfetchableError as error:
            if isinstance(job, Errand):
                self._failed(turn.name, job, error)
            else:
                self._unanswered(job, error)
        except Exception:
            # A bug of ours or of a library, shown by some server's bytes: it costs a row, not the crawl.
            logger.exception("cannot fetch %s", job.url)
            self._refuse(job, FETCHER_ERROR)

    async def _look_up(self, host: str, job: Job[Token]) -> tuple[str, ...]:
        begun = self._loop.time()
        try:
            async with asyncio.timeout(self._settings.deadline - job.spent):
                return await self._resolver.places(host)
        except TimeoutError:
            raise UnfetchableError(DEADLINE) from None
        finally:
            job.spent += self._loop.time() - begun

    async def _fetch(self, host: str, errand: Errand[Token]) -> None:
        if self._settings.robots and errand.allowed_at < self._loop.time() - LIFE:
            self._queue(errand)
            return
        answer = await self._answer(host, errand)
        self._hosts.answered(host)
        if answer.location is None:
            self._finish(errand, Fetched(answer.data, answer.status))
        else:
            self._redirect(errand, answer)

    async def _ask(self, host: str, question: Question[Token]) -> None:
        """Ask for robots.txt, unless it is known; and let those go on who wait for it."""
        rules = self._robots.known(question.origin)
        if rules is None:
            data = await self._robots_txt(host, question)
            if data is None:
                return
            rules = await self._robots.learn(question.origin, data)
        soon = True
        while question.waiting:
            errand = question.waiting.popleft()
            if self._is_allowed(errand, rules):
                # The first of them goes over the same connection.
                self._hosts.add(errand.host, errand, self._loop.time(), soon=soon)
                soon = False
            if rules.is_slow(errand.url):
                await asyncio.sleep(0)
        del self._questions[question.origin]

    async def _robots_txt(self, host: str, question: Question[Token]) -> bytes | None:
        """What it says; b"" if there is none, None if the question queues elsewhere."""
        begun = self._loop.time()
        try:
            async with asyncio.timeout(self._settings.deadline - question.spent):
                answer = await self._client.get(
                    question.url,
                    keep_alive=not question.redirects,
                    judge=lambda response: None,
                    body=lambda response: self._client.start_of_body(response, max_bytes=MOST_BYTES),
                )
        except UnfetchableError as error:
            if no_rules(error):
                return b""
            raise
        except TimeoutError:
            raise UnfetchableError(DEADLINE) from None
        finally:
            question.spent += self._loop.time() - begun
        self._hosts.answered(host)
        if answer.location is None:
            return answer.data
        question.redirects += 1
        if question.redirects > MOST_REDIRECTS:
            return b""  # RFC 9309, 2.3.1.2: as if there were no file
        question.url = redirect.target(question.url, answer.location)
        if self._gave_up:  # nobody waits for it
            del self._questions[question.origin]
            return None
        self._hosts.add(question.url.raw_host or "", question, self._loop.time())
        return None

    def _unanswered(self, question: Question[Token], error: UnfetchableError) -> None:
        """For as many as would have asked at a time, this was a try; the others ask again."""
        del self._questions[question.origin]
        told = as_told(error, elsewhere=question.redirects > 0)
        tried = self._limits.connections(question.host) if told.problem.retryable else len(question.waiting)
        for number, errand in enumerate(question.waiting):
            if number < tried:
                self._failed(errand.host, errand, told)
            else:
                self._queue(errand)

    async def _answer(self, host: str, errand: Errand[Token]) -> Answer:
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

    def _redirect(self, errand: Errand[Token], answer: Answer) -> None:
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
        self._queue(errand)

    def _failed(self, host: str, errand: Errand[Token], error: UnfetchableError) -> None:
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
        if not problem.retryable or errand.tries >= self._settings.tries or self._gave_up:
            self._finish(errand, problem)
            return
        errand.tries, errand.redirects, errand.spent, errand.url = errand.tries + 1, 0, 0.0, errand.start
        self._pauses[errand] = self._loop.call_later(pause, self._resume, errand)

    def _resume(self, errand: Errand[Token]) -> None:
        del self._pauses[errand]
        self._queue(errand)
        self.pump()

    def _finish(self, errand: Errand[Token], outcome: Outcome) -> None:
        if isinstance(outcome, Fetched):
            with self._bytes_lock:
                self._bytes_waiting += len(outcome.data)
        errand.report((errand.token, outcome))
