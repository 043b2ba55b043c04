"""Where a URL leads: http(s) only, public addresses only, and the address that was checked is connected to.

Names come from pages that anybody wrote: one may resolve to the cloud's metadata service, to a router, or to
another address each time it is asked. So a name is resolved here, once per its lifetime, every address of it
is checked, and the connector is given nothing else.
"""

import asyncio
import ipaddress
import socket
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiodns
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from cluster.errors import UserError
from ingest.problem import Problem
from ingest.web.problems import (
    DNS_FAILED,
    DNS_NOT_FOUND,
    PRIVATE_ADDRESS,
    UnfetchableError,
)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
# Not for hosts on the internet, though `ipaddress` of some Python versions calls them global.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
)
# Everything that may be routed; what lies outside is local, mapped, translated or unassigned.
_UNICAST = ipaddress.IPv6Network("2000::/3")
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")

_NAMES_KNOWN = 65_536
_SHORTEST_LIFE, _LONGEST_LIFE = 60.0, 3600.0
_NOT_FOUND_LIFE, _FAILED_LIFE = 300.0, 5.0
_NOT_FOUND = (aiodns.error.ARES_ENOTFOUND, aiodns.error.ARES_ENODATA, aiodns.error.ARES_EBADNAME)


class AddressPolicy:
    """Which addresses may be connected to: public ones, and those of `allow_private` (CIDRs).

    Raises:
        UserError: an entry is not a network.
    """

    def __init__(self, allow_private: Sequence[str] = ()) -> None:
        self._allowed: list[Network] = []
        for text in allow_private:
            try:
                self._allowed.append(ipaddress.ip_network(text))
            except ValueError:
                raise UserError(
                    f"'{text}' is no network whose private addresses can be allowed; write 10.1.0.0/16"
                ) from None

    def permits(self, text: str) -> bool:
        """Whether this address may be connected to; False for what is no address."""
        try:
            address = _innermost(ipaddress.ip_address(text))
        except ValueError:
            return False
        return any(address in network for network in self._allowed) or _is_public(address)

    def check_literal(self, url: URL) -> None:
        """Refuse a URL whose host is a forbidden address: names are checked when they are resolved."""
        host = url.raw_host or ""
        if (":" in host or host.replace(".", "").isdigit()) and not self.permits(host):
            raise UnfetchableError(PRIVATE_ADDRESS)


def _innermost(address: Address) -> Address:
    """The IPv4 address that an IPv6 one only carries to a translator, or to this machine's own IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return address.ipv4_mapped
        if address in _TRANSLATED:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and (address not in _UNICAST or address.scope_id):
        return False
    if not address.is_global or address.is_multicast or address.is_reserved or address.is_unspecified:
        return False
    return not any(address in network for network in _NOT_PUBLIC)


@dataclass(frozen=True, slots=True)
class _Known:
    until: float
    addresses: tuple[str, ...] = ()
    problem: Problem | None = None


class CheckedResolver(AbstractResolver):
    """Names to addresses, all of them permitted; asked once per name and lifetime, whatever comes of it.

    Made and used within one event loop. Names of the hosts file are known to c-ares itself.

    Args:
        policy: one forbidden address forbids the whole name.
        nameservers: addresses, with ":port" if it is not 53; empty for the system's.
    """

    def __init__(self, policy: AddressPolicy, *, nameservers: Sequence[str] = ()) -> None:
        options: dict[str, Any] = {"nameservers": list(nameservers)} if nameservers else {}
        self._dns = aiodns.DNSResolver(timeout=2.0, tries=3, **options)
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
        known = self._known.get(host)
        if known is None or known.until < self._now():
            known = await self._ask(host)
        if known.problem is not None:
            raise UnfetchableError(known.problem)
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

    async def close(self) -> None:
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)
        await self._dns.close()

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
        if not all(map(self._policy.permits, addresses)):
            return _Known(self._now() + life, problem=PRIVATE_ADDRESS)
        return _Known(self._now() + life, addresses)
