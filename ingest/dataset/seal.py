"""Sealing: all units of a plan become one dataset with one root."""

import hashlib
import io
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UserError
from ingest.dataset import layout
from ingest.dataset.commit import read_commits
from ingest.dataset.records import CommitRecord, Pointer, SealedHead
from ingest.dataset.schema import UNITS_SCHEMA
from ingest.store.store import Store


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

    If DATASET.json points to one with later generations it stays: a crawl that is run again when others have
    added to the dataset takes nothing away from it.

    Args:
        store: the dataset's files.
        expected: every planned unit, ascending, and the fingerprint of its plan.

    Returns:
        The Merkle root, hex.

    Raises:
        UserError: a unit is missing, was made under another plan, or its commit is damaged.
    """
    records: list[CommitRecord] = []
    for unit, record in read_commits(store, expected):
        if record is None:
            raise UserError(
                f"{store.root} cannot be sealed: unit {unit} is not committed; run the crawl again"
            )
        if record.fingerprint != expected[unit]:
            raise UserError(f"{store.root}: unit {unit} was made under another plan; use another --output")
        records.append(record)
    root = merkle_root([record.to_bytes() for record in records])
    table = _units_table(records)
    listing = store.create_if_absent(layout.sealed_name(root, "parquet"), table)
    head = SealedHead(
        format=1,
        root=root,
        generations=tuple(sorted({record.generation for record in records})),
        fingerprints=tuple(sorted(set(expected.values()))),
        units=len(records),
        planned=sum(record.rows for record in records),
        kept=sum(record.kept for record in records),
        rejected=_summed([record.rejected for record in records]),
        failed=_summed([record.failed for record in records]),
        bytes=sum(record.bytes for record in records),
        units_sha256=hashlib.sha256(listing).hexdigest(),
    ).to_bytes()
    if store.create_if_absent(layout.sealed_name(root, "json"), head) != head and listing == table:
        # The head is damaged; or the list was lost and made anew, by a pyarrow that writes other bytes.
        store.replace(layout.sealed_name(root, "json"), head)
    pointer = Pointer(format=1, sealed=root).to_bytes()
    if not _same(store, layout.DATASET, pointer) and not _has_later(store, records[-1].generation):
        store.replace(layout.DATASET, pointer)
    return root


def _has_later(store: Store, generation: int) -> bool:
    """Whether DATASET.json points to a whole dataset with later generations than this."""
    try:
        latest = Pointer.read(store.read(layout.DATASET), where=layout.DATASET, remedy="").sealed
        name = layout.sealed_name(latest, "json")
        head = SealedHead.read(store.read(name), where=name, remedy="")
    except (FileNotFoundError, UserError):
        return False
    return head.generations[-1] > generation and store.exists(layout.sealed_name(latest, "parquet"))


def _same(store: Store, name: str, data: bytes) -> bool:
    try:
        return store.read(name) == data
    except FileNotFoundError:
        return False


def _summed(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    reasons = sorted({reason for each in counts for reason in each})
    return {reason: sum(each.get(reason, 0) for each in counts) for reason in reasons}


def _units_table(records: Sequence[CommitRecord]) -> bytes:
    """The sealed list of units as Parquet, a pure function of the commits."""
    table = pa.table(
        {
            "unit": [record.unit for record in records],
            "generation": [record.generation for record in records],
            "rows": [record.rows for record in records],
            "kept": [record.kept for record in records],
            "rejected": [sum(record.rejected.values()) for record in records],
            "failed": [sum(record.failed.values()) for record in records],
            "shard": [record.shard.name for record in records],
            "shard_bytes": [record.shard.bytes for record in records],
            "shard_sha256": [bytes.fromhex(record.shard.sha256) for record in records],
            "meta": [record.meta.name for record in records],
            "meta_bytes": [record.meta.bytes for record in records],
            "meta_sha256": [bytes.fromhex(record.meta.sha256) for record in records],
        },
        schema=UNITS_SCHEMA,
    )
    buffer = io.BytesIO()
    # In small groups, a reader that wants a few columns of a million units needs little memory.
    pq.write_table(table, buffer, compression="zstd", row_group_size=4_096)
    return buffer.getvalue()
