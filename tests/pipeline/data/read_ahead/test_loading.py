"""L1 from an object store: the same batches as from a folder, whatever happens to what is read ahead."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing import Pipe
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from cluster.errors import UserError
from ingest.dataset.open import open_dataset
from pipeline.data.batch import Batch
from pipeline.data.evaluation import Preprocessing, image_batches
from pipeline.data.loader import Loader
from pipeline.data.node_cache import CachePlace, private_name
from pipeline.data.read_ahead import __main__ as main_module
from pipeline.data.read_ahead import cache as cache_module
from pipeline.data.read_ahead import packs as packs_module
from pipeline.data.read_ahead.cache import make_place, place_of, raise_failure, tell_failure
from pipeline.data.read_ahead.client import Node
from pipeline.data.read_ahead.pack import pack_name, write_pack
from pipeline.data.read_ahead.packs import PackedReader, Packs
from pipeline.data.reader import Reader
from pipeline.data.shared_memory import Buffers
from pipeline.data.workers import _Numbered, _Refusal
from pipeline.recipe.data import Data

CROPS = [{"count": 2, "size": 8, "scale": [0.3, 1.0]}]
AsObjects = Callable[..., str]


def make_loader(root: str | Path, **changes: Any) -> Loader:
    sizes = {"rank": 0, "world_size": 1, "workers": 0} | changes
    data = Data.model_validate({"root": str(root), "batch_size": 12, "window": 8, "crops": CROPS})
    return Loader(data, seed=3, device=torch.device("cpu"), positions=True, **sizes)


def assert_same(ours: Batch, theirs: Batch) -> None:
    assert torch.equal(ours.keys, theirs.keys)
    assert ours.positions is not None and theirs.positions is not None
    assert torch.equal(ours.positions, theirs.positions)
    for name in theirs.views:
        assert torch.equal(ours.views[name], theirs.views[name])
        assert torch.equal(ours.parameters[name], theirs.parameters[name])


def expected(root: Path, step: int, count: int, **changes: Any) -> list[Batch]:
    return [batch for _, batch in islice(make_loader(root, **changes).from_step(step), count)]


def children() -> list[psutil.Process]:
    """Processes of this one that read ahead."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "pipeline.data.read_ahead" in child.cmdline()
    ]


@pytest.fixture
def cache(tmp_path: Path) -> CachePlace:
    return CachePlace(folder=tmp_path, limit=64 << 20)


