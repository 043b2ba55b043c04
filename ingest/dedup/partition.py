"""Records on scratch disk, sorted by partition: what many tasks scatter, one task per partition collects.

A file has the positions of its partitions, partitions + 1 int64, and then the records. A thousand files hold
what a file per task and partition would need a million for.

A name comes with its whole content, and once there it stays: a machine that was given up for lost may go on,
and make the same file again while others read it.
"""

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_POSITION = np.dtype(np.int64)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which gets its name when all of it is on disk."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with draft.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def write_partitions(
    path: Path, records: NDArray[Any], partition: NDArray[np.integer[Any]], partitions: int
) -> None:
    """Write records by partition; within one they keep their order.

    Args:
        path: the file, made anew.
        records: structured, (n,).
        partition: where each belongs, 0 to partitions - 1, (n,).
        partitions: how many there are.
    """
    order = np.argsort(partition, kind="stable")
    counts = np.bincount(partition, minlength=partitions)
    positions = np.concatenate([[0], np.cumsum(counts)]).astype(_POSITION)
    with whole_file(path) as file:
        # Not `tofile`, which says nothing of a disk that is full.
        file.write(positions.view(np.uint8).data)
        file.write(records[order].view(np.uint8).data)


def read_partition(
    paths: Iterable[Path], partition: int, partitions: int, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """The records of one partition, in the order of the files."""
    pieces = [np.empty(0, dtype)]
    for path in paths:
        with path.open("rb") as file:
            start, end = np.fromfile(file, _POSITION, 2, offset=partition * _POSITION.itemsize)
            file.seek((partitions + 1) * _POSITION.itemsize + int(start) * dtype.itemsize)
            pieces.append(np.fromfile(file, dtype, int(end - start)))
            if len(pieces[-1]) != end - start:
                raise OSError(f"{path} is shorter than it was written: the disk or file system is at fault")
    return np.concatenate(pieces)
