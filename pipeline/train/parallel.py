"""Where a method meets its ranks. Models and methods know nothing of it.

The order is fixed: placement, BatchNorm over the coupled batch, compile, then the strategy.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cluster.torch_dist import World
from pipeline.recipe import Train
from pipeline.train.batchnorm import convert_batchnorm

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


def parallelize(method: nn.Module, *, train: Train, rank_rows: int, world: World) -> nn.Module:
    """Make a method ready to be trained by all ranks together; called on every rank at the same point.

    Args:
        method: on the CPU, equal on every rank; changed in place, its tensors keep their names.
        rank_rows: samples of the coupled batch on each rank.

    Returns:
        What to call instead of the method. Its backward leaves gradients averaged over the ranks.

    Raises:
        UserError: if the groups of BatchNorm do not fit the ranks.
    """
    method.to(device=world.device, dtype=DTYPES[train.precision])
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    convert_batchnorm(method, rank_rows=rank_rows, sync_samples=train.sync_bn_samples, group=world.group)
    if train.compile:
        method.compile()
    if world.group is None:
        return method
    return DistributedDataParallel(
        method,
        process_group=world.group,
        broadcast_buffers=False,  # running statistics are equal already
        gradient_as_bucket_view=True,
        # DDP regroups its buckets after the first step, and a sum over ranks is rounded by its place in a
        # bucket: a resumed run would differ in the last bit. Looking for unused parameters, it does not.
        find_unused_parameters=world.device.type == "cpu",
    )


def without_averaging(engine: nn.Module, *, unless: bool) -> AbstractContextManager[None]:
    """Within it, gradients only add up on each rank: for all micro-batches of a step but the last."""
    if unless or not isinstance(engine, DistributedDataParallel):
        return contextlib.nullcontext()
    return engine.no_sync()


def arithmetic(train: Train, device: torch.device) -> AbstractContextManager[None]:
    """The autocast of the recipe's precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=train.precision == "bf16")
