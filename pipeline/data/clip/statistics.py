"""Mean and deviation of each bin of a dataset's spectrograms, which a trunk is shown as zero and one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cluster.typed_json import read_record
from pipeline.data.to_device import constant

AUDIO_STATISTICS = "audio_statistics.json"  # in the folder of a run
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
        mean, std = (constant(values, decibels.device) for values in (self.mean, self.std))
        return (decibels - mean) / (std + _LEAST_DEVIATION)


def read_statistics(folder: Path) -> BinStatistics:
    """Those of a run that was trained on sound.

    Raises:
        UserError: they are not there, or damaged.
    """
    remedy = "the run, given again, writes it anew if it is removed"
    return read_record(BinStatistics, folder / AUDIO_STATISTICS, remedy=remedy)


def bin_statistics(spectrograms: Iterable[Tensor]) -> BinStatistics:
    """Of all frames of some spectrograms, each (n, 1, frames, bins) in decibels, one at least."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for decibels in spectrograms:
        frames = decibels.double().flatten(0, -2)
        count += len(frames)
        total = total + frames.sum(0)
        squares = squares + frames.square().sum(0)
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    return BinStatistics(mean=tuple(mean.tolist()), std=tuple(variance.sqrt().tolist()))
