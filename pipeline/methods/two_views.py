"""The two views that a joint embedding compares."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.batch import Inputs


def two_views(inputs: Inputs, *, rows: int) -> tuple[Tensor, Tensor]:
    """Each view, to be passed alone: BatchNorm then takes the statistics of one view, as published.

    Args:
        inputs: one name with (2 * rows, …), view-major, or two with (rows, …) each.
        rows: samples on this rank.
    """
    one, other = (view for views in inputs.views.values() for view in torch.split(views, rows))
    return one, other
