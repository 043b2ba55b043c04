"""Fine-tuned accuracies on ImageNet-1k that others have published, with where each stands.

Those of 2021 and of 2022 are of other fine-tunings at other resolutions, of the same models too: they are
never shown together. Parameters are the source's own count.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.report.comparable import Setup

TEST_SET = (50_000, 1_000)  # images, classes


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where numbers stand, and how they were read or measured."""

    name: str
    url: str
    measured: str


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model: accuracy as a fraction, parameters in millions, multiply-adds in 10^9 at the test size; and,
    in `note`, where its GPU-hours are from.
    """

    top1: float
    parameters: float
    model: str = ""
    gmac: float | None = None
    gpu_hours: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one kind, from one source, by size; `tone` is one of `pipeline.report.figures.TONES`."""

    name: str
    tone: str
    source: Source
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Era:
    """What may share a figure. `resolution` says of `px`, the side of a test image, how it is known."""

    name: str
    title: str
    px: int
    resolution: str
    families: tuple[Family, ...]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A row of the comparison with hashtags; None, or "", where the source does not say.

    Attributes:
        images: what it was pretrained on. curated: whether these were chosen for ImageNet's classes.
        parameters: in millions. linear: accuracy of a linear probe, a fraction.
    """

    method: str
    images: str
    curated: bool | None
    architecture: str
    parameters: float
    top1: float
    setup: Setup
    source: Source
    linear: float | None = None


LECTURE = Source(
    name="NYU Deep Learning, spring 2021, lecture 10",
    url="https://github.com/Atcold/NYU-DLSP21",
    measured="Figure 1 is read off its slide by pixel. Parameters are with the head of the pretraining, "
    "which no classifier has: 9 to 12 % more than the trunk’s.",
)
VISSL = Source(
    name="VISSL, projects/SEER/README.md",
    url="https://github.com/facebookresearch/vissl/blob/main/projects/SEER/README.md",
    measured="The authors’ own table, fine-tuned and tested at 384 px. Parameters are with the head of the "
    "pretraining.",
)
TIMM = Source(
    name="timm, results/results-imagenet.csv",
    url="https://github.com/huggingface/pytorch-image-models/tree/main/results",
    measured="The released weights, all by one evaluation. Parameters are of trunk and classifier.",
)
WSL = Source(
    name="WSL-Images, README",
    url="https://github.com/facebookresearch/WSL-Images",
    measured="The authors’ own table.",
)


def _points(*rows: tuple[str, float, float]) -> tuple[Point, ...]:
    """Model, parameters in millions, top-1 in percent."""
    return tuple(Point(model=model, parameters=size, top1=top1 / 100) for model, size, top1 in rows)


def _by_timm(*rows: tuple[str, float, float, float]) -> tuple[Point, ...]:
    """Model, parameters in millions, 10^9 multiply-adds, top-1 in percent."""
    return tuple(
        Point(model=model, parameters=size, gmac=gmac, top1=top1 / 100) for model, size, gmac, top1 in rows
    )


ERAS = (
    Era(
        name="2021",
        title="As the lecture shows it, 2021",
        px=224,
        resolution="224 px, inferred",
        families=(
            Family(
                name="SEER",
                tone="t1",
                source=LECTURE,
                points=(
                    *_points(
                        ("RegNetY-8GF", 41.9, 80.2),
                        ("RegNetY-16GF", 90.4, 81.7),
                        ("RegNetY-32GF", 155.9, 82.7),
                        ("RegNetY-64GF as it was then", 250, 83.3),
                        ("RegNetY-128GF", 693, 83.8),
                    ),
                    Point(
                        model="RegNetY-256GF",
                        parameters=1297,
                        top1=0.842,
                        gpu_hours=512 * 8 * 24,
                        note="pretraining alone, 512 V100 for 8 days (S.-H. Tsang’s review of the paper)",
                    ),
                ),
            ),
            Family(
                name="SwAV",
                tone="t4",
                source=LECTURE,
                points=_points(("", 46.6, 79.8), ("", 91.3, 80.4), ("", 181.9, 82.0)),
            ),
            Family(
                name="SimCLRv2",
                tone="t5",
                source=LECTURE,
                points=_points(
                    ("", 35, 78.7),
                    ("", 65.1, 80.6),
                    ("", 89.0, 81.3),
                    ("", 141.2, 81.3),
                    ("", 260, 82.4),
                    ("", 355, 82.9),
                    ("", 795, 83.1),
                ),
            ),
            Family(name="ViT", tone="t6", source=LECTURE, points=_points(("", 91.0, 79.9))),
        ),
    ),
    Era(
        name="2022",
        title="At 384 px, 2022 and later",
        px=384,
        resolution="384 px",
        families=(
            Family(
                name="SEER, VISSL’s table",
                tone="t1",
                source=VISSL,
                points=_points(
                    ("RegNetY-32GF", 156, 83.4),
                    ("RegNetY-64GF", 250, 84.0),
                    ("RegNetY-128GF", 693, 84.5),
                    ("RegNetY-256GF", 1500, 85.2),
                    ("RegNet-10B", 10_000, 85.8),
                ),
            ),
            Family(
                name="SEER, by timm",
                tone="t4",
                source=TIMM,
                points=_by_timm(
                    ("RegNetY-32GF", 145.0, 95.0, 83.32),
                    ("RegNetY-64GF", 281.4, 188.5, 83.92),
                    ("RegNetY-128GF", 644.8, 375.0, 84.43),
                    ("RegNetY-256GF", 1282.6, 747.8, 85.14),
                ),
            ),
            Family(
                name="SWAG (hashtags), by timm",
                tone="t5",
                source=TIMM,
                points=_by_timm(
                    ("RegNetY-16GF", 83.6, 46.9, 86.02),
                    ("RegNetY-32GF", 145.0, 95.0, 86.83),
                    ("RegNetY-128GF", 644.8, 375.0, 88.23),
                ),
            ),
        ),
    ),
)


def _claim(
    method: str,
    images: str,
    curated: bool | None,
    size: tuple[str, float],
    *,
    top1: float,
    source: Source,
    px: int | None = None,
    epochs: int | None = None,
    linear: float | None = None,
) -> Claim:
    trunk, parameters = size
    names = {
        "X101-32x8d": "resnext101_32x8d",
        "RegNetY-32GF": "regnety_32gf",
        "RegNetY-128GF": "regnety_128gf",
    }
    return Claim(
        method=method,
        images=images,
        curated=curated,
        architecture=trunk,
        parameters=parameters,
        top1=top1 / 100,
        setup=Setup(trunk=names[trunk], px=px, epochs=epochs, test_set=TEST_SET),
        source=source,
        linear=linear and linear / 100,
    )


_SMALL, _LARGE = ("RegNetY-32GF", 145.0), ("RegNetY-128GF", 644.8)
# Title → rows, of which the first is the lecture's own table. SEER's linear probes are VISSL's, the best of
# several heads; SWAG's are timm's evaluation of the released ones, at 224 px.
CLAIMS: dict[str, tuple[Claim, ...]] = {
    "The lecture’s table": (
        _claim("Hashtag prediction", "1 B", True, ("X101-32x8d", 91), top1=82.6, source=LECTURE),
        _claim("SEER", "1 B", False, ("X101-32x8d", 91), top1=81.6, source=LECTURE),
    ),
    "Hashtags on that trunk, by others": (
        _claim("Hashtag prediction", "940 M", True, ("X101-32x8d", 88.8), top1=82.2, source=WSL, px=224),
        _claim("Hashtag prediction", "940 M", True, ("X101-32x8d", 88.8), top1=82.72, source=TIMM, px=224),
    ),
    "The same trunks at 384 px": (
        _claim(
            "SWAG (hashtags)", "3.6 B", None, _SMALL, top1=86.83, source=TIMM, px=384, epochs=8, linear=84.65
        ),
        _claim("SEER", "1 B", False, _SMALL, top1=83.32, source=TIMM, px=384, epochs=40, linear=74.03),
        _claim(
            "SWAG (hashtags)", "3.6 B", None, _LARGE, top1=88.23, source=TIMM, px=384, epochs=8, linear=85.96
        ),
        _claim("SEER", "1 B", False, _LARGE, top1=84.43, source=TIMM, px=384, epochs=40, linear=75.96),
    ),
}
