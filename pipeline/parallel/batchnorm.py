"""BatchNorm over contiguous rows of the coupled batch, the same for every number of ranks, on CPU and GPU.

Ioffe & Szegedy, 2015 (https://arxiv.org/abs/1502.03167). torch's SyncBatchNorm runs on GPUs only, and its
groups are ranks; here a group is a number of samples, so that a run may change its number of ranks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from cluster.errors import UserError
from pipeline.distributed.collectives import world_size

_TORCH_BATCH_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}


def convert_batchnorm(
    module: nn.Module, *, rank_rows: int, sync_samples: int | None, group: ProcessGroup | None
) -> None:
    """Replace every BatchNorm of torch's below `module`, in place; names and tensors stay.

    Layers without batch statistics (LayerNorm, GroupNorm, InstanceNorm that tracks nothing) need no other.

    Call it on every rank at the same point: it may create process groups.

    Args:
        module: not itself a BatchNorm.
        rank_rows: samples of the coupled batch on each rank. What reaches a layer in training is
            (views * rank_rows, ...), view-major.
        sync_samples: contiguous samples of the coupled batch that share statistics, over all their views
            in one pass; None for the whole batch.
        group: ranks that share the coupled batch; None for one process.

    Raises:
        UserError: if groups of `sync_samples` do not fit the batch and the ranks, or a layer takes statistics
            of a batch in a way that cannot be coupled.
    """
    ranks = world_size(group)
    samples = synchronised_samples(sync_samples, ranks=ranks, rank_rows=rank_rows)
    sharing = _sharing_ranks(group, max(1, samples // rank_rows))
    groups_per_rank = max(1, rank_rows // samples)
    partial = samples < rank_rows * ranks
    for path, parent in list(module.named_modules()):
        for name, child in list(parent.named_children()):
            _refuse_uncoupled(child, f"{path}.{name}".removeprefix("."))
            if type(child) in _TORCH_BATCH_NORMS:
                layer = CoupledBatchNorm(
                    cast(_BatchNorm, child),
                    rank_rows=rank_rows,
                    groups_per_rank=groups_per_rank,
                    sharing=sharing,
                    everyone=group if partial else None,
                )
                parent.add_module(name, layer)


def _refuse_uncoupled(layer: nn.Module, name: str) -> None:
    """Raise UserError if a layer would take statistics of this rank's rows alone."""
    kind = type(layer)
    if kind in _TORCH_BATCH_NORMS:
        if getattr(layer, "running_mean", None) is None:
            wrong = "keeps no running statistics: leave track_running_stats on"
        elif getattr(layer, "momentum", None) is None:
            # A cumulative average depends on when the run was started.
            wrong = "has no momentum: give it one"
        else:
            return
    elif isinstance(layer, _BatchNorm) or getattr(layer, "running_mean", None) is not None:
        wrong = "takes statistics in its own way: use torch's BatchNorm, or a norm within each sample"
    else:
        return
    raise UserError(f"{name}, a {kind.__name__}, cannot be synchronised over the ranks, for it {wrong}")


def synchronised_samples(sync_samples: int | None, *, ranks: int, rank_rows: int) -> int:
    """How many samples share statistics; the arguments are those of `convert_batchnorm`.

    Raises:
        UserError: if groups of so many do not fit the batch and the ranks.
    """
    samples = rank_rows * ranks if sync_samples is None else sync_samples
    if (rank_rows * ranks) % samples or (samples % rank_rows and rank_rows % samples):
        raise UserError(
            f"train.sync_bn_samples {samples} does not fit {ranks} ranks of {rank_rows} samples: use a "
            f"divisor of the batch of {rank_rows * ranks} that divides {rank_rows} or is a multiple of it"
        )
    return samples


