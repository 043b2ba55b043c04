"""Hosts with limits of their own, since owners of large ones do allow more: --host-limits FILE.

A line for each: the host, connections at a time, and requests per second; - for what holds for all others.

# host             connections  requests per second
images.example.org 16           100
*.cdn.example.com  8            -

A name is that host alone. With *. it is each host below, by itself, unless a longer name says otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UserError
from cluster.small_file import read_small
from ingest.web.problems import UnfetchableError
from ingest.web.url import http_url

_ANY = "*."
_AS_OTHERS = "-"
_LEAST = 0.001
# Of a file, in bytes: a hundred thousand hosts.
_LARGEST = 4 << 20
# Nothing of a URL but its host: of IPv6 in brackets.
_NAME = re.compile(r"[^/?#@:\\\[\]*]+|\[[0-9A-Fa-f:.]+\]")


@dataclass(frozen=True, kw_only=True)
class HostLimit:
    """What one host may be asked, or each below it.

    Attributes:
        name: of the host, or *.NAME, as in requests.
        connections: requests under way at a time; None: as of others.
        rate: requests per second; None: as of others.
    """

    name: str
    connections: int | None = None
    rate: float | None = None


class HostLimits:
    """What each host may be asked.

    Args:
        own: of hosts that are not like others.
        connections: of these others.
        rate: of these others; None for as many as they answer.
    """

    def __init__(self, own: Iterable[HostLimit], *, connections: int, rate: float | None) -> None:
        self._own = {limit.name: limit for limit in own}
        self._others = HostLimit(name="", connections=connections, rate=rate)

    def connections(self, host: str) -> int:
        """Requests under way at a time."""
        found = self._of(host).connections or self._others.connections
        assert found is not None
        return found

    def interval(self, host: str) -> float:
        """Seconds from one request to the next, at least."""
        rate = self._of(host).rate or self._others.rate
        return 1 / rate if rate else 0.0

    def _of(self, host: str) -> HostLimit:
        found = self._own.get(host)
        while found is None and self._own and host:
            _, _, host = host.partition(".")
            found = self._own.get(f"{_ANY}{host}")
        return found or self._others


def read_host_limits(path: Path, *, per_address: int) -> tuple[HostLimit, ...]:
    """The hosts of a file, in its order.

    Args:
        path: the file.
        per_address: what no host can have more of, for it has an address.

    Raises:
        UserError: it cannot be read, or a line of it says something else.
    """
    try:
        text = read_small(path, most=_LARGEST).decode()
    except OSError as error:
        raise UserError(
            f"--host-limits {path} cannot be read ({error.strerror}): name a file of lines "
            "HOST CONNECTIONS RATE"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"--host-limits {path} is no text in UTF-8: save it as such") from error
    found: dict[str, HostLimit] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            limit = _limit(words, per_address)
            if limit.name in found:
                raise ValueError(f"{limit.name} is there twice: leave one of them out")
        except ValueError as error:
            raise UserError(f"--host-limits {path}, line {number}: {error}") from None
        found[limit.name] = limit
    return tuple(found.values())


def _limit(words: list[str], per_address: int) -> HostLimit:
    if len(words) not in (2, 3):
        raise ValueError(
            "give the host, its connections, and its requests per second, with blanks in between, "
            "such as: images.example.org 16 100"
        )
    connections, rate = _number(words[1]), _number(words[2]) if len(words) == 3 else None
    if connections is not None and connections != int(connections):
        raise ValueError(f"{words[1]} connections are not a whole number: give one, or {_AS_OTHERS}")
    if connections is not None and connections > per_address:
        raise ValueError(
            f"{words[1]} connections are more than an address may have: give at most {per_address}, or "
            f"--per-address {words[1]}, too"
        )
    return HostLimit(
        name=_name(words[0]), connections=None if connections is None else int(connections), rate=rate
    )


def _name(text: str) -> str:
    """As it is in requests: in lower case, and ASCII."""
    any_below = _ANY if text.startswith(_ANY) else ""
    name = text.removeprefix(any_below)
    try:
        host = http_url(f"http://{name}/").raw_host if _NAME.fullmatch(name) else None
    except UnfetchableError:
        host = None
    if host is None:
        raise ValueError(f"{text} is no host's name: give it without http:// and port, such as example.org")
    return any_below + host


def _number(text: str) -> float | None:
    if text == _AS_OTHERS:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not _LEAST <= value < math.inf:
        raise ValueError(
            f"{text} is no number from {_LEAST} on: give one, or {_AS_OTHERS} for that of others"
        )
    return value
