"""Every way to lay a training over ranks computes the same, with and without activation checkpointing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_training import make_dataset, make_recipe
from torch import Tensor

from cluster.torch_dist import World
from pipeline.pieces import named_tensors, whole
from pipeline.train.checkpoint import latest, read_tensors
from pipeline.train.loop import Training, forward_backward, gradient_norm, set_up, steps, train
from pipeline.train.metrics import Stopwatch

Ranks = Callable[..., list[Any]]
TRUNK = {"depth": 6, "w_0": 16, "w_a": 12.0, "w_m": 2.0, "group_width": 8}  # stages of 1, 2 and 3 blocks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("tiny"))


def world_of(group: dist.ProcessGroup | None) -> World:
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    device = torch.device("cpu")
    return World(rank=rank, size=size, local_rank=rank, device=device, group=group, control=group)


class Never:
    requested = False


def prepare(
    group: dist.ProcessGroup | None, data: Path, folder: Path, train: dict[str, Any], **changes: Any
) -> Training:
    trunk = {"name": "regnet_y", "regnet": TRUNK, "stem": "low_resolution"}
    section = {"steps": 20} | train
    recipe = make_recipe(data, trunk=trunk, train=section, run__checkpoint_every_steps=100, **changes)
    return set_up(recipe, folder, world_of(group))


CHECKPOINTING: dict[str, Any] = {"none": "none", "full": "full", "runs": [[1], [], [2]]}
# Its gradient is nothing but rounding, for BatchNorm follows; LARC makes steps of it, which change nothing.
NO_EFFECT = "head.layers.0.bias"


def _gradients(
    group: dist.ProcessGroup | None, data: Path, folder: Path, trains: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Loss, length and gradient of one step, and the batch statistics after it, for each of the sections."""
    found: dict[str, dict[str, Any]] = {}
    for name, section in trains.items():
        t = prepare(group, data, folder / name, {"accumulate": 2} | section)
        step, batches = next(steps(t, Stopwatch()))
        terms, _ = forward_backward(t, batches, step + 5)
        found[name] = {"loss": float(terms["loss"]), "length": float(gradient_norm(t))}
        for tensor_name, tensor in named_tensors(t.method):
            if tensor.grad is not None:
                found[name][tensor_name] = whole(tensor.grad, tensor).numpy()
            elif "running" in tensor_name:
                found[name][tensor_name] = tensor.numpy()
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_T1_T2_T4_gradients_do_not_depend_on_ranks_strategy_or_checkpointing(
    data: Path, tmp_path: Path, run_on_ranks: Ranks, ranks: int
) -> None:
    alone = _gradients(None, data, tmp_path / "alone", {"fp64": {"precision": "fp64"}})["fp64"]
    trains = {
        f"{strategy}-{precision}-{name}": {
            "strategy": strategy,
            "precision": precision,
            "checkpointing": CHECKPOINTING[name],
        }
        for strategy, precision in (
            ("ddp", "fp64"),
            ("fsdp2", "fp64"),
            ("fsdp2", "fp32"),
            ("fairscale", "fp32"),
        )
        for name in (CHECKPOINTING if ranks < 4 else ["none", "runs"])
    }
    if ranks == 4:
        trains["hybrid-fp64"] = {"strategy": "fsdp2", "precision": "fp64", "shard_ranks": 2}
    for found in run_on_ranks(ranks, _gradients, data, tmp_path / "ranks", trains):
        assert found.keys() == trains.keys()
        for name, values in found.items():
            # FairScale has no float64; float32 rounds differently for another number of ranks.
            wide = trains[name]["precision"] == "fp64"
            expected, tolerance = (alone, 1e-10) if wide else (found["fsdp2-fp32-none"], 1e-4)
            assert values.keys() == expected.keys()
            for key in values.keys() - {NO_EFFECT}:
                scale = np.abs(expected[key]).max()
                assert np.abs(values[key] - expected[key]).max() <= tolerance * scale, (name, key)


def _train(
    group: dist.ProcessGroup | None, data: Path, folder: Path, trains: dict[str, dict[str, Any]]
) -> None:
    for name, section in trains.items():
        # Float32's rounding grows the faster the larger the steps are.
        slow = {} if section["precision"] == "fp64" else {"optim__lr": 0.01}
        t = prepare(group, data, folder / name, section, **slow)
        train(t, Never())  # type: ignore[arg-type]
        if t.metrics is not None:
            t.metrics.close()


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final(folder: Path) -> dict[str, Tensor]:
    checkpoint = latest(folder)
    assert checkpoint is not None
    return read_tensors(checkpoint, prefix="")


def test_T2_every_strategy_trains_the_same(data: Path, tmp_path: Path, run_on_ranks: Ranks) -> None:
    trains: dict[str, dict[str, Any]] = {
        "ddp-fp64": {"checkpointing": CHECKPOINTING["runs"]},
        "fsdp2-fp64": {"strategy": "fsdp2", "checkpointing": CHECKPOINTING["runs"]},
        "fsdp2-fp32": {"strategy": "fsdp2"},
        "fairscale-fp32": {"strategy": "fairscale"},
    }
    trains = {name: section | {"precision": name[-4:]} for name, section in trains.items()}
    _train(None, data, tmp_path, {"alone-fp64": {"precision": "fp64"}})
    run_on_ranks(2, _train, data, tmp_path, trains)
    # Convolutions round differently where weights are channels_last, as they are without sharding: FairScale
    # is compared with FSDP2.
    for name, reference, tolerance in (
        ("ddp-fp64", "alone-fp64", 1e-9),
        ("fsdp2-fp64", "alone-fp64", 1e-9),
        ("fairscale-fp32", "fsdp2-fp32", 1e-6),
    ):
        assert len(losses(tmp_path / name)) == 20
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / reference), rel=tolerance), name
        tensors, wanted = final(tmp_path / name), final(tmp_path / reference)
        assert tensors.keys() == wanted.keys()
        for key in tensors.keys() - {NO_EFFECT}:
            difference = (tensors[key] - wanted[key]).abs().max() / wanted[key].abs().max()
            assert difference <= 10 * tolerance, (name, key)
