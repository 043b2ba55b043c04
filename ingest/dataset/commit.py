"""Committing units exactly once, and sealing.

A commit and a seal are created only if absent. Whoever comes second, or comes again after a kill, finds the
first one's result and goes on from there.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UserError
from ingest.dataset import layout
from ingest.store.store import Store

_READ_AT_ONCE = 512
UNITS_SCHEMA = pa.schema(
    [
        pa.field("unit", pa.uint32(), nullable=False),
        pa.field("generation", pa.uint32(), nullable=False),
        pa.field("rows", pa.uint32(), nullable=False),
        pa.field("kept", pa.uint32(), nullable=False),
        pa.field("rejected", pa.uint32(), nullable=False),
        pa.field("failed", pa.uint32(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("shard_bytes", pa.uint64(), nullable=False),
        pa.field("shard_sha256", pa.binary(32), nullable=False),
        pa.field("meta", pa.string(), nullable=False),
        pa.field("meta_bytes", pa.uint64(), nullable=False),
        pa.field("meta_sha256", pa.binary(32), nullable=False),
    ]
)


def canonical(value: Any) -> bytes:
    """JSON with one spelling, for hashing and for publishing."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def commit(store: Store, record: dict[str, Any]) -> dict[str, Any]:
    """Make one unit's result final by one create-if-absent; returns the record that won, ours or another."""
    winner = store.create_if_absent(layout.commit_name(record["unit"]), canonical(record))
    return _record(winner)


def read_commit(store: Store, unit: int) -> dict[str, Any] | None:
    try:
        return _record(store.read(layout.commit_name(unit)))
    except FileNotFoundError:
        return None


def read_commits(store: Store, units: Iterable[int]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Every unit and its commit, None without one; many are read at once where one takes long."""
    remaining = iter(units)
    while batch := list(islice(remaining, _READ_AT_ONCE)):
        read = store.read_many([layout.commit_name(unit) for unit in batch])
        for unit, data in zip(batch, read, strict=True):
            yield unit, None if data is None else _record(data)


def _record(data: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(data)
    return record


def merkle_root(leaves: Sequence[bytes]) -> str:
    """Root of the binary hash tree over these byte strings, hex.

    A leaf is sha256(0x00 + bytes), a node sha256(0x01 + left + right); one without a sibling moves up as it
    is.
    """
    level = [hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves]
    if not level:
        raise ValueError("a dataset has at least one unit")
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=False)
        odd = [level[-1]] if len(level) % 2 else []
        level = [hashlib.sha256(b"\1" + left + right).digest() for left, right in pairs] + odd
    return level[0].hex()


def seal(store: Store, expected: Mapping[int, str]) -> str:
    """Name the dataset that these units make, and point DATASET.json to it. Sealing again changes nothing.

    Args:
        store: the dataset's files.
        expected: every planned unit, ascending, and the fingerprint of its plan.

    Returns:
        The Merkle root, hex.

    Raises:
        UserError: a unit is missing, or was made under another plan.
    """
    records = []
    for unit, record in read_commits(store, expected):
        if record is None:
            raise UserError(
                f"{store.root} cannot be sealed: unit {unit} is not committed; run the crawl again"
            )
        if record["fingerprint"] != expected[unit]:
            raise UserError(f"{store.root}: unit {unit} was made under another plan; use another --output")
        records.append(record)
    root = merkle_root([canonical(record) for record in records])
    table = _units_table(records)
    listing = store.create_if_absent(layout.sealed_name(root, "parquet"), table)
    head = {
        "format": 1,
        "root": root,
        "generations": sorted({record["generation"] for record in records}),
        "fingerprints": sorted(set(expected.values())),
        "units": len(records),
        "planned": sum(record["rows"] for record in records),
        "kept": sum(record["kept"] for record in records),
        "rejected": _summed(records, "rejected"),
        "failed": _summed(records, "failed"),
        "bytes": sum(record["bytes"] for record in records),
        "units_sha256": hashlib.sha256(listing).hexdigest(),
    }
    kept_head = store.create_if_absent(layout.sealed_name(root, "json"), canonical(head))
    if kept_head != canonical(head) and listing == table:
        # The list was lost and made anew, by a pyarrow that writes it with other bytes.
        store.replace(layout.sealed_name(root, "json"), canonical(head))
    pointer = canonical({"format": 1, "sealed": root})
    if not _same(store, layout.DATASET, pointer):
        store.replace(layout.DATASET, pointer)
    return root


def _same(store: Store, name: str, data: bytes) -> bool:
    try:
        return store.read(name) == data
    except FileNotFoundError:
        return False


def _summed(records: Sequence[dict[str, Any]], status: str) -> dict[str, int]:
    reasons = sorted({reason for record in records for reason in record[status]})
    return {reason: sum(record[status].get(reason, 0) for record in records) for reason in reasons}


def _units_table(records: Sequence[dict[str, Any]]) -> bytes:
    """The sealed list of units as Parquet, a pure function of the commits."""
    table = pa.table(
        {
            "unit": [record["unit"] for record in records],
            "generation": [record["generation"] for record in records],
            "rows": [record["rows"] for record in records],
            "kept": [record["kept"] for record in records],
            "rejected": [sum(record["rejected"].values()) for record in records],
            "failed": [sum(record["failed"].values()) for record in records],
            **{
                name + column: [convert(record[name][field]) for record in records]
                for name in ("shard", "meta")
                for column, field, convert in (
                    ("", "name", str),
                    ("_bytes", "bytes", int),
                    ("_sha256", "sha256", bytes.fromhex),
                )
            },
        },
        schema=UNITS_SCHEMA,
    )
    buffer = io.BytesIO()
    # In small groups, a reader that wants a few columns of a million units needs little memory.
    pq.write_table(table, buffer, compression="zstd", row_group_size=4_096)
    return buffer.getvalue()
