"""The bytes of an answer, taken as browsers take them: what breaks HTTP's rules without harm is read.

aiohttp's parsers read; this stands before them. It waits for a whole head and mends it, hands on a body and
no byte beyond, and after an answer out of the ordinary has the connection closed. So what becomes of an
answer depends on its bytes, and not on how packets divide them.
"""

import asyncio
import re
from collections import Counter
from typing import Any, NamedTuple

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.http_parser import HttpResponseParserPy

# As in Chrome.
_LONGEST_HEAD = 256 << 10
# aiohttp takes 256 headers; not more lines than this are looked at to find them, nor promises of an answer.
_MOST_LINES = 1024
_MOST_INTERIM = 512
_END = re.compile(rb"\n\r?\n")
_STATUS = re.compile(rb"HTTP/[0-9.]+[ \t]+([0-9]{3})")
_FOLD = re.compile(rb"\r?\n[ \t]+")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_BEGINNING = b"HTTP/"
_LINE = rb"\r\n(?!(?i:content-length|transfer-encoding)[ \t:])[!#$%&'*+.^_`|~0-9A-Za-z-]++:[^\r\n]*+"
# Status and length of a head that needs no mending, as almost all are.
_CLEAN = re.compile(
    rb"HTTP/1\.[01] ([0-9]{3})[^\r\n]*+(?:%b)*+(?:\r\n(?i:content-length):[ \t]*+([0-9]++)[ \t]*+)?+(?:%b)*+"
    % (_LINE, _LINE)
)
# What aiohttp's parser in Python is given at a time: for each chunk it copies all that follows.
_PIECE = 4096
_LONGEST_CHUNK_LINE = 1024
# Of chunks, what belongs to no data: sizes, what is said beside them, and headers behind the last. So much is
# free, and a sixteenth of the data.
_FREE_OVERHEAD = 16 << 10
_LARGEST_OVERHEAD = 1 / 16
# What aiohttp's parser in C is given of chunks at a time: they may be tiny, and many.
_CHUNKS = 32 << 10


class Head(NamedTuple):
    """The status line and headers of an answer.

    Attributes:
        data: as aiohttp's parsers take it.
        status: 0 if there is none.
        clean: it is as it came.
        odd: it broke a rule, and the connection is to be closed after it.
        chunked: the body comes in chunks.
        length: bytes of the body, of the one length that is told; None if it ends with the connection.
    """

    data: bytes
    status: int
    clean: bool
    odd: bool
    chunked: bool
    length: int | None

    @property
    def interim(self) -> bool:
        """Whether another answer follows, to the same request."""
        return 100 <= self.status < 200 and self.status != 101

    @property
    def is_redirect(self) -> bool:
        return 300 <= self.status < 400 and b"\nlocation:" in self.data.lower()


def mended(head: bytes) -> Head:
    """A head, without its empty line, as browsers read it.

    A blank before the colon is left out, and so is a line that is no header. Chunks win over a length (RFC
    9112 §6.3), equal lengths are one (RFC 9110 §8.6), and transfer codings but chunks are none. Of unequal
    lengths all are kept: aiohttp refuses them.
    """
    head = head.removesuffix(b"\r")
    if head.count(b"\n") > _MOST_LINES:
        return _head(b"no HTTP\r\n\r\n", 0, odd=True)
    if clean := _CLEAN.fullmatch(head):
        length = int(clean[2]) if clean[2] else None
        return _head(head + b"\r\n\r\n", int(clean[1]), clean=True, length=length)
    first, *lines = (line.rstrip(b"\r") for line in _FOLD.sub(b" ", head).split(b"\n"))
    first = first[:5].upper() + first[5:]
    kept, lengths, codings = [first], [], []
    odd = False
    for line in lines:
        name, colon, value = line.partition(b":")
        bare = name.rstrip(b" \t")
        odd |= not colon or not _NAME.fullmatch(name)
        if bare.lower() == b"content-length":
            lengths += [each.strip() for each in value.split(b",")]
        elif bare.lower() == b"transfer-encoding":
            codings += [each.strip().lower() for each in value.split(b",")]
        elif colon and _NAME.fullmatch(bare):
            kept.append(bare + colon + value)
    chunked = b"chunked" in codings
    odd |= codings not in ([], [b"chunked"]) or len(lengths) > (not chunked)
    if chunked:
        kept.append(b"Transfer-Encoding: chunked")
    else:
        lengths = list(dict.fromkeys(lengths))
        kept += [b"Content-Length: " + each for each in lengths]
    length = int(lengths[0]) if not chunked and len(lengths) == 1 and lengths[0].isdigit() else None
    found = _STATUS.match(first)
    data = b"\r\n".join([*kept, b"", b""])
    return _head(data, int(found[1]) if found else 0, odd=odd, chunked=chunked, length=length)


