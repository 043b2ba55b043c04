"""From a recipe's `trunk` section to the network."""

from __future__ import annotations

from pipeline.models.regnet import PRESETS, RegNet
from pipeline.models.resnet import ResNet
from pipeline.recipe.trunk import Trunk


def build_trunk(section: Trunk) -> RegNet | ResNet:
    """The trunk of a recipe, with torch's default weights; `initialize` draws reproducible ones.

    Returns:
        A module from images (N, 3, H, W) to pooled float features (N, feature_dim), with the attribute
        `feature_dim`. Built under `torch.device("meta")` it takes no memory.
    """
    if section.regnet is not None:
        return RegNet(section.regnet, stem=section.stem)
    if section.name == "resnet18":
        return ResNet(18, stem=section.stem, zero_init_residual=section.zero_init_residual)
    if section.name == "resnet50":
        return ResNet(50, stem=section.stem, zero_init_residual=section.zero_init_residual)
    return RegNet(PRESETS[section.name], stem=section.stem)
