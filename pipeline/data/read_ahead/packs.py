"""A worker's side of the read-ahead: samples from packs, and past them where they are damaged."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import UserError
from ingest.dataset.keys import key_of
from ingest.dataset.open import Dataset
from pipeline.data.node_cache import CachePlace
from pipeline.data.read_ahead.cache import raise_failure
from pipeline.data.read_ahead.pack import DamagedPackError, Pack, pack_name
from pipeline.data.reader import Reader

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.002
_LOOK_FOR_LIFE_SECONDS = 0.25
_PATIENCE_SECONDS = 300.0  # until the node's first rank has begun

Place = tuple[int, int]


@dataclass
class Packs:
    """The packs of one rank of a node, which is its `number` there."""

    place: Path
    number: int
    _begun: bool = field(default=False, init=False)

    def wait(self, step: int) -> Pack:
        """The pack of a step, as soon as it is there.

        Raises:
            UserError, OSError: the process that makes it has ended.
            DamagedPackError: its table is not what was written.
        """
        path, began = self.place / pack_name(step, self.number), time.monotonic()
        looked = began
        while True:
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                if time.monotonic() - looked > _LOOK_FOR_LIFE_SECONDS:
                    looked = time.monotonic()
                    self._look_for_life(looked - began)
                time.sleep(_LOOK_SECONDS)
                continue
            self._begun = True
            return Pack(data)

    def _look_for_life(self, waited: float) -> None:
        if self.place.is_dir():
            self._begun = True
            raise_failure(self.place)
        elif self._begun:
            raise UserError(
                "what reads ahead on this node has ended before its ranks: see the log of the first"
            )
        elif waited > _PATIENCE_SECONDS:
            raise UserError(
                f"{self.place} is not there: the first rank of this node has not begun to read ahead within "
                f"{_PATIENCE_SECONDS:.0f} s; see its log"
            )


def open_reader(dataset: Dataset, cache: CachePlace | None, packs: Packs | None) -> Reader | PackedReader:
    """What reads samples: from packs, or, if there are none, from the dataset."""
    reader = Reader(dataset, cache)
    return reader if packs is None else PackedReader(dataset, reader, packs)


class PackedReader:
    """A `Reader` that takes the samples of the step that was `begun` from its pack.

    Args:
        reader: for samples that are in no pack, and for those of which a pack has not the sealed bytes.
    """

    def __init__(self, dataset: Dataset, reader: Reader, packs: Packs) -> None:
        self._dataset, self._reader, self._packs = dataset, reader, packs
        self._pack: Pack | None = None
        self._numbers: dict[Place, int] = {}

    def begin(self, step: int, places: Sequence[Place]) -> None:
        """From now on samples of this step are read, which are at these places.

        Raises:
            UserError, OSError: as `Packs.wait`.
        """
        self._pack, self._numbers = None, {}
        if not places:
            return
        try:
            self._pack = self._packs.wait(step)
        except DamagedPackError:
            logger.warning("what was read ahead for step %d is damaged: it is read again", step)
            return
        self._numbers = {place: number for number, place in enumerate(places)}

    def key(self, unit_index: int, row: int) -> int:
        """See `Reader.key`."""
        number = self._numbers.get((unit_index, row))
        if self._pack is None or number is None:
            return self._reader.key(unit_index, row)
        return key_of(int(self._dataset.units[unit_index]), int(self._pack.slots[number]))

    def name(self, unit_index: int, row: int) -> str:
        """See `Reader.name`."""
        return self._reader.name(unit_index, row)

    def read(self, unit_index: int, row: int) -> bytes:
        """See `Reader.read`: past the pack if it has not the sealed bytes."""
        number = self._numbers.get((unit_index, row))
        data = None if self._pack is None or number is None else self._pack.sample(number)
        return self._reader.read(unit_index, row) if data is None else data
