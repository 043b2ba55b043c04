"""What a trunk is shown when it is scored: images, or windows of videos, or of their sound."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ingest.dataset.open import Dataset
from pipeline.data.clip.evaluation import (
    AudioPreprocessing,
    ClipPreprocessing,
    audio_inputs,
    clip_batches,
    clip_inputs,
)
from pipeline.data.evaluation import Preprocessing, image_batches, normalise
from pipeline.data.node_cache import CachePlace

AnyPreprocessing = Preprocessing | ClipPreprocessing | AudioPreprocessing
_VIDEOS_AT_ONCE = 32  # of ten windows: as many numbers as some hundred images


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Normalised inputs on a device, (n * windows, …), windows of one sample behind one another; and `keys`,
    int64 (n,).
    """

    inputs: Tensor
    keys: Tensor


def shown_inputs(
    dataset: Dataset,
    positions: NDArray[np.int64],
    view: AnyPreprocessing,
    *,
    windows: int = 1,
    workers: int,
    device: torch.device,
    batch_size: int = 256,
    cache: CachePlace | None = None,
) -> Generator[Shown]:
    """Inputs of the samples at the given positions of the dataset's global axis, in that order.

    Args:
        windows: of each video; an image has one.
        batch_size: images at a time; videos are fewer, see `at_once`.
        cache: where the node's readers share what they know of the dataset, and what is read ahead.

    Raises:
        UserError: a sample cannot be shown; unlike training, an evaluation takes no substitutes.
    """
    pin = device.type == "cuda"
    if isinstance(view, Preprocessing):
        images = image_batches(
            dataset,
            positions,
            preprocessing=view,
            workers=workers,
            pin_memory=pin,
            batch_size=batch_size,
            cache=cache,
        )
        with contextlib.closing(images):
            for batch in images:
                yield Shown(inputs=normalise(batch.images, view, device), keys=batch.keys)
        return
    videos = clip_batches(
        dataset,
        positions,
        clip=view if isinstance(view, ClipPreprocessing) else None,
        audio=view if isinstance(view, AudioPreprocessing) else None,
        windows=windows,
        workers=workers,
        pin_memory=pin,
        batch_size=at_once(view, batch_size),
        cache=cache,
    )
    with contextlib.closing(videos):
        for video in videos:
            if isinstance(view, ClipPreprocessing):
                assert video.clips is not None
                inputs = clip_inputs(video.clips, view, device)
            else:
                assert video.waveforms is not None
                inputs = audio_inputs(video.waveforms, view, device)
            yield Shown(inputs=inputs, keys=video.keys)


def at_once(view: AnyPreprocessing, batch_size: int) -> int:
    """How many samples a batch has where one of images has so many."""
    return batch_size if isinstance(view, Preprocessing) else min(batch_size, _VIDEOS_AT_ONCE)
