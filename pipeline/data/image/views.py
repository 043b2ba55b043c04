"""Images as a modality: random crops of each, cut in a worker, coloured and normalised on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ingest.image.decode import ImageError
from pipeline.data.batch import Inputs
from pipeline.data.image.augment import PHOTOMETRIC_DRAWS, augment, draw_parameters
from pipeline.data.image.crops import GEOMETRY_DRAWS, cut
from pipeline.data.reader import BadSampleError
from pipeline.data.targets import one_each
from pipeline.recipe.data import CropGroup, Data


class ImageViews:
    """See `pipeline.data.modality.Modality`. A name has the crops of one group of `data.crops`.

    Attributes:
        groups: name → how its crops are made.
    """

    draws = PHOTOMETRIC_DRAWS + GEOMETRY_DRAWS

    def __init__(self, data: Data) -> None:
        self.groups = crops_by_name(data)
        self.counts = {name: group.count for name, group in self.groups.items()}
        self._mean, self._std = data.mean, data.std

    def empty(self, rows: int) -> dict[str, NDArray[Any]]:
        return {
            name: np.empty((group.count, rows, group.size, group.size, 3), np.uint8)
            for name, group in self.groups.items()
        }

    def cut(self, data: bytes, draws: NDArray[np.float64], out: Mapping[str, NDArray[Any]]) -> None:
        try:
            cut(data, list(self.groups.values()), geometry(draws), [out[name] for name in self.groups])
        except ImageError as error:
            raise BadSampleError(str(error)) from error

    def parameters(self, draws: NDArray[np.float64]) -> dict[str, Tensor]:
        parameters, first = {}, 0
        for name, group in self.groups.items():
            of_group = draws[:, first : first + group.count, :PHOTOMETRIC_DRAWS].swapaxes(0, 1)
            drawn = draw_parameters(of_group, group.photometric)
            parameters[name] = torch.from_numpy(drawn.reshape(group.count * len(draws), -1))
            first += group.count
        return parameters

    def finish(
        self, views: Mapping[str, Tensor], parameters: Mapping[str, Tensor], *, dtype: torch.dtype
    ) -> Inputs:
        return Inputs(
            views={
                name: augment(
                    crops.permute(0, 3, 1, 2), parameters[name], mean=self._mean, std=self._std, dtype=dtype
                )
                for name, crops in views.items()
            }
        )

    def placeholders(self, rows: int, *, dtype: torch.dtype) -> Inputs:
        return Inputs(
            views={
                name: torch.rand(group.count * rows, 3, group.size, group.size, dtype=dtype)
                for name, group in self.groups.items()
            },
            targets=one_each(torch.zeros(rows, dtype=torch.int64)),
        )


def crops_by_name(data: Data) -> dict[str, CropGroup]:
    """The groups of crops, each by its key in the recipe's `data`: "crops.0", "crops.1", …"""
    return {f"crops.{index}": group for index, group in enumerate(data.crops)}


def geometry(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the draws of crops, (…, ImageViews.draws), those for `cut` and `crop_box`: colour comes first."""
    return draws[..., PHOTOMETRIC_DRAWS:]
