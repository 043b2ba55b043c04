"""L1 and L2 on the pure order: over dataset sizes, shard sizes, world sizes and steps."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis.strategies import DrawFn, composite, integers, lists, sampled_from
from numpy.typing import NDArray

from cluster.errors import UserError
from pipeline.data.order import (
    Order,
    epoch_index,
    global_batch,
    locate,
    plan_order,
    rank_rows,
    share_of_step,
    smallest_window,
    units_of,
    windows_after,
    windows_at,
)


@composite
def orders(draw: DrawFn) -> tuple[Order, NDArray[np.int64]]:
    """An order and its shards' sizes: several shards, odd sizes, empty ones among them."""
    counts = np.array(draw(lists(integers(0, 150), min_size=1, max_size=9)), np.int64)
    assume(counts.sum() > 0)
    samples = int(counts.sum())
    batch_size = draw(integers(1, samples))
    window = draw(sampled_from([1, 2, 7, 30, 64, 131_072]))
    seed = draw(integers(0, 2**63))
    return plan_order(samples=samples, batch_size=batch_size, window=window, seed=seed), counts


def epoch_positions(order: Order, epoch: int) -> NDArray[np.int64]:
    return np.concatenate(
        [global_batch(order, epoch=epoch, step=step) for step in range(order.steps_per_epoch)]
    )


@pytest.mark.slow
@given(planned=orders(), epoch=integers(0, 5))
@settings(deadline=None)
def test_L2_an_epoch_visits_samples_once_and_leaves_fewer_than_B_plus_L(
    planned: tuple[Order, NDArray[np.int64]], epoch: int
) -> None:
    order, _ = planned
    visited = epoch_positions(order, epoch)
    assert visited.min() >= 0
    assert visited.max() < order.samples
    assert len(np.unique(visited)) == len(visited) == order.steps_per_epoch * order.batch_size
    assert order.samples - len(visited) < order.batch_size + order.lanes


