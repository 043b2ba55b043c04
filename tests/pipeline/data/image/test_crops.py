"""Boxes, and crops against plain PIL."""

import io
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, lists, tuples
from numpy.typing import NDArray
from PIL import Image
from small_pictures import picture

from ingest.image.decode import ImageError
from pipeline.data.image import crops as module
from pipeline.data.image.crops import GEOMETRY_DRAWS, crop_box, cut
from pipeline.recipe.data import CropGroup, Interpolation

TWO_SIZES = (
    CropGroup(count=2, size=24, scale=(0.3, 1.0)),
    CropGroup(count=3, size=10, scale=(0.05, 0.3), interpolation="bicubic"),
)
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cut_all(data: bytes, groups: Sequence[CropGroup], draws: NDArray[np.float64]) -> list[NDArray[np.uint8]]:
    out = [np.full((group.count, group.size, group.size, 3), 7, np.uint8) for group in groups]
    cut(data, groups, draws, out)
    return out


def some_draws(seed: int, groups: Sequence[CropGroup]) -> NDArray[np.float64]:
    return np.random.default_rng(seed).random((sum(group.count for group in groups), GEOMETRY_DRAWS))


uniform = floats(0, 1, exclude_min=True, exclude_max=True)


@given(
    width=integers(1, 5_000),
    height=integers(1, 5_000),
    draws=lists(uniform, min_size=GEOMETRY_DRAWS, max_size=GEOMETRY_DRAWS),
    scale=tuples(floats(0.01, 1), floats(0.01, 1)),
)
def test_boxes_lie_inside(width: int, height: int, draws: list[float], scale: tuple[float, float]) -> None:
    group = CropGroup(count=1, size=8, scale=(min(scale), max(scale)))
    left, top, w, h = crop_box(width, height, draws, group)
    assert w >= 1
    assert h >= 1
    assert 0 <= left <= left + w <= width
    assert 0 <= top <= top + h <= height


def test_boxes_have_the_asked_areas_ratios_and_places() -> None:
    group = CropGroup(count=1, size=8, scale=(0.1, 0.4))
    draws = np.random.default_rng(0).random((4_000, GEOMETRY_DRAWS))
    boxes = np.array([crop_box(1_000, 800, row.tolist(), group) for row in draws])
    left, top, w, h = boxes.T
    area, ratio = w * h / 800_000, np.log(w / h)
    # Means of uniform distributions: standard errors are 0.0014 and 0.0026.
    assert abs(area.mean() - 0.25) < 0.006
    assert abs(ratio.mean()) < 0.011
    # Rounding to whole pixels moves the limits by less than a hundredth.
    assert area.min() > 0.099
    assert area.max() < 0.401
    assert math.log(3 / 4) - 0.01 < ratio.min()
    assert ratio.max() < math.log(4 / 3) + 0.01
    assert abs((left / (1_000 - w)).mean() - 0.5) < 0.02
    assert abs((top / (800 - h)).mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("size", "box"),
    [((100, 10), (43, 0, 13, 10)), ((10, 100), (0, 43, 10, 13)), ((1, 5_000), (0, 2_499, 1, 1))],
)
def test_long_thin_images_fall_back_to_the_largest_central_box(
    size: tuple[int, int], box: tuple[int, ...]
) -> None:
    assert crop_box(*size, [0.5] * GEOMETRY_DRAWS, CropGroup(count=1, size=8, scale=(0.9, 1.0))) == box


@settings(max_examples=20, deadline=None)
@given(seed=integers(0, 1_000))
def test_crops_equal_plain_pil(seed: int) -> None:
    """Without a scaled decode: the same box, resized by the same filter, flipped if drawn so."""
    image, draws = picture(seed, 90, 70), some_draws(seed, TWO_SIZES)
    out = cut_all(encode(image), TWO_SIZES, draws)
    number = 0
    for group, crops in zip(TWO_SIZES, out, strict=True):
        for crop in crops:
            row = draws[number].tolist()
            left, top, w, h = crop_box(90, 70, row, group)
            plain = image.resize(
                (group.size, group.size), FILTERS[group.interpolation], box=(left, top, left + w, top + h)
            )
            expected = np.asarray(plain)
            assert np.array_equal(crop, expected[:, ::-1] if row[0] < 0.5 else expected)
            number += 1


