"""Zstandard as a file that can be read and sought in, as gzip's, bzip2's and xz's of the standard library."""

import io
import os
from collections.abc import Callable
from typing import Any

import pyarrow as pa

_PIECE = 1 << 20


class ZstdFile(io.RawIOBase):
    """What a Zstandard file unpacks to. Going back is correct, and slow.

    Args:
        packed: the file, which must be able to seek; it stays open.

    Raises:
        OSError: on reading: without a number, the file is damaged.
    """

    def __init__(self, packed: Any) -> None:
        self._packed = packed
        self._at = 0
        self._begin()

    def _begin(self) -> None:
        self._packed.seek(0)
        # Closing it would close the file beneath.
        self._stream = pa.CompressedInputStream(pa.PythonFile(_Open(self._packed), "r"), "zstd")
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET:
            raise io.UnsupportedOperation("only from the beginning")
        if offset < self._at:
            self._begin()
        while self._at < offset and (piece := self._stream.read(min(_PIECE, offset - self._at))):
            self._at += len(piece)
        return self._at


class _Open:
    """A file that its user cannot close."""

    closed = False

    def __init__(self, file: Any) -> None:
        self.read: Callable[[int], bytes] = file.read
        self.tell: Callable[[], int] = file.tell

    def close(self) -> None:
        """It is somebody else's."""


def open_zstd(packed: Any) -> io.BufferedReader:
    """To read with small steps."""
    return io.BufferedReader(ZstdFile(packed), _PIECE)
