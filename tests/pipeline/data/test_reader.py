"""Reading samples: checked, repeated where that can help, never wrong."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import UserError
from ingest.dataset.open import Dataset, open_dataset
from pipeline.data import reader as module
from pipeline.data.node_cache import CachePlace
from pipeline.data.reader import BadSampleError, Reader


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses asked for; none is made."""
    asked: list[float] = []
    monkeypatch.setattr(module.time, "sleep", asked.append)
    return asked


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the next reads answer instead of the file: bytes, or an error to raise; then the file again."""
    answers: list[object] = []
    pread = os.pread

    def answer(descriptor: int, size: int, offset: int) -> bytes:
        if not answers:
            return pread(descriptor, size, offset)
        planned = answers.pop(0)
        if isinstance(planned, OSError):
            raise planned
        assert isinstance(planned, bytes)
        return planned

    monkeypatch.setattr(module.os, "pread", answer)
    return answers


def damage(dataset: Dataset, unit_index: int, row: int) -> None:
    """Flip one bit in the middle of a sample."""
    rows = dataset.unit_rows(unit_index)
    with Path(dataset.shard_path(unit_index)).open("r+b") as shard:
        place = int(rows["offset"][row] + rows["size"][row] // 2)
        shard.seek(place)
        byte = shard.read(1)[0]
        shard.seek(place)
        shard.write(bytes([byte ^ 1]))


def test_every_sample_is_read_as_it_was_sealed(small_dataset: Path) -> None:
    dataset = open_dataset(small_dataset)
    reader = Reader(dataset)
    keys = set()
    for unit_index, count in enumerate(dataset.counts.tolist()):
        rows = dataset.unit_rows(unit_index)
        for row in range(count):
            data = reader.read(unit_index, row)
            assert hashlib.sha256(data).digest() == rows["sha256"][row].tobytes()
            keys.add(reader.key(unit_index, row))
    assert len(keys) == 45
    reader.close()


def test_a_damaged_sample_is_bad_and_its_neighbours_are_not(own_dataset: Callable[..., Path]) -> None:
    dataset = open_dataset(own_dataset(images=4, unit_rows=4))
    damage(dataset, 0, 2)
    reader = Reader(dataset)
    with pytest.raises(BadSampleError, match="sha256 is not the sealed one"):
        reader.read(0, 2)
    assert len(reader.read(0, 1)) == dataset.unit_rows(0)["size"][1]
    assert reader.name(0, 2) == f"{dataset.shard_path(0)}:0000000000002"


def test_a_truncated_shard_makes_bad_samples(own_dataset: Callable[..., Path]) -> None:
    dataset = open_dataset(own_dataset(images=4, unit_rows=4))
    os.truncate(dataset.shard_path(0), int(dataset.unit_rows(0)["offset"][3]) + 5)
    with pytest.raises(BadSampleError, match="5 bytes"):
        Reader(dataset).read(0, 3)


def test_one_refetch_mends_a_torn_read(small_dataset: Path, reads: list[object]) -> None:
    reader = Reader(open_dataset(small_dataset))
    reads.append(b"torn")
    assert reader.read(0, 0) == reader.read(0, 0)
    reads.extend([b"torn", b"torn again"])
    with pytest.raises(BadSampleError):
        reader.read(0, 0)
    assert reads == []


def test_transient_errors_are_repeated_with_growing_pauses(
    small_dataset: Path, reads: list[object], pauses: list[float]
) -> None:
    reader = Reader(open_dataset(small_dataset))
    expected = reader.read(0, 0)
    reads.extend([OSError(errno.EIO, "sick disk"), OSError(errno.ESTALE, "stale handle")])
    assert reader.read(0, 0) == expected
    assert pauses == [0.1, 0.2]


def test_errors_that_stay_are_raised_never_substituted(
    small_dataset: Path, reads: list[object], pauses: list[float]
) -> None:
    reader = Reader(open_dataset(small_dataset))
    reads.extend(OSError(errno.EIO, "dead disk") for _ in range(5))
    with pytest.raises(OSError, match="dead disk"):
        reader.read(0, 0)
    assert len(pauses) == 4


def test_a_missing_file_is_the_users_to_mend(
    own_dataset: Callable[..., Path], tmp_path: Path, pauses: list[float]
) -> None:
    dataset, cache = open_dataset(own_dataset(images=4, unit_rows=4)), CachePlace(folder=tmp_path / "cache")
    for path in (
        dataset.meta_path(0),
        dataset.shard_path(0),
    ):  # once the rows are cached, no metadata is read
        Path(path).rename(f"{path}.away")
        with pytest.raises(UserError, match=f"{path} is missing from the dataset: run `ingest verify"):
            Reader(dataset, cache).read(0, 0)
        Path(f"{path}.away").rename(path)
        Reader(dataset, cache).read(0, 0)
    assert pauses == []


def test_opening_a_unit_is_repeated_too(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    dataset = open_dataset(small_dataset)
    expected = Reader(dataset).key(0, 0)
    errors = [OSError(errno.EIO, "sick disk"), OSError(errno.ESTALE, "stale handle")]
    whole = Dataset.unit_rows

    def sometimes(self: Dataset, unit_index: int) -> object:
        if errors:
            raise errors.pop()
        return whole(self, unit_index)

    monkeypatch.setattr(Dataset, "unit_rows", sometimes)
    assert Reader(dataset, CachePlace(folder=tmp_path)).key(0, 0) == expected
    assert pauses == [0.1, 0.2]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_few_shards_stay_open_and_none_of_units_that_are_done_with(
    small_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.resource, "getrlimit", lambda _: (6, 6))
    dataset = open_dataset(small_dataset)
    reader = Reader(dataset)
    before = open_files()
    for unit_index in [0, 1, 2, 3, 4, 5, 6, 0, 3]:
        reader.read(unit_index, 0)
        assert open_files() <= before + 3
    reader.keep([0, 5])
    assert open_files() == before + 1
    reader.close()
    assert open_files() == before
