"""Parameters, gradients and optimizer state in pieces, one on each rank: torch's FSDP2.

Zhao et al., 2023 (https://arxiv.org/abs/2304.11277); Rajbhandari et al., 2020
(https://arxiv.org/abs/1910.02054).

A block's weights are gathered when it is called, and dropped when it is done. Vectors (biases, and the gains
of BatchNorm) stay whole on every rank, in their own precision: all of them together are smaller than one
matrix, and their gradients are averaged once per step.

Each pass of a trunk (one per crop size) has a backward pass of its own. In one backward pass for all of them
autograd would keep the whole gradient of every block until the last pass has added to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from cluster.errors import UserError
from cluster.rank.torch_dist import World
from pipeline.data.batch import Inputs
from pipeline.distributed.collectives import average
from pipeline.methods.method import Method
from pipeline.parallel.initialize import initialize
from pipeline.parallel.units import named_blocks, own_units
from pipeline.recipe.pretrain import Train


class ShardedEngine:
    """See `pipeline.parallel.engine.Engine`.

    Args:
        method: on `meta`; its pieces are drawn from the seed.
        compute: what matrices are gathered and multiplied in; None for what they are kept in.

    Raises:
        UserError: if `train.shard_ranks` does not divide the ranks, there is no GPU to offload from, or a
            trunk declares no blocks.
    """

    def __init__(
        self, method: Method, *, train: Train, seed: int, compute: torch.dtype | None, world: World
    ) -> None:
        if world.group is None:
            raise ValueError("one rank has nothing to shard")
        if train.cpu_offload and world.device.type == "cpu":
            raise UserError("train.cpu_offload is for GPUs, and this run has none: set it to false")
        self.method = method
        self._group = world.group
        # What came out of a trunk, and what went on from there.
        self._passes: list[tuple[Tensor, Tensor]] = []
        vectors = {parameter for parameter in method.parameters() if parameter.ndim <= 1}
        policy = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=compute and torch.float32, cast_forward_inputs=False
        )
        settings: dict[str, Any] = {
            "mesh": _mesh(world, train.shard_ranks),
            "ignored_params": vectors,
            "offload_policy": CPUOffloadPolicy() if train.cpu_offload else OffloadPolicy(),
        }
        for trunk in method.trunks().values():
            blocks = named_blocks(trunk, key="train.strategy", off="ddp")
            for block in blocks:
                fully_shard(block, mp_policy=policy, **settings)
            for block, following in pairwise(blocks):
                cast(FSDPModule, block).set_modules_to_forward_prefetch([cast(FSDPModule, following)])
            fully_shard(trunk, mp_policy=policy, **settings)
            trunk.register_forward_hook(self._cut)
        for unit in own_units(method):  # in full precision
            fully_shard(unit, **settings)
        fully_shard(method, mp_policy=policy, **settings)
        for module in method.modules():
            # The gloo of torch 2.8 gives the sum where it is asked for the mean.
            if world.device.type == "cpu" and isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        method.to_empty(device=torch.device("cpu") if train.cpu_offload else world.device)
        self._whole = [parameter for parameter in method.parameters() if parameter.ndim <= 1]
        if train.cpu_offload:  # of what is sharded only
            for tensor in (*self._whole, *method.buffers()):
                tensor.data = tensor.data.to(world.device)
        initialize(method, seed=seed)

    def __call__(self, inputs: Inputs, step: int) -> dict[str, Tensor]:
        self._passes.clear()
        return cast(dict[str, Tensor], self.method(inputs, step))

    def backward(self, loss: Tensor) -> None:
        root, passes = cast(FSDPModule, self.method), self._passes
        root.set_is_last_backward(not passes)
        torch.autograd.backward(loss)
        while passes:  # the last one first: its weights were gathered last
            features, cut = passes.pop()
            root.set_is_last_backward(not passes)
            torch.autograd.backward(features, cut.grad)

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        cast(FSDPModule, self.method).set_requires_gradient_sync(last)
        yield
        if last:
            gradients = [parameter.grad for parameter in self._whole if parameter.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            average(flat, self._group)
            for gradient, mean in zip(
                gradients, torch.split(flat, [each.numel() for each in gradients]), strict=True
            ):
                gradient.copy_(mean.view_as(gradient))

    def _cut(self, trunk: nn.Module, images: tuple[Tensor], features: Tensor) -> Tensor:
        """Let the graph of the trunk end here; `backward` goes on from what is left. Every pass is part of
        the loss.
        """
        if not features.requires_grad:
            return features
        cut = features.detach().requires_grad_()
        self._passes.append((features, cut))
        return cut

    def after_step(self, step: int) -> None:
        self.method.after_step(step)

    def param_groups(self) -> list[dict[str, Any]]:
        return self.method.param_groups()


def _mesh(world: World, shard_ranks: int | None) -> Any:
    if shard_ranks is None or shard_ranks == world.size:
        return init_device_mesh(world.device.type, (world.size,))
    if world.size % shard_ranks:
        raise UserError(
            f"train.shard_ranks {shard_ranks} does not divide {world.size} ranks: use the GPUs of a node"
        )
    copies = world.size // shard_ranks
    return init_device_mesh(world.device.type, (copies, shard_ranks), mesh_dim_names=("replicate", "shard"))
