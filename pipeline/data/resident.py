"""A dataset decoded once, and kept in the memory of the device that trains: crops are cut there.

For small images, which a GPU trains on faster than a CPU decodes them. Nothing else changes: order, draws,
substitutes and, to the bit, the crops are those of `RankBatches`.
"""

import contextlib
import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import UserError
from cluster.preflight.measure import GIB, devices
from ingest.dataset.open import Dataset
from ingest.image.decode import ImageError, decode
from pipeline.data.batch import Batch
from pipeline.data.image.crops import FLIP, crop_box
from pipeline.data.image.resample import crop_and_resize, installed_fixed_point
from pipeline.data.image.views import geometry
from pipeline.data.in_hand import InHand
from pipeline.data.node_cache import CachePlace
from pipeline.data.rank_batches import RankBatches
from pipeline.data.read_ahead.client import ReadAhead
from pipeline.data.read_ahead.demand import Listed
from pipeline.data.read_ahead.packs import PackedReader, Packs, open_reader
from pipeline.data.reader import BadSampleError, Reader
from pipeline.data.targets import Targets
from pipeline.data.workers import numbered
from pipeline.recipe.data import CropGroup

logger = logging.getLogger(__name__)
_DECODED_AT_ONCE = 256
# What a crop takes: see `Boxes`.
_NUMBERS = 6


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """One rank's rows of a global batch, before they are cut.

    Attributes:
        boxes: for each name int32 (count·b, 6), view-major: the image's place in the dataset; left, top,
            width, height in pixels; and 1 if the crop is flipped, else 0.
        parameters, keys, number, targets, positions: as in `Batch`.
    """

    boxes: dict[str, Tensor]
    parameters: dict[str, Tensor]
    keys: Tensor
    number: int
    targets: Targets | None
    positions: Tensor | None

    def pin_memory(self) -> "Boxes":
        """A copy, ready for asynchronous copies to a GPU; the CPU reads the parameters."""
        return Boxes(
            boxes={name: boxes.pin_memory() for name, boxes in self.boxes.items()},
            parameters={name: drawn.clone() for name, drawn in self.parameters.items()},
            keys=self.keys.clone(),
            number=self.number,
            targets=self.targets and self.targets.pin_memory(),
            positions=None if self.positions is None else self.positions.pin_memory(),
        )


class ResidentImages:
    """All images of a dataset, in the memory of a device.

    Args:
        groups: the crops that are cut, by name.
        workers: processes that decode.
        cache: where the node's readers share what they know of the dataset, and what is read ahead.

    Attributes:
        groups: as given.
        pixels: uint8 (N, H, W, 3), in the dataset's order.
        bad: place in the dataset → why nobody can use that image.

    Raises:
        UserError: if the images are not of one size, or too large for the crops or for the memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        groups: Mapping[str, CropGroup],
        *,
        workers: int,
        device: torch.device,
        cache: CachePlace | None = None,
    ) -> None:
        self.groups, self._fixed_point = groups, installed_fixed_point()
        width, height = _size_of_first(dataset, cache)
        _refuse_small_crops(dataset, groups, width, height)
        _refuse_little_memory(dataset, width, height, device)
        self.pixels = torch.empty((len(dataset), height, width, 3), dtype=torch.uint8, device=device)
        self.bad: dict[int, str] = {}
        chunks = -(-len(dataset) // _DECODED_AT_ONCE)
        workers = min(workers, chunks)
        listed = Listed(dataset.counts, np.arange(len(dataset)), _DECODED_AT_ONCE)
        ahead = ReadAhead(dataset, listed, workers=workers, cache=cache)
        made = numbered(
            _Decoder(dataset, listed, (width, height), cache, ahead.packs),
            0,
            workers=workers,
            pin_memory=device.type == "cuda",
            shared_bytes=_DECODED_AT_ONCE * height * width * 3,
        )
        with contextlib.closing(ahead.follow(made)) as decoded:
            for number, part in enumerate(islice(decoded, chunks)):
                first = number * _DECODED_AT_ONCE
                self.pixels[first : first + len(part.pixels)].copy_(part.pixels, non_blocking=True)
                self.bad |= part.bad
        mib = self.pixels.numel() / 2**20
        logger.info(
            "%d images of %d x %d are decoded on %s, %.1f MiB", len(dataset), width, height, device, mib
        )

    def cut(self, drawn: Boxes) -> Batch:
        """The crops, on the device."""
        views = {name: self._cut(drawn.boxes[name], group) for name, group in self.groups.items()}
        return Batch(
            views=views,
            parameters=drawn.parameters,
            keys=drawn.keys,
            number=drawn.number,
            targets=drawn.targets,
            positions=drawn.positions,
        )

    def _cut(self, boxes: Tensor, group: CropGroup) -> Tensor:
        moved = boxes.to(self.pixels.device, non_blocking=True)
        images = self.pixels.index_select(0, moved[:, 0])
        crops = crop_and_resize(
            images,
            moved[:, 1:5],
            size=group.size,
            interpolation=group.interpolation,
            fixed_point=self._fixed_point,
        )
        flipped = moved[:, 5].bool().view(-1, 1, 1, 1)
        return torch.where(flipped, crops.flip(2), crops)


class RankBoxes:
    """Draws the boxes of one rank's batches, each a pure function of its number."""

    def __init__(self, batches: RankBatches, dataset: Dataset, images: ResidentImages) -> None:
        self._batches, self._groups, self._bad = batches, images.groups, images.bad
        _, self._height, self._width, _ = images.pixels.shape
        self._starts = np.cumsum(dataset.counts) - dataset.counts

    @property
    def box_bytes(self) -> int:
        """Size of one batch's boxes."""
        return self._batches.count * sum(group.count for group in self._groups.values()) * _NUMBERS * 4

    def noting(self, in_hand: InHand) -> Self:
        """See `pipeline.data.workers.Makes`: nothing is decoded here."""
        return self

    def __call__(self, step: int) -> Boxes:
        """The rank's rows of micro-batch `step`, counted over all epochs.

        Raises:
            UserError, OSError: as `RankBatches`.
        """
        room = {
            name: np.empty((group.count, self._batches.count, _NUMBERS), np.int32)
            for name, group in self._groups.items()
        }
        rows = self._batches.fill(step, room, self._draw)
        boxes = {name: torch.from_numpy(of_name).flatten(0, 1) for name, of_name in room.items()}
        return Boxes(
            boxes=boxes,
            parameters=rows.parameters,
            keys=rows.keys,
            number=step,
            targets=rows.targets,
            positions=rows.positions,
        )

    def _draw(
        self, place: tuple[int, int], draws: NDArray[np.float64], out: Mapping[str, NDArray[Any]]
    ) -> None:
        image = int(self._starts[place[0]]) + place[1]
        if image in self._bad:
            raise BadSampleError(self._bad[image])
        owners = [group for group in self._groups.values() for _ in range(group.count)]
        targets = (target for of_name in out.values() for target in of_name)
        for numbers, group, target in zip(geometry(draws).tolist(), owners, targets, strict=True):
            box = crop_box(self._width, self._height, numbers, group)
            target[:] = image, *box, numbers[FLIP] < group.flip_probability


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    pixels: Tensor
    bad: dict[int, str]

    def pin_memory(self) -> "_Decoded":
        return _Decoded(pixels=self.pixels.pin_memory(), bad=self.bad)


