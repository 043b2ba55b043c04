"""Checkpoints: complete or absent, verified before they are read, and readable by any number of ranks.

Written under a temporary name, fsynced, and renamed: a folder `step-…` is whole unless a disk broke it, and
then its manifest tells.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.rank.torch_dist import World
from pipeline.checkpoint.files import BROKEN, METHOD, OPTIMIZER, broken_file, newest_first, published, step_of
from pipeline.checkpoint.metadata import TensorReader
from pipeline.checkpoint.period import young_daly
from pipeline.checkpoint.writer import (
    SaveError,
    Staging,
    Writer,
    sync_folder,
)
from pipeline.distributed.sharded import copy_own_piece, is_share, named_tensors, whole, whole_shape

logger = logging.getLogger(__name__)

SOON = 60.0  # seconds after which a checkpoint that could not be saved is tried again
WORTH_A_FILE = 64 << 20  # bytes, written in less than a second: hundreds of ranks need not have one each
PAUSES = (5.0, 15.0, 30.0)  # seconds between the tries of one that is waited for


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A published checkpoint: seconds that the training stood still, and until it was on the disk."""

    step: int
    stalled: float
    written: float

    def __str__(self) -> str:
        return f"stalled {self.stalled:.2f} s, written in {self.written:.1f} s"


