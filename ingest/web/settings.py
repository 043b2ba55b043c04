"""How sites are asked."""

from dataclasses import dataclass

from ingest.web.host_limits import HostLimit, HostLimits
from ingest.web.opt_outs import ALL, OptOut


@dataclass(frozen=True, kw_only=True)
class FetchSettings:
    """How images are fetched.

    Attributes:
        contact: a URL or an e-mail address for the User-Agent, where a site's owner finds us.
        deadline: seconds for one try, from the name's resolution to the last byte, redirects included.
        tries: per URL, for what may succeed later, with growing pauses between.
        max_bytes: of a body, encoded and decoded.
        max_redirects: followed in one try.
        per_host: requests of one host under way at a time.
        per_address: requests under way at a time of all hosts that share an address.
        per_host_rate: requests per second of one host; None for as many as it answers.
        connections: requests under way at a time, of all hosts.
        host_limits: hosts with limits of their own, which come before `per_host` and `per_host_rate`.
        give_up_at: when what was not asked for fails, seconds since 1970; None: never.
        robots: ask for robots.txt, and obey it.
        heeded: ways to opt out that are obeyed, besides robots.txt's Disallow.
        allow_private: networks, as CIDRs, that may be asked though they are not public.
        deny_network: networks, as CIDRs, that may not be asked, whatever is allowed.
    """

    contact: str | None = None
    deadline: float = 20.0
    tries: int = 3
    max_bytes: int = 32 << 20
    max_redirects: int = 5
    per_host: int = 2
    per_address: int = 32
    per_host_rate: float | None = None
    connections: int = 256
    host_limits: tuple[HostLimit, ...] = ()
    give_up_at: float | None = None
    robots: bool = True
    heeded: frozenset[OptOut] = ALL
    allow_private: tuple[str, ...] = ()
    deny_network: tuple[str, ...] = ()

    def limits(self) -> HostLimits:
        """What each host may be asked."""
        return HostLimits(self.host_limits, connections=self.per_host, rate=self.per_host_rate)
