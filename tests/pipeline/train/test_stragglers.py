"""Stragglers: which ranks are named, and when."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_training import make_dataset, make_values

from cluster.rank.preempt import PreemptionFlag
from cluster.rank.torch_dist import World
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.loop import train
from pipeline.train.setup import set_up
from pipeline.train.stragglers import Pace, Stragglers, slow_ranks


def pace(waiting: float, augmenting: float, on_cpu: float | None = None, *, step: float = 1.0) -> Pace:
    return Pace(host="node", step=step, waiting=waiting, augmenting=augmenting, on_cpu=on_cpu)


@pytest.mark.parametrize(
    ("paces", "slow"),
    [
        ([pace(0.0, 0.1)], []),
        ([pace(0.0, 0.1)] * 8, []),
        # The shared work takes 0.5 s; by itself rank 2 needs 1 s, the others 0.6 s.
        ([pace(0.0, 0.1), pace(0.0, 0.1), pace(0.4, 0.1), pace(0.0, 0.1)], [2]),
        ([pace(0.0, 0.1), pace(0.2, 0.1)], [1]),  # of two, the fast one is the measure
        # 1 s against 0.85: less than 1.2 times.
        ([pace(0.0, 0.1), pace(0.0, 0.1), pace(0.15, 0.1)], []),
        # Everyone waits for slow storage: nobody is to blame.
        ([pace(0.7, 0.1), pace(0.6, 0.1), pace(0.72, 0.1)], []),
        # A throttled device: 2 % of the step, which it slows by half.
        ([pace(0.0, 0.02), pace(0.0, 0.02), pace(0.0, 0.03)], [2]),
        # As many times slower, but half a millisecond.
        ([pace(0.0, 0.001), pace(0.0, 0.001), pace(0.0, 0.0015)], []),
        ([pace(0.0, 0.02), pace(0.0, 0.02), pace(0.0, 0.0235)], []),
        # Two ranks of five.
        ([pace(0.4, 0.0), pace(0.0, 0.0), pace(0.0, 0.0), pace(0.0, 0.0), pace(0.5, 0.0)], [0, 4]),
        # On CPUs: one computes for half a second more, beside one whose augmentation is disturbed.
        ([pace(0.0, 0.03, 0.3), pace(0.0, 0.02, 0.8)], [1]),
        ([pace(0.0, 0.03, 0.02, step=0.2), pace(0.0, 0.02, 0.1, step=0.2)], []),  # noise
        # Clocks are read at slightly different times: no negative shared work.
        ([pace(1.01, 0.0), pace(0.0, 0.0)], [0]),
    ],
)
def test_slow_ranks(paces: list[Pace], slow: list[int]) -> None:
    assert list(slow_ranks(paces)) == slow


def test_the_reason_has_the_figures() -> None:
    (reason,) = slow_ranks([pace(0.0, 0.1), pace(0.0, 0.1), pace(0.4, 0.1)]).values()
    assert reason == (
        "its own step takes 1 s, the median rank's 0.6 s; "
        "0.4 s it waits for data, 0.1 s it augments (median 0.1 s)"
    )


class TwoRanks(World):
    """As rank 0 sees them; what the other one says is `other`."""

    other = pace(0.0, 0.0)

    def gather(self, value: Any) -> list[Any]:
        return [value, TwoRanks.other]


@pytest.mark.parametrize("rank", [0, 1])
def test_named_after_three_intervals_in_a_row_then_ever_less_often(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    world = TwoRanks(rank=rank, size=2, local_rank=rank, device=torch.device("cpu"), group=None, control=None)
    stragglers = Stragglers(world, step=100)
    for interval in range(1, 29):
        late = 0.5 if interval != 3 else 0.0  # on time once: the count begins anew
        monkeypatch.setattr(TwoRanks, "other", pace(late, 0.0))
        stragglers.report(step=100 + 10 * interval, seconds=1.0, waiting=0.0)
    messages = [record.getMessage() for record in caplog.records]
    if rank == 1:
        assert messages == []
        return
    assert [message.partition(":")[0] for message in messages] == [
        "rank 1 on node is slow, for 3 log intervals in a row up to step 160",
        "rank 1 on node is slow, for 6 log intervals in a row up to step 190",
        "rank 1 on node is slow, for 12 log intervals in a row up to step 250",
        "rank 1 on node is slow, for 24 log intervals in a row up to step 370",
    ]


def compute(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.slow
def test_time_on_the_cpu_is_that_of_this_rank_alone() -> None:
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), group=None, control=None)
    stragglers = Stragglers(world, step=0)
    with stragglers.computing():
        time.sleep(1.0)  # as one does who waits for others
    assert stragglers._computed < 0.5
    with stragglers.computing():
        compute(0.1)
    assert stragglers._computed >= 0.1


def _train_slowly(
    group: dist.ProcessGroup, values: dict[str, Any], folder: Path, slow_rank: int | None
) -> list[str]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    cpu = torch.device("cpu")
    world = World(rank=rank, size=size, local_rank=rank, device=cpu, group=group, control=group)
    training = set_up(PretrainRecipe.model_validate(values), folder, world)
    if rank == slow_rank:
        training.method.register_forward_pre_hook(lambda *_: compute(0.3))
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pipeline.train.stragglers").addHandler(handler)
    train(training, PreemptionFlag(training.run))
    if training.metrics is not None:
        training.metrics.close()
    return messages


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_slow_rank_of_a_real_training_is_named_by_the_first(
    tmp_path: Path, run_on_ranks: Callable[..., list[Any]], strategy: str
) -> None:
    values = make_values(
        make_dataset(tmp_path),
        train__steps=6,
        train__strategy=strategy,
        run__log_every=2,
        run__checkpoint_every_steps=None,
    )
    first, second = run_on_ranks(2, _train_slowly, values, tmp_path / "run", 1)
    assert [message.partition(" is slow, ")[0].split()[:2] for message in first] == [["rank", "1"]]
    assert "for 3 log intervals in a row up to step 6" in first[0]
    assert second == []
    if strategy == "fsdp2":
        assert run_on_ranks(2, _train_slowly, values, tmp_path / "even", None) == [[], []]
