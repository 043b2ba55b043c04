"""Pictures of a dataset as small JPEGs, for pages that people look at."""

import base64
import hashlib
import io
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from cluster.wording import in_bytes, visible
from ingest.dataset.keys import key_name, key_of, unit_and_slot
from ingest.dataset.open import Dataset
from ingest.image.decode import ImageError, ImageLimits, decode

THUMBNAIL = (480, 240)
THUMBNAIL_QUALITY = 80
# Below this a picture is shown in whole pixels, not smoothed.
TINY = 100
_LONGEST_CAPTION = 300
COLUMNS = ["offset", "size", "sha256", "width", "height", "url", "labels", "caption"]


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One image; jpeg is base64, empty if the sample is damaged."""

    key: str
    label: str
    caption: str
    url: str
    width: int
    height: int
    bytes: str
    ratio: float
    tiny: bool
    jpeg: str
    damage: str


def thumbnail(image: Image.Image) -> str:
    """A small JPEG of the picture, base64; pictures smaller than a thumbnail keep their pixels."""
    image.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    quality = 95 if max(image.size) < TINY else THUMBNAIL_QUALITY
    image.save(buffer, "JPEG", quality=quality)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def draw_positions(total: int, samples: int, seed: int) -> list[int]:
    """Distinct positions among all kept samples, ascending; memory does not grow with the dataset."""
    return sorted(random.Random(seed).sample(range(total), min(samples, total)))


def sample_photos(dataset: Dataset, *, samples: int, seed: int) -> Iterator[Photo]:
    """Images drawn without regard to anything but the seed, in the dataset's order."""
    ends = np.cumsum(dataset.counts)
    positions = draw_positions(len(dataset), samples, seed)
    placed = [(int(np.searchsorted(ends, position, side="right")), position) for position in positions]
    for unit_index, group in groupby(placed, key=lambda pair: pair[0]):
        first = int(ends[unit_index] - dataset.counts[unit_index])
        rows = dataset.kept_rows(unit_index, COLUMNS).take([position - first for _, position in group])
        yield from _photos(dataset, unit_index, rows)


def photos_of(dataset: Dataset, keys: Iterable[int]) -> dict[int, Photo]:
    """The images with these keys, as far as the dataset has them."""
    found = {}
    for unit, group in groupby(sorted(set(keys)), key=lambda key: unit_and_slot(key)[0]):
        unit_index = int(np.searchsorted(dataset.units, unit))
        if unit_index == len(dataset.units) or dataset.units[unit_index] != unit:
            continue
        table = dataset.kept_rows(unit_index, COLUMNS)
        slots = pa.array([unit_and_slot(key)[1] for key in group], table["slot"].type)
        rows = table.filter(pc.is_in(table["slot"], value_set=slots))
        for photo in _photos(dataset, unit_index, rows):
            found[int(photo.key)] = photo
    return found


def _photos(dataset: Dataset, unit_index: int, rows: pa.Table) -> Iterator[Photo]:
    for row in rows.to_pylist():
        key = key_name(key_of(int(dataset.units[unit_index]), row["slot"]))
        yield _photo(key, row, _read(dataset, unit_index, row))


def _read(dataset: Dataset, unit_index: int, row: dict[str, Any]) -> bytes:
    """An image's bytes; fewer where the shard is damaged, which the page then shows in the image's place."""
    try:
        return dataset.read_shard(unit_index, row["offset"], row["size"])
    except OSError:
        return b""


def _photo(key: str, row: dict[str, Any], data: bytes) -> Photo:
    jpeg = damage = ""
    if hashlib.sha256(data).digest() != row["sha256"]:
        damage = "damaged: not the bytes that were kept"
    limits = ImageLimits(max_bytes=row["size"], max_pixels=row["width"] * row["height"])
    try:
        jpeg = "" if damage else thumbnail(decode(data, limits=limits, at_least=_fit))
    except ImageError as error:
        damage = f"damaged: {error.reason}"
    return Photo(
        key=key,
        label=visible(", ".join(row["labels"])),
        caption=visible((row["caption"] or "")[:_LONGEST_CAPTION]),
        url=visible(row["url"]),
        width=row["width"],
        height=row["height"],
        bytes=in_bytes(row["size"]),
        ratio=min(max(row["width"] / row["height"], 0.45), 3.2),
        tiny=max(row["width"], row["height"]) < TINY,
        jpeg=jpeg,
        damage=damage,
    )


def _fit(width: int, height: int) -> tuple[int, int]:
    """The size of a picture's thumbnail."""
    scale = min(1.0, THUMBNAIL[0] / width, THUMBNAIL[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))
