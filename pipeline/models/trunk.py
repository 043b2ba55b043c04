"""What a trunk says of itself, and the trunks that a recipe can name.

To add one: a file with its network, which declares what `Trunk` lists, a row in `TRUNKS`, and its name in the
recipe's `trunk` section.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from cluster.errors import UserError
from pipeline.models.audio_convnet import AudioConvNet
from pipeline.models.r2plus1d import R2Plus1D
from pipeline.models.regnet import PRESETS, RegNet
from pipeline.models.resnet import ResNet
from pipeline.models.timm_trunk import timm_trunk
from pipeline.recipe.trunk import Architecture


@runtime_checkable
class Trunk(Protocol):
    """What a network declares, to be initialised, recomputed, compiled and sharded as a trunk.

    Its `forward` takes a batch (N, ...) to pooled float features (N, feature_dim), and draws nothing at
    random. Parameters and buffers that it holds itself, outside torch's own layers, need an `initial_value`
    (`pipeline.parallel.initialize.OwnValues`).

    Attributes:
        feature_dim: length of a feature vector.
        memory_format: of its inputs, and of its weights of as many dimensions: `torch.channels_last` of 4,
            `torch.channels_last_3d` of 5, or `torch.contiguous_format`. Whoever calls it need not mind.
    """

    feature_dim: int
    memory_format: torch.memory_format

    def blocks_by_stage(self) -> Sequence[Iterable[nn.Module]]:
        """Its residual or attention blocks, in the order in which they are called, in the groups that papers
        call stages: what is recomputed, compiled and gathered at a time. Empty if it has none.

        A stage that is an `nn.Sequential` is called as a whole, so that several of its blocks may be
        recomputed together; the blocks of any other (an `nn.ModuleList`, a list) are called one by one.
        """
        ...

    def zero_init_norms(self) -> Sequence[nn.Module]:
        """Normalisations whose gain starts at 0, so that their blocks start as their shortcuts; or none."""
        ...


_DECLARED = ("feature_dim", "memory_format", "blocks_by_stage", "zero_init_norms")
_DIMENSIONS = {torch.channels_last: 4, torch.channels_last_3d: 5}


def declared(network: nn.Module) -> Trunk:
    """What a network says of itself.

    Raises:
        UserError: if it leaves something out.
    """
    missing = [name for name in _DECLARED if not hasattr(network, name)]
    if missing:
        raise UserError(
            f"{type(network).__name__} is no trunk: it declares no {', '.join(missing)}; "
            "see pipeline.models.trunk.Trunk"
        )
    return cast(Trunk, network)


def _regnet(section: Architecture) -> RegNet:
    return RegNet(section.regnet or PRESETS[section.name], stem=section.stem)


def _r2plus1d(depth: Literal[10, 18, 34]) -> Callable[[Architecture], R2Plus1D]:
    return lambda it: R2Plus1D(depth, width=it.width or 64, pool=it.stem == "imagenet")


TRUNKS: dict[str, Callable[[Architecture], Trunk]] = {
    "regnet_y": _regnet,
    **dict.fromkeys(PRESETS, _regnet),
    "resnet18": lambda it: ResNet(18, stem=it.stem, zero_init_residual=it.zero_init_residual),
    "resnet50": lambda it: ResNet(50, stem=it.stem, zero_init_residual=it.zero_init_residual),
    "r2plus1d_10": _r2plus1d(10),
    "r2plus1d_18": _r2plus1d(18),
    "r2plus1d_34": _r2plus1d(34),
    "conv2d_10": lambda it: AudioConvNet(width=it.width or 64, stride=2 if it.stem == "imagenet" else 1),
}


def build_trunk(section: Architecture) -> nn.Module:
    """The trunk of a recipe, with torch's default weights; `initialize` draws reproducible ones.

    Returns:
        A module that declares what `Trunk` lists. Built under `torch.device("meta")` it takes no memory.

    Raises:
        UserError: if a model of timm's cannot be had; see `timm_trunk`.
    """
    if section.is_timms:
        return timm_trunk(section.name)
    return cast(nn.Module, TRUNKS[section.name](section))


def choose_layout(trunk: nn.Module, *, channels_last: bool | None) -> None:
    """Let a trunk declare another layout than its own: before `arrange_weights` and `arrange_inputs`.

    Args:
        channels_last: whether the channels of a pixel lie side by side; None: as it declares.
    """
    if channels_last is None:
        return
    it = declared(trunk)
    if not channels_last:
        it.memory_format = torch.contiguous_format
    elif it.memory_format not in _DIMENSIONS:
        it.memory_format = torch.channels_last


def arrange_weights(trunk: nn.Module) -> None:
    """Lay a trunk's weights out in memory as it declares, in place."""
    memory_format = declared(trunk).memory_format
    for tensor in (*trunk.parameters(), *trunk.buffers()):
        if tensor.ndim == _DIMENSIONS.get(memory_format):
            tensor.data = tensor.data.to(memory_format=memory_format)


def arrange_inputs(trunk: nn.Module) -> None:
    """Let a trunk find every input laid out in memory as it declares."""

    def arrange(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            each.contiguous(memory_format=memory_format)
            if each.ndim == _DIMENSIONS.get(memory_format, each.ndim)
            else each
            for each in inputs
        )

    memory_format = declared(trunk).memory_format
    trunk.register_forward_pre_hook(arrange)
