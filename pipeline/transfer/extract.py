"""Frozen features of a sealed dataset: deterministic preprocessing, batched, in evaluation mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cluster.errors import UserError
from ingest.dataset.open import Dataset
from pipeline.data.evaluation import Preprocessing, evenly_spaced, image_batches, normalise
from pipeline.data.node_cache import CachePlace
from pipeline.recipe.stages import FeaturePrecision
from pipeline.transfer.features import Features, FeatureWriter
from pipeline.transfer.labels import classes_of

logger = logging.getLogger(__name__)

BATCH_SIZE = 256


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
        if len(dataset) == 0:
            raise UserError(
                f"{dataset.path} has no image to evaluate with: see `ingest stats {dataset.path}`"
            )
        positions = evenly_spaced(len(dataset), limit)
        classes, y = classes_of(dataset, positions, several_labels=several_labels)
        keys = _keys(dataset)
        return cls(
            positions=positions,
            y=torch.from_numpy(y),
            keys=torch.from_numpy(keys[positions]),
            classes=classes,
        )


def _keys(dataset: Dataset) -> NDArray[np.int64]:
    keys = np.concatenate([dataset.unit_keys(unit) for unit in range(len(dataset.units))])
    return keys.astype(np.int64)


def extract_features(
    trunk: nn.Module,
    dataset: Dataset,
    *,
    preprocessing: Preprocessing,
    workers: int,
    device: torch.device,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    cache: CachePlace | None = None,
    several_labels: bool = False,
) -> Features:
    """Run a trunk over a labelled dataset, into memory.

    The trunk is put into evaluation mode and given back in the mode it came in.

    Args:
        trunk: (n, 3, image_size, image_size) normalised images → (n, D) features.
        limit: at most so many samples, evenly spaced over the dataset; None for all.
        cache: see `image_batches`.
        several_labels: see `classes_of`.

    Raises:
        UserError: if there is no sample, or one cannot be read, or has no label, or several and is not to.
    """
    sought = _Sought.of(dataset, limit, several_labels=several_labels)
    x = torch.empty(0)
    for first, part in _embed(
        trunk,
        dataset,
        sought.positions,
        preprocessing=preprocessing,
        workers=workers,
        device=device,
        batch_size=batch_size,
        cache=cache,
    ):
        if not first:
            x = torch.empty(len(sought.positions), part.shape[1])
        x[first : first + len(part)] = part.cpu()
    return Features(x=x, y=sought.y, keys=sought.keys, classes=sought.classes)


def write_features(
    trunk: nn.Module,
    dataset: Dataset,
    path: Path,
    *,
    dim: int,
    preprocessing: Preprocessing,
    workers: int,
    device: torch.device,
    precision: FeaturePrecision = "fp32",
    rank: int = 0,
    ranks: int = 1,
    batch_size: int = BATCH_SIZE,
    busy: Callable[[str], None] = lambda what: None,
    stop: Callable[[], bool] = lambda: False,
    several_labels: bool = False,
) -> bool:
    """The same into a file, of which every rank fills its own rows: it is whole when all have returned.

    Ranks share out batches, not samples: a trunk is shown the same ones together, however many ranks there
    are.

    Args:
        dim: D.
        rank, ranks: of equal parts, only this one.
        busy: told of every batch.
        stop: asked before every batch.
        several_labels: see `classes_of`.

    Returns:
        Whether this rank's rows are all there; they are not if it was to stop.
    """
    sought = _Sought.of(dataset, None, several_labels=several_labels)
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
        for first, part in _embed(
            trunk,
            dataset,
            sought.positions[begin:end],
            preprocessing=preprocessing,
            workers=workers,
            device=device,
            batch_size=batch_size,
        ):
            if stop():
                return False
            busy(f"extracting features into {path.name}, row {begin + first}")
            file.write(begin + first, part)
    return True


def _embed(
    trunk: nn.Module,
    dataset: Dataset,
    positions: NDArray[np.int64],
    *,
    preprocessing: Preprocessing,
    workers: int,
    device: torch.device,
    batch_size: int,
    cache: CachePlace | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Batches of features, float32, each with the place of its first among the positions."""
    if not len(positions):
        return
    images = image_batches(
        dataset,
        positions,
        preprocessing=preprocessing,
        workers=workers,
        pin_memory=device.type == "cuda",
        batch_size=batch_size,
        cache=cache,
    )
    was_training = trunk.training
    trunk.eval()
    first = 0
    try:
        for batch in images:
            with torch.inference_mode():
                part = trunk(normalise(batch.images, preprocessing, device)).float()
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
    *,
    workers: int,
    device: torch.device,
    several_labels: bool = False,
) -> tuple[Features, Features]:
    """Features of a training and a test set with an exported trunk."""
    from pipeline.trunks.files import load_trunk

    warn_of_shared(train, test)
    trunk = load_trunk(trunk_path).to(device)
    of_train, of_test = (
        extract_features(
            trunk,
            part,
            preprocessing=trunk.preprocessing,
            workers=workers,
            device=device,
            several_labels=several_labels,
        )
        for part in (train, test)
    )
    return of_train, of_test


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
