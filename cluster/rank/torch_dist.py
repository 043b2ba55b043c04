"""From an executor's environment variables to torch.distributed."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.errors import UserError
from cluster.file_lock import knows_locks, own_file
from cluster.job import DeviceName
from cluster.rank.interface import choose_interface


@dataclass(frozen=True, kw_only=True)
class World:
    """This rank's place among all ranks.

    Args:
        rank, size: place and number.
        local_rank: place on this machine.
        device: where this rank computes.
        group: all ranks, for tensors on `device`; None when there is one process.
        control: all ranks, for host-side messages that wait for no GPU; None when there is one process.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None
    control: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank: one small all-reduce, equal on every rank."""
        if self.control is None:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(vote) for vote in votes]

    def gather(self, value: Any) -> list[Any]:
        """One small value of every rank, in rank order, on every rank; pickled between ranks of one job."""
        if self.control is None:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return list(values)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.control is not None:
            dist.barrier(group=self.control)


def choose_device(name: DeviceName) -> torch.device:
    """Where to compute, by what a recipe or a command asks for: everything that may use a GPU asks here.

    Raises:
        UserError: if it is to be a GPU, and there is none.
    """
    found = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not found:
        raise UserError(
            f"the device is to be cuda, but torch finds no GPU on {socket.gethostname()} (see `submit "
            "doctor`): choose auto or cpu; where the nodes of a cluster have GPUs, give gpus_per_node in its "
            "site file"
        )
    return torch.device("cuda" if found else "cpu")


def gpus_here(name: DeviceName = "auto") -> int:
    """How many GPUs of this machine a job may have that asks for this device.

    Raises:
        UserError: as `choose_device` does.
    """
    return torch.cuda.device_count() if choose_device(name).type == "cuda" else 0


def own_place() -> tuple[int, int]:
    """This process's rank, and its rank on this machine, as the executor named them; 0 without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def distributed(device: DeviceName = "auto", *, timeout: timedelta | None = None) -> Iterator[World]:
    """Join the other ranks named by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; where all are
    on one machine, by SUBMIT_STORE, a file.

    gloo on the CPU, NCCL on GPUs with a gloo group beside it. A world of one has no group. After `timeout`
    a rank gives up waiting for the others; None leaves that to torch.
    """
    rank, local_rank = own_place()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    place = choose_device(device)
    if place.type == "cuda":
        # Ray, and sites that bind devices to tasks, show a rank its own GPUs only, counted from 0.
        place = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
    if size == 1:
        yield World(rank=0, size=1, local_rank=0, device=place, group=None, control=None)
        return
    group, control = init_process_group(place, rank=rank, size=size, timeout=timeout)
    try:
        yield World(rank=rank, size=size, local_rank=local_rank, device=place, group=group, control=control)
    finally:
        dist.destroy_process_group()


def init_process_group(
    device: torch.device, *, rank: int, size: int, timeout: timedelta | None = None
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The group for tensors on `device` and the one for host-side messages; the same one on the CPU."""
    choose_interface()
    # Ranks are connected when they first talk to each other: as a rule gloo connects each with all others,
    # for each group anew, and hundreds of ranks would have thousands of open files.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    store = _store_on_this_machine(size, timeout)
    if device.type == "cpu":
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        world = _world()
        return world, world
    # gloo is for parameters that are kept in host memory.
    backends = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backends, store=store, rank=rank, world_size=size, device_id=device, timeout=timeout
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    if not isinstance(control, dist.ProcessGroup):
        raise RuntimeError("this rank is not in the group of all ranks")
    return _world(), control


def _store_on_this_machine(size: int, timeout: timedelta | None) -> Any:
    """Where ranks of one machine find each other: a file, for torch's own store is a port that anybody on the
    network may write to, and what ranks gather is unpickled. None if they are on several.
    """
    if (path := os.environ.get("SUBMIT_STORE")) is None:
        return None
    if not knows_locks(Path(path)):  # torch's own locks it, too
        path = str(
            own_file(f"{path} {os.environ.get('SLURM_JOB_ID', '')} {os.environ.get('MASTER_PORT', '')}")
        )
    store = dist.FileStore(path, size)  # type: ignore[attr-defined]
    store.set_timeout(timeout or dist.default_pg_timeout)
    return store


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    if world is None:
        raise RuntimeError("torch.distributed was not initialised")
    return world
