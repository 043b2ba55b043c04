"""L1 from an object store, of images that have tags."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from captioned import captioned

from ingest.dataset.open import open_dataset
from pipeline.data.batch import Batch
from pipeline.data.loader import Loader
from pipeline.data.node_cache import CachePlace
from pipeline.hashtags.make_tags import make_tags
from pipeline.recipe.data import Data
from pipeline.recipe.stages import HashtagsRecipe


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_L1_tagged_images_of_an_object_store_come_with_their_tags_as_from_a_folder(
    as_objects: Callable[..., str], tmp_path: Path, workers: int
) -> None:
    folder = captioned(tmp_path / "captioned", images=40, silent=9)
    tags = tmp_path / "tags"
    make_tags(open_dataset(folder), HashtagsRecipe(min_images=2), tags, map_tasks=map)
    url = as_objects(folder)

    def batches(root: str, cache: CachePlace | None) -> list[Batch]:
        crops = [{"count": 1, "size": 8, "scale": [0.3, 1.0]}]
        values = {"root": root, "tags": str(tags), "batch_size": 6, "window": 8, "crops": crops}
        loader = Loader(
            Data.model_validate(values),
            seed=3,
            rank=0,
            world_size=1,
            workers=workers,
            device=torch.device("cpu"),
            targets=True,
            cache=cache,
        )
        made = loader.from_step(0)
        try:
            return [batch for _, batch in islice(made, 7)]
        finally:
            made.close()  # type: ignore[attr-defined]

    theirs = batches(str(folder), None)
    for ours, other in zip(batches(url, CachePlace(folder=tmp_path, limit=64 << 20)), theirs, strict=True):
        assert ours.targets is not None
        assert other.targets is not None
        assert torch.equal(ours.keys, other.keys)
        assert torch.equal(ours.targets.codes, other.targets.codes)
        assert all(torch.equal(ours.views[name], other.views[name]) for name in other.views)
