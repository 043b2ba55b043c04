"""What a method remembers of every sample: a bank of unit vectors, in pieces over the ranks (Wu et al., 2018,
https://arxiv.org/abs/1805.01978).

A row is read at its place, wherever it lies, and changes after steps only: what a batch is compared with does
not depend on how the rows lie, and a step that is skipped leaves nothing behind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from pipeline.data.feistel import derive_key, permute
from pipeline.distributed.collectives import all_gather_rows
from pipeline.distributed.rows import fetch_rows, own_rows
from pipeline.distributed.sharded import own

VIDEO, AUDIO = 0, 1
_BLOCK = 4096  # rows that are drawn together
_NEGATIVES = 0x6E65_6761  # keys that nothing else is drawn by


class Bank(nn.Module):
    """Two unit vectors of each sample: of its pictures, and of its sound.

    Attributes:
        rows: (samples, 2, dim); over several ranks a DTensor, of which each holds a chunk of rows. It stays
            in `dtype`, whatever the method is converted to.
        laid_over_ranks: see `pipeline.parallel.units.Table`.
    """

    rows: Tensor
    laid_over_ranks = True

    def __init__(self, samples: int, dim: int, *, dtype: torch.dtype, group: ProcessGroup | None) -> None:
        super().__init__()
        self.samples, self.dim, self.dtype, self.group = samples, dim, dtype, group
        self.register_buffer("rows", torch.empty(samples, 2, dim, dtype=dtype))

    @property
    def chunk(self) -> Tensor:
        """This rank's rows, (rows, 2, dim)."""
        return own(self.rows)

    @property
    def range(self) -> range:
        """Which they are."""
        return own_rows(self.samples, self.group)

    @torch.no_grad()
    def draw(self, key: str) -> None:
        """See `pipeline.parallel.initialize.OwnDraws`: directions at random, each row a function of (key,
        row).
        """
        chunk, here = self.chunk, self.range
        for start in range(here.start - here.start % _BLOCK, here.stop, _BLOCK):
            digest = hashlib.blake2b(f"{key}/{start // _BLOCK}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            block = F.normalize(torch.randn(_BLOCK, 2, self.dim, generator=generator), dim=-1)
            first, last = max(start, here.start), min(start + _BLOCK, here.stop)
            chunk[first - here.start : last - here.start] = block[first - start : last - start].to(chunk)

    def fetch(self, wanted: Tensor) -> Tensor:
        """Rows by number, all ranks together: (...) int64 to (..., 2, dim), in float32 or wider."""
        found = fetch_rows(self.chunk, wanted, rows=self.samples, group=self.group)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    @torch.no_grad()
    def update(self, batches: Sequence[tuple[Tensor, Tensor]], *, momentum: float) -> None:
        """Let rows follow what was seen of their samples, on all ranks together; of equal rows the last
        counts.

        Args:
            batches: in their order, this rank's part of each: positions, int64 (b,), and embeddings of unit
                length, (b, 2, dim).
            momentum: what a row keeps of itself, before it is brought to unit length again.
        """
        numbers = torch.cat([all_gather_rows(each, self.group) for each, _ in batches])
        seen = torch.cat([all_gather_rows(each, self.group) for _, each in batches])
        here = self.range
        if not len(here):
            return
        # Without asking the device how many there are: all are written, each as the last of its row, and what
        # is another rank's as one that is this one's.
        ascending, order = numbers.sort(stable=True)
        last = order[torch.searchsorted(ascending, numbers, right=True) - 1]
        inside = (numbers >= here.start) & (numbers < here.stop)
        last = torch.where(inside, last, last.index_select(0, inside.byte().argmax(0, keepdim=True)))
        places = (numbers[last] - here.start).clamp(0, len(here) - 1)
        old, new = self.chunk[places], seen[last]
        follows = F.normalize(old.to(new.dtype).lerp(new, 1 - momentum), dim=-1).to(self.dtype)
        self.chunk[places] = torch.where(inside.any(), follows, old)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.rows = self.rows.to(self.dtype)
        return self


def draw_negatives(
    positions: NDArray[np.int64],
    positives: NDArray[np.int64],
    *,
    samples: int,
    count: int,
    seed: int,
    number: int,
) -> NDArray[np.int64]:
    """Other samples for each of a batch: distinct, never itself, never one of its positives.

    Each row is a pure function of (seed, number, position), for a keyed permutation of all others.

    Args:
        positions: (b,).
        positives: (b, P), of each row distinct and not itself; P may be 0.
        samples: of the dataset, more than `count` + P.
        number: of the batch.

    Returns:
        (b, count).
    """
    left_out = np.sort(np.concatenate([positions[:, None], positives], axis=1), axis=1)
    keys = derive_key(seed, _NEGATIVES, number, positions)[:, None]
    drawn = permute(np.arange(count)[None, :], samples - left_out.shape[1], keys)
    for each in left_out.T:  # in ascending order: who is passed over makes room for all above
        drawn += drawn >= each[:, None]
    return drawn
