"""A file that is there whole or not at all, whatever is killed meanwhile."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


def write_atomically(
    path: Path, text: str, *, survives_power_cut: bool = True, private: bool = False
) -> None:
    """Replace a small text file so that a reader, or a crash at any instant, sees the old or the new one.

    Args:
        survives_power_cut: see `replacing`.
        private: nobody else may read it, not for a moment; else the umask decides.
    """
    with replacing(path, survives_power_cut=survives_power_cut) as temporary:
        temporary.unlink(missing_ok=True)  # left by a process of that number, perhaps for all to read
        mode = 0o600 if private else 0o666
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            file.write(text)


@contextlib.contextmanager
def replacing(path: Path, *, survives_power_cut: bool = True) -> Iterator[Path]:
    """A file to write that takes the place of `path` at the end; whoever has the old one open keeps that.

    Args:
        survives_power_cut: wait until the disk has it, which beside a busy one takes seconds.
    """
    # Two machines may share the folder, and the process number.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        yield temporary
        if survives_power_cut:
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk names no file
        raise
