"""The recipe of a training: pretraining, or fine-tuning with a method that learns from labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.job import DeviceName
from cluster.typed_yaml import Place, Section
from pipeline.recipe.data import Data, Fraction, Interpolation
from pipeline.recipe.method import Method
from pipeline.recipe.transfer import Test
from pipeline.recipe.trunk import Architecture

Momentum = Annotated[float, Field(ge=0, lt=1)]


class Optim(Section):
    """The optimizer and its schedule: linear warm-up from `warmup_lr` to `lr`, then cosine to `final_lr`,
    constant, or multistep: times `gamma` at each of the `milestones`, shares of the run. The cosine begins at
    `lr` when the warm-up ends; that of "cosine_of_run" began with the run, and is joined where it then is, as
    VISSL's composition [rescaled, fixed] has it. Step `warmup_steps` is the first after the warm-up, and of a
    cosine or a constant the first at `lr`; with `warmup_includes_peak` the step before it is, too, as SwAV's
    and solo-learn's code have it.
    `lr` is the peak, not scaled by the batch size; that of biases and norms is `lr_bias` if given, and that
    of a classifier's head, with its bias, `lr_head`, at every step in the same proportion. For the first
    `head_first` of the run, a share, only that head learns: the trunk's weights stay, and its BatchNorm's
    statistics follow the images. Then the optimizer begins anew, with all.
    `momentum` is that of SGD, LARC and LARS, `nesterov` SGD's, `betas` are those of Adam and AdamW; Adam's
    decay is part of the gradient, AdamW's is not.
    `exclude_bias_and_norm` keeps biases and norms out of the weight decay and of LARS's layer-wise rates.
    With `clip_trust` no layer of LARS moves faster than at `lr`.
    """

    unwritten: ClassVar[frozenset[str]] = frozenset({"head_first"})
    renamed: ClassVar[Mapping[str, str]] = {
        "decay_bias_and_norm": "exclude_bias_and_norm, with the opposite value"
    }

    name: Literal["sgd", "larc", "lars", "adam", "adamw"]
    lr: PositiveFloat
    schedule: Literal["cosine", "cosine_of_run", "constant", "multistep"] = "cosine"
    milestones: tuple[Fraction, ...] = ()
    gamma: PositiveFloat = 0.1
    warmup_steps: NonNegativeInt = 0
    warmup_includes_peak: bool = False
    warmup_lr: NonNegativeFloat = 0.0
    final_lr: NonNegativeFloat = 0.0
    momentum: Momentum = 0.9
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    trust: PositiveFloat = 0.001
    clip_trust: bool = False
    lr_bias: PositiveFloat | None = None
    lr_head: PositiveFloat | None = None
    head_first: Annotated[float, Field(gt=0, lt=1)] | None = None
    nesterov: bool = False
    exclude_bias_and_norm: bool = True
    clip_norm: PositiveFloat | None = None

    @model_validator(mode="after")
    def _only_lars_clips(self) -> Self:
        if self.clip_trust and self.name != "lars":
            raise ValueError("optim.clip_trust goes with optim.name: lars")
        return self

    @model_validator(mode="after")
    def _only_sgd_looks_ahead(self) -> Self:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("optim.nesterov goes with optim.name: sgd and a momentum")
        return self

    @model_validator(mode="after")
    def _milestones_go_with_multistep(self) -> Self:
        if (self.schedule == "multistep") != bool(self.milestones):
            raise ValueError(
                "optim.milestones, such as [0.3, 0.6], go with optim.schedule: multistep, and only with it"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("optim.milestones ascend")
        return self

    @model_validator(mode="after")
    def _momentum_is_not_a_beta(self) -> Self:
        adaptive = self.name in {"adam", "adamw"}
        if adaptive and self.momentum != type(self).model_fields["momentum"].default:
            raise ValueError(f"optim.momentum goes with sgd, larc and lars: {self.name} has optim.betas")
        if not adaptive and self.betas != type(self).model_fields["betas"].default:
            raise ValueError(f"optim.betas goes with adam and adamw: {self.name} has optim.momentum")
        return self


# Of `train`, what may be other when a run goes on: how it lies on its ranks, which changes no number beyond
# rounding, and when its guard gives up.
STEERING = (
    "strategy",
    "shard_ranks",
    "cpu_offload",
    "activation_checkpointing",
    "compile",
    "channels_last",
    "max_skipped_steps",
    "spike_deviations",
    "max_rollbacks",
)


class Train(Section):
    """How long, in what arithmetic, and what lies where. Exactly one of `steps` and `epochs`.

    `activation_checkpointing` recomputes activations in the backward pass: of every block ("full"), or, for
    each stage of the trunk, of the runs of blocks that end at these numbers: SEER-10B has [[2], [7], [9, 17],
    []].
    `channels_last` lays images and weights of convolutions out with the channels of a pixel side by side
    (true), or each channel's pixels (false); by default as the trunk declares: convolutional ones say true.
    Which is faster depends on the GPU and on the width of grouped convolutions.
    `shard_ranks` are the ranks that share one copy of the parameters, all by default; the GPUs of one node
    keep the gathering within it. `cpu_offload` keeps parameters and optimizer in host memory.
    A step whose loss or gradient is not finite, or whose loss is `spike_deviations` above the last ones, is
    skipped; after `max_skipped_steps` in a row the run goes back to a checkpoint and passes over the data
    since, `max_rollbacks` times at most and once from the same checkpoint.
    `init_from` is a run, or a checkpoint of one, whose trunks, heads and bank this one begins with: CMA
    begins where AVID has ended. A run that goes on does not read it again.
    """

    renamed: ClassVar[Mapping[str, str]] = {"checkpointing": "activation_checkpointing"}
    unwritten: ClassVar[frozenset[str]] = frozenset({"init_from", "channels_last"})

    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    accumulate: PositiveInt = 1
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    sync_bn_samples: PositiveInt | None = None
    activation_checkpointing: Literal["none", "full"] | tuple[tuple[PositiveInt, ...], ...] = "none"
    compile: bool = False
    channels_last: bool | None = None
    strategy: Literal["ddp", "fsdp2", "fairscale"] = "ddp"
    shard_ranks: PositiveInt | None = None
    cpu_offload: bool = False
    max_skipped_steps: PositiveInt = 3
    spike_deviations: PositiveFloat = 20.0
    max_rollbacks: NonNegativeInt = 2
    init_from: Place | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "give exactly one of train.steps and train.epochs, and null for the other: "
                f"{'train.steps=null' if self.epochs else 'train.steps=N'}"
            )
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

    train: Place
    test: Place
    every_steps: PositiveInt
    image_size: PositiveInt
    k: PositiveInt = 20
    temperature: PositiveFloat = 0.1
    max_samples: PositiveInt = 10_000


class Evaluation(Section):
    """How the trunk is shown images wherever it is scored: by the probe, and, as every export records, after
    the training.

    The short side is resized to `resize`, and the centre of `image_size` is cut: by default the probe's size
    or that of the largest crops, and from 96 pixels up 8/7 of it, as ImageNet's models are evaluated; smaller
    images are shown whole. `interpolation` is the filter that resizes them; by default that of the largest
    crops. Sources differ: SwAV and SimSiam train and evaluate with bilinear, BYOL with bicubic, and Barlow
    Twins trains with bicubic and evaluates with bilinear.
    """

    image_size: PositiveInt | None = None
    resize: PositiveInt | None = None
    interpolation: Interpolation | None = None

    @model_validator(mode="after")
    def _the_centre_is_inside(self) -> Self:
        if self.resize is not None and (self.image_size is None or self.resize < self.image_size):
            raise ValueError("evaluation.resize goes with an evaluation.image_size that is not larger")
        return self


class Run(Section):
    """Where and how: nothing here changes a number, so none of it is part of a stage's key.

    `resident` decodes all images at the start and keeps them in the device's memory, where crops are then
    cut: for small images of one size, which a GPU trains on faster than a CPU decodes them.
    A node reads ahead of its ranks from an object store, into memory or into the folder `cache` on its own
    disk: `cache_gib` at most, and half of what is free there. Windows of the shuffle that fit are read in
    ranges of some MB, others sample by sample; `submit plan` says which it will be.
    """

    folder: str = "runs"
    name: str | None = None
    nodes: PositiveInt = 1
    ranks_per_node: PositiveInt | None = None
    workers: NonNegativeInt = 2
    device: DeviceName = "auto"
    resident: bool = False
    cache: Place | None = None
    cache_gib: PositiveFloat = 8.0
    log_every: PositiveInt = 10
    profile: Annotated[str, Field(pattern=r"^\d+:\d+$")] | None = None  # from after one step to another
    hang_seconds: PositiveFloat = 300.0  # without a step: the ranks' stacks are written down, and they end
    checkpoint_minutes: PositiveFloat | None = None  # by Young/Daly: 10 to 60, from the cost of a save
    checkpoint_every_steps: PositiveInt | None = None
    keep_last: PositiveInt = 2
    keep_every_steps: PositiveInt | None = None
    start_over: bool = False  # from step 0, if the run had checkpoints and none of them is whole

    @model_validator(mode="after")
    def _cache_is_a_folder(self) -> Self:
        if "://" in (self.cache or ""):
            raise ValueError(f"cache {self.cache} is a URL: give a folder on the node's own disk")
        return self

    @model_validator(mode="after")
    def _profile_has_steps(self) -> Self:
        first, last = map(int, (self.profile or "1:2").split(":"))
        if not 0 < first < last:
            raise ValueError(
                f"profile {self.profile} holds no step: give the first, from 1, and a later last"
            )
        return self


class PretrainRecipe(Section):
    """Everything `submit pretrain` and `submit finetune` need. `audio_trunk` is AVID's second, for sound."""

    unwritten: ClassVar[frozenset[str]] = frozenset({"audio_trunk"})

    steers: ClassVar[dict[str, Any]] = {"run": True, "probe": True, "train": set(STEERING)}

    seed: NonNegativeInt = 0
    data: Data
    trunk: Architecture
    audio_trunk: Architecture | None = None
    method: Method
    optim: Optim
    train: Train
    probe: Probe | None = None
    evaluation: Evaluation = Evaluation()
    test: Test | None = None
    run: Run = Run()

    def identity(self) -> dict[str, Any]:
        """As of any section; a probe whose size decides on how the trunk is evaluated says so there."""
        found, largest = super().identity(), max((group.size for group in self.data.crops), default=None)
        if self.probe is not None and self.evaluation.image_size is None and self.probe.image_size != largest:
            found["evaluation"]["image_size"] = self.probe.image_size
        return found

    def trunk_section(self, which: str) -> Architecture:
        """What the trunk was built from that a method calls `which` among its `trunks`."""
        if which != "audio":
            return self.trunk
        if self.audio_trunk is None:
            raise ValueError(f"method {self.method.name} has no trunk for sound")
        return self.audio_trunk

    @model_validator(mode="after")
    def _only_a_classifier_is_tested(self) -> Self:
        if self.test is not None and not self.method.supervised:
            raise ValueError(f"test is for a classifier, and method {self.method.name} makes none: use probe")
        return self

    @model_validator(mode="after")
    def _only_a_classifier_has_a_head_to_begin_with(self) -> Self:
        if self.optim.head_first and not self.method.supervised:
            raise ValueError(
                f"optim.head_first is for a classifier, and method {self.method.name} makes none: "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _videos_are_shown_otherwise(self) -> Self:
        if not self.data.is_of_clips:
            return self
        for key, said in (("probe", self.probe), ("evaluation", self.evaluation != Evaluation())):
            if said:
                raise ValueError(
                    f"{key} is about images, and data.clip and data.audio are of videos: leave it out"
                )
        if self.run.resident:
            raise ValueError(
                "run.resident keeps images in memory, and data.clip and data.audio are of videos"
            )
        return self

    @model_validator(mode="after")
    def _sound_has_a_trunk_of_its_own(self) -> Self:
        if self.method.name != "avid":
            if self.train.init_from is not None:
                raise ValueError("train.init_from is for method.name: avid; others have trunk.init_from")
            if self.audio_trunk is not None:
                raise ValueError("audio_trunk goes with method.name: avid")
            shown = "clips" if self.data.clip else "spectrograms" if self.data.audio else "images"
            if self.trunk.takes != shown:
                raise ValueError(
                    f"trunk.name {self.trunk.name} takes {self.trunk.takes}, and data gives {shown}: "
                    "data.crops are images, data.clip gives clips and data.audio spectrograms"
                )
            return self
        if (
            self.audio_trunk is None
            or self.audio_trunk.takes != "spectrograms"
            or self.trunk.takes != "clips"
        ):
            raise ValueError(
                "method avid compares clips with their sound: give a trunk for clips, such as "
                "trunk.name: r2plus1d_18, and one for sound, audio_trunk.name: conv2d_10"
            )
        if self.data.clip is None or self.data.audio is None:
            raise ValueError("method avid compares clips with their sound: give data.clip and data.audio")
        if self.train.strategy == "fairscale" or self.train.cpu_offload:
            raise ValueError(
                "method avid keeps a bank in pieces, of which train.strategy fairscale and "
                "train.cpu_offload do not know: use ddp or fsdp2"
            )
        return self
