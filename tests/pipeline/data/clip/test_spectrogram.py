"""Spectrograms against a reference that is written from the definition, in NumPy and float64."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.data.clip.spectrogram import mel_weights, spectrogram
from pipeline.recipe.data import Audio


def power(wave: NDArray[np.float64], audio: Audio) -> NDArray[np.float64]:
    """|X|² of each frame, (frames, window // 2 + 1); the ends are mirrored."""
    half = audio.window // 2
    padded = np.pad(wave, half, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(audio.window) / audio.window)
    frames = [padded[n * audio.hop : n * audio.hop + audio.window] * window for n in range(audio.frames)]
    frequencies = np.exp(-2j * np.pi * np.outer(np.arange(audio.window), np.arange(half + 1)) / audio.window)
    return np.abs(np.array(frames) @ frequencies) ** 2


def decibels(power: NDArray[np.float64], top_db: float) -> NDArray[np.float64]:
    logs = 10 * np.log10(np.maximum(power, 1e-10))
    return np.maximum(logs, logs.max() - top_db)


def some_sound(audio: Audio, seed: int = 0) -> NDArray[np.float64]:
    time = np.arange(audio.samples) / audio.rate
    noise = np.random.default_rng(seed).normal(0, 0.01, audio.samples)
    return 0.3 * np.sin(2 * np.pi * (200 + 900 * time) * time) + noise


@pytest.mark.parametrize(
    ("window", "bins", "top_db"), [(1024, 257, 100.0), (512, 129, 100.0), (256, 129, 30.0), (128, 33, 100.0)]
)
def test_T5_linear_bins_are_averages_of_power(window: int, bins: int, top_db: float) -> None:
    audio = Audio(seconds=0.25, window=window, bins=bins, top_db=top_db)
    waves = np.stack([some_sound(audio), 0.01 * some_sound(audio, 1)])
    found = spectrogram(torch.from_numpy(waves), audio)
    assert found.shape == (2, 1, 25, bins)
    assert found.dtype == torch.float32
    for wave, ours in zip(waves, found[:, 0].numpy(), strict=True):
        whole = power(wave, audio)
        size = (window // 2) // (bins - 1)
        groups = [whole[:, 1 + size * k : 1 + size * (k + 1)].mean(1) for k in range(bins - 1)]
        expected = decibels(np.stack([whole[:, 0], *groups], 1), top_db)
        np.testing.assert_allclose(ours, expected, atol=2e-2)
        assert ours.min() >= ours.max() - top_db - 1e-4


def slaney_mel(hertz: float) -> float:
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)


def test_T5_mel_bins_are_triangles_of_area_one() -> None:
    audio = Audio(kind="mel", bins=40, seconds=0.25)
    edges = np.linspace(0, slaney_mel(12_000), 42)
    hertz = [mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27) for mel in edges]
    weights = np.zeros((513, 40))
    for b, (low, middle, high) in enumerate(zip(hertz, hertz[1:], hertz[2:], strict=False)):
        for f in range(513):
            x = f * 12_000 / 512
            if low < x < high:
                side = (x - low) / (middle - low) if x <= middle else (high - x) / (high - middle)
                weights[f, b] = side * 2 / (high - low)
    np.testing.assert_allclose(mel_weights(audio, torch.device("cpu")).numpy(), weights, atol=1e-8)
    wave = some_sound(audio)
    found = spectrogram(torch.from_numpy(wave)[None], audio)[0, 0].numpy()
    np.testing.assert_allclose(found, decibels(power(wave, audio) @ weights, 100.0), atol=2e-2)


def test_silence_is_the_least_power() -> None:
    audio = Audio(seconds=0.25)
    assert torch.equal(spectrogram(torch.zeros(1, audio.samples), audio), torch.full((1, 1, 25, 257), -100.0))


def test_a_rows_spectrogram_does_not_depend_on_the_others() -> None:
    audio = Audio(seconds=0.25, window=128, bins=33)
    waves = torch.from_numpy(np.stack([some_sound(audio, seed) for seed in range(5)])).float()
    together = spectrogram(waves, audio)
    assert torch.equal(together[3:4], spectrogram(waves[3:4], audio))
