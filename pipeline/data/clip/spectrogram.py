"""Waveforms as spectrograms of power in decibels, on any device: one implementation, always in float32.

As the published recipe has it: Hann windows that are centred on the hops, the sound mirrored at its ends;
|X|²; the lowest frequency kept, and the others averaged in groups; 10 log10, and no less than the clip's
loudest less `top_db`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.recipe.data import Audio

_LEAST_POWER = 1e-10
# Slaney's scale: even up to 1 kHz, and a constant ratio above.
_HZ_PER_MEL = 200 / 3
_EVEN_UP_TO_HZ = 1000.0
_RATIO_PER_MEL = math.log(6.4) / 27


def spectrogram(waveforms: Tensor, audio: Audio) -> Tensor:
    """Decibels of power.

    Args:
        waveforms: (n, samples), full scale at 1.

    Returns:
        float32 (n, 1, audio.frames, audio.bins), on the waveforms' device.
    """
    window = torch.hann_window(audio.window, device=waveforms.device)
    waves = torch.stft(
        waveforms.float(),
        audio.window,
        audio.hop,
        window=window,
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    power = torch.view_as_real(waves[:, :, : audio.frames]).square().sum(-1).transpose(1, 2)
    if audio.kind == "mel":
        power = power @ mel_weights(audio, power.device)
    else:
        others = power[..., 1:].reshape(*power.shape[:2], audio.bins - 1, -1).mean(-1)
        power = torch.cat([power[..., :1], others], -1)
    decibels = power.clamp_min(_LEAST_POWER).log10().mul(10)
    loudest = decibels.amax((1, 2), keepdim=True)
    return torch.maximum(decibels, loudest - audio.top_db).unsqueeze(1)


@lru_cache(maxsize=4)  # a copy to a GPU would wait for it at every step
@torch.inference_mode(False)  # who asks first may infer only, and the next may train
def mel_weights(audio: Audio, device: torch.device) -> Tensor:
    """Triangles on Slaney's scale, each of area 1, (window // 2 + 1, bins) float32."""
    highest = audio.rate / 2
    edges = _hertz(
        torch.linspace(0, float(_mel(torch.tensor(highest, dtype=torch.float64))), audio.bins + 2).double()
    )
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    frequencies = torch.linspace(0, highest, audio.window // 2 + 1, dtype=torch.float64).unsqueeze(1)
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return (torch.minimum(rising, falling).clamp_min(0) * 2 / (high - low)).float().to(device)


def _mel(hertz: Tensor) -> Tensor:
    even = hertz / _HZ_PER_MEL
    above = _EVEN_UP_TO_HZ / _HZ_PER_MEL + torch.log(hertz.clamp_min(1e-9) / _EVEN_UP_TO_HZ) / _RATIO_PER_MEL
    return torch.where(hertz < _EVEN_UP_TO_HZ, even, above)


def _hertz(mel: Tensor) -> Tensor:
    even_up_to = _EVEN_UP_TO_HZ / _HZ_PER_MEL
    above = _EVEN_UP_TO_HZ * torch.exp((mel - even_up_to) * _RATIO_PER_MEL)
    return torch.where(mel < even_up_to, mel * _HZ_PER_MEL, above)
