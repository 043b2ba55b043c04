"""Bytes to pixels, within limits.

Bytes come from strangers. Format and size are judged from the header (`ingest.image.header`) before a decoder
sees them, only seven decoders can be reached, and every way to fail is an `ImageError` with a status and a
reason.

What a picture is, turned upright, as 8-bit sRGB, is said in `ingest.image.pixels`.
"""

import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

# The plugins register themselves; without this the first WebP or TIFF would import all forty of Pillow's
# formats.
from PIL import AvifImagePlugin, Image, ImageFile, TiffImagePlugin, WebPImagePlugin

from ingest.image import tiff
from ingest.image.colour import Conversion, conversion
from ingest.image.cpu_limit import CpuLimit
from ingest.image.header import SHORTEST_SCAN, claimed_size, jpeg_scans, sniff
from ingest.image.orientation import orientation_of, turned, upright
from ingest.image.pixels import as_rgb, flattened, loaded
from ingest.image.stripping import png_words, stripped

Status = Literal["kept", "rejected", "failed"]
_DECODERS = {
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": WebPImagePlugin.WebPImageFile.format,
    "gif": "GIF",
    "bmp": "BMP",
    "tiff": TiffImagePlugin.TiffImageFile.format,
} | ({"avif": AvifImagePlugin.AvifImageFile.format} if AvifImagePlugin.SUPPORTED else {})
# One thread, whose memory and time are counted with the process's; Pillow has no other place to say so.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
# A JPEG's decoder goes through the whole picture for each scan, however empty: 400 KB can take minutes.
# Encoders write a dozen at most. The largest picture may have so many, a smaller one more in proportion.
_SCANS = 32
# The beginning of a scan takes as long as so many pixels.
_LEAST_PIXELS_OF_A_SCAN = 1 << 16
# CPU time for one picture, where no process that can be ended decodes it. Three times what a crawl gives.
SECONDS = 30.0
# So few bytes take no longer than their pixels and scans may, however they are parsed. To start a clock costs
# as much as a fourteenth of a small picture takes.
_SHORT = 256 << 10
# In any of these ways a PNG may tell its orientation, before the pixels or after them.
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


class ImageError(Exception):
    """Why an image is not usable.

    Attributes:
        status: "rejected", we do not want it; or "failed", it could not be read.
        reason: one word for the row and the statistics.
    """

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What is refused before decoding: files over `max_bytes`, pictures that claim over `max_pixels`."""

    max_bytes: int = 32 << 20
    max_pixels: int = 64_000_000


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An image of which only the header was read.

    Attributes:
        image: Pillow's, not loaded.
        data: the bytes that it is read from.
        kind: its format, as `ingest.image.header.sniff` tells it.
        turn: its EXIF orientation, 1 to 8.
        negative: its zeros are white, and Pillow takes them for black.
    """

    image: ImageFile.ImageFile
    data: bytes
    kind: str
    turn: int
    negative: bool = False

    def conversion(self) -> Conversion | None:
        """What its colour profile does; None if it has none that can be used."""
        profile = self.image.info.get("icc_profile")
        return conversion(profile) if profile else None

    def picture(self, *, icc: bool = True) -> Image.Image:
        """All its pixels as 8-bit RGB or grey, not turned.

        Args:
            icc: whether its colour profile is followed, or its numbers are taken for sRGB.
        """
        conversion = self.conversion() if icc else None
        return flattened(loaded(self.image, self.data), conversion, negative=self.negative)


def decode(
    data: bytes,
    *,
    limits: ImageLimits = ImageLimits(),
    at_least: Callable[[int, int], tuple[int, int]] | None = None,
) -> Image.Image:
    """The upright sRGB picture in these bytes.

    Args:
        data: a whole image file.
        limits: what is refused before decoding.
        at_least: called with a JPEG's upright width and height, answers the least (width, height) that will
            do: the picture is decoded at the smallest DCT scale, 1, 1/2, 1/4 or 1/8, that is not smaller in
            either direction.

    Raises:
        ImageError: it is refused, or cannot be decoded completely, or takes more than `SECONDS`.
    """
    try:
        with CpuLimit(SECONDS, ImageError("failed", "time_limit")) if len(data) > _SHORT else nullcontext():
            opened = open_image(data, limits)
            if opened.kind == "jpeg" and at_least is not None:
                turn = opened.turn
                opened.image.draft("RGB", turned(at_least(*turned(opened.image.size, turn)), turn))
            return upright(as_rgb(opened.picture()), opened.turn)
    except ImageError:
        raise
    except Exception as error:
        raise as_image_error(error) from error


