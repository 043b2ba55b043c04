"""What an image file's first bytes say: its format and its size in pixels, read without any decoder.

Formats that nobody here decodes are known by name too: a row that says "svg" is no login page.

Decoders allocate by the size that the header claims, so the claim is judged here first. Every function takes
hostile bytes, reads in bounds and in bounded time, and answers None for what it cannot tell.
"""

import re
import struct

from ingest.image import avif

TIFF_ORDER = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
_MAGIC: dict[str, tuple[bytes, ...]] = {
    "jpeg": (b"\xff\xd8\xff",),
    "png": (b"\x89PNG\r\n\x1a\n",),
    "webp": (b"RIFF",),
    "gif": (b"GIF87a", b"GIF89a"),
    "bmp": (b"BM",),
    "tiff": tuple(TIFF_ORDER),
    "ico": (b"\0\0\1\0",),
    "jpeg2000": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "jxl": (b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a"),
}
# An SVG's root element comes behind nothing but XML's declaration, comments, a document type and blanks.
_SVG = re.compile(
    rb"(?:\xef\xbb\xbf)?(?:\s+|<\?[^>]*>|<!--.*?-->|<!DOCTYPE\s+svg[^>\[]*(?:\[[^\]]*\])?\s*>)*+<(?:svg:)?svg[\s>/]",
    re.DOTALL,
)
_SVG_WITHIN = 4096
# Sizes of the BITMAPINFOHEADER family; "BM" alone also begins ordinary words.
_BMP_HEADERS = {12, 16, 40, 52, 56, 64, 108, 124}
# Start-of-frame markers: C0 to CF without DHT (C4), JPG (C8) and DAC (CC).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
# Where a segment begins, also behind coded data: in those FF is followed by 00 or a restart mark.
_JPEG_SEGMENT = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])")
_JPEG_SCAN, _JPEG_END = b"\xda", b"\xd9"
# Frames whose first scan may be their only one: neither progressive nor, for our decoders, lossless.
_JPEG_SEQUENTIAL = (b"\xc0", b"\xc1", b"\xc9")
SHORTEST_SCAN = 10
# More are in no picture; each of them counts as a scan, to find an end.
_MANY_SEGMENTS = 1 << 16


def sniff(data: bytes) -> str | None:
    """The format that the content shows, whatever the name says; None if it is no image.

    Decoded are jpeg, png, webp, gif, bmp, tiff and, where Pillow can, avif; known by name are svg, ico,
    jpeg2000, heic and jxl.
    """
    kind = next((kind for kind, magic in _MAGIC.items() if data.startswith(magic)), None)
    if kind == "webp" and data[8:12] != b"WEBP":
        return None
    if kind == "bmp" and int.from_bytes(data[14:18], "little") not in _BMP_HEADERS:
        return None
    if kind == "ico" and not _has_icons(data):
        return None
    if kind is None:
        return avif.brand(data) or ("svg" if _SVG.match(data[:_SVG_WITHIN]) else None)
    return kind


def _has_icons(data: bytes) -> bool:
    """Whether the first icon lies within the file: four bytes alone are too little to tell by."""
    size, start = int.from_bytes(data[14:18], "little"), int.from_bytes(data[18:22], "little")
    return data[4:6] != b"\0\0" and size > 0 and 22 <= start < len(data)


def claimed_size(data: bytes, kind: str) -> tuple[int, int] | None:
    """Width and height in pixels as the header claims them, before orientation; None if it does not say."""
    try:
        return _SIZES[kind](data) if kind in _SIZES else None
    except (ValueError, struct.error, IndexError, OverflowError):
        return None


def _png_size(data: bytes) -> tuple[int, int]:
    return struct.unpack_from(">II", data, 16)


def _gif_size(data: bytes) -> tuple[int, int]:
    return struct.unpack_from("<HH", data, 6)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = 2
    while True:
        # Between segments decoders skip anything up to the next FF, and any number of FFs.
        at = data.find(b"\xff", at)
        if at < 0:
            return None
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 3)
            return width, height
        if marker == 0 or marker in _JPEG_WITHOUT_LENGTH:
            continue
        at += max(2, int.from_bytes(data[at : at + 2], "big"))


def jpeg_scans(data: bytes, *, most: int) -> int:
    """How many scans a JPEG's decoder goes through, or a number beyond `most` where they are more."""
    scans = segments = colours = 0
    at = 2
    while scans <= most and (segment := _JPEG_SEGMENT.search(data, at)) and segment[1] != _JPEG_END:
        kind, start = segment[1], segment.end()
        if kind in _JPEG_SEQUENTIAL:
            colours = int.from_bytes(data[start + 7 : start + 8])
        elif kind == _JPEG_SCAN and scans == 0 and int.from_bytes(data[start + 2 : start + 3]) == colours > 0:
            return 1  # all of the picture: libjpeg takes no other
        segments += 1
        scans += kind == _JPEG_SCAN or segments > _MANY_SEGMENTS
        at = start + max(2, int.from_bytes(data[start : start + 2]))
    return scans


def _webp_size(data: bytes) -> tuple[int, int] | None:
    match data[12:16]:
        case b"VP8X":
            extents = data[24:30]
            if len(extents) < 6:
                return None
            return 1 + int.from_bytes(extents[:3], "little"), 1 + int.from_bytes(extents[3:], "little")
        case b"VP8L":
            (bits,) = struct.unpack_from("<I", data, 21)
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
    return None


def _bmp_size(data: bytes) -> tuple[int, int]:
    if int.from_bytes(data[14:18], "little") in (12, 16):
        return struct.unpack_from("<HH", data, 18)
    width, height = struct.unpack_from("<ii", data, 18)
    return abs(width), abs(height)


def _tiff_size(data: bytes) -> tuple[int, int] | None:
    order = TIFF_ORDER[data[:4]]
    big = data[2:4] in (b"+\0", b"\0+")
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (entries,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
    first, step, value_at = (start + 8, 20, 12) if big else (start + 2, 12, 8)
    sizes: dict[int, int] = {}
    for entry in range(min(entries, 4096)):
        tag, kind = struct.unpack_from(order + "HH", data, first + entry * step)
        if tag in (256, 257) and kind in (3, 4, 16):
            code = {3: "H", 4: "I", 16: "Q"}[kind]
            (sizes[tag],) = struct.unpack_from(order + code, data, first + entry * step + value_at)
    return (sizes[256], sizes[257]) if len(sizes) == 2 else None


_SIZES = {
    "jpeg": _jpeg_size,
    "png": _png_size,
    "webp": _webp_size,
    "gif": _gif_size,
    "bmp": _bmp_size,
    "tiff": _tiff_size,
    "avif": avif.size,
}
