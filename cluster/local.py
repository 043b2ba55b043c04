"""Run a job on this machine: N ranks as processes, supervised by the process that submitted them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import FrameType
from typing import IO, Any, Protocol

from cluster.doctor import MALLOC_SETTINGS
from cluster.errors import AlreadyRunning, UserError
from cluster.job import PREEMPTED_EXIT_CODE, Job, Resources, State
from cluster.runs import Failure, Process, RunFolder, Status

POLL_SECONDS = 0.05
SECONDS_TO_END = 3.0  # for the other ranks, once one has failed

# libgomp's threads spin for milliseconds at a barrier: with one other busy process on two cores a training
# step took 14.9 s instead of 0.5. Spinning briefly it takes 1.0, and costs 3 % on a quiet machine.
OPENMP_SETTINGS = {"GOMP_SPINCOUNT": "1000"}


class Stream(Protocol):
    """Somewhere to repeat a log: a file, or what draws it on a terminal."""

    def write(self, text: str, /) -> object:
        """Take some text, cut anywhere."""

    def flush(self) -> object:
        """Show it now."""


class LocalExecutor:
    """Starts every rank on this machine.

    Args:
        stream: where rank 0's output is repeated while somebody waits; None keeps it in the log only.
    """

    def __init__(self, *, stream: Stream | None = None) -> None:
        self._stream = stream

    def submit(self, job: Job) -> LocalHandle:
        """Start the ranks and return; `wait()` supervises them.

        Raises:
            UserError: if the job wants more than one machine, or its folder is in use.
        """
        if job.resources.nodes != 1:
            raise UserError(
                f"{job.name} wants {job.resources.nodes} nodes, and the local executor has this one: "
                "use --nodes 1, or --executor slurm or ray"
            )
        run = RunFolder.create(job.folder)
        lock = run.lock()
        _refuse_if_elsewhere(run)
        run.clear_cancel()
        run.clear_attempt()
        run.write_job(job)
        attempt = run.read_status().attempt + 1 if (run.path / "status.json").is_file() else 1
        status = Status(
            state=State.PENDING,
            name=job.name,
            executor="local",
            id=f"local-{os.getpid()}",
            ranks=job.resources.ranks,
            attempt=attempt,
            submitted=time.time(),
            launcher=Process.current(),
        )
        run.write_status(status)
        return LocalHandle(job, run, status, lock, self._stream)


class LocalHandle:
    """The supervisor of one job's ranks."""

    def __init__(
        self, job: Job, run: RunFolder, status: Status, lock: IO[str], stream: Stream | None
    ) -> None:
        self._run = run
        self._status = status
        self._lock = lock
        self._stream = stream
        self._echo = Echo(run, stream)
        self._log_starts = [
            run.log(rank).stat().st_size if run.log(rank).exists() else 0
            for rank in range(job.resources.ranks)
        ]
        self._stop: signal.Signals | None = None
        self._kill_at: float | None = None
        self._codes: dict[int, int] = {}
        self._ended_by_us: set[int] = set()
        port = free_port()
        self._ranks = [self._start(job, rank, port) for rank in range(job.resources.ranks)]
        self._write(replace(status, state=State.RUNNING))

    @property
    def id(self) -> str:
        """The launcher's name."""
        return self._status.id

    def state(self) -> State:
        """Where the job is now."""
        self._observe()
        return self._status.state

    def wait(self) -> State:
        """Supervise to the end: repeat rank 0's output, pass signals on, end the peers of a failed rank."""
        with signals_passed_on(self._pass_on):
            while not self.state().ended:
                self._echo.show()
                time.sleep(POLL_SECONDS)
        self._echo.show()
        return self._status.state

    def cancel(self) -> None:
        """Ask the ranks to save and end."""
        self._run.request_cancel()
        self._send(signal.SIGTERM)

    def _start(self, job: Job, rank: int, port: int) -> subprocess.Popen[bytes]:
        ranks = job.resources.ranks
        threads = job.resources.cpus_per_rank or max(1, len(os.sched_getaffinity(0)) // ranks)
        defaults = rank_defaults(job.resources, threads=threads) | {"GLOO_SOCKET_IFNAME": "lo"}
        places = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        return start_rank(self._run, rank, environment=defaults | os.environ | places, lock=self._lock)

    def _observe(self) -> None:
        if self._status.state.ended:
            return
        for rank, process in enumerate(self._ranks):
            if rank not in self._codes and _has_ended(process.pid):
                end_group(process)  # its children, while its number is still its own
                self._codes[rank] = process.wait()
        if len(self._codes) == len(self._ranks):
            self._finish()
        elif self._failed_ranks():
            self._end_the_others()

    def _failed_ranks(self) -> list[int]:
        return [rank for rank, code in self._codes.items() if code not in (0, PREEMPTED_EXIT_CODE)]

    def _end_the_others(self) -> None:
        now = time.monotonic()
        if self._kill_at is None:
            self._kill_at = now + SECONDS_TO_END
            self._ended_by_us = set(range(len(self._ranks))) - set(self._codes)
            self._send(signal.SIGTERM)
        elif now > self._kill_at:
            self._send(signal.SIGKILL)

    def _finish(self) -> None:
        for process in self._ranks:
            if process.stdin is not None:
                process.stdin.close()
        failure = self._first_failure()
        if all(code == 0 for code in self._codes.values()):
            state = State.COMPLETED
        elif self._run.cancel_requested():
            state = State.CANCELLED
        elif failure is None:
            state = State.PREEMPTED
        else:
            state = State.FAILED
        failure = failure if state is State.FAILED else None
        self._write(replace(self._status, state=state, ended=time.time(), failure=failure))
        self._lock.close()

    def _first_failure(self) -> Failure | None:
        """The failure that the others follow from; None if the ranks ended as they were asked to."""
        failures = [(self._time_of(rank), rank) for rank in self._failed_ranks()]
        if not failures:
            return None
        error = self._run.first_error()
        if error is not None and error.type == "Hang":
            return error  # the watchdog's: it has killed all ranks alike
        rank = min(failures)[1]
        code = self._codes[rank]
        if self._stop is not None and -code in (self._stop, signal.SIGKILL):
            return None
        tail = tuple(self._run.tail(rank, start=self._log_starts[rank]))
        if self._run.error(rank).is_file():
            values = json.loads(self._run.error(rank).read_text())
            values.pop("time")
            return Failure(log_tail=tail, **values)
        return death(rank, code, log_tail=tail)

    def _time_of(self, rank: int) -> float:
        """When a rank failed. One killed without a word comes first: its peers failed of that."""
        if self._run.error(rank).is_file():
            return float(json.loads(self._run.error(rank).read_text())["time"])
        return float("inf") if rank in self._ended_by_us else 0.0

    def _write(self, status: Status) -> None:
        self._status = status
        self._run.write_status(status)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._stop is not None and number == signal.SIGINT:
            self._send(signal.SIGKILL)
            return
        if self._stream is not None:
            self._stream.write(
                f"{signal.Signals(number).name}: saving and stopping at the next step; "
                "Ctrl-C (again) stops at once\n"
            )
        self._stop = signal.SIGUSR2 if number == signal.SIGUSR2 else signal.SIGTERM
        self._send(self._stop)

    def _send(self, number: signal.Signals) -> None:
        for rank, process in enumerate(self._ranks):
            if rank in self._codes:
                continue
            if number == signal.SIGKILL:
                end_group(process)
            else:
                # Not Popen.send_signal: it reaps a rank that has just ended, behind _observe's back.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)


class Echo:
    """Repeats what rank 0 writes from now on, while somebody waits.

    Args:
        stream: None repeats nothing.
    """

    def __init__(self, run: RunFolder, stream: Stream | None) -> None:
        self._run = run
        self._stream = stream
        self._shown = run.log(0).stat().st_size if run.log(0).exists() else 0

    def show(self) -> None:
        """Repeat what is new."""
        if self._stream is None or not self._run.log(0).exists():
            return
        with self._run.log(0).open("rb") as log:
            log.seek(self._shown)
            text = log.read()
        # A failing rank 0 writes its error before its traceback; another rank may be the one to blame.
        if text and not self._run.error(0).is_file():
            self._shown += len(text)
            self._stream.write(text.decode(errors="replace"))
            self._stream.flush()


def rank_defaults(resources: Resources, *, threads: int) -> dict[str, str]:
    """What a rank finds in its environment where nobody has set it otherwise."""
    defaults = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if resources.gpus_per_rank == 0:
        defaults |= MALLOC_SETTINGS | OPENMP_SETTINGS
    return defaults


def start_rank(
    run: RunFolder, rank: int, *, environment: Mapping[str, str], lock: IO[str]
) -> subprocess.Popen[bytes]:
    """Start one rank, which shares in the run's lock and dies with this process."""
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


@contextlib.contextmanager
def signals_passed_on(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Ctrl-C, a closed terminal and a scheduler's signals become a request to save and stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP]
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous: dict[signal.Signals, Any] = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


def _refuse_if_elsewhere(run: RunFolder) -> None:
    """The lock speaks for this machine only; SLURM and Ray know of the others."""
    from cluster.executors import status_of  # which knows of this executor

    if not (run.path / "status.json").is_file() or run.read_status().executor == "local":
        return
    status = status_of(run)
    if not status.state.ended:
        raise AlreadyRunning(
            f"the run in {run.path} is going on already, on {status.executor} as {status.id}; "
            f"`submit cancel {run.path}` ends it"
        )


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; leaves it to be reaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def free_port() -> int:
    """A port that nobody listens on here, as yet."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
