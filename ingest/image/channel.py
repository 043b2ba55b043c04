"""What a crawler and a checker say to each other: few words through pipes, images in memory that both see.

A pipe carries an image in pieces of 64 KiB, each of which wakes the other side, and the kernel copies it
twice: that was a sixth of a crawl's CPU time. What does not fit into the memory goes through the pipe.
"""

import json
import mmap
import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, BinaryIO

SHARED_BYTES = 2 << 20
NO_IMAGE = 0xFFFFFFFF
_MARK = struct.Struct("<I")


class Channel:
    """One end; the other one has the same memory.

    Args:
        source, target: pipes.
        memory: file descriptor of a file of SHARED_BYTES; may be closed afterwards.
    """

    def __init__(self, source: BinaryIO, target: BinaryIO, memory: int) -> None:
        self._source = source
        self._target = target
        self._shared = mmap.mmap(memory, SHARED_BYTES)

    @property
    def mark(self) -> int:
        """A number that the other end sees at once, also after this one has died."""
        (number,) = _MARK.unpack_from(self._shared)
        return int(number)

    @mark.setter
    def mark(self, number: int) -> None:
        _MARK.pack_into(self._shared, 0, number)

    def send(self, head: Any, parts: Sequence[bytes] = ()) -> None:
        """JSON values, and bytes; those sent before must have been received."""
        sizes = [len(part) for part in parts]
        is_shared = _MARK.size + sum(sizes) <= SHARED_BYTES
        if is_shared:
            for part, start in zip(parts, _starts(sizes), strict=True):
                self._shared[start : start + len(part)] = part
            parts = ()
        text = json.dumps([head, sizes, is_shared], separators=(",", ":")).encode()
        self._target.write(b"".join([struct.pack("<I", len(text)), text, *parts]))
        self._target.flush()

    def receive(self) -> tuple[Any, list[bytes]]:
        """What the other end sent.

        Raises:
            EOFError: it is gone.
        """
        (size,) = struct.unpack("<I", self._read(4))
        head, sizes, is_shared = json.loads(self._read(size))
        if not is_shared:
            return head, [self._read(size) for size in sizes]
        places = zip(_starts(sizes), sizes, strict=True)
        return head, [self._shared[start : start + size] for start, size in places]

    def close(self) -> None:
        """Let go of the memory; the pipes are whoever's opened them."""
        self._shared.close()

    def _read(self, size: int) -> bytes:
        data = self._source.read(size)
        if len(data) < size:
            raise EOFError
        return data


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where parts of these sizes lie in the shared memory: behind the mark, one after the other."""
    return list(accumulate(sizes, initial=_MARK.size))[:-1]
