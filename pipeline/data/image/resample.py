"""Crops of decoded images on any device, equal to the bit to those that Pillow cuts on the CPU.

Pillow resizes first across, then down, in whole numbers: the weights of its antialiased filters are computed
in float64, rounded to fixed point, and each pass is rounded to 8 bits. All of that is exact, so that the same
steps give the same bytes on a GPU. Pillow and pillow-simd differ in the fixed point alone.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cluster.errors import UserError
from pipeline.recipe.data import Interpolation

# Of float64 weights (n, S, taps): whole-number weights, and their bits behind the point, (n,); both int32.
FixedPoint = Callable[[Tensor], tuple[Tensor, Tensor]]

_PILLOW_BITS = 22
_SIMD_WEIGHTS = 1 << 15


class _Filter(NamedTuple):
    """One of Pillow's: a function of distances in the larger of old and new pixels, 0 from `reach` on."""

    pillow: Image.Resampling
    reach: int
    weight: Callable[[Tensor], Tensor]


def _bilinear(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_(min=0)


def _bicubic(distance: Tensor) -> Tensor:
    """Keys, 1981, with a = -1/2; products and sums in Pillow's order."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


_FILTERS: dict[Interpolation, _Filter] = {
    "bilinear": _Filter(Image.Resampling.BILINEAR, 1, _bilinear),
    "bicubic": _Filter(Image.Resampling.BICUBIC, 2, _bicubic),
}


def crop_and_resize(
    images: Tensor, boxes: Tensor, *, size: int, interpolation: Interpolation, fixed_point: FixedPoint
) -> Tensor:
    """Cut one box out of each image, and resize it to a square.

    Args:
        images: (n, H, W, 3) uint8.
        boxes: (n, 4) whole numbers: left, top, width, height in pixels, inside the image.
        fixed_point: that of the Pillow to agree with; see `installed_fixed_point`.

    Returns:
        (n, S, S, 3) uint8 on the images' device: `Image.resize((S, S), filter, box=…)` of each.
    """
    left, top, width, height = boxes.double().unbind(1)
    kind = _FILTERS[interpolation]
    across = _means(images, _weights(left, width, size, images.shape[2], kind), fixed_point)
    down = _means(across.transpose(1, 2), _weights(top, height, size, images.shape[1], kind), fixed_point)
    return down.transpose(1, 2).contiguous()


def installed_fixed_point() -> FixedPoint:
    """The arithmetic of the Pillow that is installed, found by trying.

    Raises:
        UserError: if it is none that is known here.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
    boxes = torch.tensor([[1, 2, 23, 5], [3, 0, 7, 24]])
    pictures = [Image.fromarray(image) for image in pixels]
    for fixed_point in (simd_fixed_point, pillow_fixed_point):
        if all(
            np.array_equal(np.asarray(picture.resize((size, size), kind.pillow, box=_corners(box))), ours)
            for size in (8, 24)
            for interpolation, kind in _FILTERS.items()
            for picture, box, ours in zip(
                pictures,
                boxes.tolist(),
                crop_and_resize(
                    torch.from_numpy(pixels),
                    boxes,
                    size=size,
                    interpolation=interpolation,
                    fixed_point=fixed_point,
                ).numpy(),
                strict=True,
            )
        ):
            return fixed_point
    raise UserError(
        "this build of Pillow resizes in a way that run.resident cannot repeat to the bit: "
        "use run.resident=false, or install Pillow 12.1.1 or pillow-simd 12.1.1"
    )


def pillow_fixed_point(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pillow's: 22 bits behind the point."""
    bits = torch.full(weights.shape[:1], _PILLOW_BITS, dtype=torch.int32, device=weights.device)
    return _rounded(weights, bits), bits


def simd_fixed_point(weights: Tensor) -> tuple[Tensor, Tensor]:
    """pillow-simd's: as many bits as leave the largest weight of an image within 16 bits."""
    powers = 1 << torch.arange(1, _PILLOW_BITS + 1, device=weights.device)
    fits = torch.floor(0.5 + weights.amax((1, 2)).unsqueeze(1) * powers.double()) < _SIMD_WEIGHTS
    bits = fits.sum(1, dtype=torch.int32)
    return _rounded(weights, bits), bits


def _rounded(weights: Tensor, bits: Tensor) -> Tensor:
    scaled = weights * (1 << bits).double().view(-1, 1, 1)
    return torch.copysign(torch.floor(0.5 + scaled.abs()), scaled).int()


def _means(images: Tensor, weighing: tuple[Tensor, Tensor], fixed_point: FixedPoint) -> Tensor:
    """Weighted means along dimension 2 of (n, H, W, 3), by what `_weights` answers: (n, H, size, 3) uint8."""
    first, exact = weighing
    weights, bits = fixed_point(exact)
    count, height, width, channels = images.shape
    size, taps = exact.shape[1:]
    total = (1 << (bits - 1)).view(-1, 1, 1, 1).repeat(1, height, size, channels)
    for tap in range(taps):
        column = (first + tap).clamp_(max=width - 1)  # beyond the border the weight is 0
        pixels = images.gather(2, column[:, None, :, None].expand(count, height, size, channels))
        total += pixels.int() * weights[:, None, :, tap, None]
    return (total >> bits.view(-1, 1, 1, 1)).clamp_(0, 255).to(torch.uint8)


def _weights(start: Tensor, length: Tensor, size: int, width: int, kind: _Filter) -> tuple[Tensor, Tensor]:
    """The first pixel that counts for each new one, (n, size) int64, and the weights from there on, float64
    (n, size, taps), when the stretch [start, start + length) of `width` pixels becomes `size` pixels.

    Step by step as in Pillow's `precompute_coeffs`: the order of additions decides the last bit.
    """
    # By a tensor: a GPU divides by a number through its reciprocal, and may lose a bit.
    scale = (length / torch.full_like(length, size)).unsqueeze(1)
    stretch = scale.clamp(min=1)
    reach = kind.reach * stretch
    centre = start.unsqueeze(1) + (torch.arange(size, device=start.device) + 0.5) * scale
    first = torch.floor(centre - reach + 0.5).clamp_(min=0)
    past = torch.floor(centre + reach + 0.5).clamp_(max=width)
    inverse, total, weights = 1 / stretch, torch.zeros_like(centre), []
    for tap in range(2 * math.ceil(kind.reach * max(1.0, width / size)) + 1):
        place = first + tap
        weight = kind.weight(((place - centre + 0.5) * inverse).abs())
        weights.append(torch.where(place < past, weight, 0))
        total += weights[-1]
    return first.long(), torch.stack(weights, 2) / total.unsqueeze(2)


def _corners(box: list[int]) -> tuple[int, int, int, int]:
    left, top, width, height = box
    return left, top, left + width, top + height
