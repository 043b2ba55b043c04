"""Samples by (shard, row): ranged reads at offsets known from the metadata, checked against their sha256."""

import hashlib
import logging
import os
import resource
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cluster.errors import UserError
from ingest.dataset.keys import key_name
from ingest.dataset.open import Dataset, UnitRows

logger = logging.getLogger(__name__)
_READ_ATTEMPTS = 5
_FIRST_PAUSE_SECONDS = 0.1

R = TypeVar("R")


class BadSampleError(Exception):
    """A sample that nobody can use: its bytes are not the sealed ones, or they are no image."""


@dataclass(frozen=True)
class _OpenUnit:
    descriptor: int | None  # None if the shard is read through the dataset's store
    rows: UnitRows
    offsets: list[int]
    sizes: list[int]


class Reader:
    """Reads samples of one dataset; keeps the shards and the rows of the units it used last.

    Args:
        dataset: a sealed dataset.
        units: how many units to keep open at most; the open-files limit may lower it.
    """

    def __init__(self, dataset: Dataset, *, units: int) -> None:
        self._dataset = dataset
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._capacity = max(1, min(units, files // 2))
        self._open: OrderedDict[int, _OpenUnit] = OrderedDict()

    def key(self, unit_index: int, row: int) -> int:
        """A sample's key as an integer.

        Raises:
            UserError, OSError: as `fetch`.
        """
        return int(self._unit_at_last(unit_index).rows.keys[row])

    def name(self, unit_index: int, row: int) -> str:
        """Where a sample is, for people: its shard and key."""
        key = self.key(unit_index, row)
        return f"{self._dataset.shard_path(unit_index)}:{key_name(key)}"

    def read(self, unit_index: int, row: int) -> bytes:
        """The bytes of a sample, checked.

        Raises:
            BadSampleError: if they are not the sealed ones, twice.
            UserError: if a file of the dataset is missing.
            OSError: if reading fails again and again; never a reason to substitute the sample.
        """
        data = self.fetch(unit_index, row)
        if self._is_sealed(unit_index, row, data):
            return data
        # A fresh descriptor: a network filesystem may have served a stale or torn page.
        self._close(unit_index)
        data = self.fetch(unit_index, row)
        if self._is_sealed(unit_index, row, data):
            return data
        raise BadSampleError(f"{len(data)} bytes whose sha256 is not the sealed one")

    def fetch(self, unit_index: int, row: int) -> bytes:
        """The bytes of a sample, unchecked; failed reads are repeated with growing pauses.

        Raises:
            UserError: if a file of the dataset is missing.
            OSError: if the last attempt fails too.
        """

        def read() -> bytes:
            unit = self._unit(unit_index)
            if unit.descriptor is None:
                return self._dataset.read_shard(unit_index, unit.offsets[row], unit.sizes[row])
            return os.pread(unit.descriptor, unit.sizes[row], unit.offsets[row])

        return self._retried(unit_index, read)

    def _unit_at_last(self, unit_index: int) -> _OpenUnit:
        """The unit, opened if need be."""
        unit = self._open.get(unit_index)
        return self._retried(unit_index, lambda: self._unit(unit_index)) if unit is None else unit

    def _retried(self, unit_index: int, action: Callable[[], R]) -> R:
        for attempt in range(_READ_ATTEMPTS):
            try:
                return action()
            except FileNotFoundError as error:
                raise UserError(
                    f"{error.filename} is missing from the dataset: run `ingest verify {self._dataset.path}` "
                    "and restore the file"
                ) from error
            except OSError as error:
                if attempt == _READ_ATTEMPTS - 1:
                    raise
                pause = _FIRST_PAUSE_SECONDS * 2**attempt
                unit = self._dataset.units[unit_index]
                logger.warning(
                    "reading unit %d of %s: %s; again in %.1f s", unit, self._dataset.path, error, pause
                )
                time.sleep(pause)
                self._close(unit_index)
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Close every shard."""
        for unit_index in list(self._open):
            self._close(unit_index)

    def _is_sealed(self, unit_index: int, row: int, data: bytes) -> bool:
        sealed: bytes = self._unit_at_last(unit_index).rows.sha256[row].tobytes()
        return hashlib.sha256(data).digest() == sealed

    def _unit(self, unit_index: int) -> _OpenUnit:
        unit = self._open.get(unit_index)
        if unit is not None:
            self._open.move_to_end(unit_index)
            return unit
        while len(self._open) >= self._capacity:
            self._close(next(iter(self._open)))
        rows = self._dataset.unit_rows(unit_index)
        descriptor = None
        if self._dataset.shard_is_local(unit_index):
            descriptor = os.open(Path(self._dataset.shard_path(unit_index)), os.O_RDONLY | os.O_CLOEXEC)
        unit = _OpenUnit(descriptor, rows, rows.offsets.tolist(), rows.sizes.tolist())
        self._open[unit_index] = unit
        return unit

    def _close(self, unit_index: int) -> None:
        unit = self._open.pop(unit_index, None)
        if unit is not None and unit.descriptor is not None:
            os.close(unit.descriptor)
