"""Undo a Content-Encoding piece by piece, with a bound on what comes out: gzip, deflate, Brotli."""

import zlib
from typing import Protocol

import brotli

# Images hardly shrink, and robots.txt not that much; the first bytes may.
_LARGEST_RATIO = 200
_RATIO_FREE = 1 << 20
# Members of a gzip, each of which costs the time of a larger one, are not that small.
_SMALLEST_MEMBER = 512
_MEMBERS_FREE = 64
_READ = frozenset(["gzip", "x-gzip", "deflate", "br"])
# To take them for what they encode would be to see no rules in a robots.txt, and no image in an image.
_NOT_READ = frozenset(["zstd", "compress", "x-compress", "dcb", "dcz"])


class BadEncodingError(Exception):
    """The bytes are not what the Content-Encoding says."""


class BombError(Exception):
    """Suspiciously much comes out of little."""


class Decoder(Protocol):
    """`feed` gives what a piece decodes to, little more than `limit` bytes, and holds back the rest: for that
    feed it b"", before another piece. `complete`: the end was seen.
    """

    def feed(self, data: bytes, limit: int) -> bytes: ...

    @property
    def complete(self) -> bool: ...


def decoder(content_encoding: str) -> Decoder | None:
    """The decoder of a header's value; None if the bytes are to be taken as they are.

    As browsers do, unknown words ("utf-8", "none") are passed over: what the bytes are is seen from them.

    Raises:
        BadEncodingError: encodings are stacked, or there is one that browsers know and this does not.
    """
    words = [word.strip().lower() for word in content_encoding.split(",")]
    known = [word for word in words if word in _READ or word in _NOT_READ]
    if len(known) > 1 or not _NOT_READ.isdisjoint(known):
        raise BadEncodingError(content_encoding)
    if not known:
        return None
    return _Brotli() if known == ["br"] else _Zlib(gzip=known != ["deflate"])


def check_ratio(decoded: int, encoded: int) -> None:
    if decoded > _RATIO_FREE + _LARGEST_RATIO * encoded:
        raise BombError


class _Zlib:
    """gzip, of one member or several; deflate with its zlib header, or, as some servers send it, without."""

    def __init__(self, *, gzip: bool) -> None:
        self._gzip = gzip
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 16) if gzip else None
        self._held_back = b""
        self._members = self._seen = 0

    @property
    def complete(self) -> bool:
        return self._inflate is None or self._inflate.eof

    def feed(self, data: bytes, limit: int) -> bytes:
        self._seen += len(data)
        data, self._held_back = self._held_back + data, b""
        if self._inflate is None:
            if not data:
                return b""
            bare = data[0] & 0x0F != 8
            self._inflate = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS)
        pieces: list[bytes] = []
        left = limit + 1
        try:
            while True:
                if self._inflate.eof:
                    # Another member; anything else behind the end is padding.
                    if not self._gzip or not data.startswith(b"\x1f"):
                        break
                    self._members += 1
                    if self._members > _MEMBERS_FREE + self._seen // _SMALLEST_MEMBER:
                        raise BadEncodingError("tiny members")
                    self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 16)
                pieces.append(self._inflate.decompress(data, left))
                left -= len(pieces[-1])
                data = self._inflate.unconsumed_tail or self._inflate.unused_data
                if left <= 0:
                    self._held_back = data
                    break
                if not data:
                    break
        except zlib.error as error:
            raise BadEncodingError(str(error)) from error
        return b"".join(pieces)


class _Brotli:
    def __init__(self) -> None:
        self._decompressor = brotli.Decompressor()

    @property
    def complete(self) -> bool:
        return bool(self._decompressor.is_finished())

    def feed(self, data: bytes, limit: int) -> bytes:
        pieces: list[bytes] = []
        left = limit + 1
        try:
            while left > 0:
                piece = self._decompressor.process(data, output_buffer_limit=left)
                pieces.append(piece)
                left -= len(piece)
                data = b""
                if self._decompressor.can_accept_more_data() or not piece:
                    break
        except brotli.error as error:
            raise BadEncodingError(str(error)) from error
        return b"".join(pieces)
