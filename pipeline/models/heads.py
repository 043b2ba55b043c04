"""What stands on a trunk during pretraining and is thrown away after it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.distributed.sharded import own
from pipeline.recipe.method import Head


class ProjectionHead(nn.Module):
    """An MLP from features (N, in_dim) to embeddings (N, section.output).

    Between layers: BatchNorm if `section.batch_norm`, then ReLU. The last layer is plain. SEER's largest
    heads have no BatchNorm.
    """

    def __init__(self, in_dim: int, section: Head) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in section.hidden:
            layers.append(nn.Linear(in_dim, width))
            if section.batch_norm:
                layers.append(nn.BatchNorm1d(width))
            layers.append(nn.ReLU(inplace=True))
            in_dim = width
        layers.append(nn.Linear(in_dim, section.output))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        embeddings: Tensor = self.layers(features)
        return embeddings


class MLP(nn.Module):
    """Linear layers with BatchNorm and ReLU between them: (N, widths[0]) to (N, widths[-1]).

    A layer that BatchNorm follows has no bias, which the mean would take out again.

    Args:
        end: what the last layer has: nothing ("plain"), a "bias", or a BatchNorm that neither scales nor
            shifts ("batch_norm").
    """

    def __init__(self, widths: Sequence[int], *, end: Literal["plain", "bias", "batch_norm"]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in pairwise(widths[:-1]):
            layers += [nn.Linear(before, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        layers.append(nn.Linear(widths[-2], widths[-1], bias=end == "bias"))
        if end == "batch_norm":
            layers.append(nn.BatchNorm1d(widths[-1], affine=False))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class Prototypes(nn.Module):
    """Unit vectors that embeddings are scored against: (N, dim) to cosine scores (N, prototypes).

    The rows of `weight` have length 1 after `normalise()`, which the method calls after every optimizer step.

    Attributes:
        own_unit: see `pipeline.parallel.units.OwnUnit`: scores are computed in full precision, and rows put
            back on the sphere whole.
    """

    own_unit = True

    def __init__(self, dim: int, prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(prototypes, dim))
        self.normalise()

    def forward(self, embeddings: Tensor, *, frozen: bool = False) -> Tensor:
        """Scores of unit embeddings.

        Args:
            frozen: the prototypes get a gradient of zero. Zero and not none: every rank, engine and optimizer
                state then sees the same set of parameters at every step, frozen or not.
        """
        weight = self.weight.detach() + 0 * self.weight if frozen else self.weight
        return F.linear(embeddings, weight)

    def initial_value(self, name: str, normal: Tensor) -> Tensor:
        """See `pipeline.parallel.initialize.OwnValues`: uniform on the sphere."""
        return F.normalize(normal, dim=1)

    @torch.no_grad()
    def normalise(self) -> None:
        rows = own(self.weight)
        rows.copy_(F.normalize(rows, dim=1))
