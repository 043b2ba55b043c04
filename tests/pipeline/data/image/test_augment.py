"""Each colour operation against plain NumPy or the standard library, one crop at a time."""

import colorsys
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.image.augment import (
    BRIGHTNESS,
    CONTRAST,
    GREY,
    HUE,
    ORDER,
    PARAMETERS,
    PHOTOMETRIC_DRAWS,
    SATURATION,
    SIGMA,
    SOLARIZE,
    augment,
    draw_parameters,
)
from pipeline.recipe.data import Photometric

Array = NDArray[np.float64]
LUMA = np.array([0.299, 0.587, 0.114])
PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "dtype": torch.float64}
ORDERS = list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))


def crops_of(seed: int, count: int, size: int) -> Tensor:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), np.uint8)
    pixels[:, :, 0, 0], pixels[:, :, 0, 1], pixels[:, :, 0, 2] = 0, 255, 128
    pixels[:, 1, 1, :], pixels[:, 2, 2, :] = pixels[:, 0, 1, :], pixels[:, 1, 2, :]
    return torch.from_numpy(pixels)


def nothing(count: int) -> Tensor:
    """Parameters that change nothing."""
    parameters = torch.zeros(count, PARAMETERS)
    parameters[:, [BRIGHTNESS, CONTRAST, SATURATION]] = 1.0
    parameters[:, ORDER] = -1.0
    return parameters


def random_parameters(seed: int, count: int) -> Tensor:
    draws = np.random.default_rng(seed).random((count, PHOTOMETRIC_DRAWS))
    photometric = Photometric(hue=0.5, solarize_probability=0.3)
    return torch.from_numpy(draw_parameters(draws, photometric))


def reference_jitter(x: Array, operation: int, factor: float) -> Array:
    """x is (3, S, S) in [0, 1]; torchvision's definitions."""
    if operation == HUE:
        out = np.empty_like(x)
        for place in np.ndindex(x.shape[1:]):
            hue, saturation, value = colorsys.rgb_to_hsv(*x[:, *place])
            out[:, *place] = colorsys.hsv_to_rgb((hue + factor) % 1, saturation, value)
        return out
    grey = np.tensordot(LUMA, x, 1)
    other = {BRIGHTNESS: 0.0, CONTRAST: grey.mean(), SATURATION: grey}[operation]
    return np.clip(factor * x + (1 - factor) * other, 0, 1)


