"""What a recipe says of its data: sources, crops, photometric changes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from cluster.typed_yaml import Section

Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Colour = tuple[float, float, float]
Deviation = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Interpolation = Literal["bilinear", "bicubic"]


def ascending(values: tuple[float, float]) -> tuple[float, float]:
    """The range itself; ValueError if it is reversed."""
    if values[0] > values[1]:
        raise ValueError(f"a range goes from the smaller to the larger: give [{values[1]:g}, {values[0]:g}]")
    return values


def of_unit_pixels(values: Colour) -> Colour:
    """The numbers themselves; ValueError if they are of pixels from 0 to 255."""
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(
            f"pixels are numbers from 0 to 1, and so are their mean and deviation, not {list(values)}: "
            "divide those of pixels from 0 to 255 by 255"
        )
    return values


PositiveRange = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(ascending)]


class Photometric(Section):
    """Colour augmentation, drawn per crop. Strengths are torchvision's ColorJitter ranges."""

    jitter_probability: Probability = 0.8
    brightness: NonNegativeFloat = 0.8
    contrast: NonNegativeFloat = 0.8
    saturation: NonNegativeFloat = 0.8
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    grey_probability: Probability = 0.2
    blur_probability: Probability = 0.5
    blur_sigma: PositiveRange = (0.1, 2.0)
    solarize_probability: Probability = 0.0


class CropGroup(Section):
    """Crops of one size, cut by RandomResizedCrop, flipped, and coloured alike.

    `interpolation` is the filter that resizes them, antialiased as Pillow's.
    """

    count: PositiveInt
    size: Annotated[int, Field(ge=2)]
    scale: Annotated[tuple[Fraction, Fraction], AfterValidator(ascending)]
    ratio: PositiveRange = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"
    flip_probability: Probability = 0.5
    photometric: Photometric = Photometric()


class Data(Section):
    """What is read, and how a sample becomes crops.

    `tags` is a folder that `submit hashtags` has made of the dataset: the images that have tags are read, and
    their tags are their labels. `batch_size` is the coupled batch: the one that Sinkhorn and BatchNorm see,
    over all ranks.
    """

    root: str
    sealed: str | None = None
    view: str | None = None
    tags: str | None = None
    batch_size: PositiveInt
    window: PositiveInt = 131_072
    crops: tuple[CropGroup, ...] = Field(min_length=1)
    mean: Annotated[Colour, AfterValidator(of_unit_pixels)] = (0.485, 0.456, 0.406)
    std: Annotated[Deviation, AfterValidator(of_unit_pixels)] = (0.229, 0.224, 0.225)
