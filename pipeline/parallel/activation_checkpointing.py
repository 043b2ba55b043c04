"""Activation checkpointing: runs of blocks whose inside is computed again in the backward pass.

Chen et al., 2016 (https://arxiv.org/abs/1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from cluster.errors import UserError
from pipeline.parallel.batchnorm import CoupledBatchNorm
from pipeline.parallel.units import named_stages

Checkpointing = Literal["none", "full"] | tuple[tuple[int, ...], ...]


def checkpoint_activations(
    trunk: nn.Module, checkpointing: Checkpointing, *, reentrant: bool = False
) -> None:
    """Let a trunk forget what is inside of runs of its blocks, in place; names stay.

    Every run keeps its input only. Statistics of BatchNorm are updated the first time, not again.

    Args:
        checkpointing: "full" makes every block a run of its own; else for each stage the numbers, ascending,
            of the blocks that end a run, counted from 1. Blocks after the last one are not recomputed.
        reentrant: torch's older way, with a backward pass of its own for each run. FairScale knows no other;
            FSDP2's gradients came out wrong with it in one backward pass for several crop sizes (T1).

    Raises:
        UserError: if the trunk declares no blocks, if one draws at random, or if the numbers do not fit them.
    """
    if checkpointing == "none":
        return
    stages = named_stages(trunk, key="train.activation_checkpointing", off="none")
    depths = [len(list(stage)) for stage in stages]
    if checkpointing == "full":
        checkpointing = tuple(tuple(range(1, depth + 1)) for depth in depths)
    if len(checkpointing) != len(stages) or any(
        list(ends) != sorted({end for end in ends if end <= depth})
        for ends, depth in zip(checkpointing, depths, strict=True)
    ):
        raise UserError(
            f"train.activation_checkpointing {[list(ends) for ends in checkpointing]} does not fit the "
            f"trunk, whose stages have {', '.join(map(str, depths))} blocks: give one list per stage, of "
            "ascending numbers"
        )
    sequences = []
    for stage, ends in zip(stages, checkpointing, strict=True):
        if not ends:
            continue
        blocks = list(stage)[: ends[-1]]
        _refuse_randomness(blocks)
        if isinstance(stage, nn.Sequential):
            sequences.append(_Recomputed(stage, ends, reentrant=reentrant))
            stage.forward = sequences[-1]  # type: ignore[method-assign]
        elif len(ends) == len(blocks):
            for block in blocks:
                block.forward = partial(_recompute, block.forward, [block], reentrant)
        else:
            raise UserError(
                f"train.activation_checkpointing {list(ends)} has runs of several blocks, and "
                f"{type(trunk).__name__} calls its blocks one by one: use full, or let it "
                "declare an nn.Sequential that it calls"
            )
    _refuse_if_not_called(trunk, sequences)


class _Recomputed:
    """The forward pass of a stage that is called as a whole, in runs of blocks."""

    def __init__(self, stage: nn.Sequential, ends: Sequence[int], *, reentrant: bool) -> None:
        self._stage = stage
        self._ends = ends
        self._reentrant = reentrant
        self.called = False

    def __call__(self, x: Tensor) -> Tensor:
        self.called = True
        blocks = list(self._stage)
        for start, end in pairwise([0, *self._ends]):
            x = _recompute(partial(_through, blocks[start:end]), blocks[start:end], self._reentrant, x)
        return _through(blocks[self._ends[-1] :], x)


def _through(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def _recompute(
    function: Callable[..., Any], blocks: Sequence[nn.Module], reentrant: bool, *inputs: Any, **named: Any
) -> Any:
    """`function(*inputs, **named)`, which calls the blocks, now and in the backward pass."""
    run = _RecomputedCall(function, blocks)
    # Nothing here is random.
    return checkpoint(run, *inputs, use_reentrant=reentrant, preserve_rng_state=False, **named)


class _RecomputedCall:
    """Blocks as one function of one forward pass; what it is called for again is for the backward pass."""

    def __init__(self, function: Callable[..., Any], blocks: Sequence[nn.Module]) -> None:
        self._function = function
        self._blocks = blocks
        self._again = False

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        layers = [
            part for block in self._blocks for part in block.modules() if isinstance(part, CoupledBatchNorm)
        ]
        for layer in layers:
            layer.keep_statistics = self._again
        try:
            return self._function(*inputs, **named)
        finally:
            for layer in layers:
                layer.keep_statistics = False
            self._again = True


def _refuse_randomness(blocks: Iterable[nn.Module]) -> None:
    for block in blocks:
        for name, part in block.named_modules():
            if isinstance(part, _DropoutNd) and part.p > 0:
                raise UserError(
                    f"train.activation_checkpointing recomputes {name} of a {type(block).__name__}, a "
                    f"{type(part).__name__} that would draw anew: set its p to 0, or "
                    "train.activation_checkpointing: none"
                )


def _refuse_if_not_called(trunk: nn.Module, sequences: Sequence[_Recomputed]) -> None:
    """After the first forward pass: whether the stages were called, and not their blocks instead."""

    def look(*_: Any) -> None:
        hook.remove()
        if not all(sequence.called for sequence in sequences):
            raise UserError(
                f"train.activation_checkpointing had no effect: {type(trunk).__name__} declares an "
                "nn.Sequential in blocks_by_stage and calls the blocks in it one by one; let it call "
                "the whole, or declare a list"
            )

    hook = trunk.register_forward_hook(look)
