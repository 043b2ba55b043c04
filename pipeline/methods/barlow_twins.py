"""Barlow Twins: two views of an image give the same components of an embedding, and each component its own.

Zbontar et al., 2021 (https://arxiv.org/abs/2103.03230).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from pipeline.data.batch import Inputs
from pipeline.distributed.collectives import all_reduce_sum, world_size
from pipeline.methods.method import Method
from pipeline.methods.param_groups import weights_and_the_rest
from pipeline.methods.two_views import check_two_views, two_views
from pipeline.models.heads import MLP
from pipeline.recipe.method import BarlowTwins

# Entries of the cross-correlation that are held at once: 64 MB in float32.
_BLOCK = 1 << 24


class BarlowTwinsMethod(Method):
    """A trunk, its projector, and the loss of one coupled batch.

    Each view passes the network alone, as in the authors' code: BatchNorm sees one view at a time.

    Args:
        trunk: images to float features (N, feature_dim).
        section: the recipe's `method`.
        views: how many of a sample `Inputs` has, by name: two in all.
        batch_size: samples of the coupled batch, over all ranks; a multiple of the number of ranks.
        group: ranks that share the coupled batch; None for one process.

    Raises:
        UserError: if there are more views, or fewer.
    """

    def __init__(
        self,
        trunk: nn.Module,
        section: BarlowTwins,
        *,
        feature_dim: int,
        views: Mapping[str, int],
        batch_size: int,
        group: ProcessGroup | None,
    ) -> None:
        check_two_views(section.name, views)
        super().__init__()
        self.trunk = trunk
        self.projector = MLP((feature_dim, *section.projector), end="plain")
        self.section = section
        self.group = group
        self.rank_rows = batch_size // world_size(group)

    def forward(self, inputs: Inputs, step: int) -> dict[str, Tensor]:
        """The loss of the coupled batch.

        Args:
            inputs: two views, under one name or two: (rank_rows, 3, size, size) each.
            step: of no meaning here.

        Returns:
            loss: scalar, equal on every rank.
            invariance, redundancy: its two terms before they are weighed.
            embedding: (rank_rows, dim), detached: the first view's.
        """
        z_a, z_b = (self.projector(self.trunk(view)) for view in two_views(inputs, rows=self.rank_rows))
        with torch.autocast(z_a.device.type, enabled=False):
            wide = torch.promote_types(z_a.dtype, torch.float32)
            z_a, z_b = z_a.to(wide), z_b.to(wide)
            terms = barlow_twins_loss(
                z_a,
                z_b,
                off_diagonal_weight=self.section.off_diagonal_weight,
                group=self.group,
            )
        return {
            "loss": terms.loss * self.section.scale,
            "invariance": terms.invariance.detach(),
            "redundancy": terms.redundancy.detach(),
            "embedding": z_a.detach(),
        }

    def after_step(self, step: int) -> None:
        """Nothing is kept between steps."""

    def forget_batches(self) -> None:
        """No batch waits for `after_step`."""

    def trunks(self) -> dict[str, nn.Module]:
        """One, which learns."""
        return {"student": self.trunk}

    def param_groups(self) -> list[dict[str, Any]]:
        """Weights, and apart from them biases and norms, which have a rate of their own in the paper."""
        return weights_and_the_rest(self.parameters())


class BarlowTwinsTerms(NamedTuple):
    """Scalars, equal on every rank: loss = invariance + off_diagonal_weight * redundancy."""

    loss: Tensor
    invariance: Tensor
    redundancy: Tensor


def barlow_twins_loss(
    z_a: Tensor,
    z_b: Tensor,
    *,
    off_diagonal_weight: float,
    epsilon: float = 1e-5,
    group: ProcessGroup | None = None,
) -> BarlowTwinsTerms:
    """Redundancy reduction between two views of one coupled batch.

    Equations 1 and 2 of Zbontar et al., 2021 (https://arxiv.org/abs/2103.03230):
    sum_i (1 - C_ii)^2 + lambda * sum_i sum_{j != i} C_ij^2, where C is the correlation, over the samples of
    the coupled batch, of component i of one view with component j of the other.

    Args:
        z_a, z_b: embeddings of the two views on this rank, (samples, dim), in the same order, float32 or
            wider.
        off_diagonal_weight: lambda; 0.0051 in the paper.
        epsilon: added to the variances, as the authors' BatchNorm does; 0 is the equation as it is printed.
        group: ranks that share the coupled batch, equally many samples on each; None for one process.

    Returns:
        The loss and its two terms.

    Raises:
        ValueError: if the shapes differ or the coupled batch has fewer than 2 samples.
    """
    samples = len(z_a) * world_size(group)
    if z_a.shape != z_b.shape or samples < 2:
        raise ValueError(
            f"embeddings of shapes {tuple(z_a.shape)} and {tuple(z_b.shape)}, {samples} samples in all: "
            "two views of the same two samples or more are needed"
        )
    both = torch.stack([z_a, z_b])
    both = both - all_reduce_sum(both.sum(1, keepdim=True), group) / samples
    variance = all_reduce_sum(both.square().sum(1, keepdim=True), group) / samples
    # Over sqrt(samples), so that the correlation is a plain product.
    a, b = (both / (samples * (variance + epsilon)).sqrt()).unbind()
    diagonal = all_reduce_sum((a * b).sum(0), group)
    invariance = (1 - diagonal).square().sum()
    redundancy = cast(Tensor, _OffDiagonalSquares.apply(a, b, group))  # type: ignore[no-untyped-call]
    return BarlowTwinsTerms(invariance + off_diagonal_weight * redundancy, invariance, redundancy)


class _OffDiagonalSquares(torch.autograd.Function):
    """sum_i sum_{j != i} C_ij^2 of C = sum over ranks of a^T b, without ever holding C.

    C comes in blocks of rows. What the gradient needs of a block, 2 C b^T and 2 C^T a^T, is taken as long as
    the block is there, so nothing is computed or sent twice, and (samples, dim) is all that is kept.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, group: ProcessGroup | None) -> Tensor:
        dim = a.shape[1]
        total = a.new_zeros(())
        gradient_a, gradient_b = torch.empty_like(a), torch.zeros_like(b)
        rows = max(1, _BLOCK // dim)
        for start in range(0, dim, rows):
            end = min(start + rows, dim)
            block = a[:, start:end].T @ b
            if group is not None:
                dist.all_reduce(block, group=group)
            block.diagonal(start).zero_()
            total += block.square().sum()
            gradient_a[:, start:end] = b @ block.T
            gradient_b.addmm_(a[:, start:end], block)
        ctx.group = group
        ctx.save_for_backward(gradient_a, gradient_b)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        # The gradient rule: the backward of the sum over ranks sums the gradient over ranks.
        gradient = 2 * all_reduce_sum(gradient, ctx.group)
        gradient_a, gradient_b = ctx.saved_tensors
        return gradient * gradient_a, gradient * gradient_b, None
