"""File systems that know no locks."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest


def know_no_locks(monkeypatch: pytest.MonkeyPatch, folder: Path, code: int = errno.ENOSYS) -> None:
    """Have the kernel refuse to lock what lies in a folder."""
    flock = fcntl.flock

    def refuse(file: Any, how: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(folder):
            raise OSError(code, os.strerror(code))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", refuse)
