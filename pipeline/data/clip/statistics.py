"""Mean and deviation of each bin of a dataset's spectrograms, which a trunk is shown as zero and one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A bin of silence has none.
_LEAST_DEVIATION = 1e-5


@dataclass(frozen=True, kw_only=True)
class BinStatistics:
    """Of each bin, in decibels.

    Attributes:
        mean, std: (bins,).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, decibels: Tensor) -> Tensor:
        """(…, bins) with zero mean and unit variance."""
        mean, std = (torch.tensor(values, device=decibels.device) for values in (self.mean, self.std))
        return (decibels - mean) / (std + _LEAST_DEVIATION)
