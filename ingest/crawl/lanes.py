"""Lanes in turn: no lane waits for the slowest site of another.

A lane goes on at the pace that politeness allows its largest site, for its sites take turns in proportion.
So a crawler works on as many lanes as keep all its connections busy: one more whenever some are idle.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Generic, TypeVar

Request = TypeVar("Request", bound=Sized)

# URLs known at a time: enough that slow sites do not hold up the others.
WINDOW = 16_384
# Rows that wait for their turn in a shard, of 1.5 kB each: beyond, no further URLs are taken up. A few slow
# sites in every unit would otherwise have more and more units wait for them.
_WAITING_ROWS = 1 << 20
MOST_AT_A_TIME = 64
# Between one lane more and the next: it takes a moment until the URLs of one are under way.
_PAUSE_S = 0.25


@dataclass(kw_only=True, eq=False)
class Lane(Generic[Request]):
    """A lane under way.

    Attributes:
        requests: what is to be asked for, in order.
        known: rows of these that are asked for, and whose outcome is not there.
        waiting: rows whose outcome waits for its place in a shard.
        read: there are no further requests.
    """

    requests: Iterator[Request]
    known: int = 0
    waiting: int = 0
    read: bool = False


class Lanes(Generic[Request]):
    """An iterator over the requests of all lanes, each with its lane.

    Whoever takes them counts outcomes in the lanes. In between comes None: there are more requests, but not
    before that has happened.

    Args:
        lanes: the requests of each; they have the length of their rows.
        is_idle: whether more requests could be under way.
        clock: seconds.
    """

    def __init__(
        self,
        lanes: Iterable[Iterator[Request]],
        *,
        is_idle: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._unopened = deque(lanes)
        self._open: deque[Lane[Request]] = deque()
        self._is_idle = is_idle
        self._clock = clock
        self._opened_at = -_PAUSE_S

    def __iter__(self) -> Iterator[tuple[Lane[Request], Request] | None]:
        while self._open or self._unopened:
            lane = self._next()
            if lane is None:
                if self._may_open():
                    self._open.append(Lane(requests=self._unopened.popleft()))
                    self._opened_at = self._clock()
                elif self._open:
                    yield None
                continue
            request = next(lane.requests, None)
            if request is None:
                lane.read = True
                continue
            lane.known += len(request)
            yield lane, request

    def _next(self) -> Lane[Request] | None:
        """The lane whose turn it is, of those that may go on."""
        for _ in range(len(self._open)):
            lane = self._open.popleft()
            if lane.read and not lane.known:
                continue
            self._open.append(lane)
            full = lane.known >= self._most_known() or lane.waiting >= _WAITING_ROWS // len(self._open)
            if not lane.read and not (full and lane.known):
                return lane
        return None

    def _most_known(self) -> int:
        """Of a lane: its share of the window, as if all were open that may come."""
        return WINDOW // (MOST_AT_A_TIME if self._unopened else len(self._open))

    def _may_open(self) -> bool:
        if not self._unopened or not self._open:
            return bool(self._unopened)
        paused = self._clock() - self._opened_at >= _PAUSE_S
        return len(self._open) < MOST_AT_A_TIME and paused and self._is_idle()
