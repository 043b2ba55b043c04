"""One rank's rows of any global batch, by its number: read, cut, and draw what the device will do."""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import UserError
from ingest.dataset.open import Dataset
from pipeline.data import order as orders
from pipeline.data.batch import Batch
from pipeline.data.copies import Copies
from pipeline.data.in_hand import InHand
from pipeline.data.modality import Modality
from pipeline.data.node_cache import CachePlace
from pipeline.data.philox import uniforms
from pipeline.data.read_ahead.packs import PackedReader, Packs, open_reader
from pipeline.data.reader import BadSampleError, Reader
from pipeline.data.targets import TargetReader, Targets

logger = logging.getLogger(__name__)
# Bad samples are rare and windows are shuffled: so many in a row mean that the dataset is broken.
_MOST_SUBSTITUTES = 1_000

# Writes a sample's views: of its place, its views' draws, and where to. BadSampleError if it cannot.
WriteViews = Callable[[tuple[int, int], NDArray[np.float64], Mapping[str, NDArray[Any]]], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """What `RankBatches.fill` says of the rows whose views it had written; as in `Batch`."""

    keys: Tensor
    parameters: dict[str, Tensor]
    targets: Targets | None
    positions: Tensor | None


class RankBatches:
    """Makes one rank's batches, each a pure function of its number. Opens nothing before the first.

    Args:
        modality: what becomes of a sample.
        rows: the rank's rows of every global batch.
        cache: see `Reader`.
        targets: reads the labels of their samples, if batches have them.
        copies: of samples that an epoch has several times; the order is then of these.
        positions: whether batches have the positions of their samples.

    Attributes:
        count: of the rank's rows.
    """

    def __init__(
        self,
        dataset: Dataset,
        modality: Modality,
        order: orders.Order,
        rows: slice,
        *,
        cache: CachePlace | None = None,
        targets: TargetReader | None = None,
        copies: Copies | None = None,
        positions: bool = False,
    ) -> None:
        self._dataset, self._modality, self._order, self._rows = dataset, modality, order, rows
        self._cache, self._copies = cache, copies
        self.count: int = rows.stop - rows.start
        self._packs: Packs | None = None
        self._in_hand = InHand(0)
        self._reader: Reader | PackedReader | None = None
        self._targets = targets
        # Where each unit's samples begin among all of the dataset.
        self._starts = np.cumsum(dataset.counts) - dataset.counts if positions else None
        self._indices: dict[int, orders.EpochIndex] = {}
        self._in_use: tuple[int, range] | None = None
        self._labelled: tuple[int, range] | None = None
        self._coming: list[int] = []

    @property
    def view_bytes(self) -> int:
        """Size of one batch's views."""
        return self.count * sum(room.nbytes for room in self._modality.empty(1).values())

    def __call__(self, step: int) -> Batch:
        """The rank's rows of micro-batch `step`, counted over all epochs.

        Raises:
            UserError: if a shard is missing, or hardly any sample of a window can be used.
            OSError: if reading fails again and again.
        """
        room = self._modality.empty(self.count)
        rows = self.fill(step, room, self._read_and_cut)
        views = {name: torch.from_numpy(of_name).flatten(0, 1) for name, of_name in room.items()}
        return Batch(
            views=views,
            parameters=rows.parameters,
            keys=rows.keys,
            number=step,
            targets=rows.targets,
            positions=rows.positions,
        )

    def read_from(self, packs: Packs | None) -> Self:
        """The same batches, of samples that are read ahead; None if they are not."""
        made = copy.copy(self)
        made._packs, made._reader = packs, None
        return made

    def noting(self, in_hand: InHand) -> Self:
        """See `pipeline.data.workers.Makes`."""
        made = copy.copy(self)
        made._in_hand, made._reader = in_hand, None
        return made

    def fill(self, step: int, out: Mapping[str, NDArray[Any]], write: WriteViews) -> Rows:
        """Let `write` make the views of each row of micro-batch `step`; for bad samples, of substitutes.

        Args:
            out: for each name (count, b, …), of which `write` gets (count, …).
        """
        epoch, step_of_epoch = divmod(step, self._order.steps_per_epoch)
        reader = self._open_reader()
        places, copies = self._places(epoch, step_of_epoch, self._rows, 0)
        if isinstance(reader, PackedReader):
            reader.begin(step, places)
        else:
            self._follow_windows(reader, epoch, step_of_epoch)
            reader.open({unit_index for unit_index, _ in places})
        keys = np.array([reader.key(*place) for place in places], np.int64)
        draws = self._draws(epoch, keys, copies, np.zeros(self.count, np.int64))
        for number, place in enumerate(places):
            parts = {name: of_name[:, number] for name, of_name in out.items()}
            ahead = 0
            candidate = place
            while not self._written(write, candidate, draws[number], parts):
                ahead += 1
                candidate, copy = self._substitute(epoch, step_of_epoch, number, ahead)
                places[number] = candidate
                keys[number] = reader.key(*candidate)
                draws[number] = self._draws(epoch, keys[number : number + 1], copy, np.array([ahead]))[0]
        return Rows(
            keys=torch.from_numpy(keys),
            parameters=self._modality.parameters(draws),
            targets=self._targets_of(places, epoch, step_of_epoch),
            positions=self._positions_of(places),
        )

    def places(self, step: int) -> list[tuple[int, int]]:
        """The (unit index, row) of the rank's rows of micro-batch `step`, before any substitution."""
        return self._places(*divmod(step, self._order.steps_per_epoch), self._rows, 0)[0]

    def _places(
        self, epoch: int, step: int, rows: slice, ahead: int
    ) -> tuple[list[tuple[int, int]], NDArray[np.int64]]:
        """The (unit index, row) of some rows of a global batch, and which copy of its sample each is."""
        positions = orders.global_batch(self._order, epoch=epoch, step=step, rows=rows, ahead=ahead)
        units, unit_rows = orders.locate(self._index_of(epoch), positions)
        copies = np.zeros_like(unit_rows)
        if self._copies is not None:
            unit_rows, copies = self._copies.samples(units, unit_rows)
        return list(zip(units.tolist(), unit_rows.tolist(), strict=True)), copies

    def _index_of(self, epoch: int) -> orders.EpochIndex:
        if epoch not in self._indices:
            # Towards an epoch's end the next one's is needed, too.
            self._indices = {known: index for known, index in self._indices.items() if known == epoch - 1}
            counts = self._dataset.counts if self._copies is None else self._copies.counts
            self._indices[epoch] = orders.epoch_index(self._order, counts, epoch=epoch)
        return self._indices[epoch]

    def _follow_windows(self, reader: Reader, epoch: int, step: int) -> None:
        """Keep what is known of the units in use, and make a share of those of the next windows ready.

        All lanes change windows at about the same step: without this they would all wait then.
        """
        windows = orders.windows_at(self._order, step)
        if self._in_use != (epoch, windows):
            reader.keep(self._units(epoch, windows))
            self._coming = self._units(*orders.windows_after(self._order, epoch, windows))
            self._in_use = epoch, windows
        for unit_index in self._coming[orders.share_of_step(self._order, step, len(self._coming))]:
            reader.prepare(unit_index)

    def _positions_of(self, places: list[tuple[int, int]]) -> Tensor | None:
        if self._starts is None:
            return None
        units, rows = np.array(places, np.int64).reshape(-1, 2).T
        return torch.from_numpy(self._starts[units] + rows)

    def _targets_of(self, places: list[tuple[int, int]], epoch: int, step: int) -> Targets | None:
        if self._targets is None:
            return None
        windows = orders.windows_at(self._order, step)
        if self._labelled != (epoch, windows):
            self._targets.keep(self._units(epoch, windows))
            self._labelled = epoch, windows
        return self._targets.read(places)

    def _units(self, epoch: int, windows: range) -> list[int]:
        """The units of some windows of the rank's lanes, ascending."""
        index = self._index_of(epoch)
        units: list[int] = orders.units_of(
            self._order, index, epoch=epoch, rows=self._rows, windows=windows
        ).tolist()
        return units

    def _substitute(
        self, epoch: int, step: int, number: int, ahead: int
    ) -> tuple[tuple[int, int], NDArray[np.int64]]:
        """The place `ahead` rows after the batch's row `number`, in its window; and which copy that is."""
        if ahead >= min(orders.smallest_window(self._order), _MOST_SUBSTITUTES):
            raise UserError(
                f"{ahead} samples in a row of {self._dataset.path} cannot be used: see which and why with "
                f"`ingest verify --level decode {self._dataset.path}`"
            )
        row = self._rows.start + number
        (place,), copy = self._places(epoch, step, slice(row, row + 1), ahead)
        return place, copy

    def _written(
        self,
        write: WriteViews,
        place: tuple[int, int],
        draws: NDArray[np.float64],
        out: Mapping[str, NDArray[Any]],
    ) -> bool:
        """Write a sample's views; False, and a line in the log, if it is a bad one."""
        try:
            write(place, draws, out)
        except BadSampleError as error:
            name = self._open_reader().name(*place)
            logger.warning("%s is bad: %s; the next row of its window takes its place", name, error)
            return False
        return True

    def _read_and_cut(
        self, place: tuple[int, int], draws: NDArray[np.float64], out: Mapping[str, NDArray[Any]]
    ) -> None:
        data = self._open_reader().read(*place)
        with self._in_hand.holding(place):
            self._modality.cut(data, draws, out)

    def _draws(
        self, epoch: int, keys: NDArray[np.int64], copies: NDArray[np.int64], ahead: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """(samples, views, draws)."""
        return uniforms(
            seed=self._order.seed,
            epoch=epoch,
            keys=keys,
            copies=copies,
            ahead=ahead,
            views=sum(self._modality.counts.values()),
            draws=self._modality.draws,
        )

    def _open_reader(self) -> Reader | PackedReader:
        if self._reader is None:
            self._reader = open_reader(self._dataset, self._cache, self._packs)
        return self._reader
