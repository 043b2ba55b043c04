"""Checkpoints written while the training goes on: a copy of the tensors, a thread, a group of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from cluster.atomic_file import write_atomically
from cluster.rank.torch_dist import World
from pipeline.distributed.sharded import own

T = TypeVar("T")
_NUMBERS = count()


class SaveError(Exception):
    """A checkpoint could not be written, and nothing is left of it; raised on every rank alike."""


class Staging:
    """One copy of what this rank writes, in host memory, made again and again in the same place."""

    def __init__(self) -> None:
        self._rooms: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors as they are now; the next call overwrites them. Pieces stay pieces."""
        rooms = {}
        for name, tensor in tensors:
            rooms[name] = self._room(name, tensor)
            own(rooms[name]).copy_(own(tensor), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the next step overwrites what is copied
        self._rooms = rooms
        return rooms

    def _room(self, name: str, tensor: Tensor) -> Tensor:
        room = self._rooms.get(name)
        if room is not None and (room.shape, room.dtype) == (tensor.shape, tensor.dtype):
            return room
        return torch.empty_like(tensor, device="cpu", pin_memory=own(tensor).is_cuda, requires_grad=False)


class _Planner(DefaultSavePlanner):
    """torch's, which plans once, as long as the tensors stay what they are: the first rank has the pieces of
    all to look through. Its plans are known by a name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(enable_plan_caching=True)
        self._cached_plans_key = name


class Writer:
    """Writes the files of checkpoints, with all ranks, from any one thread at a time."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._plans = f"writer {next(_NUMBERS)}"
        if world.control is not None:
            # The loop talks over the others: two threads must not share a group.
            group = dist.new_group(backend="gloo")
            if not isinstance(group, dist.ProcessGroup):
                raise RuntimeError("this rank is not in the group of all ranks")
            self._world = replace(world, group=group, control=group)

    def write(
        self, temporary: Path, tensors: dict[str, Tensor], state: dict[str, Any], publish: Callable[[], None]
    ) -> None:
        """Write and fsync everything below `temporary`, then `publish` it on the first rank.

        Raises:
            SaveError: on every rank, with the first cause; `temporary` is gone.
        """
        try:
            self._on_first(lambda: temporary.mkdir(parents=True))
            self._on_all(lambda: self._write_tensors(temporary, tensors))
            # Each rank hashes what it wrote: the work is shared, and the pages are still in its memory.
            parts = self._on_all(lambda: {path.name: digest(path) for path in self._own_files(temporary)})
            self._on_first(lambda: _vouch(temporary, parts, state))
            self._on_first(publish)
        except SaveError:
            if self._world.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            self._world.barrier()
            raise

    def _write_tensors(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        group = self._world.control
        with alone_on_purpose():
            save_tensors(
                tensors,
                storage_writer=FileSystemWriter(folder),
                planner=_Planner(self._plans),
                process_group=group,
                no_dist=group is None,
            )

    def _own_files(self, folder: Path) -> Iterator[Path]:
        """What this rank has written, by the names that torch gives: hundreds of ranks that list one folder
        read hundreds of thousands of names.
        """
        names = (f"__{self._world.rank}_{number}.distcp" for number in count())
        return takewhile(Path.exists, (folder / name for name in names))

    def _on_first(self, act: Callable[[], object]) -> None:
        self._on_all(act if self._world.is_first else lambda: None)

    def _on_all(self, act: Callable[[], T]) -> list[T | None]:
        """What every rank's act returned, once all have; if one fails, all do."""
        result, failure = None, None
        try:
            result = act()
        except (Exception, CheckpointException) as error:
            failure = cause(error)
        outcomes = self._world.gather((result, failure))
        if failures := [failure for _, failure in outcomes if failure is not None]:
            raise SaveError(failures[0])
        return [result for result, _ in outcomes]


def _vouch(folder: Path, parts: list[dict[str, Any] | None], state: dict[str, Any]) -> None:
    """Write state.json, and the manifest of all files."""
    write_atomically(folder / "state.json", json.dumps(state, indent=2) + "\n")
    rest = {path.name: digest(path) for path in (folder / ".metadata", folder / "state.json")}
    files = {name: entry for part in [*parts, rest] for name, entry in sorted((part or {}).items())}
    write_atomically(folder / "manifest.json", json.dumps({"files": files}, indent=2) + "\n")
    sync_folder(folder)


def cause(error: BaseException) -> str:
    """What went wrong, in one line; of several ranks' errors the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().partition("\n")[0] or type(error).__name__


def vouched(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The checkpoint's files by name, each with what `digest` said of it, as its manifest has them.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: it cannot be read.
        ValueError: it names files elsewhere.
    """
    files: dict[str, dict[str, Any]] = json.loads((checkpoint / "manifest.json").read_text())["files"]
    if elsewhere := [name for name in files if Path(name).name != name]:
        raise ValueError(f"{elsewhere[0]!r:.100} is no name of a file in this folder")
    return files


def digest(path: Path) -> dict[str, Any]:
    """Bytes and sha256 of a file, as the manifest keeps them."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone_on_purpose() -> Iterator[None]:
    """torch warns of every checkpoint that one process saves or loads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
