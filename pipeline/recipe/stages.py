"""The recipes of a graph's stages, but for pretraining and evaluations.

A graph's keys are known before anything runs: nothing here imports what the stages run with.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.job import DeviceName
from cluster.typed_yaml import Section
from pipeline.recipe.data import Fraction, Interpolation
from pipeline.recipe.trunk import Architecture

FeaturePrecision = Literal["fp32", "fp16", "bf16"]


class Machine(Section):
    """Where a stage runs; changes no number."""

    workers: NonNegativeInt = 2
    device: DeviceName = "auto"


class Machines(Machine):
    """Where a stage runs whose ranks share out the images: one rank per GPU, or one on the CPU, if nothing is
    said.
    """

    nodes: PositiveInt = 1
    ranks_per_node: PositiveInt | None = None
    hang_seconds: PositiveFloat = 300.0  # without a batch, times six: the ranks' stacks are written down


class PhotographsRecipe(Section):
    """What is cut.

    `cover` is the range of a tile's side, as a share of the photograph's short side. Along the long side,
    the first `train_share` is for training and what lies more than `gap` behind it for testing. A tile
    whose grey values deviate by less than `min_contrast` (0 to 1) is drawn again: flat sky has no label.
    """

    images: str | None = None
    seed: NonNegativeInt = 0
    tile_size: PositiveInt = 48
    train_tiles: PositiveInt = 6_000
    test_tiles: PositiveInt = 1_500
    cover: tuple[Fraction, Fraction] = (0.15, 0.35)
    train_share: Annotated[float, Field(gt=0, lt=0.95)] = 0.7
    gap: Annotated[float, Field(ge=0, lt=0.5)] = 0.05
    min_contrast: NonNegativeFloat = 0.03
    max_pictures: PositiveInt = 400

    @model_validator(mode="after")
    def _regions_and_sizes_make_sense(self) -> Self:
        if self.train_share + self.gap >= 1:
            raise ValueError("train_share + gap must leave something for testing: keep their sum below 1")
        if self.cover[0] > self.cover[1]:
            raise ValueError("cover is written smallest first, such as [0.15, 0.35]")
        return self


Shape = Literal["disc", "square", "triangle", "cross"]
Motion = Literal["bounce", "shake", "roll"]


class ClipsRecipe(Section):
    """Clips of so many `seconds` and pixels a `side`, for trying out what learns from sound and picture.

    Those of `source` synthetic show one of the `shapes` in one of the `motions`, which together are the
    label: `pipeline.stages.synthetic_clips` says what is heard of them. Those of tuxpaint show a picture,
    moving, while a human says its name; the label is its kind. They are made of `stamps`, the folder of
    Debian's package tuxpaint-stamps-default; what training clips show, no test clip does.
    """

    source: Literal["synthetic", "tuxpaint"] = "synthetic"
    seed: NonNegativeInt = 0
    train_clips: PositiveInt = 1_500
    test_clips: PositiveInt = 500
    side: Annotated[int, Field(ge=16, le=512, multiple_of=2)] = 48
    seconds: Annotated[float, Field(ge=1, le=10)] = 3.0
    shapes: tuple[Shape, ...] = Field(("disc", "square", "triangle", "cross"), min_length=1)
    motions: tuple[Motion, ...] = Field(("bounce", "shake"), min_length=1)
    stamps: str = "/usr/share/tuxpaint/stamps"
    run: Machine = Machine()


class Videos(Section):
    """What is made of videos: clips of so many seconds at most, so many in a shard; without a sound only if
    such are asked for.
    """

    unit_rows: PositiveInt = 1_024
    segment_seconds: Annotated[float, Field(ge=1, le=120)] = 10.0
    allow_silent: bool = False


class ShardsRecipe(Section):
    """A crawl: of the input `source`, or of a folder or tar at `source`. With `videos` these are such."""

    unwritten: ClassVar[frozenset[str]] = frozenset({"videos"})

    source: str | None = None
    videos: Videos | None = None
    resize: PositiveInt | None = None
    unit_rows: PositiveInt = 16_384
    run: Machine = Machine()


class DatasetRecipe(Section):
    """A sealed dataset that is there already: its folder, the root to pin, if not the latest, and a view."""

    unwritten: ClassVar[frozenset[str]] = frozenset({"view"})

    path: str
    sealed: str | None = None
    view: str | None = None


class SubsetRecipe(Section):
    """A part of the input `data`: so many images of each label, drawn by the seed; those that a list names;
    or, of these, so many. `ingest view --help` says how lists are read.
    """

    per_label: PositiveInt | None = None
    seed: NonNegativeInt = 0
    keep: str | None = None
    run: Machine = Machine()


class DedupRecipe(Section):
    """The input `data` without duplicates, and without what equals or looks like an image of the input
    `against`; `hamming` as `ingest dedup` has it, null for equal bytes only.
    """

    hamming: Annotated[int, Field(ge=0)] | None = 4
    run: Machine = Machine()


class CheckpointRecipe(Section):
    """A checkpoint of a run: the folder `RUN/checkpoints/step-…`."""

    path: str


class TrunkRecipe(Section):
    """A trunk that is there already: the folder of an exported one, or a file of others' weights,
    with its architecture in `trunk`. Of a checkpoint, `image_size`, `resize` and `interpolation` say how it
    is shown images, normalised as ImageNet's.
    """

    path: str
    trunk: Architecture | None = None
    image_size: PositiveInt = 224
    resize: PositiveInt = 256
    interpolation: Interpolation = "bicubic"


# WordNet's lexicographer files of nouns, in the order of their numbers.
NounKind = Literal[
    "tops",
    "act",
    "animal",
    "artifact",
    "attribute",
    "body",
    "cognition",
    "communication",
    "event",
    "feeling",
    "food",
    "group",
    "location",
    "motive",
    "object",
    "person",
    "phenomenon",
    "plant",
    "possession",
    "process",
    "quantity",
    "relation",
    "shape",
    "state",
    "substance",
    "time",
]
# Those of what pictures show.
DEPICTABLE: tuple[NounKind, ...] = ("animal", "artifact", "body", "food", "object", "plant")


class HashtagsRecipe(Section):
    """Tags from what is written about images: synsets of WordNet's nouns.

    `read` are the columns that are looked at: labels only if people have written them, as hashtags, or the
    tags are what an evaluation asks for. `kinds`, WordNet's lexicographer files, are what becomes a tag. Of
    those that at least `min_images` images have, the `max_tags` most frequent are kept. `only` these synsets,
    said by their names or by nouns, may become tags: the classes that a trunk will be judged by, which is
    curation. `view` is a part of the dataset.

    `resample` has an epoch show an image the more often, the rarer its rarest tag is: by the inverse square
    root of how many images have the tag; or with `head_tail`, so within the tags of at least `head_images`
    images and within the others, which together are drawn in `head_share` of the epoch and in the rest.
    """

    view: str | None = None
    read: tuple[Literal["caption", "labels"], ...] = Field(("caption",), min_length=1)
    kinds: tuple[NounKind, ...] = Field(DEPICTABLE, min_length=1)
    min_images: PositiveInt = 100
    max_tags: Annotated[int, Field(ge=2)] = 8_500
    only: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    resample: Literal["square_root", "head_tail"] | None = None
    head_images: PositiveInt = 5_000
    head_share: Annotated[float, Field(gt=0, lt=1)] = 0.7
    run: Machine = Machine()


class ExportRecipe(Section):
    """The newest checkpoint of a run is exported as it is: the trunk that learns, its teacher, or AVID's for
    sound.

    `interpolation` resizes the images that it is shown from then on; by default as the run's recipe says.
    """

    which: Literal["student", "teacher", "audio"] = "student"
    interpolation: Interpolation | None = None


class RandomTrunkRecipe(Section):
    """A trunk like the input `like`, with weights drawn from the seed."""

    seed: NonNegativeInt = 0
    run: Machine = Machine()


class PixelsRecipe(Section):
    """Raw pixels of a square of `size`."""

    size: PositiveInt = 16


Layer = Literal["conv2x", "conv3x", "conv4x", "conv5x"]
Pooling = Literal["max", "average"]


class Windows(Section):
    """How a trunk for videos, or for sound, is shown one: so many `windows`, evenly spaced. Their features
    are averaged, or, with `each`, written one by one.

    Features are those of the trunk; or, with a `layer`, that stage's map, its `pooling` over all of time and
    to 12, 8, 6 or 4 parts along each side, from conv2x to conv5x.
    """

    windows: PositiveInt = 10
    each: bool = False
    layer: Layer | None = None
    pooling: Pooling = "max"


class FeaturesRecipe(Section):
    """Features of the inputs `train` and `test`, with the trunk's own preprocessing.

    `precision` is what they are written in: in fp16 and bf16 they take half the room, and lose digits.
    `videos` is for trunks that take such.
    """

    unwritten: ClassVar[frozenset[str]] = frozenset({"videos"})

    precision: FeaturePrecision = "fp32"
    videos: Windows | None = None
    run: Machines = Machines()


class EmbeddingsRecipe(Section):
    """Embeddings of the input `data`, labelled videos, and of their sound, by both heads of the input `run`:
    the mean of `windows` of each.
    """

    windows: PositiveInt = 10
    run: Machine = Machine()


class CrossModalRecipe(Section):
    """Of the input `embeddings`: recall is told at these ranks."""

    at: tuple[PositiveInt, ...] = Field((1, 5, 10), min_length=1)


class MeanRecipe(Section):
    """The mean of a `metric` of the inputs: scores of several splits or folds, or of several seeds."""

    metric: str = "top1"


class ClipsReportRecipe(Section):
    """What is shown, and how much of it: `clips` of the test set, `queries` of each modality with
    `neighbours`, and `positive_sets` of CMA with `positives` each.
    """

    title: str = "What belongs together is learnt from it"
    clips: PositiveInt = 8
    queries: PositiveInt = 3
    neighbours: PositiveInt = 5
    positive_sets: PositiveInt = 4
    positives: PositiveInt = 5
    seed: NonNegativeInt = 0


class ReportRecipe(Section):
    """What is shown, and how much of it.

    The nearest prototypes of `prototype_sample` images of the pretraining are looked for.
    """

    title: str = "SEER pipeline"
    labels: PositiveInt = 14
    samples_per_label: PositiveInt = 4
    crop_rows: PositiveInt = 6
    queries: PositiveInt = 6
    neighbours: PositiveInt = 8
    prototypes: PositiveInt = 8
    images_per_prototype: PositiveInt = 8
    prototype_sample: PositiveInt = 5_000
    seed: NonNegativeInt = 0


class CompareRecipe(Section):
    """What the page is called."""

    title: str = "Runs compared"


class FiguresRecipe(Section):
    """What the page is called, and the names of rows whose images of the pretraining were chosen for the
    classes of the test set.
    """

    title: str = "Accuracy against size and supervision"
    curated: tuple[str, ...] = ()


class Cifar10TableRecipe(Section):
    """Nothing is to be chosen."""
