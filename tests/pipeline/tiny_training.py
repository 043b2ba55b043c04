"""A training small enough to be run many times, for the tests of the loop and of the command."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.distributed import ProcessGroup

from ingest.crawl.crawl import crawl_shards
from ingest.plan.settings import CrawlSettings
from pipeline.data.batch import Inputs
from pipeline.methods.build import Method, assemble_method
from pipeline.parallel.initialize import initialize
from pipeline.recipe.pretrain import PretrainRecipe

# Two blocks: the depth changes nothing that is tested.
SHALLOW = {
    "name": "regnet_y",
    "regnet": {"depth": 2, "w_0": 16, "w_a": 12.0, "w_m": 2.0, "group_width": 8},
    "stem": "low_resolution",
}


def make_dataset(folder: Path, *, images: int = 96, classes: int = 4, seed: int = 0) -> Path:
    """A sealed dataset of 32-px images with `classes` labels, in three shards."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 255, (classes, 4, 4, 3))
    for number in range(images):
        label = number % classes
        pixels = np.clip(colours[label] + rng.integers(-40, 40, (4, 4, 3)), 0, 255).astype(np.uint8)
        path = folder / "images" / f"class{label}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(path)
    settings = CrawlSettings(unit_rows=images // 3)
    crawl_shards([str(folder / "images")], folder / "data", settings, workers=1, progress=lambda counts: None)
    return folder / "data"


def make_values(data: Path, **changes: Any) -> dict[str, Any]:
    """A recipe as plain values; `optim__lr=0.1` changes a key of a section."""
    values: dict[str, Any] = {
        "seed": 1,
        "data": {
            "root": str(data),
            "batch_size": 12,
            "window": 32,
            "crops": [
                {"count": 2, "size": 16, "scale": [0.3, 1.0]},
                {"count": 1, "size": 8, "scale": [0.1, 0.3]},
            ],
        },
        "trunk": SHALLOW,
        "method": {
            "name": "swav",
            "head": {"hidden": [16], "output": 8},
            "prototypes": 8,
            "freeze_prototypes_steps": 3,
            "queue_length": 24,
            "queue_start_step": 4,
        },
        "optim": {"name": "larc", "lr": 0.3, "warmup_steps": 4, "weight_decay": 1e-6},
        "train": {"steps": 20},
        "run": {"workers": 0, "device": "cpu", "log_every": 1, "checkpoint_every_steps": 5},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section][name] = value
        else:
            values[section] = value
    return values


def make_recipe(data: Path, **changes: Any) -> PretrainRecipe:
    """The same, checked."""
    return PretrainRecipe.model_validate(make_values(data, **changes))


def as_inputs(*groups: Tensor) -> Inputs:
    """What a method is shown: the views of each group of crops, view-major."""
    return Inputs(views={f"crops.{index}": group for index, group in enumerate(groups)})


def build_method(recipe: PretrainRecipe, *, total_steps: int, group: ProcessGroup | None) -> Method:
    """The recipe's method on its trunk, in float32 on the CPU, with weights drawn from the recipe's seed."""
    method = assemble_method(recipe, total_steps=total_steps, group=group)
    initialize(method, seed=recipe.seed)
    return method
