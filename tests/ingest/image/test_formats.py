"""Which format a file is, also of those that nobody decodes; and AVIF, which Pillow decodes where it can."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from ingest.image import avif, decode, header
from ingest.image.check import Treatment, check
from ingest.image.stripping import stripped

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
SECRET = b"where I live"


def box(name, body):
    return struct.pack(">I4s", 8 + len(body), name) + body


def ico():
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, 20, 22) + b"\0" * 20


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("svg", b"<svg/>"),
        (
            "svg",
            b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a > b -->\n<svg xmlns="http://www.w3.org/2000/svg">',
        ),
        ("svg", b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "svg11.dtd" [<!ENTITY a "b">]>\n<svg:svg >'),
        ("ico", ico()),
        ("jpeg2000", box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")),
        ("jpeg2000", b"\xff\x4f\xff\x51\0\x2f"),
        ("jxl", box(b"JXL ", b"\r\n\x87\n")),
        ("jxl", b"\xff\x0a\x10\x20"),
        ("heic", box(b"ftyp", b"heic\0\0\0\0mif1heic")),
        ("heic", box(b"ftyp", b"mif1\0\0\0\0heix")),
    ],
)
def test_formats_that_are_not_decoded_are_named(kind, data):
    for treatment in (Treatment(), Treatment(resize=8)):
        verdict = check(data, treatment)
        assert (verdict.status, verdict.reason) == ("rejected", "format_not_supported")
        assert verdict.format == kind


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html><svg></svg>",
        b"<html><body>log in <svg/></body>",
        b"<?xml version='1.0'?><rss><svg/></rss>",
        b"<svgfoo>",
        b"<!--" * 900,
        b" " * 5000 + b"<svg>",
        b"\0\0\1\0",
        b"\0\0\1\0\0\0" + b"\0" * 40,
        b"\0\0\1\0\1\0" + b"\xff" * 40,
        box(b"ftyp", b"mp42\0\0\0\0isommp42"),
        b"\xff\x0b",
    ],
)
def test_a_page_or_a_film_is_no_image(data):
    assert check(data, Treatment()).reason == "not_an_image"


def test_avif_is_named_where_pillow_cannot_decode_it(monkeypatch):
    monkeypatch.delitem(decode._DECODERS, "avif", raising=False)
    verdict = check(box(b"ftyp", b"mif1\0\0\0\0avifmiaf"), Treatment())
    assert (verdict.reason, verdict.format) == ("format_not_supported", "avif")


@needs_avif
@pytest.mark.parametrize("orientation", [1, 6])
def test_avif_is_decoded_and_kept_without_its_words(orientation, scene, encode):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = orientation, SECRET.decode()
    picture = scene(3, 64, 48)
    data = encode(picture, "AVIF", quality=90, exif=exif, xmp=b"<x>" + SECRET + b"</x>", speed=10)
    plain = encode(picture, "AVIF", quality=90, speed=10)
    assert header.claimed_size(data, "avif") == (64, 48)
    for words in (
        data,
        data + b"behind it: " + SECRET,
        data + box(b"uuid", SECRET),
        data + box(b"free", SECRET),
    ):
        verdict = check(words, Treatment())
        assert (verdict.status, verdict.format) == ("kept", "avif")
        assert (verdict.width, verdict.height) == ((64, 48) if orientation == 1 else (48, 64))
        assert SECRET not in verdict.data
        assert "exif" not in Image.open(io.BytesIO(verdict.data)).info or orientation != 1
        # What is in zeros tells nothing, but the picture is the same, and the same way up.
        assert np.array_equal(decode.decode(verdict.data), decode.decode(data))
        assert stripped(verdict.data, "avif", orientation) == verdict.data
    assert check(plain, Treatment()).data is None
    shown = decode.decode(plain)
    assert np.abs(np.asarray(shown, int) - np.asarray(picture, int)).mean() < 4
    assert check(data, Treatment(resize=32)).width == (43 if orientation == 1 else 32)


@needs_avif
def test_the_profile_of_an_avif_stays_unless_it_is_not_wanted(scene, encode):
    data = encode(scene(3, 32, 32), "AVIF", icc_profile=b"colours" * 30, speed=10)
    assert Image.open(io.BytesIO(data)).info["icc_profile"] == b"colours" * 30
    assert check(data, Treatment()).data is None
    without = check(data, Treatment(icc=False)).data
    assert "icc_profile" not in Image.open(io.BytesIO(without)).info
    assert b"colours" not in without
    assert np.array_equal(decode.decode(without), decode.decode(data))


@needs_avif
def test_an_animated_avif_shows_its_first_frame_and_tells_nothing(encode):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    words = {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0" + SECRET, "xmp": b"<x>" + SECRET + b"</x>"}
    data = encode(frames[0], "AVIF", save_all=True, append_images=frames[1:], speed=10, **words)
    verdict = check(data, Treatment())
    assert verdict.status == "kept"
    assert SECRET not in verdict.data
    picture = Image.open(io.BytesIO(verdict.data))
    assert picture.n_frames == 3
    assert np.abs(np.array(decode.decode(verdict.data).getpixel((5, 5)), int) - (255, 0, 0)).max() < 5


@needs_avif
def test_transparent_parts_of_an_avif_show_white(encode):
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 16, 32))
    picture = decode.decode(encode(clear, "AVIF", quality=100, subsampling="4:4:4", speed=10))
    assert picture.getpixel((28, 16)) == (255, 255, 255)
    assert picture.getpixel((4, 16))[2] > 250


@needs_avif
def test_D4_an_avif_that_claims_too_much_is_rejected_before_any_decoder(scene, encode, monkeypatch):
    data = bytearray(encode(scene(), "AVIF", speed=10))
    place = data.index(b"ispe") + 8
    struct.pack_into(">II", data, place, 60_000, 60_000)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("a decoder saw the bomb"))
    assert check(bytes(data), Treatment()).reason == "too_many_pixels"


@needs_avif
def test_D4_a_truncated_avif_is_never_kept(scene, encode):
    data = encode(scene(1, 160, 120), "AVIF", speed=10)
    for share in (0.1, 0.3, 0.5, 0.8, 0.95):
        for treatment in (Treatment(), Treatment(resize=64), Treatment(phash=False)):
            assert check(data[: int(len(data) * share)], treatment).status != "kept", share


@pytest.fixture(scope="module")
def told(scene, encode):
    return encode(scene(2), "AVIF", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0", xmp=b"<x/>", speed=10)


@needs_avif
@settings(max_examples=150, deadline=None)
@given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8)
)
def test_D4_any_damage_of_an_avif_ends_as_a_verdict(edits, told):
    data = bytearray(told)
    for place, value in edits:
        data[int(place**2 * len(data))] = value
    verdict = check(bytes(data), Treatment())
    assert verdict.status in ("kept", "rejected", "failed")
    if verdict.status == "kept":
        decode.decode(bytes(data) if verdict.data is None else verdict.data)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_D4_boxes_of_any_bytes_end_in_words(rest):
    meta = box(
        b"meta", b"\0\0\0\0" + box(b"iinf", rest) + box(b"iloc", rest) + box(b"iprp", box(b"ipco", rest))
    )
    for data in (box(b"ftyp", b"avif\0\0\0\0") + meta + rest, box(b"ftyp", b"avif\0\0\0\0") + rest):
        assert header.sniff(data) == "avif"
        header.claimed_size(data, "avif")
        try:
            avif.pictures_alone(data, profile=False)
        except (ValueError, struct.error, IndexError):
            continue
