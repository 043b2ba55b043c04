"""Features of what a trunk's stages give, before the last one is pooled: AVID's protocol of linear probes at
conv2x to conv5x (https://github.com/facebookresearch/AVID-CMA).
"""

from __future__ import annotations

from typing import Literal, Protocol, cast

import torch.nn.functional as F
from torch import Tensor, nn

Layer = Literal["conv2x", "conv3x", "conv4x", "conv5x"]
Pooling = Literal["max", "average"]
# Along each side of a picture or a spectrogram: about 9,000 features of any stage of the published trunks.
SIDES: dict[Layer, int] = {"conv2x": 12, "conv3x": 8, "conv4x": 6, "conv5x": 4}


class HasMaps(Protocol):
    """A trunk that tells what its stages give."""

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
    """

    def __init__(self, trunk: nn.Module, layer: Layer, pooling: Pooling) -> None:
        super().__init__()
        self.trunk = trunk
        self._layer: Layer = layer
        self._pooling: Pooling = pooling

    def forward(self, x: Tensor) -> Tensor:
        maps = cast(HasMaps, self.trunk).maps(x)
        return pooled_map(maps[self._layer], SIDES[self._layer], self._pooling)