def reference_blur(x: Array, sigma: float) -> Array:
    """Both directions at once, with the whole two-dimensional kernel."""
    size = x.shape[-1]
    radius = min(int(np.ceil(4 * sigma)), max(1, round(size / 20)))
    line = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = np.outer(line, line) / line.sum() ** 2
    padded = np.pad(x, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
    out = np.zeros_like(x)
    for down, across in np.ndindex(kernel.shape):
        out += kernel[down, across] * padded[:, down : down + size, across : across + size]
    return out


def reference(crop: NDArray[np.uint8], row: NDArray[np.float32]) -> Array:
    x = crop / 255
    for operation in ORDERS[int(row[ORDER])] if row[ORDER] >= 0 else ():
        x = reference_jitter(x, operation, float(row[operation]))
    if row[GREY]:
        x = np.broadcast_to(np.tensordot(LUMA, x, 1), x.shape)
    if row[SIGMA]:
        x = reference_blur(x, float(row[SIGMA]))
    return np.where(x < 0.5, x, 1 - x) if row[SOLARIZE] else x


@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION, HUE])
@pytest.mark.parametrize("strength", [-1.0, -0.45, 0.0, 0.3, 1.0])
def test_each_jitter_equals_its_definition(operation: int, strength: float) -> None:
    crops, parameters = crops_of(0, 2, 12), nothing(2)
    parameters[:, ORDER] = 0.0
    parameters[:, operation] = strength / 2 if operation == HUE else 1 + strength
    out = augment(crops, parameters, **PLAIN).numpy()
    for crop, row, got in zip(crops.numpy(), parameters.numpy(), out, strict=True):
        np.testing.assert_allclose(got, reference(crop, row), atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(seed=integers(0, 10_000), size=integers(3, 44))
def test_the_whole_chain_equals_the_reference(seed: int, size: int) -> None:
    """Parameters are float32: 1e-7 of a factor, times a few operations."""
    crops, parameters = crops_of(seed, 3, size), random_parameters(seed, 3)
    out = augment(crops, parameters, **PLAIN).numpy()
    for crop, row, got in zip(crops.numpy(), parameters.numpy(), out, strict=True):
        np.testing.assert_allclose(got, reference(crop, row), atol=2e-6)


def test_all_orders_are_different_and_each_is_the_drawn_one() -> None:
    crops = crops_of(1, 1, 8).expand(24, -1, -1, -1).contiguous()
    parameters = nothing(24)
    parameters[:, [BRIGHTNESS, CONTRAST, SATURATION]] = torch.tensor([1.7, 1.6, 0.3])
    parameters[:, HUE] = 0.3
    parameters[:, ORDER] = torch.arange(24.0)
    out = augment(crops, parameters, **PLAIN).numpy()
    assert len({got.tobytes() for got in out}) >= 20
    for crop, row, got in zip(crops.numpy(), parameters.numpy(), out, strict=True):
        np.testing.assert_allclose(got, reference(crop, row), atol=1e-6)


def test_nothing_drawn_is_normalisation_alone() -> None:
    crops = crops_of(2, 5, 9)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    out = augment(crops, nothing(5), mean=mean, std=std, dtype=torch.float64)
    expected = (crops.numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-12)


def test_a_crop_does_not_depend_on_its_neighbours_or_its_place() -> None:
    crops, parameters = crops_of(3, 40, 32), random_parameters(3, 40)
    together = augment(crops, parameters, **PLAIN)
    turned = torch.arange(39, -1, -1)
    assert torch.equal(augment(crops[turned], parameters[turned], **PLAIN)[turned], together)
    for number in range(0, 40, 7):
        alone = augment(crops[number : number + 1], parameters[number : number + 1], **PLAIN)
        assert torch.equal(alone[0], together[number])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 0.0), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)]
)
def test_the_result_is_channels_last_in_the_asked_type(dtype: torch.dtype, tolerance: float) -> None:
    """float32: hue divides by the chroma, at least 1/255; bfloat16 keeps eight bits of values up to 2.7."""
    crops, parameters = crops_of(4, 30, 16), random_parameters(4, 30)
    normal: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    exact = augment(crops, parameters, **normal, dtype=torch.float64)
    out = augment(crops, parameters, **normal, dtype=dtype)
    assert out.dtype == dtype
    assert out.shape == crops.shape
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (out.double() - exact).abs().max() <= tolerance


def test_inputs_are_left_alone() -> None:
    crops, parameters = crops_of(5, 8, 16), random_parameters(5, 8)
    before = crops.clone(), parameters.clone()
    augment(crops, parameters, **PLAIN)
    assert torch.equal(crops, before[0])
    assert torch.equal(parameters, before[1])


def test_parameters_have_the_asked_ranges_and_chances() -> None:
    """20,000 draws: one sigma of a probability is at most 0.0035."""
    photometric = Photometric(
        jitter_probability=0.7,
        brightness=0.4,
        contrast=1.5,
        saturation=0.2,
        hue=0.1,
        grey_probability=0.25,
        blur_probability=0.6,
        blur_sigma=(0.3, 1.2),
        solarize_probability=0.1,
    )
    drawn = draw_parameters(np.random.default_rng(0).random((20_000, PHOTOMETRIC_DRAWS)), photometric)
    for column, low, high in [
        (BRIGHTNESS, 0.6, 1.4),
        (CONTRAST, 0.0, 2.5),
        (SATURATION, 0.8, 1.2),
        (HUE, -0.1, 0.1),
    ]:
        values = drawn[:, column]
        assert low <= values.min() < low + 0.01
        assert high - 0.01 < values.max() <= high + 1e-6
    jittered = drawn[drawn[:, ORDER] >= 0, ORDER]
    assert set(jittered.tolist()) == set(range(24))
    sigma = drawn[drawn[:, SIGMA] > 0, SIGMA]
    assert sigma.min() + 1e-6 >= 0.3
    assert sigma.max() <= 1.2 + 1e-6
    shares = [len(jittered) / 20_000, drawn[:, GREY].mean(), len(sigma) / 20_000, drawn[:, SOLARIZE].mean()]
    assert np.abs(np.array(shares) - [0.7, 0.25, 0.6, 0.1]).max() < 0.015
