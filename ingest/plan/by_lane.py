"""Rows with URLs in lanes: each URL once, all of a site in one lane, where sites take turns in proportion.

Politeness is kept by whoever fetches, and that is one process for all of a lane. A lane is a range of the
hashes of registrable domains, and how many there are follows from the rows alone: whoever crawls, in however
many parts, finds the same units. Row k of a site with n rows stands at (k - u) / n of its lane, with u in
[0, 1) from the hash: every unit of a lane holds about the same mixture, and no site ends long after others.

DuckDB does the work, on all cores, in bounded memory: what does not fit lies in a folder for temporary files.
Rows are put in order by keys that are in them, so that threads never show.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.errors import UserError
from cluster.host import CORES
from ingest.web.domain import domain_hashes

if TYPE_CHECKING:
    import duckdb

MOST_LANES = 1024
_UNITS_PER_LANE = 4
# Of DuckDB; Arrow's batches and Python come on top.
_MEMORY_MB = 640
_THREADS = 8  # each takes some of that memory
_BATCH = 1 << 16
_OWN = pa.schema([("seq", pa.int64()), ("domain", pa.uint64()), ("url", pa.string()), ("file", pa.string())])


class ByLane:
    """Takes tables with the columns `url` and `file`, and gives the rest of them back; a context manager.

    Of equal URLs only the first row stays. Rows without a URL (null) all stay, as those of one site. Rows of
    one `file` (parts of a video) stand together, where the first of them does. All tables must have one
    schema.

    Args:
        per_site: rows of a site that stay at most, with those that are known: the first; None for all.

    Attributes:
        rows: that were taken.
        repeated: rows that were left out because their URL had come before.
        known: rows that were left out because their URL was known.
        over_per_site: rows that were left out because their site had enough.
    """

    def __init__(self, *, per_site: int | None = None) -> None:
        self._per_site = per_site
        self._folder = tempfile.TemporaryDirectory(prefix="ingest-")
        self._schema: pa.Schema | None = None
        self.rows = self.repeated = self.known = self.over_per_site = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if "_database" in vars(self):
            self._database.close()
        self._folder.cleanup()

    @cached_property
    def _database(self) -> duckdb.DuckDBPyConnection:
        """Opened when there are rows: that takes long, and folders have none."""
        import duckdb

        # What has no file of its own is not compressed, which would take longer than all else.
        database = duckdb.connect(":memory:")
        for name, value in {
            "memory_limit": f"{_MEMORY_MB}MB",
            "threads": min(CORES, _THREADS),
            "temp_directory": self._folder.name,
            "preserve_insertion_order": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "enable_external_access": False,  # what strangers wrote are values, and opens nothing
            "lock_configuration": True,
        }.items():
            quoted = str(value).replace("'", "''")
            database.execute(f"SET {name} = '{quoted}'")
        database.execute("CREATE TABLE known (url VARCHAR, domain UBIGINT)")
        return database

    def add(self, table: pa.Table) -> None:
        """Take rows."""
        columns = table.drop_columns(["url", "file"])
        first = self._schema is None
        self._schema = columns.schema
        own = [
            pa.array(np.arange(self.rows, self.rows + len(table)), pa.int64()),
            domain_hashes(table["url"]),
            table["url"],
            table["file"],
        ]
        # Strangers' columns may have any names, and some differ by case alone.
        names = [*_OWN.names, *(f"c{number}" for number in range(columns.num_columns))]
        rows = pa.table([*own, *map(_stored, columns.columns)], names=names)
        self._insert("rows", rows, create=first)
        self.rows += len(table)

    def add_known(self, urls: pa.ChunkedArray) -> None:
        """Leave rows with these URLs out."""
        urls = urls.cast(pa.string())
        domains = pa.nulls(len(urls), pa.uint64()) if self._per_site is None else domain_hashes(urls)
        self._insert("known", pa.table({"url": urls, "domain": domains}))

    def lanes(self, unit_rows: int) -> Iterator[tuple[int, pa.Table]]:
        """The rows in order, each table with the number of its lane; some lanes may be empty.

        Args:
            unit_rows: rows of a unit, which decide with all rows how many lanes there are.
        """
        if self._schema is None:  # nothing was added
            return
        with _told(self._folder.name):
            self._choose()
            self._place(unit_rows)
            yield from self._in_order(self._schema)

    def _insert(self, name: str, rows: pa.Table, *, create: bool = False) -> None:
        with _told(self._folder.name):
            self._database.register("batch", rows)
            self._database.execute(
                f"CREATE TABLE {name} AS SELECT * FROM batch" if create else f"INSERT INTO {name} FROM batch"
            )
            self._database.unregister("batch")

    def _choose(self) -> None:
        """The table `chosen`: the first row of each URL that is not known, and all rows without one."""
        self._database.execute(
            "CREATE TABLE firsts AS SELECT min(seq) AS seq, any_value(domain) AS domain, any_value(file) AS "
            "file, url FROM rows WHERE url IS NOT NULL GROUP BY url"
        )
        self._database.execute(
            "CREATE TABLE chosen AS SELECT seq, domain, hash(file) AS file, file IS NOT NULL AS shared "
            "FROM firsts ANTI JOIN known USING (url) "
            "UNION ALL SELECT seq, domain, 0::UBIGINT, false FROM rows WHERE url IS NULL"
        )
        distinct, without = self._number("firsts"), self._number("rows WHERE url IS NULL")
        self.repeated = self.rows - without - distinct
        self.known = distinct + without - self._number("chosen")
        self._database.execute("DROP TABLE firsts")

    def _place(self, unit_rows: int) -> None:
        """The table `places`: where each chosen row stands that its site has room for."""
        self._size()
        planned = self._number("sizes", of="coalesce(sum(rows), 0)")
        self.over_per_site = self._number("chosen") - planned
        lanes = lanes_for(planned, unit_rows)
        self._database.execute(
            "CREATE TABLE leads AS SELECT file, min(seq) AS lead FROM chosen WHERE shared GROUP BY file"
        )
        self._database.execute(
            "CREATE TABLE places (seq BIGINT, lane UINTEGER, place DOUBLE, domain UBIGINT)"
        )
        by_site = self._database.sql(
            "SELECT seq, domain, rows, file, shared FROM chosen JOIN sizes USING (domain) "
            "LEFT JOIN leads USING (file) ORDER BY domain, coalesce(lead, seq), seq"
        )
        writer, turns = self._database.cursor(), _Turns()
        for batch in by_site.to_arrow_reader(_BATCH):
            seq, domain, rows, file, shared = (column.to_numpy(zero_copy_only=False) for column in batch)
            place, turn = turns.of(domain, file, shared)
            stays = place < rows
            seq, domain, rows, turn = seq[stays], domain[stays], rows[stays], turn[stays]
            columns = {
                "seq": seq,
                "lane": lane_of(domain, lanes),
                "place": (turn + 1 - share_of(domain)) / rows,
                "domain": domain,
            }
            writer.register("batch", pa.table(columns))
            writer.execute("INSERT INTO places FROM batch")
        writer.close()
        self._database.execute("DROP TABLE chosen; DROP TABLE sizes; DROP TABLE leads")

    def _size(self) -> None:
        """The table `sizes`: how many rows of each site are planned."""
        rows = "count(*)"
        if self._per_site is not None:
            # What has no address is of no site.
            without = domain_hashes(pa.chunked_array([pa.array([""])]))[0]
            rows = (
                f"CASE domain WHEN {without} THEN count(*) ELSE greatest(least(count(*), "
                f"{self._per_site} - coalesce(any_value(there.rows), 0)), 0) END"
            )
        self._database.execute(
            f"CREATE TABLE sizes AS SELECT domain, {rows} AS rows FROM chosen LEFT JOIN (SELECT domain, "
            "count(DISTINCT url) AS rows FROM known GROUP BY domain) AS there USING (domain) GROUP BY domain"
        )
        self._database.execute("DROP TABLE known")

    def _in_order(self, schema: pa.Schema) -> Iterator[tuple[int, pa.Table]]:
        columns = ", ".join(f"c{number}" for number in range(len(schema)))
        ordered = self._database.sql(
            f"SELECT {columns}, lane FROM rows JOIN places USING (seq) "
            "ORDER BY lane, place, places.domain, seq"
        )
        for batch in ordered.to_arrow_reader(_BATCH):
            lane = batch.column(len(schema)).to_numpy()
            restored = [
                _restored(column, kind)
                for column, kind in zip(batch.columns[: len(schema)], schema.types, strict=True)
            ]
            table = pa.table(restored, schema=schema)
            cuts = [0, *(np.flatnonzero(np.diff(lane)) + 1).tolist(), len(lane)]
            for start, end in pairwise(cuts):
                if end > start:
                    yield int(lane[start]), table.slice(start, end - start)

    def _number(self, rows: str, *, of: str = "count(*)") -> int:
        found = self._database.execute(f"SELECT {of} FROM {rows}").fetchone()
        assert found is not None
        return int(found[0])


class _Turns:
    """The places of sites' rows that come site by site, in batches: 0, 1, 2, …; and their turns, which are
    the same, but that rows of one file share one.
    """

    def __init__(self) -> None:
        self._domain: np.uint64 | None = None  # of the last row of the batch before
        self._file = np.uint64(0)
        self._place = self._turn = -1

    def of(
        self, domain: NDArray[np.uint64], file: NDArray[np.uint64], shared: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places and turns of the next rows, (n,) each."""
        at = np.arange(len(domain))
        begins = np.append(self._domain is None or domain[0] != self._domain, domain[1:] != domain[:-1])
        # Of the site: a row that goes on with the batch before counts from there.
        start = np.maximum.accumulate(np.where(begins, at, -self._place - 1))
        place = at - start
        alone = begins | ~shared
        alone |= np.append(file[0] != self._file, file[1:] != file[:-1])
        last = np.maximum.accumulate(np.where(alone, at, -1))
        turn = np.where(last < 0, self._turn, place[last])
        self._domain, self._file = domain[-1], file[-1]
        self._place, self._turn = int(place[-1]), int(turn[-1])
        return place, turn


