"""Frozen features of a sealed dataset: deterministic preprocessing, batched, in evaluation mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cluster.errors import UserError
from ingest.dataset.open import Dataset
from pipeline.data.evaluation import Preprocessing, evenly_spaced
from pipeline.data.node_cache import CachePlace
from pipeline.data.shown import AnyPreprocessing, at_once, shown_inputs
from pipeline.recipe.stages import FeaturePrecision, Windows
from pipeline.transfer.features import Features, FeatureWriter, load_features
from pipeline.transfer.labels import classes_of
from pipeline.transfer.maps import MapTrunk

logger = logging.getLogger(__name__)

BATCH_SIZE = 256
_ONE = Windows(windows=1)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Sought:
    """Samples of a dataset, and what is known of them without looking at their pixels: see `Features`."""

    positions: NDArray[np.int64]
    y: Tensor
    keys: Tensor
    classes: tuple[str, ...]

    @classmethod
    def of(cls, dataset: Dataset, limit: int | None, *, several_labels: bool) -> _Sought:
        """Raises UserError if there is no sample, or one has no label, or several and is not to."""
        refuse_empty(dataset)
        positions = evenly_spaced(len(dataset), limit)
        classes, y = classes_of(dataset, positions, several_labels=several_labels)
        keys = _keys(dataset)
        return cls(
            positions=positions,
            y=torch.from_numpy(y),
            keys=torch.from_numpy(keys[positions]),
            classes=classes,
        )

    def windows(self, count: int) -> _Sought:
        """The same, with as many rows for each sample."""
        y, keys = (each.repeat_interleave(count) for each in (self.y, self.keys))
        return replace(self, y=y, keys=keys)


def refuse_empty(dataset: Dataset) -> None:
    """Raises UserError if there is nothing to show a trunk."""
    if len(dataset) == 0:
        raise UserError(f"{dataset.path} has no image to evaluate with: see `ingest stats {dataset.path}`")


def _keys(dataset: Dataset) -> NDArray[np.int64]:
    keys = np.concatenate([dataset.unit_keys(unit) for unit in range(len(dataset.units))])
    return keys.astype(np.int64)


def extract_features(
    trunk: nn.Module,
    dataset: Dataset,
    *,
    preprocessing: AnyPreprocessing,
    workers: int,
    device: torch.device,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    cache: CachePlace | None = None,
    several_labels: bool = False,
    videos: Windows = _ONE,
) -> Features:
    """Run a trunk over a labelled dataset, into memory.

    The trunk is put into evaluation mode and given back in the mode it came in.

    Args:
        trunk: normalised images, clips or spectrograms, (n, …) → (n, D) features.
        limit: at most so many samples, evenly spaced over the dataset; None for all.
        cache: see `shown_inputs`.
        several_labels: see `classes_of`.
        videos: what is looked at of each, where `preprocessing` is of videos; its `layer` is the trunk's.

    Raises:
        UserError: if there is no sample, or one cannot be read, or has no label, or several and is not to.
    """
    sought = _Sought.of(dataset, limit, several_labels=several_labels)
    sought = sought.windows(rows_of(preprocessing, videos))
    x = torch.empty(0)
    for first, part in embedded(
        trunk,
        dataset,
        sought.positions,
        preprocessing=preprocessing,
        workers=workers,
        device=device,
        batch_size=batch_size,
        cache=cache,
        videos=videos,
    ):
        if not first:
            x = torch.empty(len(sought.y), part.shape[1])
        x[first : first + len(part)] = part.cpu()
    return Features(x=x, y=sought.y, keys=sought.keys, classes=sought.classes)


def write_features(
    trunk: nn.Module,
    dataset: Dataset,
    path: Path,
    *,
    dim: int,
    preprocessing: AnyPreprocessing,
    workers: int,
    device: torch.device,
    precision: FeaturePrecision = "fp32",
    rank: int = 0,
    ranks: int = 1,
    batch_size: int = BATCH_SIZE,
    busy: Callable[[str], None] = lambda what: None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    several_labels: bool = False,
    videos: Windows = _ONE,
) -> bool:
    """The same into a file, of which every rank fills its own rows: it is whole when all have returned.

    Ranks share out batches, not samples: a trunk is shown the same ones together, however many ranks there
    are.

    Args:
        dim: D.
        rank, ranks: of equal parts, only this one.
        busy: told of every batch.
        stop: asked before every batch.
        progress: told of this rank's rows, how many are there and how many there will be.
        several_labels, videos: see `extract_features`.

    Returns:
        Whether this rank's rows are all there; they are not if it was to stop.
    """
    sought = _Sought.of(dataset, None, several_labels=several_labels)
    each, batch_size = rows_of(preprocessing, videos), at_once(preprocessing, batch_size)
    sought = sought.windows(each)
    batches = -(-len(sought.positions) // batch_size)
    begin, end = (batch_size * (batches * place // ranks) for place in (rank, rank + 1))
    with FeatureWriter(
        path,
        y=sought.y,
        keys=sought.keys,
        classes=sought.classes,
        dim=dim,
        precision=precision,
        heading=rank == 0,
    ) as file:
        for first, part in embedded(
            trunk,
            dataset,
            sought.positions[begin:end],
            preprocessing=preprocessing,
            workers=workers,
            device=device,
            batch_size=batch_size,
            videos=videos,
        ):
            if stop():
                return False
            busy(f"extracting features into {path.name}, row {begin * each + first}")
            file.write(begin * each + first, part)
            progress(first + len(part), each * len(sought.positions[begin:end]))
    return True


def embedded(
    trunk: nn.Module,
    dataset: Dataset,
    positions: NDArray[np.int64],
    *,
    preprocessing: AnyPreprocessing,
    workers: int,
    device: torch.device,
    batch_size: int,
    cache: CachePlace | None = None,
    videos: Windows,
) -> Iterator[tuple[int, Tensor]]:
    """Batches of features, float32, each with the place of its first row among those of the positions."""
    if not len(positions):
        return
    shown = shown_inputs(
        dataset,
        positions,
        preprocessing,
        windows=videos.windows,
        workers=workers,
        device=device,
        batch_size=batch_size,
        cache=cache,
    )
    was_training = trunk.training
    trunk.eval()
    first = 0
    try:
        for batch in shown:
            with torch.inference_mode():
                part = trunk(batch.inputs).float()
                if not videos.each:
                    part = part.unflatten(0, (len(batch.keys), -1)).mean(1)
            if not bool(torch.isfinite(part).all()):
                raise UserError(
                    f"the trunk's features of {dataset.path} are not finite: its weights are broken; "
                    "export an older checkpoint, RUN/checkpoints/step-N"
                )
            yield first, part
            first += len(part)
    finally:
        trunk.train(was_training)


def extract_from_files(
    trunk_path: Path,
    train: Dataset,
    test: Dataset,
    folder: Path,
    *,
    workers: int,
    device: torch.device,
    several_labels: bool = False,
    videos: Windows,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Features, Features]:
    """Features of a training and a test set with an exported trunk, mapped from files in a folder.

    Args:
        progress: told which dataset it is at, how many of its rows are there, and of how many.
    """
    from pipeline.trunks.files import load_trunk

    warn_of_shared(train, test)
    trunk = load_trunk(trunk_path).to(device)
    network = at_layer(trunk, trunk.network, videos)
    files = folder / "train.safetensors", folder / "test.safetensors"
    for file, dataset in zip(files, (train, test), strict=True):
        write_features(
            network,
            dataset,
            file,
            dim=network.feature_dim,
            preprocessing=trunk.preprocessing,
            workers=workers,
            device=device,
            progress=partial(progress, str(dataset.path)),
            several_labels=several_labels,
            videos=videos,
        )
    return load_features(files[0]), load_features(files[1])


def warn_of_shared(train: Dataset, test: Dataset) -> None:
    """Say how many test images are training images, too: on them a score says what was remembered."""
    if train.root != test.root:
        return
    if shared := int(np.isin(_keys(test), _keys(train)).sum()):
        logger.warning(
            "%d of %d test images are training images, too (root %s): accuracies on them are no test; give "
            "another --test, or two views that share none",
            shared,
            len(test),
            test.root[:12],
        )


def rows_of(preprocessing: AnyPreprocessing, videos: Windows) -> int:
    """How many rows of features a sample has."""
    return 1 if isinstance(preprocessing, Preprocessing) or not videos.each else videos.windows


def at_layer(trunk: T, network: nn.Module, videos: Windows) -> T | MapTrunk:
    """A trunk, or what it gives at a layer, of its network."""
    return trunk if videos.layer is None else MapTrunk(network, videos.layer, videos.pooling)
