"""Run folders: everything known about a run lies in one folder, readable by people and by scripts.

job.json            what is run
status.json         state, launcher, attempt, the first error; written atomically
logs/rank-N.log     stdout and stderr of every rank, over all attempts
errors/rank-N.json  the exception that ended a rank in the last attempt
errors/hang-N.json  what the watchdog of node N saw before it ended the ranks; their stacks are in stacks/
cancelled           somebody asked for the end: no executor starts this run again by itself
store.N             where ranks of start N find each other, if all of them are on one machine
requeue.N           all ranks of start N (counted from 0 in a submission) saved and ended, to be started again
done.N              start N has done the work: nothing that happens later makes a failure of it
unwatched           why no job looks how this one ends, on SLURM
untold.json         by which ways nobody could be told how the run ended
slurm-job           SLURM's id of its job, of which job.sbatch is the script (of parts: ../ARRAY.sbatch)
slurm-watcher       that of the small job that looks how that one ends
restarts.jsonl      why each attempt that did not complete ended
lock                held by the launcher and its ranks while any of them lives; lock.held: see `file_lock`
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import IO, Self

from cluster.atomic_file import write_atomically
from cluster.errors import AlreadyRunning, UserError
from cluster.file_lock import holder, lock_file
from cluster.host import node_name
from cluster.job import Job, State
from cluster.json_rows import lines_from_end
from cluster.run.rank_error import RankError, read_error
from cluster.run.status import Failure, Status
from cluster.typed_json import read_record

logger = logging.getLogger(__name__)

LOCK_PATIENCE = 10.0  # seconds that the ranks of a killed launcher may take to notice and die
TAIL_LINES = 20
TAIL_BYTES = 1 << 20  # in which the beginning of a start is looked for
BEGINNING = "==== start "  # and its token: the first line of a start in a rank's log
PIECE = 1 << 20  # characters of a log that are held at once
FOLLOW_SECONDS = 0.5
LOOKS_PER_QUESTION = 4  # at a log, for each time that the scheduler is asked


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make the folder, or open it if it is there already."""
        for name in ("logs", "errors"):
            (path / name).mkdir(parents=True, exist_ok=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a run that was submitted before.

        Raises:
            UserError: if there is none.
        """
        if not (path / "status.json").is_file():
            raise UserError(f"there is no run in {path}; `submit status` lists the runs")
        return cls(path)

    def lock(self, *, patience: float = LOCK_PATIENCE, of_kernel: bool = False) -> IO[str]:
        """Take the run for this launcher. The lock lasts as long as any process holds the file open.

        Args:
            patience: seconds to wait for another launcher that is going away, or for another submission.
            of_kernel: it is going to be shared, and no other lock can be.

        Raises:
            UserError: if another launcher, or a rank of one, still lives; or there is no lock of the kernel.
        """
        file = (self.path / "lock").open("a+")  # a file server may want both for a shared lock
        deadline = time.monotonic() + patience
        while not lock_file(file, self.path / "lock", of_kernel=of_kernel):
            before = self.status_before()
            launcher = None if before is None else before.launcher
            if (launcher is not None and launcher.is_here and launcher.alive()) or (
                time.monotonic() > deadline
            ):
                file.close()
                raise AlreadyRunning(
                    f"the run in {self.path} is going on already{holder(self.path / 'lock')}; `submit cancel "
                    f"{self.path}` ends it"
                )
            time.sleep(0.1)
        return file

    def is_held(self) -> bool:
        """Whether anybody has the lock, or a share of it; looks, and leaves no trace.

        One who may not look, or whose file system knows no locks, is told that somebody has.
        """
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except PermissionError:
            return True
        except OSError:
            return False
        with os.fdopen(descriptor, "rb") as file:
            try:
                return not lock_file(file, self.path / "lock", of_kernel=True)
            except UserError:
                return True

    def write_job(self, job: Job) -> None:
        """Write down what is run."""
        write_atomically(self.path / "job.json", job.to_json())

    def read_job(self) -> Job:
        """What is run.

        Raises:
            UserError: if job.json is damaged.
        """
        remedy = "give the command that started the run again: it writes that file anew"
        return read_record(Job, self.path / "job.json", remedy=remedy)

    def write_status(self, status: Status) -> None:
        """Replace status.json."""
        write_atomically(self.path / "status.json", json.dumps(status.to_json(), indent=2) + "\n")

    def read_status(self) -> Status:
        """status.json as it was last written.

        Raises:
            UserError: if it is damaged.
        """
        remedy = (
            "when nothing of the run is left, remove that file and give the command that started the run "
            "again: it goes on from the last checkpoint"
        )
        return read_record(Status, self.path / "status.json", remedy=remedy)

    def status_before(self) -> Status | None:
        """status.json, if the run has been submitted before."""
        return self.read_status() if (self.path / "status.json").exists() else None

    def status(self) -> Status:
        """The truth as far as this machine can see it: a run whose launcher is gone does not run."""
        status = self.read_status()
        launcher = status.launcher
        if status.state.ended or launcher is None or not launcher.is_here or launcher.alive():
            return status
        status = self.read_status()  # it may have ended properly between the two looks
        if status.state.ended:
            return status
        if self.cancel_requested():
            return replace(status, state=State.CANCELLED)
        message = (
            "the launcher is gone without having written how it ended: it was killed, or the machine "
            "restarted; give the same command again to go on from the last checkpoint"
        )
        return replace(status, state=State.FAILED, failure=Failure(rank=None, type="Killed", message=message))

    def unheard(self, reason: str) -> Status:
        """The state of a run when nobody answers who would know: the end that it has written itself, else
        unknown since its last sign.
        """
        status = self.read_status()
        if status.state.ended:
            return status
        return replace(status, state=State.UNKNOWN, reason=reason, since=self.last_sign())

    def request_cancel(self) -> None:
        """Write down the wish before anything is signalled: whoever sees the ranks end can tell why."""
        write_atomically(self.path / "cancelled", f"{time.time()}\n")

    def clear_cancel(self) -> None:
        """Forget an earlier wish: somebody submits the run anew."""
        (self.path / "cancelled").unlink(missing_ok=True)

    def cancel_requested(self) -> bool:
        """Whether somebody asked for the end of this attempt."""
        return (self.path / "cancelled").exists()

    def mark_requeue(self) -> None:
        """All ranks have saved and end now: the launcher is to start them again. It names its start in
        SUBMIT_START, for a mark of an earlier start means nothing.
        """
        self._mark(self.requeue_mark(int(os.environ.get("SUBMIT_START", "0"))))

    def requeue_mark(self, start: int) -> Path:
        """The mark of one start of the present submission."""
        return self.path / f"requeue.{start}"

    def mark_done(self) -> None:
        """What the job is for is on the disk: however its ranks end from now on, it is complete."""
        self._mark(self.done_mark(int(os.environ.get("SUBMIT_START", "0"))))

    def done_mark(self, start: int) -> Path:
        """The mark of one start of the present submission."""
        return self.path / f"done.{start}"

    def _mark(self, mark: Path) -> None:
        try:
            mark.touch()
        except OSError as error:  # all is saved all the same
            logger.warning("%s cannot be written: %s", mark, error)

    def store(self, start: int) -> Path:
        """The file by which ranks of one machine find each other; new for each start."""
        return self.path / f"store.{start}"

    def clear_attempt(self) -> None:
        """Forget how an earlier attempt ended."""
        traces = ("errors/*.json", "requeue.*", "done.*", "store.*")
        for trace in (path for pattern in traces for path in self.path.glob(pattern)):
            trace.unlink(missing_ok=True)

    def refuse_if_superseded(self) -> None:
        """Raise if a later start of the run has begun: this one was given up, and must not write any more.

        A node that is cut off goes on with what it was doing while the job runs elsewhere.
        """
        status = self.status_before()
        if status is None:  # no executor has started this
            return
        mine = int(os.environ.get("SUBMIT_START", "0"))
        job = (slurm_job() or status.id) if status.executor == "slurm" else status.id
        if status.executor != "local" and (status.start, status.id) != (mine, job):
            raise RuntimeError(
                f"start {status.start} of {status.executor} job {status.id} has taken this run over from "
                f"start {mine} of job {job}, which ends here"
            )

    def write_error(self, name: str, failure: Failure) -> None:
        """Write down what ends a rank, or what the watchdog of a node saw: `errors/{name}.json`."""
        error = RankError(
            rank=failure.rank,
            type=failure.type,
            message=failure.message,
            user_error=failure.user_error,
            traceback=failure.traceback,
            node=node_name(),
            start=start_token(),
            time=time.time(),
            by_peer=failure.by_peer,
        )
        write_atomically(self.path / "errors" / f"{name}.json", json.dumps(asdict(error), indent=2) + "\n")

    @property
    def unwatched(self) -> Path:
        """Says why nobody outside sees to the end of this run, where somebody should."""
        return self.path / "unwatched"

    def last_sign(self) -> float:
        """When anything was last written here, seconds since the epoch: a killed run lived till then."""
        written = [*self.path.glob("*.json*"), *self.path.glob("logs/*")]
        return max((path.stat().st_mtime for path in written if path.is_file()), default=0.0)

    def first_error(self, *, start: str | None = None) -> Failure | None:
        """The one that the others follow from, of the errors that ranks, or the watchdog of their node, have
        written down: the earliest that tells of more than a lost connection. Clocks of nodes differ.

        Args:
            start: only those of one start, as `start_token` names it: a node that was cut off goes on, and
                fails later than the start it belonged to.
        """
        errors = [
            error for path in self.path.glob("errors/*.json") if (error := read_error(path)) is not None
        ]
        errors = [error for error in errors if start in (None, error.start)]
        if not errors:
            return None
        first = min(errors, key=lambda error: (error.by_peer, error.time))
        tail = [] if first.rank is None else self.tail(first.rank, token=start)
        return first.failure(log_tail=tuple(tail))

    def cancel(self) -> None:
        """Ask a run of this machine to end; it saves a checkpoint first.

        Raises:
            UserError: if it has ended already, or runs elsewhere.
        """
        status = self.status()
        if status.state.ended:
            raise UserError(f"the run in {self.path} is not running: it is {status.state}")
        if status.launcher is None or not status.launcher.is_here:
            host = "another machine" if status.launcher is None else status.launcher.host
            raise UserError(f"the run in {self.path} was started on {host}: cancel it there")
        self.request_cancel()
        os.kill(status.launcher.pid, signal.SIGTERM)

    def log(self, rank: int) -> Path:
        """The log of one rank."""
        return self.path / "logs" / f"rank-{rank}.log"

    def error(self, rank: int) -> Path:
        """Where a rank writes the exception that ends it."""
        return self.path / "errors" / f"rank-{rank}.json"

    def log_text(self, rank: int, *, lines: int | None = None) -> Iterator[str]:
        """A rank's log as it is now, piece by piece.

        Args:
            lines: only so many, the last ones.
        """
        with self.log(rank).open(errors="replace") as file:
            file.seek(self._start_of(rank, lines))
            while text := file.read(PIECE):
                yield text

    def tail(
        self, rank: int, *, lines: int = TAIL_LINES, start: int = 0, token: str | None = None
    ) -> list[str]:
        """The last lines of a rank's log, of what its last start has written.

        Args:
            start: the byte at which that begins, where it is known; else the log itself says so.
            token: of the start that is meant, see `start_token`: it may have ended before its first word.
        """
        if not self.log(rank).is_file():
            return []
        with self.log(rank).open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = "\n" + file.read().decode(errors="replace")
        _, begun, last = text.rpartition(f"\n{BEGINNING}")
        whose, _, own = last.partition("\n") if begun else (token, "", last.removeprefix("\n"))
        return own.splitlines()[-lines:] if token in (None, whose) else []

    def _start_of(self, rank: int, lines: int | None) -> int:
        """The byte at which the last lines of a log begin, not counting one that is being written."""
        start = 0
        for end, line in islice(lines_from_end(self.log(rank)), lines or 0):
            start = end - len(line)
        return start

    def follow(
        self, rank: int, *, status: Callable[[RunFolder], Status], lines: int | None = None
    ) -> Iterator[str]:
        """A rank's log from its start, piece by piece, until the run has ended.

        Args:
            status: tells the run's state; see `cluster.executors.status_of`.
            lines: begin with so many of those that are there, the last ones.
        """
        while not self.log(rank).is_file():
            if status(self).state.ended:
                return
            time.sleep(FOLLOW_SECONDS)
        with self.log(rank).open(errors="replace") as file:
            file.seek(self._start_of(rank, lines))
            while True:
                ended = status(self).state.ended  # asked before reading: what is written last is shown too
                for _ in range(LOOKS_PER_QUESTION):
                    while text := file.read(PIECE):
                        yield text
                    if ended:
                        return
                    time.sleep(FOLLOW_SECONDS)


def slurm_job() -> str:
    """SLURM's id of the job that this process belongs to; empty if it belongs to none.

    Of a task of an array, ARRAY_TASK: its SLURM_JOB_ID may be the array's, which stands for all of its tasks.
    """
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID", "")


def start_token() -> str:
    """Names the start that this process belongs to: the scheduler's job, and which start of it."""
    return f"{slurm_job()}.{os.environ.get('SUBMIT_START', '0')}"


def list_runs(folder: str | Path) -> list[RunFolder]:
    """The runs in a folder, and those of graphs whose folders are there: run-2 before run-10."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = {path.parent for pattern in ("*/status.json", "*/*/status.json") for path in folder.glob(pattern)}
    return [RunFolder(path) for path in each_once(folder, found)]


def each_once(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Paths below a folder in their order, each place once, whatever links lead to it: by its own name, if
    that is among them, or by the shortest.
    """
    home, once = folder.resolve(), dict[Path, Path]()
    for path in sorted(paths, key=lambda path: (len(path.parts), _natural(path))):
        real = path.resolve()
        if real not in once or real == home / path.relative_to(folder):
            once[real] = path
    return sorted(once.values(), key=lambda path: _natural(path.relative_to(folder)))


def _natural(path: Path) -> list[tuple[int, str]]:
    """Numbers in a name by their value; other text by its letters."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", str(path))]
