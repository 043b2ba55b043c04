"""Which way up a picture is: EXIF's orientation, 1 to 8, of which 1 is upright."""

from PIL import ExifTags, Image

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Orientations from 5 on exchange width and height.
_SIDEWAYS = 5


def orientation_of(image: Image.Image) -> int:
    """What the header says; Pillow turns a TIFF itself."""
    if image.format == "TIFF":
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return orientation if orientation in _TRANSPOSE else 1
    except Exception:
        # Damaged EXIF says nothing about the pixels: the picture is kept as it lies.
        return 1


def turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """The upright size of a picture that lies this way, and the other way round."""
    return size[::-1] if orientation >= _SIDEWAYS else size


def upright(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else picture
