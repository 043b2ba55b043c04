"""A node's ranks hang: who is to blame, what each of them was doing, and their end."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UserError
from cluster.hang.heartbeat import NO_STEP, Heartbeat
from cluster.host import Process, node_name
from cluster.run.folder import RunFolder
from cluster.run.status import Failure

logger = logging.getLogger(__name__)

SECONDS_TO_DUMP = 5.0  # for the ranks to write their stacks, and again for NCCL, which looks once a second
SECONDS_FOR_OTHER_NODES = 5.0  # to see the hang too, before the first rank that dies ends the whole job
SECONDS_TO_WRITE = 30.0  # for all of it: the file system may be what hangs

_GONE = "ZX"
_WORDS = {"R": "running", "S": "waiting", "T": "stopped", "t": "traced", "D": "in an uninterruptible wait"}
_CANNOT_RUN = f"TtD{_GONE}"


@dataclass(frozen=True, kw_only=True)
class Stalled:
    """One rank of a node that hangs: its last heartbeat, seconds since, its process's state as in /proc."""

    heartbeat: Heartbeat
    seconds: float
    state: str

    def __str__(self) -> str:
        beat = self.heartbeat
        where = "before its first step" if beat.step == NO_STEP else f"after step {beat.step}"
        busy = f"{beat.busy_with} " if beat.busy_with else ""
        state = "dead" if self.state in _GONE else _WORDS.get(self.state, "waiting")
        return f"rank {beat.rank} {busy}for {self.seconds:.0f} s {where} ({state}, state {self.state})"


def blame(stalled: Sequence[Stalled]) -> tuple[Stalled, bool]:
    """The rank that the others most likely wait for, and whether something sets it apart.

    That is one that cannot run: stopped, stuck in the kernel, or dead; else the one furthest behind, by
    steps, then by its last sign of life, which tells little where a collective ends every step.
    """

    def order(one: Stalled) -> tuple[bool, int]:
        return one.state not in _CANNOT_RUN, one.heartbeat.step

    first, *others = sorted(stalled, key=lambda one: (*order(one), one.heartbeat.sign_at))
    return first, first.state in _CANNOT_RUN or any(order(one) > order(first) for one in others)


def end_hang(run: RunFolder, beats: Sequence[Heartbeat], *, ranks: int) -> None:
    """Write down how the ranks of this node hang, then kill them.

    Args:
        run: where stacks and the error go.
        beats: of all ranks of this node that have not left.
        ranks: of the whole job; the others are on other nodes.
    """
    now = time.monotonic()
    states = _lasting_states([beat.process for beat in beats])  # before SIGCONT changes them
    stalled = [
        Stalled(heartbeat=beat, seconds=now - beat.sign_at, state=state)
        for beat, state in zip(beats, states, strict=True)
    ]
    message = (
        f"no step on {node_name()}: {', '.join(map(str, stalled))}; "
        f"the stacks of all threads are in {run.path / 'stacks'}"
    )
    logger.error(message)
    record = threading.Thread(target=_write_down, args=(run, stalled, message, ranks), daemon=True)
    record.start()
    record.join(SECONDS_TO_WRITE)
    if record.is_alive():
        logger.error("nothing can be written to %s: its file system may be what hangs", run.path)
    _kill([beat.process for beat in beats])
    logger.error("killed %s", _names(beats))


def stacks_file(run: RunFolder, rank: int) -> Path:
    """Where a rank's stacks go."""
    return run.path / "stacks" / f"rank-{rank}.txt"


def _write_down(run: RunFolder, stalled: Sequence[Stalled], message: str, ranks: int) -> None:
    """Error and stacks. The job's error is the first in time: the node of an evident culprit writes at once,
    the others when that has had its time.
    """
    culprit, evident = blame(stalled)
    try:
        if evident:
            _report(run, culprit, message)
        _dump_stacks(run, stalled)
        _dump_flight_recorder(run, stalled)
        if ranks > len(stalled):
            time.sleep(SECONDS_FOR_OTHER_NODES)
        if not evident:
            _report(run, culprit, message)
    except (OSError, UserError) as error:  # the last: the run's status is damaged
        logger.error("not everything about the hang could be written down: %s", error)


