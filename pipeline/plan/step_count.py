"""One training step, counted and not run: its FLOPs, and the bytes that live at its fullest moment.

The recipe's own method, with its layers, checkpointing and optimizer, takes two steps on fake tensors, which
have shapes and no values. So nothing is estimated, and 10 billion parameters take seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from cluster.rank.torch_dist import World
from pipeline.data.modality import modality_of
from pipeline.methods.build import assemble_method
from pipeline.methods.method import HasPositives, Method
from pipeline.models.trunk import declared
from pipeline.parallel.activation_checkpointing import checkpoint_activations
from pipeline.parallel.batchnorm import CoupledBatchNorm, convert_batchnorm
from pipeline.parallel.ddp import ReplicatedEngine
from pipeline.parallel.precision import COMPUTE_DTYPES, DTYPES, arithmetic
from pipeline.parallel.units import OwnUnit
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.optim import build_optimizer

_HERE = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class StepCount:
    """One micro-batch and optimizer step of one rank that holds the whole method.

    Attributes:
        matrices, vectors: parameters of more than one dimension, and of one.
        frozen_matrices, frozen_vectors: those of them that get no gradient, as a teacher's.
        trunk: parameters of the trunk, of both kinds.
        largest_blocks: parameters of the largest two blocks that follow each other, and of the largest.
        forward_flops, flops: per image; a product and its sum are two. Recomputation counts as it is done.
        weights, gradients, optimizer, buffers, activations: bytes at the fullest moment of the step, if
            nothing were sharded; images and what lives for a moment are activations.
        passes: of each trunk.
        batch_norms: calls of BatchNorm layers whose sums go over the ranks.
    """

    matrices: int
    vectors: int
    frozen_matrices: int
    frozen_vectors: int
    trunk: int
    largest_blocks: tuple[int, int]
    forward_flops: float
    flops: float
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    passes: int
    batch_norms: int


def count_step(recipe: PretrainRecipe, *, rank_rows: int) -> StepCount:
    """Count a step of `rank_rows` images per rank.

    Raises:
        UserError: if the recipe's parts do not fit each other.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        method = prepare(recipe, rank_rows=rank_rows)
        frozen = [parameter for parameter in method.parameters() if not parameter.requires_grad]
        forward_flops, flops, passes = measure_flops(method, recipe, rank_rows=rank_rows)
        peak = measure_peak(method, recipe, rank_rows=rank_rows)
    numbers = sum(p.numel() for p in method.parameters())
    # What the optimizer keeps for each parameter, and the gradients, are kept in float32.
    held = {p.dtype: p.element_size() for p in method.parameters()}
    wide = max(held.values()) / min(held.values())
    stages = declared(method.trunk).blocks_by_stage()
    blocks = [block for stage in stages for block in stage] or [method.trunk]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    parameters = list(method.parameters())
    norms = sum(isinstance(module, CoupledBatchNorm) for module in method.modules())
    return StepCount(
        matrices=sum(p.numel() for p in parameters if p.ndim > 1),
        vectors=sum(p.numel() for p in parameters if p.ndim <= 1),
        frozen_matrices=sum(p.numel() for p in frozen if p.ndim > 1),
        frozen_vectors=sum(p.numel() for p in frozen if p.ndim <= 1),
        trunk=sum(p.numel() for p in method.trunk.parameters()),
        largest_blocks=(max(map(sum, pairwise(sizes)), default=sizes[0]), max(sizes)),
        forward_flops=forward_flops / rank_rows,
        flops=flops / rank_rows,
        weights=round(numbers * max(held.values())),
        gradients=round(peak["GRAD"] * wide),
        optimizer=round(peak["OPT"] * wide),
        buffers=peak["BUFFER"],
        activations=_activations(peak),
        passes=passes,
        batch_norms=norms * passes,
    )


def step_counter(recipe: PretrainRecipe, *, near: int) -> Callable[[int], StepCount]:
    """Counts for any number of rows: exact for `near`, else on the line through it and twice as many.

    Both are counted when the first is asked for, which raises what `count_step` does.
    """

    @cache
    def counted() -> tuple[StepCount, float]:
        here = count_step(recipe, rank_rows=near)
        with FakeTensorMode(allow_non_fake_inputs=True):
            twice = measure_peak(prepare(recipe, rank_rows=2 * near), recipe, rank_rows=2 * near)
        return here, (_activations(twice) - here.activations) / near

    def count(rows: int) -> StepCount:
        here, per_row = counted()
        return replace(here, activations=round(here.activations + (rows - near) * per_row))

    return count


