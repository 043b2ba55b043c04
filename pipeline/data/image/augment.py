"""Colour augmentation of many crops at once, from drawn parameters: one implementation for CPU and GPU.

What is done to a crop depends on its own parameters alone. Crops that take the same steps are worked on
together, in pieces that fit a CPU's cache.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.data.to_device import constant, to_device
from pipeline.recipe.data import Photometric

# Columns of the parameters. ORDER is a row of _ORDERS, −1 for no jitter; SIGMA, in pixels, is 0 for no blur.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, SOLARIZE = range(8)
PARAMETERS = 8
# The draws of one crop that are colour.
PHOTOMETRIC_DRAWS = 10

_ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
# ITU-R BT.601, as PIL's "L" mode.
_LUMA = (0.299, 0.587, 0.114)
_SOLARIZE_THRESHOLD = 0.5
# Beyond four sigmas a Gaussian's weights are under 0.0004 of the largest.
_BLUR_SIGMAS = 4
# Values worked on at once: the few arrays of one step stay in a core's cache; a GPU wants much, but not all.
_CPU_VALUES, _GPU_VALUES = 1 << 17, 1 << 26


def draw_parameters(draws: NDArray[np.float64], photometric: Photometric) -> NDArray[np.float32]:
    """Turn uniform numbers into the colour parameters of crops.

    Args:
        draws: (…, PHOTOMETRIC_DRAWS) in (0, 1).

    Returns:
        (…, PARAMETERS): the factors of torchvision's ColorJitter and the order they apply in, then the rest.
    """
    out = np.zeros((*draws.shape[:-1], PARAMETERS), np.float32)
    strengths = (photometric.brightness, photometric.contrast, photometric.saturation)
    for column, strength in enumerate(strengths):
        low = max(0.0, 1.0 - strength)
        out[..., column] = low + (1.0 + strength - low) * draws[..., column]
    out[..., HUE] = (2.0 * draws[..., HUE] - 1.0) * photometric.hue
    order = np.floor(draws[..., 4] * len(_ORDERS))
    out[..., ORDER] = np.where(draws[..., 5] < photometric.jitter_probability, order, -1.0)
    out[..., GREY] = draws[..., 6] < photometric.grey_probability
    low, high = photometric.blur_sigma
    sigma = low + (high - low) * draws[..., 8]
    out[..., SIGMA] = np.where(draws[..., 7] < photometric.blur_probability, sigma, 0.0)
    out[..., SOLARIZE] = draws[..., 9] < photometric.solarize_probability
    return out


def augment(
    crops: Tensor,
    parameters: Tensor,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Jitter (brightness, contrast, saturation, hue in each crop's order), grey, blur, solarise, normalise.

    Every operation is torchvision's on float images in [0, 1], without its detour through 8 bits; the blur's
    kernel spans four sigmas to either side, but at most a tenth of the crop.

    Args:
        crops: (n, 3, S, S) uint8, best in channels_last.
        parameters: (n, PARAMETERS) of `draw_parameters`, on the CPU: what to do is decided there, without
            waiting for a GPU.
        mean, std: of the channels, where 1 is white.
        dtype: of the result; the arithmetic is in float64 for float64, else in float32.

    Returns:
        (n, 3, S, S) in channels_last, on the crops' device.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def jitter(values: Tensor, kind: int, parameters: Tensor) -> Tensor:
        order, grey = divmod(kind, 2)
        values = values.to(compute).mul_(1 / 255).permute(0, 3, 1, 2).contiguous()
        for operation in _ORDERS[order] if order >= 0 else ():
            _JITTER[operation](values, parameters[:, operation].to(compute).view(-1, 1, 1, 1))
        return values.copy_(_luma(values)) if grey else values

    def blur(values: Tensor, radius: int, parameters: Tensor) -> Tensor:
        return _blur(values, parameters[:, SIGMA], radius) if radius else values

    def solarize(values: Tensor, solarized: int, _: Tensor) -> Tensor:
        return torch.where(values < _SOLARIZE_THRESHOLD, values, 1 - values) if solarized else values

    widest = max(1, round(crops.shape[-1] / 20))
    radius = torch.ceil(parameters[:, SIGMA] * _BLUR_SIGMAS).clamp(max=widest)
    pixels = crops.permute(0, 2, 3, 1).contiguous()
    there = to_device(parameters, crops.device)
    x = _each(pixels, there, 2 * parameters[:, ORDER] + parameters[:, GREY], jitter)
    if radius.any():
        x = _each(x, there, radius, blur)
    if parameters[:, SOLARIZE].any():
        x = _each(x, there, parameters[:, SOLARIZE], solarize)
    return _normalise(x, mean, std, dtype)


def _each(
    x: Tensor, parameters: Tensor, kinds: Tensor, work: Callable[[Tensor, int, Tensor], Tensor]
) -> Tensor:
    """`work` on the rows of each kind with their parameters, a piece at a time; rows keep their places.

    Rows are moved whole, by selection: writing them back by index would take a CPU longer than the work.

    Args:
        parameters: on the device of `x`; `kinds` are on the CPU.
    """
    most = max(1, (_CPU_VALUES if x.device.type == "cpu" else _GPU_VALUES) // x[0].numel())
    order = torch.argsort(kinds, stable=True)
    there, back = to_device(torch.stack([order, torch.argsort(order)]), x.device)
    done, first = [], 0
    for kind, count in zip(*(each.tolist() for each in torch.unique(kinds, return_counts=True)), strict=True):
        for rows in torch.split(there[first : first + count], most):
            done += [work(x.index_select(0, rows), int(kind), parameters.index_select(0, rows))]
        first += count
    return torch.cat(done).index_select(0, back)


def _luma(x: Tensor) -> Tensor:
    """(n, 3, S, S) → (n, 1, S, S)."""
    grey = x[:, 0:1] * _LUMA[0]
    return grey.add_(x[:, 1:2], alpha=_LUMA[1]).add_(x[:, 2:3], alpha=_LUMA[2])


def _brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor).clamp_(max=1)


def _contrast(x: Tensor, factor: Tensor) -> None:
    """Away from the crop's mean luma."""
    mean = _luma(x.mean((2, 3), keepdim=True))
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> None:
    """Away from each pixel's luma."""
    grey = _luma(x).mul_(1 - factor)
    x.mul_(factor).add_(grey).clamp_(0, 1)


