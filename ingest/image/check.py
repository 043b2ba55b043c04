"""The verdict on one image, and the bytes to store: sniff, bound, decode, turn upright, hash, resize, encode.

Bytes come from strangers. How they become pixels is in `ingest.image.decode`. Time and memory are bounded by
the process that calls (`ingest.image.check_worker`), not here.
"""

import hashlib
import io
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from ingest.image.decode import ImageLimits, Status, as_image_error, as_rgb, open_image
from ingest.image.header import sniff
from ingest.image.orientation import orientation_of, turned, upright
from ingest.image.phash import HASH_SIDE, perceptual_hash
from ingest.image.stripping import stripped

Crop = Literal["keep_ratio", "center"]
Encoding = Literal["jpeg", "webp"]

# What the encoders can hold.
_LONGEST = {"jpeg": 65_500, "webp": 16_383}
# In any of these ways a PNG may tell its orientation, before the pixels or after them.
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What a crawl makes of an image.

    Attributes:
        limits: what is refused.
        resize: the shorter side in pixels after resizing and encoding, never enlarged; None keeps the
            original bytes, less their metadata.
        crop: with `resize`: the whole picture in its ratio, or the square in its middle.
        encoding: with `resize`: the format that is stored.
        quality: of the encoder, 1 to 100.
        phash: whether to make the perceptual hash. If neither it nor `resize` needs the pixels, a JPEG's are
            not decoded: its headers are, and its segments are there, up to its end mark. Damage within its
            entropy-coded data then shows only to whoever decodes it.
    """

    limits: ImageLimits = field(default_factory=ImageLimits)
    resize: int | None = None
    crop: Crop = "keep_ratio"
    encoding: Encoding = "jpeg"
    quality: int = 95
    phash: bool = True


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The verdict on one image. Sizes are upright pixels; only status and reason are sure to be there.

    Attributes:
        data: the bytes to store; None means the original bytes.
        sha256: of the bytes to store, hex.
    """

    status: Status
    reason: str = ""
    format: str | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    sha256: str | None = None
    phash: int | None = None
    data: bytes | None = None


def check(data: bytes, treatment: Treatment) -> Checked:
    """Judge one image and make the bytes to store, which carry no metadata.

    What is kept can be trained on: its first frame decodes from the first pixel to the last, but for JPEGs
    whose pixels nobody asked for (`Treatment.phash`).
    """
    try:
        image, kind = open_image(data, treatment.limits)
        if treatment.resize is None:
            return _kept_as_it_is(data, image, kind, treatment)
        return _made_smaller(image, kind, treatment)
    except Exception as error:
        verdict = as_image_error(error)
        return Checked(status=verdict.status, reason=verdict.reason, format=sniff(data))


def _kept_as_it_is(data: bytes, image: Image.Image, kind: str, treatment: Treatment) -> Checked:
    # Only a PNG that says something has to be decoded for what it says.
    silent = kind == "png" and not any(name in data for name in _PNG_ORIENTATION)
    turn = 1 if silent else orientation_of(image, kind)
    stored = stripped(data, kind, turn)
    if stored is not data:
        # What is judged is what is stored.
        image, _ = open_image(stored, treatment.limits)
    size = image.size
    if kind == "jpeg":
        # Grey at 1/8 scale finds truncation as the full decode does, and saves most of its work.
        image.draft("L", (2 * HASH_SIDE, 2 * HASH_SIDE))
    if kind != "jpeg" or treatment.phash:
        image.load()
    # Of a TIFF on its side, Pillow knows the upright size only now.
    width, height = turned(size if kind == "jpeg" else image.size, turn)
    grey = image.mode == "L" and "transparency" not in image.info
    return Checked(
        status="kept",
        format=kind,
        width=width,
        height=height,
        original_width=width,
        original_height=height,
        sha256=hashlib.sha256(stored).hexdigest(),
        phash=perceptual_hash(image if grey else as_rgb(image), orientation=turn)
        if treatment.phash
        else None,
        data=None if stored is data else stored,
    )


def _made_smaller(image: Image.Image, kind: str, treatment: Treatment) -> Checked:
    size = image.size
    if kind == "jpeg":
        image.draft("RGB", _target(size, treatment))
    image.load()
    size = size if kind == "jpeg" else image.size
    turn = orientation_of(image, kind)
    picture, target = as_rgb(image), _target(size, treatment)
    if picture.size != target:
        box = _middle(picture.size) if treatment.crop == "center" else None
        picture = picture.resize(target, Image.Resampling.BICUBIC, box)
    picture = upright(picture, turn)
    stored = _encode(picture, treatment.encoding, treatment.quality)
    original_width, original_height = turned(size, turn)
    return Checked(
        status="kept",
        format=treatment.encoding,
        width=picture.width,
        height=picture.height,
        original_width=original_width,
        original_height=original_height,
        sha256=hashlib.sha256(stored).hexdigest(),
        phash=perceptual_hash(picture) if treatment.phash else None,
        data=stored,
    )


def _target(size: tuple[int, int], treatment: Treatment) -> tuple[int, int]:
    """The size to store, never enlarged, and within what the format can hold."""
    longest = _LONGEST[treatment.encoding]
    shorter = treatment.resize or min(size)
    if treatment.crop == "center":
        return (min(shorter, longest, *size),) * 2
    scale = min(1.0, shorter / min(size), longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _middle(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The square in the middle: left, top, right, bottom. Whole pixels: what keeps its scale stays sharp."""
    left, top = ((length - min(size)) // 2 for length in size)
    return left, top, left + min(size), top + min(size)


def _encode(picture: Image.Image, encoding: Encoding, quality: int) -> bytes:
    # Pillow would carry comments over from the original.
    picture.info = {}
    buffer = io.BytesIO()
    picture.save(buffer, encoding, quality=quality)
    return buffer.getvalue()
