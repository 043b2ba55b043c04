"""Trouble with what is written or read that the user can mend: one sentence instead of a traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import UserError

_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EEXIST)
_MENDABLE = (
    *_WRITING,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
)


def trouble(error: OSError, *, written: str | Path | None = None) -> UserError | None:
    """The sentence about an error; None if it is of another kind, such as a lost connection.

    Args:
        written: what was being written, where the caller knows; the error may name another place.
    """
    if error.errno not in _MENDABLE:
        return None
    named = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, Path)) else None
    elsewhere = named is not None and written is not None and not _belongs_to(named, str(written))
    if elsewhere or (named is not None and error.errno == errno.EISDIR):
        written = None  # a source, say, or the run's folder; or a folder where a file of ours must be
    verb = "write" if written is not None or error.errno in _WRITING else "read or write"
    place = named if written is None else written
    # Arrow's text ends with the system's: "...local file 'x'. Detail: [errno 13] Permission denied".
    reason = (error.strerror or os.strerror(error.errno)).rpartition("] ")[2]
    reason = reason[:1].lower() + reason[1:]
    return UserError(
        f"cannot {verb} {place or 'the output'}: {reason}; mend that, then run the same command again"
    )


def refusal(error: PermissionError) -> UserError:
    """What may not be read or written will not be a moment later: the sentence about it."""
    return trouble(error) or UserError(f"{error}; mend that, then run the same command again")


def _belongs_to(file: str, written: str) -> bool:
    """Whether a file is what is written, lies in it or around it, or is a draft beside it."""
    path, place = Path(file).absolute(), Path(written).absolute()
    return path.is_relative_to(place) or place.is_relative_to(path) or path.parent == place.parent


@contextmanager
def writing(place: str | Path) -> Iterator[None]:
    """Trouble within the block is trouble with writing there.

    Raises:
        UserError: instead of an OSError that the user can mend.
    """
    try:
        yield
    except OSError as error:
        told = trouble(error, written=place)
        if told is None:
            raise
        raise told from error
