"""Ranges of a dataset's tars from whatever store they are in, many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.errors import UserError
from ingest.dataset.open import Dataset
from ingest.store.object_store import ObjectStore
from ingest.store.open import home_of
from ingest.store.store import Store

if TYPE_CHECKING:
    from obstore import Bytes


class Source:
    """Reads ranges of a dataset's tars."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._homes: dict[str, tuple[Store, str]] = {}

    async def read(self, name: str, starts: Sequence[int], sizes: Sequence[int]) -> Sequence[bytes | Bytes]:
        """Ranges of a tar; fewer bytes where it ends.

        Raises:
            UserError: the tar is missing.
            OSError: it may not be read, or reading fails again and again.
        """
        if name not in self._homes:
            self._homes[name] = home_of(self._dataset.store, name)
        home, below = self._homes[name]
        try:
            if isinstance(home, ObjectStore):
                return await home.read_ranges(below, starts, sizes)
            ranges = zip(starts, sizes, strict=True)
            return [await asyncio.to_thread(home.read_range, below, *one) for one in ranges]
        except FileNotFoundError as error:
            raise UserError(
                f"{home.where(below)} is missing from the dataset: run `ingest verify {self._dataset.path}` "
                "and restore the file"
            ) from error
