"""How ranks meet: by few connections."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def _files_of_a_group(group: dist.ProcessGroup) -> int:
    before = _open_files()
    own = dist.new_group(backend="gloo")
    assert isinstance(own, dist.ProcessGroup)
    dist.all_reduce(torch.ones(1), group=own)
    dist.barrier(group=own)
    dist.all_gather_object([None] * dist.get_world_size(group), "who", group=own)
    return _open_files() - before


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_a_rank_is_connected_with_those_alone_that_it_talks_to(
    run_on_ranks: Callable[..., list[Any]],
) -> None:
    # With all of the others, each has 19 files more; on a busy machine, one may have tried to connect twice.
    assert statistics.median(run_on_ranks(16, _files_of_a_group)) < 16
