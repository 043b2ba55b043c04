"""Records on scratch disk, by partition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.dedup.partition import read_partition, write_partitions

RECORDS = np.dtype([("value", "<u4"), ("place", "<u2")])


def records(places):
    made = np.zeros(len(places), RECORDS)
    made["value"], made["place"] = np.arange(len(places)), places
    return made


@given(files=st.lists(st.lists(st.integers(0, 4), max_size=30), max_size=4))
def test_each_partition_has_its_records_in_order(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("partitions")
    written = [records(places) for places in files]
    paths = [folder / str(number) for number in range(len(files))]
    for path, part in zip(paths, written, strict=True):
        write_partitions(path, part, part["place"], 5)
    for partition in range(5):
        found = read_partition(paths, partition, 5, RECORDS)
        expected = [part[part["place"] == partition] for part in written]
        assert found.tolist() == [row for part in expected for row in part.tolist()]


def test_a_file_that_is_made_again_stays_whole_for_who_reads_it(tmp_path):
    path = tmp_path / "file"
    made = records([0, 1, 1])
    write_partitions(path, made, made["place"], 2)
    before = path.read_bytes()
    with path.open("rb") as reader:
        write_partitions(path, made[:1], made["place"][:1], 2)
        assert reader.read() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_that_has_lost_its_end_is_told(tmp_path):
    path = tmp_path / "file"
    made = records([0, 1, 1])
    write_partitions(path, made, made["place"], 2)
    path.write_bytes(path.read_bytes()[:-3])
    assert len(read_partition([path], 0, 2, RECORDS)) == 1
    with pytest.raises(OSError, match="shorter than it was written"):
        read_partition([path], 1, 2, RECORDS)
