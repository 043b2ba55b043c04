"""Where a method meets its ranks. Models and methods know nothing of it.

The order is fixed: placement, BatchNorm over the coupled batch, compile, then the strategy.
"""

import contextlib
import warnings
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket, ProcessGroup  # type: ignore[attr-defined]
from torch.futures import Future
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
        compile_blocks(method)
    if world.group is None:
        return method
    with warnings.catch_warnings():
        # The argument has a new name from torch 2.13 on, which 2.8 does not know.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        engine = DistributedDataParallel(
            method,
            process_group=world.group,
            broadcast_buffers=False,  # running statistics are equal already
            gradient_as_bucket_view=True,
        )
    if world.device.type == "cpu":
        engine.register_comm_hook(world.group, mean_in_rank_order)
    return engine


def compile_blocks(method: nn.Module) -> None:
    """torch.compile of every residual block: blocks of one stage share their code, so it is compiled once."""
    for stage in method.modules():
        if isinstance(stage, nn.Sequential):
            for block in stage:
                if next(block.children(), None) is not None:
                    block.compile()


def mean_in_rank_order(group: ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
    """Average a bucket of gradients over the ranks, with rounding that depends on the values alone.

    gloo's all-reduce of three ranks or more adds in an order that depends on the place in the buffer, and DDP
    regroups its buckets after the first step: a resumed run would differ in the last bit (T3).
    """
    own = bucket.buffer()
    pieces = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    work = dist.all_gather(pieces, own, group=group, async_op=True)

    def add(_: Future[list[Tensor]]) -> Tensor:
        for piece in pieces[1:]:
            pieces[0].add_(piece)
        return pieces[0].div_(len(pieces))

    future: Future[Tensor] = work.get_future().then(add)
    return future


def without_averaging(engine: nn.Module, *, unless: bool) -> AbstractContextManager[None]:
    """Within it, gradients only add up on each rank: for all micro-batches of a step but the last."""
    if unless or not isinstance(engine, DistributedDataParallel):
        return contextlib.nullcontext()
    return engine.no_sync()


def arithmetic(train: Train, device: torch.device) -> AbstractContextManager[None]:
    """The autocast of the recipe's precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=train.precision == "bf16")
