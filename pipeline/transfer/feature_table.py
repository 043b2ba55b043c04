"""Features as a file for other programs: a row for each sample of a dataset, in its order, labelled or not.

FILE.parquet           `key`, as it is in the dataset; `url`, the path or address that the sample came from;
                       `caption`; `labels`; and `features`, a list of fixed length
FILE.safetensors       `features` (rows, D) and `keys` (rows,), which can be mapped; and beside it
FILE.rows.parquet      the other columns

Each names in its metadata the root of the dataset, and the trunk as its own folder describes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cluster.atomic_file import replacing
from cluster.errors import UserError
from ingest.dataset.keys import keys_of
from ingest.dataset.open import Dataset
from ingest.dataset.schema import META_SCHEMA
from pipeline.data.evaluation import evenly_spaced
from pipeline.recipe.stages import FeaturePrecision, Windows
from pipeline.transfer.extract import BATCH_SIZE, at_layer, embedded, refuse_empty, rows_of
from pipeline.transfer.features import rounded, safetensors_header
from pipeline.trunks.files import ExportedTrunk

KINDS = (".parquet", ".safetensors")
_SAID = [META_SCHEMA.field(name) for name in ("url", "caption", "labels")]
_ROWS = pa.schema([pa.field("key", pa.int64(), nullable=False), *_SAID])
_GROUP_BYTES = 32 << 20  # so much is in memory before it is written
_ONE = Windows(windows=1)
_DTYPES: dict[FeaturePrecision, tuple[torch.dtype, str]] = {
    "fp32": (torch.float32, "F32"),
    "fp16": (torch.float16, "F16"),
    "bf16": (torch.bfloat16, "BF16"),
}
# Takes rows as they come: what is said of them, and their features (n, D).
_Add = Callable[[pa.Table, Tensor], None]


def write_table(
    trunk: ExportedTrunk,
    dataset: Dataset,
    path: Path,
    *,
    workers: int,
    device: torch.device,
    precision: FeaturePrecision = "fp32",
    videos: Windows = _ONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a trunk's features of all samples of a dataset. The file is there when it is whole.

    Args:
        trunk: on `device`.
        path: its ending says what kind of file it becomes, one of `KINDS`.
        videos: see `extract_features`.
        progress: told how many rows are there, and how many there will be.

    Returns:
        How many rows.

    Raises:
        UserError: if a file of that kind or precision cannot be, there is no sample, or one cannot be read.
    """
    refuse_kind(path, precision)
    refuse_empty(dataset)
    network, each = at_layer(trunk, trunk.network, videos), rows_of(trunk.preprocessing, videos)
    count = len(dataset) * each
    about = {"dataset": dataset.root, "trunk": trunk.spec.model_dump_json()}
    making = _parquet if path.suffix == ".parquet" else _safetensors
    said = _Said(dataset)
    with making(path, count=count, dim=network.feature_dim, precision=precision, about=about) as add:
        for first, part in embedded(
            network,
            dataset,
            evenly_spaced(len(dataset), None),
            preprocessing=trunk.preprocessing,
            workers=workers,
            device=device,
            batch_size=BATCH_SIZE,
            videos=videos,
        ):
            rows = said.take(len(part) // each)
            add(rows.take(np.repeat(np.arange(len(rows)), each)) if each > 1 else rows, part.cpu())
            progress(first + len(part), count)
    return count


def refuse_kind(path: Path, precision: FeaturePrecision) -> None:
    """Raises UserError if there is no such file of features."""
    if path.suffix not in KINDS:
        raise UserError(f"{path}: the name of a file of features ends in {' or '.join(KINDS)}")
    if path.suffix == ".parquet" and precision == "bf16":
        raise UserError(f"{path}: Parquet has no bf16: choose fp16 or fp32, or a .safetensors file")


def files_of(path: Path) -> tuple[Path, ...]:
    """All that is written for a file of features."""
    return (path,) if path.suffix == ".parquet" else (path, rows_beside(path))


def rows_beside(path: Path) -> Path:
    """Where what is said of the rows of a safetensors file stands."""
    return path.with_suffix(".rows.parquet")


class _Said:
    """What a dataset says of its samples, a unit at a time in memory."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._unit = 0
        self._left = _ROWS.empty_table()

    def take(self, count: int) -> pa.Table:
        """The next so many samples: `_ROWS`."""
        while len(self._left) < count:
            said = self._dataset.kept_rows(self._unit, [field.name for field in _SAID])
            unit, slots = int(self._dataset.units[self._unit]), said["slot"].to_numpy()
            columns = [pa.array(keys_of(unit, slots).astype(np.int64))]
            columns += [said[field.name].cast(field.type) for field in _SAID]
            self._left = pa.concat_tables([self._left, pa.Table.from_arrays(columns, schema=_ROWS)])
            self._unit += 1
        taken, self._left = self._left.slice(0, count), self._left.slice(count)
        return taken


@contextmanager
def _parquet(
    path: Path, *, count: int, dim: int, precision: FeaturePrecision, about: dict[str, str]
) -> Iterator[_Add]:
    dtype = _DTYPES[precision][0]
    number = pa.float32() if precision == "fp32" else pa.float16()
    field = pa.field("features", pa.list_(pa.field("element", number, nullable=False), dim), nullable=False)
    with (
        replacing(path) as temporary,
        _in_groups(temporary, _ROWS.append(field).with_metadata(about)) as write,
    ):

        def add(rows: pa.Table, features: Tensor) -> None:
            numbers = pa.array(rounded(features, dtype, path).numpy().ravel())
            column = pa.FixedSizeListArray.from_arrays(numbers, type=field.type)
            write(rows.append_column(field, column))

        yield add


@contextmanager
def _safetensors(
    path: Path, *, count: int, dim: int, precision: FeaturePrecision, about: dict[str, str]
) -> Iterator[_Add]:
    dtype, name = _DTYPES[precision]
    keys, width = 8 * count, dim * dtype.itemsize
    head = safetensors_header(
        {
            "__metadata__": about,
            "keys": {"dtype": "I64", "shape": [count], "data_offsets": [0, keys]},
            "features": {
                "dtype": name,
                "shape": [count, dim],
                "data_offsets": [keys, keys + count * width],
            },
        }
    )
    # What is left first takes its place last: where the matrix is, its rows are.
    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
        replacing(rows_beside(path)) as beside,
        _in_groups(beside, _ROWS.with_metadata(about)) as write,
    ):
        file.write(head)
        done = 0

        def add(rows: pa.Table, features: Tensor) -> None:
            nonlocal done
            file.seek(len(head) + 8 * done)
            file.write(rows["key"].to_numpy().tobytes())
            file.seek(len(head) + keys + done * width)
            file.write(rounded(features, dtype, path).contiguous().view(torch.uint8).numpy().tobytes())
            done += len(rows)
            write(rows)

        yield add


@contextmanager
def _in_groups(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """A Parquet file of rows that come in smaller portions than it has row groups."""
    kept: list[pa.Table] = []

    def write() -> None:
        table = pa.concat_tables(kept).cast(schema)
        writer.write_table(table, row_group_size=len(table))
        kept.clear()

    def add(rows: pa.Table) -> None:
        kept.append(rows)
        if sum(table.nbytes for table in kept) >= _GROUP_BYTES:
            write()

    texts = ["url", "caption", "labels.list.element"]
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=texts) as writer:
        yield add
        if kept:
            write()
