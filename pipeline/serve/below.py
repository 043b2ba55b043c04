"""Files below a folder, as they lie there: no link is followed, so that nothing from elsewhere is shown.

A run's folder may be somebody else's, and a log in it a link to a key of whoever looks.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from cluster.small_file import read_bounded

LINK = "it is a link, or lies behind one, and links are not followed here"


def open_below(root: Path, path: Path) -> BinaryIO:
    """Open a regular file to read.

    Args:
        root: a folder that was named by who started this; its own links are followed.
        path: of the file, below it.

    Raises:
        OSError: if there is none, or a link on the way to it.
    """
    parts = path.relative_to(root).parts if path.is_absolute() else path.parts
    if not parts or ".." in parts:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    place = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            inside = _open(part, os.O_PATH | os.O_DIRECTORY, place, path)
            os.close(place)
            place = inside
        descriptor = _open(parts[-1], os.O_RDONLY | os.O_NONBLOCK, place, path)
    finally:
        os.close(place)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return file


def read_below(root: Path, path: Path, *, most: int) -> bytes:
    """All bytes of such a file.

    Raises:
        OSError: as `open_below` does, or if it has more than `most` bytes.
    """
    with open_below(root, path) as file:
        return read_bounded(file, path, most=most)


def _open(name: str, flags: int, place: int, path: Path) -> int:
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
    except OSError as error:
        link = error.errno == errno.ELOOP or (
            error.errno == errno.ENOTDIR
            and stat.S_ISLNK(os.stat(name, dir_fd=place, follow_symlinks=False).st_mode)
        )
        raise OSError(error.errno, LINK if link else error.strerror, str(path)) from None
