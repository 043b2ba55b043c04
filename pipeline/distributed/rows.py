"""Tables of rows of which each rank holds a contiguous chunk, as DTensor's `Shard(0)` lays them out: read by
any rank, row by row. Without a group one process holds them all.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from pipeline.distributed.collectives import rank_in, world_size


def rows_per_rank(rows: int, group: ProcessGroup | None) -> int:
    """How long a chunk is; the last ones may be shorter, or empty."""
    return -(-rows // world_size(group))


def own_rows(rows: int, group: ProcessGroup | None) -> range:
    """The rows whose chunk this rank holds."""
    size, rank = rows_per_rank(rows, group), rank_in(group)
    return range(min(rank * size, rows), min((rank + 1) * size, rows))


@torch.no_grad()
def fetch_rows(chunk: Tensor, wanted: Tensor, *, rows: int, group: ProcessGroup | None) -> Tensor:
    """Rows of the table, wherever they lie. All ranks call it together, each with the rows that it wants.

    Args:
        chunk: this rank's, (len(own_rows), ...).
        wanted: int64, of any shape, on the device of `chunk`; each row is sent once, however often it is
            wanted.
        rows: of the whole table.

    Returns:
        (*wanted.shape, ...), as the table is.
    """
    if group is None:
        return chunk[wanted]
    distinct, places = torch.unique(wanted, return_inverse=True)
    ranks = world_size(group)
    owner = distinct // rows_per_rank(rows, group)
    asked = torch.bincount(owner, minlength=ranks)
    given = torch.empty_like(asked)
    dist.all_to_all_single(given, asked, group=group)
    inward, outward = asked.tolist(), given.tolist()
    requests = distinct.new_empty(sum(outward))
    dist.all_to_all_single(requests, distinct, outward, inward, group=group)
    answers = chunk[requests - own_rows(rows, group).start].contiguous()
    found = chunk.new_empty((len(distinct), *chunk.shape[1:]))
    dist.all_to_all_single(found, answers, inward, outward, group=group)
    return found[places]


@torch.no_grad()
def deliver_rows(numbers: Tensor, values: Tensor, *, rows: int, group: ProcessGroup | None) -> Tensor:
    """A table of rows that ranks have made, each row one of them, brought to where its chunk is.

    Args:
        numbers: int64 (n,), ascending; all ranks' together are all rows.
        values: (n, ...).

    Returns:
        This rank's chunk, (len(own_rows), ...).
    """
    if group is None:
        return values[numbers.argsort()]
    here = own_rows(rows, group)
    leaving = torch.bincount(numbers // rows_per_rank(rows, group), minlength=world_size(group))
    coming = torch.empty_like(leaving)
    dist.all_to_all_single(coming, leaving, group=group)
    outward, inward = leaving.tolist(), coming.tolist()
    places = numbers.new_empty(len(here))
    dist.all_to_all_single(places, numbers.contiguous(), inward, outward, group=group)
    found = values.new_empty((len(here), *values.shape[1:]))
    dist.all_to_all_single(found, values.contiguous(), inward, outward, group=group)
    chunk = torch.empty_like(found)
    chunk[places - here.start] = found
    return chunk
