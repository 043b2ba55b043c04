"""Training that goes wrong on some data goes back, passes over it, and can still be stopped at any time."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_training import make_dataset, make_recipe, make_values
from torch import Tensor

from cluster.errors import UserError
from cluster.rank.preempt import PreemptionFlag
from cluster.rank.torch_dist import World
from pipeline.checkpoint.files import latest, newest_first, read_tensors, step_of
from pipeline.data.batch import Batch, Inputs
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.branch import branch, branch_recipe, parent_of
from pipeline.train.loop import pretrain, train
from pipeline.train.run_recipe import to_yaml
from pipeline.train.setup import set_up

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), group=None, control=None)
Ranks = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many as every rank has: sums in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _train(
    group: dist.ProcessGroup | None, values: dict[str, Any], folder: Path, bad: list[int]
) -> tuple[str, list[int]]:
    """Train with batches of which those numbered `bad` break the loss, on the last rank; the error, and the
    numbers of the batches in the order of their first look.
    """
    world = ALONE
    if group is not None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        world = World(
            rank=rank, size=size, local_rank=rank, device=torch.device("cpu"), group=group, control=group
        )
    training = set_up(PretrainRecipe.model_validate(values), folder, world)
    loader, numbers = training.loader, [-1]
    from_step, augment = loader.from_step, loader.augment

    def numbered(step: int, *, held: int = 1) -> Iterator[tuple[int, Batch]]:
        for number, batch in from_step(step, held=held):
            numbers.append(number)
            yield number, batch

    def poisoned(batch: Batch, **options: Any) -> Inputs:
        inputs = augment(batch, **options)
        if numbers[-1] in bad and world.rank == world.size - 1:
            inputs.views["crops.0"][1, 0, 0, 0] = float("nan")
        return inputs

    loader.from_step, loader.augment = numbered, poisoned  # type: ignore[method-assign, assignment]
    error = ""
    try:
        train(training, PreemptionFlag(training.run))
    except UserError as failure:
        error = str(failure)
    finally:
        if training.metrics is not None:
            training.metrics.close()
    return error, numbers[1:]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = latest(folder)
    assert checkpoint is not None
    return read_tensors(checkpoint, prefix="")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_T3_the_run_goes_back_passes_over_the_data_and_does_so_again_after_a_kill(
    data: Path, tmp_path: Path, run_on_ranks: Ranks, strategy: str
) -> None:
    section = {"steps": 8, "strategy": strategy}
    values = make_values(data, train=section, run__keep_last=10, run__checkpoint_every_steps=3)
    bad = [4, 5, 6]
    folder, again = tmp_path / "run", tmp_path / "again"
    answers = run_on_ranks(2, _train, values, folder, bad)
    assert [tuple(answer) for answer in answers] == [("", [*range(7), *range(7, 12)])] * 2
    found = rows(folder)
    assert [row["step"] for row in found] == [1, 2, 3, 4, *range(4, 9)]
    assert found[3] == {"step": 4, "rollback": {"to": 3, "from": 7}}
    assert not any("skipped" in row for row in found)

    for start in (3, 6):  # before the run went back, and after
        shutil.copytree(folder, again)
        for checkpoint in newest_first(again / "checkpoints"):
            if step_of(checkpoint) > start:
                shutil.rmtree(checkpoint)
        for _, numbers in run_on_ranks(2, _train, values, again, bad):
            assert numbers == ([3, 4, 5, 6, *range(7, 12)] if start == 3 else [10, 11])
        assert (again / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
        one, other = final_tensors(folder), final_tensors(again)
        assert all(torch.equal(one[name], other[name]) for name in one)
        shutil.rmtree(again)


def test_a_second_failure_at_the_same_place_stops_the_run(data: Path, tmp_path: Path) -> None:
    error, numbers = _train(None, make_values(data), tmp_path / "run", list(range(6, 30)))
    assert numbers == [*range(9), 9, 10, 11]
    assert error.startswith("other data after step 5 did not help: the loss or gradient was not finite in 3 ")
    assert "up to step 8 (rank 0: the augmented crops of samples" in error


@pytest.mark.slow
def test_a_run_goes_back_no_more_often_than_the_recipe_allows(data: Path, tmp_path: Path) -> None:
    error, numbers = _train(None, make_values(data, train__max_rollbacks=0), tmp_path / "a", [6, 7, 8])
    assert numbers == list(range(9))
    assert error.startswith("the loss or gradient was not finite in 3 steps in a row, up to step 9")
    values = make_values(data, train__max_rollbacks=1)
    error, _ = _train(None, values, tmp_path / "b", [6, 7, 8, 16, 17, 18])
    assert error.startswith("the loss or gradient was not finite in 3 steps in a row, up to step 15")

    (tmp_path / "b" / "recipe.yaml").write_text(to_yaml(PretrainRecipe.model_validate(values)))
    checkpoint = latest(tmp_path / "b")
    assert checkpoint is not None
    mended = branch_recipe(checkpoint, ["optim.lr=0.01"])
    branch(tmp_path / "c", checkpoint, parent_of(checkpoint, mended), mended, to_yaml(mended))
    error, _ = _train(None, mended.model_dump(mode="json"), tmp_path / "c", [16, 17, 18])
    assert error == "", "a branch may go back as often as its recipe says, whatever its parent did"


@pytest.mark.slow
def test_a_trace_of_each_rank_is_written(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        _train(None, make_values(data, train__steps=4, run__profile="2:3"), tmp_path / "run", [])
    trace = tmp_path / "run" / "traces" / "steps-2-3-rank-0.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::linear" for event in events) > 0
    assert str(trace.parent) in caplog.text


@pytest.mark.slow
def test_a_run_that_ends_amid_the_steps_asked_for_has_a_trace_of_those_it_took(
    data: Path, tmp_path: Path
) -> None:
    pretrain(make_recipe(data, train__steps=3, run__profile="2:40"), tmp_path / "run")
    assert (tmp_path / "run" / "traces" / "steps-2-40-rank-0.json.gz").stat().st_size > 1000


def test_what_saving_costs_is_told(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _train(None, make_values(data, train__steps=6), tmp_path / "run", [])
    assert "checkpoint of step 5 saved: stalled 0." in caplog.text
    timing = [json.loads(line) for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
    saved = [row for row in timing if "checkpoint" in row]
    assert saved[-1]["checkpoint"] == 6
    assert all(0 < row["stalled"] < 60 and 0 < row["written"] < 60 for row in saved)


@pytest.mark.slow
def test_going_back_undoes_the_steps_since_the_checkpoint(data: Path, tmp_path: Path) -> None:
    after_a_step, at_once = tmp_path / "after a step", tmp_path / "at once"
    _train(None, make_values(data, train__steps=10), after_a_step, [6, 7, 8])
    # Nothing was taken after step 5 here, so that there is nothing to undo.
    values = make_values(data, train__steps=10, train__max_skipped_steps=4)
    _train(None, values, at_once, [5, 6, 7, 8])
    assert rows(after_a_step) == rows(at_once)
    one, other = final_tensors(after_a_step), final_tensors(at_once)
    assert all(torch.equal(one[name], other[name]) for name in one)
