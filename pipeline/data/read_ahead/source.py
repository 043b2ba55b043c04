"""Ranges of a dataset's tars from whatever store they are in, many at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import obstore
from obstore.store import S3Store

from cluster.errors import UserError
from ingest.dataset.open import Dataset
from ingest.store.open import home_of
from ingest.store.store import Store


class Source:
    """Reads ranges of a dataset's tars."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._homes: dict[str, tuple[Store, str]] = {}
        self._stores: dict[str, Any] = {}

    async def read(self, name: str, start: int, size: int) -> bytes | memoryview:
        """A range of a tar; fewer bytes where it ends.

        Raises:
            UserError: the tar is missing.
            OSError: it may not be read, or reading fails again and again.
        """
        if name not in self._homes:
            self._homes[name] = home_of(self._dataset.store, name)
        home, below = self._homes[name]
        try:
            if isinstance(home.root, Path):
                return await asyncio.to_thread(home.read_range, below, start, size)
            return await self._read(home, below, start, size)
        except FileNotFoundError as error:
            raise UserError(
                f"{home.where(below)} is missing from the dataset: run `ingest verify {self._dataset.path}` "
                "and restore the file"
            ) from error

    async def _read(self, home: Store, name: str, start: int, size: int) -> bytes | memoryview:
        root = str(home.root)
        if root not in self._stores:
            self._stores[root] = S3Store.from_url(root, client_options={"allow_http": True})
        for tries in range(8):
            try:
                data = await obstore.get_range_async(self._stores[root], name, start=start, length=size)
                return memoryview(data)
            except FileNotFoundError:
                raise
            except Exception as error:
                trouble = error
                await asyncio.sleep(0.1 * 2**tries)
        raise OSError(str(trouble))
