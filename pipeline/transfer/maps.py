"""Features of what a trunk's stages give, before the last one is pooled: AVID's protocol of linear probes at
conv2x to conv5x (https://github.com/facebookresearch/AVID-CMA).
"""

from __future__ import annotations

from typing import Protocol, cast

import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import UserError
from pipeline.models.trunk import declared
from pipeline.recipe.stages import Layer, Pooling

# Along each side of a picture or a spectrogram: about 9,000 features of any stage of the published trunks.
SIDES: dict[Layer, int] = {"conv2x": 12, "conv3x": 8, "conv4x": 6, "conv5x": 4}
_DOUBLED: dict[Layer, int] = {"conv2x": 3, "conv3x": 2, "conv4x": 1, "conv5x": 0}  # channels, until the last


class HasMaps(Protocol):
    """A trunk that tells what its four stages give; each has twice the channels of the one before."""

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """By the papers' names, (N, channels, H, W) or (N, channels, T, H, W) each."""
        ...


def pooled_map(maps: Tensor, side: int, pooling: Pooling) -> Tensor:
    """Pool to `side` along both sides of the picture, and over all of time.

    Args:
        maps: (N, channels, H, W), or (N, channels, T, H, W).

    Returns:
        (N, channels · side · side) float32.
    """
    wide = maps.float()
    if wide.ndim == 5:
        wide = wide.amax(2) if pooling == "max" else wide.mean(2)
    pool = F.adaptive_max_pool2d if pooling == "max" else F.adaptive_avg_pool2d
    return pool(wide, side).flatten(1)


class MapTrunk(nn.Module):
    """A trunk whose features are a stage's pooled map.

    Args:
        trunk: one that `HasMaps`.

    Raises:
        UserError: if it is none.
    """

    def __init__(self, trunk: nn.Module, layer: Layer, pooling: Pooling) -> None:
        super().__init__()
        if not hasattr(trunk, "maps"):
            raise UserError(
                f"{type(trunk).__name__} tells nothing of its stages: leave the layer out, or give a trunk "
                "of AVID's, such as r2plus1d_18 or conv2d_10"
            )
        self.trunk = trunk
        self._layer: Layer = layer
        self._pooling: Pooling = pooling
        self.feature_dim = (declared(trunk).feature_dim >> _DOUBLED[layer]) * SIDES[layer] ** 2

    def forward(self, x: Tensor) -> Tensor:
        maps = cast(HasMaps, self.trunk).maps(x)
        return pooled_map(maps[self._layer], SIDES[self._layer], self._pooling)
