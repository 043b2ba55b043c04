"""Images as evaluations see them: one resize and one crop, no draw."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, PositiveFloat
from torch import Tensor

from cluster.errors import UserError
from cluster.typed_yaml import Section
from ingest.dataset.open import Dataset
from ingest.image.decode import ImageError, decode
from pipeline.data.listed import shown_batches
from pipeline.data.node_cache import CachePlace
from pipeline.data.reader import BadSampleError
from pipeline.data.to_device import constant
from pipeline.recipe.data import Interpolation
from pipeline.recipe.pretrain import PretrainRecipe

Side = Annotated[int, Field(gt=0, le=4096)]  # pixels; what an exported trunk asks for may come from anybody


class Preprocessing(Section):
    """How an image becomes a trunk's input: short side to `resize` by an antialiased filter, the centre
    `image_size`, normalised.

    Trunks that were exported before `interpolation` was written down were shown bicubic images.
    """

    image_size: Side
    resize: Side
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """uint8 images (n, 3, S, S) and int64 keys (n,)."""

    images: Tensor
    keys: Tensor


def image_batches(
    dataset: Dataset,
    positions: NDArray[np.int64],
    *,
    preprocessing: Preprocessing,
    workers: int,
    pin_memory: bool = False,
    batch_size: int = 256,
    cache: CachePlace | None = None,
) -> Generator[ImageBatch]:
    """Preprocessed images at the given positions of the dataset's global axis, in that order.

    Args:
        cache: where the node's readers share what they know of the dataset, and what is read ahead.
    """
    shown = shown_batches(
        dataset,
        positions,
        partial(_show, preprocessing),
        sample_bytes=3 * preprocessing.image_size**2,
        workers=workers,
        pin_memory=pin_memory,
        batch_size=batch_size,
        cache=cache,
    )
    with contextlib.closing(shown):
        for batch in shown:
            yield ImageBatch(images=batch.views["image"].permute(0, 3, 1, 2), keys=batch.keys)


def _show(preprocessing: Preprocessing, data: bytes) -> dict[str, NDArray[np.uint8]]:
    try:
        return {"image": np.asarray(fit_image(decode(data), preprocessing))}
    except ImageError as error:
        raise BadSampleError(str(error)) from error


def fit_image(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Short side to `resize`, then the centre square of `image_size`, antialiased."""
    size, crop = preprocessing.resize, preprocessing.image_size
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - crop) / 2 / width, (height - crop) / 2 / height
    box = (
        left * image.width,
        top * image.height,
        (left + crop / width) * image.width,
        (top + crop / height) * image.height,
    )
    # One resampling of the centre box equals resize-then-crop, without computing what is cut away.
    return image.resize((crop, crop), Image.Resampling[preprocessing.interpolation.upper()], box=box)


def normalise(images: Tensor, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """uint8 (n, 3, S, S) → float32 on the device, channels_last, zero mean and unit variance per channel."""
    moved = images.to(device=device, memory_format=torch.channels_last, non_blocking=True).float()
    # In place: a batch of crops of 224 is 154 MB. By rows, R G B R G B …: three values alone are too few for
    # the vectors of a CPU.
    count, _, height, width = moved.shape
    rows = moved.permute(0, 2, 3, 1).view(count, height, 3 * width)
    mean = constant(preprocessing.mean, device).repeat(width) * 255
    std = constant(preprocessing.std, device).repeat(width) * 255
    rows.sub_(mean).div_(std)
    return moved


def evenly_spaced(total: int, limit: int | None) -> NDArray[np.int64]:
    """At most `limit` positions out of `total`, evenly spaced, ascending."""
    if limit is None or limit >= total:
        return np.arange(total, dtype=np.int64)
    return np.arange(limit, dtype=np.int64) * total // limit


def evaluation_preprocessing(recipe: PretrainRecipe) -> Preprocessing:
    """How images are shown to a trunk of this recipe, as `pipeline.recipe.pretrain.Evaluation` has it.

    Raises:
        UserError: it is shown videos.
    """
    if recipe.data.is_of_clips:
        raise UserError("this trunk is shown clips or their sound, and is scored on videos, not on images")
    largest, said = max(recipe.data.crops, key=lambda group: group.size), recipe.evaluation
    size = said.image_size or (recipe.probe.image_size if recipe.probe else largest.size)
    return Preprocessing(
        image_size=size,
        resize=said.resize or (round(size * 8 / 7) if size >= 96 else size),
        interpolation=said.interpolation or largest.interpolation,
        mean=recipe.data.mean,
        std=recipe.data.std,
    )
