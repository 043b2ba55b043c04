"""Activation checkpointing: runs of blocks whose inside is computed again in the backward pass.

Chen et al., 2016 (https://arxiv.org/abs/1604.06174).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cluster.errors import UserError
from pipeline.parallel.batchnorm import CoupledBatchNorm

Checkpointing = Literal["none", "full"] | tuple[tuple[int, ...], ...]


def stages(trunk: nn.Module) -> list[nn.Sequential]:
    """The trunk's stages: sequences of residual blocks, from the input to the output."""
    return [child for child in trunk.children() if isinstance(child, nn.Sequential)]


def checkpoint_activations(
    trunk: nn.Module, checkpointing: Checkpointing, *, reentrant: bool = False
) -> None:
    """Let the stages of a trunk forget what is inside of their runs of blocks, in place; names stay.

    Every run keeps its input only. Statistics of BatchNorm are updated the first time, not again.

    Args:
        checkpointing: "full" makes every block a run of its own; else for each stage the numbers, ascending,
            of the blocks that end a run, counted from 1. Blocks after the last one are not recomputed.
        reentrant: torch's older way, with a backward pass of its own for each run. FairScale knows no other;
            FSDP2's gradients came out wrong with it in one backward pass for several crop sizes (T1).

    Raises:
        UserError: if the numbers do not fit the trunk.
    """
    if checkpointing == "none":
        return
    own = stages(trunk)
    if checkpointing == "full":
        checkpointing = tuple(tuple(range(1, len(stage) + 1)) for stage in own)
    depths = [len(stage) for stage in own]
    if len(checkpointing) != len(own) or any(
        list(ends) != sorted({end for end in ends if end <= depth})
        for ends, depth in zip(checkpointing, depths, strict=True)
    ):
        raise UserError(
            f"train.activation_checkpointing {[list(ends) for ends in checkpointing]} does not fit the "
            f"trunk, whose stages have {', '.join(map(str, depths))} blocks: give one list per stage, of "
            "ascending numbers"
        )
    for stage, ends in zip(own, checkpointing, strict=True):
        if ends:
            stage.forward = partial(_forward, stage, ends, reentrant)  # type: ignore[method-assign]


def _forward(stage: nn.Sequential, ends: Sequence[int], reentrant: bool, x: Tensor) -> Tensor:
    blocks = list(stage)
    for start, end in pairwise([0, *ends]):
        run = _Run(blocks[start:end])
        # Nothing here is random.
        x = cast(Tensor, checkpoint(run, x, use_reentrant=reentrant, preserve_rng_state=False))
    for block in blocks[ends[-1] :]:
        x = block(x)
    return x


class _Run:
    """Blocks as one function of one forward pass; what it is called for again is for the backward pass."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._again = False

    def __call__(self, x: Tensor) -> Tensor:
        layers = [
            part for block in self._blocks for part in block.modules() if isinstance(part, CoupledBatchNorm)
        ]
        for layer in layers:
            layer.keep_statistics = self._again
        try:
            for block in self._blocks:
                x = block(x)
        finally:
            for layer in layers:
                layer.keep_statistics = False
            self._again = True
        return x
