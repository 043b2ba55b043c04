"""Reproducible weights: each parameter is drawn whole from a generator keyed by (seed, name), then sliced.

Nothing depends on the order of construction, on the global random state or on the rank, so a trunk built on
`meta`, sharded, and filled piece by piece equals one built at once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from cluster.errors import UserError
from pipeline.distributed.sharded import clean_name, copy_own_piece, whole_shape
from pipeline.models.trunk import Trunk
from pipeline.parallel.batchnorm import CoupledBatchNorm


@runtime_checkable
class OwnValues(Protocol):
    """A module that says what the parameters and buffers that it holds itself start as."""

    def initial_value(self, name: str, normal: Tensor) -> Tensor:
        """The whole value of the parameter or buffer `name`.

        Args:
            normal: a standard normal draw of its shape, float32, on the CPU: to be scaled, or left aside.
        """
        ...


@runtime_checkable
class OwnDraws(Protocol):
    """A module that fills what it holds itself, of which no rank may have the whole."""

    def draw(self, key: str) -> None:
        """Fill this rank's part with what is a function of the key and of the place in the whole."""
        ...


def initialize(module: nn.Module, *, seed: int) -> None:
    """Fill every parameter and every buffer of `module`, in place; of a sharded one, this rank's pieces.

    Convolutions are drawn from He et al.'s normal by fan-out (as RegNet's authors do), linear layers from
    torch's uniform by fan-in, embeddings from the standard normal, prototypes uniformly on the sphere. Norms
    start as the identity: the last gamma of a block is 1, unless the trunk asks for 0, because LARC, and LARS
    where it scales norms too, have no trust ratio for a weight of length 0. What a module holds itself is
    what it says (`OwnValues`, `OwnDraws`). Buffers of a method that says nothing (queues) start at zero.

    Raises:
        UserError: if there is no rule for what a module holds.
    """
    trunks = [child for child in module.modules() if isinstance(child, Trunk)]
    of_trunks = {part for trunk in trunks for part in trunk.modules()}
    for name, child in module.named_modules():
        path = clean_name(name)
        if child in of_trunks and child._non_persistent_buffers_set:
            raise UserError(
                f"{path} holds {_listed(child._non_persistent_buffers_set)}, which an exported trunk would "
                "lack: register buffers of a trunk with persistent=True"
            )
        _fill(child, _Draw(seed, path), path=path, of_trunk=child in of_trunks)
    for trunk in trunks:
        for norm in trunk.zero_init_norms():
            nn.init.zeros_(cast(Tensor, norm.weight))


class _Draw:
    """Draws keyed by (seed, module, parameter), in float32 on the CPU whatever the parameter's type."""

    def __init__(self, seed: int, module: str) -> None:
        self.key = f"{seed}/{module}"

    def normal(self, parameter: str, like: Tensor) -> Tensor:
        return torch.randn(whole_shape(like), generator=self._generator(parameter))

    def uniform(self, parameter: str, like: Tensor, bound: float) -> Tensor:
        return (2 * torch.rand(whole_shape(like), generator=self._generator(parameter)) - 1) * bound

    def _generator(self, parameter: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.key}.{parameter}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def _fill(module: nn.Module, draw: _Draw, *, path: str, of_trunk: bool) -> None:
    match module:
        case OwnDraws():
            module.draw(draw.key)
        case OwnValues():
            for name, tensor in _held(module).items():
                copy_own_piece(tensor, module.initial_value(name, draw.normal(name, tensor)))
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            deviation = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels))
            copy_own_piece(module.weight, draw.normal("weight", module.weight) * deviation)
            if module.bias is not None:
                module.bias.zero_()
        case nn.Linear():
            bound = 1 / math.sqrt(module.in_features)
            copy_own_piece(module.weight, draw.uniform("weight", module.weight, bound))
            if module.bias is not None:
                copy_own_piece(module.bias, draw.uniform("bias", module.bias, bound))
        case nn.Embedding():
            rows = draw.normal("weight", module.weight)
            if module.padding_idx is not None:
                rows[module.padding_idx] = 0
            copy_own_piece(module.weight, rows)
        case (
            _BatchNorm()
            | CoupledBatchNorm()
            | nn.LayerNorm()
            | nn.GroupNorm()
            | nn.RMSNorm()
            | _InstanceNorm()
        ):
            for name, tensor in _held(module).items():
                one = name in {"weight", "running_var"}
                copy_own_piece(tensor, torch.full(whole_shape(tensor), 1.0 if one else 0.0))
        case _:
            _fill_unknown(module, path=path, of_trunk=of_trunk)


def _fill_unknown(module: nn.Module, *, path: str, of_trunk: bool) -> None:
    """Zeros for buffers of a method; for all else there would have to be a rule."""
    if held := _held(module) if of_trunk else dict(module.named_parameters(recurse=False)):
        raise UserError(
            f"there is no rule to initialise {_listed(held)} of {path or 'a module'}, a "
            f"{type(module).__name__}: give that class a method initial_value(name, normal) "
            "(see pipeline.parallel.initialize.OwnValues)"
        )
    for buffer in module.buffers(recurse=False):
        buffer.zero_()


def _held(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the module itself, not of those in it."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
