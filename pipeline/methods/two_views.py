"""The two views that a joint embedding compares."""

from __future__ import annotations

import torch
from torch import Tensor


def two_views(crops: list[Tensor], *, rows: int) -> tuple[Tensor, Tensor]:
    """Each view, to be passed alone: BatchNorm then takes the statistics of one view, as published.

    Args:
        crops: one per crop group: (2 * rows, 3, size, size), view-major, or two of (rows, 3, size, size).
        rows: samples on this rank.
    """
    one, other = (view for group in crops for view in torch.split(group, rows))
    return one, other
