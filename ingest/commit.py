"""Publishing exactly once, and sealing. The only writes that another process can see are in this file.

A file becomes visible whole or not at all; a commit and a seal are created only if absent. Whoever comes
second, or comes again after a kill, finds the first one's result and goes on from there. A kill may leave
hidden drafts.
"""

import contextlib
import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UserError
from ingest import layout

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


def make_folder(path: Path) -> None:
    """Create the folder and its parents so that they survive a power cut."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def draft(folder: Path, stem: str) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside its final place, under a hidden name; removed at the end unless it was moved."""
    make_folder(folder)
    path = folder / f".{stem}-{secrets.token_hex(8)}.tmp"
    try:
        with path.open("xb", buffering=1 << 20) as file:
            yield path, file
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def make_durable(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def create_if_absent(path: Path, data: bytes) -> bytes:
    """Publish `data` under this name unless something is there already; returns what is there afterwards."""
    with draft(path.parent, path.stem) as (temporary, file):
        file.write(data)
        make_durable(file)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    sync_folder(path.parent)
    return path.read_bytes()


def replace(path: Path, data: bytes) -> None:
    """Move the name to new content in one step: readers see the old bytes or the new ones."""
    with draft(path.parent, path.stem) as (temporary, file):
        file.write(data)
        make_durable(file)
        temporary.replace(path)
    sync_folder(path.parent)


def publish(temporary: Path, final: Path, sha256: str) -> None:
    """Reread a durable draft, and give it its content name.

    Two workers that made the same bytes use the same name: either's file serves both.

    Raises:
        OSError: what comes back is not what was written.
    """
    with temporary.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise OSError(
                f"{final} does not read back as it was written: the disk or file system is at fault"
            )
    temporary.replace(final)
    sync_folder(final.parent)


def commit(output: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Make one unit's result final by one create-if-absent; returns the record that won, ours or another."""
    winner = create_if_absent(output / layout.commit_name(record["unit"]), canonical(record))
    return _record(winner)


def read_commit(output: Path, unit: int) -> dict[str, Any] | None:
    try:
        return _record((output / layout.commit_name(unit)).read_bytes())
    except FileNotFoundError:
        return None


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


def seal(output: Path, expected: Mapping[int, str]) -> str:
    """Name the dataset that these units make, and point DATASET.json to it. Sealing again changes nothing.

    Args:
        output: the dataset's folder.
        expected: every planned unit, ascending, and the fingerprint of its plan.

    Returns:
        The Merkle root, hex.

    Raises:
        UserError: a unit is missing, or was made under another plan.
    """
    records = []
    for unit, fingerprint in expected.items():
        record = read_commit(output, unit)
        if record is None:
            raise UserError(f"{output} cannot be sealed: unit {unit} is not committed; run the crawl again")
        if record["fingerprint"] != fingerprint:
            raise UserError(f"{output}: unit {unit} was made under another plan; use another --output")
        records.append(record)
    root = merkle_root([canonical(record) for record in records])
    table = _units_table(records)
    listing = create_if_absent(output / layout.sealed_name(root, "parquet"), table)
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
    kept_head = create_if_absent(output / layout.sealed_name(root, "json"), canonical(head))
    if kept_head != canonical(head) and listing == table:
        # The list was lost and made anew, by a pyarrow that writes it with other bytes.
        replace(output / layout.sealed_name(root, "json"), canonical(head))
    pointer = canonical({"format": 1, "sealed": root})
    if not _same(output / layout.DATASET, pointer):
        replace(output / layout.DATASET, pointer)
    return root


def _same(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
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
