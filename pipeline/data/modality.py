"""What a kind of samples asks of the loader, which knows bytes, order and draws, but no images or videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.batch import Inputs
from pipeline.data.clip.views import ClipViews
from pipeline.data.image.views import ImageViews
from pipeline.recipe.data import Data


class Modality(Protocol):
    """How a sample's bytes become its views: a worker cuts them, the device finishes them.

    Attributes:
        counts: how many views a sample has under each name.
        draws: uniform numbers for each view.
    """

    @property
    def counts(self) -> Mapping[str, int]: ...

    @property
    def draws(self) -> int: ...

    def empty(self, rows: int) -> dict[str, NDArray[Any]]:
        """Room for the views of some rows: for each name (count, rows, …)."""
        ...

    def cut(self, data: bytes, draws: NDArray[np.float64], out: Mapping[str, NDArray[Any]]) -> None:
        """Write the views of one sample.

        Args:
            data: the sample's bytes.
            draws: (views, draws) in (0, 1).
            out: for each name (count, …), a part of what `empty` gave.

        Raises:
            BadSampleError: if there are no views in these bytes.
        """
        ...

    def parameters(self, draws: NDArray[np.float64]) -> dict[str, Tensor]:
        """What `finish` shall do to the views of some rows: for each name (count·rows, K), view-major.

        Args:
            draws: (rows, views, draws) in (0, 1).
        """
        ...

    def finish(
        self, views: Mapping[str, Tensor], parameters: Mapping[str, Tensor], *, dtype: torch.dtype
    ) -> Inputs:
        """What a method is shown, on the device where the views are.

        Args:
            views, parameters: for each name (count·rows, …) and (count·rows, K), the latter on the CPU.
            dtype: of what is no whole number.
        """
        ...

    def placeholders(self, rows: int, *, dtype: torch.dtype) -> Inputs:
        """Noise in the shapes of what `finish` gives, for who counts steps and looks at no values."""
        ...


def modality_of(data: Data) -> Modality:
    """The modality that a recipe's `data` describes."""
    return ClipViews(data) if data.is_of_clips else ImageViews(data)
