"""Colour augmentation of many crops at once, from drawn parameters: one implementation for CPU and GPU."""

import itertools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.recipe import Photometric

# Columns of the parameters. ORDER is a row of _ORDERS, or −1 for no jitter; SIGMA 0 is no blur.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, SOLARIZE = range(8)
PARAMETERS = 8
# The draws of one crop that are colour.
PHOTOMETRIC_DRAWS = 10

_ORDERS = torch.tensor(list(itertools.permutations(range(4))))
# ITU-R BT.601 luma, as PIL's "L" mode.
_LUMA = (0.299, 0.587, 0.114)
_RGB_TO_YIQ = torch.tensor(
    [[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]],
    dtype=torch.float64,
)
_SOLARIZE_THRESHOLD = 0.5


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
    """Jitter, grey, blur, solarise, normalise.

    Args:
        crops: (n, 3, S, S) uint8.
        parameters: (n, PARAMETERS) from `draw_parameters`, on the CPU: what is to be done is decided there.
        mean, std: of the channels, in units of 1.
        dtype: of the result; the arithmetic is at least float32.

    Returns:
        (n, 3, S, S) in channels_last, on the crops' device.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = crops.to(compute, memory_format=torch.contiguous_format).mul_(1 / 255)
    jittered = torch.nonzero(parameters[:, ORDER] >= 0).squeeze(1)
    if len(jittered):
        rows = jittered.to(x.device)
        x[rows] = _jitter(x[rows], parameters[jittered])
    grey = torch.nonzero(parameters[:, GREY] > 0).squeeze(1).to(x.device)
    if len(grey):
        x[grey] = _luma(x[grey]).expand(-1, 3, -1, -1)
    blurred = torch.nonzero(parameters[:, SIGMA] > 0).squeeze(1)
    if len(blurred):
        rows = blurred.to(x.device)
        x[rows] = _blur(x[rows], parameters[blurred, SIGMA])
    solarized = torch.nonzero(parameters[:, SOLARIZE] > 0).squeeze(1).to(x.device)
    if len(solarized):
        values = x[solarized]
        x[solarized] = torch.where(values < _SOLARIZE_THRESHOLD, values, 1 - values)
    shape = (1, 3, 1, 1)
    x.sub_(torch.tensor(mean, dtype=compute, device=x.device).view(shape))
    x.div_(torch.tensor(std, dtype=compute, device=x.device).view(shape))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _luma(x: Tensor) -> Tensor:
    red, green, blue = x.unbind(1)
    return (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]).unsqueeze(1)


def _jitter(x: Tensor, parameters: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in each crop's own order."""
    order = _ORDERS[parameters[:, ORDER].long()]
    factors = parameters.to(x.dtype)
    for place in range(4):
        for operation in (BRIGHTNESS, CONTRAST, SATURATION, HUE):
            chosen = torch.nonzero(order[:, place] == operation).squeeze(1)
            if len(chosen):
                rows = chosen.to(x.device)
                factor = factors[chosen, operation].to(x.device).view(-1, 1, 1, 1)
                x[rows] = _adjust(x[rows], operation, factor).clamp_(0, 1)
    return x


def _adjust(x: Tensor, operation: int, factor: Tensor) -> Tensor:
    if operation == BRIGHTNESS:
        return x * factor
    if operation == CONTRAST:
        return torch.lerp(_luma(x).mean((1, 2, 3), keepdim=True), x, factor)
    if operation == SATURATION:
        return torch.lerp(_luma(x), x, factor)
    return torch.einsum("nij,njhw->nihw", _hue_rotation(factor.view(-1)), x)


def _hue_rotation(turns: Tensor) -> Tensor:
    """(n, 3, 3): a turn of the chroma plane of YIQ, which keeps the luma."""
    cos, sin = torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], -1).view(-1, 3, 3)
    basis = _RGB_TO_YIQ.to(turn)
    return torch.linalg.inv(basis) @ turn @ basis


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian blur, one sigma per crop, borders reflected; the kernel spans a tenth of the crop."""
    n, channels, height, width = x.shape
    radius = max(1, round(height / 20))
    distance = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (distance / sigma.double().view(-1, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(x).repeat_interleave(channels, 0)
    size = 2 * radius + 1
    x = functional.pad(x.reshape(1, n * channels, height, width), (radius,) * 4, mode="reflect")
    x = functional.conv2d(x, kernel.view(-1, 1, 1, size), groups=n * channels)
    x = functional.conv2d(x, kernel.view(-1, 1, size, 1), groups=n * channels)
    return x.view(n, channels, height, width)
