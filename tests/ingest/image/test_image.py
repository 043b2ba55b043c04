"""Sniffing, bounds, orientation, colour, hashes; and that hostile bytes end as a verdict."""

import hashlib
import io
import math
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from ingest.image import header
from ingest.image.check import Treatment, check
from ingest.image.decode import ImageError, ImageLimits, decode
from ingest.image.header import sniff
from ingest.image.phash import perceptual_hash

KINDS = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF"}
LOSSLESS = {"png": {}, "webp": {"lossless": True}, "bmp": {}, "tiff": {}}


def difference(a, b):
    return np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_format_is_known_by_content(kind, scene, encode):
    assert sniff(encode(scene(), KINDS[kind])) == kind


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xd8", b"BMW is a car", b"RIFF1234WAVEfmt ", b"%PDF-1.7", b"GIF", b"\0" * 99],
)
def test_what_is_no_image_is_rejected(data):
    assert sniff(data) is None
    with pytest.raises(ImageError) as error:
        decode(data)
    assert error.value.status == "rejected"
    assert error.value.reason == ("not_an_image" if data else "empty")


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400), kind=st.sampled_from(sorted(KINDS)))
def test_header_claims_what_pillow_decodes(width, height, kind, encode):
    for options in (
        ({}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}) if kind == "webp" else ({},)
    ):
        data = encode(Image.new("RGB", (width, height), "red"), KINDS[kind], **options)
        assert header.claimed_size(data, kind) == (width, height)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([magic for magics in header._MAGIC.values() for magic in magics]), st.binary(max_size=200)
)
def test_D4_header_of_any_bytes_never_raises(magic, rest):
    for data in (magic + rest, b"RIFF\0\0\0\0WEBP" + rest, b"BM" + b"\0" * 12 + b"\x28\0\0\0" + rest):
        kind = sniff(data)
        if kind is not None:
            header.claimed_size(data, kind)


def png(width, height):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def bombs(encode):
    small = Image.new("RGB", (8, 8))
    gif = bytearray(encode(small, "GIF"))
    wide_frame = bytearray(gif)
    frame = gif.index(b",", 6)
    struct.pack_into("<HH", gif, 6, 60_000, 60_000)
    struct.pack_into("<HH", wide_frame, frame + 5, 10_000, 10_000)
    webp = bytearray(encode(small, "WEBP", lossless=True))
    struct.pack_into("<I", webp, 21, 16_382 | 16_382 << 14)
    jpeg = bytearray(encode(small, "JPEG"))
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, 65_000, 65_000)
    bmp = bytearray(encode(small, "BMP"))
    struct.pack_into("<ii", bmp, 18, 100_000, -100_000)
    entries = struct.pack("<HHIIHHII", 256, 4, 1, 90_000, 257, 4, 1, 90_000)
    tiff = b"II*\0\x08\0\0\0\x02\0" + entries + b"\0" * 4
    extended = (
        b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<II", 10, 2) + b"\xff\x7f\0\xff\x7f\0"
    )
    parts = {
        "png": png(50_000, 50_000),
        "gif": gif,
        "gif_frame": wide_frame,
        "webp": webp,
        "webp_canvas": extended,
    }
    return {name: bytes(data) for name, data in (parts | {"jpeg": jpeg, "bmp": bmp, "tiff": tiff}).items()}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_D4_bombs_are_rejected_before_any_decoder(encode, monkeypatch):
    for name, data in bombs(encode).items():
        if name != "gif_frame":
            with monkeypatch.context() as patch:
                patch.setattr(Image, "open", lambda *_, **__: pytest.fail("a decoder saw the bomb"))
                assert check(data, Treatment()).reason == "too_many_pixels", name
        with pytest.raises(ImageError) as error:
            decode(data)
        assert (error.value.status, error.value.reason) == ("rejected", "too_many_pixels"), name


def test_D4_limits_are_inclusive(scene, encode):
    data = encode(scene(0, 20, 10), "PNG")
    assert decode(data, limits=ImageLimits(max_pixels=200, max_bytes=len(data))).size == (20, 10)
    for limits in (ImageLimits(max_pixels=199), ImageLimits(max_bytes=len(data) - 1)):
        with pytest.raises(ImageError, match="too_many"):
            decode(data, limits=limits)


