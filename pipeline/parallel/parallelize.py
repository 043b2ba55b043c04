"""Where a method meets its ranks. Models and methods know nothing of it.

The order is fixed: BatchNorm over the coupled batch, compile, activation checkpointing of what is compiled,
then the strategy, which gives every rank its tensors and draws their values.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from cluster.rank.torch_dist import World
from pipeline.distributed.rows import own_rows
from pipeline.methods.method import Method
from pipeline.models.trunk import arrange_inputs, arrange_weights, choose_layout
from pipeline.parallel.activation_checkpointing import checkpoint_activations
from pipeline.parallel.batchnorm import CoupledBatchNorm, convert_batchnorm
from pipeline.parallel.ddp import ReplicatedEngine
from pipeline.parallel.engine import Engine
from pipeline.parallel.fairscale import FairScaleEngine
from pipeline.parallel.fsdp2 import ShardedEngine
from pipeline.parallel.initialize import initialize
from pipeline.parallel.precision import COMPUTE_DTYPES, DTYPES
from pipeline.parallel.units import Table, named_blocks
from pipeline.recipe.pretrain import Train

# Blocks of every kind and crop size are compiled apart: torch gives up after 8 of one function.
_COMPILATIONS = 64


def parallelize(method: Method, *, train: Train, seed: int, rank_rows: int, world: World) -> Engine:
    """Make a method ready to be trained by all ranks together; called on every rank at the same point.

    Args:
        method: on `meta`; changed in place, its tensors keep their names.
        seed: of the weights: the same ones for every strategy and number of ranks.
        rank_rows: samples of the coupled batch on each rank.

    Raises:
        UserError: if the groups of BatchNorm, the sharding or the checkpointing do not fit, or a trunk does
            not declare what they need.
    """
    method.to(dtype=DTYPES[train.precision])
    _lay_tables(method, world)
    convert_batchnorm(method, rank_rows=rank_rows, sync_samples=train.sync_bn_samples, group=world.group)
    for trunk in method.trunks().values():
        choose_layout(trunk, channels_last=train.channels_last)
        arrange_inputs(trunk)
        if train.compile:
            compile_blocks(trunk)
        if any(parameter.requires_grad for parameter in trunk.parameters()):
            checkpoint_activations(
                trunk, train.activation_checkpointing, reentrant=train.strategy == "fairscale"
            )
    if world.group is not None and train.strategy == "fsdp2":
        compute = COMPUTE_DTYPES.get(train.precision)
        return ShardedEngine(method, train=train, seed=seed, compute=compute, world=world)
    if world.group is not None and train.strategy == "fairscale":
        return FairScaleEngine(method, seed=seed, world=world)
    method.to_empty(device=world.device)
    for trunk in method.trunks().values():
        arrange_weights(trunk)
    initialize(method, seed=seed)
    return ReplicatedEngine(method, world=world)


def _lay_tables(method: Method, world: World) -> None:
    """Leave this rank its chunk of every table of rows."""
    for module in method.modules():
        if isinstance(module, Table) and world.group is not None:
            whole = module.rows
            here = own_rows(len(whole), world.group)
            mesh = init_device_mesh(world.device.type, (world.size,))
            module.rows = DTensor.from_local(
                whole[here.start : here.stop],
                mesh,
                [Shard(0)],
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )


def compile_blocks(trunk: nn.Module) -> None:
    """torch.compile of every block: blocks of one stage share their code, so it is compiled once.

    Raises:
        UserError: if the trunk declares no blocks.
    """
    import torch._dynamo  # a second and more, which only they spend who compile

    torch._dynamo.config.recompile_limit = _COMPILATIONS
    for module in trunk.modules():
        if isinstance(module, CoupledBatchNorm):
            module.stay_uncompiled()
    for block in named_blocks(trunk, key="train.compile", off="false"):
        block.forward = torch.compile(block.forward, dynamic=False)
