"""A classifier small enough to be trained many times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_training import make_recipe

from cluster.rank.torch_dist import World
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.loop import train
from pipeline.train.setup import Training, set_up

PLAIN = {"jitter_probability": 0, "grey_probability": 0, "blur_probability": 0}  # colours tell the classes
CROP = {"count": 1, "size": 16, "scale": [0.3, 1.0], "photometric": PLAIN}
# All that a classifier draws and averages.
MIXED = {
    "label_smoothing": 0.1,
    "mixup": 0.4,
    "cutmix": 1.0,
    "mix_rows": 2,
    "dropout": 0.3,
    "ema": 0.9,
    "ema_start": 0.2,
}


def recipe_of(data: Path, method: dict[str, Any], **changes: Any) -> PretrainRecipe:
    own: dict[str, Any] = {
        "data__crops": [CROP],
        "method": {"name": "classification"} | method,
        "optim": {"name": "sgd", "lr": 0.05, "nesterov": True, "lr_head": 0.2},
    }
    return make_recipe(data, **own | changes)


def world_of(group: dist.ProcessGroup | None) -> World:
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    return World(
        rank=rank, size=size, local_rank=rank, device=torch.device("cpu"), group=group, control=group
    )


class Never:
    requested = False


def run(recipe: PretrainRecipe, folder: Path, group: dist.ProcessGroup | None = None) -> Training:
    training = set_up(recipe, folder, world_of(group))
    train(training, Never())  # type: ignore[arg-type]
    if training.metrics is not None:
        training.metrics.close()
    return training