@pytest.mark.parametrize("interpolation", FILTERS)
def test_crops_are_those_of_torchvision_by_the_same_filter(interpolation: Interpolation) -> None:
    """Torchvision cuts out first, then resizes: what differs is the border, where ours see what lies beside
    the crop, and that is less than what the other filter changes everywhere.
    """
    group = CropGroup(count=4, size=32, scale=(0.08, 1.0), flip_probability=0, interpolation=interpolation)
    squares: dict[str, list[float]] = {name: [] for name in FILTERS}
    for seed in range(6):
        noise = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
        image = Image.fromarray(noise).resize((120, 90), Image.Resampling.LANCZOS)
        draws = some_draws(seed, [group])
        (ours,) = cut_all(encode(image), [group], draws)
        for crop, row in zip(ours, draws.tolist(), strict=True):
            left, top, w, h = crop_box(120, 90, row, group)
            for name, pillow in FILTERS.items():
                cropped = image.crop((left, top, left + w, top + h))
                theirs = np.asarray(cropped.resize((32, 32), pillow))
                apart = np.abs(crop - theirs.astype(float))
                squares[name].append(float(np.square(apart).mean()))
                # A border's weights may cost pillow-simd a bit behind the point.
                assert name != interpolation or apart[3:-3, 3:-3].max() <= 1
    psnr = {name: 10 * math.log10(255**2 / np.mean(found)) for name, found in squares.items()}
    assert psnr.pop(interpolation) > 42
    assert max(psnr.values()) < 34


def test_jpegs_are_decoded_at_the_smallest_scale_that_upsamples_no_crop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded: list[tuple[int, int]] = []
    decode = module.decode

    def watch(data: bytes, **options: object) -> Image.Image:
        image = decode(data, **options)  # type: ignore[arg-type]
        decoded.append(image.size)
        return image

    monkeypatch.setattr(module, "decode", watch)
    data = encode(picture(1, 801, 603), "JPEG", quality=95)
    for size, low, expected in [(24, 0.5, (101, 76)), (150, 0.5, (401, 302)), (300, 0.5, (801, 603))]:
        group = CropGroup(count=2, size=size, scale=(low, 0.6), ratio=(1.0, 1.0))
        cut_all(data, [group], some_draws(0, [group]))
        assert decoded.pop() == expected


@pytest.mark.parametrize("orientation", range(2, 9))
def test_scaled_crops_look_like_full_ones_whatever_the_orientation(orientation: int) -> None:
    """Mean deviation under 2 of 255 from crops of the upright picture at full size."""
    group = CropGroup(count=4, size=32, scale=(0.2, 1.0))
    upright = picture(2, 400, 300)
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(upright.transpose(turned), "JPEG", quality=95, exif=exif)
    draws = some_draws(5, [group])
    (crops,), (plain,) = cut_all(data, [group], draws), cut_all(encode(upright), [group], draws)
    assert np.abs(crops.astype(int) - plain.astype(int)).mean() < 2


def test_flips_follow_their_probability() -> None:
    image, draws = encode(picture(3, 40, 40)), some_draws(1, TWO_SIZES[:1])
    never, always = (
        cut_all(image, [TWO_SIZES[0].model_copy(update={"flip_probability": chance})], draws)[0]
        for chance in (0.0, 1.0)
    )
    assert np.array_equal(always, never[:, :, ::-1])
    assert not np.array_equal(always, never)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = picture(4, 50, 40)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    converted = (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    out = cut_all(encode(converted, kind), TWO_SIZES, some_draws(0, TWO_SIZES))
    assert all(crops.std() > 5 for crops in out)


@settings(max_examples=40, deadline=None)
@given(cut_at=integers(0, 2_000), noise=integers(0, 255))
def test_damaged_bytes_are_bad_samples_or_images_never_crashes(cut_at: int, noise: int) -> None:
    data = bytearray(encode(picture(5, 64, 48), "JPEG"))
    data[cut_at % len(data)] ^= noise
    for hostile in (bytes(data), bytes(data[:cut_at])):
        try:
            cut_all(hostile, TWO_SIZES, some_draws(0, TWO_SIZES))
        except ImageError as error:
            assert str(error).startswith(("rejected: ", "failed: "))


def test_what_is_no_image_says_so() -> None:
    with pytest.raises(ImageError, match="rejected: not_an_image"):
        cut_all(b"no picture at all", TWO_SIZES, some_draws(0, TWO_SIZES))
