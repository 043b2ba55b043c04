"""Numbers that are not finite."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_training import as_inputs, build_method, make_recipe
from torch import nn

from cluster.errors import UserError
from cluster.rank.torch_dist import World
from pipeline.train.guard import (
    WINDOW,
    Diverged,
    Guard,
    Suspect,
    batch_suspect,
    find_suspects,
    running_statistics,
    spike_threshold,
)

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), group=None, control=None)


def make_guard(method: nn.Module | None = None, *, max_skipped: int = 3, in_a_row: int = 0) -> Guard:
    guard = Guard(method or nn.BatchNorm1d(2), world=ALONE, max_skipped=max_skipped, spike_deviations=20.0)
    guard.load({"in_a_row": in_a_row, "losses": [], "rollbacks": []})
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "accepted"),
    [
        (1.0, 2.0, True),
        (math.nan, 2.0, False),
        (1.0, math.inf, False),
        (-math.inf, math.inf, False),
        (1.0, math.nan, False),
    ],
)
def test_a_step_needs_a_finite_loss_and_gradient(loss: float, norm: float, accepted: bool) -> None:
    assert make_guard().accepts(loss, norm) is accepted


def test_a_skipped_step_leaves_no_trace_in_the_buffers() -> None:
    norm = nn.BatchNorm1d(2)
    norm(torch.randn(4, 2))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    guard = make_guard(norm)
    guard.remember()
    norm(torch.full((4, 2), math.nan))
    assert norm.running_mean is not None and norm.running_mean.isnan().all()
    guard.skip(1, [])
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.parametrize(
    "section",
    [
        {"name": "barlow_twins", "projector": [8]},
        {"name": "byol", "projector": [8], "predictor": 8},
        {"name": "simsiam", "projector": [8], "predictor": 4},
        {
            "name": "swav",
            "head": {"hidden": [8], "output": 4},
            "prototypes": 6,
            "queue_length": 12,
            "queue_start_step": 0,
        },
    ],
    ids=lambda section: section["name"],
)
def test_a_forward_pass_changes_no_buffer_but_those_that_the_guard_remembers(section: dict[str, Any]) -> None:
    crops = [{"count": 2, "size": 16, "scale": [0.3, 1.0]}]
    recipe = make_recipe(Path("unused"), method=section, data__crops=crops, data__batch_size=4)
    method = build_method(recipe, total_steps=2, group=None)
    before = {name: buffer.clone() for name, buffer in method.named_buffers()}
    remembered = {id(buffer) for buffer in running_statistics(method)}
    method(as_inputs(torch.randn(8, 3, 16, 16)), 0)
    changed = {name for name, buffer in method.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed == {name for name, buffer in method.named_buffers() if id(buffer) in remembered}
    assert "queue" not in changed  # a large one would be held twice


def test_the_run_stops_after_some_skips_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    guard = make_guard(max_skipped=2)
    suspect = Suspect(rank=0, keys=(300_005,), what="the augmented crops")
    guard.remember()
    with caplog.at_level(logging.WARNING):
        guard.skip(7, [suspect])
    assert "step 7 skipped" in caplog.text
    assert "rank 0: the augmented crops of samples 0000000300005" in caplog.text
    assert guard.accepts(1.0, 1.0)
    guard.skip(9, [suspect])
    with pytest.raises(UserError, match=r"not finite in 2 steps in a row, up to step 10 .*0000000300005"):
        guard.skip(10, [suspect])


def test_skips_are_counted_across_a_resume() -> None:
    with pytest.raises(UserError, match="every sample's embedding is finite"):
        make_guard(max_skipped=3, in_a_row=2).skip(5, [])


def test_suspects_are_the_samples_with_broken_crops_first() -> None:
    keys = torch.tensor([10, 11, 12])
    large, small = torch.zeros(6, 3, 2, 2), torch.zeros(3, 3, 1, 1)
    inputs = as_inputs(large, small)
    large[4, 0, 1, 1] = math.nan  # the second view of sample 11
    embedding = torch.full((3, 4), math.nan)  # BatchNorm has spread it
    found = find_suspects(3, keys=keys, inputs=inputs, embedding=embedding)
    assert found == [Suspect(rank=3, keys=(11,), what="the augmented crops")]
    large.zero_()
    found = find_suspects(3, keys=keys, inputs=inputs, embedding=embedding)
    assert found == [Suspect(rank=3, keys=(10, 11, 12), what="the embeddings")]
    assert find_suspects(3, keys=keys, inputs=inputs, embedding=torch.zeros(3, 4)) == []


def test_many_suspects_are_told_briefly() -> None:
    text = str(Suspect(rank=1, keys=tuple(range(20)), what="the embeddings"))
    assert text.endswith("0000000000007 and 12 more")


def _skip_on_rank_1(group: dist.ProcessGroup) -> list[int]:
    rank = dist.get_rank(group)
    world = World(rank=rank, size=2, local_rank=rank, device=torch.device("cpu"), group=group, control=group)
    guard = Guard(nn.BatchNorm1d(2), world=world, max_skipped=3, spike_deviations=20.0)
    guard.remember()
    mine = [Suspect(rank=1, keys=(5,), what="the embeddings")] if rank == 1 else []
    return [suspect.rank for suspect in guard.skip(1, mine)]


def test_every_rank_learns_whose_samples_they_are(run_on_ranks: Callable[..., list[Any]]) -> None:
    assert run_on_ranks(2, _skip_on_rank_1) == [[1], [1]]


def losses(count: int = WINDOW) -> list[float]:
    """Around 4, 0.1 up and down."""
    return [4 + 0.1 * (number % 3 - 1) for number in range(count)]


def test_a_spike_is_far_above_the_median_of_a_full_window() -> None:
    assert spike_threshold(losses(WINDOW - 1), deviations=20) is None
    limit = spike_threshold(losses(), deviations=20)
    assert limit == pytest.approx(4 + 20 * 1.4826 * 0.1)  # the median absolute deviation is 0.1
    # One outlier moves neither; on a plateau a deviation counts as 1 % of the loss.
    assert spike_threshold([*losses()[1:], 1e6], deviations=20) == pytest.approx(limit)
    assert spike_threshold([4.0] * WINDOW, deviations=20) == pytest.approx(4.8)


def test_T3_a_spike_is_refused_alike_after_a_resume() -> None:
    guard = make_guard(max_skipped=2)
    for loss in losses():
        assert guard.accepts(loss, 1.0)
    again = make_guard(max_skipped=2)
    again.load(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state()
    for one in (guard, again):
        assert one.accepts(6.9, 1.0) and not one.spiked
        assert not one.accepts(7.1, 1.0) and one.spiked
        suspect = batch_suspect(0, torch.tensor([300_005]))
        one.remember()
        assert one.skip(130, [suspect]) == [suspect]
        assert not one.accepts(8.0, 1.0)
        with pytest.raises(Diverged, match=r"leapt to 8, above 6\.965 in 2 .*0000000300005") as told:
            one.skip(131, [suspect])
        assert told.value.spiked


def test_skipped_steps_do_not_count_as_losses() -> None:
    guard = make_guard()
    assert not guard.accepts(math.nan, 1.0)
    assert guard.state()["losses"] == [] and not guard.spiked
