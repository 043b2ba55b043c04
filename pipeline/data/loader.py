"""The loader: global batches by number, made by worker processes, equal whatever their count and the ranks'."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from cluster.errors import UserError
from ingest.dataset import Dataset, open_dataset
from pipeline.data import order as orders
from pipeline.data.augment import PHOTOMETRIC_DRAWS, augment, draw_parameters
from pipeline.data.crops import GEOMETRY_DRAWS, cut
from pipeline.data.philox import uniforms
from pipeline.data.reader import BadSample, Reader
from pipeline.recipe import Data

_log = logging.getLogger(__name__)
# Bad samples are rare and the window is shuffled: so many in a row mean that the dataset is broken.
_MOST_SUBSTITUTES = 1_000


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's rows of a global batch.

    Attributes:
        crops: for each crop group uint8 (count·b, 3, S, S), view-major: view 0 of all rows, then view 1, …
        photometric: for each crop group float32 (count·b, K), the drawn colour parameters of `augment`.
        keys: int64 (b,), the samples' keys.
    """

    crops: list[Tensor]
    photometric: list[Tensor]
    keys: Tensor

    def pin_memory(self) -> "Batch":
        """The same, ready for an asynchronous copy to a GPU; the parameters stay where the CPU reads them."""
        return Batch(
            crops=[crops.pin_memory() for crops in self.crops], photometric=self.photometric, keys=self.keys
        )


class _Batches:
    """Makes one rank's batches by number, in whichever process it is called."""

    def __init__(self, dataset: Dataset, data: Data, order: orders.Order, rows: slice) -> None:
        self._dataset, self._data, self._order, self._rows = dataset, data, order, rows
        self._reader: Reader | None = None
        self._index: tuple[int, orders.EpochIndex] | None = None

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, step: int) -> Batch:
        epoch, step_of_epoch = divmod(step, self._order.steps_per_epoch)
        reader, index = self._open(epoch)
        positions = orders.global_batch(self._order, epoch=epoch, step=step_of_epoch, rows=self._rows)
        units, rows = orders.locate(index, positions)
        places = list(zip(units.tolist(), rows.tolist(), strict=True))
        count = len(places)
        groups = self._data.crops
        crops = [np.empty((group.count, count, group.size, group.size, 3), np.uint8) for group in groups]
        keys = np.array([reader.key(*place) for place in places], np.int64)
        draws = self._draws(epoch, keys, np.zeros(count, np.int64))
        for number, place in enumerate(places):
            out = [group[:, number] for group in crops]
            ahead = 0
            while not self._cut(reader, place, draws[number], out):
                ahead += 1
                place = self._substitute(index, epoch, step_of_epoch, number, ahead)
                keys[number] = reader.key(*place)
                draws[number] = self._draws(epoch, keys[number : number + 1], np.array([ahead]))[0]
        photometric, first = [], 0
        for group in groups:
            drawn = draws[:, first : first + group.count, :PHOTOMETRIC_DRAWS].swapaxes(0, 1)
            parameters = draw_parameters(np.ascontiguousarray(drawn), group.photometric)
            photometric.append(torch.from_numpy(parameters.reshape(group.count * count, -1)))
            first += group.count
        return Batch(
            crops=[torch.from_numpy(c.reshape(-1, *c.shape[2:])).permute(0, 3, 1, 2) for c in crops],
            photometric=photometric,
            keys=torch.from_numpy(keys),
        )

    def _cut(
        self,
        reader: Reader,
        place: tuple[int, int],
        draws: NDArray[np.float64],
        out: list[NDArray[np.uint8]],
    ) -> bool:
        """Write a sample's crops; False, and a line in the log, if it is a bad one."""
        try:
            cut(reader.read(*place), self._data.crops, draws[:, PHOTOMETRIC_DRAWS:], out)
        except BadSample as error:
            _log.warning(
                "%s is bad (%s): the next row of its window takes its place", reader.name(*place), error
            )
            return False
        return True

    def _substitute(
        self, index: orders.EpochIndex, epoch: int, step: int, number: int, ahead: int
    ) -> tuple[int, int]:
        """The place `ahead` rows after a bad one of the batch."""
        if ahead >= min(orders.window_rows(self._order), _MOST_SUBSTITUTES):
            raise UserError(
                f"{ahead} samples in a row cannot be read from {self._dataset.path}: "
                f"run `ingest verify --level decode {self._dataset.path}`"
            )
        row = self._rows.start + number
        positions = orders.global_batch(
            self._order, epoch=epoch, step=step, rows=slice(row, row + 1), ahead=ahead
        )
        units, rows = orders.locate(index, positions)
        return int(units[0]), int(rows[0])

    def _draws(self, epoch: int, keys: NDArray[np.int64], attempts: NDArray[np.int64]) -> NDArray[np.float64]:
        return uniforms(
            seed=self._order.seed,
            epoch=epoch,
            keys=keys,
            attempts=attempts,
            crops=sum(group.count for group in self._data.crops),
            draws=PHOTOMETRIC_DRAWS + GEOMETRY_DRAWS,
        )

    def _open(self, epoch: int) -> tuple[Reader, orders.EpochIndex]:
        if self._reader is None:
            self._reader = Reader(self._dataset, units=1024)
        if self._index is None or self._index[0] != epoch:
            self._index = (epoch, orders.epoch_index(self._order, self._dataset.counts, epoch=epoch))
        return self._reader, self._index[1]


