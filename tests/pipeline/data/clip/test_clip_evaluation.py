"""Videos as evaluations see them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from clip_datasets import seal_clips, small_units

from cluster.errors import UserError
from ingest.dataset.open import open_dataset
from pipeline.data.clip.evaluation import (
    AudioPreprocessing,
    ClipBatch,
    ClipPreprocessing,
    audio_inputs,
    clip_batches,
    clip_inputs,
)
from pipeline.data.clip.statistics import BinStatistics
from pipeline.recipe.data import Audio, Clip, Data

AUDIO = Audio(rate=8000, seconds=0.25, window=128, hop=80, bins=33)
SOUND = AudioPreprocessing.of(AUDIO, BinStatistics(mean=(-40.0,) * 33, std=(20.0,) * 33))
DATA = Data.model_validate({"root": "", "batch_size": 1, "clip": {"size": 16, "frames": 4}})
PICTURES = ClipPreprocessing.of(Clip(frames=4, fps=16, size=16), DATA)


def windows_of(root: Path, windows: int, workers: int = 0) -> list[ClipBatch]:
    dataset = open_dataset(root)
    positions = np.arange(len(dataset))
    kinds = {"clip": PICTURES, "audio": SOUND}
    return list(clip_batches(dataset, positions, **kinds, windows=windows, workers=workers, batch_size=8))


def test_windows_are_spread_over_each_video(clip_dataset: Path) -> None:
    batches = windows_of(clip_dataset, 3)
    assert [len(batch.keys) for batch in batches] == [8, 8, 5]
    clips, waveforms = batches[0].clips, batches[0].waveforms
    assert clips is not None and waveforms is not None
    assert clips.shape == (8, 3, 4, 16, 16, 3)
    assert waveforms.shape == (8, 3, 2000)
    assert clip_inputs(clips, PICTURES, torch.device("cpu")).shape == (24, 3, 4, 16, 16)
    assert audio_inputs(waveforms, SOUND, torch.device("cpu")).shape == (24, 1, 25, 33)
    assert not torch.equal(clips[:, 0], clips[:, 2])


def test_the_middle_window_does_not_depend_on_those_before_it(clip_dataset: Path) -> None:
    """The decoders start afresh for each."""
    three, one = windows_of(clip_dataset, 3), windows_of(clip_dataset, 1)
    for many, alone in zip(three, one, strict=True):
        assert many.clips is not None and alone.clips is not None
        assert torch.equal(many.clips[:, 1], alone.clips[:, 0])


def test_what_cannot_be_shown_is_named(tmp_path: Path) -> None:
    units = small_units([2])
    units[0][1] = units[0][1][:2000]
    with pytest.raises(UserError, match="cannot be evaluated"):
        windows_of(seal_clips(tmp_path / "data", units), 1)


def test_statistics_have_a_number_for_each_bin() -> None:
    with pytest.raises(ValueError, match="for each bin"):
        AudioPreprocessing(audio=AUDIO, mean=(0.0,), std=(1.0,))


def test_a_clip_is_not_larger_than_memory() -> None:
    with pytest.raises(ValueError, match="too many"):
        ClipPreprocessing(
            frames=1000, fps=16, pictures=PICTURES.pictures.model_copy(update={"image_size": 4096})
        )
