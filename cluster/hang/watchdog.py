"""Nobody waits for ever: when a node's ranks take no step, their stacks are written down and they are ended.

Each rank notes its steps on its node; one watcher per node, `python -m cluster.hang.watchdog`, reads them: a
process of its own, which no stuck rank can hold up. All ranks of a job stall together, whichever is to blame,
and so every node's watcher acts by itself. What it leaves in the run folder:

stacks/rank-N.txt       what every thread of the rank was doing; SIGUSR1 to a rank adds to it at any time
stacks/nccl-rank-N      NCCL's flight recorder, on GPUs; `torchfrtrace` shows it
errors/hang-NODE.json   one sentence: who, since when, where to look
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import logging
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from cluster.errors import UserError
from cluster.hang.end_hang import end_hang, stacks_file
from cluster.hang.heartbeat import NO_STEP, Heartbeat, HeartbeatFile, read_heartbeats
from cluster.run.folder import RunFolder

logger = logging.getLogger(__name__)

STEPS_OF_PATIENCE, BUSY_PATIENCE = 5, 6
SECONDS_TO_END = 10.0  # for the watcher, once its rank leaves
# What tells apart the starts of a run, and nodes that share a /tmp.
_PLACES = ("SLURM_JOB_ID", "SUBMIT_START", "MASTER_ADDR", "MASTER_PORT")


class Watchdog:
    """What a rank does to be watched, within the `with` block; outside of it `beat` and `busy` do nothing.

    Args:
        run: where stacks and the error go.
        rank, local_rank: this rank; the one with local rank 0 starts the node's watcher.
        seconds: without a step until the node's ranks are ended. It is never less than five times the step
            that 99 of 100 are shorter than, and six times as long while the rank is busy.
        nccl: have NCCL keep its last calls, for they say who waits for whom.
    """

    def __init__(
        self, run: RunFolder, *, rank: int, local_rank: int, seconds: float, nccl: bool = False
    ) -> None:
        self._run, self._rank, self._local_rank, self._seconds = run, rank, local_rank, seconds
        self._nccl = nccl
        self._heartbeat: HeartbeatFile | None = None
        self._cleanup = contextlib.ExitStack()

    def beat(self, step: int) -> None:
        """A step is done. Takes less than a microsecond."""
        if self._heartbeat is not None:
            self._heartbeat.beat(step)

    def busy(self, what: str) -> None:
        """Something begins that may take longer than a step, until the next beat. So does the start."""
        if self._heartbeat is not None:
            self._heartbeat.busy(what)

    def __enter__(self) -> Self:
        folder = _own_folder(self._run)
        with contextlib.ExitStack() as stack:
            stack.callback(_remove_if_empty, folder)
            stack.enter_context(_stacks_on_signal(self._run, self._rank))
            if self._nccl:
                stack.enter_context(_flight_recorder(folder))
            heartbeat = HeartbeatFile(folder, rank=self._rank)
            stack.callback(heartbeat.close)
            if self._local_rank == 0:
                stack.enter_context(_watcher(self._run, folder, self._seconds))
            self._cleanup = stack.pop_all()
        self._heartbeat = heartbeat
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heartbeat = None
        self._cleanup.close()


def _own_folder(run: RunFolder) -> Path:
    """The folder in which the ranks of this start meet their watcher, on this node."""
    names = [str(run.path.resolve()), socket.gethostname(), str(os.getuid())]
    names += [os.environ.get(name, "") for name in _PLACES]
    digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"watchdog-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: remove it, or set TMPDIR to a folder of your own")
    return folder


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def _stacks_on_signal(run: RunFolder, rank: int) -> Iterator[None]:
    """SIGUSR1 appends the stacks of all threads to the rank's file; one that nothing was written to goes."""
    path = stacks_file(run, rank)
    with contextlib.ExitStack() as stack:
        file: IO[str] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a"))
        except OSError as error:  # a full disk is no reason not to work
            logger.warning("stacks of this rank will be in its log: %s", error)
        faulthandler.register(signal.SIGUSR1, file=file or sys.stderr, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR1)
    if path.is_file() and path.stat().st_size == 0:
        path.unlink()
        _remove_if_empty(path.parent)


