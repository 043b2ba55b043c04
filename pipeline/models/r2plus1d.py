"""R(2+1)D trunks: convolutions over space, then over time (Tran et al., 2018,
https://arxiv.org/abs/1711.11248), as AVID's code has them (https://github.com/facebookresearch/AVID-CMA).

They differ from torchvision's: the stem is a whole convolution over space and time, and pools; the planes
between the two convolutions are no wider, so that 18 layers have half the parameters; a block has one
BatchNorm after the addition, and none in its shortcut; features are maxima.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
MAPS = ("conv2x", "conv3x", "conv4x", "conv5x")


class R2Plus1D(nn.Module):
    """An R(2+1)D trunk: clips (N, 3, T, H, W) to pooled float features (N, 8 · width).

    Args:
        depth: 10, 18 or 34.
        width: channels of the stem and of the first stage; each further stage has twice as many.
        pool: whether the stem pools over space; not for clips of 112 px or less.
    """

    feature_dim: int
    memory_format = torch.channels_last_3d

    def __init__(self, depth: Literal[10, 18, 34], *, width: int = 64, pool: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, width, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.pool: nn.Module = (
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)) if pool else nn.Identity()
        )
        before = width
        for name, count in zip(MAPS, BLOCKS[depth], strict=True):
            after = width if name == MAPS[0] else 2 * before
            stage = nn.Sequential(Block(before, after, stride=after // before))
            for _ in range(count - 1):
                stage.append(Block(after, after, stride=1))
            self.add_module(name, stage)
            before = after
        self.feature_dim = before

    def forward(self, clips: Tensor) -> Tensor:
        x = self._stem(clips)
        for stage in self.blocks_by_stage():
            x = stage(x)
        return _pooled(x)

    def maps(self, clips: Tensor) -> dict[str, Tensor]:
        """What each stage gives, by the paper's names: (N, channels, T, H, W) each."""
        found = {}
        x = self._stem(clips)
        for name, stage in zip(MAPS, self.blocks_by_stage(), strict=True):
            x = found[name] = stage(x)
        return found

    def blocks_by_stage(self) -> list[nn.Sequential]:
        """See `pipeline.models.trunk.Trunk`."""
        return [cast(nn.Sequential, self.get_submodule(name)) for name in MAPS]

    def zero_init_norms(self) -> list[nn.Module]:
        """None: a block's last norm is behind its shortcut."""
        return []

    def _stem(self, clips: Tensor) -> Tensor:
        x: Tensor = self.pool(F.relu(self.bn1(self.conv1(clips)), inplace=True))
        return x


class Block(nn.Module):
    """Two pairs of a convolution over space and one over time, and a shortcut.

    Args:
        stride: 1 or 2, in space and in time.
    """

    def __init__(self, in_width: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.spatial1, self.bn1 = _over_space(in_width, width, stride), nn.BatchNorm3d(width)
        self.temporal1, self.bn2 = _over_time(width, stride), nn.BatchNorm3d(width)
        self.spatial2, self.bn3 = _over_space(width, width, 1), nn.BatchNorm3d(width)
        self.temporal2 = _over_time(width, 1)
        self.shortcut = None
        if stride > 1 or in_width != width:
            self.shortcut = nn.Conv3d(in_width, width, 1, stride=stride, bias=False)
        self.bn4 = nn.BatchNorm3d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.spatial1(x)), inplace=True)
        y = F.relu(self.bn2(self.temporal1(y)), inplace=True)
        y = F.relu(self.bn3(self.spatial2(y)), inplace=True)
        y = self.temporal2(y) + (x if self.shortcut is None else self.shortcut(x))
        return F.relu(self.bn4(y), inplace=True)


def _over_space(in_width: int, width: int, stride: int) -> nn.Conv3d:
    return nn.Conv3d(in_width, width, (1, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1), bias=False)


def _over_time(width: int, stride: int) -> nn.Conv3d:
    return nn.Conv3d(width, width, (3, 1, 1), stride=(stride, 1, 1), padding=(1, 0, 0), bias=False)


def _pooled(x: Tensor) -> Tensor:
    """The maximum over time and space, float32 or wider."""
    return x.amax((2, 3, 4)).to(torch.promote_types(x.dtype, torch.float32))
