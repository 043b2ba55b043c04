"""The folder in which a node's read-ahead leaves what its ranks take: private, and gone with the process.

NAME/alive         locked as long as the process lives; says how many bytes it may write
     handed-over   int64 for each rank of the node: its first step that is not handed over
     failed.json   why the process has ended
     STEP.RANK     packs, see `pipeline.data.read_ahead.pack`
     chunks        neighbours of the windows in use
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cluster.errors import UserError
from cluster.file_lock import lock_file
from cluster.output_trouble import refusal
from pipeline.data.node_cache import CachePlace, private_folder, private_name

MEMORY = Path("/dev/shm")
_KIND = "read-ahead"
_OF_FREE = 0.5  # others write there, too


def place_of(cache: CachePlace, name: str) -> Path:
    """The folder of one start of one run on this node."""
    return private_name(_parent(cache)) / _KIND / name


def _parent(cache: CachePlace) -> Path:
    """Memory, unless there is to be a folder, or somebody else has taken our name there."""
    if cache.folder is not None:
        return cache.folder
    ours = private_name(MEMORY)
    taken = ours.is_symlink() or (ours.exists() and ours.stat().st_uid != os.geteuid())
    return Path(tempfile.gettempdir()) if taken else MEMORY


def make_place(cache: CachePlace, name: str, *, ranks: int, first: int) -> tuple[Path, int, int]:
    """Make the folder of a start, and remove those of dead ones.

    Returns:
        The folder, the bytes that there is room for, and an open file whose lock says that the start lives.

    Raises:
        UserError: the folder cannot be made, or is not private.
    """
    try:
        room = private_folder(_parent(cache), _KIND)
    except OSError as error:
        raise UserError(
            f"the folder for what is read ahead cannot be made ({error}): give run.cache another one, on a "
            "local disk"
        ) from error
    with _only_one(room):
        promised = 0
        for other in filter(Path.is_dir, room.iterdir()):
            if _is_alive(other):
                promised += _still_to_come(other)
            else:
                shutil.rmtree(other, ignore_errors=True)
        free = int(_OF_FREE * max(shutil.disk_usage(room).free - promised, 0))
        most = min(cache.limit, free)
        place, draft = place_of(cache, name), room / f".{name}"
        draft.mkdir(mode=0o700)
        alive = os.open(draft / "alive", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        lock_file(alive, draft / "alive", wait=True, of_kernel=True)
        os.write(alive, str(most).encode())
        (draft / "handed-over").write_bytes(np.full(ranks, first, np.int64).tobytes())
        draft.rename(place)  # whoever sees it sees all of it
    return place, most, alive


@contextlib.contextmanager
def _only_one(room: Path) -> Iterator[None]:
    lock = os.open(room / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        lock_file(lock, room / "lock", wait=True, of_kernel=True)
        yield
    finally:
        os.close(lock)


def _is_alive(place: Path) -> bool:
    """Whether a process holds the lock of a start's folder."""
    try:
        file = os.open(place / "alive", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not lock_file(file, place / "alive", shared=True)
    finally:
        os.close(file)


def _still_to_come(place: Path) -> int:
    """Bytes that a living start may write besides those that are there."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # it has just ended
        there = 512 * sum(entry.stat().st_blocks for entry in os.scandir(place))
        return max(int((place / "alive").read_text()) - there, 0)
    return 0


class HandedOver:
    """For each rank of a node, the first step that its main process has not handed over: shared memory."""

    def __init__(self, place: Path) -> None:
        with (place / "handed-over").open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def __getitem__(self, number: int) -> int:
        return int(np.frombuffer(self._map, np.int64)[number])

    def __setitem__(self, number: int, step: int) -> None:
        np.frombuffer(self._map, np.int64)[number] = step

    def all(self) -> list[int]:
        """In the order of the node's ranks."""
        steps: list[int] = np.frombuffer(self._map, np.int64).tolist()
        return steps


def tell_failure(place: Path, error: Exception) -> None:
    """Leave word of what has ended the process, for whoever waits for it."""
    error = refusal(error) if isinstance(error, PermissionError) else error
    known = isinstance(error, UserError | OSError)
    message = str(error) if known else f"reading ahead: {type(error).__name__}: {error}"
    text = json.dumps({"user": isinstance(error, UserError), "message": message})
    draft = place / f".failed-{secrets.token_hex(4)}"
    with contextlib.suppress(OSError):  # a full disk: its death will have to say it
        draft.write_text(text)
        draft.replace(place / "failed.json")


def raise_failure(place: Path) -> None:
    """Raise what has ended the process, if it has ended.

    Raises:
        UserError: what it left word of, or that it left none.
        OSError: what it left word of, if nobody has made a mistake.
    """
    if _is_alive(place):
        return
    try:
        failure = json.loads((place / "failed.json").read_text())
    except (FileNotFoundError, ValueError):
        raise UserError(
            "the process that reads ahead on this node was killed, perhaps for want of memory: lower "
            "run.cache_gib, or give run.cache a folder on a local disk, and start the run again"
        ) from None
    if failure["user"]:
        raise UserError(failure["message"])
    raise OSError(failure["message"])