def _as_made(batch: Batch) -> Batch:
    return batch


class Loader:
    """A sealed dataset as an endless sequence of batches, a pure function of (root, view, seed, step, B, L, W).

    Args:
        data: what is read, and how a sample becomes crops.
        rank, world_size: this rank takes its contiguous rows of every global batch.
        workers: processes that read and crop; 0 does it in this one. The batches do not depend on it.
        device: where `augment` works.

    Raises:
        UserError: if the dataset is not sealed or smaller than a batch, or the ranks do not divide the batch.
    """

    def __init__(
        self, data: Data, *, seed: int, rank: int, world_size: int, workers: int, device: torch.device
    ) -> None:
        self._data, self._workers, self._device = data, workers, device
        self._dataset = open_dataset(data.root, sealed=data.sealed, view=data.view)
        self._order = orders.plan_order(
            samples=len(self._dataset), batch_size=data.batch_size, window=data.window, seed=seed
        )
        self._rows = orders.rank_rows(data.batch_size, rank=rank, world_size=world_size)
        self._step = 0
        self.steps_per_epoch = self._order.steps_per_epoch

    def from_step(self, step: int) -> Iterator[tuple[int, Batch]]:
        """Batches from a global micro-batch counter on, epoch after epoch, without end."""
        batches = _Batches(self._dataset, self._data, self._order, self._rows)
        steps = itertools.count(step)
        loaded: Any = DataLoader(
            batches,  # type: ignore[arg-type]
            batch_size=None,
            sampler=steps,
            num_workers=self._workers,
            collate_fn=_as_made,
            pin_memory=self._device.type == "cuda",
            multiprocessing_context="forkserver" if self._workers else None,
        )
        for number, batch in zip(itertools.count(step), loaded, strict=False):
            self._step = number + 1
            yield number, batch

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the identity of the order, and the next step."""
        return {
            "root": self._dataset.root,
            "view": self._data.view,
            "samples": self._order.samples,
            "seed": self._order.seed,
            "batch_size": self._order.batch_size,
            "lanes": self._order.lanes,
            "window": self._order.window,
            "step": self._step,
        }

    def check_state(self, saved: dict[str, Any]) -> None:
        """Refuse to go on with another order than the saved one.

        Raises:
            UserError: naming what differs.
        """
        for key, value in self.state().items():
            if key != "step" and saved.get(key) != value:
                raise UserError(
                    f"the checkpoint was made with data {key} {saved.get(key)!r}, not {value!r}: "
                    "go on with the same dataset, seed, batch size and window, or start a new run"
                )

    def augment(self, batch: Batch, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """The crops on the device, coloured and normalised: one (count·b, 3, S, S) per group, channels_last."""
        return [
            augment(
                crops.to(self._device, non_blocking=True),
                parameters,
                mean=self._data.mean,
                std=self._data.std,
                dtype=dtype,
            )
            for crops, parameters in zip(batch.crops, batch.photometric, strict=True)
        ]
