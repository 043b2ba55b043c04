"""Trunks of timm's: `trunk.name: timm/convnext_tiny`. Their tensors have timm's names.

A model of timm's becomes a trunk by a class of its own kind that declares what `Trunk` lists; so do those of
its modules that hold tensors which no rule of `initialize` draws. Proven are ConvNeXts and ViTs; of others,
what cannot be drawn or coupled is refused by name.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from cluster.errors import UserError

PREFIX = "timm/"
_RULED = (_ConvNd, _BatchNorm, nn.Linear, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_DEVIATION = 0.02  # of tokens and positions, as timm draws them
_LAYER_SCALE = 1e-6  # as in ConvNeXt
_DRAWN = {"cls_token", "reg_token", "dist_token", "pos_embed"}
_ZERO = {"GlobalResponseNorm"}  # starts as the identity


def timm_trunk(name: str) -> nn.Module:
    """A model of timm's without its classifier, as a trunk; its weights are to be drawn.

    Args:
        name: "timm/…".

    Raises:
        UserError: if timm is not installed, has no such model, or there is no rule to draw its tensors.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for another torch
        raise UserError(
            f"trunk.name {name} needs timm, which cannot be imported ({error}): pip install "
            "'seer-pipeline[timm]', and torchvision from where torch is from"
        ) from error
    wanted = name.removeprefix(PREFIX)
    if not timm.is_model(wanted):
        near = difflib.get_close_matches(wanted, timm.list_models(), n=3)
        hint = (
            f"did you mean {' or '.join(PREFIX + each for each in near)}?" if near else "see its list_models"
        )
        raise UserError(f"trunk.name {name}: timm {timm.__version__} has no such model; {hint}")
    model = _made(name)
    for path, module in model.named_modules():
        _give_rule(module, f"{name}: {path or type(module).__name__}")
    model.__class__ = _as(_Trunk, type(model))  # type: ignore[arg-type]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    # One alone embeds patches, and all after it has no pixels.
    model.memory_format = torch.channels_last if convolutions > 1 else torch.contiguous_format
    trunk: nn.Module = model
    return trunk


def own_name(name: str) -> tuple[str, dict[str, Any]]:
    """What timm calls a trunk, and what else its `create_model` is told: whether images have any size, where
    it has to be, as of a ViT.
    """
    import timm

    own = name.removeprefix(PREFIX)
    with unset_fake_temporarily(), torch.device("meta"):
        model = timm.create_model(own, num_classes=0)
    any_size = "dynamic_img_size" in inspect.signature(type(model).__init__).parameters
    return own, {"dynamic_img_size": True} if any_size else {}


def _made(name: str) -> Any:
    """The model. Where tensors are fake its own become so afterwards, for timm reads some as it builds."""
    import timm

    own, arguments = own_name(name)
    with unset_fake_temporarily() as fake, torch.device("meta") if fake else contextlib.nullcontext():
        model = timm.create_model(own, num_classes=0, **arguments)
    for module in model.modules() if fake else ():
        for key, tensor in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype)))
        for key, tensor in list(module.named_buffers(recurse=False)):
            setattr(module, key, torch.empty(tensor.shape, dtype=tensor.dtype))
    return model


def classifier_name(name: str) -> str:
    """What the last layer of a model of timm's with classes is called."""
    import timm

    last: str = timm.get_pretrained_cfg(name.removeprefix(PREFIX)).classifier
    return last


class _Drawn:
    """See `pipeline.parallel.initialize.OwnValues`."""

    def initial_value(self, name: str, normal: Tensor) -> Tensor:
        if name in _DRAWN:
            return normal * _DEVIATION
        return torch.full_like(normal, _LAYER_SCALE if name == "gamma" else 0.0)


class _Trunk(_Drawn):
    """See `pipeline.models.trunk.Trunk`. Without a classifier, timm's `forward` gives pooled features."""

    memory_format: torch.memory_format

    @property
    def feature_dim(self) -> int:
        width: int = self.head_hidden_size  # type: ignore[attr-defined]
        return width

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = super().forward(images)  # type: ignore[misc]
        return features.to(torch.promote_types(features.dtype, torch.float32))

    def blocks_by_stage(self) -> Sequence[Any]:
        blocks = getattr(self, "blocks", None)  # a ViT's
        if isinstance(blocks, nn.Sequential) and not isinstance(blocks[0], nn.Sequential):
            return [blocks]
        stages = [getattr(stage, "blocks", None) for stage in getattr(self, "stages", [])]  # a ConvNeXt's
        return [stage for stage in stages if isinstance(stage, nn.Sequential)]

    def zero_init_norms(self) -> Sequence[nn.Module]:
        return []


def _give_rule(module: nn.Module, where: str) -> None:
    held = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    if not held or isinstance(module, _RULED):
        return
    if type(module).__name__ not in _ZERO and (unknown := held.keys() - _DRAWN - {"gamma"}):
        raise UserError(
            f"trunk.name {where}, a {type(module).__name__}, holds {', '.join(sorted(unknown))}, which "
            "cannot be initialised here: choose a ConvNeXt or a ViT, such as timm/convnext_tiny"
        )
    module.__class__ = _as(_Drawn, type(module))  # type: ignore[arg-type]


@cache
def _as(what: type, kind: type) -> type:
    """A class of both, under the name that timm gave: that is what messages show."""
    return type(kind.__name__, (what, kind), {"__module__": kind.__module__})
