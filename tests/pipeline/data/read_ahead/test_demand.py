"""What a node reads, as arithmetic: the ranks' own places, and windows that hold them, each row once."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis.strategies import composite, integers, lists, sampled_from

from pipeline.data import order as orders
from pipeline.data.copies import Copies
from pipeline.data.read_ahead.demand import Listed, Training, whole_lanes
from pipeline.data.read_ahead.ranges import coalesce


@composite
def nodes(draw, most_copies=1):
    """(demand, order, counts) of a node with some neighbouring ranks of a run; and of each unit the sample
    that each of its rows is, of which some have several.
    """
    sizes = draw(lists(integers(1, 30), min_size=1, max_size=12))
    rng = np.random.default_rng(draw(integers(0, 9)))
    often = [rng.integers(1, most_copies + 1, size) for size in sizes]
    shown = [np.repeat(np.arange(len(of_unit)), of_unit) for of_unit in often]
    counts = np.array([len(rows) for rows in shown], np.int64)
    samples = int(counts.sum())
    batch = draw(integers(1, samples))
    order = orders.plan_order(samples=samples, batch_size=batch, window=draw(integers(1, 40)), seed=3)
    world = draw(sampled_from([size for size in range(1, batch + 1) if batch % size == 0]))
    first = draw(integers(0, world - 1))
    ranks = range(first, draw(integers(first, world - 1)) + 1)
    rows = tuple(orders.rank_rows(batch, rank=rank, world_size=world) for rank in ranks)
    copies = Copies(counts, often.__getitem__) if most_copies > 1 else None
    return Training(order, counts, rows, copies), order, counts, shown


def positions(counts, units, rows):
    return (np.cumsum(counts) - counts)[units] + rows


@settings(max_examples=60, deadline=None)
@given(node=nodes() | nodes(most_copies=5), step=integers(0, 60))
def test_every_row_of_a_step_is_in_a_window_that_is_live_then(node, step):
    demand, order, counts, shown = node
    for of_rank, rows in zip(demand.places(step), demand.rows, strict=True):
        epoch, of_epoch = divmod(step, order.steps_per_epoch)
        index = orders.epoch_index(order, counts, epoch=epoch)
        units, places = orders.locate(
            index, orders.global_batch(order, epoch=epoch, step=of_epoch, rows=rows)
        )
        samples = [shown[unit][row] for unit, row in zip(units.tolist(), places.tolist(), strict=True)]
        assert [part.tolist() for part in of_rank] == [units.tolist(), samples]
    live = demand.windows(step)
    if not demand.window_rows:
        assert not live
        return
    held = {
        (piece.unit, row)
        for window in live
        for piece in demand.pieces(window)
        for row in range(piece.first, piece.end)
    }
    read = {
        place
        for units, rows in demand.places(step)
        for place in zip(units.tolist(), rows.tolist(), strict=True)
    }
    assert read <= held


@settings(max_examples=40, deadline=None)
@given(node=nodes(), epoch=integers(0, 2))
def test_windows_of_an_epoch_follow_each_other_and_hold_each_row_once(node, epoch):
    demand, order, counts, _ = node
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    ranges = [demand.windows(step) for step in steps]
    assert all(
        one.start <= other.start and other.start <= one.stop for one, other in itertools.pairwise(ranges)
    )
    if epoch:
        assert not ranges[0] or ranges[0].start == demand.windows(steps.start - 1).stop
    rows = [
        place
        for window in range(ranges[0].start, ranges[-1].stop)
        for piece in demand.pieces(window)
        for place in positions(counts, piece.unit, np.arange(piece.first, piece.end)).tolist()
    ]
    assert len(set(rows)) == len(rows)
    sizes = [sum(p.end - p.first for p in demand.pieces(w)) for w in range(ranges[0].start, ranges[-1].stop)]
    assert not sizes or max(sizes) <= demand.window_rows


@given(rows=integers(1, 64), lanes=sampled_from([1, 2, 4, 8]), cut=integers(0, 64), end=integers(0, 64))
def test_only_a_node_that_takes_all_of_its_lanes_has_whole_ones(rows, lanes, cut, end):
    order = orders.Order(samples=10_000, batch_size=rows * lanes, lanes=lanes, window=10, seed=0)
    first, end = sorted((cut % order.batch_size, end % order.batch_size + 1))
    if first == end:
        return
    middle = (first + end) // 2
    parts = [slice(first, middle), slice(middle, end)] if first < middle else [slice(first, end)]
    taken = {number // rows for number in range(first, end)}
    whole = {lane for lane in taken if all(first <= n < end for n in range(lane * rows, (lane + 1) * rows))}
    assert set(whole_lanes(order, parts)) == (taken if taken == whole else set())
    assert (
        not whole_lanes(order, [slice(0, 1), slice(order.batch_size - 1, order.batch_size)])
        or order.batch_size <= 2
    )


@given(counts=lists(integers(1, 9), min_size=1, max_size=6), batch=integers(1, 7))
def test_a_list_is_read_in_its_own_order_to_its_end(counts, batch):
    counts = np.array(counts, np.int64)
    wanted = np.random.default_rng(0).permutation(int(counts.sum()))
    demand, read, step = Listed(counts, wanted, batch), [], 0
    while (places := demand.places(step)) is not None:
        ((units, rows),) = places
        assert (rows < counts[units]).all()
        read += positions(counts, units, rows).tolist()
        step += 1
    assert read == wanted.tolist()
    assert len(demand.at(step)[0]) == 0


@given(
    sizes=lists(integers(1, 500), min_size=1, max_size=30),
    gaps=lists(integers(0, 300), min_size=30, max_size=30),
    most_bytes=integers(1, 2_000),
    most_gap=integers(0, 300),
)
def test_ranges_hold_every_row_once_within_their_bounds(sizes, gaps, most_bytes, most_gap):
    sizes = np.array(sizes, np.int64)
    offsets = np.cumsum(sizes + np.array(gaps[: len(sizes)])) - sizes
    shuffled = np.random.default_rng(0).permutation(len(sizes))
    found = list(
        coalesce(shuffled, offsets[shuffled], sizes[shuffled], most_bytes=most_bytes, most_gap=most_gap)
    )
    assert [row for each in found for row in each.rows.tolist()] == list(range(len(sizes)))
    for each in found:
        first, last = each.rows[0], each.rows[-1]
        assert (each.start, each.size) == (offsets[first], offsets[last] + sizes[last] - offsets[first])
        assert len(each.rows) == 1 or each.size <= most_bytes
        inside = each.rows[1:]
        assert all(offsets[row] - offsets[row - 1] - sizes[row - 1] <= most_gap for row in inside.tolist())
    for one, other in itertools.pairwise(found):  # none could have been joined
        gap = other.start - one.start - one.size
        together = offsets[other.rows[0]] + sizes[other.rows[0]] - one.start
        assert gap > most_gap or together > most_bytes
