"""Heartbeats: a small file per rank, on its node, that the rank writes as memory and a watcher reads.

    bytes 0-31    step, time of the last step, time of the last sign of life, seconds spent busy, as doubles
    bytes 32-95   what the rank is busy with, ended by a zero; empty while it takes steps
    from 96 on    who writes, as JSON

Every number has its own eight bytes, which are read and written in one go; times are CLOCK_MONOTONIC's, which
all processes of a machine share.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.host import Process
from cluster.typed_json import parse_record

_NUMBERS = struct.Struct("4d")
_STEP, _STEPPED_AT, _SIGN_AT, _BUSY_SECONDS = range(4)
_TEXT_AT, _TEXT_BYTES = _NUMBERS.size, 64
_IDENTITY_AT = _TEXT_AT + _TEXT_BYTES
NO_STEP = -1


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What a rank has last said of itself.

    Attributes:
        rank, process: who.
        step: the last step that it finished; NO_STEP before the first.
        stepped_at: when, by the monotonic clock; 0 before the first.
        sign_at: when it last finished a step or became busy.
        busy_seconds: time between steps that was no part of any, in all so far.
        busy_with: what takes longer than a step now; empty if nothing does.
    """

    rank: int
    process: Process
    step: int
    stepped_at: float
    sign_at: float
    busy_seconds: float
    busy_with: str


@dataclass(frozen=True, kw_only=True)
class _Identity:
    rank: int
    process: Process


class HeartbeatFile:
    """The rank's side of one file, which is there until `close`."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self._path = folder / f"rank-{rank}"
        identity = json.dumps(asdict(_Identity(rank=rank, process=Process.current()))).encode()
        temporary = folder / f".rank-{rank}.{os.getpid()}"
        temporary.write_bytes(bytes(_IDENTITY_AT) + identity)
        with temporary.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._numbers = memoryview(self._memory)[: _NUMBERS.size].cast("d")
        self._busy_since: float | None = None
        self._numbers[_STEP] = NO_STEP
        self.busy("starting up")
        temporary.rename(self._path)  # a watcher sees it whole

    def beat(self, step: int) -> None:
        """A step is done, and with it whatever the rank was busy with."""
        now = time.monotonic()
        if self._busy_since is not None:
            self._numbers[_BUSY_SECONDS] += now - self._busy_since
            self._busy_since = None
            self._memory[_TEXT_AT] = 0
        self._numbers[_STEPPED_AT] = now
        self._numbers[_STEP] = step
        self._numbers[_SIGN_AT] = now

    def busy(self, what: str) -> None:
        """Until the next beat."""
        now = time.monotonic()
        if self._busy_since is None:
            self._busy_since = now
        text = what.encode()[: _TEXT_BYTES - 1]
        self._memory[_TEXT_AT:_IDENTITY_AT] = text.ljust(_TEXT_BYTES, b"\0")
        self._numbers[_SIGN_AT] = now

    def close(self) -> None:
        """Leave: the rank is no longer watched."""
        self._path.unlink(missing_ok=True)
        self._numbers.release()
        self._memory.close()


def read_heartbeats(folder: Path) -> Iterator[Heartbeat]:
    """Every rank that has a file in the folder, by rank."""
    for path in sorted(folder.glob("rank-*"), key=lambda path: int(path.name.removeprefix("rank-"))):
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # it has just left
            continue
        step, stepped_at, sign_at, busy_seconds = _NUMBERS.unpack_from(data)
        identity = parse_record(_Identity, data[_IDENTITY_AT:], where=str(path), remedy="end its rank")
        yield Heartbeat(
            rank=identity.rank,
            process=identity.process,
            step=int(step),
            stepped_at=stepped_at,
            sign_at=sign_at,
            busy_seconds=busy_seconds,
            busy_with=data[_TEXT_AT:_IDENTITY_AT].partition(b"\0")[0].decode(errors="replace"),
        )
