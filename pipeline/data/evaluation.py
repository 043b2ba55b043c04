"""Images as evaluations see them: one resize and one crop, no draw."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Self

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
from pipeline.data.in_hand import InHand
from pipeline.data.node_cache import CachePlace
from pipeline.data.read_ahead.client import ReadAhead
from pipeline.data.read_ahead.demand import Listed
from pipeline.data.read_ahead.packs import PackedReader, Packs, open_reader
from pipeline.data.reader import BadSampleError, Reader
from pipeline.data.workers import numbered
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

    def pin_memory(self) -> ImageBatch:
        """A copy, ready for an asynchronous copy to a GPU."""
        return ImageBatch(images=self.images.pin_memory(), keys=self.keys.clone())


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
    count = -(-len(positions) // batch_size)
    workers = min(workers, count)
    size = 3 * preprocessing.image_size**2 * batch_size
    listed = Listed(dataset.counts, positions, batch_size)
    ahead = ReadAhead(dataset, listed, workers=workers, cache=cache)
    make = _Batches(dataset, listed, preprocessing, cache, ahead.packs)
    made = ahead.follow(numbered(make, 0, workers=workers, pin_memory=pin_memory, shared_bytes=size))
    with contextlib.closing(made):
        yield from islice(made, count)


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
    mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1) * 255
    std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1) * 255
    return moved.sub_(mean).div_(std)  # in place: a batch of crops of 224 is 154 MB


class _Batches:
    """Makes batches by number, in whichever process it is called; empty ones behind the last."""

    def __init__(
        self,
        dataset: Dataset,
        listed: Listed,
        preprocessing: Preprocessing,
        cache: CachePlace | None,
        packs: Packs | None,
    ) -> None:
        self._dataset, self._listed, self._preprocessing = dataset, listed, preprocessing
        self._cache, self._packs = cache, packs
        self._in_hand = InHand(0)
        # Opened in the process that reads: file descriptors do not travel.
        self._reader: Reader | PackedReader | None = None

    def noting(self, in_hand: InHand) -> Self:
        """See `pipeline.data.workers.Makes`."""
        made = copy.copy(self)
        made._in_hand = in_hand
        return made

    def __call__(self, number: int) -> ImageBatch:
        units, rows = self._listed.at(number)
        places = list(zip(units.tolist(), rows.tolist(), strict=True))
        self._open(number, places)
        side = self._preprocessing.image_size
        images, keys = np.empty((len(places), side, side, 3), np.uint8), []
        for index, (unit, row) in enumerate(places):
            images[index] = np.asarray(fit_image(self._image(unit, row), self._preprocessing))
            keys.append(self._open_reader().key(unit, row))
        return ImageBatch(
            images=torch.from_numpy(images).permute(0, 3, 1, 2),
            keys=torch.tensor(keys, dtype=torch.int64),
        )

    def _open(self, number: int, places: list[tuple[int, int]]) -> None:
        """Keep what is known of a batch's units, for the next one may need them, and of no others."""
        reader, units = self._open_reader(), dict.fromkeys(unit for unit, _ in places)
        if isinstance(reader, PackedReader):
            reader.begin(number, places)
        else:
            reader.keep(units)

    def _image(self, unit: int, row: int) -> Image.Image:
        """A decoded sample; unlike training, an evaluation takes no substitutes."""
        reader = self._open_reader()
        try:
            data = reader.read(unit, row)
            with self._in_hand.holding((unit, row)):
                return decode(data)
        except (BadSampleError, ImageError) as error:
            raise UserError(
                f"{reader.name(unit, row)} cannot be evaluated ({error}): see what is damaged with "
                f"`ingest verify --level decode {self._dataset.path}`, and restore it"
            ) from error

    def _open_reader(self) -> Reader | PackedReader:
        if self._reader is None:
            self._reader = open_reader(self._dataset, self._cache, self._packs)
        return self._reader


def evenly_spaced(total: int, limit: int | None) -> NDArray[np.int64]:
    """At most `limit` positions out of `total`, evenly spaced, ascending."""
    if limit is None or limit >= total:
        return np.arange(total, dtype=np.int64)
    return np.arange(limit, dtype=np.int64) * total // limit


def evaluation_preprocessing(recipe: PretrainRecipe) -> Preprocessing:
    """How images are shown to a trunk of this recipe, as `pipeline.recipe.pretrain.Evaluation` has it."""
    largest, said = max(recipe.data.crops, key=lambda group: group.size), recipe.evaluation
    size = said.image_size or (recipe.probe.image_size if recipe.probe else largest.size)
    return Preprocessing(
        image_size=size,
        resize=said.resize or (round(size * 8 / 7) if size >= 96 else size),
        interpolation=said.interpolation or largest.interpolation,
        mean=recipe.data.mean,
        std=recipe.data.std,
    )