def lanes_for(rows: int, unit_rows: int) -> int:
    """How many lanes a plan of so many rows has."""
    return min(max(-(-rows // (_UNITS_PER_LANE * unit_rows)), 1), MOST_LANES)


def lane_of(domain: NDArray[np.uint64], lanes: int) -> NDArray[np.uint32]:
    """The lanes of hashes of domains, (n,): ranges of equal length."""
    return (((domain >> np.uint64(32)) * np.uint64(lanes)) >> np.uint64(32)).astype(np.uint32)


def share_of(domain: NDArray[np.uint64]) -> NDArray[np.float64]:
    """u of the module's text, in [0, 1), (n,): from the bits that do not decide the lane."""
    return (domain & np.uint64(0xFFFFFFFF)).astype(np.float64) / (1 << 32)


def _stored(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as DuckDB gives it back to the bit."""
    kind = column.type
    if pa.types.is_null(kind):
        return pa.chunked_array([pa.nulls(len(column), pa.bool_())])
    if pa.types.is_float16(kind):
        return column.cast(pa.float32())
    if pa.types.is_temporal(kind):
        return column.cast(pa.int32() if kind.bit_width == 32 else pa.int64())
    return column


def _restored(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_null(kind):
        return pa.nulls(len(column))
    return column.cast(kind)


@contextmanager
def _told(folder: str) -> Iterator[None]:
    """Within the block, room that lacks is told of.

    Raises:
        UserError: the folder for temporary files is full, or the machine's memory is.
    """
    import duckdb

    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        place = Path(folder).parent
        free = shutil.disk_usage(place).free
        why = str(error).partition("\n")[0]  # what follows is advice about DuckDB's settings
        raise UserError(
            f"planning needs more room than there is in {place}, where {free / 1e9:.1f} GB are free: set "
            f"TMPDIR to a folder with more, some 250 bytes for each URL ({why})"
        ) from error
