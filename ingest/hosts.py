"""Whose turn it is: requests wait at their hosts, and hosts take turns, each within what it can be asked for.

A slow host, or one that wants to be left alone, holds up its own requests and no others.
"""

import asyncio
import time
from collections import deque
from typing import Generic, TypeVar

R = TypeVar("R")
_HOSTS_KEPT = 100_000


class Host(Generic[R]):
    """What is known of a host, and what waits for it.

    Attributes:
        waiting: requests, first come first served.
        failures: connections in a row that came to nothing.
        interval: seconds between the starts of two requests.
    """

    def __init__(self, interval: float) -> None:
        self.waiting: deque[R] = deque()
        self.failures = 0
        self.interval = interval
        self.active = 0
        self.turns = 0
        self.next_start = 0.0
        self.quiet_until = 0.0
        self.alarm: asyncio.TimerHandle | None = None


class Hosts(Generic[R]):
    """Requests by host, handed out one by one.

    Args:
        per_host: requests that a host answers at a time.
        interval: least seconds between the starts of two requests to one host.
    """

    def __init__(self, *, per_host: int, interval: float) -> None:
        self._per_host = per_host
        self._interval = interval
        self._hosts: dict[str, Host[R]] = {}
        self._turns: asyncio.Queue[Host[R]] = asyncio.Queue()

    def host(self, name: str) -> Host[R]:
        """The host of this name."""
        host = self._hosts.get(name)
        if host is None:
            if len(self._hosts) >= _HOSTS_KEPT:
                self._forget()
            host = self._hosts[name] = Host(self._interval)
        return host

    def add(self, name: str, request: R, *, first: bool = False) -> None:
        """Let a request wait at a host, perhaps before the others."""
        host = self.host(name)
        if first:
            host.waiting.appendleft(request)
        else:
            host.waiting.append(request)
        self._give_turns(host)

    async def next(self) -> tuple[Host[R], R]:
        """Wait for a host that may be asked; its next request. `done` must follow."""
        while True:
            host = await self._turns.get()
            host.turns -= 1
            if host.waiting and time.monotonic() >= host.quiet_until:
                host.active += 1
                return host, host.waiting.popleft()
            self._give_turns(host)

    def done(self, host: Host[R]) -> None:
        """A request has ended."""
        host.active -= 1
        self._give_turns(host)

    def leave_alone(self, host: Host[R], seconds: float) -> None:
        """Ask nothing of the host for a while."""
        host.quiet_until = max(host.quiet_until, time.monotonic() + seconds)

    def _give_turns(self, host: Host[R]) -> None:
        while host.active + host.turns < self._per_host and host.turns < len(host.waiting):
            wait = max(host.quiet_until, host.next_start) - time.monotonic()
            if wait > 0:
                if host.alarm is None:
                    host.alarm = asyncio.get_running_loop().call_later(wait, self._wake, host)
                return
            if host.interval:
                host.next_start = time.monotonic() + host.interval
            host.turns += 1
            self._turns.put_nowait(host)

    def _wake(self, host: Host[R]) -> None:
        host.alarm = None
        self._give_turns(host)

    def _forget(self) -> None:
        """Drop hosts that nothing is to be remembered of."""
        now = time.monotonic()
        self._hosts = {
            name: host
            for name, host in self._hosts.items()
            if host.waiting or host.active or host.turns or host.failures or host.quiet_until > now
        }
