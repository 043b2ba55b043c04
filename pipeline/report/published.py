"""Accuracies on CIFAR-10 that others have published, all of a ResNet-18 whose stem is one 3x3 convolution.

With each is what must be alike for an accuracy here to be held against it.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.recipe.data import CropGroup, Interpolation, Photometric
from pipeline.recipe.method import BYOL, BarlowTwins, SimSiam, SwAV
from pipeline.recipe.trunk import Stem

METHODS = {
    "swav": SwAV.title,
    "barlow_twins": BarlowTwins.title,
    "byol": BYOL.title,
    "simsiam": SimSiam.title,
}
PROBES = {"knn": "kNN, %", "linear": "Linear, %"}
# What the table is made from: the images, and of each method its run and scores.
TABLE_ROLES = (
    frozenset(f"{role}_{method}" for role in ("run", *PROBES) for method in METHODS)
    | {f"{probe}_random" for probe in PROBES}
    | {"data"}
)
TRUNK = "resnet18"
TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How an accuracy was measured: by which classifier, and of which checkpoint."""

    probe: Literal["knn", "linear"]
    classifier: str
    checkpoint: Literal["last", "best of all epochs"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What was made of an image: its views, one group each, and their normalisation."""

    views: tuple[CropGroup, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Who published, where, and what all of its accuracies have in common; `measured` says it to people."""

    name: str
    url: str
    measured: str
    stem: Stem
    interpolation: Interpolation
    evaluation: Evaluation


@dataclass(frozen=True, kw_only=True)
class Published:
    """One accuracy, as a fraction, of the 10,000 test images."""

    source: Publication
    augmentation: Augmentation
    epochs: int
    batch_size: int
    top1: float


def knn_classifier(k: int, temperature: float) -> str:
    """Weighted kNN, as a classifier of an `Evaluation`."""
    return f"k = {k}, T = {temperature:g}"


LIGHTLY = Publication(
    name="lightly",
    url="https://github.com/lightly-ai/lightly/blob/master/docs/source/getting_started/benchmarks.rst",
    measured="kNN, k = 200, T = 0.1, on the test images after every epoch, of which the best is published",
    stem="low_resolution",
    interpolation="bilinear",
    evaluation=Evaluation(probe="knn", classifier=knn_classifier(200, 0.1), checkpoint="best of all epochs"),
)
SOLO_LEARN = Publication(
    name="solo-learn",
    url="https://github.com/vturrisi/solo-learn#results",
    measured="a linear classifier that learns from the augmented views beside the pretraining",
    stem="low_resolution_padded",
    interpolation="bicubic",
    evaluation=Evaluation(
        probe="linear", classifier="one layer trained along, on augmented views", checkpoint="last"
    ),
)


def _view(
    smallest: float, jitter: tuple[float, float, float, float], solarize_probability: float = 0.0
) -> CropGroup:
    """A view of 32 px, by the smallest share of the image that is cut and the strengths of its colours."""
    brightness, contrast, saturation, hue = jitter
    photometric = Photometric(
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        blur_probability=0.0,
        solarize_probability=solarize_probability,
    )
    return CropGroup(count=1, size=32, scale=(smallest, 1.0), photometric=photometric)


def _rows(
    lightly: tuple[float, float, float],
    solo_learn: float,
    *,
    lightly_views: tuple[CropGroup, CropGroup],
    solo_learn_views: tuple[CropGroup, CropGroup],
) -> tuple[Published, ...]:
    """Lightly's accuracies (its cifar10_benchmark.py) and solo-learn's (bash_files/pretrain/cifar)."""
    of_imagenet = Augmentation(views=lightly_views, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    of_cifar = Augmentation(
        views=solo_learn_views, mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)
    )
    setups = ((128, 200), (512, 200), (512, 800))
    return (
        *(
            Published(
                source=LIGHTLY, augmentation=of_imagenet, epochs=epochs, batch_size=batch_size, top1=top1
            )
            for (batch_size, epochs), top1 in zip(setups, lightly, strict=True)
        ),
        Published(source=SOLO_LEARN, augmentation=of_cifar, epochs=1000, batch_size=256, top1=solo_learn),
    )


_ASYMMETRIC = (_view(0.08, (0.4, 0.4, 0.2, 0.1)), _view(0.08, (0.4, 0.4, 0.2, 0.1), 0.2))
PUBLISHED = {
    "swav": _rows(
        (0.812, 0.842, 0.884),
        0.8917,
        lightly_views=(_view(0.14, (0.4, 0.4, 0.4, 0.1)),) * 2,
        solo_learn_views=(_view(0.08, (0.8, 0.8, 0.8, 0.2)),) * 2,
    ),
    "barlow_twins": _rows(
        (0.842, 0.819, 0.859), 0.9210, lightly_views=_ASYMMETRIC, solo_learn_views=_ASYMMETRIC
    ),
    "byol": _rows((0.869, 0.868, 0.910), 0.9258, lightly_views=_ASYMMETRIC, solo_learn_views=_ASYMMETRIC),
    "simsiam": _rows(
        (0.819, 0.764, 0.904),
        0.9051,
        lightly_views=(_view(0.2, (0.4, 0.4, 0.4, 0.1)),) * 2,
        solo_learn_views=(_view(0.08, (0.4, 0.4, 0.4, 0.1)),) * 2,
    ),
}
