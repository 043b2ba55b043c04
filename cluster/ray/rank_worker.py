"""What a Ray actor does for one rank: a process of its own, with the node and the GPUs that Ray chose.

A process, and not the actor itself, for then logs, error files, exit statuses and signals are those of every
other executor.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cluster.errors import AlreadyRunning
from cluster.file_lock import lock_file
from cluster.rank.interface import GLOO, interface_of
from cluster.rank.process import end_group, free_port, rank_defaults, start_rank
from cluster.ray.connect import load_ray
from cluster.run.folder import RunFolder

SHARE_PATIENCE = 1.0  # seconds: somebody may have looked whether the lock is held


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank runs.

    Attributes:
        host, node: the machine's name, and Ray's id of the node.
        address: reached by the other nodes.
        port: free on it.
    """

    host: str
    node: str
    address: str
    port: int


class RankWorker:
    """The actor of one rank."""

    def __init__(self, folder: str, rank: int) -> None:
        self._run = RunFolder(Path(folder))
        self._rank = rank
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []  # signals that came before the process
        self._starting = threading.Lock()

    def place(self) -> Place:
        """Where Ray has put it."""
        ray = load_ray()
        return Place(
            host=socket.gethostname(),
            node=ray.get_runtime_context().get_node_id(),
            address=ray.util.get_node_ip_address(),
            port=free_port(),
        )

    def run(self, places: dict[str, str], threads: int) -> int:
        """Run the rank's process to its end; its exit status, negative for a signal."""
        job = self._run.read_job()
        defaults = rank_defaults(job.resources, threads=threads)
        # Ray sets OMP_NUM_THREADS too: to 1, whatever the actor has. `python -m` would look for the source
        # in the working directory first.
        fixed = {"OMP_NUM_THREADS": defaults["OMP_NUM_THREADS"], "PYTHONSAFEPATH": "1"}
        if (interface := interface_of(load_ray().util.get_node_ip_address())) is not None:
            defaults[GLOO] = interface
        with contextlib.closing(share_lock(self._run)) as lock, self._starting:
            self._process = start_rank(
                self._run,
                self._rank,
                environment=defaults | os.environ | fixed | places,
                lock=lock,
                directory=job.directory,
            )
        for number in self._early:
            self.send(number)
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        end_group(self._process)  # its children, while its number is still its own
        return self._process.wait()

    def send(self, number: int) -> None:
        """Signal the rank; SIGKILL takes its children along."""
        with self._starting:
            if self._process is None:
                self._early.append(number)
                return
        if self._process.returncode is not None:
            return
        if number == signal.SIGKILL:
            end_group(self._process)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)


def share_lock(run: RunFolder) -> IO[str]:
    """Hold the run's lock together with the others of one submission.

    A launcher that wants the run takes the lock alone, and cannot while anybody shares in it.

    Raises:
        AlreadyRunning: if a launcher has it.
        UserError: if the file system knows no locks.
    """
    file = (run.path / "lock").open("a+")  # "+": over NFS only a file that can be read can be shared
    deadline = time.monotonic() + SHARE_PATIENCE
    while not lock_file(file, run.path / "lock", shared=True):
        if time.monotonic() > deadline:
            file.close()
            raise AlreadyRunning(
                f"the run in {run.path} is going on already; `submit cancel {run.path}` ends it"
            )
        time.sleep(0.05)
    return file


def last_sharer(lock: IO[str], *, patience: float) -> bool:
    """Wait until nobody else shares in the lock: the ranks of an earlier attempt are gone.

    Returns:
        False if some are still there after `patience` seconds.
    """
    deadline, path = time.monotonic() + patience, Path(lock.name)
    while True:
        alone = lock_file(lock, path, of_kernel=True)
        # Also after a failure: the kernel has dropped the share by then.
        lock_file(lock, path, shared=True, wait=True)
        if alone or time.monotonic() > deadline:
            return alone
        time.sleep(0.1)
