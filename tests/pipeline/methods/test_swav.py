"""SwAV's loss and assignments: equal to the paper's equations, stable, and equal on any number of ranks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from cluster.errors import UserError
from pipeline.collectives import all_reduce_sum, rank_in, world_size
from pipeline.methods.build import build_method
from pipeline.methods.swav import SwAVMethod, sinkhorn, swav_loss
from pipeline.recipe import PretrainRecipe
from pipeline.train.batchnorm import convert_batchnorm
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
            "trunk": {"name": "regnety_tiny", "stem": "low_resolution"},
            "method": values | method,
            "optim": {"name": "larc", "lr": 0.5, "weight_decay": 1e-4},
            "train": {"steps": STEPS, "precision": "fp64"},
        }
    )


def make_crops(step: int, group: ProcessGroup | None = None) -> list[Tensor]:
    """This rank's rows of the global batch of a step, view-major."""
    generator = torch.Generator().manual_seed(step)
    rows = BATCH // world_size(group)
    mine = slice(rank_in(group) * rows, (rank_in(group) + 1) * rows)
    crops = []
    for views, size in ((2, 16), (3, 8)):
        whole = torch.randn(views, BATCH, 3, size, size, generator=generator, dtype=torch.float64)
        crops.append(whole[:, mine].flatten(0, 1))
    return crops


def train(group: ProcessGroup | None, sync_samples: int | None) -> dict[str, NDArray[Any]]:
    """Three steps; losses and diagnostics of each, the last gradients, and all weights and buffers."""
    recipe = make_recipe()
    method = build_method(recipe, group=group).double()
    convert_batchnorm(method, rank_rows=BATCH // world_size(group), sync_samples=sync_samples, group=group)
    optimizer = build_optimizer(method, recipe.optim)
    model: nn.Module = method if group is None else DistributedDataParallel(method, broadcast_buffers=False)
    found: dict[str, NDArray[Any]] = {}
    for step in range(STEPS):
        terms = model(make_crops(step, group), step)
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


@pytest.mark.parametrize("world", [2, 4])
def test_T1_swav_gradients_on_n_ranks_equal_one_rank(
    run_on_ranks: Callable[..., list[Any]], world: int
) -> None:
    single = train_both_ways(None)
    assert float(np.abs(single[0]["queue"]).sum()) > 0
    for rank in run_on_ranks(world, train_both_ways):
        for expected, found in zip(single, rank, strict=True):
            assert expected.keys() == found.keys()
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-10, err_msg=name)


def sinkhorn_of_the_paper(scores: NDArray[Any], epsilon: float, iterations: int) -> NDArray[Any]:
    """Equation 5: Diag(u) exp(C^T Z / epsilon) Diag(v), prototypes by samples, marginals 1/K and 1/B."""
    kernel = np.exp(scores.T / epsilon)
    prototypes, samples = kernel.shape
    u, v = np.ones(prototypes), np.ones(samples)
    for _ in range(iterations):
        u = 1 / prototypes / (kernel @ v)
        v = 1 / samples / (kernel.T @ u)
    plan: NDArray[Any] = np.diag(u) @ kernel @ np.diag(v)
    return samples * plan.T


def loss_of_the_paper(scores: NDArray[Any], assignments: NDArray[Any], temperature: float) -> float:
    """Equations 1, 2 and 6, term by term."""
    views, samples, _ = scores.shape
    terms = []
    for i in range(len(assignments)):
        for v in range(views):
            for n in range(samples):
                if v != i:
                    power = np.exp(scores[v, n] / temperature)
                    terms.append(-np.sum(assignments[i, n] * np.log(power / power.sum())))
    return float(np.mean(terms))


def random_cosines(seed: int, *shape: int, dim: int = 8) -> NDArray[Any]:
    random = np.random.default_rng(seed)
    rows = random.standard_normal((*shape[:-1], dim))
    columns = random.standard_normal((shape[-1], dim))
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    columns /= np.linalg.norm(columns, axis=-1, keepdims=True)
    cosines: NDArray[Any] = rows @ columns.T
    return cosines


@given(
    samples=st.integers(1, 40),
    prototypes=st.integers(1, 60),
    epsilon=st.sampled_from([0.03, 0.05, 0.2, 1.0]),
    iterations=st.integers(1, 10),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=60)
def test_T5_sinkhorn_equals_the_paper(
    samples: int, prototypes: int, epsilon: float, iterations: int, seed: int
) -> None:
    scores = random_cosines(seed, samples, prototypes)
    found = sinkhorn(torch.from_numpy(scores.copy()), epsilon=epsilon, iterations=iterations)
    expected = sinkhorn_of_the_paper(scores, epsilon, iterations)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


