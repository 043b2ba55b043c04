"""One request for one URL: sent only where it may be, and read only as far as is allowed.

Redirects are not followed here: whoever asks decides anew for each of them. Whatever a server does ends as an
answer, a redirect, or a problem, within the caller's deadline and in bounded memory.
"""

import ssl
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import aiohttp
import brotli
from yarl import URL

from ingest.addresses import CheckedResolver, NameFailure, Network
from ingest.robots import opts_out
from ingest.sources.source import Problem

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LATER = frozenset({408, 425, 429, 500, 502, 503, 504})
_KEEP_ALIVE_SECONDS = 15.0
_READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server said.

    Attributes:
        body: the picture's bytes, or why there are none.
        http_status: None if the server has not said any.
        redirect: where it points to, if that is all it says.
        wait: seconds that the host wants to be left alone (Retry-After).
        bytes_read: of the body, as it came over the network.
    """

    body: bytes | Problem
    http_status: int | None = None
    redirect: str | None = None
    wait: str | None = None
    bytes_read: int = 0


class HttpClient:
    """Connections, names and limits that all requests of a process share; an async context manager.

    Args:
        allowed: networks that may be asked though they are not public.
        agent: the User-Agent.
        connections: at a time, over all hosts.
    """

    def __init__(self, *, allowed: Sequence[Network], agent: str, connections: int) -> None:
        self._resolver = CheckedResolver(allowed)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                ssl=ssl.create_default_context(),
                resolver=self._resolver,
                use_dns_cache=False,
                limit=connections,
                keepalive_timeout=_KEEP_ALIVE_SECONDS,
            ),
            headers={"User-Agent": agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            skip_auto_headers=("Content-Type",),
            cookie_jar=aiohttp.DummyCookieJar(),
            # The caller's deadline holds for the whole of it.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            auto_decompress=False,
            read_bufsize=_READ_BYTES,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        await self._resolver.close()

    async def get(self, url: str, *, max_bytes: int, x_robots: bool) -> Answer:
        """Ask for a URL. Raises nothing but TimeoutError, if the caller's deadline passes.

        Args:
            url: what to ask for.
            max_bytes: more of a body is not read, nor unpacked.
            x_robots: whether X-Robots-Tag is heeded, before the body is read.
        """
        try:
            target = URL(url)
            if target.scheme not in ("http", "https") or not target.host or target.port == 0:
                return _rejected("not_http_url")
            self._resolver.check_literal(target.host)
            async with self._session.get(target, allow_redirects=False) as response:
                return await _judged(response, max_bytes, x_robots)
        except TimeoutError:
            raise
        except Exception as error:
            return Answer(body=_problem(error))


async def _judged(response: aiohttp.ClientResponse, max_bytes: int, x_robots: bool) -> Answer:
    status, headers = response.status, response.headers
    if status in _REDIRECTS and "Location" in headers:
        return Answer(body=b"", http_status=status, redirect=headers["Location"])
    if not 200 <= status < 300:
        later = status in _LATER
        problem = Problem("failed", f"http_{status}", retryable=later, http_status=status)
        return Answer(body=problem, http_status=status, wait=headers.get("Retry-After") if later else None)
    if x_robots and opts_out(headers.getall("X-Robots-Tag", ())):
        return _rejected("x_robots_tag", status)
    return await _read(response, max_bytes)


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> Answer:
    status = response.status
    length = response.content_length
    if length is not None and length > max_bytes:
        return _rejected("too_many_bytes", status)
    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            return _rejected("too_many_bytes", status, bytes_read=size)
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    body = _decoded(b"".join(parts), encoding, max_bytes)
    if isinstance(body, Problem):
        body = replace(body, http_status=status)
    return Answer(body=body, http_status=status, bytes_read=size)


def _rejected(reason: str, http_status: int | None = None, bytes_read: int = 0) -> Answer:
    problem = Problem("rejected", reason, http_status=http_status)
    return Answer(body=problem, http_status=http_status, bytes_read=bytes_read)


def _decoded(data: bytes, encoding: str, max_bytes: int) -> bytes | Problem:
    """Without the Content-Encoding, which nobody asked for; never more than `max_bytes` and one."""
    try:
        if encoding in ("", "identity"):
            return data
        if encoding in ("gzip", "x-gzip", "deflate"):
            decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)
            out = decoder.decompress(data, max_bytes + 1)
            whole = decoder.eof
        elif encoding == "br":
            brotli_decoder = brotli.Decompressor()
            out = brotli_decoder.process(data, output_buffer_limit=max_bytes + 1)
            whole = brotli_decoder.is_finished()
        else:
            return Problem("failed", "unknown_encoding")
    except (zlib.error, brotli.error):
        return Problem("failed", "bad_encoding")
    if len(out) > max_bytes:
        return Problem("rejected", "too_many_bytes")
    return out if whole else Problem("failed", "truncated_body", retryable=True)


# In this order: the kinds of trouble, narrow before wide.
_TROUBLES: tuple[tuple[tuple[type[Exception], ...], Problem], ...] = (
    (
        (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError, ssl.SSLError),
        Problem("failed", "tls_invalid"),
    ),
    ((aiohttp.ClientConnectorError,), Problem("failed", "connect_failed", retryable=True)),
    ((aiohttp.ClientPayloadError,), Problem("failed", "truncated_body", retryable=True)),
    ((aiohttp.ClientResponseError,), Problem("failed", "bad_response")),
    ((aiohttp.InvalidURL, ValueError), Problem("rejected", "not_http_url")),
    ((aiohttp.ClientError, OSError), Problem("failed", "connection_lost", retryable=True)),
)


def _problem(error: Exception) -> Problem:
    """What became of a request that has no answer."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, NameFailure):
        return _name_problem(cause)
    for kinds, problem in _TROUBLES:
        if isinstance(error, kinds):
            return problem
    raise error


def _name_problem(failure: NameFailure) -> Problem:
    if failure.reason == "private_address":
        return Problem("rejected", failure.reason)
    return Problem("failed", failure.reason, retryable=failure.reason == "dns_failed")
