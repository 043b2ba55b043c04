"""What a recipe says of its method: a section each.

`title` is the method's name for people; one that is `supervised` learns from labels, and one that `remembers`
keeps something of every sample, by its position in the dataset.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.typed_yaml import Section


class Head(Section):
    """The projection MLP: trunk features → hidden layers → output."""

    hidden: tuple[PositiveInt, ...]
    output: PositiveInt = 128
    batch_norm: bool = True


class SwAV(Section):
    """Caron et al., 2020 (https://arxiv.org/abs/2006.09882); SEER uses it with 16,000 prototypes.

    The queue holds the last `queue_length` embeddings of each assignment view, from the first step on, as in
    solo-learn; assignments take it in from `queue_start_step` on, once it is full. The authors begin to fill
    it at that step, so theirs helps some steps later.
    """

    title: ClassVar[str] = "SwAV"
    supervised: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    name: Literal["swav"]
    head: Head
    prototypes: Annotated[int, Field(ge=2)]
    temperature: PositiveFloat = 0.1
    epsilon: PositiveFloat = 0.05
    sinkhorn_iterations: PositiveInt = 3
    freeze_prototypes_steps: NonNegativeInt = 313
    queue_length: NonNegativeInt = 0
    queue_start_step: NonNegativeInt = 0


class BarlowTwins(Section):
    """Zbontar et al., 2021 (https://arxiv.org/abs/2103.03230).

    `projector` are the widths of its layers. `off_diagonal_weight` is the paper's lambda; at 0 nothing keeps
    the components of the embedding apart. `scale` multiplies the loss.
    """

    title: ClassVar[str] = "Barlow Twins"
    supervised: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    name: Literal["barlow_twins"]
    projector: tuple[PositiveInt, ...] = Field(min_length=1)
    off_diagonal_weight: NonNegativeFloat = 0.0051
    scale: PositiveFloat = 1.0


class BYOL(Section):
    """Grill et al., 2020 (https://arxiv.org/abs/2006.07733).

    `projector` are the widths of its layers, `predictor` that of the predictor's hidden layer. The teacher
    follows the student by `momentum`, which rises to 1 along a cosine.

    Student and teacher differ in three ways, each of which can be taken away. Architecture: without
    `predictor` (null) the student has none. Learning rule: without `stop_gradient` the teacher learns by the
    gradient, as the student does, and follows nobody. Weights: with `shared_weights` the teacher is the
    student itself.
    """

    title: ClassVar[str] = "BYOL"
    supervised: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    name: Literal["byol"]
    projector: tuple[PositiveInt, ...] = Field(min_length=1)
    predictor: PositiveInt | None
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.996
    stop_gradient: bool = True
    shared_weights: bool = False


class SimSiam(Section):
    """Chen & He, 2021 (https://arxiv.org/abs/2011.10566).

    `projector` are the widths of its layers, `predictor` that of the predictor's hidden layer, whose rate
    stays at its peak (section 4.2) unless `predictor_lr_decays` with the schedule, as all others do. Without
    `stop_gradient`, or without a predictor (null), everything collapses to one point, as the paper shows.
    """

    title: ClassVar[str] = "SimSiam"
    supervised: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    name: Literal["simsiam"]
    projector: tuple[PositiveInt, ...] = Field(min_length=1)
    predictor: PositiveInt | None
    predictor_lr_decays: bool = False
    stop_gradient: bool = True


class Classification(Section):
    """A linear head on a trunk, and both learn from labels: fine-tuning, where `trunk.init_from` gives the
    trunk what it knows; pretraining on hashtags, where nothing does.

    `classes` is how many labels the training data has, counted when the run begins. The target of an image
    with k labels is 1/k for each (Mahajan et al., 2018, https://arxiv.org/abs/1805.00932);
    `label_smoothing` spreads a share of it over all classes. The head's weights start at `head_deviation`
    times the normal distribution, 0 by default. While it learns, each feature that
    it is shown is zero with the probability `dropout` (Srivastava et al., 2014,
    https://jmlr.org/papers/v15/srivastava14a.html).

    Within each group of `mix_rows` images that follow each other in the batch, every image is mixed with its
    mirror in the group: by mixup (Zhang et al., 2018, https://arxiv.org/abs/1710.09412), cutmix (Yun et al.,
    2019, https://arxiv.org/abs/1905.04899), or where both have an alpha, by either of them, drawn for each
    group. A batch is mixed alike on any number of ranks.

    `ema` is what the average of the weights and of BatchNorm's statistics keeps of itself at each step; for
    the first `ema_start` of the run, a share, it follows at once. `freeze` keeps the trunk as it is, or its
    BatchNorm: statistics, gains and biases.
    """

    unwritten: ClassVar[frozenset[str]] = frozenset({"dropout"})

    title: ClassVar[str] = "Classification"
    supervised: ClassVar[bool] = True
    remembers: ClassVar[bool] = False
    name: Literal["classification"]
    classes: Annotated[int, Field(ge=2)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    mix_rows: Annotated[int, Field(ge=2)] = 8
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    ema_start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    freeze: Literal["none", "batch_norm", "trunk"] = "none"
    head_deviation: NonNegativeFloat = 0.0
    dropout: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _an_average_starts(self) -> Self:
        if self.ema is None and self.ema_start:
            raise ValueError("method.ema_start goes with method.ema")
        return self


class CMA(Section):
    """What AVID goes on with, from the bank of a run that it has trained: `positives` clips for each, those
    that agree with it most. Agreement is the lesser of the cosines of both modalities ("consensus"), the
    greater ("union"), or that of one. They are sought anew every `refresh_epochs`.

    `weight` is that of the term which compares a clip with its positives, within each modality, and with the
    first `within_negatives` of its negatives. Up to `exact_below` clips every pair is compared; above, those
    of neighbouring cells. With `search_uncertified` a clip is then compared with all others where no bound
    shows that its best are among these: in a bank of loose neighbourhoods that is nearly every clip, and
    takes as long as comparing every pair.

    A bank must have neighbourhoods that both modalities share: the nearest by one must be alike in the other,
    by `least_agreement` standard deviations more than any two; at 0 any bank will do. The default comes from
    made banks, planted and drawn at random, not from one that was trained on a published dataset.
    """

    positives: PositiveInt = 32
    agreement: Literal["consensus", "union", "video", "audio"] = "consensus"
    refresh_epochs: PositiveInt = 50
    within_negatives: PositiveInt = 64
    weight: PositiveFloat = 1.0
    exact_below: NonNegativeInt = 20_000_000
    search_uncertified: bool = False
    least_agreement: NonNegativeFloat = 1.0


class AVID(Section):
    """Morgado et al., 2021 (https://arxiv.org/abs/2004.12943): a clip is told from others by its sound, and
    its sound by the clip.

    A bank remembers every clip of the dataset, and its sound; at each visit it keeps `bank_momentum` of what
    it remembers. Clips are compared across modalities with `cross_weight`, and within them with
    `within_weight` (Self-AVID; both: Joint-AVID). "nce" takes every comparison for a question of its own,
    with a threshold of ln(`negatives`) + `log_z`, which "auto" takes from the first batch; "softmax" takes
    all for one. With `cma` clips are also compared with others that agree with them.
    """

    title: ClassVar[str] = "AVID"
    supervised: ClassVar[bool] = False
    remembers: ClassVar[bool] = True
    name: Literal["avid"]
    head: Head
    temperature: PositiveFloat = 0.07
    negatives: PositiveInt = 1024
    bank_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    bank_dtype: Literal["fp32", "fp16"] = "fp32"
    loss: Literal["nce", "softmax"] = "nce"
    log_z: Literal["auto"] | float = "auto"
    cross_weight: NonNegativeFloat = 1.0
    within_weight: NonNegativeFloat = 0.0
    cma: CMA | None = None

    @model_validator(mode="after")
    def _something_is_compared(self) -> Self:
        if not self.cross_weight + self.within_weight:
            raise ValueError("method.cross_weight and method.within_weight are both 0: nothing is compared")
        return self

    @model_validator(mode="after")
    def _negatives_within_are_some_of_all(self) -> Self:
        if self.cma is not None and self.cma.within_negatives > self.negatives:
            raise ValueError("method.cma.within_negatives are the first of method.negatives, which are fewer")
        return self


Method = Annotated[SwAV | BarlowTwins | BYOL | SimSiam | Classification | AVID, Field(discriminator="name")]
