"""Crops on the device are those of the Pillow that is installed, byte for byte."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers, sampled_from
from PIL import Image

from cluster.errors import UserError
from pipeline.data.image import resample
from pipeline.data.image.resample import crop_and_resize, installed_fixed_point
from pipeline.recipe.data import Interpolation

FIXED_POINT = installed_fixed_point()
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@settings(max_examples=60, deadline=None)
@given(
    width=integers(1, 70),
    height=integers(1, 70),
    size=integers(1, 40),
    interpolation=sampled_from(("bilinear", "bicubic")),
    seed=integers(0, 2**32),
)
def test_a_crop_is_pillows_to_the_last_bit(
    width: int, height: int, size: int, interpolation: Interpolation, seed: int
) -> None:
    rng, count = np.random.default_rng(seed), 8
    pixels = rng.integers(0, 256, (count, height, width, 3), np.uint8)
    # Black beside white, where rounding would show first, and what a filter shoots over.
    pixels[: count // 2] = 255 * (pixels[: count // 2] > 127)
    w, h = rng.integers(1, width + 1, count), rng.integers(1, height + 1, count)
    left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
    boxes = torch.from_numpy(np.stack([left, top, w, h], 1))
    ours = crop_and_resize(
        torch.from_numpy(pixels), boxes, size=size, interpolation=interpolation, fixed_point=FIXED_POINT
    )
    assert ours.shape == (count, size, size, 3)
    for number, (x, y, across, down) in enumerate(boxes.tolist()):
        picture = Image.fromarray(pixels[number])
        theirs = picture.resize((size, size), FILTERS[interpolation], box=(x, y, x + across, y + down))
        assert np.array_equal(np.asarray(theirs), ours[number].numpy())


@pytest.mark.parametrize("interpolation", FILTERS)
def test_a_pillow_that_resizes_otherwise_is_refused(
    interpolation: Interpolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = resample._FILTERS[interpolation]._replace(pillow=Image.Resampling.HAMMING)
    monkeypatch.setitem(resample._FILTERS, interpolation, other)
    with pytest.raises(UserError, match=r"Pillow resizes in a way .* use run\.resident=false"):
        installed_fixed_point()
