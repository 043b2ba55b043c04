"""The statistics of a run's sound: measured once, the same for every rank."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import make_values

from cluster.rank.torch_dist import World
from pipeline.data.clip.statistics import BinStatistics, bin_statistics
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train import sound
from pipeline.train.sound import AUDIO_STATISTICS, measure_sound, read_statistics, sound_of_run
from tests.clips import clip_bytes
from tests.pipeline.data.clip.clip_datasets import SMALL, seal_clips

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), group=None, control=None)


def recipe_of(root: Path, **changes: Any) -> PretrainRecipe:
    values = make_values(root, **changes)
    del values["data"]["crops"]
    values |= {"data": values["data"] | SMALL | {"batch_size": 6}, "trunk": {"name": "r2plus1d_10"}}
    return PretrainRecipe.model_validate(values)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = [clip_bytes(n, seconds=0.5, size=(16, 16), rate=8000) for n in range(13)]
    return seal_clips(tmp_path_factory.mktemp("sound") / "data", [files])


def test_statistics_are_those_of_all_frames() -> None:
    parts = [torch.randn(3, 1, 5, 4) * 7 - 60, torch.randn(2, 1, 5, 4)]
    found = bin_statistics(parts)
    frames = torch.cat([part.flatten(0, 2) for part in parts]).numpy().astype(np.float64)
    np.testing.assert_allclose(found.mean, frames.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std, frames.std(0), rtol=1e-9)
    shown = torch.cat([found.normalise(part).flatten(0, 2) for part in parts])
    assert shown.mean(0).abs().max() < 1e-5
    assert (shown.std(0, correction=0) - 1).abs().max() < 1e-5


def test_a_silent_bin_is_no_division_by_zero() -> None:
    found = bin_statistics([torch.full((1, 1, 2, 3), -100.0)])
    assert torch.equal(found.normalise(torch.full((1, 3), -100.0)), torch.zeros(1, 3))


def test_they_are_measured_once_and_do_not_depend_on_the_seed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sound_of_run(recipe_of(root), tmp_path, ALONE)
    assert len(first.mean) == len(first.std) == 33
    assert measure_sound(recipe_of(root, seed=9)) == first == read_statistics(tmp_path)
    monkeypatch.setattr(sound, "measure_sound", None)
    before = hashlib.sha256((tmp_path / AUDIO_STATISTICS).read_bytes()).digest()
    assert sound_of_run(recipe_of(root), tmp_path, ALONE) == first
    assert hashlib.sha256((tmp_path / AUDIO_STATISTICS).read_bytes()).digest() == before
    assert BinStatistics(**asdict(first)) == first
