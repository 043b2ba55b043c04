"""Pictures for the report: samples of the data, the crops the model sees, nearest neighbours."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cluster.errors import UserError
from ingest.dataset.keys import unit_and_slot
from ingest.dataset.open import Dataset
from ingest.image.decode import ImageError, decode
from pipeline.data.loader import Loader
from pipeline.data.reader import BadSampleError, Reader
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.transfer.features import Features
from pipeline.transfer.knn import nearest

logger = logging.getLogger(__name__)


class Samples:
    """The images of a dataset by sample key; keeps the keys of one unit at a time."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._reader = Reader(dataset)
        self._keys: tuple[int, NDArray[np.uint64]] | None = None

    def image(self, key: int) -> Image.Image:
        """The picture of a sample; grey where it cannot be decoded."""
        unit_index = int(np.searchsorted(self._dataset.units, unit_and_slot(key)[0]))
        if self._keys is None or self._keys[0] != unit_index:
            self._keys = (unit_index, self._dataset.unit_keys(unit_index))
            self._reader.keep([unit_index])
        row = int(np.searchsorted(self._keys[1], np.uint64(key)))
        try:
            return decode(self._reader.read(unit_index, row))
        except (BadSampleError, ImageError) as error:
            return not_shown(self._reader.name(unit_index, row), error)

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()


@dataclass(frozen=True, kw_only=True)
class LabelRow:
    """Samples of one label, as data URIs."""

    label: str
    train: list[str]
    test: list[str]


@dataclass(frozen=True, kw_only=True)
class CropRow:
    """An image and what the model is shown of it, per crop size."""

    original: str
    groups: list[tuple[int, list[str]]]


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """An image near a query; `right` if they share the label; None where there are no labels."""

    picture: str
    label: str | None
    right: bool | None
    similarity: float


@dataclass(frozen=True, kw_only=True)
class Query:
    """An image and those nearest to it, by trunk; a label, where there are any."""

    picture: str
    label: str | None
    answers: dict[str, list[Neighbour]]


def label_rows(
    train: Features, test: Features, train_samples: Samples, test_samples: Samples, *, labels: int, each: int
) -> list[LabelRow]:
    """The first samples of the first labels: training beside test."""
    return [
        LabelRow(
            label=label,
            train=_first_of(label, train, train_samples, each),
            test=_first_of(label, test, test_samples, each),
        )
        for label in train.classes[:labels]
    ]


def crops_seen(
    recipe: PretrainRecipe, samples: Samples, labels: dict[int, str], *, count: int
) -> list[CropRow]:
    """Crops of step 0 as the loader makes them, de-normalised for the eye; each of another label if possible.

    Args:
        labels: sample key → label, where it is known.

    Raises:
        UserError: the recipe's samples are videos.
    """
    if recipe.data.is_of_clips:
        raise UserError("this page shows crops of images, and the run was trained on clips of videos")
    loader = Loader(
        recipe.data, seed=recipe.seed, rank=0, world_size=1, workers=0, device=torch.device("cpu")
    )
    _, batch = next(loader.from_step(0))
    rows = len(batch.keys)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (recipe.data.mean, recipe.data.std))
    groups = [
        ((crops * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).reshape(-1, rows, *crops.shape[1:])
        for crops in loader.augment(batch).views.values()
    ]
    return [
        CropRow(
            original=data_uri(samples.image(int(batch.keys[index]))),
            groups=[
                (crops.shape[-1], [data_uri(_to_image(view[index])) for view in crops]) for crops in groups
            ],
        )
        for index in _of_different_labels([labels.get(int(key)) for key in batch.keys], count)
    ]


def nearest_rows(
    trunks: dict[str, tuple[Features, Features]],
    train_samples: Samples,
    test_samples: Samples,
    *,
    queries: int,
    neighbours: int,
    seed: int,
) -> list[Query]:
    """Test images drawn by the seed, one per label as far as possible, and what lies nearest in training.

    Args:
        trunks: name → features of the training and the test set, of the same samples in the same order.
    """
    _, test = next(iter(trunks.values()))
    chosen = _draw_queries(test, queries, seed)
    answers: dict[str, list[list[Neighbour]]] = {}
    for name, (bank, probe) in trunks.items():
        similarity, index = nearest(bank.x, probe.x[chosen], k=min(neighbours, len(bank.y)))
        answers[name] = [
            [
                _neighbour(bank, int(row), float(value), test.classes[test.y[query]], train_samples)
                for row, value in zip(rows, values, strict=True)
            ]
            for query, rows, values in zip(chosen, index, similarity, strict=True)
        ]
    return [
        Query(
            picture=data_uri(test_samples.image(int(test.keys[query]))),
            label=test.classes[test.y[query]],
            answers={name: rows[number] for name, rows in answers.items()},
        )
        for number, query in enumerate(chosen)
    ]


def near_each_other(
    keys: Tensor, x: Tensor, samples: Samples, *, queries: int, neighbours: int
) -> list[Query]:
    """The first images of some that have no labels, and what of them all lies nearest to each.

    Args:
        keys, x: (n,) of samples in an order drawn by chance, and their features (n, d).
    """
    # Each is the nearest to itself, if no copy of it is.
    similarity, index = nearest(x, x[:queries], k=min(neighbours + 1, len(x)))
    return [
        Query(
            picture=data_uri(samples.image(int(keys[query]))),
            label=None,
            answers={
                "trained": [
                    Neighbour(
                        picture=data_uri(samples.image(int(keys[row]))),
                        label=None,
                        right=None,
                        similarity=float(value),
                    )
                    for row, value in zip(rows, values, strict=True)
                    if row != query
                ][:neighbours]
            },
        )
        for query, (rows, values) in enumerate(zip(index, similarity, strict=True))
    ]


def not_shown(name: str, error: Exception) -> Image.Image:
    """A grey square for a picture that cannot be decoded, and a line in the log: no page fails for it."""
    logger.warning("%s cannot be shown: %s", name, error)
    return Image.new("RGB", (64, 64), "lightgrey")


def data_uri(image: Image.Image, *, longest: int = 160) -> str:
    """An image inside the page: as JPEG, at most `longest` pixels long."""
    image = image.convert("RGB")
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _first_of(label: str, features: Features, samples: Samples, count: int) -> list[str]:
    if label not in features.classes:
        return []
    rows = (features.y == features.classes.index(label)).nonzero().squeeze(1)[:count]
    return [data_uri(samples.image(int(features.keys[row]))) for row in rows]


def _draw_queries(test: Features, count: int, seed: int) -> list[int]:
    order = torch.randperm(len(test.y), generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[place] for place in _of_different_labels(test.y[order].tolist(), count)]


def _of_different_labels(labels: Sequence[object], count: int) -> list[int]:
    """Places of `count` labels: the first of each kind, then, if these are too few, the first others."""
    first: dict[object, int] = {}
    for place, label in enumerate(labels):
        first.setdefault(label, place)
    chosen = list(first.values())
    rest = [place for place in range(len(labels)) if place not in first.values()]
    return (chosen + rest)[:count]


def _neighbour(bank: Features, row: int, similarity: float, label: str, samples: Samples) -> Neighbour:
    own = bank.classes[bank.y[row]]
    return Neighbour(
        picture=data_uri(samples.image(int(bank.keys[row]))),
        label=own,
        right=own == label,
        similarity=similarity,
    )


def _to_image(crop: Tensor) -> Image.Image:
    return Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