class Checkpoints:
    """The checkpoints of one run, as one rank sees them; all ranks call `save` and `load` together.

    Args:
        folder: the run folder.
        method, optimizer: what is saved, and loaded in place.
        minutes, every_steps: how often to save; either makes a checkpoint due. None minutes: as Young and
            Daly say, from how long the last save held the training up.
        failures_per_node_day, nodes: how often to expect a failure.
        keep_last, keep_every_steps: what to keep.
        start_over: whether a run that had checkpoints may begin again when none of them is whole.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        folder: Path,
        *,
        world: World,
        method: nn.Module,
        optimizer: Optimizer,
        minutes: float | None,
        failures_per_node_day: float,
        nodes: int,
        every_steps: int | None,
        keep_last: int,
        keep_every_steps: int | None,
        start_over: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder / "checkpoints"
        self._world, self._method, self._optimizer = world, method, optimizer
        self._minutes, self._every_steps = minutes, every_steps
        self._failures_per_node_day, self._nodes = failures_per_node_day, nodes
        self._keep_last, self._keep_every_steps = keep_last, keep_every_steps
        self._start_over = start_over
        self._clock, self._saved_at = clock, clock()
        self._period = self._new_period(0.0)
        self._staging, self._writer = Staging(), Writer(world)
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._news: Saved | None = None
        self.slowest = 0.0  # seconds, of the saves so far

    def due(self, step: int) -> bool:
        """Whether this rank wants a checkpoint now. Clocks differ: the ranks agree before they save."""
        period = self._period if self._failure is None else min(self._period, SOON)
        on_time = self._world.is_first and self._clock() - self._saved_at >= period
        return on_time or (self._every_steps is not None and step % self._every_steps == 0)

    def save(
        self,
        step: int,
        state: dict[str, Any],
        *,
        wait: bool = True,
        before: Callable[[], object] = lambda: None,
    ) -> Path:
        """Publish a checkpoint: before it returns, or in the background while the training goes on.

        At most one is being written: a second save waits for the first. One that fails in the background is
        told in the log, leaves nothing behind, and is due again soon; the training waits for that one, which
        is tried some times, as any that is waited for.

        Args:
            state: JSON values, the same on every rank; given back by `load`.
            wait: until it is on the disk.
            before: on the first rank, what has to be done before it is published; it may run in a thread.

        Raises:
            UserError: if it is waited for and cannot be written.
        """
        called = self._clock()
        self.finish()
        wait = wait or self._failure is not None
        name = f"step-{step:08d}"
        temporary = self._folder / f".saving-{name}"
        tensors = self._staging.copy(collect(self._method, self._optimizer, world=self._world))
        started = self._saved_at = self._clock()

        def publish() -> None:
            before()
            self._publish(temporary, name)

        def write() -> None:
            # Each thread has a current device of its own, at first GPU 0.
            if self._world.device.type == "cuda":
                torch.cuda.set_device(self._world.device)
            try:
                self._writer.write(temporary, tensors, state | {"step": step}, publish)
            except SaveError as error:
                self._failure = (
                    f"checkpoint of step {step} could not be saved ({error}): the older ones are kept"
                )
                if self._world.is_first:
                    logger.warning("%s, and it is tried again; free some space", self._failure)
            else:
                now = self._clock()
                self.slowest = max(self.slowest, now - called)
                self._news = Saved(
                    step=step, stalled=(now if wait else started) - called, written=now - started
                )
                if self._world.is_first:
                    logger.info("checkpoint of step %d saved: %s", step, self._news)

        self._failure = None
        if wait:
            write()
            for pause in PAUSES:
                if self._failure is None:
                    break
                time.sleep(pause)
                self._failure = None
                write()
            if self._failure is not None:
                raise UserError(f"{self._failure}; free some space there and give the same command again")
        else:
            # A daemon: a rank that fails must not wait for a write that the others have left.
            self._thread = threading.Thread(target=write, name=f"save-{step}", daemon=True)
            self._thread.start()
        self._period = self._new_period(self._clock() - called)
        return self._folder / name

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def news(self) -> Saved | None:
        """The checkpoint published since the last question."""
        news, self._news = self._news, None
        return news

    def load(self) -> dict[str, Any] | None:
        """Load the newest checkpoint that is whole, in place; a broken one is set aside, with a word.

        Returns:
            The state given to `save`, and "step"; None if there never was a checkpoint, or to start over.

        Raises:
            UserError: on every rank, if one cannot read its part, or none that there was is whole.
        """
        if self._world.is_first:
            for leftover in self._folder.glob(".*"):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
        share = (self._world.rank, self._world.size)
        # Listed once: what other nodes see of a shared folder may be older.
        names = [path.name for path in published(self._folder)] if self._world.is_first else []
        for checkpoint in (self._folder / name for name in self._world.gather(names)[0]):
            broken = self._broken(checkpoint, share)
            if broken is None:
                self._read(checkpoint)
                state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
                return state
            if self._world.is_first:
                logger.warning("checkpoint %s is broken (%s): going back to an older one", checkpoint, broken)
                checkpoint.rename(checkpoint.with_name(f"{BROKEN}{checkpoint.name}-{time.time_ns()}"))
            self._world.barrier()
        lost = self._world.gather(self._lost() if self._world.is_first else None)[0]
        if lost is not None and not self._start_over:
            raise UserError(
                f"no checkpoint of this run is whole, and the newest {lost}: bring one back from a copy "
                "under its old name, or begin again at step 0 with run.start_over=true"
            )
        return None

    def _lost(self) -> str | None:
        """What became of the newest checkpoint, where there is none any more."""
        if aside := max(self._folder.glob(f"{BROKEN}*"), default=None):
            return f"was set aside as {aside}"
        latest = self._folder / "latest"
        return f"is gone, which {latest} names" if latest.exists() else None

    def _broken(self, checkpoint: Path, share: tuple[int, int]) -> str | None:
        """What is wrong with a checkpoint, as any rank sees it."""
        broken = unreadable = None
        try:
            broken = broken_file(checkpoint, share=share)
        except UserError as error:
            unreadable = str(error)
        everyone = self._world.gather((broken, unreadable))
        for _, trouble in everyone:
            if trouble is not None:
                raise UserError(trouble)
        return next((found for found, _ in everyone if found is not None), None)

    def newest(self, good: Callable[[dict[str, Any]], bool]) -> int | None:
        """The step of the newest checkpoint whose state is good, the same answer on every rank."""
        found = None
        if self._world.is_first:
            for path in newest_first(self._folder):
                with contextlib.suppress(OSError, ValueError, KeyError):  # `load` will tell of a broken one
                    if good(json.loads((path / "state.json").read_text())):
                        found = step_of(path)
                        break
        step: int | None = self._world.gather(found)[0]
        return step

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: those steps will be taken again, and be others."""
        if self._world.is_first:
            for checkpoint in newest_first(self._folder):
                if step_of(checkpoint) > step:
                    _remove(checkpoint)
            sync_folder(self._folder)
            write_atomically(self._folder / "latest", f"step-{step:08d}\n")
        self._world.barrier()

    def _read(self, checkpoint: Path) -> None:
        reader = TensorReader(checkpoint)
        saved = reader.tensors
        parameters = dict(named_tensors(self._method))
        self._optimizer.state.clear()
        targets = {f"{METHOD}{name}": (tensor, tensor) for name, tensor in parameters.items()}
        for name, entry in saved.items():
            parameter_name, _, key = name.removeprefix(OPTIMIZER).rpartition("/")
            parameter = parameters.get(parameter_name)
            if name.startswith(OPTIMIZER) and parameter is not None:
                tensor = _like(parameter, entry)
                targets[name] = (tensor, parameter)
                self._optimizer.state[parameter][key] = tensor
        if missing := sorted(targets.keys() ^ saved.keys()):
            raise UserError(
                f"{checkpoint} was saved by another model: {missing[0]} is not in both; start a new run"
            )
        group = self._world.control
        direct = {name: tensor for name, (tensor, parameter) in targets.items() if not is_share(parameter)}
        reader.load(direct, group)
        for name, full in self._deal_out(reader, sorted(targets.keys() - direct.keys())):
            tensor, parameter = targets[name]
            copy_own_piece(parameter, full, into=tensor)

    def _deal_out(self, reader: TensorReader, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, each read by one rank for all: hundreds that read all of them would take hours.

        As many at a time as there are ranks, for no rank has room for all.
        """
        rank, size, group = self._world.rank, self._world.size, self._world.control
        for first in range(0, len(names), size):
            now = names[first : first + size]
            rooms = [reader.room(name) if number == rank else None for number, name in enumerate(now)]
            failure = None
            try:
                reader.load({name: room for name, room in zip(now, rooms, strict=True) if room is not None})
            except UserError as error:
                failure = str(error)
            for failed in self._world.gather(failure):
                if failed is not None:
                    raise UserError(failed)
            for number, name in enumerate(now):
                full = rooms[number]
                full = reader.room(name) if full is None else full
                if group is not None:
                    dist.broadcast(full.flatten().view(torch.uint8), src=number, group=group)
                yield name, full

    def _new_period(self, save_seconds: float) -> float:
        """Seconds until the next checkpoint."""
        if self._minutes is not None:
            return 60 * self._minutes
        return young_daly(
            save_seconds=save_seconds,
            failures_per_node_day=self._failures_per_node_day,
            nodes=self._nodes,
        )

    def _publish(self, temporary: Path, name: str) -> None:
        if (self._folder / name).exists():  # of a try that got as far as this, and no further
            _remove(self._folder / name)
        temporary.rename(self._folder / name)
        sync_folder(self._folder)
        write_atomically(self._folder / "latest", f"{name}\n")
        for old in newest_first(self._folder)[self._keep_last :]:
            if self._keep_every_steps is None or step_of(old) % self._keep_every_steps:
                _remove(old)


def _remove(checkpoint: Path) -> None:
    # Renamed first: a half-deleted checkpoint must not look like a broken one.
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".deleting-{checkpoint.name}")))


def collect(method: nn.Module, optimizer: Optimizer, *, world: World) -> Iterator[tuple[str, Tensor]]:
    """What this rank writes of a training, by name: its pieces of what is sharded in torch's way, and whole
    tensors that together are its part of all others. The optimizer's are called after the parameter they
    belong to. Names and whole shapes are the same for every strategy. All ranks go through it together.

    Raises:
        TypeError: if the optimizer keeps something else than tensors: it would be lost.
    """
    dealt = [0] * world.size  # bytes of whole tensors, to each rank
    for name, tensor, parameter in _named(method, optimizer):
        full = whole(tensor, parameter) if is_share(parameter) else tensor.detach()
        if not isinstance(full, DTensor):
            least = dealt.index(min(dealt))
            rank = next((rank for rank, size in enumerate(dealt) if size < WORTH_A_FILE), least)
            dealt[rank] += full.nbytes
            if rank != world.rank:
                continue
        yield name, full


def _named(method: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, tensor, and the parameter or buffer that it belongs to."""
    for name, tensor in named_tensors(method):
        yield f"{METHOD}{name}", tensor, tensor
        for key, value in optimizer.state.get(tensor, {}).items():
            if isinstance(value, Tensor):
                yield f"{OPTIMIZER}{name}/{key}", value, tensor
            elif value is not None:
                raise TypeError(f"the optimizer keeps a {type(value).__name__} as {key!r}, not a tensor")


def _like(parameter: Tensor, entry: TensorStorageMetadata) -> Tensor:
    """Room for a tensor of the optimizer: laid out as its parameter is, for sums in the same order."""
    if whole_shape(parameter) == entry.size:
        return torch.empty_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=entry.properties.dtype)
