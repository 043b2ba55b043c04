"""What the pipeline sees of a dataset."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from ingest.dataset.keys import key_of
from ingest.dataset.open import ROW, open_dataset, sealed_head, sealed_units
from ingest.dataset.view import write_view


@pytest.fixture
def dataset(tmp_path, folder, crawl):
    """12 attempts in units of 4: 5 cats, 5 dogs and 2 texts, the last unit texts only."""
    source = folder(count=10)
    (source / "dog" / "note.jpg").unlink()
    (source / "text").mkdir()
    for number in range(6):
        (source / "text" / f"{number}.jpg").write_text("no picture")
    return tmp_path / "out", crawl([source], tmp_path / "out", unit_rows=4), source


def test_units_counts_and_rows(dataset):
    path, report, source = dataset
    opened = open_dataset(path)
    assert opened.root == report.root
    assert (opened.units.tolist(), opened.units.dtype) == ([0, 1, 2], np.uint32)
    assert (opened.counts.tolist(), opened.counts.dtype) == ([4, 4, 2], np.int64)
    assert len(opened) == 10
    assert opened.vocabulary.names == ("cat", "dog", "text")
    files = sorted(path for path in source.rglob("*.*") if path.parent.name != "text")
    for index, unit in enumerate(opened.units.tolist()):
        rows, keys = opened.unit_rows(index), opened.unit_keys(index)
        codes = opened.unit_labels(index)
        labels = [opened.vocabulary.names[code] for row in range(len(codes)) for code in codes.of(row)]
        assert keys.tolist() == [key_of(unit, slot) for slot in range(int(opened.counts[index]))]
        assert (rows.dtype, keys.dtype) == (ROW, np.uint64)
        assert rows["slot"].tolist() == list(range(len(keys)))
        with open(opened.shard_path(index), "rb") as shard:  # noqa: PTH123
            for (offset, size, _, sha), label in zip(rows.tolist(), labels, strict=True):
                shard.seek(offset)
                data, file = shard.read(size), files.pop(0)
                assert data == file.read_bytes()
                assert hashlib.sha256(data).digest() == sha
                assert label == file.parent.name
    assert files == []


def test_units_without_a_sample_are_left_out_but_sealed(dataset):
    path, report, _ = dataset
    assert sealed_units(path, report.root)["kept"].to_pylist() == [4, 4, 2, 0]
    head = sealed_head(path, report.root)
    assert (head.planned, head.kept, head.rejected) == (16, 10, {"not_an_image": 6})


def test_view_drops_samples_and_units(dataset):
    path, report, _ = dataset
    keeps = {0: np.array([0, 1, 0, 1], bool), 1: np.zeros(4, bool), 2: np.ones(2, bool)}
    write_view(path, "some", root=report.root, keeps=keeps)
    seen = open_dataset(path, view="some")
    assert seen.units.tolist() == [0, 2]
    assert seen.counts.tolist() == [2, 2]
    assert seen.unit_keys(0).tolist() == [1, 3]
    assert seen.unit_keys(1).tolist() == [200_000, 200_001]
    whole = open_dataset(path)
    assert np.array_equal(seen.unit_rows(0)["offset"], whole.unit_rows(0)["offset"][[1, 3]])
    assert seen.vocabulary.names == whole.vocabulary.names


def test_labels_take_one_request_for_a_unit_and_are_checked(dataset, monkeypatch):
    path, _, _ = dataset
    opened = open_dataset(path)
    meta = Path(opened.meta_path(1))
    opened.files.meta_sha256(1)  # names come in blocks, for all units
    (cat, dog) = (opened.vocabulary.names.index(name) for name in ("cat", "dog"))
    monkeypatch.setattr(type(opened.store), "open", lambda *_: pytest.fail("is opened, and read in pieces"))
    assert opened.unit_labels(0).codes.tolist() == [cat] * 4
    assert opened.unit_labels(2).codes.tolist() == [dog] * 2
    data = bytearray(meta.read_bytes())
    data[len(data) // 2] ^= 1
    meta.write_bytes(data)
    with pytest.raises(UserError, match=f"{meta.name} is damaged"):
        opened.unit_labels(1)


def test_labels_are_empty_at_the_top_of_a_source(tmp_path, scene, crawl):
    (tmp_path / "in").mkdir()
    scene().save(tmp_path / "in" / "a.png")
    crawl([tmp_path / "in"], tmp_path / "out")
    opened = open_dataset(tmp_path / "out")
    assert (len(opened.unit_labels(0)), len(opened.unit_labels(0).codes)) == (1, 0)
    assert opened.vocabulary.names == ()


def test_dataset_crosses_processes(dataset):
    opened = open_dataset(dataset[0])
    copy = pickle.loads(pickle.dumps(opened))  # noqa: S301
    assert np.array_equal(copy.unit_keys(1), opened.unit_keys(1))


def test_root_can_be_pinned(dataset):
    path, report, _ = dataset
    assert len(open_dataset(path, sealed=report.root)) == 10
    with pytest.raises(UserError, match=r"has no sealed root 000000000000: see .*sealed"):
        open_dataset(path, sealed="0" * 64)


def test_D3_what_is_not_sealed_is_not_opened(dataset, tmp_path):
    path, report, _ = dataset
    with pytest.raises(UserError, match=r"is not a dataset: make one with `ingest crawl-shards"):
        open_dataset(tmp_path / "nothing")
    (path / "DATASET.json").unlink()
    with pytest.raises(
        UserError, match=r"is not sealed yet: run the same `ingest crawl-shards` command again"
    ):
        open_dataset(path)
    assert len(open_dataset(path, sealed=report.root)) == 10


def test_damaged_seal_is_told(dataset):
    path, report, _ = dataset
    listing = path / "sealed" / f"{report.root}.parquet"
    listing.write_bytes(listing.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"list of units of root .* is damaged"):
        open_dataset(path)
    (path / "DATASET.json").write_bytes(b"{")
    with pytest.raises(UserError, match=r"DATASET.json is damaged"):
        open_dataset(path)


def rewrite_list(path, root, *, row_group_size):
    """The sealed list with other row groups, as another pyarrow might write it."""
    listing, head = path / "sealed" / f"{root}.parquet", path / "sealed" / f"{root}.json"
    pq.write_table(sealed_units(path, root), listing, row_group_size=row_group_size)
    said = json.loads(head.read_bytes())
    said["units_sha256"] = hashlib.sha256(listing.read_bytes()).hexdigest()
    head.write_text(json.dumps(said))


def test_names_come_from_whichever_block_holds_them(tmp_path, folder, crawl):
    report = crawl([folder(count=11)], tmp_path / "out", unit_rows=1)
    rewrite_list(tmp_path / "out", report.root, row_group_size=2)
    keeps = {unit: np.array([unit % 3 != 1]) for unit in range(11)}
    write_view(tmp_path / "out", "some", root=report.root, keeps=keeps)
    listed = {row["unit"]: row for row in sealed_units(tmp_path / "out", report.root).to_pylist()}
    for view in (None, "some"):
        opened = open_dataset(tmp_path / "out", view=view)
        order = np.random.default_rng(0).permutation(len(opened.units))
        for index in [*order, *order[::-1]]:
            row = listed[int(opened.units[index])]
            assert opened.shard_path(index) == f"{tmp_path / 'out'}/{row['shard']}"
            assert opened.meta_path(index) == f"{tmp_path / 'out'}/{row['meta']}"


def test_a_lost_list_is_made_anew_whoever_wrote_the_old_one(dataset, crawl):
    path, report, source = dataset
    rewrite_list(path, report.root, row_group_size=2)
    (path / "sealed" / f"{report.root}.parquet").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"remove .*parquet and run the crawl again"):
        open_dataset(path)
    (path / "sealed" / f"{report.root}.parquet").unlink()
    crawl([source], path, unit_rows=4)
    assert len(open_dataset(path)) == 10


def test_a_damaged_metadata_file_is_told(dataset):
    path, _, _ = dataset
    opened = open_dataset(path)
    with open(opened.meta_path(1), "r+b") as meta:  # noqa: PTH123
        meta.truncate(100)
    with pytest.raises(UserError, match=r"meta.*is damaged"):
        opened.unit_rows(1)
    Path(opened.meta_path(1)).unlink()
    with pytest.raises(UserError, match=r"meta.*is missing, restore it"):
        opened.kept_rows(1)
