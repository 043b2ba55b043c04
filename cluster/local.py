"""Run a job on this machine: N ranks as processes, supervised by the process that submitted them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass, replace
from types import FrameType
from typing import IO, ClassVar

from cluster.errors import UserError
from cluster.host import Process
from cluster.job import PREEMPTED_EXIT_CODE, ExecutorName, Job, State
from cluster.rank.process import SECONDS_TO_END, death, end_group, free_port, rank_defaults, start_rank
from cluster.run.folder import RunFolder
from cluster.run.notify import notify
from cluster.run.rank_error import read_error
from cluster.run.status import Failure, Status
from cluster.run.waiting import Echo, Stream, signals_passed_on
from cluster.site import Site

POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class LocalExecutor:
    """Starts every rank on this machine.

    Attributes:
        stream: where rank 0's output is repeated while somebody waits; None keeps it in the log only.
        site: the cluster's facts: who is told of a run's end.
        gpus: that the ranks may see, as CUDA_VISIBLE_DEVICES names them; None: all there are.
    """

    name: ClassVar[ExecutorName] = "local"
    stream: Stream | None = None
    site: Site | None = None
    gpus: tuple[str, ...] | None = None

    def refuse_impossible(self, job: Job) -> None:
        """Look before anything is written.

        Raises:
            UserError: if the job wants more than one machine.
        """
        if job.resources.nodes != 1:
            raise UserError(
                f"{job.name} wants {job.resources.nodes} nodes, and the local executor has this one: "
                "use --nodes 1, or --executor slurm or ray"
            )

    def start(self, job: Job, run: RunFolder, pending: Status, lock: IO[str]) -> LocalHandle:
        """Start the ranks and return; `wait()` supervises them, and they share in the lock."""
        starting = replace(
            pending,
            id=f"local-{os.getpid()}",
            attempt=pending.attempt + 1,
            started=time.time(),
            launcher=Process.current(),
        )
        run.write_status(starting)
        return LocalHandle(job, run, starting, lock, self)


class LocalHandle:
    """The supervisor of one job's ranks."""

    def __init__(
        self, job: Job, run: RunFolder, status: Status, lock: IO[str], executor: LocalExecutor
    ) -> None:
        self._run = run
        self._status = status
        self._lock = lock
        self._stream = executor.stream
        self._gpus = executor.gpus
        self._echo = Echo(run, self._stream)
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

    @property
    def detached(self) -> bool:
        """The ranks die with this process."""
        return False

    def state(self) -> State:
        """Where the job is now; what rank 0 has said meanwhile is repeated."""
        self._observe()
        self._echo.show()
        return self._status.state

    def wait(self) -> State:
        """Supervise to the end: repeat rank 0's output, pass signals on, end the peers of a failed rank."""
        with signals_passed_on(self._pass_on):
            while not (state := self.state()).ended:
                time.sleep(POLL_SECONDS)
        return state

    def cancel(self) -> None:
        """Ask the ranks to save and end."""
        self._run.request_cancel()
        self._send(signal.SIGTERM)

    def _start(self, job: Job, rank: int, port: int) -> subprocess.Popen[bytes]:
        ranks = job.resources.ranks
        threads = job.resources.cpus_per_rank or max(1, len(os.sched_getaffinity(0)) // ranks)
        defaults = rank_defaults(job.resources, threads=threads) | {"GLOO_SOCKET_IFNAME": "lo"}
        places = {
            "SUBMIT_START": "0",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "SUBMIT_STORE": str(self._run.store(0)),
        }
        if self._gpus is not None:
            places["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus)
        environment = defaults | os.environ | places
        return start_rank(self._run, rank, environment=environment, lock=self._lock, directory=job.directory)

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
        if all(code == 0 for code in self._codes.values()) or self._run.done_mark(0).exists():
            state = State.COMPLETED
        elif self._run.cancel_requested():
            state = State.CANCELLED
        elif failure is None:
            state = State.PREEMPTED
        else:
            state = State.FAILED
        failure = failure if state in (State.FAILED, State.COMPLETED) else None
        self._write(self._status.stopped(state, failure=failure))
        self._lock.close()
        notify(self._run, self._status)

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
        if (written := read_error(self._run.error(rank))) is not None:
            return written.failure(log_tail=tail)
        return death(rank, code, log_tail=tail)

    def _time_of(self, rank: int) -> float:
        """When a rank failed. One killed without a word comes first: its peers failed of that."""
        if (written := read_error(self._run.error(rank))) is not None:
            return written.time
        return float("inf") if rank in self._ended_by_us else 0.0

    def _write(self, status: Status) -> None:
        self._run.write_status(status)
        self._status = status  # now it is so: what could not be written is tried again at the next look

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


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; leaves it to be reaped."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
