"""ResNet-18 and ResNet-50: the published parameter counts, and the stems."""

from typing import Literal

import pytest
import torch

from pipeline.models.resnet import ResNet
from pipeline.recipe.trunk import Stem


@pytest.mark.parametrize(("depth", "trunk", "feature_dim"), [(18, 11_176_512, 512), (50, 23_508_032, 2048)])
def test_published_sizes(depth: Literal[18, 50], trunk: int, feature_dim: int) -> None:
    with torch.device("meta"):
        network = ResNet(depth, stem="imagenet")
    assert sum(parameter.numel() for parameter in network.parameters()) == trunk
    assert network.feature_dim == feature_dim


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize(
    ("stem", "maps"), [("low_resolution", [32, 16, 8, 4]), ("low_resolution_padded", [34, 17, 9, 5])]
)
def test_low_resolution_stems_reduce_nothing_until_the_second_stage(
    depth: Literal[18, 50], stem: Stem, maps: list[int]
) -> None:
    """Lightly's, and solo-learn's, which pads by 2."""
    network = ResNet(depth, stem=stem).eval()
    sizes: list[int] = []
    for stage in (1, 2, 3, 4):
        hook = network.get_submodule(f"layer{stage}").register_forward_hook
        hook(lambda *found: sizes.append(found[-1].shape[-1]))
    with torch.no_grad():
        assert network(torch.randn(1, 3, 32, 32)).shape == (1, network.feature_dim)
    assert sizes == maps


def test_imagenet_stem_quarters_the_resolution() -> None:
    network = ResNet(18, stem="imagenet").eval()
    sizes: list[int] = []
    network.get_submodule("layer1").register_forward_hook(lambda *found: sizes.append(found[-1].shape[-1]))
    with torch.no_grad():
        network(torch.randn(1, 3, 64, 64))
    assert sizes == [16]
