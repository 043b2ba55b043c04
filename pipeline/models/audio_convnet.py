"""The network for sound of AVID's code (https://github.com/facebookresearch/AVID-CMA): nine convolutions over
a spectrogram, as over an image of one channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAPS = ("conv2x", "conv3x", "conv4x", "conv5x")


class AudioConvNet(nn.Module):
    """Spectrograms (N, 1, frames, bins) to pooled float features (N, 8 · width).

    Args:
        width: channels of the first convolution; the last has eight times as many.
        stride: of the first block: 2; 1 for spectrograms of half the frames and bins.
    """

    feature_dim: int
    memory_format = torch.channels_last

    def __init__(self, *, width: int = 64, stride: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Block(width, width, stride=stride),
            Block(width, 2 * width, stride=2),
            Block(2 * width, 4 * width, stride=2),
            Block(4 * width, 8 * width, stride=1),
        )
        self.feature_dim = 8 * width

    def forward(self, spectrograms: Tensor) -> Tensor:
        x: Tensor = self.blocks(self._stem(spectrograms))
        return x.amax((2, 3)).to(torch.promote_types(x.dtype, torch.float32))

    def maps(self, spectrograms: Tensor) -> dict[str, Tensor]:
        """What each block gives, by the paper's names: (N, channels, frames, bins) each."""
        found = {}
        x = self._stem(spectrograms)
        for name, block in zip(MAPS, self.blocks, strict=True):
            x = found[name] = block(x)
        return found

    def blocks_by_stage(self) -> list[nn.Sequential]:
        """See `pipeline.models.trunk.Trunk`."""
        return [self.blocks]

    def zero_init_norms(self) -> list[nn.Module]:
        """None: there are no shortcuts."""
        return []

    def _stem(self, spectrograms: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(spectrograms)), inplace=True)


class Block(nn.Module):
    """Two 3x3 convolutions, without a shortcut."""

    def __init__(self, in_width: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)), inplace=True)
