"""Names to addresses: those that were checked are connected to.

A name may lead to another address each time it is asked. So it is resolved here, as it is written and once
per its lifetime, every address of it is checked, and the connector is given nothing else.
"""

import asyncio
import socket
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiodns
import pycares
from aiohttp.abc import AbstractResolver, ResolveResult

from ingest.problem import Problem
from ingest.web.addresses import AddressPolicy, is_literal, place_of
from ingest.web.problems import (
    DNS_FAILED,
    DNS_NOT_FOUND,
    PRIVATE_ADDRESS,
    PRIVATE_NAME,
    UnfetchableError,
)

_NAMES_KNOWN = 65_536
# More of a name's addresses are checked, but not connected to.
_MOST_ADDRESSES = 8
_SHORTEST_LIFE, _LONGEST_LIFE = 60.0, 3600.0
_NOT_FOUND_LIFE, _FAILED_LIFE = 300.0, 5.0
_NOT_FOUND = (aiodns.error.ARES_ENOTFOUND, aiodns.error.ARES_ENODATA, aiodns.error.ARES_EBADNAME)
# Neither the domains of resolv.conf nor the environment's aliases make other names of them.
_AS_WRITTEN = pycares.ARES_FLAG_NOSEARCH | pycares.ARES_FLAG_NOALIASES | pycares.ARES_FLAG_EDNS


@dataclass(frozen=True, slots=True)
class _Known:
    until: float
    addresses: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    problem: Problem | None = None


def _good(known: _Known) -> _Known:
    if known.problem is not None:
        raise UnfetchableError(known.problem)
    return known


class CheckedResolver(AbstractResolver):
    """Names to addresses, all of them permitted; asked once per name and lifetime, whatever comes of it.

    Made and used within one event loop. Names of the hosts file are known to c-ares itself.

    Args:
        policy: one forbidden address forbids the whole name.
        nameservers: addresses, with ":port" if it is not 53; empty for the system's.
    """

    def __init__(self, policy: AddressPolicy, *, nameservers: Sequence[str] = ()) -> None:
        options: dict[str, Any] = {"nameservers": list(nameservers)} if nameservers else {}
        self._dns = aiodns.DNSResolver(timeout=2.0, tries=3, flags=_AS_WRITTEN, **options)
        self._policy = policy
        self._now: Callable[[], float] = asyncio.get_running_loop().time
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._asked: dict[str, asyncio.Task[_Known]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The connector's question.

        Raises:
            UnfetchableError: there is no such name, no answer, or an address that is forbidden.
        """
        known = await self._found(host)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in known.addresses
        ]

    def places_known(self, host: str) -> tuple[str, ...] | None:
        """Which addresses, as `place_of` counts them, a request of this host may reach; None: ask `places`.

        Raises:
            UnfetchableError: as from `resolve`.
        """
        if is_literal(host):
            return (place_of(host),)
        known = self._known.get(host)
        return None if known is None or known.until < self._now() else _good(known).places

    async def places(self, host: str) -> tuple[str, ...]:
        """The same of any name."""
        return (await self._found(host)).places

    async def close(self) -> None:
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)
        await self._dns.close()

    async def _found(self, host: str) -> _Known:
        known = self._known.get(host)
        return _good(await self._ask(host) if known is None or known.until < self._now() else known)

    async def _ask(self, host: str) -> _Known:
        task = self._asked.get(host)
        if task is None:
            task = self._asked[host] = asyncio.create_task(self._look_up(host))
        # Whoever gives up waiting must not take the answer from the others.
        return await asyncio.shield(task)

    async def _look_up(self, host: str) -> _Known:
        try:
            known = await self._answer(host)
        finally:
            del self._asked[host]
        self._known[host] = known
        self._known.move_to_end(host)
        if len(self._known) > _NAMES_KNOWN:
            self._known.popitem(last=False)
        return known

    async def _answer(self, host: str) -> _Known:
        if "." not in host and not self._policy.allows_private:
            return _Known(self._now() + _LONGEST_LIFE, problem=PRIVATE_NAME)
        try:
            answer = await self._dns.getaddrinfo(host, family=socket.AF_UNSPEC, type=socket.SOCK_STREAM)
        except aiodns.error.DNSError as error:
            if error.args[0] in _NOT_FOUND:
                return _Known(self._now() + _NOT_FOUND_LIFE, problem=DNS_NOT_FOUND)
            return _Known(self._now() + _FAILED_LIFE, problem=DNS_FAILED)
        # A scope, as of link-local addresses, is left out here; such an address is refused anyway.
        addresses = tuple(dict.fromkeys(node.addr[0].decode("ascii") for node in answer.nodes))
        if not addresses:
            return _Known(self._now() + _NOT_FOUND_LIFE, problem=DNS_NOT_FOUND)
        life = min(max(min(node.ttl for node in answer.nodes), _SHORTEST_LIFE), _LONGEST_LIFE)
        problem = self._objection(host, addresses)
        addresses = addresses[:_MOST_ADDRESSES] if problem is None else ()
        places = tuple(dict.fromkeys(map(place_of, addresses)))
        return _Known(self._now() + life, addresses, places, problem)

    def _objection(self, host: str, addresses: tuple[str, ...]) -> Problem | None:
        if not all(map(self._policy.permits, addresses)):
            return PRIVATE_ADDRESS
        if "." not in host and not all(map(self._policy.permits_private, addresses)):
            return PRIVATE_NAME
        return None
