"""One rank's rows of any global batch, by its number: read, crop, and draw what the device will do."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import UserError
from ingest.dataset.open import Dataset
from pipeline.data import order as orders
from pipeline.data.batch import Batch
from pipeline.data.image.augment import PHOTOMETRIC_DRAWS, draw_parameters
from pipeline.data.image.crops import GEOMETRY_DRAWS, cut
from pipeline.data.philox import uniforms
from pipeline.data.reader import BadSampleError, Reader
from pipeline.recipe.data import Data

_log = logging.getLogger(__name__)
# Bad samples are rare and windows are shuffled: so many in a row mean that the dataset is broken.
_MOST_SUBSTITUTES = 1_000

# Writes a sample's crops: of its place, its crops' geometry draws, and where to. BadSampleError if it cannot.
WriteCrops = Callable[[tuple[int, int], NDArray[np.float64], list[NDArray[Any]]], None]


class RankBatches:
    """Makes one rank's batches, each a pure function of its number. Opens nothing before the first.

    Args:
        rows: the rank's rows of every global batch.

    Attributes:
        count: of the rank's rows.
    """

    def __init__(self, dataset: Dataset, data: Data, order: orders.Order, rows: slice) -> None:
        self._dataset, self._data, self._order, self._rows = dataset, data, order, rows
        self.count: int = rows.stop - rows.start
        self._reader: Reader | None = None
        self._index: tuple[int, orders.EpochIndex] | None = None

    @property
    def crop_bytes(self) -> int:
        """Size of one batch's crops."""
        return self.count * sum(group.count * 3 * group.size * group.size for group in self._data.crops)

    def __call__(self, step: int) -> Batch:
        """The rank's rows of micro-batch `step`, counted over all epochs.

        Raises:
            UserError: if a shard is missing, or hardly any sample of a window can be used.
            OSError: if reading fails again and again.
        """
        crops = [
            np.empty((group.count, self.count, group.size, group.size, 3), np.uint8)
            for group in self._data.crops
        ]
        keys, photometric = self.fill(step, crops, self._read_and_cut)
        return Batch(
            crops=[torch.from_numpy(of_group).flatten(0, 1).permute(0, 3, 1, 2) for of_group in crops],
            photometric=photometric,
            keys=keys,
        )

    def fill(self, step: int, out: Sequence[NDArray[Any]], write: WriteCrops) -> tuple[Tensor, list[Tensor]]:
        """Let `write` make the crops of each row of micro-batch `step`; for bad samples, of substitutes.

        Args:
            out: for each crop group (count, b, …), of which `write` gets (count, …).

        Returns:
            The keys and the colour parameters, as in `Batch`.
        """
        epoch, step_of_epoch = divmod(step, self._order.steps_per_epoch)
        reader = self._open_reader()
        places = self.places(step)
        keys = np.array([reader.key(*place) for place in places], np.int64)
        draws = self._draws(epoch, keys, np.zeros(self.count, np.int64))
        for number, place in enumerate(places):
            parts = [of_group[:, number] for of_group in out]
            ahead = 0
            candidate = place
            while not self._written(write, candidate, draws[number], parts):
                ahead += 1
                candidate = self._substitute(epoch, step_of_epoch, number, ahead)
                keys[number] = reader.key(*candidate)
                draws[number] = self._draws(epoch, keys[number : number + 1], np.array([ahead]))[0]
        return torch.from_numpy(keys), self._photometric(draws)

    def places(self, step: int) -> list[tuple[int, int]]:
        """The (unit index, row) of the rank's rows of micro-batch `step`, before any substitution."""
        return self._places(*divmod(step, self._order.steps_per_epoch), self._rows, 0)

    def _places(self, epoch: int, step: int, rows: slice, ahead: int) -> list[tuple[int, int]]:
        """The (unit index, row) of some rows of a global batch."""
        if self._index is None or self._index[0] != epoch:
            self._index = (epoch, orders.epoch_index(self._order, self._dataset.counts, epoch=epoch))
        positions = orders.global_batch(self._order, epoch=epoch, step=step, rows=rows, ahead=ahead)
        units, unit_rows = orders.locate(self._index[1], positions)
        return list(zip(units.tolist(), unit_rows.tolist(), strict=True))

    def _substitute(self, epoch: int, step: int, number: int, ahead: int) -> tuple[int, int]:
        """The place `ahead` rows after the batch's row `number`, in its window."""
        if ahead >= min(orders.smallest_window(self._order), _MOST_SUBSTITUTES):
            raise UserError(
                f"{ahead} samples in a row of {self._dataset.path} cannot be used: see which and why with "
                f"`ingest verify --level decode {self._dataset.path}`"
            )
        row = self._rows.start + number
        return self._places(epoch, step, slice(row, row + 1), ahead)[0]

    def _written(
        self, write: WriteCrops, place: tuple[int, int], draws: NDArray[np.float64], out: list[NDArray[Any]]
    ) -> bool:
        """Write a sample's crops; False, and a line in the log, if it is a bad one."""
        try:
            write(place, draws[:, PHOTOMETRIC_DRAWS:], out)
        except BadSampleError as error:
            name = self._open_reader().name(*place)
            _log.warning("%s is bad: %s; the next row of its window takes its place", name, error)
            return False
        return True

    def _read_and_cut(
        self, place: tuple[int, int], draws: NDArray[np.float64], out: list[NDArray[Any]]
    ) -> None:
        cut(self._open_reader().read(*place), self._data.crops, draws, out)

    def _draws(self, epoch: int, keys: NDArray[np.int64], attempts: NDArray[np.int64]) -> NDArray[np.float64]:
        """(samples, crops, draws): colour first, then geometry."""
        return uniforms(
            seed=self._order.seed,
            epoch=epoch,
            keys=keys,
            attempts=attempts,
            crops=sum(group.count for group in self._data.crops),
            draws=PHOTOMETRIC_DRAWS + GEOMETRY_DRAWS,
        )

    def _photometric(self, draws: NDArray[np.float64]) -> list[Tensor]:
        parameters, first = [], 0
        for group in self._data.crops:
            of_group = draws[:, first : first + group.count, :PHOTOMETRIC_DRAWS].swapaxes(0, 1)
            drawn = draw_parameters(of_group, group.photometric)
            parameters.append(torch.from_numpy(drawn.reshape(group.count * self.count, -1)))
            first += group.count
        return parameters

    def _open_reader(self) -> Reader:
        if self._reader is None:
            per_window = math.ceil(self._order.window * len(self._dataset.counts) / self._order.samples) + 2
            lanes = math.ceil(self.count / self._order.lane_rows)
            self._reader = Reader(self._dataset, units=lanes * per_window)
        return self._reader
