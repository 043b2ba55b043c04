"""The SwAV method: equal on any number of ranks, its queue, its freeze, its diagnostics."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from swav_reference import loss_of_the_paper, sinkhorn_of_the_paper
from tiny_training import SHALLOW, as_inputs, build_method
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from cluster.errors import UserError
from pipeline.data.batch import Inputs
from pipeline.distributed.collectives import all_reduce_sum, rank_in, world_size
from pipeline.methods.swav import SwAVMethod, sinkhorn, swav_loss
from pipeline.parallel.batchnorm import convert_batchnorm
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.optim import build_optimizer

BATCH = 16
STEPS = 3


def make_recipe(**method: Any) -> PretrainRecipe:
    """Two large and three small crops, a head with BatchNorm, and a queue that is on from the second step."""
    values = {
        "name": "swav",
        "head": {"hidden": [24], "output": 12},
        "prototypes": 20,
        "epsilon": 0.05,
        "freeze_prototypes_steps": 1,
        "queue_length": BATCH,
        "queue_start_step": 1,
    }
    return PretrainRecipe.model_validate(
        {
            "seed": 5,
            "data": {
                "root": "unused",
                "batch_size": BATCH,
                "crops": [
                    {"count": 2, "size": 16, "scale": [0.2, 1.0]},
                    {"count": 3, "size": 8, "scale": [0.05, 0.2]},
                ],
            },
            "trunk": SHALLOW,
            "method": values | method,
            "optim": {"name": "larc", "lr": 0.5, "weight_decay": 1e-4},
            "train": {"steps": STEPS, "precision": "fp64"},
        }
    )


def make_inputs(step: int, group: ProcessGroup | None = None) -> Inputs:
    """This rank's rows of the global batch of a step, view-major."""
    generator = torch.Generator().manual_seed(step)
    rows = BATCH // world_size(group)
    mine = slice(rank_in(group) * rows, (rank_in(group) + 1) * rows)
    groups = []
    for views, size in ((2, 16), (3, 8)):
        whole = torch.randn(views, BATCH, 3, size, size, generator=generator, dtype=torch.float64)
        groups.append(whole[:, mine].flatten(0, 1))
    return as_inputs(*groups)


