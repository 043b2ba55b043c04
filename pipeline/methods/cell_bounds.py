"""How much a row can agree at most with those of a cell that it was not compared with.

A cosine is at most that of the angle to the cell's centre less the angle within which all of the cell lies,
for angles between directions obey the triangle inequality. Agreement grows with the cosine of each modality,
so that it is at most what both bounds give. Whose positives agree more than that has the best of all rows: a
certificate, without a look at the others.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

# What rounding takes from a bound, of rows in float16, too, whose length is 1 to three digits.
_ROUNDING = 2e-3
_TOGETHER = 16_384  # rows


class CellBounds:
    """Of some cells of a bank: the direction of each and how wide it is, by modality.

    Args:
        rows: this rank's, (rows, 2, dim).
        cell: of each.
        centres: (cells, 2 · dim), the same on every rank.
        group: ranks that share the bank; None for one process.
    """

    def __init__(self, rows: Tensor, cell: Tensor, centres: Tensor, *, group: ProcessGroup | None) -> None:
        self._directions = F.normalize(centres.view(len(centres), 2, -1), dim=-1)
        nearest = centres.new_full((len(centres), 2), torch.inf)
        for some, theirs in zip(torch.split(rows, _TOGETHER), torch.split(cell, _TOGETHER), strict=True):
            cosines = (F.normalize(some.float(), dim=-1) * self._directions[theirs]).sum(-1)
            nearest.scatter_reduce_(0, theirs[:, None].expand(-1, 2), cosines, "amin")
        if group is not None:
            dist.all_reduce(nearest, dist.ReduceOp.MIN, group=group)
        self._is_empty = nearest[:, 0].isinf()
        self._widths = _angle(nearest)

    def most(self, queries: Tensor, modality: int) -> Tensor:
        """The greatest cosine of each query with a row of each cell, (q, 2, dim) to (q, cells); minus
        infinity for cells without rows.
        """
        angle = _angle(F.normalize(queries[:, modality], dim=-1) @ self._directions[:, modality].T)
        bound = (angle - self._widths[:, modality]).clamp(min=0).cos() + _ROUNDING
        return bound.masked_fill(self._is_empty, -torch.inf)


def _angle(cosines: Tensor) -> Tensor:
    return cosines.clamp(-1, 1).acos()
