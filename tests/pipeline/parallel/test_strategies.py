"""Every way to lay a training over ranks computes the same, with and without activation checkpointing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_training import SHALLOW, make_dataset, make_recipe
from torch import Tensor

from cluster.errors import UserError
from cluster.rank.torch_dist import World
from pipeline.checkpoint.files import latest, read_tensors
from pipeline.distributed.sharded import named_tensors, whole
from pipeline.models.regnet import RegNet
from pipeline.parallel.parallelize import compile_blocks
from pipeline.parallel.whole import whole_trunk
from pipeline.recipe.trunk import RegNetParameters
from pipeline.train.loop import forward_backward, gradient_norm, steps, train
from pipeline.train.metrics import Stopwatch
from pipeline.train.setup import Training, set_up

Ranks = Callable[..., list[Any]]
TRUNK = {"depth": 5, "w_0": 16, "w_a": 12.0, "w_m": 2.0, "group_width": 8}  # stages of 1, 2 and 2 blocks


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
    changes = {"trunk": SHALLOW | {"regnet": TRUNK}} | changes
    recipe = make_recipe(data, train={"steps": 10} | train, run__checkpoint_every_steps=100, **changes)
    return set_up(recipe, folder, world_of(group))


# Of the runs: none of a stage, one with a block left over, one of two blocks.
CHECKPOINTING: dict[str, Any] = {"none": "none", "full": "full", "runs": [[], [1], [2]]}
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


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one rank finds without any strategy."""
    return _gradients(None, data, tmp_path_factory.mktemp("alone"), {"fp64": {"precision": "fp64"}})["fp64"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_T1_T2_T4_gradients_do_not_depend_on_ranks_strategy_or_checkpointing(
    data: Path, alone: dict[str, Any], tmp_path: Path, run_on_ranks: Ranks, ranks: int
) -> None:
    trains = {
        f"{strategy}-{precision}-{name}": {
            "strategy": strategy,
            "precision": precision,
            "activation_checkpointing": CHECKPOINTING[name],
        }
        for strategy, precision in (("ddp", "fp64"), ("fsdp2", "fp64"), ("fairscale", "fp32"))
        for name in CHECKPOINTING
    }
    if ranks != 2:  # what goes with what is seen on two
        trains = {name: trains[name] for name in trains if name.endswith("runs")}
    trains["fsdp2-fp32-none"] = {"strategy": "fsdp2"}
    if ranks == 4:
        trains["hybrid-fp64"] = {"strategy": "fsdp2", "precision": "fp64", "shard_ranks": 2}
    for found in run_on_ranks(ranks, _gradients, data, tmp_path / "ranks", trains):
        assert found.keys() == trains.keys()
        for name, values in found.items():
            # FairScale has no float64; float32 rounds differently for another number of ranks.
            wide = trains[name].get("precision") == "fp64"
            expected, tolerance = (alone, 1e-10) if wide else (found["fsdp2-fp32-none"], 1e-4)
            assert values.keys() == expected.keys()
            for key in values.keys() - {NO_EFFECT}:
                scale = np.abs(expected[key]).max()
                assert np.abs(values[key] - expected[key]).max() <= tolerance * scale, (name, key)


@pytest.mark.slow
def test_bf16_micro_batches_add_up_under_fsdp2_as_under_ddp(
    data: Path, tmp_path: Path, run_on_ranks: Ranks
) -> None:
    trains: dict[str, dict[str, Any]] = {
        strategy: {"strategy": strategy, "precision": "bf16"} for strategy in ("ddp", "fsdp2")
    }
    for found in run_on_ranks(2, _gradients, data, tmp_path, trains):
        one, other = (
            np.concatenate([values[key].ravel() for key in sorted(values) if key.endswith("weight")])
            for values in (found["ddp"], found["fsdp2"])
        )
        # Rounding to 8 bits; a micro-batch or a pass that is lost or counted twice would be a third or more.
        assert np.linalg.norm(one - other) <= 0.1 * np.linalg.norm(one)


def _reduced(group: dist.ProcessGroup | None, data: Path, folder: Path) -> list[bool]:
    t = prepare(group, data, folder, {"strategy": "fsdp2"})
    weights = [p for p in t.method.trunk.parameters() if p.ndim > 1]
    step, batches = next(steps(t, Stopwatch()))
    reduced, backward = [], torch.autograd.backward

    def noted(*tensors: Tensor) -> None:
        reduced.append(all(weight.grad is not None for weight in weights))
        backward(*tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "backward", noted)
        forward_backward(t, batches, step)
    return reduced


@pytest.mark.slow
def test_fsdp2_reduces_the_gradients_of_one_crop_size_before_those_of_the_next_are_made(
    data: Path, tmp_path: Path, run_on_ranks: Ranks
) -> None:
    # Of the loss to the features, then of the small crops, then of the large ones.
    assert run_on_ranks(2, _reduced, data, tmp_path) == [[False, False, True]] * 2


def _train(
    group: dist.ProcessGroup | None, data: Path, folder: Path, trains: dict[str, dict[str, Any]]
) -> None:
    for name, section in trains.items():
        # Float32's rounding grows the faster the larger the steps are.
        changes: dict[str, Any] = {} if section["precision"] == "fp64" else {"optim__lr": 0.01}
        if section["precision"] == "fp16":
            changes["trunk"] = SHALLOW
        if section["precision"] == "fp32":
            # FSDP2 adds up the gradients of two sizes after they are reduced, FairScale before.
            changes["data__crops"] = [{"count": 3, "size": 16, "scale": [0.3, 1.0]}]
        t = prepare(group, data, folder / name, section, **changes)
        train(t, Never())  # type: ignore[arg-type]
        if t.metrics is not None:
            t.metrics.close()


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final(folder: Path) -> dict[str, Tensor]:
    checkpoint = latest(folder)
    assert checkpoint is not None
    return read_tensors(checkpoint, prefix="")


@pytest.mark.slow
def test_T2_every_strategy_trains_the_same(data: Path, tmp_path: Path, run_on_ranks: Ranks) -> None:
    trains: dict[str, dict[str, Any]] = {
        "ddp-fp64": {"activation_checkpointing": CHECKPOINTING["runs"]},
        "fsdp2-fp64": {"strategy": "fsdp2", "activation_checkpointing": CHECKPOINTING["runs"]},
        "fsdp2-fp32": {"strategy": "fsdp2"},
        "fairscale-fp32": {"strategy": "fairscale"},
    }
    six = {"steps": 6}  # the prototypes thaw in the fourth, and there is a queue in the fifth
    trains = {name: section | {"precision": name[-4:]} | six for name, section in trains.items()}
    _train(None, data, tmp_path, {"alone-fp64": {"precision": "fp64"} | six})
    run_on_ranks(2, _train, data, tmp_path, trains)
    # Convolutions round differently where weights are channels_last, as they are without sharding: FairScale
    # is compared with FSDP2.
    for name, reference, tolerance in (
        ("ddp-fp64", "alone-fp64", 1e-9),
        ("fsdp2-fp64", "alone-fp64", 1e-9),
        ("fairscale-fp32", "fsdp2-fp32", 1e-6),
    ):
        assert len(losses(tmp_path / name)) == 6
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / reference), rel=tolerance), name
        tensors, wanted = final(tmp_path / name), final(tmp_path / reference)
        assert tensors.keys() == wanted.keys()
        for key in tensors.keys() - {NO_EFFECT}:
            difference = (tensors[key] - wanted[key]).abs().max() / wanted[key].abs().max()
            assert difference <= 10 * tolerance, (name, key)