def train(group: ProcessGroup | None, sync_samples: int | None) -> dict[str, NDArray[Any]]:
    """Three steps; losses and diagnostics of each, the last gradients, and all weights and buffers."""
    recipe = make_recipe()
    method = build_method(recipe, total_steps=STEPS, group=group).double()
    convert_batchnorm(method, rank_rows=BATCH // world_size(group), sync_samples=sync_samples, group=group)
    optimizer = build_optimizer(method, recipe.optim)
    model: nn.Module = method if group is None else DistributedDataParallel(method, broadcast_buffers=False)
    found: dict[str, NDArray[Any]] = {}
    for step in range(STEPS):
        terms = model(make_inputs(step, group), step)
        optimizer.zero_grad()
        terms["loss"].backward()
        if step == STEPS - 1:
            for name, parameter in method.named_parameters():
                assert parameter.grad is not None
                found[f"gradient of {name}"] = parameter.grad.numpy().copy()
        optimizer.step()
        method.after_step(step)
        for name in ("loss", "prototype_entropy", "assignment_entropy"):
            found[f"{name} of step {step}"] = terms[name].detach().numpy()
    found.update({name: tensor.numpy() for name, tensor in method.state_dict().items()})
    return found


def train_both_ways(group: ProcessGroup | None) -> list[dict[str, NDArray[Any]]]:
    """BatchNorm over the whole batch and over half of it: groups within a rank, of one rank, of two."""
    return [train(group, None), train(group, BATCH // 2)]


@pytest.fixture(scope="module")
def single() -> list[dict[str, NDArray[Any]]]:
    return train_both_ways(None)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_T1_swav_gradients_on_n_ranks_equal_one_rank(
    run_on_ranks: Callable[..., list[Any]], single: list[dict[str, NDArray[Any]]], world: int
) -> None:
    assert float(np.abs(single[0]["queue"]).sum()) > 0
    for rank in run_on_ranks(world, train_both_ways):
        for expected, found in zip(single, rank, strict=True):
            assert expected.keys() == found.keys()
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-10, err_msg=name)


def test_T5_method_equals_the_paper_with_its_queue() -> None:
    """The whole forward: the third step's assignments come from the batch and the two before it."""
    method = build_method(make_recipe(queue_length=2 * BATCH), total_steps=STEPS, group=None).double()
    for step in range(3):
        weights = method.prototypes.weight.detach().numpy().copy()
        features = torch.cat([method.trunk(crops) for crops in make_inputs(step).views.values()])
        z = method.head(features).detach().numpy()
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        found = float(method(make_inputs(step), step)["loss"].detach())
        scores = (z @ weights.T).reshape(5, BATCH, -1)
        batches = scores[:2]
        if step == 2:
            batches = np.concatenate([batches, method.queue.numpy() @ weights.T], axis=1)
        assignments = np.stack([sinkhorn_of_the_paper(view, 0.05, 3)[:BATCH] for view in batches])
        assert found == pytest.approx(loss_of_the_paper(scores, assignments, 0.1), rel=1e-10)
        method.after_step(step)
        newest = method.queue[:, :BATCH].numpy()
        np.testing.assert_allclose(newest, z.reshape(5, BATCH, -1)[:2], rtol=0, atol=1e-12)


def test_frozen_prototypes_stay_and_have_no_momentum_when_they_thaw() -> None:
    recipe = make_recipe(freeze_prototypes_steps=2)
    method = build_method(recipe, total_steps=STEPS, group=None).double()
    optimizer = build_optimizer(method, recipe.optim)
    method.prototypes.normalise()  # they were of length 1 in float32
    start = method.prototypes.weight.detach().clone()
    trunk_start = next(method.trunk.parameters()).detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        method(make_inputs(step), step)["loss"].backward()
        optimizer.step()
        method.after_step(step)
        moved = float((method.prototypes.weight - start).detach().abs().max())
        if step < 2:
            assert moved < 1e-15
            assert not optimizer.state[method.prototypes.weight]["momentum_buffer"].any()
        else:
            assert moved > 1e-6
    assert not torch.equal(next(method.trunk.parameters()), trunk_start)
    lengths = method.prototypes.weight.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-12)


def test_a_skipped_step_leaves_the_queue_as_it_was() -> None:
    method = build_method(make_recipe(), total_steps=STEPS, group=None).double()
    broken = as_inputs(*(torch.full_like(crops, torch.nan) for crops in make_inputs(0).views.values()))
    method(broken, 0)  # the guard sees the loss and calls neither step nor after_step
    method(make_inputs(1), 1)
    method.after_step(1)
    assert bool(method.queue.isfinite().all())
    assert int(method.queue_filled) == BATCH


def test_accumulated_batches_all_enter_the_queue_newest_first() -> None:
    method = build_method(make_recipe(queue_length=2 * BATCH), total_steps=STEPS, group=None).double()
    first = method(make_inputs(0), 0)["embedding"]
    second = method(make_inputs(1), 0)["embedding"]
    method.after_step(0)
    torch.testing.assert_close(method.queue[0], torch.cat([second, first]), rtol=0, atol=0)


def test_evaluation_leaves_no_trace() -> None:
    method = build_method(make_recipe(), total_steps=STEPS, group=None).double().eval()
    method.prototypes.normalise()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with torch.no_grad():
        method(make_inputs(0), 0)
    method.after_step(0)
    for name, tensor in method.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-15, msg=name)


def test_groups_of_one_size_pass_the_trunk_together_and_keep_their_order() -> None:
    method = build_method(make_recipe(queue_length=0), total_steps=STEPS, group=None).double()
    large, small = make_inputs(0).views.values()
    pieces = as_inputs(large[:BATCH], small, large[BATCH:])
    passes: list[int] = []
    method.trunk.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    method.assignment_views = 1
    found = method(pieces, 5)["loss"]
    assert passes == [2 * BATCH, 3 * BATCH]
    features = torch.cat([method.trunk(large), method.trunk(small)])
    order = torch.cat([features[:BATCH], features[2 * BATCH :], features[BATCH : 2 * BATCH]])
    z = torch.nn.functional.normalize(method.head(order), dim=1)
    scores = method.prototypes(z).reshape(5, BATCH, -1).detach()
    expected = swav_loss(scores, sinkhorn(scores[:1], epsilon=0.05, iterations=3), temperature=0.1)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=0)


