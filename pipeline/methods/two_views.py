"""The two views that a joint embedding compares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cluster.errors import UserError
from pipeline.data.batch import Inputs


def check_two_views(method: str, views: Mapping[str, int]) -> None:
    """Refuse a recipe that makes other than two views of a sample.

    Args:
        views: how many there are under each name.

    Raises:
        UserError: with what to write instead.
    """
    count = sum(views.values())
    if count != 2:
        raise UserError(
            f"method {method} compares two crops of an image, and data.crops gives {count}: give one group "
            "with count: 2, or two with count: 1"
        )


def two_views(inputs: Inputs, *, rows: int) -> tuple[Tensor, Tensor]:
    """Each view, to be passed alone: BatchNorm then takes the statistics of one view, as published.

    Args:
        inputs: one name with (2 * rows, …), view-major, or two with (rows, …) each.
        rows: samples on this rank.
    """
    one, other = (view for views in inputs.views.values() for view in torch.split(views, rows))
    return one, other