def _report(run: RunFolder, culprit: Stalled, message: str) -> None:
    failure = Failure(rank=culprit.heartbeat.rank, type="Hang", message=message)
    run.write_error(f"hang-{node_name()}", failure)


def _dump_stacks(run: RunFolder, stalled: Sequence[Stalled]) -> None:
    status = run.status_before()
    attempt = 1 if status is None else status.attempt
    when = time.strftime("%Y-%m-%d %H:%M:%S %z")
    living = [one for one in stalled if one.heartbeat.process.alive()]
    sizes = {}
    for one in living:
        path = stacks_file(run, one.heartbeat.rank)
        with path.open("a") as file:
            file.write(f"\n==== attempt {attempt}, {when}, {one}\n")
        sizes[path] = path.stat().st_size
        # A stopped process heeds SIGUSR1 only once SIGCONT has woken it.
        for number in (signal.SIGUSR1, signal.SIGCONT):
            if one.heartbeat.process.alive():
                os.kill(one.heartbeat.process.pid, number)
    silent = _wait_until_written(sizes)
    lost = [one.heartbeat for one in living if stacks_file(run, one.heartbeat.rank) in silent]
    if lost:
        logger.error("no stacks from %s within %.0f s", _names(lost), SECONDS_TO_DUMP)
    if len(lost) < len(living):
        written = [one.heartbeat for one in living if one.heartbeat not in lost]
        logger.error("wrote the stacks of %s to %s", _names(written), run.path / "stacks")


def _dump_flight_recorder(run: RunFolder, stalled: Sequence[Stalled]) -> None:
    """On GPUs. This process has inherited where NCCL writes to from the rank that started it."""
    pipes = os.environ.get("TORCH_NCCL_DEBUG_INFO_PIPE_FILE")
    dumps = {}
    for one in stalled:
        rank = one.heartbeat.rank
        with contextlib.suppress(OSError):  # no NCCL, or nobody reads the pipe any more
            pipe = os.open(f"{pipes}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
            os.write(pipe, b"1")
            os.close(pipe)
            dumps[rank] = Path(f"{os.environ['TORCH_NCCL_DEBUG_INFO_TEMP_FILE']}{rank}")
    silent = _wait_until_written(dict.fromkeys(dumps.values(), 0))
    for rank, dump in dumps.items():
        if dump.is_file():
            shutil.copyfile(dump, run.path / "stacks" / f"nccl-rank-{rank}")
    if dumps:
        written = len(dumps) - len(silent)
        logger.error("wrote %d of %d flight recorders to %s", written, len(dumps), run.path / "stacks")


def _names(beats: Sequence[Heartbeat]) -> str:
    return f"rank{'s' * (len(beats) > 1)} {', '.join(str(beat.rank) for beat in beats)}"


def _wait_until_written(sizes: Mapping[Path, int]) -> set[Path]:
    """Wait, not for ever, until files have grown beyond a size and stopped growing; those that did not."""
    deadline = time.monotonic() + SECONDS_TO_DUMP
    waiting, before = set(sizes), dict(sizes)
    while waiting and time.monotonic() < deadline:
        time.sleep(0.2)
        for path in list(waiting):
            size = path.stat().st_size if path.is_file() else 0
            if size > sizes[path] and size == before[path]:
                waiting.remove(path)
            before[path] = size
    return waiting


def _lasting_states(processes: Sequence[Process]) -> list[str]:
    """The state of each process. D counts only if it lasts: whoever reads from a disk passes through it."""
    looks = []
    for _ in range(3):
        looks.append([_state(process) for process in processes])
        time.sleep(0.1)
    return [next((look for look in found if look in "RS"), found[-1]) for found in zip(*looks, strict=True)]


def _state(process: Process) -> str:
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "X"
    # By now the number may be another process's.
    return stat.rpartition(")")[2].split()[0] if process.alive() else "X"


def _kill(processes: Sequence[Process]) -> None:
    """With their children, where they lead a group."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            if not process.alive():
                continue
            if os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                os.kill(process.pid, signal.SIGKILL)
