"""Locks on files, which the kernel gives back when their holder dies, however it dies."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO

from cluster.errors import UserError

# What file systems answer that know no locks; NFS says the first, too, of a server that does not.
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


def lock_file(
    file: IO[str] | IO[bytes] | int, path: Path, *, shared: bool = False, wait: bool = False
) -> bool:
    """Take the lock of an open file, or change one's own; it lasts as long as any process has the file open.

    Args:
        file: as it is open, to write.
        path: of the file.
        shared: with others that share in it.
        wait: until it is free.

    Returns:
        False if others have it.

    Raises:
        UserError: if the file system knows no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise UserError(
            f"the file system of {path.parent} knows no locks ({error.strerror}): use a folder on one that "
            "does, or have it mounted with them (Lustre: the option flock; NFS: without nolock)"
        ) from error
    return True