@given(planned=orders(), world=integers(1, 16), step=integers(0, 10_000), epoch=integers(0, 3))
@settings(deadline=None)
def test_L1_ranks_together_take_the_global_batch(
    planned: tuple[Order, NDArray[np.int64]], world: int, step: int, epoch: int
) -> None:
    order, _ = planned
    step %= order.steps_per_epoch
    world = max(size for size in range(1, world + 1) if order.batch_size % size == 0)
    whole = global_batch(order, epoch=epoch, step=step)
    parts = [
        global_batch(
            order, epoch=epoch, step=step, rows=rank_rows(order.batch_size, rank=rank, world_size=world)
        )
        for rank in range(world)
    ]
    assert {len(part) for part in parts} == {order.batch_size // world}
    assert np.array_equal(np.concatenate(parts), whole)


@given(planned=orders(), epoch=integers(0, 3))
@settings(deadline=None)
def test_L2_places_are_a_bijection_of_positions(planned: tuple[Order, NDArray[np.int64]], epoch: int) -> None:
    order, counts = planned
    index = epoch_index(order, counts, epoch=epoch)
    units, rows = locate(index, np.arange(order.samples))
    assert np.all(rows >= 0)
    assert np.all(rows < counts[units])
    assert len({*zip(units.tolist(), rows.tolist(), strict=True)}) == order.samples


@given(planned=orders(), epoch=integers(0, 2), data=integers(0, 2**40))
@settings(deadline=None)
def test_substitutes_walk_through_their_whole_window_and_no_further(
    planned: tuple[Order, NDArray[np.int64]], epoch: int, data: int
) -> None:
    order, _ = planned
    step, row = data % order.steps_per_epoch, data // 7 % order.batch_size
    rows = slice(row, row + 1)
    most = min(smallest_window(order), 60)
    walk = [global_batch(order, epoch=epoch, step=step, rows=rows, ahead=n)[0] for n in range(most)]
    assert len(set(walk)) == most
    assert walk[0] == global_batch(order, epoch=epoch, step=step)[row]


@given(planned=orders(), world=integers(1, 6), step=integers(0, 10_000), epoch=integers(0, 2))
@settings(deadline=None)
def test_the_units_of_the_windows_in_use_are_those_that_hold_their_rows(
    planned: tuple[Order, NDArray[np.int64]], world: int, step: int, epoch: int
) -> None:
    order, counts = planned
    step %= order.steps_per_epoch
    world = max(size for size in range(1, world + 1) if order.batch_size % size == 0)
    index = epoch_index(order, counts, epoch=epoch)
    windows = windows_at(order, step)
    start = windows.start * order.window
    stop = order.lane_length if windows.stop == order.windows else windows.stop * order.window
    as_one_batch = replace(order, batch_size=order.lanes * order.lane_length)
    everything = global_batch(as_one_batch, epoch=epoch, step=0).reshape(order.lanes, -1)
    for rank in {0, world - 1}:
        rows = rank_rows(order.batch_size, rank=rank, world_size=world)
        here, _ = locate(index, global_batch(order, epoch=epoch, step=step, rows=rows))
        lanes = slice(rows.start // order.lane_rows, (rows.stop - 1) // order.lane_rows + 1)
        held, _ = locate(index, everything[lanes, start:stop].ravel())
        units = units_of(order, index, epoch=epoch, rows=rows, windows=windows)
        assert [unit for unit in units.tolist() if counts[unit]] == sorted({*held.tolist()})
        assert {*here.tolist()} <= {*units.tolist()}


@given(planned=orders(), count=integers(0, 40))
@settings(deadline=None)
def test_the_steps_of_a_window_together_prepare_all_of_the_next(
    planned: tuple[Order, NDArray[np.int64]], count: int
) -> None:
    order, _ = planned
    done: list[int] = []
    for step in range(order.steps_per_epoch):
        windows = windows_at(order, step)
        if step and windows.stop != windows_at(order, step - 1).stop:
            assert windows_after(order, 0, windows_at(order, step - 1)) == (0, windows)
            assert done == list(range(count))
            done = []
        done += range(count)[share_of_step(order, step, count)]
    assert windows_after(order, 0, windows) == (1, windows_at(order, 0))
    assert done == list(range(count))


def test_a_substitute_is_the_next_row_of_the_lane() -> None:
    order = plan_order(samples=64, batch_size=4, window=16, seed=5)
    lane = np.concatenate(
        [global_batch(order, epoch=0, step=step, rows=slice(0, 1)) for step in range(order.steps_per_epoch)]
    )
    assert order.lanes == 4
    ahead = [global_batch(order, epoch=0, step=2, rows=slice(0, 1), ahead=n)[0] for n in range(16)]
    assert ahead == [*lane[2:], *lane[:2]]


def test_windows_keep_a_lane_local() -> None:
    """Rows of one window of one lane come from W neighbouring places of the axis: few shards at a time."""
    order = plan_order(samples=8_192, batch_size=8, window=256, seed=1)
    assert order.lanes == 8
    for first in range(0, order.steps_per_epoch, 256):
        steps = range(first, first + 256)
        places = np.array([global_batch(order, epoch=3, step=step, rows=slice(2, 3))[0] for step in steps])
        distance = (places - places[0] + order.samples // 2) % order.samples
        assert distance.max() - distance.min() == 255


def test_epochs_and_seeds_differ_and_drop_other_samples() -> None:
    order = plan_order(samples=1_003, batch_size=64, window=100, seed=1)
    first, second = (set(epoch_positions(order, epoch).tolist()) for epoch in (0, 1))
    everything = set(range(1_003))
    assert everything - first != everything - second
    other = plan_order(samples=1_003, batch_size=64, window=100, seed=2)
    batches = [global_batch(order, epoch=epoch, step=0) for epoch in (0, 1)]
    batches.append(global_batch(other, epoch=0, step=0))
    assert len({batch.tobytes() for batch in batches}) == 3
    counts = np.full(59, 17)
    shards = [epoch_index(order, counts, epoch=epoch).shards.tolist() for epoch in (0, 1)]
    assert shards[0] != shards[1]


def test_over_many_epochs_every_sample_is_left_out_about_equally_often() -> None:
    """100 samples in batches of 30 leave 10 out: over 400 epochs each 40 times, ± 6 (one sigma)."""
    order = plan_order(samples=100, batch_size=30, window=1_000, seed=3)
    counts = np.full(10, 10)
    seen = np.zeros(100)
    for epoch in range(400):
        units, rows = locate(epoch_index(order, counts, epoch=epoch), epoch_positions(order, epoch))
        seen[units * 10 + rows] += 1
    assert np.abs(400 - seen - 40).max() < 30


@pytest.mark.parametrize(
    ("samples", "batch_size", "window", "lanes"),
    [
        (10**9, 4096, 131_072, 1024),
        (10**9, 8704, 131_072, 512),
        (50_000, 256, 131_072, 1),
        (1_281_167, 4096, 131_072, 8),
        (1_281_167, 4095, 131_072, 1),
        (600, 96, 100, 4),
    ],
)
def test_lanes_are_the_largest_power_of_two_that_fits(
    samples: int, batch_size: int, window: int, lanes: int
) -> None:
    order = plan_order(samples=samples, batch_size=batch_size, window=window, seed=0)
    assert (order.lanes, order.window) == (lanes, window)


def test_a_dataset_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size is 64 but the dataset has 63 samples"):
        plan_order(samples=63, batch_size=64, window=8, seed=0)


def test_a_world_size_that_does_not_divide_is_refused_with_those_near() -> None:
    with pytest.raises(UserError, match=r"7 ranks cannot share data.batch_size 96 .*: use .* 3, 4, 6, 8,"):
        rank_rows(96, rank=0, world_size=7)
    assert rank_rows(96, rank=2, world_size=3) == slice(64, 96)
