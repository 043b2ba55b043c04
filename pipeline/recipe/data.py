"""What a recipe says of its data: sources, and what becomes of a sample: crops of an image, or a clip and its
sound.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from cluster.typed_yaml import Place, Section

Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Colour = tuple[float, float, float]
Deviation = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Interpolation = Literal["bilinear", "bicubic"]
_MOST_OF_SOUND = 1 << 24  # numbers of a spectrogram; what an exported trunk asks for may come from anybody


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


class Clip(Section):
    """`frames` pictures of a video, `fps` of them a second: all cut by the same box of a RandomResizedCrop,
    which is resized by an antialiased bilinear filter, all flipped or none, and all coloured by one draw.

    Where there is sound, too, the pictures begin within its window widened by `offset_seconds` to either
    side. A `photometric` section that is given is taken whole: what it leaves out is as for images.
    """

    frames: PositiveInt = 8
    fps: PositiveFloat = 16.0
    size: PositiveInt = 224
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    flip_probability: Probability = 0.5
    photometric: Photometric = Photometric(
        jitter_probability=1.0,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.2,
        grey_probability=0.0,
        blur_probability=0.0,
    )
    offset_seconds: NonNegativeFloat = 0.5


class Audio(Section):
    """`seconds` of a video's sound, mixed to one channel, at `rate` samples a second, as a spectrogram of
    power in decibels, each bin with zero mean and unit variance over the dataset.

    `window` and `hop` of the Fourier transforms are in samples. "linear" keeps the lowest frequency, and
    averages the others in groups until there are `bins`; "mel" has bins of Slaney's scale, from 0 to half the
    rate. What is `top_db` below a clip's loudest is raised to that. Loudness is drawn: times 1 - `volume` to
    1 + `volume`.
    """

    rate: Annotated[int, Field(ge=1000, le=192_000)] = 24_000
    seconds: Annotated[float, Field(gt=0, le=600)] = 2.0
    kind: Literal["linear", "mel"] = "linear"
    window: Annotated[int, Field(ge=8, le=65_536)] = 1024
    hop: PositiveInt = 240
    bins: Annotated[int, Field(ge=2)] = 257
    top_db: PositiveFloat = 100.0
    volume: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @property
    def samples(self) -> int:
        """Of a waveform."""
        return round(self.seconds * self.rate)

    @property
    def frames(self) -> int:
        """Of a spectrogram: windows that begin within the sound."""
        return self.samples // self.hop

    @model_validator(mode="after")
    def _a_spectrogram_has_frames(self) -> Self:
        if self.samples <= self.window // 2 or not self.frames:
            raise ValueError("data.audio.seconds must be longer than half a window, and than a hop")
        if self.frames * self.bins > _MOST_OF_SOUND:
            raise ValueError(
                f"data.audio makes {self.frames} times {self.bins} numbers of a sound: use a longer hop"
            )
        return self

    @model_validator(mode="after")
    def _bins_fit_the_window(self) -> Self:
        half = self.window // 2
        if self.kind == "linear" and (self.window % 2 or half % (self.bins - 1)):
            fitting = [1 + half // group for group in range(1, half + 1) if half % group == 0]
            raise ValueError(
                f"linear bins are 1 more than a divisor of half of data.audio.window, such as "
                f"{', '.join(map(str, fitting[:4]))}"
            )
        if self.kind == "mel" and self.bins > half:
            raise ValueError(
                f"data.audio.window {self.window} has {half} frequencies, too few for so many bins"
            )
        return self


class Data(Section):
    """What is read, and what becomes of a sample: `crops` of an image; or, of a video, a `clip`, its `audio`,
    or both.

    `tags` is a folder that `submit hashtags` has made of the dataset: the images that have tags are read, and
    their tags are their labels. `batch_size` is the coupled batch: the one that Sinkhorn and BatchNorm see,
    over all ranks. `mean` and `std` are of the colours, where 1 is white.
    """

    unwritten: ClassVar[frozenset[str]] = frozenset({"clip", "audio"})

    root: Place
    sealed: str | None = None
    view: str | None = None
    tags: Place | None = None
    batch_size: PositiveInt
    window: PositiveInt = 131_072
    crops: tuple[CropGroup, ...] = ()
    clip: Clip | None = None
    audio: Audio | None = None
    mean: Annotated[Colour, AfterValidator(of_unit_pixels)] = (0.485, 0.456, 0.406)
    std: Annotated[Deviation, AfterValidator(of_unit_pixels)] = (0.229, 0.224, 0.225)

    @property
    def is_of_clips(self) -> bool:
        """Whether samples are videos."""
        return self.clip is not None or self.audio is not None

    @model_validator(mode="after")
    def _images_or_videos(self) -> Self:
        if self.crops and self.is_of_clips:
            raise ValueError(
                "data.crops are of images, data.clip and data.audio of videos: leave one or the other out"
            )
        if not self.crops and not self.is_of_clips:
            raise ValueError(
                "data.crops says what becomes of an image, data.clip and data.audio of a video: give some"
            )
        return self
