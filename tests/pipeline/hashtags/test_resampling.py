"""Images of rare tags are shown more often; the order of batches stays a function of the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captioned import captioned
from hypothesis import given
from hypothesis.strategies import integers, lists, sampled_from

from cluster.errors import UserError
from ingest.dataset.open import open_dataset
from ingest.dataset.view import write_view
from pipeline.data.loader import Loader
from pipeline.data.tags import Tags
from pipeline.hashtags.resample import draw_copies, how_often
from pipeline.recipe.data import Data
from pipeline.recipe.stages import HashtagsRecipe

Made = Callable[..., Tags]
CROPS = [{"count": 1, "size": 8, "scale": [0.3, 1.0]}]


@given(
    counts=lists(integers(1, 100_000), min_size=2, max_size=30),
    name=sampled_from(["square_root", "head_tail"]),
)
def test_tags_are_drawn_by_the_square_root_of_their_images(counts: list[int], name: str) -> None:
    recipe = HashtagsRecipe.model_validate({"resample": name})
    images = np.array(counts, float)
    often = how_often(counts, recipe)
    assert often.min() == 1
    drawn = often * images  # of each tag, where every image has one
    for part in (images >= 5_000, images < 5_000):
        roots = np.sqrt(images[part])
        np.testing.assert_allclose(drawn[part] / drawn[part].sum(), roots / roots.sum(), rtol=1e-9)
    head = drawn[images >= 5_000].sum() / drawn.sum()
    if name == "square_root":
        np.testing.assert_allclose(drawn / drawn.sum(), np.sqrt(images) / np.sqrt(images).sum(), rtol=1e-9)
    elif 0 < head < 1:
        assert head == pytest.approx(0.7)


def test_shares_of_a_copy_are_drawn_by_the_key() -> None:
    copies = draw_copies(np.arange(20_000), np.full(20_000, 2.3))
    assert set(copies.tolist()) == {2, 3}
    assert copies.mean() == pytest.approx(2.3, abs=0.02)
    assert (draw_copies(np.arange(20_000), np.ones(20_000)) == 1).all()
    assert draw_copies([7], np.array([2.3])) == copies[7]


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory, made: Made) -> tuple[Path, Tags, Tags]:
    """Images with 40 and 10 to a tag, tags as they are, and resampled: those of the rare one twice."""
    folder = tmp_path_factory.mktemp("rare")
    data = captioned(folder)
    whole = open_dataset(data)
    keeps = {}
    for unit, number in enumerate(whole.units.tolist()):
        slots = whole.kept_rows(unit, ["labels"])
        names = [labels[0] for labels in slots["labels"].to_pylist()]
        keeps[int(number)] = np.array(
            [name in ("cat", "truck") and (name == "cat" or slot % 4 == 0) for slot, name in enumerate(names)]
        )
    write_view(data, "two", root=whole.root, keeps=keeps)
    seen = open_dataset(data, view="two")
    plain = made(seen, folder / "plain", view="two")
    resampled = made(seen, folder / "resampled", view="two", resample="square_root")
    return data, plain, resampled


def loader(root: Path, tags: Tags, *, rank: int = 0, ranks: int = 1, **values: Any) -> Loader:
    data = {"root": str(root), "tags": str(tags.folder), "batch_size": 6, "window": 8, "crops": CROPS}
    return Loader(
        Data.model_validate(data | values),
        seed=3,
        rank=rank,
        world_size=ranks,
        workers=0,
        device=torch.device("cpu"),
        targets=True,
    )


def test_an_epoch_has_images_of_the_rare_tag_more_often(rare: tuple[Path, Tags, Tags]) -> None:
    data, plain, resampled = rare
    counts = [tag.count for tag in resampled.vocabulary.tags]
    assert not plain.resampled
    assert resampled.resampled
    batches = loader(data, resampled)
    dataset = batches.dataset
    often = Counter(
        {
            int(key): int(times)
            for unit in range(len(dataset.units))
            for key, times in zip(dataset.unit_keys(unit), resampled.unit_copies(dataset, unit), strict=True)
        }
    )
    codes = {
        int(key): int(resampled.unit_labels(dataset, unit).of(row)[0])
        for unit in range(len(dataset.units))
        for row, key in enumerate(dataset.unit_keys(unit))
    }
    assert {often[key] for key, code in codes.items() if code == 0} == {1}
    root = (counts[0] / counts[1]) ** 0.5
    assert {often[key] for key, code in codes.items() if code == 1} <= {int(root), int(root) + 1}
    total = sum(often.values())
    assert batches.training_set.samples == total > len(dataset)
    seen: Counter[int] = Counter()
    crops: list[bytes] = []
    for _, batch in islice(batches.from_step(0), batches.steps_per_epoch):
        seen.update(batch.keys.tolist())
        (view,) = batch.views.values()
        crops += [pixels.numpy().tobytes() for pixels in view]
    assert seen <= often
    assert total - sum(seen.values()) < 6 + 4
    assert len(set(crops)) == len(crops)  # copies are cut otherwise


@pytest.mark.parametrize("ranks", [2, 3])
def test_L1_resampled_batches_depend_on_no_rank_or_restart(rare: tuple[Path, Tags, Tags], ranks: int) -> None:
    data, _, resampled = rare
    whole = loader(data, resampled)
    from_third = dict(islice(loader(data, resampled).from_step(3), 5))
    parts = [loader(data, resampled, rank=rank, ranks=ranks).from_step(0) for rank in range(ranks)]
    for (step, batch), *of_ranks in islice(zip(whole.from_step(0), *parts, strict=True), 8):
        (pixels,) = batch.views.values()
        assert torch.equal(torch.cat([part.keys for _, part in of_ranks]), batch.keys)
        assert torch.equal(torch.cat([*(next(iter(part.views.values())) for _, part in of_ranks)]), pixels)
        if step in from_third:
            assert torch.equal(next(iter(from_third[step].views.values())), pixels)


def test_resampled_tags_go_with_the_images_that_they_were_counted_in(
    rare: tuple[Path, Tags, Tags], made: Made, tmp_path: Path
) -> None:
    data, plain, resampled = rare
    assert loader(data, resampled, view="two").state()["samples"] == resampled.copies.sum()
    whole = open_dataset(data)
    first = {int(unit): np.arange(int(n)) < 3 for unit, n in zip(whole.units, whole.counts, strict=True)}
    write_view(data, "first", root=whole.root, keeps=first)
    with pytest.raises(UserError, match=r"make tags with view=first, or without resample"):
        loader(data, resampled, view="first")
    seen = open_dataset(data, view="first")
    again = made(seen, tmp_path / "again", view="first", resample="square_root")
    assert len(loader(data, again, view="first").dataset) == again.vocabulary.tagged
    assert loader(data, plain, view="first", batch_size=2).training_set.copies is None
