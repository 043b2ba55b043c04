"""What a recipe says of its data: sources, crops, photometric changes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from cluster.typed_yaml import Section

Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Interpolation = Literal["bilinear", "bicubic"]


class Photometric(Section):
    """Colour augmentation, drawn per crop. Strengths are torchvision's ColorJitter ranges."""

    jitter_probability: Probability = 0.8
    brightness: NonNegativeFloat = 0.8
    contrast: NonNegativeFloat = 0.8
    saturation: NonNegativeFloat = 0.8
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    grey_probability: Probability = 0.2
    blur_probability: Probability = 0.5
    blur_sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    solarize_probability: Probability = 0.0


class CropGroup(Section):
    """Crops of one size, cut by RandomResizedCrop, flipped, and coloured alike.

    `interpolation` is the filter that resizes them, antialiased as Pillow's.
    """

    count: PositiveInt
    size: PositiveInt
    scale: tuple[Fraction, Fraction]
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
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
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
