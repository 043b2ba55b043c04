"""What readers know of units: parsed once, shared by a node, sound or made anew, and never for ever."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import DrawFn, composite, integers, lists, sampled_from

from cluster.errors import UserError
from ingest.dataset.open import ROW, Dataset, open_dataset
from ingest.dataset.view import write_view
from pipeline.data import node_cache, unit_index
from pipeline.data.modality import modality_of
from pipeline.data.node_cache import CachePlace, NodeCache
from pipeline.data.order import Order, plan_order, rank_rows
from pipeline.data.rank_batches import RankBatches
from pipeline.data.unit_index import UnitIndex
from pipeline.recipe.data import Data


class Counted(Dataset):
    """Units of given sizes, of which nothing is on disk; `parsed` has those whose metadata was read."""

    parsed: list[int]

    def unit_rows(self, unit_index: int) -> Any:
        self.parsed.append(unit_index)
        return np.zeros(int(self.counts[unit_index]), ROW)


def counted(counts: list[int]) -> Counted:
    files: Any = SimpleNamespace(meta_sha256=lambda unit_index: bytes([unit_index]) * 32)
    sizes = np.array(counts, np.int64)
    units = np.arange(len(counts), dtype=np.uint32)
    none: Any = None
    dataset = Counted(path="", store=none, root="", view=None, units=units, counts=sizes, files=files)
    object.__setattr__(dataset, "parsed", [])
    return dataset


@composite
def reads(draw: DrawFn) -> tuple[list[int], Order, slice]:
    """Units, an order and a rank's rows, with windows and batches about the sizes of units and lanes."""
    unit = draw(integers(1, 40))
    counts = draw(
        lists(sampled_from([unit, unit, max(unit // 2, 1), 1]), min_size=1, max_size=9)  # as through a view
    )
    samples = sum(counts)
    near = draw(sampled_from([unit, 2 * unit, samples // 4, samples // 2, samples])) + draw(integers(-1, 1))
    batch_size = draw(sampled_from([3, 4, 8, 12, 16, unit, samples]))
    batch_size = max(1, min(batch_size, samples))
    order = plan_order(
        samples=samples, batch_size=batch_size, window=max(near, 1), seed=draw(integers(0, 99))
    )
    world = max(size for size in range(1, 5) if batch_size % size == 0)
    return counts, order, rank_rows(batch_size, rank=draw(integers(0, world - 1)), world_size=world)


MODALITY = modality_of(Data(root="none", batch_size=1, crops=[{"count": 1, "size": 2, "scale": [1, 1]}]))


class Worker:
    """Makes every `of`-th batch of a rank, of samples that nobody reads; knows what that parsed."""

    def __init__(self, dataset: Counted, order: Order, rows: slice, cache: Path) -> None:
        self._dataset, self._make = (
            dataset,
            RankBatches(dataset, MODALITY, order, rows, cache=CachePlace(folder=cache)),
        )

    def step(self, step: int) -> tuple[set[int], list[int]]:
        """The units that the batch has rows of, and those that were parsed meanwhile."""
        before = len(self._dataset.parsed)
        self._make.fill(step, {}, lambda place, draws, out: None)
        return {unit for unit, _ in self._make.places(step)}, self._dataset.parsed[before:]


def window_of(order: Order, row: int) -> int:
    """As the order is defined: the remainder of a lane joins its last window."""
    return min(row // order.window, max(order.lane_length // order.window, 1) - 1)


EXAMPLES = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@EXAMPLES
@given(read=reads(), workers=integers(1, 3))
def test_metadata_is_read_once_per_unit_window_and_worker(
    tmp_path: Path, read: tuple[list[int], Order, slice], workers: int
) -> None:
    counts, order, rows = read
    (tmp_path / "no folder").touch()
    for number in range(workers):
        dataset = counted(counts)
        worker = Worker(dataset, order, rows, tmp_path / "no folder")
        needed: dict[int, set[tuple[int, int]]] = {}
        for step in range(number, 2 * order.steps_per_epoch, workers):
            epoch, of_epoch = divmod(step, order.steps_per_epoch)
            ends = of_epoch * order.lane_rows, (of_epoch + 1) * order.lane_rows - 1
            windows = {(epoch, window_of(order, row)) for row in ends}
            units, _ = worker.step(step)
            for unit in units:
                needed.setdefault(unit, set()).update(windows)
        times = {unit: dataset.parsed.count(unit) for unit in dataset.parsed}
        assert all(count <= len(needed[unit]) for unit, count in times.items())


@EXAMPLES
@given(read=reads())
def test_another_worker_reads_no_metadata_and_no_window_waits_for_it(
    tmp_path_factory: pytest.TempPathFactory, read: tuple[list[int], Order, slice]
) -> None:
    counts, order, rows = read
    cache = tmp_path_factory.mktemp("cache")
    dataset, at_first = counted(counts), window_of(order, order.lane_rows - 1)
    worker = Worker(dataset, order, rows, cache)
    for step in range(2 * order.steps_per_epoch):
        units, parsed = worker.step(step)
        if step >= order.steps_per_epoch or window_of(order, (step + 1) * order.lane_rows - 1) > at_first:
            assert not units.intersection(parsed)
    assert len(dataset.parsed) == len(set(dataset.parsed))
    another = counted(counts)
    worker = Worker(another, order, rows, cache)
    for step in range(2 * order.steps_per_epoch):
        worker.step(step)
    assert set(another.parsed) <= set(range(len(counts))) - set(dataset.parsed)  # of the epoch after these


def test_rows_are_shared_and_hold_no_descriptor(
    small_dataset: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    dataset, cache = open_dataset(small_dataset), CachePlace(folder=tmp_path)
    expected = [dataset.unit_rows(index) for index in range(7)]
    one = UnitIndex(dataset, cache)
    one.ensure(3)
    files = list(tmp_path.glob("*/units/*"))
    assert len(files) == 1
    for index in range(7):
        assert np.array_equal(one.rows(index), expected[index])
    monkeypatch.delattr(Dataset, "unit_rows")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    other = UnitIndex(dataset, cache)
    for index in range(7):
        assert np.array_equal(other.rows(index), expected[index])
        assert not other.rows(index).flags.writeable
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    other.keep([1, 5])
    assert [index in other for index in range(7)] == [index in (1, 5) for index in range(7)]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "another's"])
def test_a_damaged_file_is_made_anew(small_dataset: Path, tmp_path: Path, damage: str) -> None:
    dataset, cache = open_dataset(small_dataset), CachePlace(folder=tmp_path)
    UnitIndex(dataset, cache).ensure(0)
    (file,) = tmp_path.glob("*/units/*")
    whole = bytearray(file.read_bytes())
    data = {"flip": whole[:90] + bytes([whole[90] ^ 4]) + whole[91:], "cut": whole[:-1], "empty": b""}
    if damage == "another's":
        UnitIndex(dataset, cache).ensure(1)
        (other,) = set(tmp_path.glob("*/units/*")) - {file}
        data[damage] = other.read_bytes()
    file.write_bytes(data[damage])
    assert np.array_equal(UnitIndex(dataset, cache).rows(0), dataset.unit_rows(0))
    assert file.read_bytes() == whole


def test_a_view_has_rows_of_its_own(own_dataset: Callable[..., Path], tmp_path: Path) -> None:
    root = own_dataset(images=8, unit_rows=4)
    dataset, cache = open_dataset(root), CachePlace(folder=tmp_path / "cache")
    keeps = {0: np.array([1, 0, 1, 1], bool), 1: np.array([1, 1, 1, 1], bool)}
    write_view(root, "some", root=dataset.root, keeps=keeps)
    assert UnitIndex(dataset, cache).rows(0)["slot"].tolist() == [0, 1, 2, 3]
    assert UnitIndex(open_dataset(root, view="some"), cache).rows(0)["slot"].tolist() == [0, 2, 3]


def test_a_folder_that_cannot_be_written_is_one_warning(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = open_dataset(small_dataset)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").touch()
    UnitIndex(dataset, CachePlace(folder=tmp_path / "file")).rows(0)
    assert caplog.text.count("cannot share") == 1
    caplog.clear()
    monkeypatch.setattr(NodeCache, "write", full)
    monkeypatch.setattr(unit_index, "_MOST_PRIVATE", 2)
    index = UnitIndex(dataset, CachePlace(folder=tmp_path))
    for unit in (0, 1, 2):
        index.ensure(unit)
        assert np.array_equal(index.rows(unit), dataset.unit_rows(unit))
    assert caplog.text.count("cannot share") == 1
    assert [unit in index for unit in (0, 1, 2)] == [False, True, True]


def test_a_folder_that_has_become_read_only_is_still_read(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    dataset, cache = open_dataset(small_dataset), CachePlace(folder=tmp_path)
    UnitIndex(dataset, cache).ensure(2)
    expected = dataset.unit_rows(2)
    monkeypatch.setattr(node_cache.os, "utime", refused)
    monkeypatch.delattr(Dataset, "unit_rows")
    assert np.array_equal(UnitIndex(dataset, cache).rows(2), expected)


def test_a_folder_of_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    NodeCache(CachePlace(folder=tmp_path / "open"), "units")
    (private,) = (tmp_path / "open").iterdir()
    private.chmod(0o777)
    with pytest.raises(
        UserError, match=rf"{private} belongs to another user, or others may write to it: rem"
    ):
        NodeCache(CachePlace(folder=tmp_path / "open"), "units")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / private.name).symlink_to(tmp_path)
    with pytest.raises(UserError, match="belongs to another user"):
        NodeCache(CachePlace(folder=tmp_path / "linked"), "units")
    mine = os.geteuid()
    monkeypatch.setattr(node_cache.os, "geteuid", lambda: mine + 1)
    with pytest.raises(UserError, match=r"belongs to another user.*set TMPDIR to a folder of your own"):
        NodeCache(CachePlace(folder=tmp_path), "units")


def test_the_folder_keeps_within_its_bounds_what_was_used_last(tmp_path: Path) -> None:
    cache = NodeCache(CachePlace(folder=tmp_path, limit=100_000), "units")
    for number in range(300):
        cache.write(f"{number:03}", [bytes(600), bytes(400)])
        os.utime(cache.path(f"{number:03}"), (number, number))
        if number >= 5:
            os.utime(cache.path("005"), (number, number))
    there = sorted(path.name for path in cache.path("").iterdir())
    assert 90 <= len(there) <= 100
    assert there[0] == "005" and there[1:] == [f"{number:03}" for number in range(301 - len(there), 300)]


def test_no_more_than_half_of_what_is_free_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 30_000
    usage = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(node_cache, "shutil", usage)
    cache = NodeCache(CachePlace(folder=tmp_path, limit=100_000), "units")
    for number in range(60):
        cache.write(f"{number:03}", [bytes(1_000)])
        free -= 1_000 if number < 15 else 0
    assert len(list(cache.path("").iterdir())) <= 16


def test_what_a_kill_left_behind_goes(tmp_path: Path) -> None:
    cache = NodeCache(CachePlace(folder=tmp_path, limit=10_000), "units")
    for name, age in ((".old-1", 4_000), (".new-1", 10)):
        cache.path(name).write_bytes(bytes(9_000))
        then = cache.path(name).stat().st_mtime - age
        os.utime(cache.path(name), (then, then))
    cache.write("a", [bytes(5_000)])
    assert sorted(path.name for path in cache.path("").iterdir()) == [".new-1", "a"]
