"""Grouped convolutions whose groups are widened with zeros to a multiple of 8 channels, as an experiment.

The tensor cores take channels in tiles of 8. RegNetY-256GF's groups have 373 and RegNet-10B's 1010, and the
published weights must keep those shapes: so the zeros come at run time, and no parameter changes.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

TILE = 8


def pad_groups(trunk: nn.Module) -> int:
    """Widen the groups of every grouped convolution whose width is no multiple of 8, in place.

    The names and shapes of the state stay. Call it before the blocks are compiled, which then write the
    padded map in the kernel of the BatchNorm before it.

    Returns:
        How many convolutions were changed.
    """
    changed = 0
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and module.weight.shape[1] % TILE:
            module.forward = partial(_padded, module)  # type: ignore[method-assign]
            changed += 1
    return changed


def padded_convolution(x: Tensor, weight: Tensor, *, stride: int, padding: int, groups: int) -> Tensor:
    """`F.conv2d` without bias, over groups of the next multiple of 8 channels: the same sums, and zeros.

    Args:
        x: (N, groups * in, H, W).
        weight: (groups * out, in, k, k).

    Returns:
        (N, groups * out, H', W').
    """
    out, inner = weight.shape[0] // groups, weight.shape[1]
    more_out, more_in = -out % TILE, -inner % TILE
    split = weight.unflatten(0, (groups, out))
    wide_weight = F.pad(split, (0, 0, 0, 0, 0, more_in, 0, more_out)).flatten(0, 1)
    wide_x = F.pad(x.unflatten(1, (groups, inner)), (0, 0, 0, 0, 0, more_in)).flatten(1, 2)
    y = F.conv2d(wide_x, wide_weight, stride=stride, padding=padding, groups=groups)
    return y.unflatten(1, (groups, out + more_out))[:, :, :out].flatten(1, 2)


def _padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    stride, padding = layer.stride[0], layer.padding[0]
    assert isinstance(padding, int)
    return padded_convolution(x, layer.weight, stride=stride, padding=padding, groups=layer.groups)
