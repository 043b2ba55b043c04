"""Samples at given places of a dataset, in that order, each shown without any draw: what evaluations see."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import UserError
from ingest.dataset.open import Dataset
from pipeline.data.in_hand import InHand
from pipeline.data.node_cache import CachePlace
from pipeline.data.read_ahead.client import ReadAhead
from pipeline.data.read_ahead.demand import Listed
from pipeline.data.read_ahead.packs import PackedReader, Packs, open_reader
from pipeline.data.reader import BadSampleError, Reader
from pipeline.data.workers import numbered

# Of a sample's bytes, its views by name; picklable. BadSampleError if there are none in them.
Show = Callable[[bytes], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True, kw_only=True)
class ShownBatch:
    """Views of n samples by name, (n, …), and their int64 keys (n,)."""

    views: dict[str, Tensor]
    keys: Tensor

    def pin_memory(self) -> ShownBatch:
        """A copy, ready for an asynchronous copy to a GPU."""
        pinned = {name: view.pin_memory() for name, view in self.views.items()}
        return ShownBatch(views=pinned, keys=self.keys.clone())


def shown_batches(
    dataset: Dataset,
    positions: NDArray[np.int64],
    show: Show,
    *,
    sample_bytes: int,
    workers: int,
    pin_memory: bool = False,
    batch_size: int,
    cache: CachePlace | None = None,
) -> Generator[ShownBatch]:
    """What is shown of the samples at the given positions of the dataset's global axis, in that order.

    Args:
        sample_bytes: of what is shown of one sample.
        cache: where the node's readers share what they know of the dataset, and what is read ahead.

    Raises:
        UserError: a sample cannot be shown; unlike training, an evaluation takes no substitutes.
    """
    count = -(-len(positions) // batch_size)
    workers = min(workers, count)
    listed = Listed(dataset.counts, positions, batch_size)
    ahead = ReadAhead(dataset, listed, workers=workers, cache=cache)
    make = _Batches(dataset, listed, show, cache, ahead.packs)
    size = sample_bytes * batch_size
    made = ahead.follow(numbered(make, 0, workers=workers, pin_memory=pin_memory, shared_bytes=size))
    with contextlib.closing(made):
        yield from islice(made, count)


class _Batches:
    """Makes batches by number, in whichever process it is called; empty ones behind the last."""

    def __init__(
        self, dataset: Dataset, listed: Listed, show: Show, cache: CachePlace | None, packs: Packs | None
    ) -> None:
        self._dataset, self._listed, self._show = dataset, listed, show
        self._cache, self._packs = cache, packs
        self._in_hand = InHand(0)
        # Opened in the process that reads: file descriptors do not travel.
        self._reader: Reader | PackedReader | None = None

    def noting(self, in_hand: InHand) -> Self:
        """See `pipeline.data.workers.Makes`."""
        made = copy.copy(self)
        made._in_hand = in_hand
        return made

    def __call__(self, number: int) -> ShownBatch:
        units, rows = self._listed.at(number)
        places = list(zip(units.tolist(), rows.tolist(), strict=True))
        self._open(number, places)
        views: dict[str, NDArray[Any]] = {}
        for index, (unit, row) in enumerate(places):
            for name, shown in self._shown(unit, row).items():
                if name not in views:  # all have its shape; windows of videos are too large to be there twice
                    views[name] = np.empty((len(places), *shown.shape), shown.dtype)
                views[name][index] = shown
        keys = [self._open_reader().key(unit, row) for unit, row in places]
        return ShownBatch(
            views={name: torch.from_numpy(view) for name, view in views.items()},
            keys=torch.tensor(keys, dtype=torch.int64),
        )

    def _open(self, number: int, places: list[tuple[int, int]]) -> None:
        """Keep what is known of a batch's units, for the next one may need them, and of no others."""
        reader, units = self._open_reader(), dict.fromkeys(unit for unit, _ in places)
        if isinstance(reader, PackedReader):
            reader.begin(number, places)
        else:
            reader.keep(units)

    def _shown(self, unit: int, row: int) -> Mapping[str, NDArray[Any]]:
        reader = self._open_reader()
        try:
            data = reader.read(unit, row)
            with self._in_hand.holding((unit, row)):
                return self._show(data)
        except BadSampleError as error:
            raise UserError(
                f"{reader.name(unit, row)} cannot be evaluated ({error}): see what is damaged with "
                f"`ingest verify --level decode {self._dataset.path}`, and restore it; or leave it out "
                "with a view, see `ingest view --help`"
            ) from error

    def _open_reader(self) -> Reader | PackedReader:
        if self._reader is None:
            self._reader = open_reader(self._dataset, self._cache, self._packs)
        return self._reader
