"""The recipes of a graph's stages, but for pretraining and evaluations.

A graph's keys are known before anything runs: nothing here imports what the stages run with.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.job import DeviceName
from cluster.typed_yaml import Section
from pipeline.recipe.data import Fraction, Interpolation
from pipeline.recipe.trunk import Trunk

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


class ShardsRecipe(Section):
    """A crawl: of the input `source`, or of a folder or tar at `source`."""

    source: str | None = None
    resize: PositiveInt | None = None
    unit_rows: PositiveInt = 16_384
    run: Machine = Machine()


class DatasetRecipe(Section):
    """A sealed dataset that is there already: its folder, the root to pin, if not the latest, and a view."""

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
    """A trunk that is there already: the folder of an exported one, or a checkpoint of timm's or VISSL's,
    with its architecture in `trunk`. Of a checkpoint, `image_size`, `resize` and `interpolation` say how it
    is shown images, normalised as ImageNet's.
    """

    path: str
    trunk: Trunk | None = None
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
    """The newest checkpoint of a run is exported as it is: the trunk that learns, or its teacher.

    `interpolation` resizes the images that it is shown from then on; by default as the run's recipe says.
    """

    which: Literal["student", "teacher"] = "student"
    interpolation: Interpolation | None = None


class RandomTrunkRecipe(Section):
    """A trunk like the input `like`, with weights drawn from the seed."""

    seed: NonNegativeInt = 0
    run: Machine = Machine()


class PixelsRecipe(Section):
    """Raw pixels of a square of `size`."""

    size: PositiveInt = 16


class FeaturesRecipe(Section):
    """Features of the inputs `train` and `test`, with the trunk's own preprocessing.

    `precision` is what they are written in: in fp16 and bf16 they take half the room, and lose digits.
    """

    precision: FeaturePrecision = "fp32"
    run: Machines = Machines()


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
