"""Fetch images over HTTP: politely, safely, and many at a time.

`Fetcher` looks like an iterator from outside. Inside, one thread runs an event loop (`fetch_loop.py`): URLs
queue per host (`host_queues.py`), each is asked of robots.txt (`robots_txt.py`) and then of the server
(`http_client.py`), over addresses that were checked (`addresses.py`).
"""

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from ingest.problem import Problem
from ingest.web.addresses import AddressPolicy
from ingest.web.errands import Outcome
from ingest.web.fetch_loop import FetchLoop
from ingest.web.host_queues import SlowHost
from ingest.web.http_client import user_agent
from ingest.web.opt_outs import TOKEN
from ingest.web.settings import FetchSettings

Token = TypeVar("Token")
Returned = TypeVar("Returned")

_BATCH = 64
_PATIENCE_S = 0.25


class Fetcher(Generic[Token]):
    """Fetches URLs; a context manager, of one run at a time. Nothing of it is left when it closes.

    Args:
        settings: limits and manners.
        window: URLs read ahead of the outcomes taken; more of them let more hosts take turns.
        nameservers: instead of the system's; addresses, with ":port" if it is not 53.

    Raises:
        UserError: on entering, if a setting cannot be used.
    """

    def __init__(
        self, settings: FetchSettings, *, window: int = 8192, nameservers: Sequence[str] = ()
    ) -> None:
        self._window = window
        self._policy = AddressPolicy(settings.allow_private, settings.deny_network)
        self._agent = user_agent(TOKEN, settings.contact)
        self._settings = settings
        self._nameservers = tuple(nameservers)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fetcher", daemon=True)
        self._results: queue.SimpleQueue[tuple[Token, Outcome] | BaseException] | None = None
        self._closed = False

    def __enter__(self) -> Self:
        self._thread.start()
        self._fetches: FetchLoop[Token] = self._within(self._opened)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._within(self._fetches.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._results is not None:
            self._results.put(RuntimeError("the fetcher was closed before its outcomes were taken"))

    def run(self, requests: Iterable[tuple[Token, str | Problem] | None]) -> Iterator[tuple[Token, Outcome]]:
        """Fetch all; outcomes come in the order in which they complete. Leaving off early ends what is under
        way.

        Args:
            requests: see `run_with_pauses`.
        """
        return (result for result in self.run_with_pauses(requests) if result is not None)

    def run_with_pauses(
        self, requests: Iterable[tuple[Token, str | Problem] | None]
    ) -> Iterator[tuple[Token, Outcome] | None]:
        """The same, and None now and then while no outcome comes.

        Args:
            requests: read in the caller's thread, at most `window` ahead; a problem is its own outcome. None:
                there are more, but not now; they are asked for again after each outcome, and now and then.
        """
        if self._results is not None:
            raise RuntimeError("a fetcher runs one run at a time")
        results = self._results = queue.SimpleQueue()
        source = iter(requests)
        batch = min(_BATCH, self._window)
        more, outstanding = True, 0
        try:
            while more or outstanding:
                room = more and outstanding + batch <= self._window
                jobs, more = _next(source, batch) if room else ([], more)
                if jobs:
                    outstanding += len(jobs)
                    self._loop.call_soon_threadsafe(self._fetches.add, jobs, results.put)
                try:
                    result = results.get(block=not jobs and outstanding > 0, timeout=_PATIENCE_S)
                except queue.Empty:
                    if not jobs:
                        yield None
                    continue
                if isinstance(result, BaseException):
                    raise result
                outstanding -= 1
                if self._fetches.taken(result[1]):
                    self._loop.call_soon_threadsafe(self._fetches.pump)
                yield result
        finally:
            self._results = None
            if outstanding and not self._closed:
                self._within(self._fetches.abandon)

    def is_idle(self) -> bool:
        """Whether there could be more requests under way."""
        return self._fetches.is_idle()

    def slowest_hosts(self, aside: Mapping[str, int]) -> list[SlowHost]:
        """Those whose URLs will take longest. Looks at every host: to be asked now and then.

        Args:
            aside: URLs that are still to be requested, by host.
        """
        return self._within(partial(self._fetches.slowest_hosts, aside))

    async def _opened(self) -> FetchLoop[Token]:
        return FetchLoop(self._settings, self._policy, self._agent, self._nameservers)

    def _within(self, function: Callable[[], Coroutine[Any, Any, Returned]]) -> Returned:
        return asyncio.run_coroutine_threadsafe(function(), self._loop).result()


def _next(
    source: Iterator[tuple[Token, str | Problem] | None], most: int
) -> tuple[list[tuple[Token, str | Problem]], bool]:
    """The requests there are now, and whether there are more."""
    found: list[tuple[Token, str | Problem]] = []
    for request in itertools.islice(source, most):
        if request is None:
            return found, True
        found.append(request)
    return found, len(found) == most
