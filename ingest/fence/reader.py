"""A process that reads for another what strangers wrote: `python -m ingest.fence.reader MEMORY`.

Its orders come through its standard input: a function to call, and its arguments. The function gets files, of
which it asks the other process (`ingest.fence.reading`) for pieces, unpacks them here, and yields tables,
which go out as Arrow's streams: numbers and bytes, no pickles. The kernel bounds what it takes: memory from
the start, computing time by what was read, unpacked or made so far. When none of that is left, it is ended.
"""

import errno
import gc
import importlib
import io
import json
import signal
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO, cast

import pyarrow as pa

from cluster.errors import UserError
from cluster.wording import in_bytes
from ingest.fence.fence import fence

# Computing time: to begin with, and per byte.
SECONDS, SECONDS_PER_BYTE = 10.0, 10.0 / 100e6
# Text shrinks to a thirtieth or so: what unpacks to more than this is a bomb.
_LARGEST_EXPANSION = 256
_EXPANSION_FREE = 256 << 20
_PIECE = 1 << 20


class _Account:
    """What became of an order so far, in bytes, and so what it may take."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._packed = self._unpacked = self._made = 0
        self._began = time.process_time()
        self.add()

    def add(self, *, packed: int = 0, unpacked: int = 0, made: pa.Table | None = None) -> None:
        self._packed += packed
        self._unpacked += unpacked
        if made is not None:
            self._made += made.nbytes
        most = max(self._unpacked, self._made)
        if most > max(_EXPANSION_FREE, _LARGEST_EXPANSION * self._packed):
            raise UserError(
                f"{self._place} unpacks from {in_bytes(self._packed)} to {in_bytes(most)} and more, as no "
                "list does: if you trust it, write it anew without compression"
            )
        read = max(self._packed, self._unpacked)
        # Parquet unpacks where it is not seen; of rows with long reasons, more is made than was ever read.
        allowed = SECONDS + SECONDS_PER_BYTE * max(read, min(self._made, 2 * read))
        left = allowed - (time.process_time() - self._began)
        signal.setitimer(signal.ITIMER_PROF, max(left, 0.001))


class _Asked(io.RawIOBase):
    """A file of the other process, which is asked for its bytes."""

    def __init__(self, number: int, account: _Account) -> None:
        self._number = number
        self._account = account
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = (0, self._at, self._ask(b"S", 0) if whence == io.SEEK_END else 0)[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = self._ask(b"R", len(buffer))
        stdin = cast(io.BufferedReader, sys.stdin.buffer)
        stdin.readinto(memoryview(buffer).cast("B")[:size])
        self._at += size
        self._account.add(packed=size)
        return size

    def _ask(self, what: bytes, most: int) -> int:
        sys.stdout.buffer.write(what + struct.pack("<IQQ", self._number, self._at, most))
        sys.stdout.buffer.flush()
        (answer,) = struct.unpack("<q", sys.stdin.buffer.read(8))
        if answer < 0:
            raise OSError(errno.EIO, sys.stdin.buffer.read(-answer).decode())
        return int(answer)


class _Unpacked(io.RawIOBase):
    """What a compressed file unpacks to."""

    def __init__(self, packed: BinaryIO, compression: str, account: _Account) -> None:
        self._stream = pa.CompressedInputStream(packed, compression)
        self._account = account

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._account.add(unpacked=len(data))
        return len(data)


@contextmanager
def _opened(number: int, compression: str | None, account: _Account) -> Iterator[BinaryIO]:
    file = io.BufferedReader(_Asked(number, account), _PIECE)
    yield file if compression is None else io.BufferedReader(_Unpacked(file, compression, account), _PIECE)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    fence(int(sys.argv[1]))
    # Values of JSON have no cycles, and by the million they are looked through for them again and again.
    gc.disable()
    while head := sys.stdin.buffer.read(4):
        order = json.loads(sys.stdin.buffer.read(struct.unpack("<I", head)[0]))
        end = json.dumps(_carry_out(**order)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(b"E" + struct.pack("<Q", len(end)) + end)
        sys.stdout.buffer.flush()
        gc.collect()


def _carry_out(reader: str, place: str, files: list[str | None], arguments: dict[str, Any]) -> dict[str, Any]:
    """Send the tables; returns what went wrong, if something did."""
    try:
        account = _Account(place)
        module, _, name = reader.partition(":")
        read = getattr(importlib.import_module(module), name)
        opened = [partial(_opened, number, packed, account) for number, packed in enumerate(files)]
        for table in read(*opened, **arguments):
            account.add(made=table)
            _send(table)
    except UserError as error:
        return {"refused": str(error)}
    except Exception as error:
        return _said(error, place)
    return {}


def _said(error: Exception, place: str) -> dict[str, Any]:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        asked = f"{place} asks for more than {in_bytes(int(sys.argv[1]))} of memory to be read"
        return {
            "refused": f"{asked}: it is damaged, or made to do so; get or write it anew, in smaller parts"
        }
    words = " ".join(str(error).split())[:1_000]
    if isinstance(error, OSError) and error.errno is not None:
        return {"errno": error.errno, "words": error.strerror or words}
    # Decompressors raise OSError, without a number.
    if isinstance(
        error, pa.ArrowException | OSError | EOFError | RecursionError | ValueError | ArithmeticError
    ):
        return {"refused": f"{place} is damaged: {words or type(error).__name__}"}
    return {"bug": "".join(traceback.format_exception(error))}


def _send(table: pa.Table) -> None:
    size = pa.MockOutputStream()
    _stream(table, size)
    sys.stdout.buffer.write(b"T" + struct.pack("<Q", size.size()))
    _stream(table, pa.PythonFile(sys.stdout.buffer, "w"))
    sys.stdout.buffer.flush()


def _stream(table: pa.Table, sink: pa.NativeFile) -> None:
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


if __name__ == "__main__":
    main()
