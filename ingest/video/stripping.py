"""What files say besides picture and sound, left out: titles, places, dates, names of cameras and programs.

It becomes padding of the same size, so that nothing moves and no packet is touched. Containers here are those
that are kept as they are: MP4, Matroska and AVI.
"""

import contextlib
import struct
from collections.abc import Iterator
from typing import NamedTuple

KEPT_AS_THEY_ARE = frozenset({"mp4", "matroska", "avi"})
# MP4: boxes of words, boxes with such in them, and those that begin with when a thing was made and changed.
_WORDS = frozenset({b"udta", b"meta", b"uuid"})
_FAMILIES = frozenset({b"moov", b"trak", b"mdia", b"moof", b"traf"})
_DATED = frozenset({b"mvhd", b"tkhd", b"mdhd"})
# Matroska's elements likewise. A sum of what is changed would be wrong, and is not asked for.
_SEGMENT, _INFO, _TRACKS, _TRACK, _CLUSTER = 0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0x1F43B675
_EBML_WORDS = {
    _SEGMENT: {0x1254C367, 0x1941A469, 0x1043A770},
    _INFO: {0x7BA9, 0x4461, 0x7384, 0x3C83AB, 0x3E83BB, 0xBF},
    _TRACKS: {0xBF},
    _TRACK: {0x536E, 0xBF},
}
_EBML_FAMILIES = {_SEGMENT: {_INFO, _TRACKS}, _TRACKS: {_TRACK}}
_VOID = 0xEC


class _Part(NamedTuple):
    """A box, an element or a chunk: where it begins, where its contents begin, and where they end."""

    start: int
    body: int
    end: int


_Patches = list[tuple[int, bytes]]


def stripped(data: bytes, kind: str) -> bytes:
    """The file without its words; the same object if there are none.

    Args:
        data: a whole file. Damage in it ends the search.
        kind: one of KEPT_AS_THEY_ARE.
    """
    find = {"mp4": _mp4, "matroska": _matroska, "avi": _avi}[kind]
    patches: _Patches = []
    # If it ends within a header, decoding will tell.
    with contextlib.suppress(struct.error, IndexError):
        find(data, patches)
    if all(data[at : at + len(new)] == new for at, new in patches):
        return data
    out = bytearray(data)
    for at, new in patches:
        out[at : at + len(new)] = new
    return bytes(out)


def _mp4(data: bytes, patches: _Patches) -> None:
    families = [_Part(0, 0, len(data))]
    while families:
        family = families.pop()
        for name, part in _boxes(data, family.body, family.end):
            if name in _FAMILIES:
                families.append(part)
            elif name in _WORDS:
                patches.append((part.start + 4, b"free"))
                patches.append((part.body, bytes(part.end - part.body)))
            elif name in _DATED:
                dates = 16 if data[part.body] == 1 else 8
                patches.append((part.body + 4, bytes(min(dates, max(0, part.end - part.body - 4)))))


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, _Part]]:
    while at + 8 <= end:
        length, name = struct.unpack_from(">I4s", data, at)
        body = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, body)
            body += 8
        stop = min(at + length if length else end, end)
        if stop < body:
            return
        yield name, _Part(at, body, stop)
        at = stop


def _matroska(data: bytes, patches: _Patches) -> None:
    families = [(0, _Part(0, 0, len(data)))]
    while families:
        family, whole = families.pop()
        for name, part in _elements(data, whole.body, whole.end):
            if name in ({_SEGMENT} if not family else _EBML_FAMILIES.get(family, ())):
                families.append((name, part))
            elif name in _EBML_WORDS.get(family, ()):
                # As long a number as there is room for, of what is left.
                digits = min(8, part.body - part.start - 1)
                left = part.end - part.start - 1 - digits
                length = (left | 1 << 7 * digits).to_bytes(digits, "big")
                patches.append((part.start, bytes([_VOID]) + length + bytes(left)))


def _elements(data: bytes, at: int, end: int) -> Iterator[tuple[int, _Part]]:
    while at + 2 <= end:
        digits = 9 - data[at].bit_length()
        name = int.from_bytes(data[at : at + digits], "big")
        first = data[at + digits]
        width = 9 - first.bit_length()
        body = at + digits + width
        if digits > 4 or width > 8:
            return
        length = int.from_bytes(data[at + digits : body], "big") - (1 << 7 * width)
        stop = body + length
        if length == (1 << 7 * width) - 1:
            # Nobody knew how long it would be. What follows is in it: of clusters, as good as behind it.
            stop = body if name == _CLUSTER else end
        if stop > end:
            return
        yield name, _Part(at, body, stop)
        at = stop


def _avi(data: bytes, patches: _Patches) -> None:
    lists = [_Part(0, 12, len(data))]
    while lists:
        whole = lists.pop()
        at = whole.body
        while at + 8 <= whole.end:
            name, length = struct.unpack_from("<4sI", data, at)
            part = _Part(at, at + 8, min(at + 8 + length, whole.end))
            kind = data[part.body : part.body + 4] if name == b"LIST" else b""
            if kind in (b"hdrl", b"strl"):
                lists.append(part._replace(body=part.body + 4))
            elif kind == b"INFO" or name in (b"IDIT", b"strn"):
                patches.append((part.start, b"JUNK"))
                patches.append((part.body, bytes(part.end - part.body)))
            at = part.end + part.end % 2
