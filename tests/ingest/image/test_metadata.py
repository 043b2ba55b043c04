"""Nothing but the picture is left in a stored file, and the picture is the same to the last bit."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, ImageSequence, TiffImagePlugin

from ingest.image.check import Treatment, check
from ingest.image.header import sniff
from ingest.image.stripping import stripped

KINDS = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "tiff": "TIFF"}
SECRET = b"S3CRET"
TEXT = SECRET.decode()


def frames(data):
    """Every frame as it is shown, upright, RGBA."""
    with Image.open(io.BytesIO(data)) as image:
        return [
            np.asarray(ImageOps.exif_transpose(frame).convert("RGBA"))
            for frame in ImageSequence.Iterator(image)
        ]


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def exif(orientation=1):
    """EXIF as a camera writes it, with a position, dates, names, and a thumbnail, all of them secret."""
    block = Image.Exif()
    block[0x0112] = orientation
    block[0x010F] = block[0x0131] = block[0x013B] = block[0x8298] = TEXT
    block.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.5), 3: "E", 4: (13.0, 24.0, 36.0), 27: SECRET})
    block.get_ifd(0x8769).update({0x9003: TEXT, 0x927C: SECRET * 9, 0x9286: SECRET, 0xA420: TEXT})
    return block


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def segment(marker, body):
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def telling(kind, picture, encode, orientation=1):
    """A file of this format that tells all it can, in every place that the format has."""
    block = exif(orientation)
    xmp = b"<x:xmpmeta>" + SECRET + b"</x:xmpmeta>"
    if kind == "jpeg":
        data = encode(picture, "JPEG", exif=block, comment=SECRET, icc_profile=b"colours" * 20, xmp=xmp)
        data = data.replace(b"JFIF\0\1\1", b"JFIF\0\1\2", 1)
        thumbnail = segment(0xE0, b"JFXX\0\x13\x02\x01" + SECRET)
        preview = segment(0xE2, b"MPF\0" + SECRET) + segment(0xE2, b"FPXR\0" + SECRET)
        more = thumbnail + preview + segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04" + SECRET)
        more += segment(0xEC, SECRET) + b"\xff\xff" + segment(0xEE, b"Adobe" + SECRET)
        frame = data.index(b"\xff\xdb")
        return data[:frame] + more + data[frame:-2] + segment(0xFE, SECRET) + b"\xff\xd9" + data + SECRET
    if kind == "png":
        data = encode(picture, "PNG", exif=block, dpi=(72, 72))
        before = chunk(b"tEXt", b"Author\0" + SECRET) + chunk(b"tIME", SECRET + b"x") + chunk(b"prVt", SECRET)
        before += chunk(b"zTXt", b"Comment\0\0" + zlib.compress(SECRET)) + chunk(b"gAMA", b"\0\0\xb1\x8f")
        before += chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
        after = chunk(b"tEXt", b"Comment\0" + SECRET)
        return data[:33] + before + data[33:-12] + after + data[-12:] + SECRET
    if kind == "webp":
        data = encode(picture, "WEBP", lossless=True, exif=block, xmp=xmp, icc_profile=b"colours" * 20)
        body = data[8:] + b"SPY " + struct.pack("<I", len(SECRET) + 1) + SECRET + b"!\0"
        return b"RIFF" + struct.pack("<I", len(body)) + body + SECRET
    if kind == "gif":
        data = encode(picture, "GIF", comment=SECRET, loop=3)
        head = 13 + (3 << (data[10] & 7) + 1)
        text = b"!\x01\x0c" + bytes(12) + bytes([len(SECRET)]) + SECRET + b"\0"
        xmp_block = b"!\xff\x0bXMP DataXMP" + bytes([len(SECRET)]) + SECRET + b"\0"
        return data[:head] + text + xmp_block + data[head:] + SECRET
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.update({270: TEXT, 305: TEXT, 306: TEXT, 315: TEXT, 700: xmp, 33723: SECRET, 34377: SECRET})
    for tag in (34665, 34853):
        tags[tag] = dict(block.get_ifd(tag))
    tags[274] = orientation
    second = picture.copy()
    second.encoderinfo = {"tiffinfo": tags}
    return encode(picture, "TIFF", tiffinfo=tags, save_all=True, append_images=[second]) + SECRET


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_told_and_the_picture_is_the_same(kind, orientation, scene, encode):
    data = telling(kind, scene(1, 49, 33), encode, orientation)
    assert data.count(SECRET) > 3
    before = frames(data)[:1]
    verdict = check(data, Treatment())
    assert verdict.status == "kept"
    assert SECRET not in verdict.data
    assert sniff(verdict.data) == kind
    assert same(frames(verdict.data), before)
    turn = 1 if kind == "gif" else orientation
    with Image.open(io.BytesIO(verdict.data)) as image:
        assert image.getexif().get_ifd(0x8825) == {}
        if kind != "tiff":
            assert dict(image.getexif()) == ({} if turn == 1 else {0x0112: turn})
    assert stripped(verdict.data, kind, turn) is verdict.data


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_how_pixels_look_stays(kind, scene, encode):
    with Image.open(io.BytesIO(check(telling(kind, scene(1), encode), Treatment()).data)) as image:
        image.load()
        if kind in ("jpeg", "webp"):
            assert image.info["icc_profile"] == b"colours" * 20
        if kind == "png":
            assert image.info["gamma"] == 0.45455
            assert round(image.info["dpi"][0]) == 72
        if kind == "gif":
            assert image.info["loop"] == 3
    clear = Image.new("P", (8, 8), 1)
    clear.putpalette([9, 9, 9, 200, 0, 0])
    for data in (encode(clear, "PNG", transparency=1), encode(clear, "GIF", transparency=1)):
        assert stripped(data, sniff(data), 1) is data


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "CMYK", "P", "RGBA", "I;16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pixels_is_the_same(kind, mode, scene, encode):
    picture = scene(2, 37, 21).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    variants = {
        "jpeg": [{}, {"progressive": True}, {"restart_marker_blocks": 1}, {"keep_rgb": True}],
        "png": [{"interlace": 1}, {}],
        "webp": [{}, {"lossless": True}],
        "gif": [{}, {"interlace": 0}],
        "tiff": [
            {"compression": name} for name in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        ],
    }
    for options in variants[kind]:
        if options.get("compression") == "jpeg" and mode not in ("L", "RGB", "CMYK"):
            continue
        try:
            data = encode(picture, KINDS[kind], **options)
        except (OSError, ValueError, RuntimeError):
            continue  # the format has no such pixels
        left = stripped(data, kind, 1)
        assert same(frames(left), frames(data)), options
        assert kind == "tiff" or left is data, options


def test_big_endian_and_tiled_and_big_tiff_are_the_same(scene, encode):
    picture = scene(3, 64, 48)
    assert stripped(encode(picture, "TIFF", big_tiff=True), "tiff", 1)[2:4] == b"+\0"
    tags = TiffImagePlugin.ImageFileDirectory_v2(b"MM\0*\0\0\0\x08")
    assert tags.prefix == b"MM"
    for options in ({"big_tiff": True}, {"strip_size": 500}, {"strip_size": 500, "compression": "tiff_lzw"}):
        data = encode(picture, "TIFF", description=TEXT, **options)
        left = stripped(data, "tiff", 1)
        assert SECRET in data
        assert SECRET not in left
        assert same(frames(left), frames(data))


@pytest.mark.parametrize("kind", ["png", "gif", "webp"])
def test_animations_stay_whole(kind, scene, encode):
    others = [scene(seed) for seed in (5, 6)]
    options = {"lossless": True} if kind == "webp" else {"comment": SECRET} if kind == "gif" else {}
    data = encode(scene(4), KINDS[kind], save_all=True, append_images=others, duration=40, loop=2, **options)
    left = stripped(data + SECRET, kind, 1)
    assert SECRET not in left
    assert len(frames(data)) == 3
    assert same(frames(left), frames(data))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_webp_is_as_if_it_had_been_written_without_metadata(orientation, scene, encode):
    picture, block = scene(1, 49, 33), Image.Exif()
    block[0x0112] = orientation
    # Pillow writes EXIF with a head that belongs to JPEG alone.
    only = {"exif": block.tobytes().removeprefix(b"Exif\0\0")} if orientation != 1 else {}
    plain = encode(picture, "WEBP", lossless=True, icc_profile=b"colours" * 20, **only)
    assert stripped(telling("webp", picture, encode, orientation), "webp", orientation) == plain


def test_metadata_in_the_frames_of_a_webp_goes(scene, encode):
    data = encode(scene(4), "WEBP", save_all=True, append_images=[scene(5)], lossless=True)
    at = data.index(b"ANMF")
    size = int.from_bytes(data[at + 4 : at + 8], "little")
    spy = b"SPY " + struct.pack("<I", len(SECRET)) + SECRET
    frame = b"ANMF" + struct.pack("<I", size + len(spy)) + data[at + 8 : at + 8 + size] + spy
    body = data[8:at] + frame + data[at + 8 + size :]
    told = b"RIFF" + struct.pack("<I", len(body)) + body
    assert same(frames(told), frames(data))
    assert stripped(told, "webp", 1) == data


def test_a_thumbnail_in_the_jfif_header_goes(scene, encode):
    data = encode(scene(), "JPEG")
    pixels = SECRET * 2  # 2 x 2 pixels of 3 bytes
    head = segment(0xE0, data[6:18] + b"\x02\x02" + pixels)
    told = data[:2] + head + data[20:]
    assert same(frames(told), frames(data))
    assert stripped(told, "jpeg", 1) == data


def test_a_gif_without_its_end_keeps_its_whole_frames(scene, encode):
    data = encode(scene(4), "GIF", save_all=True, append_images=[scene(5)])
    left = stripped(data[:-40], "gif", 1)
    assert left.endswith(b";")
    assert same(frames(left), frames(data)[:1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_D4_every_truncation_ends_as_a_verdict(kind, scene, encode):
    data = telling(kind, scene(7, 9, 7), encode, 6)
    for size in range(len(data)):
        for phash in (True, False):
            verdict = check(data[:size], Treatment(phash=phash))
            assert verdict.status in ("kept", "rejected", "failed")
            assert verdict.status != "kept" or SECRET not in (verdict.data or data[:size])


MAGIC = [
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"RIFF\x40\0\0\0WEBP",
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(MAGIC), st.binary(max_size=300))
def test_D4_any_bytes_are_stripped_or_refused(magic, rest):
    data = magic + rest
    try:
        left = stripped(data, sniff(data), 6)
    except ValueError:
        return
    assert stripped(left, sniff(data), 6) is left


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_D4_damaged_files_are_stripped_or_refused(kind, edits, scene, encode):
    data = bytearray(telling(kind, scene(8, 12, 9), encode, 3))
    for place, value in edits:
        data[int(place * len(data))] = value
    if sniff(bytes(data)) != kind:
        return
    try:
        left = stripped(bytes(data), kind, 3)
    except ValueError:
        return
    assert stripped(left, kind, 3) is left
    assert len(left) <= len(data)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*range(0xE0, 0xF0), 0xFE]),
            st.sampled_from([b"", b"Exif\0\0", b"JFIF\0", b"ICC_PROFILE\0\1\1", b"Adobe", b"MPF\0"]),
            # Pillow refuses an Adobe segment that is too short.
            st.binary(min_size=7, max_size=20),
            st.binary(max_size=3).map(lambda junk: junk.replace(b"\xff", b"")),
        ),
        max_size=6,
    )
)
def test_any_segments_leave_the_jpeg_that_a_decoder_sees(scene, encode, segments):
    data = encode(scene(), "JPEG")
    more = b"".join(junk + segment(marker, name + body) for marker, name, body, junk in segments)
    told = data[:20] + more + data[20:]
    left = stripped(told, "jpeg", 1)
    for mode in ("RGB", "YCbCr"):
        pictures = []
        for one in (told, left):
            image = Image.open(io.BytesIO(one), formats=("JPEG",))
            image.draft(mode, image.size)
            image.load()
            pictures.append(np.asarray(image))
        assert np.array_equal(*pictures)


def test_D4_parts_that_overlap_do_not_cost_time_without_end():
    strips, pixels = 100_000, 1 << 20
    places = 8 + 2 + 5 * 12 + 4
    sizes = places + 4 * strips
    entries = [
        (256, 4, 1, 1),
        (257, 4, 1, 1),
        (259, 3, 1, 5),
        (273, 4, strips, places),
        (279, 4, strips, sizes),
    ]
    data = b"II*\0\x08\0\0\0\x05\0" + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    data += (
        struct.pack("<I", sizes + 4 * strips) * strips + struct.pack("<I", pixels) * strips + bytes(pixels)
    )
    with pytest.raises(ValueError, match="do not fit"):
        stripped(data, "tiff", 1)
