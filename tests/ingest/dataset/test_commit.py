"""Exactly once: commits, the Merkle root, sealing."""

import hashlib
import json

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from ingest.dataset.commit import commit
from ingest.dataset.records import CommitRecord, FileRecord
from ingest.dataset.seal import merkle_root, seal
from ingest.store.posix import PosixStore


def record(unit, fingerprint="a" * 64):
    file = FileRecord(name=f"x/{unit}", bytes=1, sha256="b" * 64)
    return CommitRecord(
        unit=unit,
        generation=0,
        fingerprint=fingerprint,
        rows=5,
        bytes=10,
        kept=2,
        rejected={"not_an_image": 1},
        failed={"truncated": 2},
        shard=file,
        meta=file,
    )


def visible(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_lost_reply_and_lost_race_are_told_apart_by_reading(tmp_path):
    assert commit(PosixStore(tmp_path), record(3)) == record(3)
    assert commit(PosixStore(tmp_path), record(3)) == record(3)
    assert commit(PosixStore(tmp_path), record(3).model_copy(update={"kept": 1})) == record(3)


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=40))
def test_merkle_root_is_that_of_the_hash_tree(leaves):
    def tree(part):
        if len(part) == 1:
            return hashlib.sha256(b"\0" + part[0]).digest()
        half = 1 << ((len(part) - 1).bit_length() - 1)
        return hashlib.sha256(b"\1" + tree(part[:half]) + tree(part[half:])).digest()

    assert merkle_root(leaves) == tree(leaves).hex()


@given(st.lists(st.binary(max_size=3), min_size=2, max_size=8, unique=True), st.data())
def test_merkle_root_depends_on_order_and_on_every_leaf(leaves, data):
    place = data.draw(st.integers(0, len(leaves) - 2))
    swapped = [*leaves[:place], leaves[place + 1], leaves[place], *leaves[place + 2 :]]
    changed = [*leaves[:place], leaves[place] + b"x", *leaves[place + 1 :]]
    assert (
        len({merkle_root(leaves), merkle_root(swapped), merkle_root(changed), merkle_root(leaves[:-1])}) == 4
    )


def test_seal_needs_every_unit(tmp_path):
    for unit in (0, 2):
        commit(PosixStore(tmp_path), record(unit))
    with pytest.raises(UserError, match="unit 1 is not committed; run the crawl again"):
        seal(PosixStore(tmp_path), dict.fromkeys(range(3), "a" * 64))
    assert not (tmp_path / "sealed").exists()
    assert not (tmp_path / "DATASET.json").exists()


def test_seal_refuses_a_unit_of_another_plan(tmp_path):
    commit(PosixStore(tmp_path), record(0, "c" * 64))
    with pytest.raises(UserError, match="unit 0 was made under another plan"):
        seal(PosixStore(tmp_path), {0: "a" * 64})


def test_D1_seal_is_a_function_of_the_commits(tmp_path):
    for unit in range(3):
        commit(PosixStore(tmp_path / "a"), record(unit))
    for unit in (2, 0, 1):
        commit(PosixStore(tmp_path / "b"), record(unit))
    expected = dict.fromkeys(range(3), "a" * 64)
    root = seal(PosixStore(tmp_path / "a"), expected)
    assert seal(PosixStore(tmp_path / "b"), expected) == root
    assert root == merkle_root([record(unit).to_bytes() for unit in range(3)])
    for name in visible(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    before = {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in visible(tmp_path / "a")}
    assert seal(PosixStore(tmp_path / "a"), expected) == root
    assert before == {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in visible(tmp_path / "a")}


def test_D2_sealed_head_adds_up(tmp_path):
    for unit in range(3):
        commit(PosixStore(tmp_path), record(unit))
    root = seal(PosixStore(tmp_path), dict.fromkeys(range(3), "a" * 64))
    head = json.loads((tmp_path / "sealed" / f"{root}.json").read_bytes())
    assert (head["planned"], head["kept"], head["units"]) == (15, 6, 3)
    assert (head["rejected"], head["failed"]) == ({"not_an_image": 3}, {"truncated": 6})
    listing = tmp_path / "sealed" / f"{root}.parquet"
    assert head["units_sha256"] == hashlib.sha256(listing.read_bytes()).hexdigest()
    assert pq.read_table(listing)["rejected"].to_pylist() == [1, 1, 1]
    assert json.loads((tmp_path / "DATASET.json").read_bytes())["sealed"] == root
