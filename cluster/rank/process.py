"""A rank as a process of this machine, as the local executor and Ray's workers start it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from cluster.job import Resources
from cluster.run.folder import RunFolder
from cluster.run.status import Failure

# libgomp's threads spin for milliseconds at a barrier: with one other busy process on two cores a training
# step took 14.9 s instead of 0.5. Spinning briefly it takes 1.0, and costs 3 % on a quiet machine.
OPENMP_SETTINGS = {"GOMP_SPINCOUNT": "1000"}

# The allocator gives big blocks back to the kernel by default, and faults them in again page by page.
MALLOC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
    "MALLOC_TOP_PAD_": "67108864",
}

SECONDS_TO_END = 3.0  # for the other ranks, once one has failed


def rank_defaults(resources: Resources, *, threads: int) -> dict[str, str]:
    """What a rank finds in its environment where nobody has set it otherwise."""
    defaults = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if resources.gpus_per_rank == 0:
        defaults |= MALLOC_SETTINGS | OPENMP_SETTINGS
    return defaults


def start_rank(
    run: RunFolder,
    rank: int,
    *,
    environment: Mapping[str, str],
    lock: IO[str],
    directory: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start one rank, which shares in the run's lock and dies with this process.

    Args:
        directory: where relative paths begin, if it is there; else where this process is.
    """
    with run.log(rank).open("ab") as log:
        # A session of its own: Ctrl-C reaches the launcher alone, and the rank's children end with it.
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.rank", str(run.path / "job.json"), "--end-with-stdin"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
            env=environment,
            cwd=directory if directory is not None and directory.is_dir() else None,
        )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a rank and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def death(rank: int, code: int, *, log_tail: tuple[str, ...], node: str | None = None) -> Failure:
    """The end of a rank that has not written down why."""
    if code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        kind, message = "Killed", f"killed by {signal.Signals(-code).name}{hint}"
    else:
        kind, message = "Exit", f"ended with status {code} without a word"
    return Failure(rank=rank, type=kind, message=message, log_tail=log_tail, node=node)


def free_port() -> int:
    """A port that nobody listens on here, as yet."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
