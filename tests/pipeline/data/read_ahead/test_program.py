"""What is read ahead: packs of what the ranks read, within bounds, from windows or one by one."""

import asyncio
import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import UserError
from ingest.dataset.open import Dataset, open_dataset
from pipeline.data.node_cache import CachePlace
from pipeline.data.order import plan_order, rank_rows
from pipeline.data.read_ahead import program as program_module
from pipeline.data.read_ahead import room as room_module
from pipeline.data.read_ahead import windows as windows_module
from pipeline.data.read_ahead.cache import HandedOver, make_place
from pipeline.data.read_ahead.demand import Listed, Training
from pipeline.data.read_ahead.pack import Pack, pack_name
from pipeline.data.read_ahead.program import Assignment, Program
from pipeline.data.read_ahead.requests import Requests
from pipeline.data.reader import Reader

CHUNK = 20_000
Counted = tuple[Assignment, list[tuple[int, int, int]]]


@pytest.fixture
def assigned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Assignment]:
    """assigned(dataset, demand, ranks=, first=, room=, depth=): chunks are of some KB."""
    for module in (program_module, windows_module, room_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK)

    def assign(
        dataset: Dataset, demand: Any, *, ranks: int = 1, first: int = 0, room: int = 1 << 20, depth: int = 4
    ) -> Assignment:
        cache = CachePlace(folder=tmp_path, limit=room)
        place, _, alive = make_place(cache, f"test-{ranks}-{first}-{room}", ranks=ranks, first=first)
        os.close(alive)
        return Assignment(dataset, demand, cache, first, depth, place, room)

    return assign


def training(dataset: Dataset, *, batch: int, window: int, world: int, ranks: range) -> Training:
    order = plan_order(samples=len(dataset), batch_size=batch, window=window, seed=3)
    rows = tuple(rank_rows(batch, rank=rank, world_size=world) for rank in ranks)
    return Training(order, dataset.counts, rows)


def bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # drafts come and go
            total += path.stat().st_size
    return total


def take(given: Assignment, ranks: int, steps: int) -> tuple[list[list[Pack]], int, int]:
    """Packs of some steps as ranks take them; requests that were sent, and the most bytes that there were."""

    async def ranks_and_program() -> tuple[list[list[Pack]], int, int]:
        program = Program(given)
        running = asyncio.create_task(program.run())
        handed_over, packs, most = HandedOver(given.place), [], 0
        for step in range(given.first, given.first + steps):
            of_step = []
            for number in range(ranks):
                path = given.place / pack_name(step, number)
                while not path.exists():
                    assert not running.done(), running.exception()
                    await asyncio.sleep(0.001)
                most = max(most, bytes_in(given.place))
                of_step.append(Pack(path.read_bytes()))
                handed_over[number] = step + 1
            packs.append(of_step)
        running.cancel()
        return packs, program.requests, most

    return asyncio.run(asyncio.wait_for(ranks_and_program(), 60))


def assert_packs_hold(dataset: Dataset, demand: Any, first: int, packs: list[list[Pack]]) -> None:
    reader = Reader(dataset)
    for step, of_step in enumerate(packs, first):
        for pack, (units, rows) in zip(of_step, demand.places(step), strict=True):
            for number, place in enumerate(zip(units.tolist(), rows.tolist(), strict=True)):
                assert pack.sample(number) == reader.read(*place)
                assert dataset.units[place[0]] * 100_000 + pack.slots[number] == reader.key(*place)


@pytest.mark.parametrize(
    ("batch", "window", "world", "ranks", "room", "whole"),
    [
        (12, 8, 1, range(1), 1 << 20, True),  # windows of four lanes
        (12, 8, 4, range(1, 3), 1 << 20, True),  # two lanes of the four
        (12, 100, 1, range(1), 1 << 20, True),
        (12, 100, 2, range(1), 1 << 20, False),  # half of a lane: the other half would be read in vain
        (12, 8, 1, range(1), 90_000, False),  # no room for windows
        (45, 3, 1, range(1), 1 << 20, True),  # a step of many windows
    ],
)
def test_L1_packs_hold_what_the_ranks_read(
    small_dataset: Path,
    assigned: Callable[..., Assignment],
    *,
    batch: int,
    window: int,
    world: int,
    ranks: range,
    room: int,
    whole: bool,
) -> None:
    """Over the end of two epochs, from step 2."""
    dataset = open_dataset(small_dataset)
    demand = training(dataset, batch=batch, window=window, world=world, ranks=ranks)
    given = assigned(dataset, demand, ranks=len(ranks), first=2, room=room)
    packs, requests, most = take(given, len(ranks), 7)
    assert_packs_hold(dataset, demand, 2, packs)
    chunks = given.place / "chunks"
    assert (chunks.exists() and chunks.stat().st_size > 0) == whole
    samples = sum(len(units) for step in range(2, 9) for units, _ in demand.places(step))
    assert requests < samples or not whole
    assert most <= room


def test_neighbours_of_a_list_are_read_together(
    small_dataset: Path, assigned: Callable[..., Assignment]
) -> None:
    dataset = open_dataset(small_dataset)
    demand = Listed(dataset.counts, np.arange(len(dataset)), 10)
    packs, requests, _ = take(assigned(dataset, demand), 1, 5)
    assert_packs_hold(dataset, demand, 0, packs)
    assert requests <= 20