@given(
    assigned=st.integers(1, 2),
    others=st.integers(1, 4),
    samples=st.integers(1, 6),
    prototypes=st.integers(2, 9),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=40)
def test_T5_loss_equals_the_paper(
    assigned: int, others: int, samples: int, prototypes: int, seed: int
) -> None:
    scores = random_cosines(seed, assigned + others, samples, prototypes)
    assignments = np.stack([sinkhorn_of_the_paper(view, 0.05, 3) for view in scores[:assigned]])
    found = swav_loss(torch.from_numpy(scores), torch.from_numpy(assignments), temperature=0.1)
    assert float(found) == pytest.approx(loss_of_the_paper(scores, assignments, 0.1), rel=1e-12)


def test_T5_method_equals_the_paper_with_its_queue() -> None:
    """The whole forward: the third step's assignments come from the batch and the two before it."""
    method = build_method(make_recipe(queue_length=2 * BATCH), group=None).double()
    for step in range(3):
        weights = method.prototypes.weight.detach().numpy().copy()
        features = torch.cat([method.trunk(crops) for crops in make_crops(step)])
        z = method.head(features).detach().numpy()
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        found = float(method(make_crops(step), step)["loss"].detach())
        scores = (z @ weights.T).reshape(5, BATCH, -1)
        batches = scores[:2]
        if step == 2:
            batches = np.concatenate([batches, method.queue.numpy() @ weights.T], axis=1)
        assignments = np.stack([sinkhorn_of_the_paper(view, 0.05, 3)[:BATCH] for view in batches])
        assert found == pytest.approx(loss_of_the_paper(scores, assignments, 0.1), rel=1e-10)
        method.after_step(step)
        newest = method.queue[:, :BATCH].numpy()
        np.testing.assert_allclose(newest, z.reshape(5, BATCH, -1)[:2], rtol=0, atol=1e-12)


@given(
    samples=st.integers(1, 64),
    prototypes=st.integers(1, 96),
    epsilon=st.floats(0.005, 1.0),
    iterations=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=60)
def test_sinkhorn_marginals_in_float32(
    samples: int, prototypes: int, epsilon: float, iterations: int, seed: int
) -> None:
    """Every sample has mass 1 at once; the prototypes' masses near B / K with every iteration."""
    scores = torch.from_numpy(random_cosines(seed, samples, prototypes, dim=2)).float()
    few = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    more = sinkhorn(scores, epsilon=epsilon, iterations=iterations + 10)
    assert bool((few >= 0).all()) and bool(few.isfinite().all())
    torch.testing.assert_close(few.sum(1), torch.ones(samples), rtol=0, atol=1e-5)
    share = samples / prototypes

    def worst(assignments: Tensor) -> float:
        return float((assignments.sum(0) / share - 1).abs().max())

    assert worst(more) <= worst(few) + 1e-3


def test_sinkhorn_reaches_equal_shares() -> None:
    scores = torch.from_numpy(random_cosines(0, 96, 24))
    assignments = sinkhorn(scores, epsilon=0.1, iterations=200)
    torch.testing.assert_close(
        assignments.sum(0), torch.full((24,), 96 / 24, dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("kind", ["random", "extreme", "collapsed"])
def test_sinkhorn_is_stable_with_16k_prototypes_in_float32(kind: str) -> None:
    """SEER's setting, with a batch far smaller than the number of prototypes."""
    samples, prototypes = 256, 16_000
    if kind == "random":
        scores = torch.from_numpy(random_cosines(1, samples, prototypes, dim=256))
    elif kind == "extreme":
        # Cosines of -1 and 1 only: a spread of e^67 at epsilon 0.03, and prototypes that nobody likes.
        random = np.random.default_rng(1)
        scores = torch.from_numpy(np.where(random.random((samples, prototypes)) < 1e-3, 1.0, -1.0))
    else:
        scores = torch.full((samples, prototypes), 0.3, dtype=torch.float64)
    found = sinkhorn(scores.float(), epsilon=0.03, iterations=10)
    expected = sinkhorn(scores, epsilon=0.03, iterations=10)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.sum(1), torch.ones(samples), rtol=0, atol=1e-4)
    # Cosines of float32 divided by 0.03 are off by 33 * 6e-8; ten iterations of sums over 16,000 add to that.
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-9)


