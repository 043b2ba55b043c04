"""How others call the tensors of a ResNet or a RegNetY. Shapes and meaning are the same everywhere.

Ours are timm's names, for a ResNet torchvision's: those need no table. The others are written down from their
authors' code: VISSL's and ClassyVision's RegNet, torchvision's, transformers' `RegNetModel` and
`ResNetModel`; and the ResNets that lightly puts into an `nn.Sequential`, torchvision's and its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

# What wrappers put between the names of modules, and where VISSL cuts the stages of its sharded trunks.
_WRAPPED = re.compile(
    r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|block\d+-part\d+)\."
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to name a trunk's tensors.

    Attributes:
        family: whose trunks are called so.
        stem: their names of the modules before the first block, and ours; the first convolution first.
        block: their name of a module in a block; `{any}` is a number that says nothing.
        first: the number of the first stage, and of its first block.
        parts: what `{part}` may be, and our name of it.
    """

    family: Literal["resnet", "regnet"]
    stem: Mapping[str, str]
    block: str
    first: tuple[int, int] = (0, 0)
    parts: Mapping[str, str]

    @property
    def mark(self) -> str:
        """The tensor by which such a trunk is found, whatever stands before it."""
        return f"{next(iter(self.stem))}.weight"

    def ours(self, name: str) -> str:
        """Our name of a tensor of theirs; one that is no tensor of theirs stays as it is."""
        module, _, tensor = name.rpartition(".")
        if module in self.stem:
            return f"{self.stem[module]}.{tensor}"
        found = self._pattern.fullmatch(module)
        if found is None or found["part"] not in self.parts:
            return name
        stage, block = int(found["stage"]) - self.first[0], int(found["block"]) - self.first[1]
        return self._ours(stage, block, f"{self.parts[found['part']]}.{tensor}")

    def theirs(self, names: Iterable[str]) -> dict[str, str]:
        """Their names of tensors of ours, by ours. Only where `block` has no `{any}`."""
        stem = {ours: theirs for theirs, ours in self.stem.items()}
        parts = {ours: theirs for theirs, ours in self.parts.items()}
        own = re.compile(
            r"s(?P<stage>\d+)\.b(?P<block>\d+)\.(?P<part>.+)"
            if self.family == "regnet"
            else r"layer(?P<stage>\d+)\.(?P<block>\d+)\.(?P<part>.+)"
        )
        found = {}
        for name in names:
            module, _, tensor = name.rpartition(".")
            if module in stem:
                found[name] = f"{stem[module]}.{tensor}"
            elif within := own.fullmatch(module):
                block = int(within["block"]) - (self.family == "regnet") + self.first[1]
                where = self.block.format(
                    stage=int(within["stage"]) - 1 + self.first[0], block=block, part=parts[within["part"]]
                )
                found[name] = f"{where}.{tensor}"
        return found

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        number, rest = r"\d+", re.escape(self.block)
        for group, what in (("stage", number), ("block", number), ("part", ".+")):
            rest = rest.replace(rf"\{{{group}\}}", f"(?P<{group}>{what})")
        return re.compile(rest.replace(r"\{any\}", number))

    def _ours(self, stage: int, block: int, rest: str) -> str:
        if self.family == "regnet":
            return f"s{stage + 1}.b{block + 1}.{rest}"
        return f"layer{stage + 1}.{block}.{rest}"


def without_wrappers(name: str) -> str:
    """A tensor's name as its network has it: what torch.compile, FSDP and others put into it is left out."""
    return _WRAPPED.sub("", name)


_NORMED = {"convolution": "conv", "normalization": "bn"}  # in transformers
_TRANSFORMERS_BLOCK = "encoder.stages.{stage}.layers.{block}.{part}"
TRANSFORMERS_REGNET = Layout(
    family="regnet",
    stem={f"embedder.embedder.{theirs}": f"stem.{ours}" for theirs, ours in _NORMED.items()},
    block=_TRANSFORMERS_BLOCK,
    parts={
        f"{part}.{theirs}": f"{ours_part}.{ours}"
        for part, ours_part in {
            "layer.0": "conv1",
            "layer.1": "conv2",
            "layer.3": "conv3",
            "shortcut": "downsample",
        }.items()
        for theirs, ours in _NORMED.items()
    }
    | {"layer.2.attention.0": "se.fc1", "layer.2.attention.2": "se.fc2"},
)
TRANSFORMERS_RESNET = Layout(
    family="resnet",
    stem={"embedder.embedder.convolution": "conv1", "embedder.embedder.normalization": "bn1"},
    block=_TRANSFORMERS_BLOCK,
    parts={
        f"layer.{number}.{theirs}": f"{ours}{number + 1}"
        for number in range(3)
        for theirs, ours in _NORMED.items()
    }
    | {"shortcut.convolution": "downsample.0", "shortcut.normalization": "downsample.1"},
)
_CLASSY_BLOCK = {
    "f.a.0": "conv1.conv",
    "f.a.1": "conv1.bn",
    "f.b.0": "conv2.conv",
    "f.b.1": "conv2.bn",
}
_VISSL = Layout(
    family="regnet",
    stem={"_feature_blocks.conv1.stem.0": "stem.conv", "_feature_blocks.conv1.stem.1": "stem.bn"},
    block="_feature_blocks.res{any}.block{stage}-{block}.{part}",
    first=(1, 0),
    parts=_CLASSY_BLOCK
    | {
        "f.se.excitation.0": "se.fc1",
        "f.se.excitation.2": "se.fc2",
        "f.c": "conv3.conv",
        "f.final_bn": "conv3.bn",
        "proj": "downsample.conv",
        "bn": "downsample.bn",
    },
)
_TORCHVISION_REGNET = Layout(
    family="regnet",
    stem={"stem.0": "stem.conv", "stem.1": "stem.bn"},
    block="trunk_output.block{any}.block{stage}-{block}.{part}",
    first=(1, 0),
    parts=_CLASSY_BLOCK
    | {
        "f.se.fc1": "se.fc1",
        "f.se.fc2": "se.fc2",
        "f.c.0": "conv3.conv",
        "f.c.1": "conv3.bn",
        "proj.0": "downsample.conv",
        "proj.1": "downsample.bn",
    },
)
_RESNET_PARTS = {part: part for number in (1, 2, 3) for part in (f"conv{number}", f"bn{number}")}
_RESNET_PARTS |= {
    f"{shortcut}.{i}": f"downsample.{i}" for shortcut in ("downsample", "shortcut") for i in (0, 1)
}
_LIGHTLY_RESNET = Layout(
    family="resnet",
    stem={"conv1": "conv1", "bn1": "bn1"},
    block="layer{stage}.{block}.{part}",
    first=(1, 0),
    parts=_RESNET_PARTS,
)
# With ReLU and pooling between the stem and the first stage, as torchvision's has them, and without.
_IN_SEQUENTIAL = [
    Layout(
        family="resnet",
        stem={"0": "conv1", "1": "bn1"},
        block="{stage}.{block}.{part}",
        first=(first, 0),
        parts=_RESNET_PARTS,
    )
    for first in (4, 2)
]
LAYOUTS = (
    _VISSL,
    _TORCHVISION_REGNET,
    TRANSFORMERS_REGNET,
    TRANSFORMERS_RESNET,
    _LIGHTLY_RESNET,
    *_IN_SEQUENTIAL,
)
