"""Whose turn it is: URLs queue per host, hosts take turns, and each is asked no more than it can bear.

Neither is an address, however many hosts it serves. Where a host is, is known from its first turn on.

No clock and no network in here: times are told by the caller, in seconds.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Generic
from weakref import WeakValueDictionary

from ingest.problem import Problem
from ingest.web.host_limits import HostLimits
from ingest.web.problems import HOST_ASKS_TO_WAIT, HOST_UNREACHABLE
from ingest.web.turns import Host, Job, Place, Turn

# Failures without one answer in between, after which a host is left alone.
STRIKES = 8
_LEFT_ALONE = 600.0
_LONGEST_LEFT_ALONE = 86_400.0
# A host that asks for more than this is left alone for that time: its URLs fail, for a later attempt.
LONGEST_WAIT = 60.0
LONGEST_DELAY = 30.0
# Hosts of one address that ask for less are not kept apart.
_SHORTEST_DELAY = 0.1
# Hosts with so many jobs in their queues come first: they are the last to end. Of so many turns one is for
# the others, or they would never come while all connections are busy.
_LONG_QUEUE = 16
_TURNS = 8
_HOSTS_KNOWN = 100_000
# With those that asked not to be asked; beyond this, the longest idle are asked again too early.
_HOSTS_REMEMBERED = 200_000
# Slow hosts that are told of.
MOST_SLOW = 5
# As long as the connector keeps an idle connection.
KEPT_ALIVE = 15.0


@dataclass(frozen=True, slots=True)
class SlowHost:
    """A host that URLs wait for.

    Attributes:
        name: of the host.
        waiting: URLs that it is still to be asked for, as far as can be told.
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
        limits: jobs of one host that may be under way together, and the time between them.
        per_address: jobs that may be under way together of all hosts that are at one address.
        idle_limit: hosts that may be kept connected though nothing waits for them.
    """

    def __init__(self, limits: HostLimits, *, per_address: int, idle_limit: int) -> None:
        self._limits = limits
        self._per_address = per_address
        self._idle_limit = idle_limit
        self._hosts: dict[str, Host[Job]] = {}
        self._places: WeakValueDictionary[str, Place] = WeakValueDictionary()
        self._first: deque[Host[Job]] = deque()
        self._ring: deque[Host[Job]] = deque()
        self._turns = 0
        self._waiting: list[tuple[float, int, Host[Job]]] = []
        self._numbers = count()
        # In the order in which they became idle.
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._forget_beyond = _HOSTS_KNOWN

    def add(self, name: str, job: Job, now: float, *, first: bool = False, soon: bool = False) -> None:
        """Put a job at the end of its host's queue, or in front.

        Args:
            soon: the host is connected: its turn should come before it is not any more.
        """
        host = self._host(name)
        host.soon |= soon
        self._idle.pop(name, None)
        if host.queue is None:
            host.queue = deque()
        if first:
            host.queue.appendleft(job)
        else:
            host.queue.append(job)
        self._list(host, now)

    def take(self, now: float) -> Turn[Job] | None:
        """The next job whose time has come."""
        while self._waiting and self._waiting[0][0] <= now:
            self._ring.append(heapq.heappop(self._waiting)[2])
        while ring := self._next_ring():
            host = ring.popleft()
            if host.waits_at is not None:  # it was listed twice, and is listed there
                continue
            called_by, host.called_by = host.called_by, None
            host.listed = False
            if called_by is None:
                turn = self._turn(host, now)
            else:
                called_by.called -= 1
                turn = self._turn(host, now)
                self._call(called_by)
            if turn is not None:
                self._turns += 1
                return turn
        return None

    def settle(self, turn: Turn[Job], addresses: tuple[str, ...], now: float) -> bool:
        """Tell where the host of a turn is, or still is; whether it may be asked there, now.

        If not, the job is back in its queue, in front.
        """
        host = turn.host
        if addresses != host.keys:
            host.keys = addresses
            host.places = tuple(map(self._place, addresses))
        if turn.places is host.places:
            return True
        self._leave(turn)
        if self._full(host) is None and not self._kept_apart(host, now):
            turn.places = self._enter(host, now)
            return True
        self.add(host.name, turn.job, now, first=True)
        return False

    def done(self, turn: Turn[Job], now: float) -> None:
        host = turn.host
        self._watch(host, now)
        host.requests += 1
        host.active -= 1
        host.last = now
        self._leave(turn)
        self._list(host, now)
        self._rest(host, now)

    def next_time(self) -> float | None:
        """When the first of the hosts that wait may be asked."""
        return self._waiting[0][0] if self._waiting else None

    def wait(self, name: str, seconds: float, now: float) -> None:
        """The host asked for this pause, or its troubles suggest it."""
        host = self._host(name)
        if seconds > LONGEST_WAIT:
            self._leave_alone(host, HOST_ASKS_TO_WAIT, now + seconds)
        else:
            self._watch(host, now)
            host.not_before = max(host.not_before, now + seconds)

    def strike(self, name: str, now: float) -> None:
        """The host did not answer, or only to refuse work."""
        host = self._host(name)
        if self._refusal(host, now) is not None:  # what was under way by then says nothing new
            return
        host.strikes += 1
        if host.strikes >= STRIKES:
            # While its lane lasts, rows of a host that is gone come up: one try tells, and ever more seldom.
            host.strikes = STRIKES - 1
            host.left_alone = min(max(2 * host.left_alone, _LEFT_ALONE), _LONGEST_LEFT_ALONE)
            self._leave_alone(host, HOST_UNREACHABLE, now + host.left_alone)

    def answered(self, name: str) -> None:
        host = self._host(name)
        host.strikes, host.left_alone = 0, 0.0

    def slow_down(self, name: str, delay: float, now: float) -> None:
        """Keep a Crawl-delay, also between this host and others of its address that ask for one."""
        host = self._host(name)
        delay = min(delay, LONGEST_DELAY)
        if host.interval < delay:
            host.interval = delay
            self._watch(host, now)
            host.not_before = max(host.not_before, now + delay)
        if delay >= _SHORTEST_DELAY:
            host.delay = max(host.delay, delay)

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

    def slowest(self, aside: Mapping[str, int]) -> list[SlowHost]:
        """The hosts whose URLs take longest at their own pace, the longest first.

        Args:
            aside: URLs that wait outside of the queues, by host.
        """
        paces = (
            SlowHost(name, len(host.queue) + aside.get(name, 0), host.held_back / host.requests)
            for name, host in self._hosts.items()
            if host.queue and host.held_back and host.requests
        )
        return heapq.nlargest(MOST_SLOW, paces, key=lambda host: (host.seconds_left, host.name))

    def clear(self) -> Iterator[Job]:
        """Take all jobs out of the queues."""
        for host in self._hosts.values():
            if host.queue:
                yield from host.queue
                host.queue.clear()
        for place in self._places.values():
            place.reserved = place.not_before

    def _host(self, name: str) -> Host[Job]:
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = Host(
                name, most=self._limits.connections(name), interval=self._limits.interval(name)
            )
        return host

    def _place(self, address: str) -> Place:
        place = self._places.get(address)
        if place is None:
            place = self._places[address] = Place()
        return place

    def _next_ring(self) -> deque[Host[Job]]:
        """Whose turn it is: that of hosts that come first, or of the others; empty if it is nobody's."""
        return self._first if self._first and (self._turns % _TURNS or not self._ring) else self._ring

    def _turn(self, host: Host[Job], now: float) -> Turn[Job] | None:
        """The host's, if it has one now."""
        if not host.queue:
            self._rest(host, now)
            return None
        if refusal := self._refusal(host, now):
            job = host.queue.popleft()
            self._list(host, now)
            self._rest(host, now)
            return Turn(host, job, refusal)
        if host.active >= host.most:
            return None
        if host.not_before > now or self._kept_apart(host, now):
            self._list(host, now)
            return None
        if (place := self._full(host)) is not None:
            if place.waiters is None:
                place.waiters = OrderedDict()
            place.waiters[host] = None
            host.waits_at, host.listed = place, True
            return None
        job = host.queue.popleft()
        self._watch(host, now)
        host.active += 1
        host.not_before = now + host.interval
        turn = Turn(host, job, None, self._enter(host, now))
        self._list(host, now)
        return turn

    def _full(self, host: Host[Job]) -> Place | None:
        """An address of the host that has as many requests as it may have."""
        for place in host.places:
            if place.active + place.called >= self._per_address:
                return place
        return None

    def _kept_apart(self, host: Host[Job], now: float) -> bool:
        """Whether it is too early after another host of its address."""
        return host.delay > 0 and any(place.not_before > now for place in host.places)

    def _enter(self, host: Host[Job], now: float) -> tuple[Place, ...]:
        for place in host.places:
            place.active += 1
            if host.delay:
                place.not_before = now + host.delay
                place.reserved = max(place.reserved, place.not_before)
        return host.places

    def _leave(self, turn: Turn[Job]) -> None:
        places, turn.places = turn.places, ()
        for place in places:
            place.active -= 1
            self._call(place)

    def _call(self, place: Place) -> None:
        """Send those that wait for an address to the ring, as many as there is room for."""
        while place.waiters and place.active + place.called < self._per_address:
            host, _ = place.waiters.popitem(last=False)
            host.waits_at, host.called_by = None, place
            place.called += 1
            self._ring.append(host)

    def _watch(self, host: Host[Job], now: float) -> None:
        """Count the time since the last look, before what holds the host back changes."""
        until = now if host.active >= host.most else min(host.not_before, now)
        host.held_back += max(0.0, until - host.seen)
        host.seen = now

    def _refusal(self, host: Host[Job], now: float) -> Problem | None:
        if host.refusal is not None and host.refused_until <= now:
            host.refusal = None
        return host.refusal

    def _leave_alone(self, host: Host[Job], refusal: Problem, until: float) -> None:
        host.refusal, host.refused_until = refusal, until
        if host.queue and host.waits_at is None:
            # At once, even if it is listed among those that wait: what is found there later does no harm.
            host.listed = True
            self._ring.append(host)

    def _list(self, host: Host[Job], now: float) -> None:
        if host.listed or not host.queue:
            return
        when = host.not_before
        if host.delay:
            when = max(when, *(place.reserved for place in host.places), 0.0)
        if when > now and self._refusal(host, now) is None:
            if host.delay:
                for place in host.places:
                    place.reserved = when + host.delay
            heapq.heappush(self._waiting, (when, next(self._numbers), host))
        elif host.active < host.most or host.refusal is not None:
            if host.soon:
                self._first.appendleft(host)
            elif len(host.queue) >= _LONG_QUEUE:
                self._first.append(host)
            else:
                self._ring.append(host)
            host.soon = False
        else:
            return
        host.listed = True

    def _rest(self, host: Host[Job], now: float) -> None:
        if host.queue or host.active or host.listed or self._hosts.get(host.name) is not host:
            return
        host.queue = None
        self._idle[host.name] = None
        self._idle.move_to_end(host.name)
        if len(self._idle) > self._forget_beyond:
            # Those that asked for a day of peace stay, at the front: not to be looked at for every request.
            for old in list(islice(self._idle, len(self._idle) - _HOSTS_KNOWN * 9 // 10)):
                if max(self._hosts[old].refused_until, self._hosts[old].not_before) <= now:
                    del self._idle[old], self._hosts[old]
            if len(self._idle) > _HOSTS_REMEMBERED:
                for old in list(islice(self._idle, len(self._idle) - _HOSTS_REMEMBERED * 9 // 10)):
                    del self._idle[old], self._hosts[old]
            self._forget_beyond = max(_HOSTS_KNOWN, len(self._idle) + _HOSTS_KNOWN // 10)
