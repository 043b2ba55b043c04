"""The process of its own: told on standard input what to read, and ended by that input's end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from cluster.errors import UserError
from pipeline.data.read_ahead.cache import tell_failure
from pipeline.data.read_ahead.program import Assignment, Program

logger = logging.getLogger(__name__)

_REMOVALS = 100  # of the folder, at most: packs are still written into it


def main() -> None:
    """Read ahead until the rank that started this process ends, or closes the pipe."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s read-ahead [%(process)d] %(message)s"
    )
    from_rank = Connection(sys.stdin.fileno(), writable=False)
    try:
        given: Assignment = from_rank.recv()
    except EOFError:
        return
    ended = threading.Event()
    watch = threading.Thread(target=_end_with_rank, args=(from_rank, given.place, ended), daemon=True)
    watch.start()
    try:
        asyncio.run(Program(given).run())
    except Exception as error:
        if ended.is_set():  # what was being written has lost its folder
            watch.join()
        cause = _first_cause(error)
        logger.error("%s", cause, exc_info=None if isinstance(cause, OSError | UserError) else cause)
        tell_failure(given.place, cause)
        os._exit(1)


def _first_cause(error: Exception) -> Exception:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _end_with_rank(from_rank: Connection, place: Path, ended: threading.Event) -> None:
    """A killed rank closes its end of the pipe, too."""
    with contextlib.suppress(EOFError, OSError):
        from_rank.recv()
    ended.set()
    for _ in range(_REMOVALS):
        shutil.rmtree(place, ignore_errors=True)
        if not place.exists():
            break
    os._exit(0)


if __name__ == "__main__":
    main()
