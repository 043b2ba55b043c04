"""What a rank holds of a tensor: all of it, or a piece. Sums over the pieces are sums over their ranks.

A piece is the local part of a DTensor (FSDP2), or a plain tensor that is marked as one: an equal share of the
flattened whole, padded with zeros at the end (fairscale).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

_MARK = "share_of_flattened"
# FairScale's, in the names of what it wraps.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_fpw_module)(?:\.|$)")


@dataclass(frozen=True, kw_only=True)
class _Share:
    ranks: ProcessGroup
    shape: torch.Size


def mark_share(parameter: Tensor, *, ranks: ProcessGroup, shape: torch.Size) -> None:
    """Say that a plain parameter is this rank's share of a flattened one of `shape`."""
    setattr(parameter, _MARK, _Share(ranks=ranks, shape=shape))


def is_share(parameter: Tensor) -> bool:
    """Whether `mark_share` was called for it."""
    return hasattr(parameter, _MARK)


def is_piece(parameter: Tensor) -> bool:
    """Whether this rank may hold a part of it only."""
    return isinstance(parameter, DTensor) or is_share(parameter)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, as they lie on this rank, by the names they have without wrappers."""
    for tensors in (module.named_parameters(), module.named_buffers()):
        for name, tensor in tensors:
            yield clean_name(name), tensor


def clean_name(name: str) -> str:
    """The name of a module or a tensor without that of wrappers around it."""
    return _WRAPPERS.sub("", name).removesuffix(".")


def own(tensor: Tensor) -> Tensor:
    """This rank's piece of a DTensor; any other tensor itself. Shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, on every rank, from pieces that lie as those of `parameter`; their ranks call it
    together. What is whole already is the tensor itself.
    """
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    share: _Share | None = getattr(parameter, _MARK, None)
    if share is None or tensor.shape != parameter.shape:
        return tensor
    shares = [torch.empty_like(tensor) for _ in range(dist.get_world_size(share.ranks))]
    dist.all_gather(shares, tensor.detach(), group=share.ranks)
    return torch.cat(shares)[: share.shape.numel()].view(share.shape)


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of the parameter that this rank may hold a piece of."""
    share: _Share | None = getattr(parameter, _MARK, None)
    return parameter.shape if share is None else share.shape


@torch.no_grad()
def copy_own_piece(parameter: Tensor, whole: Tensor, *, into: Tensor | None = None) -> None:
    """Copy this rank's part of a whole tensor into a parameter that may be a piece; no communication.

    Args:
        into: a tensor that lies as the parameter does, instead of the parameter.
    """
    target = parameter if into is None else into
    share: _Share | None = getattr(parameter, _MARK, None)
    if share is not None and target.shape == parameter.shape:  # not a count that the optimizer keeps
        flat = whole.flatten()
        size, rank = target.numel(), dist.get_rank(share.ranks)
        piece = flat[rank * size : (rank + 1) * size]
        target.copy_(F.pad(piece, (0, size - len(piece))))
        return
    if isinstance(target, DTensor):
        mesh, coordinate = target.device_mesh, target.device_mesh.get_coordinate()
        if coordinate is None:
            raise RuntimeError("this rank is not in the mesh of the parameter")
        for dim, placement in enumerate(target.placements):
            if isinstance(placement, Shard):
                parts = whole.chunk(mesh.size(dim), placement.dim)
                number = coordinate[dim]
                whole = parts[number] if number < len(parts) else whole.narrow(placement.dim, 0, 0)
    own(target).copy_(whole)


def norms(tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Lengths of whole tensors, (len(tensors),), equal on every rank that holds a piece.

    All ranks call it together, with the same tensors.

    Args:
        tensors: each laid out over the ranks as the parameter beside it.
    """
    # Where parameters are offloaded, their pieces are in host memory and what is whole is not.
    place = own(tensors[0]).device
    lengths = [each.to(place) for each in torch._foreach_norm([own(tensor) for tensor in tensors])]
    groups = [_ranks(parameter) for parameter in parameters]
    split = [number for number, group in enumerate(groups) if group is not None]
    if split:
        squares = torch.stack([lengths[number] for number in split]).square()
        dist.all_reduce(squares, group=groups[split[0]])
        for number, length in zip(split, squares.sqrt().unbind(), strict=True):
            lengths[number] = length
    return torch.stack(lengths)


def _ranks(parameter: Tensor) -> ProcessGroup | None:
    """The ranks whose pieces make up the whole parameter; None if this rank has all of it."""
    if isinstance(parameter, DTensor):
        for dim, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                return parameter.device_mesh.get_group(dim)
        return None
    share: _Share | None = getattr(parameter, _MARK, None)
    return None if share is None else share.ranks
