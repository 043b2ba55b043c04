"""Which addresses may be asked, and names resolved to them: the crawler never reaches into private networks.

A name is resolved once, its answers are checked, and only checked addresses are connected to, so that a name
cannot be one thing when it is judged and another when it is used.
"""

import asyncio
import socket
import time
from collections import OrderedDict
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import aiodns
from aiohttp.abc import AbstractResolver, ResolveResult

from cluster.errors import UserError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_KEEP_SECONDS = 300.0
_KEEP_FAILURES_SECONDS = 60.0
_NAMES_KEPT = 100_000
# IPv6 forms that carry an IPv4 address in their last 32 bits: a gateway would pass them on to it.
_CARRIERS = (ip_network("64:ff9b::/96"), ip_network("::ffff:0:0/96"), ip_network("::/96"))
_NOT_THERE = (aiodns.error.ARES_ENOTFOUND, aiodns.error.ARES_ENODATA, aiodns.error.ARES_EBADNAME)


class NameFailure(OSError):  # noqa: N818 -- aiohttp wants an OSError
    """Why a name has no address that may be asked.

    Attributes:
        reason: private_address, dns_not_found or dns_failed.
    """

    def __init__(self, reason: str, name: str) -> None:
        super().__init__(f"{reason}: {name}")
        self.reason = reason


def parse_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Networks of CIDR texts such as 10.0.0.0/8.

    Raises:
        UserError: one is none.
    """
    try:
        return tuple(ip_network(text) for text in texts)
    except ValueError as error:
        raise UserError(f"--allow-private: {error}: give networks such as 10.0.0.0/8") from error


def may_be_asked(address: Address, allowed: Sequence[Network]) -> bool:
    """Whether it is a public unicast address, or lies in an allowed network."""
    if any(address.version == network.version and address in network for network in allowed):
        return True
    if isinstance(address, IPv6Address):
        inner = _carried(address)
        if inner is not None:
            return may_be_asked(inner, allowed)
    return address.is_global and not address.is_multicast and not address.is_reserved


def _carried(address: IPv6Address) -> IPv4Address | None:
    if any(address in carrier for carrier in _CARRIERS):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    if address.sixtofour is not None:
        return address.sixtofour
    return None if address.teredo is None else address.teredo[1]


class CheckedResolver(AbstractResolver):
    """Names to addresses that may be asked; remembers answers and failures for minutes.

    Args:
        allowed: networks that may be asked though they are not public.
    """

    def __init__(self, allowed: Sequence[Network]) -> None:
        self._allowed = allowed
        self._dns = aiodns.DNSResolver()
        self._known: OrderedDict[str, tuple[float, asyncio.Task[list[str] | NameFailure]]] = OrderedDict()

    def check_literal(self, host: str) -> None:
        """Refuse a URL's host that is an address in itself: nobody would resolve it.

        Raises:
            NameFailure: it may not be asked.
        """
        try:
            address = ip_address(host.strip("[]").partition("%")[0])
        except ValueError:
            return
        if not may_be_asked(address, self._allowed):
            raise NameFailure("private_address", host)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of a name; called by the connector.

        Raises:
            NameFailure: it has none that may be asked.
        """
        addresses = await self._addresses(host.rstrip(".").lower())
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        """Let go of the DNS sockets."""
        for _, task in self._known.values():
            task.cancel()
        await self._dns.close()

    async def _addresses(self, name: str) -> list[str]:
        expires, task = self._known.get(name, (0.0, None))
        if task is None or time.monotonic() > expires:
            task = asyncio.create_task(self._look_up(name))
            self._known[name] = time.monotonic() + _KEEP_SECONDS, task
            while len(self._known) > _NAMES_KEPT:
                self._known.popitem(last=False)
        # One lookup serves all who wait; none of them may cancel it.
        found = await asyncio.shield(task)
        if isinstance(found, NameFailure):
            self._known[name] = min(self._known[name][0], time.monotonic() + _KEEP_FAILURES_SECONDS), task
            raise NameFailure(found.reason, name)
        return found

    async def _look_up(self, name: str) -> list[str] | NameFailure:
        """Addresses, or why there are none: as a value, for perhaps nobody waits any more."""
        try:
            found = await self._dns.getaddrinfo(name, family=socket.AF_UNSPEC, type=socket.SOCK_STREAM)
        except aiodns.error.DNSError as error:
            return NameFailure("dns_not_found" if error.args[0] in _NOT_THERE else "dns_failed", name)
        except UnicodeError:
            return NameFailure("dns_not_found", name)
        texts = [node.addr[0].decode() for node in found.nodes]
        public = [text for text in texts if may_be_asked(ip_address(text.partition("%")[0]), self._allowed)]
        if not public:
            return NameFailure("private_address" if texts else "dns_not_found", name)
        # IPv4 first: on many machines that crawl, IPv6 leads nowhere.
        return sorted(dict.fromkeys(public), key=lambda text: ":" in text)
