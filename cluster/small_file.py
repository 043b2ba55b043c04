"""Small files in folders that anybody may have made."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MOST = 32 << 20  # bytes; the job of a crawl lists some ten thousand units


def read_small(path: Path, *, most: int = MOST) -> bytes:
    """All bytes of a regular file: a pipe would keep its reader waiting, and a device never end.

    Raises:
        OSError: if it cannot be read, is no regular file, or has more than `most` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(most + 1)
    finally:
        os.close(descriptor)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return data
