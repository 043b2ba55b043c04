"""What a rank reads at one step, in one file: a table of its samples, and their bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"pack 1\n\0"
_HEAD = len(_MAGIC) + 8 + 32
# Of a sample: its slot in the unit, the sealed sha256, and where in the file its bytes are.
TABLE = np.dtype([("start", "<u8"), ("size", "<u8"), ("slot", "<u4"), ("sha256", "V32")])


class DamagedPackError(Exception):
    """A pack whose table is not what was written."""


def pack_name(step: int, rank: int) -> str:
    """The file of what a node's rank, counted on the node, reads at a step."""
    return f"{step}.{rank}"


def pack_bytes(sizes: NDArray[np.int64]) -> int:
    """Size of the file of samples of these sizes."""
    return _HEAD + len(sizes) * TABLE.itemsize + int(sizes.sum())


def write_pack(
    path: Path, slots: NDArray[np.uint32], sha256: NDArray[np.void], data: Sequence[bytes | memoryview]
) -> None:
    """Write a pack so that whoever finds it finds all of it.

    Args:
        slots, sha256: (n,) of the samples, the sealed ones.
        data: the bytes of each; none of those that could not be read.

    Raises:
        OSError: the disk is full, or sick.
    """
    table = np.zeros(len(data), TABLE)
    table["slot"], table["sha256"] = slots, sha256
    table["size"] = sizes = np.array([len(part) for part in data], np.int64)
    table["start"] = _HEAD + table.nbytes + np.cumsum(sizes) - sizes
    described = table.tobytes()
    head = _MAGIC + len(data).to_bytes(8, "little") + hashlib.sha256(described).digest()
    draft = path.with_name(f".{path.name}")
    try:
        with draft.open("wb", buffering=0) as file:
            _write_all(file.fileno(), [head, described, *data])
        draft.rename(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _write_all(file: int, parts: Iterable[bytes | memoryview]) -> None:
    data = memoryview(b"".join(parts))
    while data:
        data = data[os.write(file, data) :]


class Pack:
    """A pack in memory.

    Args:
        data: the whole file.

    Raises:
        DamagedPackError: its table is not what was written; the samples have their own sha256.
    """

    def __init__(self, data: bytes) -> None:
        count = int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 8], "little")
        described = data[_HEAD : _HEAD + count * TABLE.itemsize]
        if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(described).digest() != data[_HEAD - 32 : _HEAD]:
            raise DamagedPackError
        table = np.frombuffer(described, TABLE)
        self._data = data
        self.slots: NDArray[np.uint32] = table["slot"]
        self._starts, self._sizes = table["start"].tolist(), table["size"].tolist()
        self._sha256 = table["sha256"].tolist()

    def sample(self, number: int) -> bytes | None:
        """The bytes of a sample; None if they are not the sealed ones."""
        start = self._starts[number]
        data = self._data[start : start + self._sizes[number]]
        return data if hashlib.sha256(data).digest() == self._sha256[number] else None
