"""ResNet-18 and ResNet-50 trunks (He et al., 2016, https://arxiv.org/abs/1512.03385).

The stride of a ResNet-50 block is in its 3x3 convolution, as in every published PyTorch weight. Modules carry
torchvision's names (`layer1.0.conv1`, ...), so that weights pass in and out without a map.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.recipe.trunk import Stem

STEM_WIDTH = 64
STAGE_WIDTHS = (64, 128, 256, 512)


class ResNet(nn.Module):
    """A ResNet trunk: images (N, 3, H, W) to pooled float features (N, feature_dim).

    Args:
        depth: 18 (basic blocks, 512 features) or 50 (bottlenecks, 2048 features).
        stem: "imagenet" is 7x7 stride 2 and a max-pool; "low_resolution" is 3x3 stride 1 and no pool, for
            images of 64 px or less (section 4.2 of the paper, and the field's habit on CIFAR), and
            "low_resolution_padded" the same with a margin of 2, so that its maps are 2 px larger than images.
        zero_init_residual: `initialize` starts every block as its shortcut: the last gamma is 0 (Goyal et
            al., 2017, https://arxiv.org/abs/1706.02677, section 5.1).
    """

    feature_dim: int
    memory_format = torch.channels_last

    def __init__(
        self,
        depth: Literal[18, 50],
        *,
        stem: Stem,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        self.zero_init_residual = zero_init_residual
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, STEM_WIDTH, 7, stride=2, padding=3, bias=False)
            self.pool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            padding = 2 if stem == "low_resolution_padded" else 1
            self.conv1 = nn.Conv2d(3, STEM_WIDTH, 3, stride=1, padding=padding, bias=False)
            self.pool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        block, counts = (Basic, (2, 2, 2, 2)) if depth == 18 else (Bottleneck, (3, 4, 6, 3))
        before = STEM_WIDTH
        for number, (width, count) in enumerate(zip(STAGE_WIDTHS, counts, strict=True), start=1):
            stage = nn.Sequential()
            for index in range(count):
                stride = 2 if number > 1 and index == 0 else 1
                stage.append(block(before, width, stride=stride))
                before = width * block.expansion
            self.add_module(f"layer{number}", stage)
        self.feature_dim = before

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.pool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        for stage in self.blocks_by_stage():
            x = stage(x)
        return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))

    def blocks_by_stage(self) -> list[nn.Sequential]:
        """See `pipeline.models.trunk.Trunk`."""
        names = [f"layer{number}" for number in range(1, len(STAGE_WIDTHS) + 1)]
        return [cast(nn.Sequential, self.get_submodule(name)) for name in names]

    def zero_init_norms(self) -> list[nn.Module]:
        """The last of each block, if `zero_init_residual`."""
        if not self.zero_init_residual:
            return []
        return [cast(nn.Module, block.last_norm) for stage in self.blocks_by_stage() for block in stage]


def _shortcut(in_width: int, width: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_width == width:
        return None
    return nn.Sequential(nn.Conv2d(in_width, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_width: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_width, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn2


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut."""

    expansion = 4

    def __init__(self, in_width: int, width: int, *, stride: int) -> None:
        super().__init__()
        wide = width * self.expansion
        self.conv1 = nn.Conv2d(in_width, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.downsample = _shortcut(in_width, wide, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3
