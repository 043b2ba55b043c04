"""Clips in which sound and picture belong together: a shape moves, and is heard when it strikes.

What is seen of a thing says how it sounds: its shape the timbre, its motion when it strikes, its size the
pitch. Colours, light, place, loudness and noise are drawn on either side for itself. Who predicts one side
from the other has to find shapes, motions and sizes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.recipe.stages import Motion, Shape
from pipeline.stages.clip import FPS, RATE, Clip

_RADIUS = (0.2, 0.34)  # of the picture's side
_PITCH = (240.0, 960.0)  # Hz, of the largest and of the smallest thing
# Partials of a struck thing: frequencies in multiples of its pitch, and how strong each is.
_PARTIALS: dict[Shape, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "disc": ((1,), (1,)),
    "square": ((1, 3, 5, 7), (1, 0.8, 0.6, 0.5)),
    "triangle": ((1, 2.76, 5.4, 8.93), (0.5, 0.9, 0.9, 0.7)),
}


# How often a thing strikes, in a period of its own of about half a second.
_STRIKES: dict[Motion, float] = {"bounce": 1, "shake": 3, "roll": 12}
_PERIOD = (0.4, 0.65)  # seconds


def synthesise(shape: Shape, motion: Motion, rng: np.random.Generator, *, side: int, seconds: float) -> Clip:
    """Draw one clip."""
    smallness, phase = rng.random(2)
    often = _STRIKES[motion] / rng.uniform(*_PERIOD)  # strikes a second
    beats = often * np.arange(round(FPS * seconds)) / FPS + phase
    strikes = (np.arange(1, int(often * seconds + phase) + 1) - phase) / often
    radius = _RADIUS[1] + (_RADIUS[0] - _RADIUS[1]) * smallness
    pitch = _PITCH[0] * (_PITCH[1] / _PITCH[0]) ** smallness
    return Clip(
        frames=_picture(shape, _path(motion, beats), radius, side, rng),
        sound=_sound(shape, pitch, strikes, round(RATE * seconds), rng),
    )


def _path(motion: Motion, beats: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where a thing is, (T, 3): x and y in -1 to 1, and its angle. It strikes at whole `beats`, (T,)."""
    still = np.zeros_like(beats)
    match motion:
        case "bounce":  # falls, and is thrown up by the ground
            path = [still, 1 - 8 * (beats % 1) * (1 - beats % 1), still]
        case "shake":  # from side to side, and strikes at both
            path = [np.cos(np.pi * beats), still, still]
        case "roll":  # round and round
            turn = 2 * np.pi * beats / 30
            path = [np.cos(turn), np.sin(turn), turn]
    return np.stack(path, axis=1)


def _picture(
    shape: Shape, path: NDArray[np.float64], radius: float, side: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    ground, thing = _two_colours(rng)
    slope = rng.uniform(-0.15, 0.15, (2, 3))
    place = rng.uniform(-0.06, 0.06, 2)
    grid = (np.arange(side) + 0.5) / side - 0.5
    reach = 0.5 - radius - 0.06
    x = grid[None, None, :] - (path[:, 0] * reach + place[0])[:, None, None]
    y = grid[None, :, None] - (path[:, 1] * reach + place[1])[:, None, None]
    tilt = (rng.uniform(-0.3, 0.3) + path[:, 2])[:, None, None]
    across, along = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
    cover = np.clip(0.5 - _outside(shape, across / radius, along / radius) * radius * side, 0, 1)[..., None]
    light = ground + grid[:, None, None] * slope[0] + grid[None, :, None] * slope[1]
    pixels = light + cover * (thing - light) + rng.normal(0, 0.02, (1, side, side, 1))
    drawn: NDArray[np.uint8] = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    return drawn


def _outside(shape: Shape, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """About how far a point lies outside of a shape of radius 1."""
    far: NDArray[np.float64]
    match shape:
        case "disc":
            far = np.hypot(x, y) - 1
        case "square":
            far = np.maximum(abs(x), abs(y)) - 0.89
        case "triangle":
            far = np.maximum(abs(x) * 0.87 + y * 0.5, -y) - 0.6
        case "cross":
            far = np.maximum(np.maximum(abs(x), abs(y)) - 1, np.minimum(abs(x), abs(y)) - 0.3)
    return far


def _two_colours(rng: np.random.Generator) -> NDArray[np.float64]:
    """Of the ground and of the thing, (2, 3): one of them darker by a half at least."""
    dark, step = rng.uniform(0.05, 0.3), rng.uniform(0.4, 0.6)
    tint = rng.uniform(-0.12, 0.12, (2, 3))
    levels = np.array([dark, dark + step])
    return np.clip((levels if rng.random() < 0.5 else levels[::-1])[:, None] + tint, 0, 1)


def _sound(
    shape: Shape, pitch: float, strikes: NDArray[np.float64], samples: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    note = _note(shape, pitch, rng)
    sound = np.zeros(samples + len(note))
    for strike in (strikes * RATE).astype(int):
        sound[strike : strike + len(note)] += note
    sound = sound[:samples] / max(1e-6, abs(sound).max()) * rng.uniform(0.3, 0.8)
    heard: NDArray[np.float32] = (sound + _noise(samples, rng)).clip(-1, 1).astype(np.float32)
    return heard


def _noise(samples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    return rng.normal(0, 10 ** rng.uniform(-3.3, -2.3), samples)


def _note(shape: Shape, pitch: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """What one strike sounds like, a quarter of a second."""
    time = np.arange(RATE // 4) / RATE
    if shape == "cross":  # noise around the pitch: it rattles
        spectrum = np.fft.rfft(rng.normal(0, 1, len(time)))
        octaves = np.log2(np.fft.rfftfreq(len(time), 1 / RATE)[1:] / (2 * pitch))
        note = np.fft.irfft(spectrum * np.concatenate([[0], np.exp(-((octaves / 0.6) ** 2))]), len(time))
    else:
        turns = rng.uniform(0, 2 * np.pi, 4)
        note = sum(
            strength * np.sin(2 * np.pi * pitch * multiple * time + turn)
            for multiple, strength, turn in zip(*_PARTIALS[shape], turns, strict=False)
            if pitch * multiple < RATE / 2
        )
    faded: NDArray[np.float64] = note * np.exp(-time / 0.05)
    return faded
