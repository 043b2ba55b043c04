"""The verdict on one image, and the bytes to store: sniff, bound, decode, turn upright, hash, resize, encode.

Bytes come from strangers. How they become pixels is in `ingest.image.decode`. Time and memory are bounded by
the process that calls (`ingest.image.check_worker`), not here.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from ingest.image.decode import ImageLimits, Opened, Status, as_image_error, open_image
from ingest.image.header import sniff
from ingest.image.orientation import turned, upright
from ingest.image.phash import HASH_SIDE, perceptual_hash
from ingest.image.pixels import as_rgb
from ingest.image.stripping import stripped

Crop = Literal["keep_ratio", "center"]
Encoding = Literal["jpeg", "webp"]

# What the encoders can hold.
_LONGEST = {"jpeg": 65_500, "webp": 16_383}


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
        icc: whether colour profiles are followed: pixels that are encoded are converted to sRGB, and bytes
            that are kept keep their profile, for whoever decodes them. Otherwise the numbers stay as they
            are, and profiles go.
        phash: whether to make the perceptual hash. If neither it nor `resize` needs the pixels, a JPEG's are
            not decoded: its headers are, and its segments are there, up to its end mark. Damage within its
            entropy-coded data then shows only to whoever decodes it.
    """

    limits: ImageLimits = field(default_factory=ImageLimits)
    resize: int | None = None
    crop: Crop = "keep_ratio"
    encoding: Encoding = "jpeg"
    quality: int = 95
    icc: bool = True
    phash: bool = True


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The verdict on one image. Sizes are upright pixels; only status and reason are sure to be there.

    Attributes:
        data: the bytes to store; None means the original bytes.
        sha256: of the bytes to store, hex.
        columns: what its row says besides.
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
    columns: Mapping[str, Any] = field(default_factory=dict)
    data: bytes | None = None


def check(data: bytes, treatment: Treatment) -> Checked:
    """Judge one image and make the bytes to store, which carry no metadata.

    What is kept can be trained on: its first frame decodes from the first pixel to the last, but for JPEGs
    whose pixels nobody asked for (`Treatment.phash`).
    """
    try:
        opened = open_image(data, treatment.limits)
        if treatment.resize is None:
            return _kept_as_it_is(data, opened, treatment)
        return _made_smaller(opened, treatment)
    except Exception as error:
        verdict = as_image_error(error)
        return Checked(status=verdict.status, reason=verdict.reason, format=sniff(data))


def _kept_as_it_is(data: bytes, opened: Opened, treatment: Treatment) -> Checked:
    kind, turn = opened.kind, opened.turn
    if treatment.icc:
        # Here, and not in training, a profile may take too long, or the process.
        opened.conversion()
    stored = stripped(data, kind, turn, profile=treatment.icc)
    if stored is not data:
        # What is judged is what is stored.
        opened = open_image(stored, treatment.limits)
    size = opened.image.size
    if kind == "jpeg":
        # Grey at 1/8 scale finds truncation as the full decode does, and saves most of its work.
        opened.image.draft("L", (2 * HASH_SIDE, 2 * HASH_SIDE))
    picture = None
    if kind != "jpeg" or treatment.phash:
        # A hash of kept bytes passes over their profile: it would change a bit or two, and costs time.
        picture = opened.picture(icc=False)
    # Of a TIFF on its side, Pillow knows the upright size only now.
    width, height = turned(size if kind == "jpeg" or picture is None else picture.size, turn)
    return Checked(
        status="kept",
        format=kind,
        width=width,
        height=height,
        original_width=width,
        original_height=height,
        sha256=hashlib.sha256(stored).hexdigest(),
        phash=perceptual_hash(picture, orientation=turn) if picture is not None and treatment.phash else None,
        data=None if stored is data else stored,
    )


def _made_smaller(opened: Opened, treatment: Treatment) -> Checked:
    image, kind, turn = opened.image, opened.kind, opened.turn
    size = image.size
    if kind == "jpeg":
        image.draft("RGB", _target(size, treatment))
    # After resizing there are fewer pixels to convert; other modes have to be converted to be RGB at all.
    late = opened.conversion() if treatment.icc and image.mode == "RGB" else None
    picture = as_rgb(opened.picture(icc=treatment.icc and late is None))
    size = size if kind == "jpeg" else picture.size
    target = _target(size, treatment)
    if picture.size != target:
        box = _middle(picture.size) if treatment.crop == "center" else None
        picture = picture.resize(target, Image.Resampling.BICUBIC, box)
    picture = upright(picture, turn)
    if late is not None:
        picture = late(picture)
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