def test_no_more_is_made_than_there_is_room_for_or_the_depth_allows(
    small_dataset: Path, assigned: Callable[..., Assignment]
) -> None:
    dataset = open_dataset(small_dataset)
    demand = training(dataset, batch=12, window=8, world=1, ranks=range(1))

    async def made_meanwhile(given: Assignment) -> list[int]:
        running, steps = asyncio.create_task(Program(given).run()), list[int]()
        while len(steps) < 3:
            await asyncio.sleep(0.2)
            steps = sorted(int(path.stem) for path in given.place.glob("*.0"))
        running.cancel()
        return steps

    assert asyncio.run(made_meanwhile(assigned(dataset, demand, depth=3))) == [0, 1, 2]
    given = assigned(dataset, demand, depth=30, room=90_000)
    steps = asyncio.run(made_meanwhile(given))
    assert 3 <= len(steps) < 30
    assert sum((given.place / pack_name(step, 0)).stat().st_size for step in steps) <= 90_000


def test_a_cache_that_cannot_hold_a_few_steps_is_refused(
    small_dataset: Path, assigned: Callable[..., Assignment]
) -> None:
    dataset = open_dataset(small_dataset)
    demand = training(dataset, batch=12, window=8, world=1, ranks=range(1))
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(Program(assigned(dataset, demand, room=20_000)).run())
    (error,) = caught.value.exceptions
    assert isinstance(error, UserError)
    assert "4 steps of this node read" in str(error) and "run.cache_gib" in str(error)


def test_a_full_disk_is_waited_for_and_then_told(
    small_dataset: Path, assigned: Callable[..., Assignment], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(small_dataset)
    demand = training(dataset, batch=12, window=8, world=1, ranks=range(1))
    left = [3]
    write = program_module.write_pack

    def full(*given: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*given)

    monkeypatch.setattr(program_module, "write_pack", full)
    sleep = asyncio.sleep
    monkeypatch.setattr(program_module.asyncio, "sleep", lambda _: sleep(0.001))
    given = assigned(dataset, demand)
    packs, _, _ = take(given, 1, 3)
    assert_packs_hold(dataset, demand, 0, packs)
    left[0] = 10_000
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(Program(assigned(dataset, demand, first=1)).run())
    error: BaseException = caught.value
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, UserError)
    assert "is on a disk that is full" in str(error)


def test_windows_that_find_the_disk_full_hold_up_no_step(
    small_dataset: Path, assigned: Callable[..., Assignment], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(windows_module, "_write", full)
    monkeypatch.setattr(windows_module, "_AGAIN_SECONDS", 600)
    dataset = open_dataset(small_dataset)
    demand = training(dataset, batch=12, window=8, world=1, ranks=range(1))
    packs, _, _ = take(assigned(dataset, demand), 1, 6)
    assert_packs_hold(dataset, demand, 0, packs)


def test_a_mistake_of_ours_in_a_window_is_told(
    small_dataset: Path, assigned: Callable[..., Assignment], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(windows_module, "_write", wrong)
    dataset = open_dataset(small_dataset)
    demand = training(dataset, batch=12, window=8, world=1, ranks=range(1))
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(asyncio.wait_for(Program(assigned(dataset, demand)).run(), 20))
    assert caught.group_contains(RuntimeError, match="ours")


@pytest.mark.slow
def test_a_late_answer_is_asked_for_again_and_holds_up_no_other() -> None:
    began: list[int] = []

    async def read(unit: int, starts: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        began.append(unit)
        if unit == 7 and began.count(7) < 3:
            await asyncio.sleep(600)
        return [bytes([unit]) for _ in starts]

    async def all_of_them() -> None:
        requests = Requests(read, in_flight=4)
        requests.usual = 0.01

        async def one(unit: int) -> bytes:
            async with requests.turn(1 + unit % 2):
                return b"".join(map(bytes, await requests.read(unit, [0], [1])))

        late = asyncio.create_task(one(7))
        others = await asyncio.wait_for(asyncio.gather(*map(one, range(40, 80))), 5)
        assert others == [bytes([unit]) for unit in range(40, 80)]
        assert not late.done()
        assert await asyncio.wait_for(late, 20) == b"\x07"

    asyncio.run(all_of_them())
    assert began.count(7) == 3


def test_an_error_that_stays_is_raised() -> None:
    async def read(unit: int, starts: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        raise PermissionError(errno.EACCES, "get is not permitted (AccessDenied)", "s3://some/tar")

    with pytest.raises(PermissionError, match="not permitted"):
        asyncio.run(Requests(read).read(0, [0], [1]))


def test_a_row_that_came_short_is_none_of_the_pack(
    own_dataset: Callable[..., Path], assigned: Callable[..., Assignment]
) -> None:
    root = own_dataset(images=12, unit_rows=12)
    dataset = open_dataset(root)
    rows = dataset.unit_rows(0)
    os.truncate(dataset.shard_path(0), int(rows["offset"][11]) + 5)
    demand = Listed(dataset.counts, np.arange(12), 12)
    ((pack,),), _, _ = take(assigned(dataset, demand), 1, 1)
    assert [pack.sample(number) is None for number in range(12)] == [False] * 11 + [True]
    data = pack.sample(3)
    assert data is not None
    assert hashlib.sha256(data).digest() == rows["sha256"][3].tobytes()
