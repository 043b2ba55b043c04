"""Whole Parquet files that Python has opened."""

from collections.abc import Sequence
from io import BufferedIOBase
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(
    file: BinaryIO | BufferedIOBase, *, columns: Sequence[str] | None = None, schema: pa.Schema | None = None
) -> pa.Table:
    """A file's rows, read by this thread.

    Arrow's threads may have bytes of Python's in their hands when a process ends, and abort it ("terminate
    called without an active exception"), with an exit status that is not the command's.

    Args:
        file: open, to read.
        columns: None for all.
        schema: None for the file's.
    """
    names = None if columns is None else list(columns)
    return pq.read_table(file, columns=names, schema=schema, use_threads=False, pre_buffer=False)