def rooms(cache: CachePlace) -> list[Path]:
    """What is left of read-aheads."""
    return [path for path in place_of(cache, "any").parent.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_L1_from_an_object_store_as_from_a_folder(
    small_dataset: Path, as_objects: AsObjects, cache: CachePlace
) -> None:
    """Over the ends of epochs, from two steps, with reads refused, cut off and answered 500."""
    url = as_objects(small_dataset, fault_share=0.1)
    for workers, first in [(0, 0), (2, 5)]:
        batches = make_loader(url, workers=workers, cache=cache).from_step(first)
        for theirs in expected(small_dataset, first, 8):
            assert_same(next(batches)[1], theirs)
        assert len(children()) == 1
        batches.close()  # type: ignore[attr-defined]
        assert children() == rooms(cache) == []


@pytest.mark.slow
def test_L1_two_ranks_of_a_node_share_one_process(
    small_dataset: Path, as_objects: AsObjects, cache: CachePlace
) -> None:
    """Ranks 1 and 2 of four; what one of them takes late is still there. Another use is another folder."""
    url = as_objects(small_dataset)
    loaders = [
        make_loader(url, rank=1 + number, world_size=4, cache=cache, node=Node("n", (1, 2), number))
        for number in range(2)
    ]
    theirs = [expected(small_dataset, 1, 6, rank=rank, world_size=4) for rank in (1, 2)]
    for _ in range(2):
        first, second = (loader.from_step(1) for loader in loaders)
        for number in range(6):
            assert_same(next(first)[1], theirs[0][number])
            if number == 2:
                for late in range(3):
                    assert_same(next(second)[1], theirs[1][late])
        assert len(children()) == 1
        for number in range(3, 6):
            assert_same(next(second)[1], theirs[1][number])
        second.close()  # type: ignore[attr-defined]
        first.close()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_bytes_that_are_wrong_in_the_cache_are_read_past_it(
    small_dataset: Path, as_objects: AsObjects, cache: CachePlace, caplog: pytest.LogCaptureFixture
) -> None:
    batches = make_loader(as_objects(small_dataset), cache=cache).from_step(0)
    theirs = expected(small_dataset, 0, 4)
    assert_same(next(batches)[1], theirs[0])
    (place,) = rooms(cache)
    for step in (1, 2):
        while not (pack := place / pack_name(step, 0)).exists():
            time.sleep(0.01)
        data = bytearray(pack.read_bytes())
        data[-20 if step == 1 else 60] ^= 1  # of a sample, of the table
        (place / "wrong").write_bytes(data)
        (place / "wrong").rename(pack)
    for step in (1, 2, 3):
        assert_same(next(batches)[1], theirs[step])
    assert "takes its place" not in caplog.text
    assert "read ahead for step 2 is damaged" in caplog.text


def test_a_sample_that_is_wrong_in_the_store_is_substituted_alike(
    own_dataset: Callable[..., Path], as_objects: AsObjects, cache: CachePlace
) -> None:
    root = own_dataset(images=45, unit_rows=7)
    dataset = open_dataset(root)
    offset = int(dataset.unit_rows(2)["offset"][3])
    with Path(dataset.shard_path(2)).open("r+b") as tar:
        tar.seek(offset + 30)
        tar.write(b"wrong")
    theirs = expected(root, 0, 4)
    batches = make_loader(as_objects(root), cache=cache).from_step(0)
    for each in theirs:
        assert_same(next(batches)[1], each)


@pytest.mark.parametrize("workers", [0, 1])
def test_whoever_waits_says_that_the_process_was_killed(
    small_dataset: Path, as_objects: AsObjects, cache: CachePlace, workers: int
) -> None:
    batches = make_loader(as_objects(small_dataset), workers=workers, cache=cache).from_step(0)
    next(batches)
    (process,) = children()
    process.kill()
    with pytest.raises(UserError, match="the process that reads ahead on this node was killed") as caught:
        for _ in range(200):  # what was read before is still good
            next(batches)
    assert "Traceback" not in str(caught.value)


def test_a_missing_tar_is_the_users_to_mend(
    own_dataset: Callable[..., Path],
    as_objects: AsObjects,
    cache: CachePlace,
    capfd: pytest.CaptureFixture[str],
) -> None:
    root = own_dataset(images=45, unit_rows=7)
    Path(open_dataset(root).shard_path(3)).unlink()
    url = as_objects(root)
    with pytest.raises(UserError, match=r"tar is missing from the dataset: run `ingest verify s3://"):
        list(islice(make_loader(url, cache=cache).from_step(0), 6))
    log = capfd.readouterr().err
    assert "is missing from the dataset" in log and "Traceback" not in log


def test_what_may_not_be_read_is_the_users_to_mend(cache: CachePlace) -> None:
    """Told by the process that reads ahead, or by a worker that reads for itself."""
    denied = PermissionError(errno.EACCES, "get is not permitted (AccessDenied)", "s3://some/tar")
    sentence = r"^cannot read or write s3://some/tar: get is not permitted \(AccessDenied\); mend that, "
    place, _, alive = make_place(cache, "denied", ranks=1, first=0)
    tell_failure(place, denied)
    os.close(alive)
    with pytest.raises(UserError, match=sentence):
        raise_failure(place)

    def make(number: int) -> int:
        raise denied

    refusal = _Numbered(make, Buffers(count=1, size=1))[0, None]
    assert isinstance(refusal, _Refusal) and re.match(sentence, refusal.sentence)


@pytest.mark.slow
def test_evaluations_and_resident_images_are_read_ahead_too(
    own_dataset: Callable[..., Path], as_objects: AsObjects, cache: CachePlace, slow_object_server: Any
) -> None:
    root = own_dataset(images=45, unit_rows=20, size=(14, 14))
    url = as_objects(root)
    view = Preprocessing(image_size=8, resize=8, mean=(0, 0, 0), std=(1, 1, 1))
    positions = np.random.default_rng(0).permutation(45)

    def images(path: str | Path) -> Iterator[Any]:
        return image_batches(
            open_dataset(path), positions, preprocessing=view, workers=0, batch_size=10, cache=cache
        )

    for ours, theirs in zip(images(url), images(root), strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.keys, theirs.keys)
    assert children() == rooms(cache) == []
    theirs = expected(root, 0, 3)
    batches = make_loader(url, resident=True, cache=cache).from_step(0)
    for each in theirs:
        assert_same(next(batches)[1], each)
    assert slow_object_server.counts(os.environ["AWS_ENDPOINT_URL"])["requests"] < 2 * 45


RANK = """
import sys, time
import torch
from pathlib import Path
from pipeline.data.loader import Loader
from pipeline.data.node_cache import CachePlace, private_name
from pipeline.recipe.data import Data
crops = [{"count": 1, "size": 8, "scale": [0.3, 1.0]}]
data = Data.model_validate({"root": sys.argv[1], "batch_size": 12, "crops": crops})
cache = CachePlace(folder=Path(sys.argv[2]))
loader = Loader(data, seed=0, rank=0, world_size=1, workers=0, device=torch.device("cpu"), cache=cache)
batches = loader.from_step(0)
next(batches)
print("begun", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_nothing_outlives_a_killed_rank(
    small_dataset: Path, as_objects: AsObjects, cache: CachePlace
) -> None:
    command = [sys.executable, "-c", RANK, as_objects(small_dataset), str(cache.folder)]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    assert rank.stdout.readline() == "begun\n"
    (process,) = psutil.Process(rank.pid).children()
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)  # the trainer's to handle
    time.sleep(0.1)
    assert process.is_running() and len(rooms(cache)) == 1
    rank.kill()
    rank.wait()
    psutil.wait_procs([process], timeout=10)
    assert not process.is_running()
    assert rooms(cache) == []


def test_what_a_killed_process_left_is_removed_by_the_next(cache: CachePlace) -> None:
    left, _, alive = make_place(cache, "left", ranks=1, first=0)
    living, _, _alive = make_place(cache, "living", ranks=1, first=0)
    assert left.is_dir()
    os.close(alive)
    made, _, _ = make_place(cache, "made", ranks=1, first=0)
    assert sorted(rooms(cache)) == sorted([living, made])


def test_starts_on_one_node_share_what_is_free(cache: CachePlace) -> None:
    boundless = CachePlace(folder=cache.folder, limit=1 << 60)
    place, first, _alive = make_place(boundless, "first", ranks=1, first=0)
    _, second, alive = make_place(boundless, "second", ranks=1, first=0)
    assert second < 0.6 * first  # half of what the first leaves, though it has written nothing yet
    os.close(alive)
    free = os.statvfs(place)
    (place / "chunks").write_bytes(bytes(1 << 20))
    (place / "alive").write_text(str(1 << 20))
    _, third, _other = make_place(boundless, "third", ranks=1, first=0)
    assert third == pytest.approx(0.5 * free.f_bavail * free.f_frsize, rel=0.1)  # the first has all it may


def test_a_folder_that_is_written_to_meanwhile_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    late = ["a pack"]

    def remove(path: Path, *, ignore_errors: bool) -> None:
        rmtree(path, ignore_errors=ignore_errors)
        if late:
            path.mkdir()
            (path / late.pop()).touch()

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(main_module.shutil, "rmtree", remove)
    monkeypatch.setattr(main_module.os, "_exit", leave)
    from_rank, rank = Pipe(duplex=False)
    rank.close()
    ended = threading.Event()
    with pytest.raises(SystemExit):
        main_module._end_with_rank(from_rank, place, ended)
    assert ended.is_set() and not place.exists()


def test_a_folder_that_others_may_write_to_is_refused(cache: CachePlace) -> None:
    room = make_place(cache, "one", ranks=1, first=0)[0].parent
    room.chmod(0o777)
    with pytest.raises(UserError, match="others may write to it"):
        make_place(cache, "other", ranks=1, first=0)
    assert place_of(cache, "x").parent == room


def test_a_name_that_somebody_has_taken_in_memory_is_left_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    monkeypatch.setattr(cache_module, "MEMORY", memory)
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    assert make_place(CachePlace(), "one", ranks=1, first=0)[0].is_relative_to(memory)
    shutil.rmtree(memory)
    memory.mkdir()
    private_name(memory).symlink_to(disk)
    assert make_place(CachePlace(), "two", ranks=1, first=0)[0].is_relative_to(disk)


def test_a_first_rank_that_does_not_begin_is_not_waited_for_for_ever(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs_module, "_PATIENCE_SECONDS", 0.3)
    with pytest.raises(UserError, match="the first rank of this node has not begun to read ahead"):
        Packs(tmp_path / "nothing", 1).wait(0)


def test_samples_that_are_in_no_pack_are_read_from_the_dataset(small_dataset: Path, tmp_path: Path) -> None:
    dataset = open_dataset(small_dataset)
    reader, rows = Reader(dataset), dataset.unit_rows(1)
    data = [reader.read(1, row) for row in (2, 3)]
    write_pack(tmp_path / pack_name(5, 0), rows["slot"][2:4], rows["sha256"][2:4], [data[0], b"wrong"])
    packed = PackedReader(dataset, Reader(dataset), Packs(tmp_path, 0))
    packed.begin(5, [(1, 2), (1, 3)])
    for place in [(1, 2), (1, 3), (4, 0)]:
        assert packed.read(*place) == reader.read(*place)
        assert packed.key(*place) == reader.key(*place)
    packed.begin(6, [])  # behind the last batch there is no pack to wait for
    assert packed.name(1, 2) == reader.name(1, 2)
