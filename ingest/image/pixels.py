"""What a decoded image is as 8-bit RGB, decided once for the crawler and for training.

- The first frame of an animation. Transparent parts show white, and so does what a frame does not cover: the
  colour hidden under them is arbitrary, and pages are mostly white.
- Colours are sRGB: what a profile in the file says is done (`ingest.image.colour`). What a PNG's gAMA and
  cHRM or an AVIF's numbers for its primaries say is not.
- 12- and 16-bit grey keep their upper 8 bits; 32-bit and float grey, which have no agreed range, are
  stretched from their smallest to their largest value.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

from ingest.image import bmp_runs
from ingest.image.colour import Conversion

Box = tuple[int, int, int, int]


def loaded(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """The image with all its pixels decoded, where Pillow reads them wrong mended.

    Args:
        image: opened from these bytes, not loaded.
    """
    match image.format:
        case "PNG":
            return _png(image, data)
        case "GIF":
            covered = image.tile[0][1] if image.tile else None
            image.load()
            return image if covered is None else _within(image, covered)
        case "WEBP":
            covered = _webp_frame(data)
            image.load()
            return image if covered is None else _within(image, covered)
        case "BMP":
            _spread_runs(image, data)
    image.load()
    return image


def flattened(image: Image.Image, conversion: Conversion | None, *, negative: bool) -> Image.Image:
    """8-bit RGB or grey, sRGB if there is a conversion; see the module's docstring.

    Args:
        image: loaded.
        conversion: what its profile does.
        negative: its zeros are white.
    """
    alpha = None
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image, alpha = _layers(image)
    picture = _eight_bits(image)
    if negative:
        picture = ImageOps.invert(picture)
    if conversion is not None:
        picture = conversion(picture)
    if picture.mode == "CMYK":
        picture = picture.convert("RGB")
    if alpha is None:
        return picture
    flat = Image.new("RGB", picture.size, "white")
    flat.paste(picture, mask=alpha)
    return flat


def as_rgb(picture: Image.Image) -> Image.Image:
    # Converting RGB to RGB would copy every pixel, for half of the whole decode's time.
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _layers(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Colours (or grey) and alpha."""
    if image.mode.startswith("I;16"):
        deep = np.asarray(image)
        alpha = Image.fromarray(np.where(deep == image.info["transparency"], np.uint8(0), np.uint8(255)))
        return _eight_bits(image), alpha
    is_grey = image.mode in ("1", "L", "LA", "La")
    layered = image.convert("LA" if is_grey else "RGBA")
    return layered.convert("L" if is_grey else "RGB"), layered.getchannel("A")


def _eight_bits(image: Image.Image) -> Image.Image:
    """RGB, L or CMYK."""
    if image.mode in ("RGB", "L", "CMYK"):
        return image
    if image.mode.startswith("I;16"):
        # Of a TIFF with 12 bits, Pillow gives the numbers as they are.
        bits = image.tag_v2[258][0] if isinstance(image, TiffImagePlugin.TiffImageFile) else 16
        return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    if image.mode in ("I", "F"):
        return Image.fromarray(_stretched(np.asarray(image, np.float64)))
    return image.convert("L" if image.mode == "1" else "RGB")


def _stretched(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    grey: NDArray[np.float64] = np.rint((values - low) * (255 / (high - low) if high > low else 0.0))
    return grey.astype(np.uint8)


def _within(image: Image.Image, covered: Box) -> Image.Image:
    """The image, transparent outside of this box."""
    if covered == (0, 0, *image.size) or "transparency" in image.info or image.mode == "RGBA":
        return image
    canvas = Image.new("RGBA", image.size, (255, 255, 255, 0))
    canvas.paste(image.crop(covered).convert("RGB"), covered)
    return canvas


def _png(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """A PNG, whose transparent colour is as deep as its samples are."""
    key = image.info.get("transparency")
    rawmode = image.tile[0][3] if image.tile else None
    if isinstance(key, int) and rawmode in ("L;2", "L;4"):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[rawmode]
    if not isinstance(key, tuple) or rawmode != "RGB;16B":
        image.load()
        return image
    # Pillow keeps the upper bytes of each sample; read the other way round, it keeps the lower ones.
    lower = Image.open(io.BytesIO(data), formats=("PNG",))
    name, extents, offset, _ = lower.tile[0]
    lower.tile = [ImageFile._Tile(name, extents, offset, "RGB;16L")]
    image.load()
    lower.load()
    samples = np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
    alpha = np.where((samples == key).all(axis=-1), np.uint8(0), np.uint8(255))
    del image.info["transparency"]
    image.putalpha(Image.fromarray(alpha))
    return image


def _webp_frame(data: bytes) -> Box | None:
    """Where an animation's first frame lies."""
    at = data.find(b"ANMF", 12, 1 << 20) if data[12:16] == b"VP8X" and data[20] & 0x02 else -1
    if at < 0 or at + 20 > len(data):
        return None
    left, top, width, height = (
        int.from_bytes(data[start : start + 3], "little") for start in range(at + 8, at + 20, 3)
    )
    return 2 * left, 2 * top, 2 * left + width + 1, 2 * top + height + 1


def _spread_runs(image: ImageFile.ImageFile, data: bytes) -> None:
    """Have a run-length coded BMP decoded from its indices, one byte each."""
    bits = bmp_runs.depth(data)
    if bits is None or not image.tile:
        return
    _, extents, offset, arguments = image.tile[0]
    rows = bmp_runs.indices(data[offset:], width=image.width, height=image.height, bits=bits)
    rawmode = {"1": "1;8"}.get(image.mode, image.mode)
    image.fp = io.BytesIO(rows)
    direction = arguments[-1] if isinstance(arguments, tuple) else 1
    image.tile = [ImageFile._Tile("raw", extents, 0, (rawmode, 0, direction))]