@pytest.mark.parametrize("kind", KINDS)
def test_D4_truncated_files_are_never_kept(kind, scene, encode):
    data = encode(scene(1, 160, 120), KINDS[kind])
    for share in (0.3, 0.5, 0.8, 0.95):
        cut = data[: int(len(data) * share)]
        for treatment in (Treatment(), Treatment(resize=64), Treatment(phash=False)):
            verdict = check(cut, treatment)
            assert (verdict.status, verdict.phash) == ("failed", None), share
            assert verdict.sha256 is None
        with pytest.raises(ImageError):
            decode(cut)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    treatment=st.sampled_from([Treatment(), Treatment(resize=16), Treatment(phash=False)]),
)
def test_D4_any_damage_ends_as_a_verdict(kind, edits, treatment, scene, encode):
    data = bytearray(encode(scene(2), KINDS[kind]))
    for place, value in edits:
        data[int(place * len(data))] = value
    verdict = check(bytes(data), replace(treatment, limits=ImageLimits(max_pixels=1_000_000)))
    assert verdict.status in ("kept", "rejected", "failed")
    assert (verdict.reason == "") == (verdict.status == "kept")
    if verdict.status == "kept" and verdict.phash is not None:
        shown = decode(bytes(data) if verdict.data is None else verdict.data)
        assert shown.size == (verdict.width, verdict.height)


