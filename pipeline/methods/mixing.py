"""Mixup and cutmix: images that are two images, with the labels of both.

Zhang et al., 2018 (https://arxiv.org/abs/1710.09412); Yun et al., 2019 (https://arxiv.org/abs/1905.04899).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.philox import uniforms
from pipeline.data.to_device import to_device
from pipeline.recipe.method import Classification

# No substitute stands so far behind: these draws are nobody else's.
_STREAM = 0xFFFF_FFFF


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What is done to each group of rows.

    Attributes:
        keep: what an image keeps of itself, (groups,) float64; its mirror image gives the rest.
        boxes: top, left, bottom, right of what is pasted, as shares of the image's sides, (groups, 4); the
            whole image is blended where `pastes` is False.
        pastes: (groups,) bool.
    """

    keep: np.ndarray[tuple[int], np.dtype[np.float64]]
    boxes: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    pastes: np.ndarray[tuple[int], np.dtype[np.bool_]]


def draw_mix(section: Classification, *, seed: int, number: int, first: int, groups: int) -> Mix:
    """Draw for some groups of a global batch, each a pure function of (seed, number, group).

    Args:
        number: of the global batch.
        first: the first group's place in it.
    """
    from scipy.special import betaincinv  # which only they wait for who mix

    draws = uniforms(
        seed=seed,
        epoch=number,
        keys=np.arange(first, first + groups),
        ahead=np.full(groups, _STREAM),
        views=1,
        draws=4,
    )[:, 0]
    pastes = np.full(groups, section.cutmix > 0)
    if section.mixup and section.cutmix:
        pastes = draws[:, 1] < 0.5
    alpha = np.where(pastes, section.cutmix, section.mixup)
    keep = betaincinv(alpha, alpha, draws[:, 0])
    # Equation 3 of Yun et al.: a box of area 1 - keep, cut where it passes the edge.
    side = np.sqrt(1 - keep) / 2
    y, x = draws[:, 2], draws[:, 3]
    boxes = np.stack([y - side, x - side, y + side, x + side], axis=1).clip(0, 1)
    return Mix(keep=keep, boxes=boxes, pastes=pastes)


def mix(images: Tensor, shares: Tensor, drawn: Mix) -> tuple[Tensor, Tensor]:
    """Mix every image with its mirror in its group, and their labels in the same proportion.

    Args:
        images: (rows, channels, height, width); groups of rows that follow each other.
        shares: (rows, classes) targets.

    Returns:
        Both, mixed.
    """
    groups, height, width = len(drawn.keep), *images.shape[-2:]
    own = images.view(groups, -1, *images.shape[1:])
    own_shares = shares.view(groups, -1, shares.shape[1])
    edges = np.rint(drawn.boxes * [height, width, height, width]).astype(np.int64)
    area = (edges[:, 2] - edges[:, 0]) * (edges[:, 3] - edges[:, 1]) / (height * width)
    keep = torch.from_numpy(np.where(drawn.pastes, 1 - area, drawn.keep))
    blend = torch.from_numpy(np.where(drawn.pastes, 1.0, drawn.keep))
    pasted = _inside(torch.from_numpy(edges), height, width) & torch.from_numpy(drawn.pastes)[:, None, None]
    keep, blend, pasted = (to_device(each, images.device) for each in (keep, blend, pasted))
    kept = torch.where(pasted, 0, blend.to(images.dtype)[:, None, None])[:, None, None]
    mixed = torch.lerp(own.flip(1), own, kept)
    mixed_shares = torch.lerp(own_shares.flip(1), own_shares, keep.to(shares.dtype)[:, None, None])
    return mixed.flatten(0, 1), mixed_shares.flatten(0, 1)


def _inside(edges: Tensor, height: int, width: int) -> Tensor:
    """(groups, 4) edges in pixels → (groups, height, width): whether a pixel lies within."""
    rows, columns = torch.arange(height)[None], torch.arange(width)[None]
    vertical = (edges[:, 0, None] <= rows) & (rows < edges[:, 2, None])
    horizontal = (edges[:, 1, None] <= columns) & (columns < edges[:, 3, None])
    return vertical[:, :, None] & horizontal[:, None, :]
