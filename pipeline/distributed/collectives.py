"""Collectives that autograd may pass through. Without a group there is one process: they are the identity.

The gradient rule: every rank holds the same loss, that of the coupled batch, and the engine averages
gradients over ranks. The backward of a sum over ranks is then the sum over ranks of the gradient.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def world_size(group: ProcessGroup | None) -> int:
    """Number of ranks of the group; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: ProcessGroup | None) -> int:
    """This process's rank in the group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks, equal on each; differentiable. Without a group, the tensor itself."""
    if group is None:
        return tensor
    return cast(Tensor, _AllReduceSum.apply(tensor, group))  # type: ignore[no-untyped-call]


@torch.no_grad()
def all_reduce_max(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Elementwise maximum over the ranks, without gradient. Without a group, the tensor itself."""
    if group is None:
        return tensor
    result = tensor.clone()
    dist.all_reduce(result, dist.ReduceOp.MAX, group=group)
    return result


@torch.no_grad()
def all_gather_rows(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Rows of every rank, (rows, ...) to (ranks * rows, ...) in rank order, without gradient.

    Every rank must hold equally many rows. Without a group, the tensor itself.
    """
    if group is None:
        return tensor
    pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, tensor.contiguous(), group=group)
    return torch.cat(pieces)


@torch.no_grad()
def average(tensor: Tensor, group: ProcessGroup) -> None:
    """Mean over the ranks, in place. On the CPU its rounding depends on the values, not on their places."""
    if tensor.device.type == "cpu":
        pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(pieces, tensor, group=group)
        tensor.copy_(mean_of(pieces))
    else:
        dist.all_reduce(tensor, dist.ReduceOp.AVG, group=group)


def mean_of(pieces: list[Tensor]) -> Tensor:
    """The mean of tensors of one shape, added up in their order; the first is overwritten with it."""
    for piece in pieces[1:]:
        pieces[0].add_(piece)
    return pieces[0].div_(len(pieces))


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        result = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, group=ctx.group)
        return result, None
