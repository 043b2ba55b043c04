"""A TIFF reduced to its first page, by copying what that page needs into a file of zeros.

TIFF's parts may lie anywhere, in any order, so metadata is not cut out: the header, the first directory
without the tags that a decoder can do without, the values of those tags, and the strips or tiles stay where
they are, and every other byte becomes zero or falls off the end.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from ingest.image.header import TIFF_ORDER

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _PROFILE = 256, 257, 258, 259, 262, 34675
_WHITE_IS_ZERO, _BLACK_IS_ZERO = 0, 1
_STRIPS, _STRIP_SIZES, _TILES, _TILE_SIZES = 273, 279, 324, 325
_UNCOMPRESSED, _OLD_JPEG = 1, 6
# Geometry, samples, compression and its tables, colours and their meaning, orientation, resolution, profile.
_KEPT = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 274, 277, 278, 279, 280, 281, 282, 283, 284}
    | {290, 291, 292, 293, 296, 301, 317, 318, 319, 320, 321, 322, 323, 324, 325, 332, 334, 336, 338, 339}
    | {340, 341, 342, 347, 529, 530, 531, 532, 34675}
)
_SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}


@dataclass(frozen=True, slots=True)
class _Layout:
    """How numbers are written, as `struct` has it: byte order, offsets, and the number of entries."""

    order: str
    offset: str
    entries: str
    directory_at: int

    @property
    def word(self) -> int:
        """Bytes of an offset, and of a value that stands in its entry."""
        return struct.calcsize(self.order + self.offset)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tag. `raw` is the entry as it stands in the directory; the value may lie outside of it."""

    tag: int
    type: int
    count: int
    raw: bytes
    value_at: int
    size: int
    outside: bool


def as_black_is_zero(data: bytes) -> bytes | None:
    """The negative of a grey picture of more than 8 bits whose zeros are white; None of any other.

    Pillow reads such pictures, if at all, as if their zeros were black.
    """
    try:
        layout = _layout(data)
        (start,) = struct.unpack_from(layout.order + layout.offset, data, layout.directory_at)
        entries = {entry.tag: entry for entry in _entries(data, layout, start)}
        if _BITS not in entries or _PHOTOMETRIC not in entries:
            return None
        bits = _numbers(data, layout.order, entries[_BITS])
        if _numbers(data, layout.order, entries[_PHOTOMETRIC]) != (_WHITE_IS_ZERO,) or bits[0] <= 8:
            return None
    except (ValueError, struct.error, IndexError, OverflowError):
        return None
    entry = entries[_PHOTOMETRIC]
    value = struct.pack(layout.order + _INTEGERS[entry.type], _BLACK_IS_ZERO)
    return data[: entry.value_at] + value + data[entry.value_at + len(value) :]


def first_page(data: bytes, *, profile: bool) -> bytes:
    """The same picture, at the same places, and nothing else.

    Args:
        data: a whole TIFF.
        profile: whether its colour profile stays.

    Raises:
        ValueError: it is damaged, or of the old JPEG compression, whose parts are not told apart.
        struct.error, OverflowError: it is truncated, or points out of itself.
    """
    layout = _layout(data)
    order = layout.order
    (start,) = struct.unpack_from(order + layout.offset, data, layout.directory_at)
    kept = _KEPT if profile else _KEPT - {_PROFILE}
    entries = {entry.tag: entry for entry in _entries(data, layout, start) if entry.tag in kept}
    parts = [(entry.value_at, entry.size) for entry in entries.values() if entry.outside]
    parts += _pixels(data, order, entries)
    # Parts that lie over each other could make a small file cost time without end.
    if sum(size for _, size in parts) > len(data) or any(at + size > len(data) for at, size in parts):
        raise ValueError("truncated: its parts do not fit into it")
    page = bytearray(len(data))
    for at, size in parts:
        page[at : at + size] = data[at : at + size]
    directory = struct.pack(order + layout.entries, len(entries))
    directory += b"".join(entry.raw for entry in entries.values()) + bytes(layout.word)
    head = layout.directory_at + layout.word
    # Last, so that nothing that lies over them brings back what was left out.
    page[start : start + len(directory)] = directory
    page[:head] = data[:head]
    return bytes(page[: max([head, start + len(directory), *(at + size for at, size in parts)])])


def _layout(data: bytes) -> _Layout:
    order = TIFF_ORDER[data[:4]]
    big = data[2:4] in (b"+\0", b"\0+")
    return _Layout(order, "Q", "Q", 8) if big else _Layout(order, "I", "H", 4)


def _entries(data: bytes, layout: _Layout, start: int) -> Iterator[_Entry]:
    (count,) = struct.unpack_from(layout.order + layout.entries, data, start)
    first = start + struct.calcsize(layout.order + layout.entries)
    form = f"{layout.order}HH{layout.offset}"
    step = struct.calcsize(form) + layout.word
    # A count that lies ends where the file does.
    for place in range(first, first + step * count, step):
        tag, kind, values = struct.unpack_from(form, data, place)
        value_at, size = place + step - layout.word, values * _SIZES.get(kind, 1)
        outside = size > layout.word
        if outside:
            (value_at,) = struct.unpack_from(layout.order + layout.offset, data, value_at)
        yield _Entry(tag, kind, values, data[place : place + step], value_at, size, outside)


def _pixels(data: bytes, order: str, entries: dict[int, _Entry]) -> list[tuple[int, int]]:
    """Where the strips or tiles lie: (offset, size)."""

    def numbers(tag: int) -> tuple[int, ...]:
        return _numbers(data, order, entries[tag]) if tag in entries else ()

    compression = numbers(_COMPRESSION) or (_UNCOMPRESSED,)
    if compression[0] == _OLD_JPEG:
        raise ValueError("old JPEG compression")
    found = list(zip(numbers(_STRIPS), numbers(_STRIP_SIZES), strict=True))
    found += zip(numbers(_TILES), numbers(_TILE_SIZES), strict=True)
    if compression[0] == _UNCOMPRESSED:
        # Decoders go by the picture's size here, whatever the sizes of the strips say.
        (width,), (height,) = numbers(_WIDTH), numbers(_HEIGHT)
        if sum(size for _, size in found) < (width * sum(numbers(_BITS) or (1,)) + 7) // 8 * height:
            raise ValueError("truncated: less data than pixels")
    return found


def _numbers(data: bytes, order: str, entry: _Entry) -> tuple[int, ...]:
    if entry.type not in _INTEGERS:
        raise ValueError(f"tag {entry.tag} holds no integers")
    if entry.value_at + entry.size > len(data):
        raise ValueError("truncated")
    return struct.unpack_from(f"{order}{entry.count}{_INTEGERS[entry.type]}", data, entry.value_at)
