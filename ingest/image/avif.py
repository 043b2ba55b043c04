"""AVIF's boxes: which format a file of this family is, how large its pictures are, and the pictures alone.

A file is boxes, and boxes within boxes. `meta` lists items: pictures, which are coded parts and grids of such
parts, and texts beside them (EXIF, XMP); where their bytes lie; and what is true of them, sizes for one.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_AVIF = (b"avif", b"avis")
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_BRANDS_WITHIN = 256
_KEPT_BOXES = frozenset({b"ftyp", b"mdat"})
_TEXT_PROPERTIES = (b"udes", b"uuid")
_PROFILES = (b"prof", b"rICC")
# Coded pictures, grids and overlays of them, and how to map their tones.
_PICTURES = frozenset({b"av01", b"grid", b"iden", b"iovl", b"tmap"})
# More than any picture has; a count that lies must not cost time.
_MOST = 65_536


@dataclass(frozen=True, slots=True)
class _Box:
    """A box: its name, where it begins, where its contents begin, and where it ends."""

    name: bytes
    start: int
    body: int
    end: int


def brand(data: bytes) -> str | None:
    """ "avif" or "heic"; None for another file."""
    if data[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(data[:4], "big"), _BRANDS_WITHIN)
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))]
    # "mif1" says only that it is a file of this family; which codec it takes, those behind it say.
    if any(name in _AVIF for name in brands):
        return "avif"
    return "heic" if any(name in _HEIC for name in brands) else None


class _PastTheEndError(ValueError):
    """A box ends behind what it lies in."""


def size(data: bytes) -> tuple[int, int] | None:
    """The largest (width, height) that a picture or a part of one claims; None if none does."""
    meta = _find(_boxes(data, 0, len(data)), b"meta")
    found = [
        struct.unpack_from(">II", data, box.body + 4)
        for box in (_properties(data, meta) if meta else ())
        if box.name == b"ispe"
    ]
    return max(found, key=lambda pair: pair[0] * pair[1], default=None)


def pictures_alone(data: bytes, *, profile: bool) -> bytes:
    """The same file with its pictures: what else it says has become zeros, so that nothing moves.

    Args:
        data: a whole AVIF.
        profile: whether its colour profile stays.

    Raises:
        ValueError, struct.error: it is damaged.
    """
    out = bytearray(data)
    end = 0
    try:
        for box in _boxes(data, 0, len(data)):
            end = box.end
            if box.name == b"meta":
                _blank_texts(data, out, box)
                _blank_properties(data, out, box, profile=profile)
            elif box.name == b"moov":
                _blank_words_of_film(data, out, box)
            elif box.name not in _KEPT_BOXES:
                _blank(out, box)
    except _PastTheEndError:
        # What lies behind the last whole box is cut off; if it was a part of the picture, decoding tells.
        pass
    return bytes(out[:end])


def _blank_words_of_film(data: bytes, out: bytearray, box: _Box) -> None:
    """What an animation and its tracks say: texts, and items as those of a picture."""
    for inner in _boxes(data, box.body, box.end):
        if inner.name == b"trak":
            _blank_words_of_film(data, out, inner)
        elif inner.name == b"meta":
            _blank_texts(data, out, inner)
        if inner.name in (b"meta", b"udta"):
            _blank(out, inner)


def _blank(out: bytearray, box: _Box) -> None:
    """Make it a box that readers skip."""
    out[box.start + 4 : box.start + 8] = b"free"
    out[box.body : box.end] = bytes(box.end - box.body)


def _blank_texts(data: bytes, out: bytearray, meta: _Box) -> None:
    boxes = {box.name: box for box in _boxes(data, meta.body + 4, meta.end)}
    if b"iinf" not in boxes or b"iloc" not in boxes:
        raise ValueError("there is no list of its pictures")
    texts = set()
    for item, place in _items(data, boxes[b"iinf"]):
        kind = data[place : place + 4]
        if kind not in _PICTURES:
            texts.add(item)
            # Or a reader would look for EXIF in zeros.
            out[place : place + 4] = b"free"
    idat = boxes.get(b"idat")
    for item, within, start, length in _extents(data, boxes[b"iloc"]):
        base = idat.body if within and idat else 0
        if item in texts:
            if base + start + length > len(data):
                raise ValueError("truncated")
            out[base + start : base + start + length] = bytes(length)


def _blank_properties(data: bytes, out: bytearray, meta: _Box, *, profile: bool) -> None:
    for box in _properties(data, meta):
        is_profile = box.name == b"colr" and data[box.body : box.body + 4] in _PROFILES
        if box.name in _TEXT_PROPERTIES or (is_profile and not profile):
            _blank(out, box)


def _properties(data: bytes, meta: _Box) -> Iterator[_Box]:
    properties = _find(_boxes(data, meta.body + 4, meta.end), b"iprp")
    container = properties and _find(_boxes(data, properties.body, properties.end), b"ipco")
    return _boxes(data, container.body, container.end) if container else iter(())


def _items(data: bytes, iinf: _Box) -> Iterator[tuple[int, int]]:
    """Of every item: its number, and where its type stands."""
    first = iinf.body + (6 if data[iinf.body] == 0 else 8)
    for box in _boxes(data, first, iinf.end):
        if box.name == b"infe":
            version = data[box.body]
            if version < 2:
                raise ValueError("items of an old kind")
            form = ">H" if version == 2 else ">I"
            (item,) = struct.unpack_from(form, data, box.body + 4)
            yield item, box.body + 4 + struct.calcsize(form) + 2


def _extents(data: bytes, iloc: _Box) -> Iterator[tuple[int, bool, int, int]]:
    """Where items lie: the item's number, whether it is within `idat`, offset, length."""
    version = data[iloc.body]
    sizes = int.from_bytes(data[iloc.body + 4 : iloc.body + 6], "big")
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    at = iloc.body + 6

    def number(width: int) -> int:
        nonlocal at
        if at + width > iloc.end:
            raise ValueError("truncated")
        at += width
        return int.from_bytes(data[at - width : at], "big")

    wide = 4 if version == 2 else 2
    total = 0
    for _ in range(number(wide)):
        item = number(wide)
        method = number(2) & 15 if version else 0
        number(2)
        base = number(base_size)
        for _ in range(number(2)):
            if version:
                number(index_size)
            start = base + number(offset_size)
            total += 1
            if total > _MOST:
                raise ValueError("it is in too many parts")
            yield item, method == 1, start, number(length_size)


def _find(boxes: Iterator[_Box], name: bytes) -> _Box | None:
    return next((box for box in boxes if box.name == name), None)


def _boxes(data: bytes, at: int, end: int) -> Iterator[_Box]:
    """The boxes between two places.

    Raises:
        _PastTheEndError: one does not end within them.
    """
    while at + 8 <= end:
        length, name = struct.unpack_from(">I4s", data, at)
        body = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, body)
            body += 8
        stop = at + length if length else end
        if stop > end or stop < body:
            raise _PastTheEndError("truncated")
        yield _Box(name, at, body, stop)
        at = stop
