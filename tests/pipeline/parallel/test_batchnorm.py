"""BatchNorm over rows of the coupled batch equals torch's on the same rows, on any number of ranks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from cluster.errors import UserError
from pipeline.distributed.collectives import rank_in, world_size
from pipeline.parallel.batchnorm import CoupledBatchNorm, convert_batchnorm

BATCH, VIEWS, CHANNELS = 16, 3, 5
SYNC = (None, BATCH, 8, 4, 2)
# (Shape, samples of a group): images in groups of every size, for which the number of dimensions is nothing.
CASES: tuple[tuple[tuple[int, ...], int | None], ...] = (
    *(((3, 2), sync) for sync in SYNC),
    ((), None),
    ((), 2),
    ((2, 3, 2), None),
    ((2, 3, 2), 2),
)


class OneLayer(nn.Module):
    """A layer below a root, as conversion needs it."""

    def __init__(self, spatial: tuple[int, ...]) -> None:
        super().__init__()
        kinds = {0: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
        self.bn: Any = kinds[len(spatial)](CHANNELS)
        with torch.no_grad():
            self.bn.weight.copy_(torch.linspace(0.5, 1.5, CHANNELS))
            self.bn.bias.copy_(torch.linspace(-1, 1, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(x)
        return y


def draw(spatial: tuple[int, ...], seed: int) -> Tensor:
    """(views, batch, channels, ...) with means far from 0, which a careless variance would lose."""
    generator = torch.Generator().manual_seed(seed)
    shape = (VIEWS, BATCH, CHANNELS, *spatial)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 30


def layer_on_rows(
    group: ProcessGroup | None, spatial: tuple[int, ...], sync_samples: int | None
) -> dict[str, NDArray[Any]]:
    """Two training passes and one evaluation with this rank's rows; the loss is the coupled batch's."""
    rows = BATCH // world_size(group)
    mine = slice(rank_in(group) * rows, (rank_in(group) + 1) * rows)
    model = OneLayer(spatial).double()
    convert_batchnorm(model, rank_rows=rows, sync_samples=sync_samples, group=group)
    engine: nn.Module = model if group is None else DistributedDataParallel(model, broadcast_buffers=False)
    found: dict[str, NDArray[Any]] = {}
    for seed in (0, 1):
        x = draw(spatial, seed)[:, mine].flatten(0, 1).requires_grad_()
        target = draw(spatial, seed + 10)[:, mine].flatten(0, 1)
        model.zero_grad()
        y = engine(x)
        # The engine averages over ranks; this rank's share of the sum is its rows' times the number of ranks.
        ((y - target).pow(3).sum() * world_size(group)).backward()
        assert x.grad is not None
        found[f"output {seed}"] = y.detach().unflatten(0, (VIEWS, rows)).numpy()
        found[f"input gradient {seed}"] = (x.grad / world_size(group)).unflatten(0, (VIEWS, rows)).numpy()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[f"gradient of {name}"] = parameter.grad.numpy()
    model.eval()
    found["evaluated"] = model(draw(spatial, 2)[:, mine].flatten(0, 1)).detach().numpy()
    found |= {name: buffer.numpy() for name, buffer in model.named_buffers()}
    return found


def layer_of_torch(spatial: tuple[int, ...], sync_samples: int | None) -> dict[str, NDArray[Any]]:
    """torch's own layer on each group of rows in turn; running statistics follow the groups' mean."""
    samples = sync_samples or BATCH
    model = OneLayer(spatial).double()
    found: dict[str, NDArray[Any]] = {}
    for seed in (0, 1):
        x = draw(spatial, seed).requires_grad_()
        model.zero_grad()
        outputs, after = [], []
        for start in range(0, BATCH, samples):
            running = [model.bn.running_mean.clone(), model.bn.running_var.clone()]
            rows = x[:, start : start + samples].flatten(0, 1)
            y = F.batch_norm(rows, running[0], running[1], model.bn.weight, model.bn.bias, training=True)
            outputs.append(y.unflatten(0, (VIEWS, samples)))
            after.append(torch.stack(running))
        whole = torch.cat(outputs, dim=1)
        (whole - draw(spatial, seed + 10)).pow(3).sum().backward()
        model.bn.running_mean, model.bn.running_var = torch.stack(after).mean(0).unbind()
        model.bn.num_batches_tracked += 1
        assert x.grad is not None
        found |= {f"output {seed}": whole.detach().numpy(), f"input gradient {seed}": x.grad.numpy()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[f"gradient of {name}"] = parameter.grad.numpy()
    model.eval()
    found["evaluated"] = model(draw(spatial, 2).flatten(0, 1)).detach().numpy()
    found |= {name: buffer.numpy() for name, buffer in model.named_buffers()}
    return found


def all_layers(group: ProcessGroup | None) -> list[dict[str, NDArray[Any]]]:
    return [layer_on_rows(group, spatial, sync) for spatial, sync in CASES]


def of_rank(name: str, value: NDArray[Any], rank: int, world: int) -> NDArray[Any]:
    """The part of a global result that a rank should hold."""
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    if name == "evaluated":
        return value.reshape(VIEWS, BATCH, *value.shape[1:])[:, rows].reshape(-1, *value.shape[1:])
    if name.startswith(("output", "input")):
        return value[:, rows]
    return value


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_T1_batchnorm_equals_torch_on_the_rows_of_each_group(
    run_on_ranks: Callable[..., list[Any]], world: int
) -> None:
    expected = [layer_of_torch(spatial, sync) for spatial, sync in CASES]
    for rank, cases in enumerate(run_on_ranks(world, all_layers)):
        for case, wanted in zip(cases, expected, strict=True):
            assert case.keys() == wanted.keys()
            for name, value in wanted.items():
                found = of_rank(name, value, rank, world)
                # float64 of values near 30 whose cubes' gradients are summed over 288 entries.
                np.testing.assert_allclose(case[name], found, rtol=1e-10, atol=1e-9, err_msg=name)


def bfloat16_layer(group: ProcessGroup | None) -> tuple[str, NDArray[Any], NDArray[Any], NDArray[Any]]:
    rows = BATCH // world_size(group)
    mine = slice(rank_in(group) * rows, (rank_in(group) + 1) * rows)
    model = OneLayer((3, 2))
    convert_batchnorm(model, rank_rows=rows, sync_samples=None, group=group)
    x = (draw((3, 2), 0) - 30)[:, mine].flatten(0, 1).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x.contiguous(memory_format=torch.channels_last))
    (y.float().pow(2).sum() * world_size(group)).backward()
    assert isinstance(model.bn, CoupledBatchNorm) and x.grad is not None
    running = torch.stack([model.bn.running_mean, model.bn.running_var])
    form = f"{y.dtype} {x.grad.dtype} {running.dtype} {y.is_contiguous(memory_format=torch.channels_last)}"
    gradient = (x.grad / world_size(group)).float()
    return form, y.detach().float().numpy(), gradient.numpy(), running.numpy()


def test_bfloat16_input_has_float32_statistics_on_every_number_of_ranks(
    run_on_ranks: Callable[..., list[Any]],
) -> None:
    form, y, gradient, running = bfloat16_layer(None)
    assert form == "torch.bfloat16 torch.bfloat16 torch.float32 True"
    for rank, (rank_form, rank_y, rank_gradient, rank_running) in enumerate(run_on_ranks(2, bfloat16_layer)):
        assert rank_form == form
        rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
        shape = (VIEWS, BATCH, CHANNELS, 3, 2)
        # Equal up to the rounding of bfloat16: 8 bits of values up to 4.
        mine = y.reshape(shape)[:, rows].reshape(rank_y.shape)
        np.testing.assert_allclose(rank_y, mine, rtol=0, atol=0.03)
        np.testing.assert_allclose(
            rank_gradient, gradient.reshape(shape)[:, rows].reshape(rank_y.shape), rtol=0, atol=0.05
        )
        np.testing.assert_allclose(rank_running, running, rtol=1e-5, atol=1e-6)


def test_conversion_keeps_names_and_the_very_tensors() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    model.eval()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    convert_batchnorm(model, rank_rows=4, sync_samples=None, group=None)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert isinstance(model[1], CoupledBatchNorm) and not model[1].training
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_channels_last_stays_channels_last_in_groups_within_a_rank() -> None:
    model = OneLayer((3, 2))
    convert_batchnorm(model, rank_rows=BATCH, sync_samples=4, group=None)
    x = torch.randn(VIEWS * BATCH, CHANNELS, 3, 2).to(memory_format=torch.channels_last)
    assert model(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("sync", [3, 5, 32, 12])
def test_groups_that_do_not_fit_are_refused(sync: int) -> None:
    with pytest.raises(UserError, match=f"sync_bn_samples {sync} does not fit 1 ranks of 16"):
        convert_batchnorm(OneLayer(()), rank_rows=16, sync_samples=sync, group=None)


class WithActivation(nn.BatchNorm2d):
    """A layer of another library: what it adds would be lost."""


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (WithActivation(3), "a WithActivation, .* takes statistics in its own way"),
        (nn.LazyBatchNorm2d(), "a LazyBatchNorm2d, .* takes statistics in its own way"),
        (nn.InstanceNorm2d(3, track_running_stats=True), "a InstanceNorm2d, .* in its own way"),
        (nn.BatchNorm2d(3, track_running_stats=False), "keeps no running statistics"),
        (nn.BatchNorm2d(3, momentum=None), "has no momentum"),
    ],
)
def test_a_norm_with_batch_statistics_that_cannot_be_coupled_is_named(layer: nn.Module, why: str) -> None:
    with pytest.raises(UserError, match=rf"^1\.0, {why}" if why.startswith("a ") else rf"^1\.0, .* it {why}"):
        convert_batchnorm(
            nn.Sequential(nn.Identity(), nn.Sequential(layer)), rank_rows=4, sync_samples=None, group=None
        )


def test_every_batchnorm_of_torch_is_converted_and_norms_within_a_sample_are_left() -> None:
    within = [nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm3d(3)]
    over = [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3)]
    model = nn.Sequential(*within, *over)
    convert_batchnorm(model, rank_rows=4, sync_samples=None, group=None)
    assert [isinstance(layer, CoupledBatchNorm) for layer in model] == [False] * 3 + [True] * 4
