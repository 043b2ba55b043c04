"""The format of a unit: tar, Parquet, and their agreement."""

import hashlib
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.dataset.schema import META_SCHEMA
from ingest.dataset.shard import ShardWriter, header
from ingest.image.check import Checked, Treatment, check
from ingest.store.posix import PosixStore


def write(output, scene, encode, *, unit=7):
    """Three pictures among two others; returns the commit record and the stored bytes."""
    kinds = ["JPEG", "PNG", "GIF"]
    stored = [encode(scene(number), kind) for number, kind in enumerate(kinds)]
    with ShardWriter(PosixStore(output), unit) as writer:
        writer.add(Checked(status="rejected", reason="not_an_image"), b"", url="in/a.txt", labels=[])
        for number, data in enumerate(stored):
            writer.add(check(data, Treatment()), data, url=f"in/{number}", labels=["cat", "pet"])
        failed = Checked(status="failed", reason="io_error")
        writer.add(failed, b"", url="in/z", labels=["dog"], retryable=True)
        return writer.publish(generation=0, fingerprint="f" * 64), stored


def test_record_says_what_was_published(tmp_path, scene, encode):
    record, stored = write(tmp_path, scene, encode)
    assert (record.rows, record.kept) == (5, 3)
    assert (record.rejected, record.failed) == ({"not_an_image": 1}, {"io_error": 1})
    assert record.bytes == sum(map(len, stored))
    for kind in ("shard", "meta"):
        data = (tmp_path / getattr(record, kind).name).read_bytes()
        assert getattr(record, kind).bytes == len(data)
        assert getattr(record, kind).sha256 == hashlib.sha256(data).hexdigest()
    assert record.shard.name == f"shards/007/00000007-{record.shard.sha256[:8]}.tar"
    assert record.meta.name == f"meta/007/00000007-{record.meta.sha256[:8]}.parquet"
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 3, "with the counts, which no record names"


def test_tar_is_ustar_without_volatile_fields(tmp_path, scene, encode):
    record, stored = write(tmp_path, scene, encode)
    data = (tmp_path / record.shard.name).read_bytes()
    assert data[257:265] == b"ustar\x0000"
    assert data.endswith(b"\0" * 1024)
    with tarfile.open(tmp_path / record.shard.name) as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == [
            "0000000700000.jpg",
            "0000000700001.png",
            "0000000700002.gif",
        ]
        assert [tar.extractfile(member).read() for member in members] == stored
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        assert member.mode == 0o644


def test_D2_parquet_has_a_row_per_attempt_that_points_into_the_tar(tmp_path, scene, encode):
    record, stored = write(tmp_path, scene, encode)
    path = tmp_path / record.meta.name
    metadata = pq.ParquetFile(path).metadata
    assert metadata.num_row_groups == 1
    assert {metadata.row_group(0).column(k).compression for k in range(metadata.num_columns)} == {"ZSTD"}
    table = pq.read_table(path)
    assert table.schema.equals(META_SCHEMA)
    rows = table.to_pylist()
    assert [row["slot"] for row in rows] == [None, 0, 1, 2, None]
    assert [row["status"] for row in rows] == ["rejected", "kept", "kept", "kept", "failed"]
    assert [row["reason"] for row in rows] == ["not_an_image", None, None, None, "io_error"]
    assert [row["retryable"] for row in rows] == [False, False, False, False, True]
    assert [row["labels"] for row in rows] == [[], *[["cat", "pet"]] * 3, ["dog"]]
    tar = (tmp_path / record.shard.name).read_bytes()
    for row, data in zip(rows[1:4], stored, strict=True):
        assert tar[row["offset"] : row["offset"] + row["size"]] == data
        assert row["sha256"] == hashlib.sha256(data).digest()
        assert (row["width"], row["height"], row["original_width"], row["original_height"]) == (
            48,
            32,
            48,
            32,
        )
    for row in (rows[0], rows[4]):
        assert {row[name] for name in ("slot", "offset", "size", "width", "format", "sha256", "phash")} == {
            None
        }


def test_unit_without_a_picture_is_a_readable_empty_tar(tmp_path):
    with ShardWriter(PosixStore(tmp_path), 3) as writer:
        writer.add(Checked(status="failed", reason="truncated"), b"", url="in/x", labels=[])
        record = writer.publish(generation=0, fingerprint="f" * 64)
    with tarfile.open(tmp_path / record.shard.name) as tar:
        assert tar.getmembers() == []
    assert pq.read_table(tmp_path / record.meta.name).num_rows == 1


def test_D3_unpublished_unit_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), ShardWriter(PosixStore(tmp_path), 0) as writer:
        writer.add(Checked(status="failed", reason="truncated"), b"", url="in/x", labels=[])
        raise ZeroDivisionError
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_no_column_depends_on_time_or_machine():
    assert not {name for name in META_SCHEMA.names if "time" in name or "host" in name or "ms" in name}
    assert META_SCHEMA.field("sha256").type == pa.binary(32)
    assert META_SCHEMA.field("phash").type == pa.uint64()


def test_shards_open_in_webdataset(tmp_path, folder, crawl):
    import webdataset

    source = folder(count=9)
    crawl([source], tmp_path / "out", unit_rows=4)
    shards = sorted(map(str, (tmp_path / "out" / "shards").rglob("*.tar")))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    found = {
        sample["__key__"]: data
        for sample in samples
        for name, data in sample.items()
        if not name.startswith("__")
    }
    files = sorted(path for path in source.rglob("*.*") if path.name != "note.jpg")
    assert [found[key] for key in sorted(found)] == [path.read_bytes() for path in files]
    assert sorted(found)[:2] == ["0000000000000", "0000000000001"]


@given(
    name=st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1, max_size=100),
    size=st.integers(0, 8**11 - 1),
)
def test_headers_are_those_of_tarfile(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    assert header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)
