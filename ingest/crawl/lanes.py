"""Lanes in turn: no site waits for another, neither of its lane nor of another lane.

Sites take turns in proportion, so that a lane ends with its slowest site. Where a site has enough URLs under
way, its further ones are put aside and the lane goes on with others, up to a bound: for what is fetched ahead
waits for its place in a shard. A crawler works on as many lanes as keep all its connections busy: one more
whenever some are idle, the longest first, as the largest sites decide when all is over.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Generic, TypeVar

Request = TypeVar("Request", bound=Sized)

# URLs known at a time, of all lanes and of a host: enough that no host waits for the next one. Of a host that
# may have many under way, so many for each of these.
WINDOW = 16_384
_OF_HOST = 64
_FOR_EACH = 4
# Rows that were begun and are not written, of half a kB each, in all lanes together.
_AHEAD = 1 << 20
MOST_AT_A_TIME = 64
# Between one lane more and the next: it takes a moment until the URLs of one are under way.
_PAUSE_S = 0.25


@dataclass(eq=False)
class _Host(Generic[Request]):
    """
    Attributes:
        most: rows that may be known at a time.
        known: rows that are asked for, and whose outcome is not there.
        seen: rows whose turn has come.
        aside: requests whose turn has come, and which wait.
    """

    most: int
    seen: int = 0
    known: int = 0
    aside: deque[Request] = field(default_factory=deque)


@dataclass(kw_only=True, eq=False)
class Lane(Generic[Request]):
    """A lane under way.

    Attributes:
        requests: what is to be asked for, in order.
        unseen: rows whose turn has not come.
        of_host: rows of a host that may be known at a time.
        known: rows of these that are asked for, and whose outcome is not there.
        ahead: rows that were begun and are not written. Whoever writes rows counts it down.
        read: there are no further requests, but those put aside.
    """

    requests: Iterator[Request]
    unseen: int
    of_host: Callable[[Hashable], int]
    known: int = 0
    ahead: int = 0
    read: bool = False
    _seen: int = 0
    _hosts: dict[Hashable, _Host[Request]] = field(default_factory=dict)
    _ready: deque[_Host[Request]] = field(default_factory=deque)

    @property
    def is_done(self) -> bool:
        """Whether all outcomes are there."""
        return self.read and not self._hosts

    def next(self, host_of: Callable[[Request], Hashable], *, most_ahead: int) -> Request | None:
        """The next request that its host need not wait for; None if there is none now."""
        while self._ready:
            host = self._ready[0]
            if host.aside and host.known < host.most:
                return self._given(host, host.aside.popleft())
            self._ready.popleft()
        while not self.read and (self.ahead < most_ahead or not self.known):
            request = next(self.requests, None)
            if request is None:
                self.read = True
                break
            self.ahead += len(request)
            if (name := host_of(request)) not in self._hosts:
                self._hosts[name] = _Host(self.of_host(name))
            host = self._hosts[name]
            host.seen += len(request)
            self._seen, self.unseen = self._seen + len(request), self.unseen - len(request)
            if host.known < host.most:
                return self._given(host, request)
            host.aside.append(request)
        return None

    def left(self) -> dict[Hashable, int]:
        """Rows that are not asked for, by host, of those that wait: what is put aside, and what is to be
        expected of the rest, as sites take turns in proportion.
        """
        return {
            name: sum(map(len, host.aside)) + host.seen * max(self.unseen, 0) // self._seen
            for name, host in self._hosts.items()
            if host.aside
        }

    def ended(self, request: Request, name: Hashable) -> None:
        """The outcome of a request is there."""
        self.known -= len(request)
        host = self._hosts[name]
        host.known -= len(request)
        if host.aside:
            self._ready.append(host)
        elif not host.known:
            del self._hosts[name]

    def _given(self, host: _Host[Request], request: Request) -> Request:
        host.known += len(request)
        self.known += len(request)
        return request


class Lanes(Generic[Request]):
    """An iterator over the requests of all lanes, each with its lane.

    Whoever takes them tells the lanes of outcomes, and of rows that are written. In between comes None: there
    are more requests, but not before that has happened.

    Args:
        lanes: how many rows each has, and its requests; they have the length of their rows.
        host_of: the host that a request is for.
        per_host: requests of a host that may be under way at a time.
        is_idle: whether more requests could be under way.
        is_full: whether there is no room for more that waits for its place: lanes go on with what was begun.
        clock: seconds.
    """

    def __init__(
        self,
        lanes: Iterable[tuple[int, Iterator[Request]]],
        *,
        host_of: Callable[[Request], Hashable],
        per_host: Callable[[Hashable], int],
        is_idle: Callable[[], bool],
        is_full: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._unopened = deque(sorted(lanes, key=itemgetter(0), reverse=True))
        self._open: deque[Lane[Request]] = deque()
        self._host_of = host_of
        self._per_host = per_host
        self._is_idle = is_idle
        self._is_full = is_full
        self._clock = clock
        self._opened_at = -_PAUSE_S

    def left(self) -> dict[Hashable, int]:
        """Rows that are not asked for, by host, of those that wait and as far as is known; each is of one
        lane. Looks at all: to be asked now and then.
        """
        return {name: rows for lane in self._open for name, rows in lane.left().items()}

    def __iter__(self) -> Iterator[tuple[Lane[Request], Request] | None]:
        while self._open or self._unopened:
            turn = self._turn()
            if turn is not None:
                yield turn
            elif self._may_open():
                rows, requests = self._unopened.popleft()
                self._open.append(Lane(requests=requests, unseen=rows, of_host=self._most_known))
                self._opened_at = self._clock()
            elif self._open:
                yield None

    def _most_known(self, host: Hashable) -> int:
        return max(_OF_HOST, _FOR_EACH * self._per_host(host))

    def _turn(self) -> tuple[Lane[Request], Request] | None:
        """The next request of the next lane that has one."""
        # Each as far as there is room yet, so that one that came first leaves half of it to others.
        ahead = 0 if self._is_full() else _AHEAD - sum(lane.ahead for lane in self._open)
        for _ in range(len(self._open)):
            lane = self._open.popleft()
            request = lane.next(self._host_of, most_ahead=ahead) if self._has_room(lane) else None
            if not lane.is_done:
                self._open.append(lane)
            if request is not None:
                return lane, request
        return None

    def _has_room(self, lane: Lane[Request]) -> bool:
        """Whether the window has room for more of a lane: half of it is kept for those that know little."""
        if not self._unopened:
            return lane.known < WINDOW // (len(self._open) + 1)
        if lane.known < WINDOW // (2 * MOST_AT_A_TIME):
            return True
        return lane.known + sum(other.known for other in self._open) < WINDOW // 2

    def _may_open(self) -> bool:
        if not self._unopened or not self._open:
            return bool(self._unopened)
        paused = self._clock() - self._opened_at >= _PAUSE_S
        return len(self._open) < MOST_AT_A_TIME and paused and self._is_idle() and not self._is_full()
