"""A sample that ends its worker ends no training: another takes its place, as of one that is damaged."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ingest.dataset.open import open_dataset
from pipeline.data import in_hand as module
from pipeline.data import workers as workers_module
from pipeline.data.batch import Batch
from pipeline.data.image.views import ImageViews
from pipeline.data.in_hand import InHand
from pipeline.data.order import plan_order, rank_rows
from pipeline.data.rank_batches import RankBatches
from pipeline.data.reader import BadSampleError
from pipeline.data.workers import numbered
from pipeline.recipe.data import Data
from tests.pipeline.data.test_loader import CROPS, assert_same, damage


class Hostile(ImageViews):
    """Views of which some samples' decoder crashes, or asks for more memory than a machine has."""

    def __init__(self, data: Data, crashing: str = "", greedy: str = "") -> None:
        super().__init__(data)
        self.crashing, self.greedy = crashing, greedy

    def cut(self, data: bytes, draws: NDArray[np.float64], out: Mapping[str, NDArray[Any]]) -> None:
        digest = hashlib.sha256(data).hexdigest()
        if digest == self.crashing:
            os.kill(os.getpid(), signal.SIGSEGV)
        if digest == self.greedy:
            try:
                np.empty(1 << 35, np.uint8)  # touched by nobody
            except MemoryError as error:
                raise BadSampleError("memory_limit") from error
        super().cut(data, draws, out)


def batches_of(root: Path, **hostile: str) -> RankBatches:
    data = Data.model_validate({"root": str(root), "batch_size": 12, "window": 8, "crops": CROPS})
    dataset = open_dataset(root)
    order = plan_order(samples=len(dataset), batch_size=12, window=8, seed=3)
    return RankBatches(dataset, Hostile(data, **hostile), order, rank_rows(12, rank=0, world_size=1))


def made(make: RankBatches, workers: int, count: int) -> list[Batch]:
    values: Iterator[Batch] = numbered(
        make, 0, workers=workers, pin_memory=False, shared_bytes=make.view_bytes
    )
    return list(islice(values, count))


@pytest.mark.slow
def test_L1_a_sample_that_kills_its_worker_is_replaced_like_a_damaged_one(
    own_dataset: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = own_dataset(images=45, unit_rows=7)
    clean = made(batches_of(root), 0, 4)
    crashing, greedy = int(clean[1].keys[5]), int(clean[2].keys[7])
    dataset = open_dataset(root)
    digests = {}
    for unit in range(len(dataset.units)):
        for key, row in zip(dataset.unit_keys(unit).tolist(), dataset.unit_rows(unit), strict=True):
            data = dataset.read_shard(unit, int(row["offset"]), int(row["size"]))
            digests[key] = hashlib.sha256(data).hexdigest()
    hostile = batches_of(root, crashing=digests[crashing], greedy=digests[greedy])
    with caplog.at_level(logging.WARNING):
        got = made(hostile, 2, 4)
    assert caplog.text.count("its batch is made again") == 1
    damage(root, [crashing, greedy])
    for ours, theirs in zip(got, made(batches_of(root), 0, 4), strict=True):
        assert_same(ours, theirs)


class Dying:
    """Ends its process, and holds no sample."""

    def noting(self, in_hand: InHand) -> Self:
        return self

    def __call__(self, number: int) -> Any:
        os._exit(3)


@pytest.mark.slow
def test_workers_that_die_of_no_sample_end_the_training() -> None:
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        next(numbered(Dying(), 0, workers=1, pin_memory=False, shared_bytes=1))


def test_what_a_worker_has_in_hand_is_known_after_its_death(monkeypatch: pytest.MonkeyPatch) -> None:
    in_hand = InHand(3, frozenset({(9, 9)}))
    monkeypatch.setattr(module, "get_worker_info", lambda: SimpleNamespace(id=1))
    with in_hand.holding((2, 5)):
        assert in_hand.left_by(os.getpid()) == (2, 5)
        assert in_hand._notes.tolist() == [[-1] * 3, [os.getpid(), 2, 5], [-1] * 3]
        assert in_hand.left_by(os.getpid() + 1) is None
    assert in_hand.left_by(os.getpid()) is None
    with pytest.raises(ZeroDivisionError), in_hand.holding((0, 0)):
        raise ZeroDivisionError
    assert in_hand.left_by(os.getpid()) is None
    with pytest.raises(BadSampleError, match="dies"), in_hand.holding((9, 9)):
        pytest.fail("was decoded")


def test_nothing_is_noted_where_no_worker_is() -> None:
    with InHand(0).holding((1, 2)):
        assert torch.utils.data.get_worker_info() is None


class Numbers:
    """Makes each number's value, unless what it holds is deadly and not known to be."""

    def __init__(self, codes: dict[int, int], in_hand: InHand | None = None) -> None:
        self.codes, self.in_hand = codes, in_hand or InHand(0)

    def noting(self, in_hand: InHand) -> Self:
        return type(self)(self.codes, in_hand)

    def __call__(self, number: int) -> Any:
        return number


def by_a_worker(make: Numbers, first: int, **_: Any) -> Iterator[Any]:
    for number in itertools.count(first):
        if number in make.codes and (number, 0) not in make.in_hand.deadly:
            make.in_hand._notes[0] = torch.tensor([77, number, 0])
            raise workers_module._WorkersDiedError(RuntimeError("exited"), {77: make.codes[number]})
        yield number


@pytest.mark.parametrize(("code", "deaths"), [(-signal.SIGSEGV, 1), (-signal.SIGKILL, 2), (1, 2)])
def test_a_crash_is_the_samples_and_a_kill_only_the_second_time(
    code: int, deaths: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers_module, "_by_workers", by_a_worker)
    values = numbered(Numbers({2: code, 5: code}), 0, workers=1, pin_memory=False, shared_bytes=1)
    assert list(islice(values, 8)) == list(range(8))
    assert caplog.text.count("made again") == 2 * deaths


def test_workers_that_die_again_and_again_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(make: Numbers, first: int, **_: Any) -> Iterator[Any]:
        make.in_hand._notes[0] = torch.tensor([77, next(places), 0])
        raise workers_module._WorkersDiedError(RuntimeError("exited"), {77: -signal.SIGKILL})
        yield

    places = itertools.count()
    monkeypatch.setattr(workers_module, "_by_workers", never)
    with pytest.raises(RuntimeError, match="exited"):
        next(numbered(Numbers({}), 0, workers=1, pin_memory=False, shared_bytes=1))
    assert next(places) == 11
