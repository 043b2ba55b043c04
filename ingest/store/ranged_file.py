"""What can be read in ranges, as a file to read and seek in."""

import io
from collections.abc import Callable
from typing import Any


class RangedFile(io.RawIOBase):
    """A file of ranges.

    Args:
        read: gives the bytes from an offset on, as many as are asked for.
        size: where it ends.
    """

    def __init__(self, read: Callable[[int, int], Any], size: int) -> None:
        self._read = read
        self._size = size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        data = self._read(self._place, max(0, min(len(view), self._size - self._place)))
        view[: len(data)] = data
        self._place += len(data)
        return len(data)