Tensors = dict[str, np.ndarray[Any, Any]]


def _step(
    group: dist.ProcessGroup | None, data: Path, folder: Path, strategy: str, optimizer: str
) -> tuple[Tensors, Tensors]:
    """Load the newest checkpoint, do one step more, and save; every tensor, whole, before and after it."""
    t = prepare(group, data, folder, {"strategy": strategy}, optim__name=optimizer, trunk=SHALLOW)
    before = _show(t)
    train(replace(t, total_steps=t.step + 1), Never())  # type: ignore[arg-type]
    if t.metrics is not None:
        t.metrics.close()
    return before, _show(t)


def _show(t: Training) -> Tensors:
    shown = {}
    for name, tensor in named_tensors(t.method):
        shown[name] = whole(tensor.detach(), tensor).numpy().copy()
        for key, value in t.optimizer.state.get(tensor, {}).items():
            shown[f"{name}/{key}"] = whole(value, tensor).numpy().copy()
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["larc", "adamw"])
def test_T3_a_checkpoint_passes_between_strategies_and_ranks(
    data: Path, tmp_path: Path, run_on_ranks: Ranks, optimizer: str
) -> None:
    way = [
        (2, "fsdp2"),
        (1, "ddp"),
        (3, "fairscale"),
        (2, "ddp"),
        (3, "fsdp2"),
        (2, "fairscale"),
        (1, "fsdp2"),
    ]
    if optimizer == "adamw":  # it keeps a count, too, which is never a piece
        way = [(2, "fairscale"), (2, "fsdp2"), (3, "fairscale"), (1, "ddp")]
    saved: Tensors = {}
    for steps_done, (ranks, strategy) in enumerate(way, start=1):
        everyone = run_on_ranks(ranks, _step, data, tmp_path, strategy, optimizer)
        assert len(losses(tmp_path)) == steps_done
        for loaded, _ in everyone if saved else []:
            assert loaded.keys() == saved.keys()
            for name, values in saved.items():
                np.testing.assert_array_equal(loaded[name], values, err_msg=f"{strategy} {name}")
        saved = everyone[0][1]
    kept = {"larc": "/momentum_buffer", "adamw": "/exp_avg"}[optimizer]
    momenta = [name for name in saved if name.endswith(kept)]
    assert len(momenta) > 20 and all(np.abs(saved[name]).max() > 0 for name in momenta)


