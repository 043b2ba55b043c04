"""Pictures that Pillow alone shows wrong or not at all; right values are made here, by the formats' rules."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ingest.image.check import Treatment, check
from ingest.image.decode import ImageError, decode
from ingest.image.stripping import stripped

WHITE = (255, 255, 255)


def chunk(name, body, crc=None):
    return (
        struct.pack(">I", len(body))
        + name
        + body
        + struct.pack(">I", zlib.crc32(name + body) if crc is None else crc)
    )


def png(rows, *, depth, colours, before=b"", behind=None):
    """A PNG of packed rows, (height, bytes of a row)."""
    height, size = rows.shape
    samples = {0: 1, 2: 3}[colours]
    head = struct.pack(">IIBBBBB", size * 8 // depth // samples, height, depth, colours, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    end = chunk(b"IEND", b"") if behind is None else behind
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + before + chunk(b"IDAT", data) + end


def shown(data):
    """What training sees of the file and of the bytes kept of it; nearly that of those encoded from it."""
    kept = check(data, Treatment())
    assert kept.status == "kept", kept.reason
    picture = np.asarray(decode(data))
    assert np.array_equal(picture, np.asarray(decode(data if kept.data is None else kept.data)))
    smaller = check(data, Treatment(resize=min(picture.shape[:2]), encoding="webp", quality=100))
    assert np.abs(np.asarray(decode(smaller.data)).mean((0, 1)) - picture.mean((0, 1))).max() < 4
    assert check(data, Treatment(phash=False)).sha256 == kept.sha256
    return picture


def test_the_transparent_grey_of_a_png_is_as_deep_as_its_samples():
    ramp = np.arange(0, 65_536, 64, dtype=np.uint16)
    rows = ramp.astype(">u2").view(np.uint8).reshape(8, -1)
    nowhere = shown(png(rows, depth=16, colours=0, before=chunk(b"tRNS", struct.pack(">H", 7))))
    assert np.array_equal(nowhere[..., 0].ravel(), ramp >> 8)
    one = shown(png(rows, depth=16, colours=0, before=chunk(b"tRNS", struct.pack(">H", 6400))))
    assert np.array_equal(one[..., 1].ravel(), np.where(ramp == 6400, 255, ramp >> 8))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_the_transparent_grey_of_a_shallow_png_is_the_one_meant(depth):
    values = np.arange(1 << depth).repeat(8)
    bits = (values[:, None] >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.astype(np.uint8).ravel()).reshape(1, -1)
    key = 1
    picture = shown(png(rows, depth=depth, colours=0, before=chunk(b"tRNS", struct.pack(">H", key))))
    expected = np.where(values == key, 255, values * 255 // ((1 << depth) - 1))
    assert np.array_equal(picture[0, :, 2], expected)


def test_the_transparent_colour_of_a_deep_png_is_told_by_all_16_bits():
    colours = np.array([[0x1122, 0x3344, 0x5566], [0x1123, 0x3344, 0x5566], [0x1122, 0x3345, 0x5566]])
    rows = colours.repeat(8, 0).astype(">u2").view(np.uint8).reshape(1, -1).repeat(24, 0)
    key = struct.pack(">HHH", 0x1122, 0x3344, 0x5566)
    picture = shown(png(rows, depth=16, colours=2, before=chunk(b"tRNS", key)))
    assert picture[2, ::8].tolist() == [[255, 255, 255], [0x11, 0x33, 0x55], [0x11, 0x33, 0x55]]


ROWS = np.tile(np.array([10, 200, 30], np.uint8), (64, 64))


@pytest.mark.parametrize(
    "damage",
    [
        {"before": chunk(b"tEXt", b"Comment\0hello", crc=7)},
        {"before": chunk(b"gAMA", b"\0\0\xb1\x8f", crc=7)},
        {"before": chunk(b"gAMA", b"\0")},
        {"before": chunk(b"cHRM", b"\0" * 5)},
        {"before": chunk(b"pHYs", b"\0")},
        {"before": chunk(b"tRNS", b"\0")},
        {"before": chunk(b"iCCP", b"name\0\7rest")},
        {"before": chunk(b"iCCP", b"name\0\0" + b"garbage")},
        {"before": chunk(b"iCCP", b"name\0\0" + zlib.compress(b"\0" * 9_000_000))},
        {"before": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\0" * 9_000_000))},
        {"before": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0garbage")},
        {"behind": b""},
        {"behind": b"\0\0"},
        {"behind": chunk(b"tEXt", b"Comment\0hello")},
        {"behind": chunk(b"tEXt", b"Comment\0hello")[:-5]},
        {"behind": chunk(b"IEND", b"")[:-3]},
        {"behind": b"\0" * 50},
        {"behind": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\0" * 9_000_000))},
    ],
)
def test_damage_beside_the_picture_of_a_png_costs_no_picture(damage):
    data = png(ROWS, depth=8, colours=2, **damage)
    picture = shown(data)
    assert (picture == (10, 200, 30)).all()
    assert picture.shape == (64, 64, 3)
    # What is kept is whole.
    Image.open(io.BytesIO(stripped(data, "png", 1))).verify()


def test_damage_of_the_picture_of_a_png_is_told():
    rows = np.random.default_rng(0).integers(0, 256, (64, 192), np.uint8)
    whole = png(rows, depth=8, colours=2)
    place = whole.index(b"IDAT")
    half = chunk(b"IDAT", whole[place + 4 : place + 4000])
    for data in (whole[: place + 20], whole[: place - 4], whole[: place - 4] + half, whole[:-20]):
        for treatment in (Treatment(), Treatment(resize=16)):
            assert check(data, treatment).status == "failed"


def tiff(values, *, bits, photometric, order="<", kind=1):
    """An uncompressed grey TIFF; values (height, width) that fit into their bits."""
    height, width = values.shape
    if bits == 12:
        data = np.packbits(
            (values[..., None] >> np.arange(12)[::-1] & 1).astype(np.uint8), axis=None
        ).tobytes()
    else:
        data = values.astype(f"{order}{ {1: 'u', 3: 'f'}[kind] }{bits // 8}").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height}
    tags |= {279: len(data), 339: kind}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    word = struct.Struct(f"{order}HHIHH" if order == "<" else ">HHIHH")
    entries = b"".join(word.pack(tag, 3, 1, value, 0) for tag, value in sorted(tags.items()))
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4) + data


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_of_a_tiff_are_no_negative(order):
    values = np.linspace(0, 65_535, 64 * 4).astype(np.uint16).reshape(4, 64)
    black_is_zero = shown(tiff(values, bits=16, photometric=1, order=order))
    white_is_zero = shown(tiff(values, bits=16, photometric=0, order=order))
    assert np.array_equal(black_is_zero[..., 0], values >> 8)
    assert np.array_equal(white_is_zero[..., 0], 255 - (values >> 8))


def test_twelve_bits_of_a_tiff_are_as_bright_as_eight():
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    assert np.array_equal(shown(tiff(values, bits=12, photometric=1))[..., 0], values >> 4)
    assert np.array_equal(shown(tiff(values, bits=12, photometric=0))[..., 0], 255 - (values >> 4))


def test_floats_of_a_tiff_are_no_negative():
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    up, down = (shown(tiff(values, bits=32, kind=3, photometric=sort))[..., 0] for sort in (1, 0))
    assert (up[0, 0], up[-1, -1]) == (0, 255)
    assert np.array_equal(up, 255 - down)
    values = (np.arange(64) * 4).astype(np.uint8).reshape(8, 8)
    assert np.array_equal(shown(tiff(values, bits=8, photometric=0))[..., 0], 255 - values)


def gif(*, left, top, width, height, transparent=None):
    """A frame of index 1, red, on a canvas of 32 x 32 whose background is index 2, blue."""
    palette = bytes((0, 0, 0)) + bytes((255, 0, 0)) + bytes((0, 0, 255)) + bytes((0, 255, 0))
    head = b"GIF89a" + struct.pack("<HHBBB", 32, 32, 0x81, 2, 0) + palette
    if transparent is not None:
        head += b"!\xf9\4\1\0\0" + bytes([transparent]) + b"\0"
    # A clear code before every pixel keeps all codes at 3 bits.
    codes = [code for _ in range(width * height) for code in (4, 1)] + [5]
    bits = sum(code << 3 * place for place, code in enumerate(codes))
    data = bits.to_bytes(-(-3 * len(codes) // 8), "little")
    blocks = b"".join(
        bytes([len(data[at : at + 255])]) + data[at : at + 255] for at in range(0, len(data), 255)
    )
    return head + b"," + struct.pack("<HHHHB", left, top, width, height, 0) + b"\2" + blocks + b"\0;"


@pytest.mark.parametrize("transparent", [None, 3])
def test_what_a_gif_does_not_cover_shows_white(transparent):
    picture = shown(gif(left=8, top=4, width=16, height=10, transparent=transparent))
    expected = np.full((32, 32, 3), 255)
    expected[4:14, 8:24] = (255, 0, 0)
    assert np.array_equal(picture, expected)
    whole = shown(gif(left=0, top=0, width=32, height=32, transparent=transparent))
    assert (whole == (255, 0, 0)).all()


def test_what_the_first_frame_of_a_webp_does_not_cover_shows_white(encode):
    lossless = encode(Image.new("RGB", (16, 10), (255, 0, 0)), "WEBP", lossless=True)
    frame = lossless[12:]
    place = struct.pack("<I", 4)[:3] + struct.pack("<I", 2)[:3] + struct.pack("<I", 15)[:3]
    body = place + struct.pack("<I", 9)[:3] + struct.pack("<I", 100)[:3] + b"\2" + frame
    canvas = b"\x02\0\0\0" + struct.pack("<I", 31)[:3] * 2
    parts = (b"VP8X", canvas), (b"ANIM", b"\0\0\xff\xff\0\0"), (b"ANMF", body)
    chunks = b"WEBP" + b"".join(name + struct.pack("<I", len(part)) + part for name, part in parts)
    picture = shown(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)
    expected = np.full((32, 32, 3), 255)
    expected[4:14, 8:24] = (255, 0, 0)
    assert np.array_equal(picture, expected)


def bmp(runs, *, bits, width, height, palette):
    colours = b"".join(bytes((*colour[::-1], 0)) for colour in palette)
    head = struct.pack(
        "<IiiHHIIIIII", 40, width, height, 1, bits, 3 - bits // 4, len(runs), 0, 0, len(palette), 0
    )
    start = 14 + len(head) + len(colours)
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + head + colours + runs


PALETTE = [(index * 16, 255 - index * 16, index) for index in range(16)]


def test_odd_runs_of_pixels_of_a_bmp_come_out_as_they_are():
    pixels = np.array([[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 8, 8, 8, 8]])
    four = b"\0\5\x12\x34\x50\0" + b"\2\x67" + b"\0\0" + b"\0\3\x89\xa0" + b"\4\x88" + b"\0\1"
    eight = b"\0\5\1\2\3\4\5\0" + b"\1\6\1\7" + b"\0\0" + b"\0\3\10\11\12\0" + b"\4\10" + b"\0\1"
    expected = np.array(PALETTE)[pixels[::-1]]
    for runs, bits in ((four, 4), (eight, 8)):
        data = bmp(runs, bits=bits, width=7, height=2, palette=PALETTE)
        assert np.array_equal(decode(data), expected)
        assert check(data, Treatment()).status == "kept"


def test_runs_that_skip_pixels_or_leave_a_row_stay_in_the_picture():
    data = bmp(b"\x09\x33\0\0\2\x11\0\2\2\1\3\x22\0\1", bits=4, width=6, height=3, palette=PALETTE)
    rows = np.zeros((3, 6), int)
    rows[0, :], rows[1, :2], rows[2, 4:] = 3, 1, 2
    assert np.array_equal(decode(data), np.array(PALETTE)[rows[::-1]])
    two = bmp(b"\3\1\2\0\0\0\5\1\0\1", bits=8, width=5, height=2, palette=[(0, 0, 0), WHITE])
    assert np.asarray(decode(two))[::-1, :, 0].tolist() == [[255, 255, 255, 0, 0], [255] * 5]
    with pytest.raises(ImageError, match="truncated"):
        decode(bmp(b"\3\1\2\0", bits=8, width=5, height=2, palette=PALETTE))
