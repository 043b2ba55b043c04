"""Folders that several machines share: over NFS one does not see for a while what another has written."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from pathlib import Path

logger = logging.getLogger(__name__)

PATIENCE = 20.0  # seconds
POLL_SECONDS = 0.5


def appears(path: Path) -> bool:
    """Whether something that another machine may have written is there, or can be seen before long."""
    deadline, told = time.monotonic() + PATIENCE, False
    while not path.exists():
        _look_anew(path.parent)
        if time.monotonic() > deadline:
            return path.exists()
        if not told:
            logger.info("%s is not to be seen here yet: looking for it", path)
            told = True
        time.sleep(POLL_SECONDS)
    return True


def _look_anew(folder: Path) -> None:
    """NFS's client keeps a list for up to a minute, unless it changes the folder itself: the server's answer
    tells it that others have, too.
    """
    mark = folder / f".looked-{socket.gethostname()}-{os.getpid()}"
    with contextlib.suppress(OSError):
        mark.touch()
        mark.unlink()
