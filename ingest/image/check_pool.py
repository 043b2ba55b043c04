"""Processes that check images, in the order given, whatever becomes of one of them.

An image that kills its process costs one row, and a process; its neighbours are checked again in a fresh one.
"""

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, Generic, Self, TypeVar, cast

from ingest.fence.fence import environment
from ingest.image.channel import NO_IMAGE, SHARED_BYTES, Channel
from ingest.image.check import Checked, Treatment
from ingest.image.check_worker import from_row
from ingest.problem import Problem

Token = TypeVar("Token")
Row = tuple[Token, bytes | Problem]
Result = tuple[Token, bytes | Problem, Checked]
# A file's bytes, and what the check is told besides: JSON values.
_Asked = tuple[bytes, Any]

# Small images travel together; a large one alone.
_BATCH_IMAGES = 64
_BATCH_BYTES = 1 << 19
# Nor do those of slow sites wait for others.
_BATCH_SECONDS = 1.0
_LIVES_WITHOUT_AN_IMAGE = 3

# Or glibc returns each picture's pages to the kernel, which clears them for the next one: a sixth of the
# time. Pictures beyond 16 MiB of pixels are returned all the same.
_MEMORY_STAYS = {
    "MALLOC_MMAP_THRESHOLD_": str(16 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}

logger = logging.getLogger(__name__)


class Checker(Generic[Token]):
    """A pool of checking processes, used as a context manager.

    Args:
        treatment: what is made of each image.
        workers: number of processes.
        seconds: CPU time that one image may take.
        memory_mb: address space that one process may add to what it has at its start, MiB.
        module: of the processes.
        more: what they are told at their start besides: JSON values.
        detail: what a check is told of a row besides its bytes: JSON values.
    """

    def __init__(
        self,
        treatment: Treatment,
        *,
        workers: int,
        seconds: float,
        memory_mb: int,
        module: str = "ingest.image.check_worker",
        more: Mapping[str, Any] = MappingProxyType({}),
        detail: Callable[[Token], Any] = lambda token: None,
    ) -> None:
        self._order = {"treatment": asdict(treatment), "seconds": seconds, "memory_mb": memory_mb, **more}
        self._module = module
        self._detail = detail
        self._workers = workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="checker")
        self._idle: deque[_Process] = deque()
        self._alive: set[_Process] = set()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Threads that wait for an answer see their process gone, and then that there is nothing left to do.
        self._closed = True
        for process in list(self._alive):
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in list(self._alive):
            process.kill()
            process.close()

    def run(self, rows: Iterable[Row[Token] | None]) -> Iterator[Result[Token]]:
        """Check every row that has bytes; answers come in the order of the rows.

        None among them says that there is no row now: what came before does not wait for the next.

        At most three batches per process are under way: that bounds memory, and how far ahead `rows` is read.
        """
        pending: deque[Future[list[Result[Token]]]] = deque()
        for batch in _batches(rows):
            if batch:
                pending.append(self._threads.submit(self._check_batch, batch))
            while pending and (len(pending) >= 3 * self._workers or pending[0].done()):
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()

    def _check_batch(self, batch: list[Row[Token]]) -> list[Result[Token]]:
        asked = [(data, self._detail(token)) for token, data in batch if isinstance(data, bytes)]
        verdicts = iter(self._check(asked))
        return [
            (
                token,
                data,
                next(verdicts)
                if isinstance(data, bytes)
                else Checked(status=data.status, reason=data.reason),
            )
            for token, data in batch
        ]

    def _check(self, images: Sequence[_Asked]) -> list[Checked]:
        verdicts: dict[int, Checked] = {}
        suspects: set[int] = set()
        deaths_without_an_image = 0
        while len(verdicts) < len(images):
            left = [number for number in range(len(images)) if number not in verdicts]
            try:
                answers = self._ask([images[number] for number in left])
                verdicts.update(zip(left, answers, strict=True))
            except _ProcessDied as death:
                if self._closed:
                    raise
                culprit = None if death.image is None else left[death.image]
                if culprit is None:
                    deaths_without_an_image += 1
                    if deaths_without_an_image == _LIVES_WITHOUT_AN_IMAGE:
                        raise RuntimeError(f"image checkers die before their first image: {death}") from death
                elif death.timed_out:
                    verdicts[culprit] = Checked(status="failed", reason="time_limit")
                elif culprit in suspects:
                    logger.warning("an image kills its checker: %s", death)
                    verdicts[culprit] = Checked(status="failed", reason="worker_died")
                else:
                    # Perhaps the machine was short of memory, or someone killed it: a second chance.
                    suspects.add(culprit)
        return [verdicts[number] for number in range(len(images))]

    def _ask(self, images: Sequence[_Asked]) -> list[Checked]:
        """One batch to one process, an idle one if there is one. As many threads as processes call this."""
        try:
            process = self._idle.pop()
        except IndexError:
            process = _Process(self._module, self._order)
            self._alive.add(process)
        try:
            answers = process.check(images)
        except _ProcessDied:
            self._alive.discard(process)
            process.close()
            raise
        self._idle.append(process)
        return answers