def test_frozen_prototypes_stay_and_have_no_momentum_when_they_thaw() -> None:
    recipe = make_recipe(freeze_prototypes_steps=2)
    method = build_method(recipe, group=None).double()
    optimizer = build_optimizer(method, recipe.optim)
    method.prototypes.normalize()  # they were of length 1 in float32
    start = method.prototypes.weight.detach().clone()
    trunk_start = next(method.trunk.parameters()).detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        method(make_crops(step), step)["loss"].backward()
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
    method = build_method(make_recipe(), group=None).double()
    broken = [torch.full_like(crops, torch.nan) for crops in make_crops(0)]
    method(broken, 0)  # the guard sees the loss and calls neither step nor after_step
    method(make_crops(1), 1)
    method.after_step(1)
    assert bool(method.queue.isfinite().all())
    assert int(method.queue_filled) == BATCH


def test_accumulated_batches_all_enter_the_queue_newest_first() -> None:
    method = build_method(make_recipe(queue_length=2 * BATCH), group=None).double()
    first = method(make_crops(0), 0)["embedding"]
    second = method(make_crops(1), 0)["embedding"]
    method.after_step(0)
    torch.testing.assert_close(method.queue[0], torch.cat([second, first]), rtol=0, atol=0)


def test_evaluation_leaves_no_trace() -> None:
    method = build_method(make_recipe(), group=None).double().eval()
    method.prototypes.normalize()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with torch.no_grad():
        method(make_crops(0), 0)
    method.after_step(0)
    for name, tensor in method.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-15, msg=name)


def test_groups_of_one_size_pass_the_trunk_together_and_keep_their_order() -> None:
    method = build_method(make_recipe(queue_length=0), group=None).double()
    large, small = make_crops(0)
    pieces = [large[:BATCH], small, large[BATCH:]]
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
    method = build_method(make_recipe(), group=None)
    crops = [crops.float() for crops in make_crops(0)]
    exact = method(crops, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = method(crops, 0)
    assert rough["loss"].dtype == rough["embedding"].dtype == torch.float32
    rough["loss"].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in method.parameters())
    assert float(rough["loss"].detach()) == pytest.approx(float(exact["loss"].detach()), rel=0.1)


def test_entropies_tell_a_collapse() -> None:
    method = build_method(make_recipe(queue_length=0), group=None).double()
    healthy = method(make_crops(0), 0)
    nn.init.zeros_(method.head.layers[-1].weight)  # type: ignore[arg-type]
    collapsed = method(make_crops(0), 0)
    ceiling = float(np.log(20))
    assert float(collapsed["assignment_entropy"]) == pytest.approx(ceiling)
    assert float(healthy["assignment_entropy"]) < ceiling - 0.1
    assert 0 < float(healthy["prototype_entropy"]) <= ceiling


def test_methods_of_one_seed_are_equal_whatever_the_global_random_state() -> None:
    torch.manual_seed(0)
    first = build_method(make_recipe(), group=None).state_dict()
    torch.manual_seed(1)
    second = build_method(make_recipe(), group=None).state_dict()
    other = build_method(make_recipe().model_copy(update={"seed": 6}), group=None).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["prototypes.weight"], other["prototypes.weight"])


def test_every_parameter_is_in_one_group() -> None:
    method = build_method(make_recipe(), group=None)
    weights, others = method.param_groups()
    assert (weights["bias_and_norm"], others["bias_and_norm"]) == (False, True)
    found = [id(parameter) for group in (weights, others) for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in method.parameters())
    assert all(parameter.ndim > 1 for parameter in weights["params"])


def test_one_crop_is_refused_with_the_way_out() -> None:
    values = make_recipe().model_dump()
    values["data"]["crops"] = [{"count": 1, "size": 16, "scale": (0.2, 1.0)}]
    with pytest.raises(UserError, match=r"data\.crops .* set count: 2"):
        build_method(PretrainRecipe.model_validate(values), group=None)
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
        build_method(PretrainRecipe.model_validate(values), group=group)
    return str(caught.value)


def _both(group: ProcessGroup | None) -> tuple[tuple[float, float], str]:
    return _sum_and_its_gradient(group), _batch_that_does_not_divide(group)


def test_the_backward_of_a_sum_over_ranks_is_a_sum_over_ranks(run_on_ranks: Callable[..., list[Any]]) -> None:
    for (total, gradient), error in run_on_ranks(2, _both):
        assert (total, gradient) == (3.0, 12.0)
        assert "17 does not divide over 2 ranks" in error


def test_swav_is_a_module_with_its_trunk() -> None:
    method = build_method(make_recipe(), group=None)
    assert isinstance(method, SwAVMethod)
    assert method.trunk.feature_dim == 56
