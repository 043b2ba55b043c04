"""Which addresses may be connected to: public ones, on ports where the web is.

URLs come from pages that anybody wrote: one may lead to the cloud's metadata service, to a router, or to this
machine.
"""

import ipaddress
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from yarl import URL

from cluster.errors import UserError
from ingest.web.problems import BLOCKED_PORT, PRIVATE_ADDRESS, UnfetchableError

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
# Where clouds tell a machine its credentials, or what else concerns it alone. Azure's is a public address.
_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        (
            "169.254.169.254",  # most of them
            "fd00:ec2::254", "fd20:ce::254", "fe80::a9fe:a9fe",  # AWS, Google, OpenStack
            "169.254.170.2", "169.254.170.23", "fd00:ec2::23",  # AWS: of containers
            "168.63.129.16", "192.0.0.192", "100.100.100.200",  # Azure, Oracle, Alibaba
            "169.254.0.23", "169.254.42.42", "fd00:42::42", "100.96.0.96",  # Tencent, Scaleway, Volcengine
        ),
    )
)  # fmt: skip
# What browsers do not ask: https://fetch.spec.whatwg.org/#port-blocking. Who listens there may take a line of
# a request for a command.
_BLOCKED_PORTS = frozenset(
    (
        0, 1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101,
        102, 103, 104, 109, 110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389,
        427, 465, 512, 513, 514, 515, 526, 530, 531, 532, 540, 548, 554, 556, 563, 587, 601, 636,
        989, 990, 993, 995, 1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, 6665,
        6666, 6667, 6668, 6669, 6679, 6697, 10080,
    )
)  # fmt: skip
# Seconds and number of what is known of addresses; those of this machine may change.
_LIFE = 60.0
_ADDRESSES_KNOWN = 65_536


class AddressPolicy:
    """Which addresses may be connected to: public ones, but none of this machine or of a cloud's services.

    Args:
        allow_private: networks, as CIDRs, that may be asked too. What is in them but belongs to this machine,
            loopback aside, or to a cloud's services is allowed only by itself: 10.1.2.3.
        deny: networks that may not, whatever is allowed.

    Raises:
        UserError: an entry is not a network.
    """

    def __init__(self, allow_private: Sequence[str] = (), deny: Sequence[str] = ()) -> None:
        self._allowed = _networks(allow_private, "--allow-private")
        self._denied = _networks(deny, "--deny-network")
        self._named = {network.network_address for network in self._allowed if network.num_addresses == 1}
        self._own: tuple[Network, ...] = ()
        self._permitted: dict[str, bool] = {}
        self._known_until = 0.0

    @property
    def allows_private(self) -> bool:
        return bool(self._allowed)

    def permits(self, text: str) -> bool:
        """Whether this address may be connected to; False for what is no address."""
        now = time.monotonic()
        if self._known_until < now or len(self._permitted) > _ADDRESSES_KNOWN:
            self._own, self._permitted, self._known_until = tuple(own_networks()), {}, now + _LIFE
        permitted = self._permitted.get(text)
        if permitted is None:
            permitted = self._permitted[text] = self._may(text, public=True)
        return permitted

    def permits_private(self, text: str) -> bool:
        """Whether this address may be connected to because a network that has it was allowed."""
        return self.permits(text) and self._may(text, public=False)

    def check(self, url: URL) -> None:
        """Refuse a port, and a host that is a forbidden address: names are checked when they are resolved."""
        if url.port in _BLOCKED_PORTS:
            raise UnfetchableError(BLOCKED_PORT)
        host = url.raw_host or ""
        if is_literal(host) and not self.permits(host):
            raise UnfetchableError(PRIVATE_ADDRESS)

    def _may(self, text: str, *, public: bool) -> bool:
        try:
            written = ipaddress.ip_address(text)
        except ValueError:
            return False
        address = _innermost(written)
        if any(address in network or written in network for network in self._denied):
            return False
        if address not in self._named and (address in _METADATA or any(address in own for own in self._own)):
            return False
        return any(address in network for network in self._allowed) or (public and _is_public(address))


def _networks(given: Sequence[str], option: str) -> list[Network]:
    networks: list[Network] = []
    for text in given:
        try:
            networks.append(ipaddress.ip_network(text))
        except ValueError:
            raise UserError(f"{option} '{text}' is no network; write 10.1.0.0/16, or an address") from None
    return networks


def own_networks() -> Iterator[Network]:
    """What the kernel takes for this machine, on any interface but loopback; nothing without /proc/net."""
    with suppress(OSError):
        address = ""
        for line in Path("/proc/net/fib_trie").read_text().splitlines():
            words = line.split()
            if words[0] == "|--":
                address = words[1]
            elif words[-1] == "LOCAL" and not address.startswith("127."):
                yield ipaddress.IPv4Network(address + words[0])
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            if not (six := ipaddress.IPv6Address(bytes.fromhex(line.split()[0]))).is_loopback:
                yield ipaddress.IPv6Network(six)


def is_literal(host: str) -> bool:
    """Whether a URL's host is an address, not a name."""
    return ":" in host or host.replace(".", "").isdigit()


@lru_cache(maxsize=4096)
def place_of(text: str) -> str:
    """What counts as one address: one of IPv4, in any form, or the /64 that a machine has of IPv6."""
    address = _innermost(ipaddress.ip_address(text))
    return str(address if address.version == 4 else ipaddress.ip_network((address, 64), strict=False))


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
