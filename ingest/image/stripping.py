"""What a file says besides its picture, taken out without touching a pixel.

EXIF with its positions, dates and thumbnails, XMP, IPTC, maker notes, comments, texts, previews, and whatever
lies behind the end of the picture: nobody asked for it, and it names people and places. What changes how
pixels look, colour profiles included, stays. Everything is an allow-list: what is not known to matter to the
picture goes, and so does what is damaged beside a PNG's picture. An orientation other than 1 is said by an
EXIF block that says nothing else, so that every reader turns the picture as before.

Only segments and chunks are walked, no pixel is decoded, in time linear in the file's size. The bytes are
hostile: what cannot be walked is a ValueError, with the word "truncated" where the file just ends.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator

from ingest.image import avif, tiff

_JFIF_BYTES = 14
_ADOBE_BYTES = 12
_ICC = b"ICC_PROFILE\0"
# Frames, tables, restart interval, number of lines: with these a decoder makes the picture.
_JPEG_KEPT = frozenset({*range(0xC0, 0xD0), 0xDB, 0xDC, 0xDD}) - {0xC8}
_JPEG_SCAN, _JPEG_END, _JPEG_START = 0xDA, 0xD9, 0xD8
# In a scan, FF 00 is data, D0 to D7 are its restarts, and FF before FF is filling.
_JPEG_SCAN_ENDS = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_PNG_KEPT = frozenset(
    b"IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB iCCP cICP sBIT bKGD pHYs acTL fcTL fdAT".split()
)
# Words in which a PNG may tell its orientation, before the pixels or after them.
_PNG_WORDS = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})
_PNG_LENGTHS = {b"gAMA": 4, b"cHRM": 32, b"pHYs": 9, b"sRGB": 1}
_PNG_PROFILE_BYTES = 1 << 20
_PNG_KEY_LENGTHS = {0: 2, 2: 6}  # of a transparent colour, by the kind of colours
_WEBP_KEPT = frozenset({b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ICCP", b"ANIM", b"ANMF"})
_WEBP_FRAME_KEPT = frozenset({b"VP8 ", b"VP8L", b"ALPH"})
_WEBP_EXIF, _WEBP_XMP, _WEBP_ICC = 0x08, 0x04, 0x20
_GIF_LOOPS = (b"NETSCAPE2.0", b"ANIMEXTS1.0")


def stripped(data: bytes, kind: str, orientation: int, *, profile: bool = True) -> bytes:
    """The file with its picture, and animation, alone; `data` itself if there is nothing to take out.

    A TIFF keeps its first page. BMP has no place for metadata.

    Args:
        data: a whole image file.
        kind: its format, as `ingest.image.header.sniff` tells it.
        orientation: its EXIF orientation, 1 to 8; not used for TIFF and AVIF, which have their own.
        profile: whether its colour profile stays.

    Raises:
        ValueError: the file is damaged, so that what belongs to the picture cannot be told.
    """
    strip = _STRIPS.get(kind)
    if strip is None:
        return data
    try:
        left = strip(data, orientation, profile)
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError("truncated") from error
    return data if left == data else left


def _exif(orientation: int) -> bytes:
    """An EXIF block (a TIFF of one directory) that holds the orientation alone."""
    return b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)


def _jpeg(data: bytes, orientation: int, profile: bool) -> bytes:
    parts = [b"\xff\xd8"]
    # JFIF wants to be first; EXIF comes second.
    place_of_exif = 1
    at = 2
    while True:
        at, marker = _next_marker(data, at)
        if marker == _JPEG_END:
            break
        if marker == _JPEG_START:
            raise ValueError("a second picture begins within the first")
        if marker in (0x00, 0x01) or 0xD0 <= marker < _JPEG_START:
            continue
        (size,) = struct.unpack_from(">H", data, at)
        end = at + max(2, size)
        if end > len(data):
            raise ValueError("truncated")
        if marker == _JPEG_SCAN:
            found = _JPEG_SCAN_ENDS.search(data, end)
            if found is None:
                raise ValueError("truncated")
            parts.append(data[at - 2 : found.start()])
            at = found.start()
            continue
        body = _jpeg_kept(marker, data[at + 2 : end], profile)
        if body is not None:
            parts.append(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body)
            if marker == 0xE0 and len(parts) == 2:
                place_of_exif = 2
        at = end
    if orientation != 1:
        body = b"Exif\0\0" + _exif(orientation)
        parts.insert(place_of_exif, struct.pack(">BBH", 0xFF, 0xE1, len(body) + 2) + body)
    return b"".join([*parts, b"\xff\xd9"])


def _next_marker(data: bytes, at: int) -> tuple[int, int]:
    """Where the next marker's segment begins, and the marker. Decoders skip anything up to an FF, and FFs."""
    at = data.find(b"\xff", at)
    if at < 0:
        raise ValueError("truncated")
    while data[at] == 0xFF:
        at += 1
    return at + 1, data[at]


