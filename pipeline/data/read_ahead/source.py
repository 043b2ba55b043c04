"""Ranges of a dataset's tars from whatever store they are in, many at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import obstore
from obstore.store import S3Store

from cluster.errors import UserError
from ingest.dataset.open import Dataset


class Source:
    """Reads ranges of a dataset's tars."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._store: Any = S3Store.from_url(str(dataset.store.root), client_options={"allow_http": True})

    async def read(self, name: str, start: int, size: int) -> bytes:
        for tries in range(8):
            try:
                return await obstore.get_range_async(self._store, name, start=start, length=size)
            except FileNotFoundError as error:
                raise UserError(
                    f"{self._dataset.store.where(name)} is missing from the dataset: run `ingest verify "
                    f"{self._dataset.path}` and restore the file"
                ) from error
            except Exception as error:
                trouble = error
                await asyncio.sleep(0.1 * 2**tries)
        raise OSError(str(trouble))
