"""What a recipe says of its method: a section each. `title` is the method's name for people."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

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
    name: Literal["swav"]
    head: Head
    prototypes: PositiveInt
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
    name: Literal["simsiam"]
    projector: tuple[PositiveInt, ...] = Field(min_length=1)
    predictor: PositiveInt | None
    predictor_lr_decays: bool = False
    stop_gradient: bool = True


Method = Annotated[SwAV | BarlowTwins | BYOL | SimSiam, Field(discriminator="name")]
