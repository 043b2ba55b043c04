"""Sealed datasets of made-up rows, without crawling pictures."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ingest.dataset.commit import commit
from ingest.dataset.schema import NO_COLUMNS
from ingest.dataset.seal import seal
from ingest.dataset.shard import ShardWriter
from ingest.image.check import Checked
from ingest.store.open import open_store

Row = dict[str, Any]


def seal_rows(
    output: str | Path,
    units: Sequence[Sequence[Row]],
    *,
    extra: pa.Schema = NO_COLUMNS,
    rejected: int = 1,
    old_units: int = 0,
) -> str:
    """Make a dataset and return its root.

    Args:
        output: where.
        units: the rows of each unit: data (bytes; different for each row by default), phash (far from that of
            others by default), width, height, url, labels, caption, and the columns of `extra`.
        extra: further columns.
        rejected: attempts that were not kept, at the start of each unit.
        old_units: so many units are of generation 0 and lack the further columns; the others, of 1.
    """
    store = open_store(output)
    store.prepare()
    for unit, rows in enumerate(units):
        columns = NO_COLUMNS if unit < old_units else extra
        with ShardWriter(store, unit, extra=columns) as writer:
            for number in range(rejected):
                writer.add(Checked(status="rejected", reason="tiny"), b"", url=f"bad/{number}", labels=[])
            for number, row in enumerate(rows):
                data = row.get("data", f"{unit} {number}".encode())
                digest = hashlib.sha256(data)
                verdict = Checked(
                    status="kept",
                    format="jpeg",
                    width=row.get("width", 64),
                    height=row.get("height", 48),
                    sha256=digest.hexdigest(),
                    phash=row["phash"] if "phash" in row else int.from_bytes(digest.digest()[:8], "big"),
                )
                writer.add(
                    verdict,
                    data,
                    url=row.get("url", f"https://example.org/{unit}/{number}.jpg"),
                    labels=row.get("labels", []),
                    caption=row.get("caption"),
                    extra={name: row.get(name) for name in columns.names},
                )
            commit(store, writer.publish(generation=int(unit >= old_units), fingerprint="f" * 64))
    return seal(store, dict.fromkeys(range(len(units)), "f" * 64))
