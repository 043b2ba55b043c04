"""Frozen features of a sealed dataset: deterministic preprocessing, batched, in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster.errors import UserError
from cluster.typed_yaml import Section
from ingest.dataset.open import Dataset
from ingest.image.decode import ImageError, decode
from pipeline.data.reader import BadSampleError, Reader
from pipeline.data.workers import numbered


class Preprocessing(Section):
    """How an image becomes a trunk's input: short side to `resize`, the centre `image_size`, normalised."""

    image_size: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of N samples, in dataset order.

    `x` float32 (N, D); `y` int64 (N,), an index into `classes` (sorted names); `keys` int64 (N,) sample keys.
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
) -> Features:
    """Run a trunk over a labelled dataset.

    The trunk is put into evaluation mode and given back in the mode it came in.

    Args:
        trunk: (n, 3, image_size, image_size) normalised images → (n, D) features.
        limit: at most so many samples, evenly spaced over the dataset; None for all.

    Raises:
        UserError: if there is no sample, or one has no label or cannot be read.
    """
    if len(dataset) == 0:
        raise UserError(f"{dataset.path} has no image to evaluate with: see `ingest stats {dataset.path}`")
    positions = evenly_spaced(len(dataset), limit)
    batches = image_batches(
        dataset,
        positions,
        preprocessing=preprocessing,
        workers=workers,
        pin_memory=device.type == "cuda",
        batch_size=batch_size,
    )
    was_training = trunk.training
    trunk.eval()
    parts: list[Tensor] = []
    keys: list[Tensor] = []
    labels: list[str] = []
    with torch.inference_mode():
        for batch in batches:
            parts.append(trunk(normalise(batch.images, preprocessing, device)).float().cpu())
            keys.append(batch.keys.clone())  # kept as they are, they would keep the batch's buffer
            labels += _known(batch.labels, dataset)
    trunk.train(was_training)
    classes = tuple(sorted(set(labels)))
    number = {name: index for index, name in enumerate(classes)}
    # clone(): tensors made in inference mode cannot take part in autograd, which the linear probe needs.
    return Features(
        x=torch.cat(parts).clone(),
        y=torch.tensor([number[label] for label in labels]),
        keys=torch.cat(keys),
        classes=classes,
    )


def extract_from_files(
    trunk_path: Path, train: Dataset, test: Dataset, *, workers: int, device: torch.device
) -> tuple[Features, Features]:
    """Features of a training and a test set with an exported trunk."""
    from pipeline.trunks.export import load_trunk

    trunk = load_trunk(trunk_path).to(device)
    return (
        extract_features(trunk, train, preprocessing=trunk.preprocessing, workers=workers, device=device),
        extract_features(trunk, test, preprocessing=trunk.preprocessing, workers=workers, device=device),
    )


