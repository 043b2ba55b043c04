"""Bytes to pixels, within limits.

Bytes come from strangers. Format and size are judged from the header (`ingest.image.header`) before a decoder
sees them, only six decoders can be reached, and every way to fail is an `ImageError` with a status and a
reason.

What a picture is, decided once for the crawler and for training:
- the first frame of an animation, turned upright by its EXIF orientation, 8-bit RGB;
- transparent parts show white: the colour hidden under them is arbitrary, and pages are mostly white;
- 16-bit grey keeps its upper 8 bits; 32-bit and float grey, which have no agreed range, are stretched from
  their smallest to their largest value; colour profiles are ignored.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# The plugins register themselves; without this the first WebP or TIFF would import all forty of Pillow's
# formats.
from PIL import Image, TiffImagePlugin, WebPImagePlugin

from ingest.image.header import claimed_size, sniff
from ingest.image.orientation import orientation_of, turned, upright

Status = Literal["kept", "rejected", "failed"]
_DECODERS = {
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": WebPImagePlugin.WebPImageFile.format,
    "gif": "GIF",
    "bmp": "BMP",
    "tiff": TiffImagePlugin.TiffImageFile.format,
}


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


def decode(
    data: bytes,
    *,
    limits: ImageLimits = ImageLimits(),
    at_least: Callable[[int, int], tuple[int, int]] | None = None,
) -> Image.Image:
    """The upright RGB picture in these bytes.

    Args:
        data: a whole image file.
        limits: what is refused before decoding.
        at_least: called with a JPEG's upright width and height, answers the least (width, height) that will
            do: the picture is decoded at the smallest DCT scale, 1, 1/2, 1/4 or 1/8, that is not smaller in
            either direction.

    Raises:
        ImageError: it is refused, or cannot be decoded completely.
    """
    try:
        image, kind = open_image(data, limits)
        if kind == "jpeg" and at_least is not None:
            turn = orientation_of(image, kind)
            image.draft("RGB", turned(at_least(*turned(image.size, turn)), turn))
        image.load()
        return upright(as_rgb(image), orientation_of(image, kind))
    except ImageError:
        raise
    except Exception as error:
        raise as_image_error(error) from error


def open_image(data: bytes, limits: ImageLimits) -> tuple[Image.Image, str]:
    """The image with only its header read, and its format; nothing of the claimed size is allocated."""
    if not data:
        raise ImageError("rejected", "empty")
    if len(data) > limits.max_bytes:
        raise ImageError("rejected", "too_many_bytes")
    kind = sniff(data)
    if kind is None:
        raise ImageError("rejected", "not_an_image")
    claimed = claimed_size(data, kind)
    if claimed is not None and claimed[0] * claimed[1] > limits.max_pixels:
        raise ImageError("rejected", "too_many_pixels")
    if kind == "webp" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        # Its decoder would only say that it failed.
        raise ImageError("failed", "truncated")
    image = Image.open(io.BytesIO(data), formats=(_DECODERS[kind],))
    # Once more: a GIF's frame may be larger than its screen, and decoders may read another header than we
    # did.
    if image.width * image.height > limits.max_pixels:
        raise ImageError("rejected", "too_many_pixels")
    return image, kind


def as_image_error(error: Exception) -> ImageError:
    """Pillow's plugins raise nearly every kind of exception on damaged input; here each becomes a verdict."""
    if isinstance(error, ImageError):
        return error
    if isinstance(error, MemoryError):
        return ImageError("failed", "memory_limit")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError("rejected", "too_many_pixels")
    text = str(error).lower()
    if isinstance(error, EOFError) or "truncated" in text or "unexpected end" in text:
        return ImageError("failed", "truncated")
    if text.startswith("decoder ") and text.endswith(" not available"):
        return ImageError("failed", "no_decoder")
    return ImageError("failed", "undecodable")


def as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; see the module's docstring for transparency and deep greys."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layered = image.convert("RGBA")
        flat = Image.new("RGB", image.size, "white")
        flat.paste(layered, mask=layered.getchannel("A"))
        return flat
    # Converting RGB to RGB would copy every pixel, for half of the whole decode's time.
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_stretched(np.asarray(image, np.float64))).convert("RGB")
    return image.convert("RGB")


def _stretched(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    grey: NDArray[np.float64] = np.rint((values - low) * (255 / (high - low) if high > low else 0.0))
    return grey.astype(np.uint8)
