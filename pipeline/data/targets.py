"""The labels of a batch's samples, read beside their bytes by whoever reads these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.errors import UserError
from ingest.dataset.keys import key_name
from ingest.dataset.vocabulary import UnitLabels
from pipeline.data.training_set import TrainingSet


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """All labels of some samples, as codes, see `TrainingSet.classes`.

    Attributes:
        codes: one sample's after the other's, (labels,) int64.
        starts: where in `codes` each sample's begin, and the end, (samples + 1,) int64.
    """

    codes: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        return Targets(
            codes=self.codes.to(device, non_blocking=True), starts=self.starts.to(device, non_blocking=True)
        )

    def pin_memory(self) -> Targets:
        """A copy, ready for asynchronous copies to a GPU."""
        return Targets(codes=self.codes.pin_memory(), starts=self.starts.pin_memory())

    def shares(self, classes: int, *, dtype: torch.dtype) -> Tensor:
        """(samples, classes): 1/k for each of a sample's k labels, 0 elsewhere."""
        counts = self.starts.diff()
        # Its length is known on the host: no look at the device's numbers.
        rows = torch.repeat_interleave(counts, output_size=len(self.codes))
        shares = torch.zeros(len(self), classes, dtype=dtype, device=self.codes.device)
        shares[rows, self.codes] = counts.to(dtype).reciprocal()[rows]
        return shares


def one_each(codes: Tensor) -> Targets:
    """Targets of samples that have one label each, (n,) int64."""
    return Targets(codes=codes, starts=torch.arange(len(codes) + 1))


class TargetReader:
    """Reads labels by a sample's place; knows those of the units in use.

    Args:
        training_set: of the samples.
    """

    def __init__(self, training_set: TrainingSet) -> None:
        self._training_set = training_set
        self._units: dict[int, UnitLabels] = {}

    def keep(self, units: Iterable[int]) -> None:
        """From now on these units are read: what is known of others is forgotten."""
        live = set(units)
        self._units = {unit: labels for unit, labels in self._units.items() if unit in live}

    def read(self, places: Sequence[tuple[int, int]]) -> Targets:
        """The labels of the samples at these (unit index, row).

        Raises:
            UserError: if a sample has none, or they are damaged.
        """
        codes = [self._of(unit_index, row) for unit_index, row in places]
        starts = np.cumsum([0, *map(len, codes)], dtype=np.int64)
        return Targets(
            codes=torch.from_numpy(np.concatenate(codes).astype(np.int64)), starts=torch.from_numpy(starts)
        )

    def _of(self, unit_index: int, row: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        if unit_index not in self._units:
            self._units[unit_index] = self._training_set.unit_labels(unit_index)
        labels = self._units[unit_index].of(row)
        if not len(labels):
            dataset = self._training_set.dataset
            raise UserError(
                f"sample {key_name(int(dataset.unit_keys(unit_index)[row]))} of {dataset.path} has no label, "
                "and this training needs one of each: crawl with --labels-from or --labels, or leave such "
                f"samples out: `ingest view {dataset.path} --name labelled --where 'label_count > 0'`, and "
                "data.view=labelled"
            )
        return labels