def shared_labels(train: Features, test: Features) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Number the labels of two sets alike.

    Returns:
        Names of all classes, and the int64 class of each training and test sample.

    Raises:
        UserError: if a set is empty, or there are fewer than two classes in training.
    """
    if len(train.y) == 0 or len(test.y) == 0:
        raise UserError("an evaluation needs training and test samples; one of the two datasets is empty")
    if len(train.classes) < 2:
        raise UserError(
            f"an evaluation needs at least two labels, the training set has only {train.classes}; "
            "labels are the names of the first folders under the crawled source"
        )
    if not set(train.classes) & set(test.classes):
        raise UserError(
            "the training and the test set share no label; were both crawled from the same folders?"
        )
    names = tuple(sorted({*train.classes, *test.classes}))
    number = {name: index for index, name in enumerate(names)}
    to_shared = [torch.tensor([number[name] for name in part.classes]) for part in (train, test)]
    return names, to_shared[0][train.y], to_shared[1][test.y]


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


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """uint8 images (n, 3, S, S), int64 keys (n,), and the label of each image, None without one."""

    images: Tensor
    keys: Tensor
    labels: list[str | None]

    def pin_memory(self) -> ImageBatch:
        """A copy, ready for an asynchronous copy to a GPU."""
        return ImageBatch(images=self.images.pin_memory(), keys=self.keys.clone(), labels=self.labels)


def image_batches(
    dataset: Dataset,
    positions: NDArray[np.int64],
    *,
    preprocessing: Preprocessing,
    workers: int,
    pin_memory: bool = False,
    batch_size: int = 256,
) -> Iterator[ImageBatch]:
    """Preprocessed images at the given positions of the dataset's global axis, in that order."""
    make = _Batches(dataset, positions, preprocessing, batch_size)
    count = -(-len(positions) // batch_size)
    workers = min(workers, count)
    size = 3 * preprocessing.image_size**2 * batch_size
    return islice(numbered(make, 0, workers=workers, pin_memory=pin_memory, shared_bytes=size), count)


def fit_image(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Short side to `resize`, then the centre square of `image_size`. Bicubic, antialiased."""
    size, crop = preprocessing.resize, preprocessing.image_size
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - crop) / 2 / width, (height - crop) / 2 / height
    box = (
        left * image.width,
        top * image.height,
        (left + crop / width) * image.width,
        (top + crop / height) * image.height,
    )
    # One resampling of the centre box equals resize-then-crop, without computing what is cut away.
    return image.resize((crop, crop), Image.Resampling.BICUBIC, box=box)


def normalise(images: Tensor, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """uint8 (n, 3, S, S) → float32 on the device, channels_last, zero mean and unit variance per channel."""
    moved = images.to(device=device, memory_format=torch.channels_last, non_blocking=True).float()
    mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1) * 255
    std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1) * 255
    return (moved - mean) / std


class _Batches:
    """Makes batches by number, in whichever process it is called; empty ones behind the last."""

    def __init__(
        self, dataset: Dataset, positions: NDArray[np.int64], preprocessing: Preprocessing, size: int
    ) -> None:
        self._dataset, self._positions = dataset, positions
        self._preprocessing, self._size = preprocessing, size
        self._ends = np.cumsum(dataset.counts)
        # Opened in the process that reads: file descriptors do not travel.
        self._reader: Reader | None = None
        self._labels: tuple[int, list[str | None]] | None = None

    def __call__(self, number: int) -> ImageBatch:
        positions = self._positions[number * self._size : (number + 1) * self._size]
        side = self._preprocessing.image_size
        images, keys, labels = np.empty((len(positions), side, side, 3), np.uint8), [], []
        for index, position in enumerate(positions):
            unit = int(np.searchsorted(self._ends, position, side="right"))
            row = int(position - self._ends[unit] + self._dataset.counts[unit])
            images[index] = np.asarray(fit_image(self._image(unit, row), self._preprocessing))
            keys.append(self._open_reader().key(unit, row))
            labels.append(self._label(unit, row))
        return ImageBatch(
            images=torch.from_numpy(images).permute(0, 3, 1, 2),
            keys=torch.tensor(keys, dtype=torch.int64),
            labels=labels,
        )

    def _image(self, unit: int, row: int) -> Image.Image:
        """A decoded sample; unlike training, an evaluation takes no substitutes."""
        reader = self._open_reader()
        try:
            return decode(reader.read(unit, row))
        except (BadSampleError, ImageError) as error:
            raise UserError(
                f"{reader.name(unit, row)} cannot be evaluated ({error}): see what is damaged with "
                f"`ingest verify --level decode {self._dataset.path}`, and restore it"
            ) from error

    def _open_reader(self) -> Reader:
        if self._reader is None:
            self._reader = Reader(self._dataset, units=64)
        return self._reader

    def _label(self, unit: int, row: int) -> str | None:
        if self._labels is None or self._labels[0] != unit:
            self._labels = (unit, self._dataset.unit_rows(unit).labels)
        return self._labels[1][row]


def _known(labels: list[str | None], dataset: Dataset) -> list[str]:
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        raise UserError(
            f"a sample of {dataset.path} has no label; an evaluation needs a dataset crawled from "
            "a folder or tar whose first folders are the labels"
        )
    return known


def evenly_spaced(total: int, limit: int | None) -> NDArray[np.int64]:
    """At most `limit` positions out of `total`, evenly spaced, ascending."""
    if limit is None or limit >= total:
        return np.arange(total, dtype=np.int64)
    return np.arange(limit, dtype=np.int64) * total // limit
