"""Samples that an epoch has several times are each there as often as they are to be, each time as another."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis.strategies import integers, lists

from pipeline.data import copies as module
from pipeline.data.copies import Copies
from pipeline.data.order import epoch_index, global_batch, locate, plan_order
from pipeline.data.philox import uniforms

UNITS = lists(lists(integers(1, 6), min_size=1, max_size=20), min_size=1, max_size=8)


@given(often=UNITS, batch=integers(1, 30), window=integers(1, 40), epoch=integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_L2_an_epoch_has_every_copy_once(often: list[list[int]], batch: int, window: int, epoch: int) -> None:
    counts = np.array([sum(of_unit) for of_unit in often], np.int64)
    order = plan_order(
        samples=int(counts.sum()), batch_size=min(batch, int(counts.sum())), window=window, seed=5
    )
    index = epoch_index(order, counts, epoch=epoch)
    copies = Copies(counts, lambda unit: np.array(often[unit], np.uint32))
    seen: Counter[tuple[int, int, int]] = Counter()
    for step in range(order.steps_per_epoch):
        units, rows = locate(index, global_batch(order, epoch=epoch, step=step))
        samples, numbers = copies.samples(units, rows)
        seen.update(zip(units.tolist(), samples.tolist(), numbers.tolist(), strict=True))
    assert set(seen.values()) == {1}
    everything = {(u, s, n) for u, of in enumerate(often) for s, k in enumerate(of) for n in range(k)}
    assert seen.keys() <= everything
    assert len(everything) - len(seen) < order.batch_size + order.lanes


def test_units_are_read_once_while_they_are_kept() -> None:
    read: list[int] = []

    def of_unit(unit: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        read.append(unit)
        return np.array([2, 1], np.uint32)

    copies = Copies(np.array([3] * (module._KEPT + 1)), of_unit)
    for unit in [0, 1, 0, 1, *range(module._KEPT + 1), 0]:
        samples, numbers = copies.samples(np.full(3, unit), np.arange(3))
        assert (samples.tolist(), numbers.tolist()) == ([0, 0, 1], [0, 1, 0])
    assert read == [*range(module._KEPT + 1), 0]


def test_copies_are_drawn_for_apart_from_each_other_and_from_substitutes() -> None:
    keys, ahead, copies = np.meshgrid([7, 8], [0, 1, 999], [0, 1, 1000])
    draws = uniforms(
        seed=1, epoch=0, keys=keys.ravel(), ahead=ahead.ravel(), copies=copies.ravel(), views=2, draws=4
    )
    assert len(np.unique(draws)) == draws.size
    alone = uniforms(seed=1, epoch=0, keys=[7], ahead=[0], views=2, draws=4)
    assert (draws[0] == alone[0]).all()
