"""Small files in folders that anybody may have made."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MOST = 32 << 20  # bytes; the job of a crawl lists some ten thousand units


def read_small(path: Path, *, most: int = MOST, links: bool = True) -> bytes:
    """All bytes of a regular file: a pipe would keep its reader waiting, and a device never end.

    Args:
        links: whether the file may be a link to another one.

    Raises:
        OSError: if it cannot be read, is no regular file, or has more than `most` bytes.
    """
    no_link = 0 if links else os.O_NOFOLLOW
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | no_link)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return read_bounded(file, path, most=most)
    finally:
        os.close(descriptor)


def read_bounded(file: BinaryIO, path: Path, *, most: int) -> bytes:
    """All bytes of an open file.

    Raises:
        OSError: if it cannot be read, or has more than `most` bytes.
    """
    data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return data
