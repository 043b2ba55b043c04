"""A dataset's labels as numbers.

`sealed/{root}.labels.parquet` has each label that any attempt has, or has to ignore, once, in the order of
its UTF-8 bytes: a label's code is its row, whatever was kept. It follows from the rows, and so the root pins
it. A dataset gets it with its seal; one that was sealed before there were vocabularies gets it from its rows,
when somebody asks.
"""

import contextlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import UserError
from ingest.dataset import layout
from ingest.dataset.parquet import read_parquet
from ingest.dataset.schema import LABELS
from ingest.store.store import Store

LABEL_COLUMNS = ("labels", "ignore")
# Labels of a few units at a time are made distinct: all of a billion hashtags do not fit into memory.
_PENDING = 1 << 20


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Names by code, and codes by name.

    Attributes:
        labels: in the order of their codes.
        place: where they were read, for an error.
    """

    labels: pa.StringArray
    place: str

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All labels, in the order of their codes."""
        return tuple(self.labels.to_pylist())

    def codes(self, labels: pa.Array) -> NDArray[np.int32]:
        """The code of each of these labels, (n,).

        Raises:
            UserError: one is not among them.
        """
        codes = pc.index_in(labels, value_set=self.labels)
        if codes.null_count:
            raise _damaged(self.place)
        found: NDArray[np.int32] = codes.to_numpy()
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitLabels:
    """The labels of one unit's samples, by their codes.

    Attributes:
        codes: of all samples, one sample's after the other's, (labels,) int32.
        starts: where in `codes` each sample's begin, and the end, (n + 1,) int64.
        ignored, ignored_starts: the same for the labels that count neither as right nor as wrong.
    """

    codes: NDArray[np.int32]
    starts: NDArray[np.int64]
    ignored: NDArray[np.int32]
    ignored_starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of(self, row: int) -> NDArray[np.int32]:
        """A sample's labels."""
        return self.codes[self.starts[row] : self.starts[row + 1]]

    def ignored_of(self, row: int) -> NDArray[np.int32]:
        """A sample's labels to ignore."""
        return self.ignored[self.ignored_starts[row] : self.ignored_starts[row + 1]]


def encoded(rows: pa.Table, vocabulary: Vocabulary) -> UnitLabels:
    """The columns `labels` and, if it is there, `ignore` of some rows."""
    codes, starts = _encoded(rows["labels"], vocabulary)
    # A list of URLs may have a column of this name with other things in it.
    lists = "ignore" in rows.column_names and rows["ignore"].type == LABELS
    none = np.empty(0, np.int32), np.zeros(len(rows) + 1, np.int64)
    ignored, ignored_starts = _encoded(rows["ignore"], vocabulary) if lists else none
    return UnitLabels(codes=codes, starts=starts, ignored=ignored, ignored_starts=ignored_starts)


def distinct_labels(tables: Iterable[pa.Table]) -> pa.StringArray:
    """Each label in the columns LABEL_COLUMNS of these tables once, sorted by its bytes."""
    known = pa.array([], pa.string())
    pending: list[pa.Array] = []
    for table in tables:
        lists = [table[name] for name in LABEL_COLUMNS if name in table.column_names]
        pending += [each.combine_chunks().flatten().unique() for each in lists if each.type == LABELS]
        if sum(map(len, pending)) > _PENDING:
            known, pending = pa.concat_arrays([known, *pending]).unique(), []
    known = pa.concat_arrays([known, *pending]).unique()
    return known.take(pc.sort_indices(known))


def publish_vocabulary(store: Store, root: str, labels: pa.StringArray) -> None:
    """Put it beside the sealed root, unless it is there."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"label": labels}), buffer, compression="zstd")
    store.create_if_absent(layout.sealed_name(root, "labels.parquet"), buffer.getvalue())


def read_vocabulary(store: Store, root: str) -> Vocabulary | None:
    """The vocabulary of a root; None if it was not made.

    Raises:
        UserError: it is damaged.
    """
    name = layout.sealed_name(root, "labels.parquet")
    place = str(store.where(name))
    try:
        data = store.read(name)
    except FileNotFoundError:
        return None
    try:
        labels = read_parquet(io.BytesIO(data), columns=["label"])["label"].combine_chunks()
        return Vocabulary(labels.cast(pa.string()), place)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise _damaged(place) from error


def make_vocabulary(store: Store, root: str, rows: Iterable[pa.Table]) -> Vocabulary:
    """The vocabulary of a root that has none, from the rows of all its units; kept if the dataset can be
    written.
    """
    labels = distinct_labels(rows)
    with contextlib.suppress(OSError, UserError):
        publish_vocabulary(store, root, labels)
    return Vocabulary(labels, str(store.where(layout.sealed_name(root, "labels.parquet"))))


def _encoded(column: pa.ChunkedArray, vocabulary: Vocabulary) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    lists = column.combine_chunks()
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    return vocabulary.codes(lists.flatten()), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _damaged(place: str) -> UserError:
    return UserError(f"{place} is damaged: remove it, and it is made anew from the rows when it is needed")
