"""One image's bytes → its crops: RandomResizedCrop boxes and flips from given draws, as uint8."""

import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.recipe import CropGroup

_TRIES = 10
# The draws of one crop that are geometry: flip, position, and two for every try of a box.
GEOMETRY_DRAWS = 3 + 2 * _TRIES


def crop_box(width: int, height: int, draws: Sequence[float], group: CropGroup) -> tuple[int, int, int, int]:
    """The box of a RandomResizedCrop, as torchvision defines it (Szegedy et al., 2015, for the idea).

    Up to ten times an area in `group.scale` of the image's, and an aspect ratio whose logarithm is uniform in
    `group.ratio`, are tried; if none fits, the largest central box within the ratio.

    Args:
        draws: GEOMETRY_DRAWS uniform numbers; the first, the flip, is not used here.

    Returns:
        left, top, width, height in pixels.
    """
    area = width * height
    (low, high), (narrow, wide) = group.scale, (math.log(group.ratio[0]), math.log(group.ratio[1]))
    for number in range(3, GEOMETRY_DRAWS, 2):
        target = area * (low + (high - low) * draws[number])
        ratio = math.exp(narrow + (wide - narrow) * draws[number + 1])
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[1] * (width - w + 1)), int(draws[2] * (height - h + 1)), w, h
    w, h = width, height
    if width / height < group.ratio[0]:
        h = round(width / group.ratio[0])
    elif width / height > group.ratio[1]:
        w = round(height * group.ratio[1])
    w, h = max(w, 1), max(h, 1)
    return (width - w) // 2, (height - h) // 2, w, h


def cut(
    data: bytes, groups: Sequence[CropGroup], draws: NDArray[np.float64], out: Sequence[NDArray[np.uint8]]
) -> None:
    """Decode once, and write every crop of every group.

    Args:
        draws: (crops, GEOMETRY_DRAWS) uniform numbers, the groups' crops one after another.
        out: for each group (count, size, size, 3).
    """
    image = Image.open(io.BytesIO(data))
    if image.mode != "RGB":
        image = image.convert("RGB")
    number = 0
    for group, crops in zip(groups, out, strict=True):
        for view in range(group.count):
            drawn = draws[number].tolist()
            left, top, w, h = crop_box(image.width, image.height, drawn, group)
            crop = image.resize(
                (group.size, group.size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)
            )
            pixels = np.asarray(crop)
            crops[view] = pixels[:, ::-1] if drawn[0] < group.flip_probability else pixels
            number += 1
