"""Videos as evaluations see them: windows that are evenly spaced, the centre of each picture, no draw."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from cluster.typed_yaml import Section
from ingest.dataset.open import Dataset
from ingest.video.container import library_versions
from pipeline.data.clip.media import Media, opened
from pipeline.data.clip.pictures import pictures
from pipeline.data.clip.sound import waveform
from pipeline.data.clip.spectrogram import spectrogram
from pipeline.data.clip.statistics import BinStatistics
from pipeline.data.clip.windows import evenly_spaced_begins, frame_times
from pipeline.data.evaluation import Preprocessing, fit_image
from pipeline.data.listed import shown_batches
from pipeline.data.node_cache import CachePlace
from pipeline.data.to_device import constant
from pipeline.recipe.data import Audio, Clip, Data

_MOST_PIXELS = 1 << 28  # of a clip; what an exported trunk asks for may come from anybody


class ClipPreprocessing(Section):
    """How a clip becomes a trunk's input: `frames` pictures, `fps` a second, each as `pictures` has it."""

    frames: Annotated[int, Field(gt=0, le=1024)]
    fps: PositiveFloat
    pictures: Preprocessing

    @property
    def seconds(self) -> float:
        """Of a clip."""
        return self.frames / self.fps

    @model_validator(mode="after")
    def _a_clip_fits_into_memory(self) -> Self:
        if self.frames * self.pictures.image_size**2 > _MOST_PIXELS:
            raise ValueError(
                f"a clip has {self.frames} pictures of {self.pictures.image_size} pixels: too many"
            )
        return self

    @classmethod
    def of(cls, clip: Clip, data: Data) -> ClipPreprocessing:
        """As a recipe trains: of its sizes."""
        return cls(
            frames=clip.frames,
            fps=clip.fps,
            pictures=Preprocessing(
                image_size=clip.size,
                resize=round(clip.size * 8 / 7) if clip.size >= 96 else clip.size,
                interpolation="bilinear",
                mean=data.mean,
                std=data.std,
            ),
        )


class AudioPreprocessing(Section):
    """How sound becomes a trunk's input: decibels as `audio` has it, and the statistics of each bin."""

    audio: Audio
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(ge=0)], ...]

    @model_validator(mode="after")
    def _every_bin_has_statistics(self) -> Self:
        if not len(self.mean) == len(self.std) == self.audio.bins:
            raise ValueError("mean and std have a number for each bin")
        return self

    @classmethod
    def of(cls, audio: Audio, statistics: BinStatistics) -> AudioPreprocessing:
        """As a recipe trains."""
        return cls(audio=audio, mean=statistics.mean, std=statistics.std)


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """Windows of n videos.

    Attributes:
        clips: uint8 (n, windows, T, S, S, 3); None if they were not asked for.
        waveforms: float32 (n, windows, samples); None if they were not asked for.
        keys: int64 (n,).
    """

    clips: Tensor | None
    waveforms: Tensor | None
    keys: Tensor


def clip_batches(
    dataset: Dataset,
    positions: NDArray[np.int64],
    *,
    clip: ClipPreprocessing | None = None,
    audio: AudioPreprocessing | None = None,
    windows: int,
    workers: int,
    pin_memory: bool = False,
    batch_size: int = 32,
    cache: CachePlace | None = None,
) -> Generator[ClipBatch]:
    """Windows of the videos at the given positions of the dataset's global axis, in that order.

    Args:
        clip, audio: what is shown; where both are, a clip is in the middle of its sound.
        windows: of each video, from its beginning to its end; one is in the middle.
        cache: where the node's readers share what they know of the dataset, and what is read ahead.

    Raises:
        UserError: a sample cannot be shown, for unlike training, an evaluation takes no substitutes; or PyAV
            is not installed.
    """
    library_versions()  # or it says what to install
    each = 0 if clip is None else 3 * clip.frames * clip.pictures.image_size**2
    each += 0 if audio is None else 4 * audio.audio.samples
    shown = shown_batches(
        dataset,
        positions,
        partial(_show, clip, audio, windows),
        sample_bytes=each * windows,
        workers=workers,
        pin_memory=pin_memory,
        batch_size=batch_size,
        cache=cache,
    )
    with contextlib.closing(shown):
        for batch in shown:
            yield ClipBatch(
                clips=batch.views.get("clip"), waveforms=batch.views.get("audio"), keys=batch.keys
            )


def middle_clip(data: bytes, clip: ClipPreprocessing) -> Tensor:
    """The middle of a video, (3, T, S, S) float32, normalised.

    Raises:
        BadSampleError: if there is no clip in these bytes.
    """
    shown = torch.from_numpy(_show(clip, None, 1, data)["clip"])
    return clip_inputs(shown[None], clip, torch.device("cpu"))[0]


def middle_sound(data: bytes, audio: AudioPreprocessing) -> Tensor:
    """The middle of a video's sound, (1, frames, bins) float32, normalised.

    Raises:
        BadSampleError: if there is no sound in these bytes.
    """
    heard = torch.from_numpy(_show(None, audio, 1, data)["audio"])
    return audio_inputs(heard[None], audio, torch.device("cpu"))[0]


def clip_inputs(clips: Tensor, clip: ClipPreprocessing, device: torch.device) -> Tensor:
    """(n, windows, T, S, S, 3) → float32 (n·windows, 3, T, S, S) in channels_last_3d, normalised."""
    moved = clips.to(device, non_blocking=True).flatten(0, 1).permute(0, 4, 1, 2, 3).float()
    mean, std = (
        constant(values, device).view(1, 3, 1, 1, 1) * 255
        for values in (clip.pictures.mean, clip.pictures.std)
    )
    return (moved - mean) / std


def audio_inputs(waveforms: Tensor, audio: AudioPreprocessing, device: torch.device) -> Tensor:
    """(n, windows, samples) → float32 (n·windows, 1, frames, bins), normalised."""
    decibels = spectrogram(waveforms.to(device, non_blocking=True).flatten(0, 1), audio.audio)
    return BinStatistics(mean=audio.mean, std=audio.std).normalise(decibels)


def _show(
    clip: ClipPreprocessing | None, audio: AudioPreprocessing | None, windows: int, data: bytes
) -> dict[str, NDArray[Any]]:
    """Windows of one video: "clip" (windows, T, S, S, 3) and "audio" (windows, samples)."""
    shown: dict[str, NDArray[Any]] = {}
    with opened(data, video=clip is not None, audio=audio is not None) as media:
        begins, seconds = None, 0.0
        if audio is not None:
            seconds = audio.audio.seconds
            begins = evenly_spaced_begins(media.span, seconds, windows)
            shown["audio"] = np.stack([_heard(media, audio.audio, begin) for begin in begins])
        if clip is not None:
            if begins is None:
                begins = evenly_spaced_begins(media.span, clip.seconds, windows)
            else:
                middles = begins + (seconds - clip.seconds) / 2
                begins = np.array([media.span.clamp(begin, clip.seconds) for begin in middles])
            shown["clip"] = np.stack([_seen(media, clip, begin) for begin in begins])
    return shown


def _heard(media: Media, audio: Audio, begin: float) -> NDArray[np.float32]:
    assert media.audio is not None
    return waveform(media.audio, media.span, begin, samples=audio.samples, rate=audio.rate)


def _seen(media: Media, clip: ClipPreprocessing, begin: float) -> NDArray[np.uint8]:
    assert media.video is not None
    times = frame_times(media.span, begin, frames=clip.frames, fps=clip.fps)
    return np.stack([np.asarray(fit_image(image, clip.pictures)) for image in pictures(media.video, times)])
