"""Frozen features of a sealed dataset: deterministic preprocessing, batched, in evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster.errors import UserError
from ingest.dataset.open import Dataset
from pipeline.data.evaluation import Preprocessing, evenly_spaced, image_batches, normalise
from pipeline.data.node_cache import CachePlace
from pipeline.transfer.labels import classes_of


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of N samples, in dataset order.

    `x` float32 (N, D); `y` int64 (N,), an index into `classes` (sorted names, of labels or of sets of labels:
    see `pipeline.transfer.labels`); `keys` int64 (N,) sample keys.
    """

    x: Tensor
    y: Tensor
    keys: Tensor
    classes: tuple[str, ...]


def extract_features(
    trunk: nn.Module,
    dataset: Dataset,
    *,
    preprocessing: Preprocessing,
    workers: int,
    device: torch.device,
    limit: int | None = None,
    batch_size: int = 256,
    cache: CachePlace | None = None,
    several_labels: bool = False,
) -> Features:
    """Run a trunk over a labelled dataset.

    The trunk is put into evaluation mode and given back in the mode it came in.

    Args:
        trunk: (n, 3, image_size, image_size) normalised images → (n, D) features.
        limit: at most so many samples, evenly spaced over the dataset; None for all.
        cache: see `image_batches`.
        several_labels: see `classes_of`.

    Raises:
        UserError: if there is no sample, or one cannot be read, or has no label, or has several and is not
            to.
    """
    if len(dataset) == 0:
        raise UserError(f"{dataset.path} has no image to evaluate with: see `ingest stats {dataset.path}`")
    positions = evenly_spaced(len(dataset), limit)
    classes, y = classes_of(dataset, positions, several_labels=several_labels)
    batches = image_batches(
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
    parts: list[Tensor] = []
    keys: list[Tensor] = []
    with torch.inference_mode():
        for batch in batches:
            parts.append(trunk(normalise(batch.images, preprocessing, device)).float().cpu())
            keys.append(batch.keys.clone())  # kept as they are, they would keep the batch's buffer
    trunk.train(was_training)
    # clone(): tensors made in inference mode cannot take part in autograd, which the linear probe needs.
    return Features(
        x=torch.cat(parts).clone(),
        y=torch.from_numpy(y),
        keys=torch.cat(keys),
        classes=classes,
    )


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


def save_features(features: Features, path: Path) -> None:
    """Write features as safetensors: no pickle."""
    tensors = {"x": features.x.contiguous(), "y": features.y, "keys": features.keys}
    save_file(tensors, path, metadata={str(index): name for index, name in enumerate(features.classes)})


def load_features(path: Path) -> Features:
    """Read what `save_features` wrote."""
    with safe_open(path, framework="pt") as file:
        names = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in ("x", "y", "keys")}
    return Features(classes=tuple(names[str(index)] for index in range(len(names))), **tensors)
