"""What a recipe says of its trunk."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from cluster.typed_yaml import Place, Section

Stem = Literal["imagenet", "low_resolution", "low_resolution_padded"]


class RegNetParameters(Section):
    """The design space of Radosavovic et al., 2020: widths from a quantised line, w_j = w_0 + w_a j.

    The bounds lie far beyond SEER's 10 billion parameters: what an exported trunk says of itself may come
    from anybody.
    """

    depth: Annotated[int, Field(gt=0, le=256)]
    w_0: Annotated[int, Field(gt=0, le=16_384)]
    w_a: Annotated[float, Field(gt=0, le=16_384)]
    w_m: Annotated[float, Field(ge=1.01, le=16)]
    group_width: Annotated[int, Field(gt=0, le=16_384)]


Named = Literal[
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
    "r2plus1d_10",
    "r2plus1d_18",
    "r2plus1d_34",
    "conv2d_10",
]
NAMES: tuple[str, ...] = get_args(Named)


def _known(name: Any) -> Any:
    # Of timm's a name alone: no address to download from, and no path.
    if name in NAMES or (isinstance(name, str) and name.startswith("timm/") and name[5:].isidentifier()):
        return name
    near = difflib.get_close_matches(str(name), NAMES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"there is no such trunk; {hint}Allowed: {', '.join(NAMES)}, and timm/MODEL")


TrunkName = Annotated[Named | str, BeforeValidator(_known)]


class Architecture(Section):
    """The network that is kept: a published size by name, or `regnet_y` with `regnet` parameters; or a model
    of timm's, `timm/convnext_tiny`, where that is installed.

    The stem "low_resolution" keeps the resolution of small images: a 3x3 convolution of stride 1, and no
    pooling, as lightly has it for CIFAR. A ResNet's "low_resolution_padded" pads by 2 where that pads by 1,
    as solo-learn's: maps of 34, 17, 9 and 5 pixels where that has 32, 16, 8 and 4.
    An R(2+1)D network takes clips, and `conv2d_10` spectrograms; their "low_resolution" leaves out the first
    pooling, or the stride in its place. `width` are the channels of their first stage, 64 by default.
    `init_from` starts its weights from an exported trunk, or from a file of weights that others publish,
    instead of the seed; a run that goes on does not read it again. `zero_init_residual` starts every block of
    a ResNet as its shortcut: the gamma of its last BatchNorm is 0.
    """

    name: TrunkName
    stem: Stem = "imagenet"
    regnet: RegNetParameters | None = None
    zero_init_residual: bool = False
    init_from: Place | None = None
    width: Annotated[int, Field(gt=0, le=1024)] | None = None
    unwritten: ClassVar[frozenset[str]] = frozenset({"width"})

    @property
    def is_timms(self) -> bool:
        """Whether the network is a model of timm's."""
        return self.name.startswith("timm/")

    @property
    def takes(self) -> Literal["images", "clips", "spectrograms"]:
        """What the network's inputs are."""
        if self.name == "conv2d_10":
            return "spectrograms"
        return "clips" if self.name.startswith("r2plus1d") else "images"

    @model_validator(mode="after")
    def _only_some_have_a_width(self) -> Self:
        if self.width is not None and self.takes == "images":
            raise ValueError("`width` goes with name: r2plus1d_10, r2plus1d_18, r2plus1d_34 or conv2d_10")
        return self

    @model_validator(mode="after")
    def _only_resnets_start_as_shortcuts(self) -> Self:
        if self.zero_init_residual and not self.name.startswith("resnet"):
            raise ValueError("`zero_init_residual` goes with name: resnet18 or resnet50")
        return self

    @model_validator(mode="after")
    def _timms_have_their_own_stems(self) -> Self:
        if self.is_timms and self.stem != "imagenet":
            raise ValueError(f"{self.name} has the stem that timm gives it: leave `stem` out")
        return self

    @model_validator(mode="after")
    def _only_resnets_are_padded(self) -> Self:
        if self.stem == "low_resolution_padded" and not self.name.startswith("resnet"):
            raise ValueError("stem: low_resolution_padded goes with name: resnet18 or resnet50")
        return self

    @model_validator(mode="after")
    def _parameters_belong_to_regnet_y(self) -> Self:
        if (self.name == "regnet_y") != (self.regnet is not None):
            raise ValueError("`regnet` parameters go with name: regnet_y, and only with it")
        return self
