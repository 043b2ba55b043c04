"""How often an epoch has an image of a tag, where rare tags are to be seen more often."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.data.philox import uniforms
from pipeline.recipe.stages import HashtagsRecipe


def how_often(counts: Sequence[int], recipe: HashtagsRecipe) -> NDArray[np.float64]:
    """For each tag, how often an image that has no other is drawn for once of the tag that is drawn least.

    By the inverse square root of the number of images, within the whole or within head and tail.

    Args:
        counts: images of each tag, (tags,).

    Returns:
        (tags,) numbers of at least 1.
    """
    images = np.asarray(counts, np.float64)
    if recipe.resample is None:
        return np.ones(len(images))
    often = images**-0.5
    if recipe.resample == "head_tail":
        head = images >= recipe.head_images
        for part, share in ((head, recipe.head_share), (~head, 1 - recipe.head_share)):
            often[part] *= share / max((often * images)[part].sum(), 1e-300)
    least: np.float64 = often.min()
    return often / least


def draw_copies(keys: ArrayLike, often: NDArray[np.float64]) -> NDArray[np.uint32]:
    """Whole numbers that are as large on average: what is left of one is the chance of one more, drawn by the
    image's key.
    """
    chance = uniforms(seed=0, epoch=0, keys=keys, ahead=0, views=1, draws=1)[:, 0, 0]
    return np.floor(often + chance).astype(np.uint32)
