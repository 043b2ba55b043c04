"""What the sound of a run's dataset is like: measured once, for all ranks and for the run that goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from cluster.atomic_file import write_atomically
from cluster.rank.torch_dist import World
from pipeline.data.clip.spectrogram import spectrogram
from pipeline.data.clip.statistics import AUDIO_STATISTICS, BinStatistics, bin_statistics, read_statistics
from pipeline.data.loader import Loader
from pipeline.data.node_cache import CachePlace
from pipeline.recipe.pretrain import PretrainRecipe

logger = logging.getLogger(__name__)
_MOST_CLIPS = 10_000
_BATCH = 64


def sound_of_run(recipe: PretrainRecipe, folder: Path, world: World) -> BinStatistics:
    """The statistics in the run's folder, which the first rank measures if there are none; for all ranks.

    Raises:
        UserError: as `Loader`.
    """
    found = None
    if world.is_first:
        if not (folder / AUDIO_STATISTICS).is_file():
            measured = measure_sound(recipe, cache=CachePlace.of(recipe.run))
            write_atomically(folder / AUDIO_STATISTICS, json.dumps(asdict(measured)) + "\n")
        found = read_statistics(folder)
    first: BinStatistics = world.gather(found)[0]
    return first


def measure_sound(recipe: PretrainRecipe, *, cache: CachePlace | None = None) -> BinStatistics:
    """Of the first samples that a training of one epoch reads, 10,000 at most, one moment each.

    They do not depend on the seed, nor on ranks or workers.
    """
    audio = recipe.data.audio
    assert audio is not None
    # Pictures are not decoded. No dataset is too small for a batch that is no larger than the training's own.
    data = recipe.data.model_copy(update={"clip": None, "batch_size": min(_BATCH, recipe.data.batch_size)})
    device = torch.device("cpu")
    loader = Loader(
        data, seed=0, rank=0, world_size=1, workers=recipe.run.workers, device=device, cache=cache
    )
    count = min(loader.steps_per_epoch, -(-_MOST_CLIPS // data.batch_size))
    logger.info("measuring the sound of %d clips", count * data.batch_size)

    def spectrograms() -> Iterator[Tensor]:
        for _, batch in islice(loader.from_step(0), count):
            yield spectrogram(batch.views["audio"], audio)

    return bin_statistics(spectrograms())
