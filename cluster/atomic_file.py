"""A file that is there whole or not at all, whatever is killed meanwhile."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file so that a reader, or a crash at any instant, sees the old or the new one."""
    # Two machines may share the folder, and the process number.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # a full disk names no file
        raise
