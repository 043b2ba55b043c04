"""Videos as a modality: a clip and its sound, cut in a worker, coloured and transformed on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.data.batch import Inputs
from pipeline.data.clip.media import Media, opened
from pipeline.data.clip.pictures import pictures
from pipeline.data.clip.sound import waveform
from pipeline.data.clip.spectrogram import spectrogram
from pipeline.data.clip.statistics import BinStatistics
from pipeline.data.clip.windows import Span, clip_begin, frame_times, sound_begin
from pipeline.data.image.augment import PHOTOMETRIC_DRAWS, augment, draw_parameters
from pipeline.data.image.crops import FLIP, GEOMETRY_DRAWS, crop_box
from pipeline.data.targets import one_each
from pipeline.data.to_device import to_device
from pipeline.recipe.data import Audio, Clip, Data

CLIP, AUDIO = "clip", "audio"
# The draws of a clip: its colour, its box and flip, its begin; and of a sound: its begin, and its loudness.
_CLIP_BEGIN = PHOTOMETRIC_DRAWS + GEOMETRY_DRAWS
_SOUND_BEGIN, _VOLUME = range(2)


class ClipViews:
    """See `pipeline.data.modality.Modality`: "clip" is of `data.clip`, and "audio" of `data.audio`.

    Attributes:
        statistics: of the sound's bins, which it is normalised by; without them it is in decibels.
    """

    draws = _CLIP_BEGIN + 1

    def __init__(self, data: Data) -> None:
        self.clip, self.audio = data.clip, data.audio
        self.counts = {
            name: 1 for name, section in ((CLIP, self.clip), (AUDIO, self.audio)) if section is not None
        }
        self.statistics: BinStatistics | None = None
        self._mean, self._std = data.mean, data.std

    def empty(self, rows: int) -> dict[str, NDArray[Any]]:
        room: dict[str, NDArray[Any]] = {}
        if self.clip is not None:
            side = self.clip.size
            room[CLIP] = np.empty((1, rows, self.clip.frames, side, side, 3), np.uint8)
        if self.audio is not None:
            room[AUDIO] = np.empty((1, rows, self.audio.samples), np.float32)
        return room

    def cut(self, data: bytes, draws: NDArray[np.float64], out: Mapping[str, NDArray[Any]]) -> None:
        with opened(data, video=self.clip is not None, audio=self.audio is not None) as media:
            heard = None
            if self.audio is not None:
                drawn = draws[-1].tolist()
                heard = _cut_sound(media, self.audio, drawn, out[AUDIO][0])
            if self.clip is not None:
                _cut_clip(media, self.clip, draws[0].tolist(), out[CLIP][0], heard)

    def parameters(self, draws: NDArray[np.float64]) -> dict[str, Tensor]:
        found = {}
        if self.clip is not None:
            found[CLIP] = torch.from_numpy(
                draw_parameters(draws[:, 0, :PHOTOMETRIC_DRAWS], self.clip.photometric)
            )
        if self.audio is not None:
            factor = 1 + self.audio.volume * (2 * draws[:, -1, _VOLUME : _VOLUME + 1] - 1)
            found[AUDIO] = torch.from_numpy(factor.astype(np.float32))
        return found

    def finish(
        self, views: Mapping[str, Tensor], parameters: Mapping[str, Tensor], *, dtype: torch.dtype
    ) -> Inputs:
        found = {}
        if self.clip is not None:
            found[CLIP] = self._coloured(views[CLIP], parameters[CLIP], dtype)
        if self.audio is not None:
            waveforms = views[AUDIO]
            loud = to_device(parameters[AUDIO], waveforms.device)
            decibels = spectrogram(waveforms * loud, self.audio)
            if self.statistics is not None:
                decibels = self.statistics.normalise(decibels)
            found[AUDIO] = decibels.to(dtype)
        return Inputs(views=found)

    def placeholders(self, rows: int, *, dtype: torch.dtype) -> Inputs:
        found = {}
        if self.clip is not None:
            side = self.clip.size
            found[CLIP] = torch.rand(rows, 3, self.clip.frames, side, side, dtype=dtype)
        if self.audio is not None:
            found[AUDIO] = torch.rand(rows, 1, self.audio.frames, self.audio.bins, dtype=dtype)
        return Inputs(
            views=found, targets=one_each(torch.zeros(rows, dtype=torch.int64)), positions=torch.arange(rows)
        )

    def _coloured(self, clips: Tensor, parameters: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 (b, T, S, S, 3) → (b, 3, T, S, S) in channels_last_3d."""
        frames = clips.shape[1]
        finished = augment(
            clips.flatten(0, 1).permute(0, 3, 1, 2),
            parameters.repeat_interleave(frames, 0),
            mean=self._mean,
            std=self._std,
            dtype=dtype,
        )
        return finished.permute(0, 2, 3, 1).reshape(*clips.shape).permute(0, 4, 1, 2, 3)


def _cut_sound(media: Media, audio: Audio, draws: list[float], out: NDArray[np.float32]) -> Span:
    """Write a waveform; answers where it lies."""
    assert media.audio is not None
    begin = sound_begin(media.span, audio.seconds, draws[_SOUND_BEGIN])
    out[...] = waveform(media.audio, media.span, begin, samples=audio.samples, rate=audio.rate)
    return Span(begin, begin + audio.seconds)


def _cut_clip(
    media: Media, clip: Clip, draws: list[float], out: NDArray[np.uint8], heard: Span | None
) -> None:
    """Write the pictures of a clip."""
    assert media.video is not None
    seconds = clip.frames / clip.fps
    begin = clip_begin(media.span, seconds, draws[_CLIP_BEGIN], sound=heard, offset=clip.offset_seconds)
    times = frame_times(media.span, begin, frames=clip.frames, fps=clip.fps)
    geometry, box = draws[PHOTOMETRIC_DRAWS:], None
    for image, target in zip(pictures(media.video, times), out, strict=True):
        if box is None:
            left, top, width, height = crop_box(image.width, image.height, geometry, clip)
            box = (left, top, left + width, top + height)
        crop = image.resize((clip.size, clip.size), Image.Resampling.BILINEAR, box=box)
        target[...] = np.frombuffer(crop.tobytes(), np.uint8).reshape(target.shape)
    if geometry[FLIP] < clip.flip_probability:
        pixels = torch.from_numpy(out)
        pixels.copy_(torch.flip(pixels, (2,)))
