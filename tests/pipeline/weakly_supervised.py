"""A small training on hashtags, and a graph that tunes its checkpoints on labels."""

from pathlib import Path
from typing import Any

from captioned import captioned
from tiny_classification import recipe_of

from cluster.map.processes import processes
from ingest.dataset.open import open_dataset
from pipeline.hashtags.make_tags import make_tags
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.stages import HashtagsRecipe


def weak_recipe(folder: Path, **changes: Any) -> PretrainRecipe:
    """A pretraining on the tags of a dataset with captions, both made in the folder."""
    data, tags = captioned(folder), folder / "tags"
    tags.mkdir()
    with processes(1) as map_tasks:
        make_tags(open_dataset(data), HashtagsRecipe(min_images=2), tags, map_tasks=map_tasks)
    return recipe_of(data, {}, data__tags=str(tags), **changes)


def tuning_graph(data: str, folder: Path) -> dict[str, Any]:
    """For `submit evaluate --dag`: from a checkpoint to a classifier."""
    tuning = recipe_of(Path(data), {}, train__steps=2).model_dump(mode="json")
    return {
        "folder": str(folder),
        "stages": {
            "checkpoint": {"kind": "checkpoint", "recipe": {"path": "RUN"}},
            "data": {"kind": "dataset", "recipe": {"path": data}},
            "trunk": {"kind": "export", "inputs": {"run": "checkpoint/checkpoint"}},
            "tuned": {
                "kind": "finetune",
                "recipe": tuning,
                "inputs": {"trunk": "trunk", "data": "data/data"},
            },
        },
    }