def _hue(x: Tensor, turns: Tensor) -> None:
    """Turn the hue of HSV. Without branches or comparisons, which cost a CPU ten times the arithmetic.

    On the hexagon of the colours (r, g, b) with the smallest taken as 0 and the largest as 1, the hue in
    sextants is ±(1 + g + b − r), positive where g ≥ b.
    """
    red, green, blue = x.unbind(1)
    low = torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    chroma = torch.maximum(red, green)
    torch.maximum(chroma, blue, out=chroma).sub_(low)
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp_min(1e-12)).add_(1)
    hue = torch.copysign(hue, green - blue).add_(6 * turns.squeeze(1))
    hue.sub_(torch.round(hue / 6), alpha=6)
    # Now in −3 … 3 around red. Away from red, red falls from 1 (sextant 1) to 0 (sextant 2); of green and
    # blue, the one on this side rises to 1 first, and the other between sextants 2 and 3.
    away = hue.abs()
    near, far = away.clamp_max(1), (away - 2).clamp_min_(0)
    torch.addcmul(low, chroma, away.neg_().add_(2).clamp_(0, 1), out=red)
    both = torch.addcmul(low, chroma, near + far, value=0.5)
    difference = torch.copysign(near.sub_(far), hue).mul_(chroma)
    torch.add(both, difference, alpha=0.5, out=green)
    torch.sub(both, difference, alpha=0.5, out=blue)


_JITTER: dict[int, Callable[[Tensor, Tensor], None]] = {
    BRIGHTNESS: _brightness,
    CONTRAST: _contrast,
    SATURATION: _saturation,
    HUE: _hue,
}


def _blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Separable Gaussian blur, one sigma per crop, borders reflected."""
    n, _, height, width = x.shape
    distance = torch.arange(-radius, radius + 1, dtype=torch.float64, device=x.device)
    kernel = torch.exp(-0.5 * (distance / sigma.double().view(-1, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(x).view(n, -1, 1, 1, 1)
    # Tap by tap: on a CPU twice as fast as a depthwise convolution with one kernel per crop.
    padded = functional.pad(x, (radius,) * 4, mode="reflect")
    down = padded[:, :, :height] * kernel[:, 0]
    for tap in range(1, 2 * radius + 1):
        down.addcmul_(padded[:, :, tap : tap + height], kernel[:, tap])
    across = down[..., :width] * kernel[:, 0]
    for tap in range(1, 2 * radius + 1):
        across.addcmul_(down[..., tap : tap + width], kernel[:, tap])
    return across


def _normalise(
    x: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float], dtype: torch.dtype
) -> Tensor:
    shape = (1, 3, 1, 1)
    x.sub_(constant(mean, x.device, x.dtype).view(shape))
    x.div_(constant(std, x.device, x.dtype).view(shape))
    return x.to(dtype, memory_format=torch.channels_last)