@contextlib.contextmanager
def _flight_recorder(folder: Path) -> Iterator[None]:
    """Have NCCL, which reads its settings when its first group is made, keep and on request dump its calls.

    These names hold from torch 2.8 on; 2.9 and later also know some of them as TORCH_FR_…. A byte written to
    the pipe asks for a dump.
    """
    settings = {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "20000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(folder / "nccl-rank-"),
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(folder / "nccl-rank-"),
    }
    ours = settings.keys() - os.environ.keys()
    os.environ.update({name: settings[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _watcher(run: RunFolder, folder: Path, seconds: float) -> Iterator[None]:
    """The node's watcher. It ends when its standard input does, so with this process, however that ends."""
    command = [
        sys.executable,
        "-m",
        "cluster.hang.watchdog",
        str(run.path.resolve()),
        str(folder),
        str(seconds),
    ]
    # A session of its own: it must outlive the ranks whose process groups it kills.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        _end_watcher(process)


def _end_watcher(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Watcher:
    """Watches the ranks of one node until they have left, or hang.

    Args:
        run: the run folder.
        folder: where the ranks' heartbeats are.
        seconds: see `Watchdog`.
        ranks: of the whole job; the others are on other nodes.
    """

    def __init__(self, run: RunFolder, folder: Path, *, seconds: float, ranks: int) -> None:
        self._run, self._folder, self._seconds, self._ranks = run, folder, seconds, ranks
        self._last: dict[int, Heartbeat] = {}
        self._silence: dict[int, float] = {}
        self._steps: deque[float] = deque(maxlen=1000)

    def watch(self) -> None:
        """Until standard input ends, the ranks have left, or they hang and have been ended."""
        interval = min(1.0, self._seconds / 10)
        before = time.monotonic()
        while not select.select([sys.stdin], [], [], interval)[0]:
            now = time.monotonic()
            beats = list(read_heartbeats(self._folder))
            alive = [beat for beat in beats if beat.process.alive()]
            if not alive:
                return
            # A watcher that was held up itself, say with the whole job by SLURM's `suspend`, has not seen the
            # ranks stand still all that time.
            if self.overdue(alive, elapsed=min(now - before, 2 * interval)):
                end_hang(self._run, beats, ranks=self._ranks)
                return
            before = now

    def overdue(self, beats: Sequence[Heartbeat], *, elapsed: float) -> bool:
        """Whether a rank has been silent for too long, `elapsed` seconds after the look before."""
        for beat in beats:
            last = self._last.get(beat.rank)
            if last is not None and (last.step, last.sign_at) == (beat.step, beat.sign_at):
                self._silence[beat.rank] += elapsed
            else:
                self._silence[beat.rank] = 0.0
            if last is not None and NO_STEP < last.step < beat.step:
                seconds = beat.stepped_at - last.stepped_at - (beat.busy_seconds - last.busy_seconds)
                self._steps.append(seconds / (beat.step - last.step))
            self._last[beat.rank] = beat
        return any(self._silence[beat.rank] > self._patience(beat) for beat in beats)

    def _patience(self, beat: Heartbeat) -> float:
        ordered = sorted(self._steps)
        long_step = ordered[math.ceil(0.99 * len(ordered)) - 1] if ordered else 0.0
        patience = max(self._seconds, STEPS_OF_PATIENCE * long_step)
        return BUSY_PATIENCE * patience if beat.busy_with else patience


def main() -> None:
    """Watch the ranks of this node: RUN FOLDER SECONDS, on behalf of the rank that holds standard input."""
    # What is sent to all processes of a job asks the ranks to save: until they have left, they are watched.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("seconds", type=float)
    arguments = parser.parse_args()
    host, ranks = socket.gethostname(), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s watchdog [{host}] %(message)s"
    )
    Watcher(RunFolder(arguments.run), arguments.folder, seconds=arguments.seconds, ranks=ranks).watch()
    shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
