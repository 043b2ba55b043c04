"""This machine and its processes."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cluster.errors import UserError

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def node_name() -> str:
    """This machine as its scheduler names it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def user_name(number: int | None = None) -> str:
    """A user of this machine, by default who runs this, by name if there is one."""
    number = os.geteuid() if number is None else number
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def private_folder(path: Path) -> Path:
    """A folder that only this user can enter, such as one in /tmp, where anybody may have been before.

    Raises:
        UserError: if it is somebody else's, or others may enter it.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise UserError(
            f"{path} is to be a folder that only you can enter, and is not: remove it, or set TMPDIR to "
            "another place for it"
        )
    return path


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of one machine, safe against reused process ids.

    Args:
        host: the machine's name.
        pid: process id.
        started: start time in clock ticks since boot, and the boot's id.
    """

    host: str
    pid: int
    started: str

    @classmethod
    def current(cls) -> Self:
        """This process."""
        started = _start_time(os.getpid())
        if started is None:
            raise OSError("/proc does not list this process")
        return cls(host=socket.gethostname(), pid=os.getpid(), started=started)

    @property
    def is_here(self) -> bool:
        """Whether it belongs to this machine, so that it can be looked up and signalled."""
        return self.host == socket.gethostname()

    def alive(self) -> bool:
        """Whether it still runs; only the machine it belongs to can tell."""
        return _start_time(self.pid) == self.started


def _start_time(pid: int) -> str | None:
    """When a process started, as text that no later process with its number shares; None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name, in parentheses, may hold spaces and parentheses itself.
    state, *fields = stat.rpartition(")")[2].split()
    if state in "ZX":
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{fields[18]}@{boot}"