def decoded(image: Image.Image) -> Image.Image:
    """What `decode` gives of the file that Pillow has opened an image from; of pixels that come from no file,
    what they are by the same rules.

    Raises:
        ImageError: as of `decode`.
    """
    file = image.fp if isinstance(image, ImageFile.ImageFile) else None
    if file is not None and file.seekable():
        place = file.tell()
        file.seek(0)
        data = file.read()
        file.seek(place)
        if sniff(data) in _DECODERS:
            return decode(data)
    profile = image.info.get("icc_profile")
    image.load()
    picture = flattened(image, conversion(profile) if profile else None, negative=False)
    return upright(as_rgb(picture), orientation_of(image))


def open_image(data: bytes, limits: ImageLimits) -> Opened:
    """The image with only its header read; nothing of the claimed size is allocated."""
    if not data:
        raise ImageError("rejected", "empty")
    if len(data) > limits.max_bytes:
        raise ImageError("rejected", "too_many_bytes")
    kind = sniff(data)
    if kind is None:
        raise ImageError("rejected", "not_an_image")
    if kind not in _DECODERS:
        raise ImageError("rejected", "format_not_supported")
    claimed = claimed_size(data, kind)
    if claimed is not None and claimed[0] * claimed[1] > limits.max_pixels:
        raise ImageError("rejected", "too_many_pixels")
    if kind == "webp" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        # Its decoder would only say that it failed.
        raise ImageError("failed", "truncated")
    turn = _png_turn(data) if kind == "png" else None
    positive = tiff.as_black_is_zero(data) if kind == "tiff" else None
    if kind == "png":
        # Pillow gives up a PNG for damage in its texts, and for a missing end.
        data = stripped(data, "png", 1)
    data = positive or data
    image = _open(data, kind)
    # Once more: a GIF's frame may be larger than its screen, and decoders may read another header than we
    # did.
    if image.width * image.height > limits.max_pixels:
        raise ImageError("rejected", "too_many_pixels")
    if kind == "jpeg":
        if image.size != claimed:
            # libjpeg reads it by itself and writes rows of that length into Pillow's memory: Pillow before 13
            # has no other guard (GHSA-8g5g-8vmr-9782).
            raise ImageError("failed", "undecodable")
        if _has_too_many_scans(data, image.size, limits):
            raise ImageError("rejected", "too_many_scans")
    return Opened(
        image=image,
        data=data,
        kind=kind,
        turn=orientation_of(image) if turn is None else turn,
        negative=positive is not None,
    )


def _has_too_many_scans(data: bytes, size: tuple[int, int], limits: ImageLimits) -> bool:
    most_pixels = max(limits.max_pixels, ImageLimits().max_pixels)
    most = _SCANS * most_pixels // max(size[0] * size[1], _LEAST_PIXELS_OF_A_SCAN)
    return len(data) // SHORTEST_SCAN > most and jpeg_scans(data, most=most) > most


def _open(data: bytes, kind: str) -> ImageFile.ImageFile:
    return Image.open(io.BytesIO(data), formats=(_DECODERS[kind],))


def _png_turn(data: bytes) -> int:
    if not any(name in data for name in _PNG_ORIENTATION):
        return 1
    try:
        return orientation_of(_open(png_words(data), "png"))
    except Exception:
        return 1


def as_image_error(error: Exception) -> ImageError:
    """Pillow's plugins raise nearly every kind of exception on damaged input; here each becomes a verdict."""
    if isinstance(error, ImageError):
        return error
    text = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in text:
        return ImageError("failed", "memory_limit")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError("rejected", "too_many_pixels")
    if isinstance(error, EOFError) or "truncated" in text or "unexpected end" in text:
        return ImageError("failed", "truncated")
    if text.startswith("decoder ") and text.endswith(" not available"):
        return ImageError("failed", "no_decoder")
    return ImageError("failed", "undecodable")