class CoupledBatchNorm(nn.Module):
    """One layer; made by `convert_batchnorm`.

    Statistics are in float32, or in float64 for float64 input. The running statistics follow the mean over
    all groups of the coupled batch, and are equal on every rank.

    Args:
        source: the layer whose parameters and buffers are taken over.
        rank_rows: samples per rank.
        groups_per_rank: groups of samples within this rank; 1 if a group spans ranks.
        sharing: the ranks of this rank's one group; None if it is alone.
        everyone: the ranks over which running statistics are averaged; None if all have the same.

    Attributes:
        keep_statistics: while a forward pass is done again, the running statistics stay as they are.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        source: _BatchNorm,
        *,
        rank_rows: int,
        groups_per_rank: int,
        sharing: ProcessGroup | None,
        everyone: ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.weight, self.bias = source.weight, source.bias  # none, if it neither scales nor shifts
        for name, buffer in source.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.momentum = cast(float, source.momentum)
        self.eps = source.eps
        self.rank_rows = rank_rows
        self.groups_per_rank = groups_per_rank
        self.sharing = sharing
        self.everyone = everyone
        self.keep_statistics = False
        self._normalise_over_ranks = _normalise_over_ranks
        self.train(source.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._native(x, self.running_mean, self.running_var, momentum=0.0)
        if self.sharing is None and self.everyone is None and self.groups_per_rank == 1:
            mean, variance = self.running_mean, self.running_var
            if self.keep_statistics:  # autograd expects the same number of tensors again
                mean, variance = mean.clone(), variance.clone()
            else:
                self.num_batches_tracked.add_(1)
            return self._native(x, mean, variance, momentum=self.momentum)
        if self.groups_per_rank == 1:
            y, mean, variance = self._group(x)
        else:
            y, mean, variance = self._groups_of_this_rank(x)
        if not self.keep_statistics:
            self._update_running(mean, variance)
        return y

    def _native(self, x: Tensor, mean: Tensor, variance: Tensor, *, momentum: float) -> Tensor:
        return F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, momentum, self.eps)

    def _groups_of_this_rank(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = self.groups_per_rank
        samples = self.rank_rows // count
        # View-major: the pieces of group g are every count-th from the g-th on.
        pieces = torch.split(x, samples)
        groups = [self._group(torch.cat(pieces[number::count])) for number in range(count)]
        normalised = [torch.split(y, samples) for y, _, _ in groups]
        mean = torch.stack([mean for _, mean, _ in groups]).mean(0)
        variance = torch.stack([variance for _, _, variance in groups]).mean(0)
        return torch.cat([piece for view in zip(*normalised, strict=True) for piece in view]), mean, variance

    def _group(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised rows of one group, with its mean and its unbiased variance."""
        if self.sharing is not None:
            return self._normalise_over_ranks(x, self.weight, self.bias, self.eps, self.sharing)
        # With a momentum of 1 the "running" statistics are this group's own.
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        return self._native(x, mean, variance, momentum=1.0), mean, variance

    def stay_uncompiled(self) -> None:
        """torch.compile does not follow collectives through an autograd function: it is to stop before, and
        go on after.
        """
        self._normalise_over_ranks = torch.compiler.disable(_normalise_over_ranks)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        if self.everyone is not None:
            both = torch.stack([mean, variance])
            dist.all_reduce(both, group=self.everyone)
            mean, variance = (both / world_size(self.everyone)).unbind()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(1)


def _normalise_over_ranks(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    if weight is None or bias is None:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = torch.ones(x.shape[1], dtype=wide, device=x.device)
        bias = torch.zeros_like(weight)
    result: tuple[Tensor, Tensor, Tensor] = _NormaliseOverRanks.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, eps, group
    )
    return result


class _NormaliseOverRanks(torch.autograd.Function):
    """Normalise by the statistics of all ranks' rows; every rank holds equally many.

    torch's fused kernels pass over the rows; between them the ranks exchange two numbers per channel.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 -- autograd passes by position
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        scratch = torch.zeros(2, x.shape[1], dtype=wide, device=x.device)
        mean, variance = torch.batch_norm_update_stats(x, scratch[0], scratch[1], 1.0)
        # In float64 the mean of squares keeps its digits when it is cancelled against the square of the mean.
        mean, variance = mean.double(), variance.double()
        moments = torch.stack([mean, variance + mean.square()])
        dist.all_reduce(moments, group=group)
        moments /= dist.get_world_size(group)
        mean = moments[0]
        variance = (moments[1] - mean.square()).clamp_(min=0)
        count = x.numel() // x.shape[1] * dist.get_world_size(group)
        ctx.group, ctx.eps, ctx.count = group, eps, count
        wide_mean, wide_variance = mean.to(wide), variance.to(wide)
        ctx.save_for_backward(x, weight, wide_mean, wide_variance)
        y = F.batch_norm(x, wide_mean, wide_variance, weight, bias, False, 0.0, eps)
        unbiased = (variance * (count / (count - 1))).to(wide)
        ctx.mark_non_differentiable(wide_mean, unbiased)
        return y, wide_mean, unbiased

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        # As if the statistics were constants; the sums of gradient and of gradient * normalised x come along.
        plain, weight_gradient, bias_gradient = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([bias_gradient, weight_gradient])
        dist.all_reduce(sums, group=ctx.group)
        # What flows through them is - weight / std * (mean gradient + normalised x * mean of their product).
        inverse = (variance + ctx.eps).rsqrt()
        share = weight * inverse / ctx.count
        slope = -share * inverse * sums[1]
        offset = -share * sums[0] - slope * mean
        shape = (1, -1) + (1,) * (x.ndim - 2)
        plain += (x * slope.view(shape) + offset.view(shape)).to(plain.dtype)
        return plain, weight_gradient, bias_gradient, None, None


def _sharing_ranks(group: ProcessGroup | None, ranks_per_group: int) -> ProcessGroup | None:
    """The group of this rank's neighbours; None if it shares with none."""
    if group is None or ranks_per_group == 1:
        return None
    members = dist.get_process_group_ranks(group)
    if ranks_per_group == len(members):
        return group
    mine: ProcessGroup | None = None
    for start in range(0, len(members), ranks_per_group):
        neighbours = members[start : start + ranks_per_group]
        created = dist.new_group(neighbours)
        if dist.get_rank() in neighbours:
            mine = created
    return mine
