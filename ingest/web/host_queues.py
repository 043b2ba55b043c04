"""Whose turn it is: URLs queue per host, hosts take turns, and each is asked no more than it can bear.

No clock and no network in here: times are told by the caller, in seconds.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from ingest.problem import Problem
from ingest.web.problems import HOST_ASKS_TO_WAIT, HOST_UNREACHABLE

Job = TypeVar("Job")

# Failures without one answer in between, after which a host is left alone.
STRIKES = 8
_LEFT_ALONE = 600.0
# A host that asks for more than this is left alone for that time: its URLs fail, for a later attempt.
LONGEST_WAIT = 60.0
LONGEST_DELAY = 30.0
_HOSTS_KNOWN = 100_000
# As long as the connector keeps an idle connection.
KEPT_ALIVE = 15.0


@dataclass(slots=True)
class _Host(Generic[Job]):
    """
    Attributes:
        active: requests under way.
        interval: seconds between requests, from the beginning of one to that of the next.
        not_before: no request before this time.
        strikes: failures in a row.
        refusal: what is said of its URLs until `refused_until`, instead of asking.
        listed: it is in the ring, or in the heap of those that wait.
        last: when its latest request ended.
        slowed_at: when its Crawl-delay became known.
        held_back: seconds, up to `seen`, in which it had as many requests as it may have, or had to be waited
            for.
        requests: that have ended.
    """

    interval: float
    queue: deque[Job] = field(default_factory=deque)
    active: int = 0
    not_before: float = 0.0
    strikes: int = 0
    refusal: Problem | None = None
    refused_until: float = 0.0
    listed: bool = False
    last: float = 0.0
    slowed_at: float = -1.0
    held_back: float = 0.0
    seen: float = 0.0
    requests: int = 0


@dataclass(frozen=True, slots=True)
class SlowHost:
    """A host that URLs wait for.

    Attributes:
        name: of the host.
        waiting: URLs in its queue.
        seconds: that it has taken for each request so far, and for its pauses; of what it can do, not of our
            turn.
    """

    name: str
    waiting: int
    seconds: float

    @property
    def seconds_left(self) -> float:
        """How long its queue takes at this pace, whatever other hosts do."""
        return self.waiting * self.seconds


class Hosts(Generic[Job]):
    """Queues of jobs by host.

    Args:
        per_host: jobs of one host that may be under way together.
        rate: jobs per second and host; None for as many as they can.
        idle_limit: hosts that may be kept connected though nothing waits for them.
    """

    def __init__(self, *, per_host: int, rate: float | None, idle_limit: int) -> None:
        self._per_host = per_host
        self._interval = 1 / rate if rate else 0.0
        self._idle_limit = idle_limit
        self._hosts: dict[str, _Host[Job]] = {}
        self._ring: deque[str] = deque()
        self._waiting: list[tuple[float, str]] = []
        # In the order in which they became idle.
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._forget_beyond = _HOSTS_KNOWN

    def add(self, name: str, job: Job, now: float, *, first: bool = False) -> None:
        """Put a job at the end of its host's queue, or in front."""
        host = self._host(name)
        self._idle.pop(name, None)
        if first:
            host.queue.appendleft(job)
        else:
            host.queue.append(job)
        self._list(name, host, now)

    def take(self, now: float) -> tuple[str, Job, Problem | None] | None:
        """The next job whose time has come; with a problem if its host is left alone: then do not ask.

        Without a problem, `done` must follow.
        """
        while self._waiting and self._waiting[0][0] <= now:
            self._ring.append(heapq.heappop(self._waiting)[1])
        while self._ring:
            name = self._ring.popleft()
            host = self._hosts.get(name)
            if host is None:
                continue
            host.listed = False
            if not host.queue:
                self._rest(name, host, now)
                continue
            if refusal := self._refusal(host, now):
                job = host.queue.popleft()
                self._list(name, host, now)
                self._rest(name, host, now)
                return name, job, refusal
            if host.active >= self._per_host:
                continue
            if host.not_before > now:
                self._list(name, host, now)
                continue
            job = host.queue.popleft()
            self._watch(host, now)
            host.active += 1
            host.not_before = now + host.interval
            self._list(name, host, now)
            return name, job, None
        return None

    def done(self, name: str, now: float) -> None:
        host = self._hosts[name]
        self._watch(host, now)
        host.requests += 1
        host.active -= 1
        host.last = now
        self._list(name, host, now)
        self._rest(name, host, now)

    def next_time(self) -> float | None:
        """When the first of the hosts that wait may be asked."""
        return self._waiting[0][0] if self._waiting else None

    def wait(self, name: str, seconds: float, now: float) -> None:
        """The host asked for this pause, or its troubles suggest it."""
        host = self._host(name)
        if seconds > LONGEST_WAIT:
            self._leave_alone(name, host, HOST_ASKS_TO_WAIT, now + seconds)
        else:
            self._watch(host, now)
            host.not_before = max(host.not_before, now + seconds)

    def strike(self, name: str, now: float) -> None:
        """The host did not answer, or only to refuse work."""
        host = self._host(name)
        host.strikes += 1
        if host.strikes >= STRIKES:
            host.strikes = 0
            self._leave_alone(name, host, HOST_UNREACHABLE, now + _LEFT_ALONE)

    def answered(self, name: str) -> None:
        self._host(name).strikes = 0

    def slow_down(self, name: str, delay: float, *, begun: float, now: float) -> bool:
        """Keep a Crawl-delay; whether a job taken at `begun`, when it was not known, must come back."""
        host = self._host(name)
        delay = min(delay, LONGEST_DELAY)
        if host.interval < delay:
            host.interval = delay
            self._watch(host, now)
            host.not_before = max(host.not_before, now + delay)
            host.slowed_at = now
        return host.slowed_at >= begun

    def keep_alive(self, name: str, now: float) -> bool:
        """Whether the connection should be kept after this answer: sockets of idle hosts are bounded."""
        if self._hosts[name].queue:
            return True
        recent = 0
        for idle in reversed(self._idle):
            if recent == self._idle_limit or self._hosts[idle].last < now - KEPT_ALIVE:
                break
            recent += 1
        return recent < self._idle_limit

    def slowest(self, most: int) -> list[SlowHost]:
        """The hosts whose queues take longest at their own pace, the longest first."""
        paces = (
            SlowHost(name, len(host.queue), host.held_back / host.requests)
            for name, host in self._hosts.items()
            if host.queue and host.held_back and host.requests
        )
        return heapq.nlargest(most, paces, key=lambda host: (host.seconds_left, host.name))

    def clear(self) -> Iterator[Job]:
        """Take all jobs out of the queues."""
        for host in self._hosts.values():
            yield from host.queue
            host.queue.clear()

    def _host(self, name: str) -> _Host[Job]:
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = _Host(self._interval)
        return host

    def _watch(self, host: _Host[Job], now: float) -> None:
        """Count the time since the last look, before what holds the host back changes."""
        until = now if host.active >= self._per_host else min(host.not_before, now)
        host.held_back += max(0.0, until - host.seen)
        host.seen = now

    def _refusal(self, host: _Host[Job], now: float) -> Problem | None:
        if host.refusal is not None and host.refused_until <= now:
            host.refusal = None
        return host.refusal

    def _leave_alone(self, name: str, host: _Host[Job], refusal: Problem, until: float) -> None:
        host.refusal, host.refused_until = refusal, until
        if host.queue:
            # At once, even if it is listed among those that wait: what is found there later does no harm.
            host.listed = True
            self._ring.append(name)

    def _list(self, name: str, host: _Host[Job], now: float) -> None:
        if host.listed or not host.queue:
            return
        if host.not_before > now and self._refusal(host, now) is None:
            heapq.heappush(self._waiting, (host.not_before, name))
        elif host.active < self._per_host or host.refusal is not None:
            self._ring.append(name)
        else:
            return
        host.listed = True

    def _rest(self, name: str, host: _Host[Job], now: float) -> None:
        if host.queue or host.active or host.listed:
            return
        self._idle[name] = None
        self._idle.move_to_end(name)
        if len(self._idle) > self._forget_beyond:
            # Those that asked for a day of peace stay, at the front: not to be looked at for every request.
            for old in list(islice(self._idle, len(self._idle) - _HOSTS_KNOWN * 9 // 10)):
                if max(self._hosts[old].refused_until, self._hosts[old].not_before) <= now:
                    del self._idle[old], self._hosts[old]
            self._forget_beyond = max(_HOSTS_KNOWN, len(self._idle) + _HOSTS_KNOWN // 10)
