"""AVID trains the same on any number of ranks, and its bank is the same bank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tiny_training import make_recipe

from cluster.rank.torch_dist import World
from pipeline.data.batch import Inputs
from pipeline.distributed.sharded import named_tensors, whole
from pipeline.methods.avid import AVIDMethod
from pipeline.methods.build import assemble_method
from pipeline.parallel.parallelize import parallelize
from pipeline.train.optim import build_optimizer

Ranks = Callable[..., list[Any]]
Tensors = dict[str, NDArray[Any]]

SAMPLES, BATCH, STEPS = 41, 8, 2
CMA = {"positives": 3, "within_negatives": 4, "weight": 2.0}
METHOD = {
    "name": "avid",
    "head": {"hidden": [8], "output": 8, "batch_norm": False},
    "negatives": 6,
    "within_weight": 0.5,
    "cma": CMA,
}


def inputs_of(number: int, rank: int, size: int) -> Inputs:
    """This rank's rows of a batch, in which one sample stands for another and is there twice."""
    rng = np.random.default_rng(number)
    positions = rng.choice(SAMPLES, BATCH, replace=False)
    positions[5] = positions[2]
    rows = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    views = {
        "clip": rng.normal(size=(BATCH, 3, 2, 16, 16))[rows],
        "audio": rng.normal(size=(BATCH, 1, 16, 17))[rows],
    }
    return Inputs(
        views={name: torch.from_numpy(view) for name, view in views.items()},
        number=number,
        positions=torch.from_numpy(positions[rows]),
    )


def _train(group: dist.ProcessGroup | None, sections: dict[str, dict[str, Any]]) -> dict[str, Tensors]:
    """Some steps of two micro-batches each, and all that there is to see of them."""
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    world = World(
        rank=rank, size=size, local_rank=rank, device=torch.device("cpu"), group=group, control=group
    )
    table = np.random.default_rng(0).permuted(np.tile(np.arange(SAMPLES), (SAMPLES, 1)), axis=1)
    positives = torch.from_numpy(np.stack([row[row != i][:3] for i, row in enumerate(table)]))
    found = {}
    for name, section in sections.items():
        recipe = make_recipe(
            Path("nowhere"),
            data__batch_size=BATCH,
            data__crops=[],
            data__clip={},
            data__audio={},
            trunk={"name": "r2plus1d_10", "width": 2},
            audio_trunk={"name": "conv2d_10", "width": 2},
            method=METHOD,
            optim={"name": "sgd", "lr": 0.05, "momentum": 0.0, "schedule": "constant"},
            train={"steps": 3, "accumulate": 2, "precision": "fp64"} | section,
        )
        with torch.device("meta"):
            method = assemble_method(recipe, total_steps=3, group=group, samples=SAMPLES)
        assert isinstance(method, AVIDMethod)
        engine = parallelize(method, train=recipe.train, seed=1, rank_rows=BATCH // size, world=world)
        method.positives = positives[method.bank.range.start : method.bank.range.stop].int()
        optimizer = build_optimizer(engine, recipe.optim)
        shown: Tensors = {}
        for step in range(STEPS):
            for part in range(2):
                with engine.micro_batch(last=part == 1):
                    terms = engine(inputs_of(2 * step + part, rank, size), step)
                    engine.backward(terms["loss"] / 2)
                for key, value in terms.items():
                    if key != "embedding":
                        shown[f"{key} of {step}, {part}"] = value.detach().numpy()
            if step == 0:
                for key, tensor in named_tensors(method):
                    if tensor.grad is not None:
                        shown[f"gradient of {key}"] = whole(tensor.grad, tensor).numpy()
            optimizer.step()
            engine.after_step(step)
            optimizer.zero_grad()
        for key, tensor in named_tensors(method):
            shown[key] = whole(tensor.detach(), tensor).numpy()
        found[name] = shown
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_T1_T2_avid_and_its_bank_equal_one_rank(run_on_ranks: Ranks, ranks: int) -> None:
    expected = _train(None, {"alone": {}})["alone"]
    assert {"bank.rows", "normaliser", "gradient of trunk.conv1.weight"} <= expected.keys()
    sections = {
        "ddp": {"strategy": "ddp"},
        "fsdp2": {"strategy": "fsdp2", "activation_checkpointing": "full"},
    }
    if ranks == 4:  # where replicas are as they are on two
        del sections["ddp"]
    for found in run_on_ranks(ranks, _train, sections):
        for strategy, values in found.items():
            assert values.keys() == expected.keys()
            for key, value in values.items():
                np.testing.assert_allclose(
                    value, expected[key], rtol=0, atol=1e-10, err_msg=f"{strategy}: {key}"
                )
