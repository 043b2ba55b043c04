"""What is in a recipe: every key that `configs/pretrain` and `configs/transfer` may hold."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.typed_yaml import Section

Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]


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
    """Crops of one size, cut by RandomResizedCrop, flipped, and coloured alike."""

    count: PositiveInt
    size: PositiveInt
    scale: tuple[Fraction, Fraction]
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    flip_probability: Probability = 0.5
    photometric: Photometric = Photometric()


class Data(Section):
    """What is read, and how a sample becomes crops.

    `batch_size` is the coupled batch: the one that Sinkhorn and BatchNorm see, over all ranks.
    """

    root: str
    sealed: str | None = None
    view: str | None = None
    batch_size: PositiveInt
    window: PositiveInt = 131_072
    crops: tuple[CropGroup, ...] = Field(min_length=1)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)


class RegNetParameters(Section):
    """The design space of Radosavovic et al., 2020: widths from a quantised line, w_j = w_0 + w_a j."""

    depth: PositiveInt
    w_0: PositiveInt
    w_a: PositiveFloat
    w_m: Annotated[float, Field(gt=1)]
    group_width: PositiveInt


class Trunk(Section):
    """The network that is kept: a published size by name, or `regnet_y` with `regnet` parameters.

    `init_from` starts its weights from an exported trunk, or from a checkpoint of timm's or VISSL's, instead
    of the seed; a run that goes on does not read it again. `zero_init_residual` starts every block of a
    ResNet as its shortcut: the gamma of its last BatchNorm is 0.
    """

    name: Literal[
        "regnet_y",
        "regnety_tiny",
        "regnety_200mf",
        "regnety_400mf",
        "regnety_600mf",
        "regnety_800mf",
        "regnety_1_6gf",
        "regnety_3_2gf",
        "regnety_4gf",
        "regnety_6_4gf",
        "regnety_8gf",
        "regnety_12gf",
        "regnety_16gf",
        "regnety_32gf",
        "regnety_64gf",
        "regnety_128gf",
        "regnety_256gf",
        "regnety_10b",
        "resnet18",
        "resnet50",
    ]
    stem: Literal["imagenet", "low_resolution"] = "imagenet"
    regnet: RegNetParameters | None = None
    zero_init_residual: bool = False
    init_from: str | None = None

    @model_validator(mode="after")
    def _only_resnets_start_as_shortcuts(self) -> Self:
        if self.zero_init_residual and not self.name.startswith("resnet"):
            raise ValueError("`zero_init_residual` goes with name: resnet18 or resnet50")
        return self

    @model_validator(mode="after")
    def _parameters_belong_to_regnet_y(self) -> Self:
        if (self.name == "regnet_y") != (self.regnet is not None):
            raise ValueError("`regnet` parameters go with name: regnet_y, and only with it")
        return self


class Head(Section):
    """The projection MLP: trunk features → hidden layers → output."""

    hidden: tuple[PositiveInt, ...]
    output: PositiveInt = 128
    batch_norm: bool = True


class SwAV(Section):
    """Caron et al., 2020 (https://arxiv.org/abs/2006.09882); SEER uses it with 16,000 prototypes."""

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

    name: Literal["byol"]
    projector: tuple[PositiveInt, ...] = Field(min_length=1)
    predictor: PositiveInt | None
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.996
    stop_gradient: bool = True
    shared_weights: bool = False


class SimSiam(Section):
    """Chen & He, 2021 (https://arxiv.org/abs/2011.10566).

    `projector` are the widths of its layers, `predictor` that of the predictor's hidden layer. Without
    `stop_gradient`, or without a predictor (null), everything collapses to one point, as the paper shows.
    """

    name: Literal["simsiam"]
    projector: tuple[PositiveInt, ...] = Field(min_length=1)
    predictor: PositiveInt | None
    stop_gradient: bool = True


class Optim(Section):
    """The optimizer and its schedule: linear warm-up from `warmup_lr` to `lr`, then cosine to `final_lr`, or
    constant. `lr` is the peak, not scaled by the batch size; that of biases and norms is `lr_bias` if given,
    at every step in the same proportion. With `clip_trust` no layer of LARS moves faster than at `lr`.
    """

    name: Literal["sgd", "larc", "lars", "adamw"]
    lr: PositiveFloat
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    warmup_lr: NonNegativeFloat = 0.0
    final_lr: NonNegativeFloat = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegativeFloat = 0.0
    trust: PositiveFloat = 0.001
    clip_trust: bool = False
    lr_bias: PositiveFloat | None = None
    decay_bias_and_norm: bool = False
    clip_norm: PositiveFloat | None = None

    @model_validator(mode="after")
    def _only_lars_clips(self) -> Self:
        if self.clip_trust and self.name != "lars":
            raise ValueError("optim.clip_trust goes with optim.name: lars")
        return self


# Of `train`: these change no number beyond rounding, and may be others when a run goes on.
LAYOUT = ("strategy", "shard_ranks", "cpu_offload", "checkpointing", "compile")


class Train(Section):
    """How long, in what arithmetic, and what lies where. Exactly one of `steps` and `epochs`.

    `checkpointing` recomputes activations in the backward pass: of every block ("full"), or, for each stage
    of the trunk, of the runs of blocks that end at these numbers: SEER-10B has [[2], [7], [9, 17], []].
    `shard_ranks` are the ranks that share one copy of the parameters, all by default; the GPUs of one node
    keep the gathering within it. `cpu_offload` keeps parameters and optimizer in host memory.
    A step whose loss or gradient is not finite, or whose loss is `spike_deviations` above the last ones, is
    skipped; after `max_skipped_steps` in a row the run goes back to a checkpoint and passes over the data
    since, `max_rollbacks` times at most and once from the same checkpoint.
    """

    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    accumulate: PositiveInt = 1
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    sync_bn_samples: PositiveInt | None = None
    checkpointing: Literal["none", "full"] | tuple[tuple[PositiveInt, ...], ...] = "none"
    compile: bool = False
    strategy: Literal["ddp", "fsdp2", "fairscale"] = "ddp"
    shard_ranks: PositiveInt | None = None
    cpu_offload: bool = False
    max_skipped_steps: PositiveInt = 3
    spike_deviations: PositiveFloat = 20.0
    max_rollbacks: NonNegativeInt = 2

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        return self

    @model_validator(mode="after")
    def _only_fsdp2_has_them(self) -> Self:
        if self.strategy != "fsdp2" and (self.shard_ranks is not None or self.cpu_offload):
            raise ValueError("train.shard_ranks and train.cpu_offload go with train.strategy: fsdp2")
        if self.strategy == "fairscale" and self.precision == "fp64":
            raise ValueError("train.strategy: fairscale has no fp64 parameters: use fsdp2 or ddp")
        return self


class Probe(Section):
    """A weighted kNN on labelled datasets, every so many steps; it changes nothing in the training."""

    train: str
    test: str
    every_steps: PositiveInt
    image_size: PositiveInt
    k: PositiveInt = 20
    temperature: PositiveFloat = 0.1
    max_samples: PositiveInt = 10_000


class Run(Section):
    """Where and how: nothing here changes a number, so none of it is part of a stage's key.

    `resident` decodes all images at the start and keeps them in the device's memory, where crops are then
    cut: for small images of one size, which a GPU trains on faster than a CPU decodes them.
    """

    folder: str = "runs"
    name: str | None = None
    nodes: PositiveInt = 1
    ranks_per_node: PositiveInt | None = None
    workers: NonNegativeInt = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resident: bool = False
    log_every: PositiveInt = 10
    profile: Annotated[str, Field(pattern=r"^\d+:\d+$")] | None = None  # from after one step to another
    hang_seconds: PositiveFloat = 300.0  # without a step: the ranks' stacks are written down, and they end
    checkpoint_minutes: PositiveFloat | None = None  # by Young/Daly: 10 to 60, from the cost of a save
    checkpoint_every_steps: PositiveInt | None = None
    keep_last: PositiveInt = 2
    keep_every_steps: PositiveInt | None = None

    @model_validator(mode="after")
    def _profile_has_steps(self) -> Self:
        first, last = map(int, (self.profile or "1:2").split(":"))
        if not 0 < first < last:
            raise ValueError(
                f"profile {self.profile} holds no step: give the first, from 1, and a later last"
            )
        return self


class PretrainRecipe(Section):
    """Everything `submit pretrain` needs."""

    seed: NonNegativeInt = 0
    data: Data
    trunk: Trunk
    method: Annotated[SwAV | BarlowTwins | BYOL | SimSiam, Field(discriminator="name")]
    optim: Optim
    train: Train
    probe: Probe | None = None
    run: Run = Run()


class KnnRecipe(Section):
    """Weighted kNN of Wu et al., 2018 (https://arxiv.org/abs/1805.01978), section 3.4."""

    k: tuple[PositiveInt, ...] = (10, 20, 100, 200)
    temperature: PositiveFloat = 0.1


class LinearRecipe(Section):
    """Logistic regression on frozen features; regularisation is chosen on a split of the training set."""

    regularisation: tuple[NonNegativeFloat, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    max_iterations: PositiveInt = 200
    seed: NonNegativeInt = 0
