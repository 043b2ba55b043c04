"""From the order in which things end to the order in which they were planned.

What comes early waits: in memory as long as a budget lasts that all units under way share, then in a file
without a name. So one slow site delays its unit's end and nothing else, and memory stays bounded.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Generic, NamedTuple, TypeVar

T = TypeVar("T")


@dataclass
class Memory:
    """Bytes that may still be kept in memory."""

    left: int


class _Filed(NamedTuple):
    offset: int
    size: int


class Reorder(Generic[T]):
    """Items 0, 1, 2, … of one unit, each with its bytes, given in any order and handed on in order.

    Args:
        memory: shared by all units under way.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._waiting: dict[int, tuple[T, bytes | _Filed]] = {}
        self._file: BinaryIO | None = None
        self._end = 0
        self.next = 0

    def put(self, index: int, item: T, data: bytes) -> Iterator[tuple[T, bytes]]:
        """Take one; yields all that are due now. Each index comes once."""
        if index != self.next:
            self._waiting[index] = item, self._hold(data)
            return
        yield item, data
        self.next += 1
        while self.next in self._waiting:
            item, held = self._waiting.pop(self.next)
            yield item, self._release(held)
            self.next += 1

    def close(self) -> None:
        """Let go of what still waits."""
        for _, held in self._waiting.values():
            if isinstance(held, bytes):
                self._memory.left += len(held)
        self._waiting.clear()
        if self._file is not None:
            self._file.close()

    def _hold(self, data: bytes) -> bytes | _Filed:
        if len(data) <= self._memory.left:
            self._memory.left -= len(data)
            return data
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="ingest-")  # noqa: SIM115 -- as long as the unit
        self._file.seek(self._end)
        self._file.write(data)
        filed = _Filed(self._end, len(data))
        self._end += len(data)
        return filed

    def _release(self, held: bytes | _Filed) -> bytes:
        if isinstance(held, bytes):
            self._memory.left += len(held)
            return held
        assert self._file is not None
        self._file.seek(held.offset)
        data = self._file.read(held.size)
        if len(data) != held.size:
            raise OSError("a temporary file does not read back as it was written: the disk is at fault")
        return data
