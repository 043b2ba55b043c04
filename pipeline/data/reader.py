"""Samples by (shard, row): ranged reads at offsets known from the metadata, checked against their sha256."""

import contextlib
import hashlib
import logging
import os
import random
import resource
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cluster.errors import UserError
from ingest.dataset.keys import key_name, key_of
from ingest.dataset.open import Dataset
from pipeline.data.node_cache import CachePlace
from pipeline.data.unit_index import UnitIndex

logger = logging.getLogger(__name__)
_READ_ATTEMPTS = 5
_FIRST_PAUSE_SECONDS = 0.1

R = TypeVar("R")


class BadSampleError(Exception):
    """A sample that nobody can use: its bytes are not the sealed ones, or they are no image."""


class Reader:
    """Reads samples of one dataset; keeps the shards used last open, and what it knows of units until told.

    Args:
        dataset: a sealed dataset.
        cache: where the node's readers share what they know of units.

    Raises:
        UserError: see `UnitIndex`.
    """

    def __init__(self, dataset: Dataset, cache: CachePlace | None = None) -> None:
        self._dataset = dataset
        self._index = UnitIndex(dataset, cache or CachePlace())
        self._paths: dict[int, str | None] = {}  # None of a shard that is read through the dataset's store
        self._open: OrderedDict[int, int] = OrderedDict()
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_open = max(1, files // 2)  # to open a shard again takes some 10 us
        # Workers that need the same units at once take them in different orders, and find what others made.
        self._shuffle = random.Random()

    def keep(self, units: Iterable[int]) -> None:
        """From now on these units are read: what is known of others is forgotten."""
        live = set(units)
        self._index.keep(live)
        for unit_index in self._paths.keys() - live:
            self._close(unit_index)
            del self._paths[unit_index]

    def open(self, units: Iterable[int]) -> None:
        """Read what is to be known of these units, unless it is.

        Raises:
            UserError, OSError: as `fetch`.
        """
        new = [unit_index for unit_index in units if unit_index not in self._index]
        self._shuffle.shuffle(new)
        for unit_index in new:
            self._rows(unit_index)

    def prepare(self, unit_index: int) -> None:
        """Make a unit quick to open, on this node; trouble will show when it is opened."""
        with contextlib.suppress(UserError, OSError):
            self._index.ensure(unit_index)

    def key(self, unit_index: int, row: int) -> int:
        """A sample's key as an integer.

        Raises:
            UserError, OSError: as `fetch`.
        """
        slot = self._rows(unit_index)["slot"][row]
        return key_of(int(self._dataset.units[unit_index]), int(slot))

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
        offset, size, _, sealed = self._rows(unit_index)[row].item()
        data = self._range(unit_index, offset, size)
        if hashlib.sha256(data).digest() == sealed:
            return data
        # A fresh descriptor: a network filesystem may have served a stale or torn page.
        self._close(unit_index)
        data = self._range(unit_index, offset, size)
        if hashlib.sha256(data).digest() == sealed:
            return data
        raise BadSampleError(f"{len(data)} bytes whose sha256 is not the sealed one")

    def fetch(self, unit_index: int, row: int) -> bytes:
        """The bytes of a sample, unchecked; failed reads are repeated with growing pauses.

        Raises:
            UserError: if a file of the dataset is missing.
            OSError: if the last attempt fails too.
        """
        offset, size, _, _ = self._rows(unit_index)[row].item()
        return self._range(unit_index, offset, size)

    def _range(self, unit_index: int, offset: int, size: int) -> bytes:
        def read() -> bytes:
            descriptor = self._descriptor(unit_index)
            if descriptor is None:
                return self._dataset.read_shard(unit_index, offset, size)
            return os.pread(descriptor, size, offset)

        return self._retried(unit_index, read)

    def close(self) -> None:
        """Close every shard."""
        for unit_index in list(self._open):
            self._close(unit_index)

    def _rows(self, unit_index: int) -> NDArray[np.void]:
        if unit_index in self._index:
            return self._index.rows(unit_index)
        return self._retried(unit_index, lambda: self._index.rows(unit_index))

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

    def _descriptor(self, unit_index: int) -> int | None:
        descriptor = self._open.get(unit_index)
        if descriptor is not None:
            self._open.move_to_end(unit_index)
            return descriptor
        if unit_index not in self._paths:
            local = self._dataset.shard_is_local(unit_index)
            self._paths[unit_index] = self._dataset.shard_path(unit_index) if local else None
        path = self._paths[unit_index]
        if path is None:
            return None
        while len(self._open) >= self._most_open:
            self._close(next(iter(self._open)))
        self._open[unit_index] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[unit_index]

    def _close(self, unit_index: int) -> None:
        descriptor = self._open.pop(unit_index, None)
        if descriptor is not None:
            os.close(descriptor)
