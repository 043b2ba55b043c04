"""One request over one shared pool of connections: what is asked, what is believed, and how much is read."""

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import metadata

import aiohttp
from yarl import URL

from cluster.errors import UserError
from ingest.problem import Problem
from ingest.web.addresses import AddressPolicy
from ingest.web.connector import Connector
from ingest.web.content_encoding import BadEncodingError, BombError, check_ratio, decoder
from ingest.web.host_queues import KEPT_ALIVE
from ingest.web.problems import (
    BAD_HTTP,
    BAD_URL,
    CONNECT_FAILED,
    DEADLINE,
    FETCHER_ERROR,
    RESET,
    TLS_INVALID,
    UnfetchableError,
    after_answer,
    answered,
    retry_after,
)
from ingest.web.resolver import CheckedResolver
from ingest.web.room import Room

_READ = 256 << 10
# Some sites' security policies are long.
_LONGEST_HEADER = 32 << 10
_MOST_HEADERS = 256
_REDIRECTS = (301, 302, 303, 307, 308)
_GOOD = (200, 201, 202, 203)
_PART = re.compile(r"bytes\s+0-([0-9]{1,15})/([0-9]{1,15})", re.IGNORECASE)
_ACCEPT = "image/jpeg, image/png, image/webp, image/gif, image/*;q=0.5, */*;q=0.1"
# Bodies of errors and redirects up to this size are read to their end, for the sake of the connection.
_SMALL_REST = 64 << 10
_REST_SECONDS = 1.0
# Bodies that outgrow the first share the room: that bounds memory.
_FREE_BYTES = 1 << 20
_ROOM = 128 << 20
_STEP = 1 << 20

