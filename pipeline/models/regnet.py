"""RegNetY trunks (Radosavovic et al., 2020, https://arxiv.org/abs/2003.13678), up to SEER's 10 billion.

Modules carry timm's names (`stem`, `s1.b1.conv1.conv`, ...), so that weights pass in and out without a map.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.recipe.trunk import RegNetParameters, Stem

STEM_WIDTH = 32
SE_RATIO = 0.25


def _preset(depth: int, w_0: int, w_a: float, w_m: float, group_width: int) -> RegNetParameters:
    return RegNetParameters(depth=depth, w_0=w_0, w_a=w_a, w_m=w_m, group_width=group_width)


PRESETS: dict[str, RegNetParameters] = {
    "regnety_tiny": _preset(4, 16, 12.0, 1.50, 8),  # for tests: four stages of one block
    "regnety_200mf": _preset(13, 24, 36.44, 2.49, 8),
    "regnety_400mf": _preset(16, 48, 27.89, 2.09, 8),
    "regnety_600mf": _preset(15, 48, 32.54, 2.32, 16),
    "regnety_800mf": _preset(14, 56, 38.84, 2.40, 16),
    "regnety_1_6gf": _preset(27, 48, 20.71, 2.65, 24),
    "regnety_3_2gf": _preset(21, 80, 42.63, 2.66, 24),
    "regnety_4gf": _preset(22, 96, 31.41, 2.24, 64),
    "regnety_6_4gf": _preset(25, 112, 33.22, 2.27, 72),
    "regnety_8gf": _preset(17, 192, 76.82, 2.19, 56),
    "regnety_12gf": _preset(19, 168, 73.36, 2.37, 112),
    "regnety_16gf": _preset(18, 200, 106.23, 2.48, 112),
    "regnety_32gf": _preset(20, 232, 115.89, 2.53, 232),
    # SEER's (Goyal et al., 2021, https://arxiv.org/abs/2103.01988; 2022, https://arxiv.org/abs/2202.08360).
    "regnety_64gf": _preset(20, 352, 147.48, 2.40, 328),
    "regnety_128gf": _preset(27, 456, 160.83, 2.52, 264),
    "regnety_256gf": _preset(27, 640, 230.83, 2.53, 373),
    "regnety_10b": _preset(27, 1744, 620.83, 2.52, 1010),
}


def widths_and_depths(parameters: RegNetParameters) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Stage widths and depths of the quantised line (section 3.3 of the paper).

    Block j's width u_j = w_0 + w_a j is rounded to w_0 w_m^s for a whole s, then to a multiple of 8; blocks
    of one width are a stage; each stage's width is then rounded to a multiple of the group width.

    Returns:
        Widths and depths (blocks), one of each per stage, narrowest first.
    """
    blocks: list[int] = []
    for block in range(parameters.depth):
        line = parameters.w_0 + parameters.w_a * block
        exponent = round(math.log(line / parameters.w_0) / math.log(parameters.w_m))
        blocks.append(8 * round(parameters.w_0 * parameters.w_m**exponent / 8))
    quantised = sorted(set(blocks))
    depths = tuple(blocks.count(width) for width in quantised)
    groups = (min(parameters.group_width, width) for width in quantised)
    widths = tuple(group * round(width / group) for width, group in zip(quantised, groups, strict=True))
    return widths, depths


class RegNet(nn.Module):
    """A RegNetY trunk: images (N, 3, H, W) to pooled float features (N, feature_dim).

    Args:
        parameters: the five numbers of the design space.
        stem: "imagenet" halves the resolution; "low_resolution" keeps it, for images of 64 px or less.
    """

    feature_dim: int
    memory_format = torch.channels_last

    def __init__(self, parameters: RegNetParameters, *, stem: Stem) -> None:
        super().__init__()
        self.stem = _ConvNorm(3, STEM_WIDTH, kernel=3, stride=2 if stem == "imagenet" else 1)
        widths, depths = widths_and_depths(parameters)
        before = STEM_WIDTH
        self._stages = tuple(f"s{number}" for number in range(1, len(widths) + 1))
        for name, width, depth in zip(self._stages, widths, depths, strict=True):
            self.add_module(name, _stage(before, width, depth, min(parameters.group_width, width)))
            before = width
        self.feature_dim = before

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images), inplace=True)
        for stage in self.blocks_by_stage():
            x = stage(x)
        return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))

    def blocks_by_stage(self) -> list[nn.Sequential]:
        """See `pipeline.models.trunk.Trunk`."""
        return [cast(nn.Sequential, self.get_submodule(name)) for name in self._stages]

    def zero_init_norms(self) -> list[nn.Module]:
        """None: the paper's blocks start with gains of 1."""
        return []


def _stage(in_width: int, width: int, depth: int, group_width: int) -> nn.Sequential:
    """`depth` blocks, of which the first halves the resolution."""
    stage = nn.Sequential()
    for number in range(1, depth + 1):
        first = number == 1
        block = _Block(in_width if first else width, width, group_width, stride=2 if first else 1)
        stage.add_module(f"b{number}", block)
    return stage


class _ConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm; the activation is the caller's."""

    def __init__(
        self, in_width: int, width: int, *, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_width, width, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.bn(self.conv(x)))


class _SqueezeExcitation(nn.Module):
    """Channel gates from the pooled map (Hu et al., 2018, https://arxiv.org/abs/1709.01507)."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = F.relu(self.fc1(x.mean((2, 3), keepdim=True)), inplace=True)
        gates: Tensor = self.fc2(squeezed).sigmoid()
        return x * gates


class _Block(nn.Module):
    """The paper's Y block, bottleneck ratio 1: 1x1, grouped 3x3, squeeze-excitation, 1x1, and a shortcut."""

    def __init__(self, in_width: int, width: int, group_width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(in_width, width)
        self.conv2 = _ConvNorm(width, width, kernel=3, stride=stride, groups=width // group_width)
        # The squeeze is a share of the block's input width, not of its own: published counts hang on it.
        self.se = _SqueezeExcitation(width, round(in_width * SE_RATIO))
        self.conv3 = _ConvNorm(width, width)
        changes = stride != 1 or in_width != width
        self.downsample = _ConvNorm(in_width, width, stride=stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x), inplace=True)
        y = F.relu(self.conv2(y), inplace=True)
        y = self.conv3(self.se(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)
