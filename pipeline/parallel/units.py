"""What is recomputed, compiled and gathered at a time: the blocks of a trunk, and modules apart from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from cluster.errors import UserError
from pipeline.models.trunk import declared


@runtime_checkable
class OwnUnit(Protocol):
    """A module that is sharded apart from all others: gathered in the precision that it is kept in, for it
    computes outside of autocast, and, where pieces are not rows, whole for the method's `after_step`.
    """

    own_unit: bool


@runtime_checkable
class Table(Protocol):
    """A module with a buffer of rows which are too many for one rank: each holds a chunk of them."""

    laid_over_ranks: bool
    rows: Tensor


def named_stages(trunk: nn.Module, *, key: str, off: str) -> Sequence[Iterable[nn.Module]]:
    """The blocks of a trunk, by stage.

    Args:
        key: of the recipe: who asks for them.
        off: the value of `key` that does without.

    Raises:
        UserError: if the trunk declares none.
    """
    stages = declared(trunk).blocks_by_stage()
    if not any(True for stage in stages for _ in stage):
        raise UserError(
            f"{key} works on the blocks of a trunk, and {type(trunk).__name__} declares none in "
            f"blocks_by_stage: set {key}: {off}"
        )
    return stages


def named_blocks(trunk: nn.Module, *, key: str, off: str) -> list[nn.Module]:
    """The same blocks, in one list."""
    return [block for stage in named_stages(trunk, key=key, off=off) for block in stage]


def own_units(method: nn.Module) -> list[nn.Module]:
    """Modules that are sharded apart from all others."""
    return [module for module in method.modules() if isinstance(module, OwnUnit)]