Judge = Callable[[aiohttp.ClientResponse], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """A good answer's body, or where a redirect points."""

    status: int
    data: bytes
    location: str | None = None


def user_agent(token: str, contact: str | None) -> str:
    """Who we are.

    Raises:
        UserError: the contact is neither a URL nor an e-mail address.
    """
    name = f"{token}/{metadata.version('seer-pipeline')}"
    if contact is None:
        return name
    if not re.fullmatch(r"(https?://|mailto:)?[!-'*-~]+", contact) or not re.search(r"@|^https?://", contact):
        raise UserError(
            f"contact '{contact}' is neither a URL nor an e-mail address; give one of them for the User-Agent"
        )
    return f"{name} (+{contact})"


class HttpClient:
    """Connections, made and used within one event loop.

    Args:
        agent: the User-Agent.
        policy: addresses that may be connected to, on every request.
        resolver: of names, by the same policy.
        per_address: connections to an address beyond which none is kept when it is not needed.
    """

    def __init__(
        self, *, agent: str, policy: AddressPolicy, resolver: CheckedResolver, per_address: int
    ) -> None:
        self._policy = policy
        connector = Connector(
            per_address=per_address,
            ssl=ssl.create_default_context(),
            resolver=resolver,
            use_dns_cache=False,
            limit=0,
            keepalive_timeout=KEPT_ALIVE,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={"User-Agent": agent, "Accept": _ACCEPT, "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            # Deadlines are the caller's, over several requests.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            read_bufsize=_READ,
            max_line_size=_LONGEST_HEADER,
            max_field_size=_LONGEST_HEADER,
            max_headers=_MOST_HEADERS,
        )
        self._room = Room(_ROOM)

    async def close(self) -> None:
        await self._session.close()

    async def get(
        self,
        url: URL,
        *,
        keep_alive: bool,
        judge: Judge,
        body: Callable[[aiohttp.ClientResponse], Awaitable[bytes]],
    ) -> Answer:
        """Ask once; redirects are told, not followed.

        Args:
            url: as `http_url` makes it.
            keep_alive: False asks the server to close the connection.
            judge: is shown a good answer's headers; raises to refuse the body.
            body: reads it.

        Raises:
            UnfetchableError: no good answer, or no whole body.
        """
        self._policy.check(url)
        status: int | None = None
        try:
            async with self._session.get(
                url, allow_redirects=False, headers=None if keep_alive else {"Connection": "close"}
            ) as response:
                status = response.status
                if status in _REDIRECTS and (location := response.headers.get("Location")):
                    await _read_small_rest(response)
                    return Answer(status, b"", location)
                if status not in _GOOD and not _is_whole(response):
                    await _read_small_rest(response)
                    wait = retry_after(response.headers.get("Retry-After"))
                    raise UnfetchableError(answered(status), retry_after=wait)
                judge(response)
                return Answer(status, await body(response))
        except (aiohttp.ClientError, aiohttp.http.HttpProcessingError, OSError) as error:
            if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError):
                raise
            if status is None:
                raise UnfetchableError(no_answer(error) or FETCHER_ERROR) from error
            raise (broken_body(error, status) or UnfetchableError(FETCHER_ERROR)) from error

    async def whole_body(
        self, response: aiohttp.ClientResponse, *, max_bytes: int, deadline: asyncio.Timeout
    ) -> bytes:
        """All of a body, decoded, and never more than `max_bytes`.

        The deadline is put off for as long as a large body waits for room.
        """
        if (response.content_length or 0) > max_bytes:
            raise after_answer("too_many_bytes", response.status, rejected=True)
        reader = _BodyReader(response, max_bytes)
        if await reader.read(min(_FREE_BYTES, max_bytes)):
            return reader.joined()
        try:
            while True:
                if not self._room.take(reader, _STEP):
                    await self._wait_for_room(reader, deadline)
                if await reader.read(min(reader.taken + _STEP, max_bytes)):
                    return reader.joined()
                # What has come already would be decoded at a stretch.
                await asyncio.sleep(0)
        finally:
            self._room.leave(reader)

    async def _wait_for_room(self, reader: "_BodyReader", deadline: asyncio.Timeout) -> None:
        now = asyncio.get_running_loop().time
        end, began = deadline.when(), now()
        deadline.reschedule(None)
        await self._room.wait(reader, _STEP)
        deadline.reschedule(None if end is None else end + now() - began)

    async def start_of_body(self, response: aiohttp.ClientResponse, *, max_bytes: int) -> bytes:
        """The body's first `max_bytes`, decoded; the rest is not read."""
        reader = _BodyReader(response, max_bytes, cut=True)
        await reader.read(max_bytes)
        return reader.joined()[:max_bytes]


class _BodyReader:
    """Reads a body in steps; `cut` takes its beginning for enough."""

    def __init__(self, response: aiohttp.ClientResponse, max_bytes: int, *, cut: bool = False) -> None:
        self._status = response.status
        self._stream = response.content
        self._max_bytes = max_bytes
        self._cut = cut
        self._pieces: list[bytes] = []
        self._encoded = self._size = 0
        try:
            self._decoder = decoder(response.headers.get("Content-Encoding", ""))
        except BadEncodingError as error:
            raise after_answer("bad_encoding", self._status) from error

    @property
    def taken(self) -> int:
        """Bytes so far, as they came or as they are decoded."""
        return max(self._size, self._encoded)

    def joined(self) -> bytes:
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    async def read(self, until: int) -> bool:
        """Read on, to the end (True) or beyond `until` bytes, encoded or decoded (False)."""
        piece = b""  # at first, what the decoder holds back
        while True:
            if self._decoder is not None:
                piece = self._decoded(piece, until)
            if piece:
                self._size += len(piece)
                self._pieces.append(piece)
            if self._size > until or self._encoded > until:
                if self._size > self._max_bytes or self._encoded > self._max_bytes:
                    if self._cut:
                        return True
                    raise after_answer("too_many_bytes", self._status, rejected=True)
                return False
            if not (piece := await self._stream.readany()):
                break
            self._encoded += len(piece)
        if self._decoder is not None and not self._decoder.complete and not self._cut:
            raise after_answer("truncated_body", self._status, retryable=True)
        return True

    def _decoded(self, piece: bytes, until: int) -> bytes:
        assert self._decoder is not None
        try:
            decoded = self._decoder.feed(piece, until - self._size)
            check_ratio(self._size + len(decoded), self._encoded)
        except BadEncodingError as error:
            raise after_answer("bad_encoding", self._status) from error
        except BombError as error:
            raise after_answer("decompression_bomb", self._status, rejected=True) from error
        return decoded


def _is_whole(response: aiohttp.ClientResponse) -> bool:
    """Whether this partial answer, which nobody asked for, is of the whole: `bytes 0-8/9`."""
    part = _PART.fullmatch(response.headers.get("Content-Range", "").strip())
    return response.status == 206 and part is not None and int(part[1]) + 1 == int(part[2])


async def _read_small_rest(response: aiohttp.ClientResponse) -> None:
    """A connection can be used again only after its last answer has been read."""
    length = response.content_length
    if response.content.is_eof() or length is None or length > _SMALL_REST:
        return
    try:
        async with asyncio.timeout(_REST_SECONDS):
            while await response.content.readany():
                pass
    except (TimeoutError, aiohttp.ClientError):
        response.close()


def no_answer(error: Exception) -> Problem | None:
    """What an error of the HTTP client means before the headers are here; None if it is not the network's."""
    kinds: tuple[tuple[type[Exception] | tuple[type[Exception], ...], Problem], ...] = (
        ((aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError), TLS_INVALID),
        ((aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError), CONNECT_FAILED),
        (aiohttp.ServerTimeoutError, DEADLINE),
        ((aiohttp.ClientResponseError, aiohttp.http.HttpProcessingError), BAD_HTTP),
        ((aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError), BAD_URL),
        ((aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, aiohttp.ClientConnectionError), RESET),
        (aiohttp.ClientError, BAD_HTTP),
        (asyncio.TimeoutError, DEADLINE),
        (OSError, CONNECT_FAILED),
    )
    return next((problem for kind, problem in kinds if isinstance(error, kind)), None)


def broken_body(error: Exception, status: int) -> UnfetchableError | None:
    """What an error of the HTTP client means while the body is read; None if it is not the network's."""
    if isinstance(error, (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
        return after_answer("truncated_body", status, retryable=True)
    if isinstance(error, (aiohttp.ClientError, aiohttp.http.HttpProcessingError)):
        return after_answer("bad_http", status)
    return None