class _Decoder:
    """Decodes chunks of a dataset by number, in whichever process it is called; behind the last, none."""

    def __init__(
        self,
        dataset: Dataset,
        listed: Listed,
        size: tuple[int, int],
        cache: CachePlace | None,
        packs: Packs | None,
    ) -> None:
        self._dataset, self._listed, self._size = dataset, listed, size
        self._cache, self._packs = cache, packs
        self._in_hand = InHand(0)
        self._reader: Reader | PackedReader | None = None

    def noting(self, in_hand: InHand) -> Self:
        """See `pipeline.data.workers.Makes`."""
        made = copy.copy(self)
        made._in_hand = in_hand
        return made

    def __call__(self, number: int) -> _Decoded:
        if self._reader is None:
            self._reader = open_reader(self._dataset, self._cache, self._packs)
        width, height = self._size
        units, rows = self._listed.at(number)
        places = list(zip(units.tolist(), rows.tolist(), strict=True))
        if isinstance(self._reader, PackedReader):
            self._reader.begin(number, places)
        else:
            self._reader.keep(units.tolist())
        first = number * _DECODED_AT_ONCE
        pixels, bad = np.zeros((len(places), height, width, 3), np.uint8), {}
        for position, (unit, row) in enumerate(places, first):
            try:
                data = self._reader.read(unit, row)
                with self._in_hand.holding((unit, row)):
                    image = decode(data)
            except (BadSampleError, ImageError) as error:
                bad[position] = str(error)
                continue
            if image.size != self._size:
                raise UserError(
                    f"run.resident needs images of one size: the first of {self._dataset.path} has "
                    f"{width} x {height} pixels, {self._reader.name(unit, row)} has {image.width} x "
                    f"{image.height}: ingest them with --resize and --crop center, or use run.resident=false"
                )
            pixels[position - first] = np.asarray(image)
        return _Decoded(pixels=torch.from_numpy(pixels), bad=bad)


def _size_of_first(dataset: Dataset, cache: CachePlace | None) -> tuple[int, int]:
    """Width and height of the first image that can be decoded."""
    reader = Reader(dataset, cache)
    try:
        for unit, count in enumerate(dataset.counts.tolist()):
            reader.keep([unit])
            for row in range(count):
                try:
                    return decode(reader.read(unit, row)).size
                except (BadSampleError, ImageError):
                    continue
    finally:
        reader.close()
    raise UserError(f"no image of {dataset.path} can be decoded: see `ingest verify --level decode`")


def _refuse_small_crops(dataset: Dataset, groups: Mapping[str, CropGroup], width: int, height: int) -> None:
    """JPEGs much larger than every crop are decoded at a smaller scale, of which there is one per batch."""
    largest = max(group.size for group in groups.values())
    if 2 * largest <= min(width, height):
        raise UserError(
            f"run.resident needs crops of more than half the images' shorter side: {dataset.path} has images "
            f"of {width} x {height} pixels, the largest of data.crops has {largest}: ingest the images with "
            f"--resize {2 * largest - 1} --crop center, or use run.resident=false"
        )


def _refuse_little_memory(dataset: Dataset, width: int, height: int, device: torch.device) -> None:
    needed = len(dataset) * height * width * 3 / GIB
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] / GIB
    else:
        free = devices(gpus=0, local_rank=0).free_gib
    if needed > free:
        raise UserError(
            f"run.resident does not fit: {len(dataset)} images of {width} x {height} pixels take "
            f"{needed:.1f} GiB, and {device} has {free:.1f} GiB free: use run.resident=false"
        )