@pytest.mark.slow
def test_float16_finds_its_loss_scale_and_keeps_it(data: Path, tmp_path: Path, run_on_ranks: Ranks) -> None:
    section = {"precision": "fp16", "strategy": "fsdp2", "steps": 20}
    run_on_ranks(2, _train, data, tmp_path, {"run": section})
    checkpoint = latest(tmp_path / "run")
    assert checkpoint is not None
    factor, steps_taken = json.loads((checkpoint / "state.json").read_text())["loss_scale"]
    assert 1 < factor < 2**16
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    lost = sorted(set(range(1, 21)) - {json.loads(row)["step"] for row in rows})
    assert len(lost) == np.log2(2**16 / factor) and steps_taken == 20 - lost[-1]
    assert np.isfinite(losses(tmp_path / "run")).all()
    resumed = prepare(
        None, data, tmp_path / "run", section | {"strategy": "ddp"}, optim__lr=0.01, trunk=SHALLOW
    )
    assert resumed.scale.state() == [factor, steps_taken]


@pytest.mark.slow
def test_T4_compiled_blocks_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = RegNetParameters(depth=1, w_0=16, w_a=12.0, w_m=2.0, group_width=8)
    trunk = RegNet(parameters, stem="low_resolution").double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def gradients() -> dict[str, Tensor]:
        trunk.zero_grad()
        trunk(images).square().mean().backward()
        return {name: p.grad.clone() for name, p in trunk.named_parameters() if p.grad is not None}

    expected = gradients()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # All of torch.compile but the last: a compiler for C++ takes ten times as long as the rest.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compile_blocks(trunk)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


@pytest.mark.slow
def test_a_probe_sees_a_sharded_trunk_whole(data: Path, tmp_path: Path, run_on_ranks: Ranks) -> None:
    probe = {"train": str(data), "test": str(data), "every_steps": 1, "image_size": 16}
    for strategy in ("ddp", "fsdp2", "fairscale"):
        folder = tmp_path / strategy
        first, second = run_on_ranks(2, _probed, data, folder, strategy, probe)
        assert strategy == "ddp" or second is None
        saved = {name: tensor for name, tensor in final(folder).items() if name.startswith("trunk.")}
        assert {f"trunk.{name}" for name in first} == saved.keys()
        for name, values in first.items():
            np.testing.assert_array_equal(values, saved[f"trunk.{name}"].numpy(), err_msg=strategy)
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(row)["knn"] > 90 for row in rows) and len(rows) == 2


def _probed(
    group: dist.ProcessGroup, data: Path, folder: Path, strategy: str, probe: dict[str, Any]
) -> Tensors | None:
    t = prepare(group, data, folder, {"strategy": strategy, "steps": 2}, probe=probe, trunk=SHALLOW)
    train(t, Never())  # type: ignore[arg-type]
    trunk = whole_trunk(t.method.trunk, t.recipe.trunk, keep=t.world.is_first)
    return None if trunk is None else {name: value.numpy() for name, value in trunk.state_dict().items()}


def test_checkpointing_that_does_not_fit_the_trunk_is_refused(data: Path, tmp_path: Path) -> None:
    for wrong in ([[1], [2]], [[1], [3], []], [[1], [2, 1], []]):
        with pytest.raises(UserError, match=r"stages have 1, 2, 2 blocks: give one list per stage"):
            prepare(None, data, tmp_path, {"activation_checkpointing": wrong})


@pytest.mark.slow
def test_sharding_that_does_not_fit_the_ranks_is_refused(
    data: Path, tmp_path: Path, run_on_ranks: Ranks
) -> None:
    with pytest.raises(AssertionError, match="shard_ranks 2 does not divide 3 ranks"):
        run_on_ranks(
            3, _train, data, tmp_path, {"run": {"strategy": "fsdp2", "shard_ranks": 2, "precision": "fp32"}}
        )
    with pytest.raises(ValueError, match=r"go with train\.strategy: fsdp2"):
        make_recipe(data, train={"steps": 1, "shard_ranks": 2})