def oriented(picture, orientation):
    """The picture stored so that this EXIF orientation shows it upright, and the EXIF."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    return (picture.transpose(undo[orientation]) if orientation in undo else picture), exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_every_orientation_comes_out_upright(kind, orientation, scene, encode):
    picture = scene(3, 96, 64)
    stored, exif = oriented(picture, orientation)
    data = encode(stored, KINDS[kind], exif=exif, **LOSSLESS.get(kind, {"quality": 95}))
    shown = decode(data)
    assert shown.size == (96, 64)
    assert difference(shown, picture) < (0.01 if kind in LOSSLESS else 3)
    kept, smaller = check(data, Treatment()), check(data, Treatment(resize=32))
    assert (kept.width, kept.height) == (96, 64)
    assert difference(decode(data if kept.data is None else kept.data), shown) == 0
    assert (smaller.width, smaller.height) == (48, 32)
    assert (smaller.original_width, smaller.original_height) == (96, 64)
    assert smaller.data is not None
    assert difference(Image.open(io.BytesIO(smaller.data)), picture.resize((48, 32))) < 4
    assert (kept.phash ^ check(encode(picture, "PNG"), Treatment()).phash).bit_count() <= 4


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_costs_no_picture(exif, scene, encode):
    assert decode(encode(scene(), "JPEG", exif=exif)).size == (48, 32)


@pytest.mark.parametrize("orientation", [1, 6])
def test_dct_scale_is_the_smallest_that_suffices(orientation, scene, encode):
    stored, exif = oriented(scene(4, 640, 320), orientation)
    data = encode(stored, "JPEG", exif=exif)
    asked = []

    def at_least(width, height):
        asked.append((width, height))
        return 150, 80

    assert decode(data, at_least=at_least).size == (160, 80)
    assert asked == [(640, 320)]
    assert decode(data, at_least=lambda width, height: (161, 80)).size == (320, 160)


def test_rgb_is_not_converted_again(scene, encode, monkeypatch):
    data = encode(scene(), "JPEG")
    monkeypatch.setattr(Image.Image, "convert", lambda *_, **__: pytest.fail("copied every pixel"))
    assert decode(data).mode == "RGB"


def test_transparent_parts_show_white(scene, encode):
    clear = scene().convert("RGBA")
    clear.putalpha(0)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    key = Image.new("RGB", (4, 4), (10, 20, 30))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    for data, colour in (
        (encode(clear, "PNG"), (255, 255, 255)),
        (encode(clear, "WEBP", lossless=True, exact=True), (255, 255, 255)),
        (encode(clear.convert("LA"), "PNG"), (255, 255, 255)),
        (encode(half, "PNG"), (127, 127, 127)),
        (encode(key, "PNG", transparency=(10, 20, 30)), (255, 255, 255)),
        (encode(palette, "PNG", transparency=1), (255, 255, 255)),
        (encode(palette, "PNG"), (200, 0, 0)),
        (encode(Image.new("L", (4, 4), 7), "PNG", transparency=7), (255, 255, 255)),
    ):
        picture = decode(data)
        assert picture.mode == "RGB"
        assert picture.getpixel((1, 1)) == colour
        assert check(data, Treatment()).phash == perceptual_hash(picture)


def test_deep_and_printed_colours_become_8_bit_rgb(encode):
    ramp = np.linspace(0, 65_535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.repeat((ramp >> 8)[:, :, None], 3, axis=2)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(np.asarray(decode(encode(Image.fromarray(ramp), kind))), expected)
    for values in (ramp.astype(np.float32) / 7 - 100, ramp.astype(np.int32) * 1000):
        grey = np.asarray(decode(encode(Image.fromarray(values), "TIFF")))[..., 0].astype(int)
        assert (grey.min(), grey.max()) == (0, 255)
        assert np.abs(grey - (ramp.astype(int) >> 8)).max() <= 1
    assert np.asarray(decode(encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"))).max() == 0
    assert (
        decode(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95)).getpixel((4, 4))[0] < 5
    )
    assert decode(encode(Image.new("1", (8, 8), 1), "PNG")).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind, encode):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode(data).getpixel((8, 8)) == (255, 0, 0)


@pytest.mark.parametrize("phash", [True, False])
def test_original_bytes_are_kept_but_for_what_is_no_picture(phash, scene, encode):
    plain = encode(scene(5, 300, 200), "JPEG")
    verdict = check(plain, Treatment(phash=phash))
    assert (verdict.status, verdict.format, verdict.data) == ("kept", "jpeg", None)
    assert verdict.sha256 == hashlib.sha256(plain).hexdigest()
    assert (verdict.width, verdict.height, verdict.original_width, verdict.original_height) == (300, 200) * 2
    verdict = check(encode(scene(5, 300, 200), "JPEG", comment=b"hello"), Treatment(phash=phash))
    assert (verdict.data, verdict.sha256) == (plain, hashlib.sha256(plain).hexdigest())


@pytest.mark.parametrize("kind", KINDS)
def test_without_phash_the_rest_of_the_verdict_is_the_same(kind, scene, encode):
    data = encode(scene(5, 100, 80), KINDS[kind])
    for treatment in (Treatment(), Treatment(resize=40, crop="center", encoding="webp")):
        hashed, plain = check(data, treatment), check(data, replace(treatment, phash=False))
        assert hashed.phash is not None
        assert plain == replace(hashed, phash=None)


def test_without_phash_a_kept_jpeg_is_not_decoded(scene, encode, monkeypatch):
    data = encode(scene(5, 100, 80), "JPEG", comment=b"hello")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    assert check(data, Treatment(phash=False)).status == "kept"


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        ((300, 200), 100, (150, 100)),
        ((200, 301), 100, (100, 150)),
        ((30, 20), 100, (30, 20)),
        ((999, 2), 1, (500, 1)),
    ],
)
def test_resize_keeps_the_ratio_and_never_enlarges(size, resize, expected, scene, encode):
    for kind in ("JPEG", "PNG"):
        verdict = check(encode(scene(6, *size), kind), Treatment(resize=resize))
        assert (verdict.width, verdict.height) == expected
        assert verdict.data is not None
        assert Image.open(io.BytesIO(verdict.data)).size == expected
        assert verdict.sha256 == hashlib.sha256(verdict.data).hexdigest()


@pytest.mark.parametrize(
    ("size", "resize", "side"), [((300, 200), 100, 100), ((201, 300), 100, 100), ((301, 200), 300, 200)]
)
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_centre_crop_is_the_middle_square(kind, orientation, size, resize, side, scene, encode):
    picture = scene(6, *size)
    stored, exif = oriented(picture, orientation)
    verdict = check(encode(stored, kind, exif=exif), Treatment(resize=resize, crop="center"))
    assert (verdict.width, verdict.height) == (side, side)
    assert (verdict.original_width, verdict.original_height) == size
    middle = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    assert difference(Image.open(io.BytesIO(verdict.data)), middle) < 3


def test_webp_is_stored_on_request(scene, encode):
    picture = scene(6, 300, 200)
    sizes = []
    for quality in (95, 30):
        treatment = Treatment(resize=100, encoding="webp", quality=quality)
        verdict = check(encode(picture, "PNG"), treatment)
        assert (verdict.format, sniff(verdict.data)) == ("webp", "webp")
        assert difference(decode(verdict.data), picture.resize((150, 100), Image.Resampling.LANCZOS)) < 6
        sizes.append(len(verdict.data))
    assert sizes[0] > sizes[1]
    long = check(encode(Image.new("L", (33_000, 4)), "PNG"), Treatment(resize=4, encoding="webp"))
    assert (long.width, long.height) == (16_383, 2)


def test_reencoding_strips_metadata(scene, encode):
    _, exif = oriented(scene(), 1)
    exif[0x010E] = "where I live"
    for kind, options in (("JPEG", {"comment": b"secret", "icc_profile": b"profile" * 30}), ("PNG", {})):
        stored = check(encode(scene(), kind, exif=exif, **options), Treatment(resize=16)).data
        assert stored is not None
        assert set(Image.open(io.BytesIO(stored)).info) <= {
            "jfif",
            "jfif_version",
            "jfif_unit",
            "jfif_density",
        }
        assert b"live" not in stored
        assert b"secret" not in stored


def test_a_picture_too_long_for_jpeg_is_scaled_to_fit(encode):
    verdict = check(encode(Image.new("L", (70_000, 3)), "PNG"), Treatment(resize=3))
    assert (verdict.width, verdict.height) == (65_500, 3)


def documented_hash(pixels):
    """The hash from its description, in Python's integers."""
    grey = (
        pixels.astype(object) * 256 if pixels.ndim == 2 else (pixels.astype(object) * [77, 150, 29]).sum(-1)
    )
    height, width = grey.shape
    block = max(1, height // 64)
    small = np.zeros((32, 32), object)
    down, across = (
        [
            [
                255 * max(0, reach - abs((start + end) * 32 - (2 * place + 1) * side)) // reach
                for start, end, size in spans
                for _ in range(size)
            ]
            for place in range(32)
        ]
        for side, step in ((height, block), (width, max(1, width // 4096)))
        for reach in (max(64 * step, 2 * side),)
        for spans in ([(at, min(at + step, side), min(step, side - at)) for at in range(0, side, step)],)
    )
    down, across = np.array(down, object), np.array(across, object)
    sums = down @ grey @ across.T
    shares = 256 * np.outer(down.sum(1), across.sum(1))
    small = (2 * sums + shares) // (2 * shares)
    n = np.arange(32)
    basis = np.array([[math.cos(math.pi * k * (2 * i + 1) / 64) for i in n] for k in range(8)])
    low = basis @ small.astype(float) @ basis.T
    return sum(int(bit) << (63 - k) for k, bit in enumerate((low > np.median(low)).ravel()))


@pytest.mark.parametrize(
    "shape", [(32, 32), (32, 32, 3), (131, 70, 3), (200, 333), (3, 2), (5, 900, 3), (2, 9001), (8_500, 2)]
)
def test_perceptual_hash_is_the_documented_one(shape):
    pixels = np.random.default_rng(7).integers(0, 256, shape, np.uint8)
    assert perceptual_hash(Image.fromarray(pixels)) == documented_hash(pixels)


def test_perceptual_hash_of_the_same_pixels_is_the_same_with_every_build():
    """As Pillow 12.1.1 and 13.0.0 and pillow-simd 12.1.1 gave it: they resize and average differently."""
    hashes = []
    for seed, shape in enumerate([(250, 119, 3), (563, 469, 3), (640, 480), (90, 130, 3)]):
        # Of numbers that no version of NumPy draws otherwise.
        numbers = (np.arange(math.prod(shape), dtype=np.uint64) + seed) * 2_654_435_761 % 4_294_967_296
        pixels = (numbers >> 24).astype(np.uint8).reshape(shape)
        hashes.append(f"{perceptual_hash(Image.fromarray(pixels), orientation=2 * seed + 1):016x}")
    assert hashes == ["b8037e11aae35fe0", "827d9e5caae55630", "fefb7021dca19023", "94161416fea79cd6"]


def test_perceptual_hash_survives_scaling_and_encoding_and_tells_pictures_apart(scene, encode):
    hashes = []
    for seed in range(8):
        picture = scene(seed, 240, 160)
        same = [
            check(encode(picture, "PNG"), Treatment()).phash,
            check(encode(picture, "JPEG", quality=60), Treatment()).phash,
            check(encode(picture.resize((120, 80)), "JPEG"), Treatment()).phash,
            check(encode(picture, "PNG"), Treatment(resize=64)).phash,
        ]
        assert max((same[0] ^ other).bit_count() for other in same) <= 6
        hashes.append(same[0])
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) >= 16


def test_mirrored_picture_has_another_hash(scene):
    assert perceptual_hash(scene(9)) != perceptual_hash(ImageOps.mirror(scene(9)))
