"""A trunk and a linear head: images to logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearHead(nn.Module):
    """Features (N, feature_dim) to logits (N, classes), in float32 or wider.

    Args:
        deviation: of the weights that it starts with, drawn from the normal distribution; biases start at 0.

    Attributes:
        own_unit: see `pipeline.parallel.units.OwnUnit`.
    """

    own_unit = True

    def __init__(self, feature_dim: int, classes: int, *, deviation: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, feature_dim))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.deviation = deviation

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            wide = torch.promote_types(features.dtype, torch.float32)
            return F.linear(features.to(wide), self.weight.to(wide), self.bias.to(wide))

    def initial_value(self, name: str, normal: Tensor) -> Tensor:
        """See `pipeline.parallel.initialize.OwnValues`."""
        return normal * (self.deviation if name == "weight" else 0.0)


class Classifier(nn.Module):
    """Normalised images (N, 3, S, S) to logits (N, classes)."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(images))
        return logits