class _ProcessDied(Exception):  # noqa: N818
    """A checker is gone.

    Attributes:
        image: the number in the batch of the image that it had begun; None if none.
        timed_out: it was ended for the time that this image took.
    """

    def __init__(self, image: int | None, code: int, words: str) -> None:
        super().__init__(f"exit status {code}{': ' if words else ''}{words}")
        self.image = image
        self.timed_out = code == -signal.SIGPROF


class _Process:
    """One checking process and its pipes."""

    def __init__(self, module: str, order: dict[str, object]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        memory = os.memfd_create("images", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(memory, SHARED_BYTES)
            # Or an intruder there could end this process: who touches memory that is gone is killed.
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-m", module, str(memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                pass_fds=[memory],
                env=environment() | _MEMORY_STAYS,
            )
            self._input = cast(BinaryIO, self._process.stdin)
            self._output = cast(BinaryIO, self._process.stdout)
            self._channel = Channel(self._output, self._input, memory)
        finally:
            os.close(memory)
        self._channel.mark = NO_IMAGE
        # If it is dead already, the first batch will find out, and why.
        with contextlib.suppress(BrokenPipeError):
            self._channel.send(order)

    def check(self, images: Sequence[_Asked]) -> list[Checked]:
        files: list[bytes] = []
        asked = []
        for data, detail in images:
            # Parts of one file follow each other: it is sent once.
            if not files or data is not files[-1]:
                files.append(data)
            asked.append((len(files) - 1, detail))
        try:
            self._channel.send(asked, files)
            rows, parts = self._channel.receive()
            stored = iter(parts)
            return [from_row(row, stored) for row in rows]
        except (EOFError, BrokenPipeError):
            raise self._death() from None

    def _death(self) -> _ProcessDied:
        # It has closed its pipes, so it is gone or about to be; its own exit status is wanted, not that of
        # our kill.
        self._process.wait(timeout=60)
        image = self._channel.mark
        self._errors.seek(0)
        words = self._errors.read(10_000).decode(errors="replace").strip()
        return _ProcessDied(None if image == NO_IMAGE else image, self._process.returncode, words)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.wait()
        self._errors.close()
        self._channel.close()
        self._output.close()
        # What is left in the buffer has nobody to read it.
        with contextlib.suppress(BrokenPipeError):
            self._input.close()


def _batches(rows: Iterable[Row[Token] | None]) -> Iterator[list[Row[Token]]]:
    """Rows to check together; none when there is no row now."""
    batch: list[Row[Token]] = []
    size, due = 0, 0.0
    for row in rows:
        if row is None:
            if batch and time.monotonic() < due:
                continue
            yield batch
            batch, size = [], 0
            continue
        if not batch:
            due = time.monotonic() + _BATCH_SECONDS
        if isinstance(row[1], bytes) and not (batch and batch[-1][1] is row[1]):
            size += len(row[1])
        batch.append(row)
        if len(batch) == _BATCH_IMAGES or size >= _BATCH_BYTES or time.monotonic() >= due:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
