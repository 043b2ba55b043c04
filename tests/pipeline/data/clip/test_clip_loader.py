"""L1 and L2 of clips: the loader's batches of them, and where their samples are in the dataset."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_datasets import SMALL, seal_clips, small_units

from cluster.errors import UserError
from ingest.dataset.open import open_dataset
from pipeline.data.batch import Batch
from pipeline.data.loader import Loader
from pipeline.recipe.data import Data


def make_loader(root: Path, *, rank: int = 0, world: int = 1, workers: int = 0, **changes: Any) -> Loader:
    data = Data.model_validate({"root": str(root), "batch_size": 6, "window": 8, **SMALL, **changes})
    sizes: dict[str, Any] = {"seed": 3, "rank": rank, "world_size": world, "workers": workers}
    return Loader(data, **sizes, device=torch.device("cpu"), positions=True)


def take(loader: Loader, step: int, count: int) -> list[Batch]:
    return [batch for _, batch in islice(loader.from_step(step), count)]


def assert_same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.keys, b.keys)
    assert a.positions is not None and b.positions is not None
    assert torch.equal(a.positions, b.positions)
    for ours, theirs in ((a.views, b.views), (a.parameters, b.parameters)):
        assert list(ours) == list(theirs) == ["clip", "audio"]
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def joined(parts: list[Batch]) -> Batch:
    """One batch of the ranks' parts."""

    def join(tensors: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([each[name] for each in tensors]) for name in ("clip", "audio")}

    return Batch(
        views=join([dict(part.views) for part in parts]),
        parameters=join([dict(part.parameters) for part in parts]),
        keys=torch.cat([part.keys for part in parts]),
        positions=torch.cat([part.positions for part in parts if part.positions is not None]),
    )


def keys_in_order(root: Path) -> torch.Tensor:
    dataset = open_dataset(root)
    keys = np.concatenate([dataset.unit_keys(unit) for unit in range(len(dataset.units))])
    return torch.from_numpy(keys.astype(np.int64))


def test_L1_clips_do_not_depend_on_ranks_workers_or_resume(clip_dataset: Path) -> None:
    whole = take(make_loader(clip_dataset), 0, 5)
    assert whole[0].views["clip"].shape == (6, 4, 16, 16, 3)
    assert whole[0].views["audio"].shape == (6, 4000)
    for world in (2, 3):
        ranks = [take(make_loader(clip_dataset, rank=rank, world=world), 1, 3) for rank in range(world)]
        for step, expected in enumerate(whole[1:4]):
            assert_same(joined([batches[step] for batches in ranks]), expected)
    for ours, expected in zip(take(make_loader(clip_dataset, workers=2), 2, 3), whole[2:], strict=True):
        assert_same(ours, expected)


def test_L2_an_epoch_visits_each_clip_at_most_once_and_says_which(clip_dataset: Path) -> None:
    loader, keys = make_loader(clip_dataset), keys_in_order(clip_dataset)
    steps = loader.steps_per_epoch
    batches = take(loader, 0, 2 * steps)
    for epoch in (batches[:steps], batches[steps:]):
        positions = torch.cat([batch.positions for batch in epoch if batch.positions is not None])
        assert len(positions.unique()) == len(positions) == 6 * steps
        assert torch.equal(keys[positions], torch.cat([batch.keys for batch in epoch]))


def test_a_sample_has_another_moment_in_the_next_epoch(clip_dataset: Path) -> None:
    first, second = take(make_loader(clip_dataset, batch_size=21), 0, 2)
    place = int(torch.nonzero(second.keys == first.keys[0]))
    for name in ("clip", "audio"):
        assert not torch.equal(first.views[name][0], second.views[name][place])
        assert not torch.equal(first.parameters[name][0], second.parameters[name][place])


def test_a_clip_that_is_none_is_replaced_with_key_and_position(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    units = small_units([4, 4])
    units[1][2] = b"ffconcat version 1.0\nfile /etc/hostname\n"
    root = seal_clips(tmp_path / "data", units)
    keys = keys_in_order(root)
    batches = take(make_loader(root, batch_size=4, window=4), 0, 2)
    for batch in batches:
        assert batch.positions is not None
        assert torch.equal(keys[batch.positions], batch.keys)
        assert 6 not in batch.positions.tolist()
    assert "not_a_video" in caplog.text


def test_what_a_method_is_shown(clip_dataset: Path) -> None:
    loader = make_loader(clip_dataset)
    (batch,) = take(loader, 0, 1)
    inputs = loader.augment(batch)
    assert inputs.views["clip"].shape == (6, 3, 4, 16, 16)
    assert inputs.views["clip"].is_contiguous(memory_format=torch.channels_last_3d)
    assert inputs.views["audio"].shape == (6, 1, 50, 33)
    assert batch.positions is not None and inputs.positions is not None
    assert torch.equal(inputs.positions, batch.positions)
    narrow = loader.augment(batch, dtype=torch.float64).views
    assert all(view.dtype == torch.float64 for view in narrow.values())


def test_colour_is_drawn_once_for_all_pictures_of_a_clip(clip_dataset: Path) -> None:
    """Pictures that are alike stay alike."""
    loader = make_loader(clip_dataset)
    (batch,) = take(loader, 0, 1)
    batch.views["clip"][:] = batch.views["clip"][:, :1].clone()
    shown = loader.augment(batch).views["clip"]
    assert torch.equal(shown, shown[:, :, :1].expand_as(shown))
    assert not torch.equal(shown[0], shown[1])


@pytest.mark.parametrize("only", ["clip", "audio"])
def test_one_of_both_is_enough(clip_dataset: Path, only: str) -> None:
    other = {"clip": "audio", "audio": "clip"}[only]
    (batch,) = take(make_loader(clip_dataset, **{other: None}), 0, 1)
    assert list(batch.views) == [only]


def test_images_have_no_positions_unless_asked(clip_dataset: Path) -> None:
    data = Data.model_validate({"root": str(clip_dataset), "batch_size": 6, "window": 8, **SMALL})
    loader = Loader(data, seed=0, rank=0, world_size=1, workers=0, device=torch.device("cpu"))
    (batch,) = take(loader, 0, 1)
    assert batch.positions is None
    assert loader.augment(batch).positions is None


def test_resident_images_are_refused_for_videos(clip_dataset: Path) -> None:
    data = Data.model_validate({"root": str(clip_dataset), "batch_size": 6, "window": 8, **SMALL})
    with pytest.raises(UserError, match="resident"):
        Loader(data, seed=0, rank=0, world_size=1, workers=0, device=torch.device("cpu"), resident=True)
