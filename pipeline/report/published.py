"""Accuracies on CIFAR-10 that others have published, all of a ResNet-18 whose stem is one 3x3 convolution."""

from dataclasses import dataclass
from typing import Literal

from pipeline.recipe.method import BYOL, BarlowTwins, SimSiam, SwAV

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
TRUNK, STEM = "resnet18", "low_resolution"
TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000
K, TEMPERATURE = 200, 0.1  # of lightly's kNN


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Who published, where, and how it was measured."""

    name: str
    url: str
    probe: Literal["knn", "linear"]
    measured: str


@dataclass(frozen=True, kw_only=True)
class Published:
    """One accuracy, as a fraction, of the 10,000 test images."""

    source: Publication
    epochs: int
    batch_size: int
    top1: float


LIGHTLY = Publication(
    name="lightly",
    url="https://github.com/lightly-ai/lightly/blob/master/docs/source/getting_started/benchmarks.rst",
    probe="knn",
    measured="kNN, k = 200, T = 0.1, on the test images after every epoch, of which the best is published",
)
SOLO_LEARN = Publication(
    name="solo-learn",
    url="https://github.com/vturrisi/solo-learn#results",
    probe="linear",
    measured="a linear classifier that learns from the augmented views beside the pretraining",
)


def _rows(lightly: tuple[float, float, float], solo_learn: float) -> tuple[Published, ...]:
    setups = ((128, 200), (512, 200), (512, 800))
    return (
        *(
            Published(source=LIGHTLY, epochs=epochs, batch_size=batch_size, top1=top1)
            for (batch_size, epochs), top1 in zip(setups, lightly, strict=True)
        ),
        Published(source=SOLO_LEARN, epochs=1000, batch_size=256, top1=solo_learn),
    )


PUBLISHED = {
    "swav": _rows((0.812, 0.842, 0.884), 0.8917),
    "barlow_twins": _rows((0.842, 0.819, 0.859), 0.9210),
    "byol": _rows((0.869, 0.868, 0.910), 0.9258),
    "simsiam": _rows((0.819, 0.764, 0.904), 0.9051),
}
