"""One image's bytes → its crops: RandomResizedCrop boxes and flips from given draws, as uint8.

An image is decoded once, a JPEG at the smallest DCT scale that has a pixel for every pixel of every crop, and
each crop is cut and resized in one pass by one of PIL's antialiased filters.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ingest.image.decode import decode
from pipeline.recipe.data import Clip, CropGroup, Interpolation

_TRIES = 10
FLIP, _LEFT, _TOP, _BOXES = range(4)
# The draws of one crop that are geometry: flip, position, and two for every try of a box.
GEOMETRY_DRAWS = _BOXES + 2 * _TRIES
_FILTERS: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

Box = tuple[int, int, int, int]


def crop_box(width: int, height: int, draws: Sequence[float], group: CropGroup | Clip) -> Box:
    """The box of a RandomResizedCrop with torchvision's meaning of scale and ratio.

    Up to ten times, an area in `group.scale` of the image's and an aspect ratio whose logarithm is uniform in
    `group.ratio` are tried; if none fits, the largest central box within the ratio.

    Args:
        width, height: of the image.
        draws: GEOMETRY_DRAWS uniform numbers.

    Returns:
        left, top, width, height in pixels, inside the image.
    """
    area = width * height
    smallest, largest = group.scale
    narrow, wide = math.log(group.ratio[0]), math.log(group.ratio[1])
    for number in range(_BOXES, GEOMETRY_DRAWS, 2):
        target = area * (smallest + (largest - smallest) * draws[number])
        ratio = math.exp(narrow + (wide - narrow) * draws[number + 1])
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[_LEFT] * (width - w + 1)), int(draws[_TOP] * (height - h + 1)), w, h
    w, h = width, height
    if width < height * group.ratio[0]:
        h = max(1, round(width / group.ratio[0]))
    elif width > height * group.ratio[1]:
        w = max(1, round(height * group.ratio[1]))
    return (width - w) // 2, (height - h) // 2, w, h


def cut(
    data: bytes, groups: Sequence[CropGroup], draws: NDArray[np.float64], out: Sequence[NDArray[np.uint8]]
) -> None:
    """Decode once, and write every crop of every group.

    Args:
        data: an image file.
        draws: (crops, GEOMETRY_DRAWS) uniform numbers, the groups' crops one after another.
        out: for each group (count, size, size, 3).

    Raises:
        ImageError: if it is no image, or too large.
    """
    drawn = draws.tolist()
    owners = [group for group in groups for _ in range(group.count)]
    boxes: list[Box] = []
    width = height = 0

    def place(image_width: int, image_height: int) -> tuple[int, int]:
        """Choose the boxes; answers the image size at which no crop has fewer pixels than it needs."""
        nonlocal width, height
        width, height = image_width, image_height
        boxes[:] = [
            crop_box(width, height, numbers, group) for numbers, group in zip(drawn, owners, strict=True)
        ]
        scale = max(
            max(group.size / w, group.size / h) for group, (_, _, w, h) in zip(owners, boxes, strict=True)
        )
        return math.ceil(width * scale), math.ceil(height * scale)

    image = decode(data, at_least=place)
    if not boxes:
        place(image.width, image.height)
    across, down = image.width / width, image.height / height
    targets = (target for group in out for target in group)
    for numbers, group, (left, top, w, h), target in zip(drawn, owners, boxes, targets, strict=True):
        crop = image.resize(
            (group.size, group.size),
            _FILTERS[group.interpolation],
            # PIL refuses a box that rounding puts outside.
            box=(
                left * across,
                top * down,
                min((left + w) * across, image.width),
                min((top + h) * down, image.height),
            ),
        )
        target[...] = np.frombuffer(crop.tobytes(), np.uint8).reshape(target.shape)
        if numbers[FLIP] < group.flip_probability:
            # Three times as fast as PIL's flip, sixteen times as NumPy's.
            pixels = torch.from_numpy(target)
            pixels.copy_(torch.flip(pixels, (1,)))
