"""Locks on files, which are given back when their last holder dies, however it dies.

The kernel's; or, where the file system knows none, one of the kernel's on a file of this machine, which takes
the place of the file's descriptor, and beside the file a record for other machines, FILE.held, that one can
create and no other. When the lock is given back, a keeper removes the record. One that was left behind is
taken over on the machine that left it; elsewhere nobody can tell, and only people may remove it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.host import private_folder
from cluster.small_file import read_small
from cluster.wording import visible

# What file systems answer that know no locks; NFS says the first, too, of a server that does not.
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
_POLL_SECONDS = 0.2
_MOST_BYTES = 4096  # of a record
_KEEPER = """
import fcntl, os, sys
lock, record, owner = sys.argv[1:]
with open(lock) as file:
    os.close(sys.stdout.fileno())  # it is at its place
    fcntl.flock(file, fcntl.LOCK_EX)
    with open(record) as now:
        ours = now.read() == owner
    if ours:
        os.remove(record)
"""


def lock_file(
    file: IO[str] | IO[bytes] | int,
    path: Path,
    *,
    shared: bool = False,
    wait: bool = False,
    of_kernel: bool = False,
) -> bool:
    """Take the lock of an open file, or change one's own; it lasts as long as any process has the file open.

    Args:
        file: as it is open, to write. Nothing is to be written to it, unless `of_kernel`.
        path: of the file.
        shared: with others that share in it; only the kernel has such locks.
        wait: until it is free.
        of_kernel: no other lock will do.

    Returns:
        False if others have it.

    Raises:
        UserError: if the file system knows no locks, and no other will do.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if not shared and not of_kernel:
            return _take_record(file if isinstance(file, int) else file.fileno(), path, wait=wait)
        raise UserError(
            f"the file system of {path.parent} knows no locks ({error.strerror}): use a folder on one that "
            "does, or have it mounted with them (Lustre: the option flock; NFS: without nolock)"
        ) from error
    return True


def knows_locks(path: Path) -> bool:
    """Whether the kernel can lock a file, which is made if it is not there."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in _NO_LOCKS
    return True


def own_file(name: str) -> Path:
    """Where this user may have a file of that name on a disk of this machine, whose kernel can lock it."""
    folder = private_folder(Path(tempfile.gettempdir()) / f"submit-locks-{os.geteuid()}")
    return folder / hashlib.sha256(name.encode()).hexdigest()[:16]


def holder(path: Path) -> str:
    """Where a lock is held that no kernel knows, and what to do if it is not, in words behind others; empty
    if this machine can tell by itself.
    """
    record = _record(path)
    if not record.exists():
        return ""
    owner = _owner(record)
    host = owner.get("host", "")
    if host == socket.gethostname():
        by_kernel = owner.get("lock", "").rpartition(" ")[0] == str(own_file(str(path.resolve())))
        return "" if by_kernel else f"; if nothing of it is left on this machine, remove {record}"
    if host:
        return f" on {visible(host)}; if that machine is gone, remove {record}"
    return f"; if {record} stays without a machine's name in it, remove it"


def _take_record(descriptor: int, path: Path, *, wait: bool) -> bool:
    here = own_file(str(path.resolve()))
    while not _taken(descriptor, here, _record(path)):
        if not wait:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _taken(descriptor: int, here: Path, record: Path) -> bool:
    """Take the lock of this machine, then that of all; what is held of them lies behind the descriptor."""
    with here.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        me = {
            "host": socket.gethostname(),
            "boot": _boot(),
            "lock": f"{here} {os.fstat(file.fileno()).st_ino}",
        }
        line = json.dumps(me | {"taken": secrets.token_hex(8)}) + "\n"
        try:
            # Over NFS, too, of those who create a file with O_EXCL one succeeds.
            made = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            before = _owner(record)
            restarted = before.get("host") == me["host"] and before.get("boot") != me["boot"]
            if not restarted and any(before.get(key) != me[key] for key in me):
                return False
            write_atomically(record, line)  # nobody here holds it, for this process has the lock
        else:
            try:
                with os.fdopen(made, "w") as fresh:
                    fresh.write(line)
            except OSError:  # the disk is full: one that names nobody would never be taken over
                record.unlink()
                raise
        os.dup2(file.fileno(), descriptor, inheritable=os.get_inheritable(descriptor))
    keeper = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _KEEPER, str(here), str(record), line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    assert keeper.stdout is not None
    with keeper.stdout as place:  # a job may end, and SLURM end all that it has begun, as soon as it is done
        place.read()
    return True


def _record(path: Path) -> Path:
    return path.absolute().with_name(f"{path.name}.held")


def _owner(record: Path) -> dict[str, str]:
    """Whose record it is; nobody's if there is none, it is just being written, or holds something else."""
    try:
        owner = json.loads(read_small(record, most=_MOST_BYTES))
    except (OSError, ValueError):
        return {}
    named = isinstance(owner, dict) and all(isinstance(value, str) for value in owner.values())
    return owner if named else {}


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
