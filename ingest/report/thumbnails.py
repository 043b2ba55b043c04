"""Pictures of a dataset as small JPEGs, for pages that people look at."""

import base64
import hashlib
import io
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from cluster.wording import in_bytes, visible
from ingest.dataset.keys import key_name, key_of, unit_and_slot
from ingest.dataset.open import Dataset
from ingest.image.decode import ImageError, ImageLimits, decode
from ingest.video.container import CONTAINERS
from ingest.video.preview import preview_of

THUMBNAIL = (480, 240)
THUMBNAIL_QUALITY = 80
# Below this a picture is shown in whole pixels, not smoothed.
TINY = 100
_LONGEST_CAPTION = 300
# What is said of clips besides, if the dataset has it: one that others made need not.
CLIP = ["duration_ms", "video_codec", "audio_codec", "loudness_db", "parent"]
READ_AT_ONCE = 16
COLUMNS = ["offset", "size", "sha256", "width", "height", "format", "url", "labels", "caption", *CLIP]
# What browsers play, by the container.
_PLAYED = {"mp4": "video/mp4", "matroska": "video/webm"}
# So much of clips is put into a page; those beyond are shown, and not played.
PLAYED_BYTES = 48 << 20


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What a page has of a clip besides its picture.

    Attributes:
        words: its length and codecs.
        media: the type of its file, and the file as base64; empty if it is not played.
        wave: its loudness along the way, as points of a polygon of height 2 around 0; empty without a sound.
    """

    words: str
    media: tuple[str, str]
    wave: str


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One image, or one clip by a picture of it; jpeg is base64, empty if the sample is damaged."""

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
    clip: Clip | None = None


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
    """Images drawn without regard to anything but the seed, in the dataset's order; of clips, the first can
    be played, up to PLAYED_BYTES.
    """
    left = PLAYED_BYTES
    for photo in _drawn(dataset, samples=samples, seed=seed):
        size = 0 if photo.clip is None else len(photo.clip.media[1])
        if size > left and photo.clip is not None:
            yield replace(photo, clip=replace(photo.clip, media=("", "")))
        else:
            left -= size
            yield photo


def _drawn(dataset: Dataset, *, samples: int, seed: int) -> Iterator[Photo]:
    ends = np.cumsum(dataset.counts)
    drawn: dict[int, list[int]] = {}
    for position in draw_positions(len(dataset), samples, seed):
        unit_index = int(np.searchsorted(ends, position, side="right"))
        first = int(ends[unit_index] - dataset.counts[unit_index])
        drawn.setdefault(unit_index, []).append(position - first)
    tables = dataset.kept_rows_of(list(drawn), COLUMNS)
    rows = (table.take(places) for table, places in zip(tables, drawn.values(), strict=True))
    yield from _photos(dataset, zip(drawn, rows, strict=True))


def photos_of(dataset: Dataset, keys: Iterable[int]) -> dict[int, Photo]:
    """The images with these keys, as far as the dataset has them; clips by their pictures only."""
    wanted: dict[int, list[int]] = {}
    for unit, slot in map(unit_and_slot, sorted(set(keys))):
        unit_index = int(np.searchsorted(dataset.units, unit))
        if unit_index < len(dataset.units) and dataset.units[unit_index] == unit:
            wanted.setdefault(unit_index, []).append(slot)
    tables = dataset.kept_rows_of(list(wanted), COLUMNS)
    rows = (
        table.filter(pc.is_in(table["slot"], value_set=pa.array(slots, table["slot"].type)))
        for table, slots in zip(tables, wanted.values(), strict=True)
    )
    photos = _photos(dataset, zip(wanted, rows, strict=True))
    return {int(photo.key): replace(photo, clip=None) for photo in photos}


def _photos(dataset: Dataset, rows: Iterable[tuple[int, pa.Table]]) -> Iterator[Photo]:
    """Those of rows of units, by the units' places; their bytes are read many at once."""
    images = ((unit_index, row) for unit_index, table in rows for row in table.to_pylist())
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        while some := list(islice(images, READ_AT_ONCE)):
            read = pool.map(lambda image: _read(dataset, *image), some)
            for (unit_index, row), data in zip(some, read, strict=True):
                yield _photo(key_name(key_of(int(dataset.units[unit_index]), row["slot"])), row, data)


def _read(dataset: Dataset, unit_index: int, row: dict[str, Any]) -> bytes:
    """An image's bytes; fewer where the shard is damaged, which the page then shows in the image's place."""
    try:
        return dataset.read_shard(unit_index, row["offset"], row["size"])
    except OSError:
        return b""


def _photo(key: str, row: dict[str, Any], data: bytes) -> Photo:
    jpeg = damage = ""
    clip = None
    if hashlib.sha256(data).digest() != row["sha256"]:
        damage = "damaged: not the bytes that were kept"
    elif row["format"] in CONTAINERS:
        preview = preview_of(data, size=THUMBNAIL, place=key)
        jpeg = base64.b64encode(preview.jpeg).decode("ascii")
        damage = f"damaged: {preview.problem}" if preview.problem else ""
        clip = _clip(row, data, preview.peaks)
    else:
        limits = ImageLimits(max_bytes=row["size"], max_pixels=row["width"] * row["height"])
        try:
            jpeg = thumbnail(decode(data, limits=limits, at_least=_fit))
        except ImageError as error:
            damage = f"damaged: {error.reason}"
    return Photo(
        key=key,
        label=visible(", ".join(row["labels"])),
        caption=visible((row["caption"] or "")[:_LONGEST_CAPTION]),
        url=visible(row.get("parent") or row["url"]),
        width=row["width"],
        height=row["height"],
        bytes=in_bytes(row["size"]),
        ratio=min(max(row["width"] / row["height"], 0.45), 3.2),
        tiny=max(row["width"], row["height"]) < TINY,
        jpeg=jpeg,
        damage=damage,
        clip=clip,
    )


def _clip(row: dict[str, Any], data: bytes, peaks: Sequence[float]) -> Clip:
    length, codec, loudness = row.get("duration_ms"), row.get("video_codec"), row.get("loudness_db")
    words = [] if length is None else [f"{length / 1000:.1f} s"]
    words += [] if codec is None else [codec, row.get("audio_codec") or "no sound"]
    words += [] if loudness is None else [f"{loudness:.0f} dB"]
    media = _PLAYED.get(row["format"], "")
    line = [*enumerate(peaks), *((place, -peak) for place, peak in reversed(list(enumerate(peaks))))]
    return Clip(
        words=" · ".join(words),
        media=(media, base64.b64encode(data).decode("ascii") if media else ""),
        wave=" ".join(f"{place},{height:.3f}" for place, height in line),
    )


def _fit(width: int, height: int) -> tuple[int, int]:
    """The size of a picture's thumbnail."""
    scale = min(1.0, THUMBNAIL[0] / width, THUMBNAIL[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))