def test_bfloat16_autocast_keeps_the_loss_in_float32() -> None:
    method = build_method(make_recipe(), total_steps=STEPS, group=None)
    # Larger than the other tests' crops: on processors with AMX, oneDNN's bfloat16 gradient of a 3 x 3 kernel
    # that strides over a single pixel leaves the taps that only see padding unwritten.
    larger = [F.interpolate(crops.float(), scale_factor=4.0) for crops in make_inputs(0).views.values()]
    inputs = as_inputs(*larger)
    exact = method(inputs, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = method(inputs, 0)
    assert rough["loss"].dtype == rough["embedding"].dtype == torch.float32
    rough["loss"].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in method.parameters())
    assert float(rough["loss"].detach()) == pytest.approx(float(exact["loss"].detach()), rel=0.1)


def test_entropies_tell_a_collapse() -> None:
    method = build_method(make_recipe(queue_length=0), total_steps=STEPS, group=None).double()
    healthy = method(make_inputs(0), 0)
    nn.init.zeros_(method.head.layers[-1].weight)  # type: ignore[arg-type]
    collapsed = method(make_inputs(0), 0)
    ceiling = float(np.log(20))
    assert float(collapsed["assignment_entropy"]) == pytest.approx(ceiling)
    assert float(healthy["assignment_entropy"]) < ceiling - 0.1
    assert 0 < float(healthy["prototype_entropy"]) <= ceiling


def test_methods_of_one_seed_are_equal_whatever_the_global_random_state() -> None:
    torch.manual_seed(0)
    first = build_method(make_recipe(), total_steps=STEPS, group=None).state_dict()
    torch.manual_seed(1)
    second = build_method(make_recipe(), total_steps=STEPS, group=None).state_dict()
    other = build_method(
        make_recipe().model_copy(update={"seed": 6}), total_steps=STEPS, group=None
    ).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["prototypes.weight"], other["prototypes.weight"])


def test_every_parameter_is_in_one_group() -> None:
    method = build_method(make_recipe(), total_steps=STEPS, group=None)
    weights, others = method.param_groups()
    assert (weights["bias_and_norm"], others["bias_and_norm"]) == (False, True)
    found = [id(parameter) for group in (weights, others) for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in method.parameters())
    assert all(parameter.ndim > 1 for parameter in weights["params"])


def test_one_crop_is_refused_with_the_way_out() -> None:
    values = make_recipe().model_dump()
    values["data"]["crops"] = [{"count": 1, "size": 16, "scale": (0.2, 1.0)}]
    with pytest.raises(UserError, match=r"data\.crops .* set count: 2"):
        build_method(PretrainRecipe.model_validate(values), total_steps=STEPS, group=None)
    with pytest.raises(ValueError, match="two views"):
        swav_loss(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3), temperature=0.1)


def _sum_and_its_gradient(group: ProcessGroup | None) -> tuple[float, float]:
    x = torch.tensor(float(rank_in(group) + 1), requires_grad=True)
    y = all_reduce_sum(x, group)
    (y * y).backward()
    assert x.grad is not None
    return float(y.detach()), float(x.grad)


def _batch_that_does_not_divide(group: ProcessGroup | None) -> str:
    values = make_recipe().model_dump()
    values["data"]["batch_size"] = BATCH + 1
    with pytest.raises(UserError) as caught:
        build_method(PretrainRecipe.model_validate(values), total_steps=STEPS, group=group)
    return str(caught.value)


def _both(group: ProcessGroup | None) -> tuple[tuple[float, float], str]:
    return _sum_and_its_gradient(group), _batch_that_does_not_divide(group)


def test_the_backward_of_a_sum_over_ranks_is_a_sum_over_ranks(run_on_ranks: Callable[..., list[Any]]) -> None:
    for (total, gradient), error in run_on_ranks(2, _both):
        assert (total, gradient) == (3.0, 12.0)
        assert "17 does not divide over 2 ranks" in error


def test_swav_is_a_module_with_its_trunk() -> None:
    method = build_method(make_recipe(), total_steps=STEPS, group=None)
    assert isinstance(method, SwAVMethod)
    assert method.trunk.feature_dim == 32
