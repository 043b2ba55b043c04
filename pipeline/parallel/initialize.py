"""Reproducible weights: each parameter is drawn whole from a generator keyed by (seed, name), then sliced.

Nothing depends on the order of construction, on the global random state or on the rank, so a trunk built on
`meta`, sharded, and filled piece by piece equals one built at once.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from pipeline.distributed.sharded import clean_name, copy_own_piece, whole_shape
from pipeline.methods.build import assemble_method
from pipeline.methods.method import Method
from pipeline.models.heads import Prototypes
from pipeline.models.resnet import Basic, Bottleneck
from pipeline.parallel.batchnorm import CoupledBatchNorm
from pipeline.recipe.pretrain import PretrainRecipe

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, CoupledBatchNorm)


def initialize(module: nn.Module, *, seed: int) -> None:
    """Fill every parameter and every buffer of `module`, in place; of a sharded one, this rank's pieces.

    Convolutions are drawn from He et al.'s normal by fan-out (as RegNet's authors do), linear layers from
    torch's uniform by fan-in, prototypes uniformly on the sphere. BatchNorm starts as the identity: the last
    gamma of a block is 1, unless the trunk asks for 0, because LARC, and LARS where it scales norms too,
    have no trust ratio for a weight of length 0. Buffers of other modules (queues) start at zero.

    Raises:
        TypeError: if a module holds parameters of a kind that has no rule here.
    """
    for name, child in module.named_modules():
        if next(child.parameters(recurse=False), None) is not None or isinstance(child, _NORMS):
            _fill(child, _Draw(seed, clean_name(name)))
        else:
            for buffer in child.buffers(recurse=False):
                buffer.zero_()
    for block in module.modules():
        if isinstance(block, Basic | Bottleneck) and block.zero_init:
            nn.init.zeros_(block.last_norm.weight)  # type: ignore[arg-type]


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
def _fill(module: nn.Module, draw: _Draw) -> None:
    match module:
        case nn.Conv2d():
            height, width = module.kernel_size
            deviation = math.sqrt(2 / (height * width * module.out_channels))
            copy_own_piece(module.weight, draw.normal("weight", module.weight) * deviation)
            if module.bias is not None:
                module.bias.zero_()
        case nn.Linear():
            bound = 1 / math.sqrt(module.in_features)
            copy_own_piece(module.weight, draw.uniform("weight", module.weight, bound))
            if module.bias is not None:
                copy_own_piece(module.bias, draw.uniform("bias", module.bias, bound))
        case nn.BatchNorm1d() | nn.BatchNorm2d() | CoupledBatchNorm():
            if module.weight is not None:
                copy_own_piece(module.weight, torch.ones(whole_shape(module.weight)))
                module.bias.zero_()
            for name, buffer in module.named_buffers(recurse=False):
                buffer.fill_(1 if name == "running_var" else 0)
        case Prototypes():
            copy_own_piece(module.weight, F.normalize(draw.normal("weight", module.weight), dim=1))
        case _:
            raise TypeError(f"no rule to initialise a {type(module).__name__}")


def build_method(recipe: PretrainRecipe, *, total_steps: int, group: ProcessGroup | None) -> Method:
    """The recipe's method on its trunk, in float32 on the CPU, with weights drawn from the recipe's seed.

    The weights are equal on every rank, whatever the global random state.

    Args:
        total_steps: of the whole run, for what changes along it.

    Raises:
        UserError: as `assemble_method` does.
    """
    method = assemble_method(recipe, total_steps=total_steps, group=group)
    initialize(method, seed=recipe.seed)
    return method