def _jpeg_kept(marker: int, body: bytes, profile: bool) -> bytes | None:
    """What stays of a segment; None if nothing does."""
    if marker in _JPEG_KEPT:
        return body
    if marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= _JFIF_BYTES:
        # The last two bytes are the size of the thumbnail that follows.
        return body[: _JFIF_BYTES - 2] + b"\0\0"
    if marker == 0xEE and body.startswith(b"Adobe") and len(body) >= _ADOBE_BYTES:
        return body[:_ADOBE_BYTES]
    return body if profile and marker == 0xE2 and body.startswith(_ICC) else None


def _png(data: bytes, orientation: int, profile: bool) -> bytes:
    parts = [data[:8]]
    place_of_exif = 0
    before = b""
    for kind, start, end in _png_chunks(data):
        if kind not in _PNG_KEPT or (kind == b"iCCP" and not profile):
            before = kind
            continue
        if kind == b"IDAT" and before != b"IDAT":
            if place_of_exif:
                raise ValueError("the picture's data is not in one piece")
            place_of_exif = len(parts)
        before = kind
        if kind[0] & 0x20 == 0 or _png_is_sound(kind, data[start:end], colours=data[25]):
            parts.append(data[start:end])
    if not place_of_exif:
        raise ValueError("there is no picture")
    if before != b"IEND":
        parts.append(_png_chunk(b"IEND"))
    if orientation != 1:
        parts.insert(place_of_exif, _png_chunk(b"eXIf" + _exif(orientation)))
    return b"".join(parts)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of every chunk up to IEND, or to where the file ends behind its picture."""
    at, kind, pictured = 8, b"", False
    while kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", data, at) if at + 8 <= len(data) else (0, b"")
        end = at + size + 12
        if end > len(data) or not kind.isalpha():
            if pictured and kind != b"IDAT":
                return
            raise ValueError("truncated")
        pictured = pictured or kind == b"IDAT"
        yield kind, at, end
        at = end


def _png_is_sound(kind: bytes, chunk: bytes, *, colours: int) -> bool:
    """Whether a chunk that a picture can do without can be read; browsers leave out those that cannot."""
    body = chunk[8:-4]
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
        return False
    if kind == b"tRNS":
        return len(body) == _PNG_KEY_LENGTHS.get(colours, len(body))
    if kind == b"iCCP":
        name, _, rest = body.partition(b"\0")
        return len(name) < 80 and rest[:1] == b"\0" and _inflates(rest[1:])
    return len(body) == _PNG_LENGTHS.get(kind, len(body))


def _inflates(data: bytes) -> bool:
    """Whether this is compressed, and no larger than Pillow takes it."""
    inflate = zlib.decompressobj()
    try:
        inflate.decompress(data, _PNG_PROFILE_BYTES)
    except zlib.error:
        return False
    return not inflate.unconsumed_tail


def png_words(data: bytes) -> bytes:
    """A PNG of one pixel that says what this one says, so that reading it decodes no picture."""
    head = _png_chunk(b"IHDR" + struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    words = [
        data[start:end]
        for kind, start, end in _png_chunks(data)
        if kind in _PNG_WORDS and _png_is_sound(kind, data[start:end], colours=0)
    ]
    pixel = _png_chunk(b"IDAT" + zlib.compress(b"\0\0"))
    return b"".join([data[:8], head, *words, pixel, _png_chunk(b"IEND")])


def _png_chunk(body: bytes) -> bytes:
    """A chunk of this name and contents."""
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def _webp(data: bytes, orientation: int, profile: bool) -> bytes:
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise ValueError("truncated")
    parts = [b"WEBP"]
    for name, body in _riff_chunks(data, 12, end):
        if name not in _WEBP_KEPT or (name == b"ICCP" and not profile):
            continue
        kept = body
        if name == b"VP8X":
            gone = _WEBP_EXIF | _WEBP_XMP | (0 if profile else _WEBP_ICC)
            flags = body[0] & ~gone | (_WEBP_EXIF if orientation != 1 else 0)
            kept = bytes([flags]) + body[1:]
        elif name == b"ANMF":
            inner = [_riff_chunk(*chunk) for chunk in _riff_chunks(body, 16, len(body), _WEBP_FRAME_KEPT)]
            kept = body[:16] + b"".join(inner)
        parts.append(_riff_chunk(name, kept))
    if orientation != 1:
        parts.append(_riff_chunk(b"EXIF", _exif(orientation)))
    return _riff_chunk(b"RIFF", b"".join(parts))


def _riff_chunks(
    data: bytes, at: int, end: int, names: frozenset[bytes] | None = None
) -> list[tuple[bytes, bytes]]:
    """The chunks in these bytes, all or only those of these names."""
    chunks = []
    while at + 8 <= end:
        name, size = struct.unpack_from("<4sI", data, at)
        if at + 8 + size > end:
            raise ValueError("truncated")
        if names is None or name in names:
            chunks.append((name, data[at + 8 : at + 8 + size]))
        # Bodies of odd size are padded.
        at += 8 + size + size % 2
    return chunks


def _riff_chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _gif(data: bytes, orientation: int, profile: bool) -> bytes:
    end_of_head = 13 + _gif_table(data[10])
    parts = [data[:end_of_head]]
    images = 0
    at = end_of_head
    try:
        # As in decoders, what is no block is skipped, and a file may end without its trailer.
        while at < len(data) and data[at] != ord(";"):
            block = at
            if data[at] == ord(","):
                at = _end_of_sub_blocks(data, at + 11 + _gif_table(data[at + 9]))
                parts.append(data[block:at])
                images += 1
            elif data[at] == ord("!"):
                at = _end_of_sub_blocks(data, at + 2)
                parts.append(_gif_extension(data[block:at]))
            else:
                at += 1
    except IndexError:
        # If it is a later frame that is cut off, those before it are whole.
        pass
    if not images:
        raise ValueError("truncated")
    return b"".join([*parts, b";"])


def _gif_table(flags: int) -> int:
    """Bytes of the colour table that these flags announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _gif_extension(block: bytes) -> bytes:
    """How a frame is shown, or how often all are: the rest of the extensions are texts."""
    if block[1] == 0xF9:
        return block
    loop = block[1] == 0xFF and block[3:14] in _GIF_LOOPS and block[14:16] == b"\x03\x01"
    return block[:18] + b"\0" if loop else b""


def _end_of_sub_blocks(data: bytes, at: int) -> int:
    while size := data[at]:
        at += 1 + size
    return at + 1


def _tiff(data: bytes, orientation: int, profile: bool) -> bytes:
    return tiff.first_page(data, profile=profile)


def _avif(data: bytes, orientation: int, profile: bool) -> bytes:
    return avif.pictures_alone(data, profile=profile)


_STRIPS: dict[str, Callable[[bytes, int, bool], bytes]] = {
    "jpeg": _jpeg,
    "png": _png,
    "webp": _webp,
    "gif": _gif,
    "tiff": _tiff,
    "avif": _avif,
}