def _head(
    data: bytes,
    status: int,
    *,
    clean: bool = False,
    odd: bool = False,
    chunked: bool = False,
    length: int | None = None,
) -> Head:
    if 100 <= status < 200 or status in (204, 304):
        chunked, length = False, 0
    return Head(data, status, clean, odd, chunked, length)


class Opened:
    """How many connections there are, in all and at each address."""

    def __init__(self) -> None:
        self.in_all = 0
        self.at = Counter[str]()

    def count(self, address: str, change: int) -> None:
        self.in_all += change
        self.at[address] += change
        if not self.at[address]:
            del self.at[address]


class AnswerHandler(ResponseHandler):
    """aiohttp's end of a connection, for one answer after another."""

    def __init__(self, loop: asyncio.AbstractEventLoop, opened: Opened | None = None) -> None:
        super().__init__(loop)
        self._opened = Opened() if opened is None else opened
        self.peer = ""
        self._used = False
        self._in_head = self._in_body = False
        self._beginning = bytearray()
        self._head_ends: re.Match[bytes] | None = None
        self._head: Head | None = None
        self._left = 0
        self._mended: Head | None = None
        self._interim = 0
        self._step = 0
        self._chunked = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.peer = (transport.get_extra_info("peername") or ("",))[0]
        self._opened.count(self.peer, 1)

    def close(self) -> None:
        """At once: TLS would wait for the other side to agree, and what is not sent for it to read."""
        self.abort()

    def set_response_params(self, **params: Any) -> None:
        self._params = params
        self._used = self._head is not None
        self._in_head, self._in_body = True, False
        self._interim = 0
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        if not data:
            super().data_received(data)
            return
        if self._in_head:
            data = self._take_heads(data)
        if data and self._in_body:
            data = self._take_body(data)
        if data and self.transport is not None:
            # More than the answer: nothing on this connection can be trusted any more.
            self._should_close = True
            self.transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._opened.count(self.peer, -1)
        if self._in_head:
            self._take_end(exc)
        super().connection_lost(exc)

    def _take_heads(self, data: bytes) -> bytes:
        """Up to the head that a body follows; returns what is behind it, or b"" if it is not here yet."""
        while self._in_head:
            seen = len(self._beginning)
            if seen:
                self._beginning += data[: _LONGEST_HEAD + _LONGEST_CHUNK_LINE + 4 - seen]
            else:
                data = data.lstrip(b"\r\n")
            # Seldom more than one packet: a body behind the head is not copied.
            known = self._beginning if seen else data
            if known[:5].upper() != _BEGINNING[: len(known)]:
                # On a used connection it may be the rest of the answer before: aiohttp asks again on another.
                self._refuse(aiohttp.ServerDisconnectedError() if self._used else BadHttpMessage("no HTTP"))
                return b""
            if self._head_ends is None:
                self._head_ends = _END.search(known, max(0, seen - 3), _LONGEST_HEAD + 4)
            if self._head_ends is None and len(known) >= _LONGEST_HEAD + 4:
                self._refuse(BadHttpMessage("headers without end"))
                return b""
            head, lines_of_lf = self._whole_head(known)
            if head is None:
                if not seen:
                    self._beginning += data
                return b""
            assert self._head_ends is not None
            end = self._head_ends.end()
            if not seen and head.clean and head.length is not None and len(data) <= end + head.length:
                # As almost always: nothing is mended, or copied.
                self._begin(head, data, body=len(data) - end)
                return b""
            data = data[end - seen :] if end >= seen else bytes(known[end:]) + data[len(known) - seen :]
            self._begin(head, head.data, lines_of_lf=lines_of_lf)
        return data

    def _whole_head(self, known: bytes | bytearray) -> tuple[Head | None, bool]:
        """The head, and whether lines of chunks behind it end with LF alone; None if that is not here yet."""
        if self._head_ends is None:
            return None, False
        start, end = self._head_ends.span()
        head = self._mended = self._mended or mended(bytes(known[:start]))
        if not head.chunked:
            return head, False
        line_end = known.find(b"\n", end, end + _LONGEST_CHUNK_LINE)
        if line_end < 0 and len(known) < end + _LONGEST_CHUNK_LINE:
            return None, False
        return head, known[line_end - 1 : line_end] not in (b"\r", b"")

    def _begin(self, head: Head, data: bytes, *, body: int = 0, lines_of_lf: bool = False) -> None:
        """Hand the head, and so many bytes of the body behind it, to the parser that takes them."""
        self._beginning.clear()
        self._head, self._head_ends, self._mended = head, None, None
        self._should_close |= head.odd
        self._step, self._chunked = _CHUNKS, 0
        if lines_of_lf:
            # aiohttp's parser in C does not take such chunks.
            limits = {name: self._params[name] for name in ("max_line_size", "max_field_size", "max_headers")}
            self._step = _PIECE
            self._parser = HttpResponseParserPy(
                self,
                self._loop,
                self._params["read_bufsize"],
                timer=self._params["timer"],
                payload_exception=BadHttpMessage,
                auto_decompress=self._params["auto_decompress"],
                **limits,
            )
        super().data_received(data)
        self._in_head = head.interim and self._exception is None
        self._interim += self._in_head
        if self._interim > _MOST_INTERIM:
            self._refuse(BadHttpMessage("promises without end"))
        self._left = (head.length or 0) - body
        self._in_body = not self._in_head and self._exception is None and head.length != body

    def _take_body(self, data: bytes) -> bytes:
        """Returns what is behind the body."""
        assert self._head is not None
        if self._head.chunked:
            return self._take_chunks(data)
        if self._head.length is None:
            super().data_received(data)
            return b""
        mine = data[: self._left]
        self._left -= len(mine)
        self._in_body = self._left > 0
        super().data_received(mine)
        return data[len(mine) :]

    def _take_chunks(self, data: bytes) -> bytes:
        payload = self._payload
        if payload is None:
            return b""
        for at in range(0, len(data), self._step):
            piece = data[at : at + self._step]
            super().data_received(piece)
            if payload.is_eof():
                self._in_body = False
                behind = self._parser._tail if self._step == _PIECE and self._parser is not None else b""
                return behind + data[at + self._step :]
            self._chunked += len(piece)
            overhead = self._chunked - payload.total_bytes
            if (
                overhead > _FREE_OVERHEAD + _LARGEST_OVERHEAD * payload.total_bytes
                and payload.exception() is None
            ):
                payload.set_exception(BadHttpMessage("little in many chunks"))
            if self._exception is not None or payload.exception() is not None:
                self._in_body = False
                # The end of the connection, which comes now, shall not pass for what was wrong.
                self._payload = None
                if payload.exception() is None:
                    payload.set_exception(BadHttpMessage("chunks"))
                return b""
        return b""

    def _take_end(self, exc: BaseException | None) -> None:
        """The connection ends where more was to come."""
        if self._head_ends is not None:
            head = mended(bytes(self._beginning[: self._head_ends.start()]))
            self._begin(head, head.data)
            return
        # Behind a whole header that leads elsewhere, it ended an answer without body.
        whole = bytes(self._beginning[: self._beginning.rfind(b"\n") + 1]).rstrip(b"\r\n")
        encrypted = self.transport is not None and self.transport.get_extra_info("sslcontext") is not None
        head = mended(whole)
        if exc is None and not encrypted and head.is_redirect:
            head = mended(whole + b"\nContent-Length: 0")
            self._begin(head, head.data)
            self._should_close = True

    def _refuse(self, error: Exception) -> None:
        self._in_head = False
        self.set_exception(error)
        if self.transport is not None:
            self.transport.abort()
