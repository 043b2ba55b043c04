"""Weights are a function of (seed, name) alone."""

import math
from typing import Literal

import pytest
import torch
from torch import nn

from pipeline.models.heads import ProjectionHead, Prototypes
from pipeline.models.trunk import build_trunk
from pipeline.parallel.initialize import initialize
from pipeline.recipe.method import Head
from pipeline.recipe.trunk import Trunk


def make(device: str = "cpu") -> nn.Module:
    with torch.device(device):
        trunk = build_trunk(Trunk(name="regnety_tiny"))
        head = ProjectionHead(trunk.feature_dim, Head(hidden=(16,), output=8))
        return nn.ModuleDict({"trunk": trunk, "head": head, "prototypes": Prototypes(8, 12)})


def test_a_module_built_on_meta_and_filled_equals_one_built_at_once() -> None:
    whole = make()
    initialize(whole, seed=3)
    late = make("meta").to_empty(device="cpu")
    for tensor in late.state_dict().values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    initialize(late, seed=3)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, late.state_dict()[name]), name


def test_a_part_draws_what_the_whole_draws_and_the_global_state_is_untouched() -> None:
    whole, other = make(), make()
    before = torch.random.get_rng_state()
    initialize(whole, seed=3)
    initialize(other, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    first = whole.state_dict()["trunk.stem.conv.weight"]
    assert not torch.equal(first, other.state_dict()["trunk.stem.conv.weight"])
    # He et al. by fan-out: 3 * 3 * 32 outputs.
    assert float(first.std()) == pytest.approx(math.sqrt(2 / 288), rel=0.1)
    norms = whole.state_dict()["prototypes.weight"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(12))


def test_batchnorm_without_affine_starts_as_the_identity() -> None:
    norm = nn.BatchNorm1d(3, affine=False)
    norm.running_var.fill_(7), norm.running_mean.fill_(7)  # type: ignore[union-attr]
    initialize(nn.Sequential(norm), seed=0)
    x = torch.randn(4, 3)
    torch.testing.assert_close(norm.eval()(x), x, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_blocks_of_a_resnet_start_as_their_shortcuts_on_request(
    name: Literal["resnet18", "resnet50"],
) -> None:
    for asked in (True, False):
        trunk = build_trunk(Trunk(name=name, zero_init_residual=asked))
        initialize(nn.ModuleDict({"trunk": trunk}), seed=3)
        block = trunk.get_submodule("layer4.1").eval()
        x = torch.randn(2, trunk.feature_dim, 2, 2)
        assert torch.equal(block(x), x.relu()) == asked


def test_a_kind_without_a_rule_is_refused() -> None:
    with pytest.raises(TypeError, match="LayerNorm"):
        initialize(nn.Sequential(nn.LayerNorm(3)), seed=0)
