"""Lists of strangers, read by a fenced process: they may lie about their sizes, or crash what parses them.

Here are the files, wherever they lie; the process (`ingest.fence.reader`) asks for pieces of them. One that
has nothing to do waits for the next order: lists come by the thousand, and Python takes a while to start.
"""

import contextlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, cast

import pyarrow as pa

from cluster.errors import UserError
from ingest.fence.fence import environment
from ingest.fence.reader import SECONDS, SECONDS_PER_BYTE

# Address space that a reader may add to what it has at its start.
MEMORY = 1 << 30
_LARGEST_TABLE, _LARGEST_END, _LARGEST_PIECE = 512 << 20, 1 << 20, 64 << 20
_MADE_SO = "it is damaged, or made to do so; get or write it anew"
# Other pools reserve address space by the gigabyte; and pages that come back to glibc stay for the next rows.
_ALLOCATION = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
_waiting: list["_Reader"] = []


def read_fenced(
    reader: Callable[..., Iterator[pa.Table]],
    files: Sequence[io.BufferedIOBase],
    arguments: Mapping[str, object],
    *,
    place: str,
    compression: str | None = None,
    memory: int = MEMORY,
) -> Iterator[pa.Table]:
    """The tables that a function of a module yields, called in a fenced process.

    Args:
        reader: is called with a function per file that opens it from its beginning, and the arguments.
        files: to read and seek in; they stay open.
        arguments: JSON values.
        place: what to call the first of them.
        compression: of the first, by Arrow's name.
        memory: that the process may take besides what Python does, bytes.

    Raises:
        UserError: raised there; or the files' contents have crashed the process, or asked for too much memory
            or time.
        OSError: a file cannot be read.
    """
    order = {
        "reader": f"{reader.__module__}:{reader.__name__}",
        "place": place,
        "files": [compression, *[None] * (len(files) - 1)],
        "arguments": arguments,
    }
    process = _one_that_waits(memory) or _Reader(memory)
    try:
        end = yield from process.answers(order, files)
    except EOFError:
        raise process.death(place) from None
    except _NonsenseError:
        raise UserError(f"{place} crashes what reads it (nonsense in place of rows): {_MADE_SO}") from None
    finally:
        # Whatever has happened: only after an order's end another may follow.
        if process.is_done and not _waiting:
            _waiting.append(process)
        else:
            process.end()
    if "refused" in end:
        raise UserError(end["refused"])
    if "errno" in end:
        raise OSError(end["errno"], end["words"])
    if "bug" in end:
        raise RuntimeError(f"{reader.__name__} failed in its process:\n{end['bug']}")


def _one_that_waits(memory: int) -> "_Reader | None":
    while _waiting:
        process = _waiting.pop()
        # And not one of the process that this one was forked from.
        if process.owner == os.getpid():
            if process.memory == memory and process.is_alive():
                return process
            process.end()
    return None


def end_waiting() -> None:
    """End the process that waits for an order, once none is to come: a crawl may take weeks."""
    _one_that_waits(memory=-1)


class _NonsenseError(Exception):
    """A process does not keep to the rules: intruders have taken it over."""


class _Reader:
    """A process that reads, and its pipes."""

    def __init__(self, memory: int) -> None:
        self.owner = os.getpid()
        self.memory = memory
        self.is_done = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "ingest.fence.reader", str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            pipesize=1 << 20,
            env=environment() | _ALLOCATION,
        )
        self._orders = cast(BinaryIO, self._process.stdin)
        self._answers = cast(BinaryIO, self._process.stdout)

    def answers(
        self, order: object, files: Sequence[io.BufferedIOBase]
    ) -> Generator[pa.Table, None, dict[str, Any]]:
        """Yields the tables; returns the end of the order.

        Raises:
            EOFError: the process has died.
            _NonsenseError: it does not keep to the rules.
        """
        self.is_done = False
        text = json.dumps(order).encode()
        self._write(struct.pack("<I", len(text)), text)
        while True:
            match self._read(1):
                case b"R" | b"S" as what:
                    number, at, size = struct.unpack("<IQQ", self._read(20))
                    if number >= len(files):
                        raise _NonsenseError
                    self._serve(files[number], None if what == b"S" else (at, size))
                case b"T":
                    yield _table(self._sized(_LARGEST_TABLE))
                case b"E":
                    end = _end(self._sized(_LARGEST_END))
                    self.is_done = True
                    return end
                case _:
                    raise _NonsenseError

    def _serve(self, file: io.BufferedIOBase, piece: tuple[int, int] | None) -> None:
        """Send a piece of the file, from an offset on of a size, or only the file's size."""
        data = b""
        try:
            if piece is None:
                size = file.seek(0, os.SEEK_END)
            else:
                # What is no file, such as an answer of a server, may be unable to seek.
                if file.tell() != piece[0]:
                    file.seek(piece[0])
                data = file.read(min(piece[1], _LARGEST_PIECE))
                size = len(data)
        except UserError:
            raise
        except Exception as error:
            words = (isinstance(error, OSError) and error.strerror) or " ".join(f"{error}".split())
            data = (words or type(error).__name__).encode()
            size = -len(data)
        self._write(struct.pack("<q", size), data)

    def _write(self, *parts: bytes) -> None:
        try:
            for part in parts:
                self._orders.write(part)
            self._orders.flush()
        except BrokenPipeError:
            raise EOFError from None

    def _sized(self, most: int) -> bytes:
        (size,) = struct.unpack("<Q", self._read(8))
        if size > most:
            raise _NonsenseError
        return self._read(size)

    def _read(self, size: int) -> bytes:
        data = self._answers.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def death(self, place: str) -> Exception:
        """Why it has ended."""
        # It has closed its pipes, so it is gone or about to be.
        code = self._process.wait(timeout=60)
        if code == -signal.SIGPROF:
            rate = 100e6 * SECONDS_PER_BYTE
            return UserError(
                f"{place} takes more than {SECONDS:.0f} s of computing, and {rate:.0f} s per 100 MB, to be "
                f"read: {_MADE_SO}"
            )
        if code < 0:
            return UserError(f"{place} crashes what reads it ({signal.Signals(-code).name}): {_MADE_SO}")
        self._errors.seek(0)
        words = self._errors.read(10_000).decode(errors="replace").strip()
        return RuntimeError(f"the process that reads lists ended with status {code}: {words}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()
        self._answers.close()
        # What is left in the buffer has nobody to read it.
        with contextlib.suppress(BrokenPipeError):
            self._orders.close()


def _table(data: bytes) -> pa.Table:
    """A table that hostile bytes may have made: nothing in it points beyond them."""
    try:
        table = pa.ipc.open_stream(pa.py_buffer(data)).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError):
        raise _NonsenseError from None
    return table


def _end(data: bytes) -> dict[str, Any]:
    try:
        end = json.loads(data)
    except (ValueError, RecursionError):
        raise _NonsenseError from None
    if not isinstance(end, dict):
        raise _NonsenseError
    return end
