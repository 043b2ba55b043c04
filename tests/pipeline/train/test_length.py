"""A run takes as many steps as `submit plan` foresees, and ends within its epochs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import make_dataset, make_recipe

from cluster.errors import UserError
from cluster.rank.torch_dist import World
from cluster.typed_yaml import load_recipe
from pipeline.commands.plan import _samples as planned_samples
from pipeline.commands.plan import _steps as planned_steps
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.setup import set_up


def recipe_of(*, batch: int, window: int, **train: int | None) -> PretrainRecipe:
    return make_recipe(Path("nowhere"), data__batch_size=batch, data__window=window, train=train)


def batches_of_an_epoch(samples: int, batch: int, window: int) -> int:
    """One by one: as long as every lane has the rows of another batch."""
    lanes = max(
        n for n in (2**power for power in range(11)) if n == 1 or (batch % n == 0 and n * window <= samples)
    )
    left, batches = samples // lanes, 0
    while left >= batch // lanes:
        left, batches = left - batch // lanes, batches + 1
    return batches


@given(
    samples=st.integers(1, 3000),
    batch=st.integers(1, 300),
    window=st.integers(1, 400),
    epochs=st.integers(1, 7),
    accumulate=st.integers(1, 6),
)
def test_the_planned_steps_are_whole_batches_of_the_epochs(
    samples: int, batch: int, window: int, epochs: int, accumulate: int
) -> None:
    recipe = recipe_of(batch=batch, window=window, epochs=epochs, accumulate=accumulate)
    if samples < batch:
        with pytest.raises(UserError, match=f"batch_size is {batch} but the dataset has {samples} samples"):
            planned_steps(recipe, samples)
        return
    batches = epochs * batches_of_an_epoch(samples, batch, window)
    if batches < accumulate:
        with pytest.raises(UserError, match=f"are fewer than the {accumulate} batches of one step"):
            planned_steps(recipe, samples)
        return
    steps = planned_steps(recipe, samples)
    assert steps * accumulate <= batches < (steps + 1) * accumulate


def test_what_an_epoch_drops_is_not_planned() -> None:
    cifar = load_recipe(PretrainRecipe, "cifar10_simsiam", ["train.epochs=100"], kind="pretrain")
    assert cifar.data.batch_size == 256
    assert planned_steps(cifar, 300) == 100


def test_training_takes_the_planned_steps(tmp_path: Path) -> None:
    data = make_dataset(tmp_path)
    train = {"epochs": 2, "accumulate": 3}  # two epochs of 4 batches; 96 images would fill 4.8
    recipe = make_recipe(data, data__batch_size=20, method__queue_length=0, train=train)
    alone = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), group=None, control=None)
    training = set_up(recipe, tmp_path / "run", alone)
    assert training.total_steps == planned_steps(recipe, planned_samples(recipe, None)) == 2