def prepare(recipe: PretrainRecipe, *, rank_rows: int) -> Method:
    """The method as one rank would train it alone, without meaningful weights."""
    section = recipe.data.model_copy(update={"batch_size": rank_rows})
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[recipe.train.precision])  # fake tensors cannot be converted in place
    try:
        method = assemble_method(recipe.model_copy(update={"data": section}), total_steps=1, group=None)
    finally:
        torch.set_default_dtype(default)
    compute = COMPUTE_DTYPES.get(recipe.train.precision)
    if recipe.train.strategy == "fsdp2" and compute is not None:  # as FSDP2 gathers them
        for module in method.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                if weight.ndim > 1 and not isinstance(module, OwnUnit):
                    narrow = nn.Parameter(weight.to(compute), requires_grad=weight.requires_grad)
                    setattr(module, name, narrow)
    convert_batchnorm(method, rank_rows=rank_rows, sync_samples=None, group=None)
    for trunk in method.trunks().values():
        if any(parameter.requires_grad for parameter in trunk.parameters()):
            checkpoint_activations(trunk, recipe.train.activation_checkpointing)
    if isinstance(method, HasPositives):
        method.forget_values()
    return method


def measure_flops(method: Method, recipe: PretrainRecipe, *, rank_rows: int) -> tuple[float, float, int]:
    """A micro-batch, on tensors that may be fake: the FLOPs of its forward pass, the FLOPs of all of it, and
    how often the trunk is passed.
    """
    passes: list[nn.Module] = []
    forward: list[float] = []
    counting = method.trunk.register_forward_hook(lambda trunk, *_: passes.append(trunk))
    with FlopCounterMode(display=False, custom_mapping=_BACKWARD) as counter:
        _backward(
            _engine(method),
            recipe,
            rank_rows=rank_rows,
            forward_done=lambda: forward.append(counter.get_total_flops()),
        )
    counting.remove()
    return forward[0], float(counter.get_total_flops()), len(passes)


def measure_peak(method: Method, recipe: PretrainRecipe, *, rank_rows: int) -> dict[str, int]:
    """Bytes by kind at the fullest moment of a step, on tensors that may be fake, of an optimizer that has
    taken one before.
    """
    engine = _engine(method)
    optimizer = build_optimizer(engine, recipe.optim)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for parameter in method.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    update()
    tracker = _PeakTracker()
    method.requires_grad_(True)  # it hooks every parameter; a teacher gets no gradient all the same
    tracker.track_external(method, optimizer)
    with tracker:
        for _ in range(min(2, recipe.train.accumulate)):
            _backward(engine, recipe, rank_rows=rank_rows)
            tracker.reset_mod_stats()  # it keeps those of one pass
        update()
    snapshot = tracker.get_tracker_snapshot("peak")[_HERE]
    return {str(kind).rpartition(".")[2]: size for kind, size in snapshot.items()}


def _engine(method: Method) -> ReplicatedEngine:
    alone = World(rank=0, size=1, local_rank=0, device=_HERE, group=None, control=None)
    return ReplicatedEngine(method, world=alone)


def _backward(
    engine: ReplicatedEngine,
    recipe: PretrainRecipe,
    *,
    rank_rows: int,
    forward_done: Callable[[], None] = lambda: None,
) -> None:
    """A micro-batch; as in training, its inputs and terms live until the end."""
    inputs = modality_of(recipe.data).placeholders(rank_rows, dtype=DTYPES[recipe.train.precision])
    with arithmetic(recipe.train, _HERE):
        terms = engine(inputs, 0)
    forward_done()
    torch.autograd.backward(terms["loss"])


def _activations(peak: dict[str, int]) -> int:
    return peak["ACT"] + peak["TEMP"] + peak["OTH"]


class _PeakTracker(MemTracker):  # type: ignore[no-untyped-call]  # of its base
    """Keeps the fullest moment of all, and not that of each of hundreds of modules, which it would ask at
    each of tens of thousands of operations.
    """

    def _update_peak_stats(self, peak_state: Any) -> None:
        modules, self.memory_tracking = self.memory_tracking, WeakIdKeyDictionary()
        super()._update_peak_stats(peak_state)
        self.memory_tracking = modules


def _convolution_backward(
    gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *others: Any, **_: Any
) -> int:
    """As many as forward for the gradient of the input, and as many for that of the weights: torch's count
    takes a grouped convolution's weight gradient for that of an ungrouped one. The arguments are shapes.
    """
    wanted = others[-1]  # of input, weight and bias
    forward = conv_flop_count(list(x), list(weight), list(gradient))
    return int(forward * (bool(wanted[0]) + bool(wanted[1])))


_BACKWARD = {torch.ops.aten.convolution_backward: _convolution_backward}
