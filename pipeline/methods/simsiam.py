"""SimSiam: one view's predictor meets the other view's embedding, which takes no gradient.

Chen & He, 2021 (https://arxiv.org/abs/2011.10566).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from pipeline.data.batch import Inputs
from pipeline.distributed.collectives import all_reduce_sum, world_size
from pipeline.methods.method import Method
from pipeline.methods.param_groups import weights_and_the_rest
from pipeline.methods.two_views import check_two_views, two_views
from pipeline.models.heads import MLP
from pipeline.recipe.method import SimSiam


class SimSiamMethod(Method):
    """A trunk, its projector and predictor, and the loss of one coupled batch.

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
        section: SimSiam,
        *,
        feature_dim: int,
        views: Mapping[str, int],
        batch_size: int,
        group: ProcessGroup | None,
    ) -> None:
        check_two_views(section.name, views)
        super().__init__()
        dim = section.projector[-1]
        self.trunk = trunk
        self.projector = MLP((feature_dim, *section.projector), end="batch_norm")
        self.predictor = (
            nn.Identity() if section.predictor is None else MLP((dim, section.predictor, dim), end="bias")
        )
        self.section = section
        self.group = group
        self.rank_rows = batch_size // world_size(group)

    def forward(self, inputs: Inputs, step: int) -> dict[str, Tensor]:
        """The loss of the coupled batch.

        Args:
            inputs: two views, under one name or two: (rank_rows, 3, size, size) each.
            step: of no meaning here.

        Returns:
            loss: scalar, equal on every rank; between -1 and 1.
            embedding: (rank_rows, dim), detached: the projector's, of the first view.
        """
        z_a, z_b = (self.projector(self.trunk(view)) for view in two_views(inputs, rows=self.rank_rows))
        p_a, p_b = self.predictor(z_a), self.predictor(z_b)
        if self.section.stop_gradient:
            z_a, z_b = z_a.detach(), z_b.detach()
        with torch.autocast(z_a.device.type, enabled=False):
            wide = torch.promote_types(z_a.dtype, torch.float32)
            loss = simsiam_loss(p_a.to(wide), p_b.to(wide), z_a.to(wide), z_b.to(wide), group=self.group)
        return {"loss": loss, "embedding": z_a.detach().to(wide)}

    def after_step(self, step: int) -> None:
        """Nothing is kept between steps."""

    def forget_batches(self) -> None:
        """No batch waits for `after_step`."""

    def trunks(self) -> dict[str, nn.Module]:
        """One, which learns."""
        return {"student": self.trunk}

    def param_groups(self) -> list[dict[str, Any]]:
        """Weights, biases and norms; those of the predictor apart, whose rate may stay (section 4.2)."""
        encoder = [*self.trunk.parameters(), *self.projector.parameters()]
        return [
            *weights_and_the_rest(encoder),
            *weights_and_the_rest(self.predictor.parameters(), lr_fixed=not self.section.predictor_lr_decays),
        ]


def simsiam_loss(
    p_a: Tensor, p_b: Tensor, z_a: Tensor, z_b: Tensor, *, group: ProcessGroup | None = None
) -> Tensor:
    """The symmetrised negative cosine.

    Equations 1 and 2 of Chen & He, 2021 (https://arxiv.org/abs/2011.10566): the mean over samples of
    D(p_a, z_b) / 2 + D(p_b, z_a) / 2, where D(p, z) = - (p / |p|) . (z / |z|).

    Args:
        p_a, p_b: predictions of the two views on this rank, (samples, dim), float32 or wider.
        z_a, z_b: embeddings of the two views, (samples, dim). In the paper they have no gradient.
        group: ranks that share the coupled batch, equally many samples on each; None for one process.

    Returns:
        A scalar, equal on every rank of the group.
    """
    cosines = F.cosine_similarity(p_a, z_b) + F.cosine_similarity(p_b, z_a)
    return -all_reduce_sum(cosines.sum(), group) / (2 * len(p_a) * world_size(group))
