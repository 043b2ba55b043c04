"""What a trunk trained by SwAV sees as one thing: the images that lie nearest to its strongest prototypes.

A prototype is a direction of the embedding that SwAV groups images by (Caron et al., 2020,
https://arxiv.org/abs/2006.09882, section 3.1). In training, Sinkhorn spreads every batch equally over the
prototypes; here each image goes to the nearest one, so that it shows how many of them stand for something.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import UserError
from ingest.dataset.open import Dataset
from pipeline.checkpoint.files import latest, newest, read_tensors, step_of
from pipeline.data.evaluation import Preprocessing, evaluation_preprocessing, image_batches, normalise
from pipeline.data.training_set import open_training_set
from pipeline.methods.build import assemble_method
from pipeline.methods.method import Method
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.report.gallery import Samples, data_uri


@runtime_checkable
class ScoresPrototypes(Protocol):
    """A method that groups images by prototypes."""

    def prototype_scores(self, images: Tensor) -> Tensor:
        """Cosines of each image with each prototype, (N, prototypes)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The prototype nearest to each of N images, in dataset order.

    `keys` int64 (N,) sample keys; `prototype` int64 (N,); `cosine` float32 (N,), of the embedding and it.
    """

    keys: Tensor
    prototype: Tensor
    cosine: Tensor


@dataclass(frozen=True, kw_only=True)
class Commonest:
    """The label that most of some images have, and the share of them that have it."""

    label: str
    share: float


@dataclass(frozen=True, kw_only=True)
class Member:
    """An image of a prototype."""

    picture: str
    label: str | None
    cosine: float


@dataclass(frozen=True, kw_only=True)
class PrototypeRow:
    """A prototype, by its number: its share of the sample, and its nearest images, the nearest first.

    `commonest` is of all its images, not only of those shown; None if no label is known.
    """

    prototype: int
    share: float
    commonest: Commonest | None
    members: list[Member]


@dataclass(frozen=True, kw_only=True)
class PrototypeGallery:
    """The strongest prototypes, and of all `prototypes` how many have an image of the sample.

    `sample` of the pretraining's `images` were drawn; `commonest` is of the sample.
    """

    images: int
    sample: int
    prototypes: int
    used: int
    commonest: Commonest | None
    rows: list[PrototypeRow]


def prototype_gallery(
    run: Path,
    recipe: PretrainRecipe,
    samples: Samples,
    labels: Mapping[int, str],
    *,
    rows: int,
    images: int,
    sample: int,
    seed: int,
    device: torch.device,
) -> PrototypeGallery | None:
    """The prototypes with the most images of a sample of the pretraining's, and the nearest images of each;
    None if the method has no prototypes.

    Args:
        run: its newest checkpoint is read.
        recipe: the run's; `data` says where the images are now.
        samples: the same images.
        labels: sample key → label, where it is known.
        rows, images: prototypes to show, and images of each, at most.
        sample: images to draw by the seed, at most.
    """
    with torch.device("meta"):
        method = assemble_method(recipe, total_steps=1, group=None)
    if not isinstance(method, ScoresPrototypes):
        return None
    load_newest(method, run)
    dataset = open_training_set(recipe.data).dataset
    drawn = draw_positions(dataset, sample, seed=seed)
    return gallery_of(
        method.to(device),
        recipe,
        dataset,
        drawn,
        samples=samples,
        labels=labels,
        rows=rows,
        images=images,
        device=device,
    )


def draw_positions(dataset: Dataset, count: int, *, seed: int) -> NDArray[np.int64]:
    """At most so many positions of a dataset, drawn by the seed, in the order of the shards: each is opened
    once.
    """
    drawn = np.random.default_rng(seed).choice(len(dataset), min(count, len(dataset)), replace=False)
    return np.sort(drawn)


def gallery_of(
    method: Method,
    recipe: PretrainRecipe,
    dataset: Dataset,
    drawn: NDArray[np.int64],
    *,
    samples: Samples,
    labels: Mapping[int, str],
    rows: int,
    images: int,
    device: torch.device,
) -> PrototypeGallery | None:
    """The same of a method on the device, and of the images at some positions of the dataset."""
    if not isinstance(method, ScoresPrototypes):
        return None
    prototypes, nearest = nearest_prototypes(
        method, dataset, drawn, preprocessing=evaluation_preprocessing(recipe), device=device
    )
    counts = nearest.prototype.bincount()
    used = int(counts.count_nonzero())
    strongest = counts.argsort(descending=True, stable=True)[: min(rows, used)]
    return PrototypeGallery(
        images=len(dataset),
        sample=len(drawn),
        prototypes=prototypes,
        used=used,
        commonest=_commonest(nearest.keys, labels),
        rows=[_row(int(prototype), nearest, samples, labels, images=images) for prototype in strongest],
    )


def load_newest(method: Method, run: Path) -> int:
    """Give a method built on `meta` the tensors of a run's newest checkpoint, in evaluation mode, float32 on
    the CPU.

    Returns:
        The checkpoint's step.

    Raises:
        UserError: if there is no whole checkpoint.
    """
    while True:
        checkpoint = newest(run)
        try:
            method.load_state_dict(read_tensors(checkpoint, prefix=""), assign=True)
        except (OSError, UserError):
            if latest(run) in (None, checkpoint):
                raise
            continue  # the run goes on: it has saved a newer one, and removed this
        method.float().eval()
        return step_of(checkpoint)


def nearest_prototypes(
    method: ScoresPrototypes,
    dataset: Dataset,
    positions: NDArray[np.int64],
    *,
    preprocessing: Preprocessing,
    device: torch.device,
) -> tuple[int, Nearest]:
    """How many prototypes there are, and the nearest one of the images at some positions of the dataset, as
    an evaluation sees them.

    Args:
        method: on the device.
    """
    count = 0
    keys: list[Tensor] = []
    parts: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode():
        for batch in image_batches(dataset, positions, preprocessing=preprocessing, workers=0):
            cosines = method.prototype_scores(normalise(batch.images, preprocessing, device))
            count, highest = cosines.shape[1], cosines.max(dim=1)
            parts.append((highest.indices.cpu(), highest.values.cpu()))
            keys.append(batch.keys)
    prototype, cosine = (torch.cat(part) for part in zip(*parts, strict=True))
    return count, Nearest(keys=torch.cat(keys), prototype=prototype, cosine=cosine)


def _row(
    prototype: int, nearest: Nearest, samples: Samples, labels: Mapping[int, str], *, images: int
) -> PrototypeRow:
    own = (nearest.prototype == prototype).nonzero().squeeze(1)
    shown = own[nearest.cosine[own].argsort(descending=True, stable=True)[:images]]
    return PrototypeRow(
        prototype=prototype,
        share=len(own) / len(nearest.keys),
        commonest=_commonest(nearest.keys[own], labels),
        members=[
            Member(picture=data_uri(samples.image(key)), label=labels.get(key), cosine=cosine)
            for key, cosine in zip(nearest.keys[shown].tolist(), nearest.cosine[shown].tolist(), strict=True)
        ],
    )


def _commonest(keys: Tensor, labels: Mapping[int, str]) -> Commonest | None:
    known = [labels[key] for key in keys.tolist() if key in labels]
    if not known:
        return None
    label, count = Counter(known).most_common(1)[0]
    return Commonest(label=label, share=count / len(known))
