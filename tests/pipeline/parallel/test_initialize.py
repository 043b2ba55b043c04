"""Weights are a function of (seed, name) alone."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from cluster.errors import UserError
from pipeline.models.heads import ProjectionHead, Prototypes
from pipeline.models.trunk import build_trunk
from pipeline.parallel.initialize import initialize
from pipeline.recipe.method import Head
from pipeline.recipe.trunk import Architecture


def make(device: str = "cpu") -> nn.Module:
    with torch.device(device):
        trunk = build_trunk(Architecture(name="regnety_tiny"))
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
        trunk = build_trunk(Architecture(name=name, zero_init_residual=asked))
        initialize(nn.ModuleDict({"trunk": trunk}), seed=3)
        block = trunk.get_submodule("layer4.1").eval()
        x = torch.randn(2, trunk.feature_dim, 2, 2)
        assert torch.equal(block(x), x.relu()) == asked


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.RMSNorm(3), nn.InstanceNorm2d(3, affine=True)]
)
def test_norms_start_as_the_identity(norm: nn.Module) -> None:
    for parameter in norm.parameters():
        nn.init.constant_(parameter, 7)
    initialize(nn.Sequential(norm), seed=0)
    assert norm.get_parameter("weight").tolist() == [1, 1, 1]
    assert all(
        float(value) == 0 for name, each in norm.named_parameters() if name == "bias" for value in each
    )


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_of_any_dimension_are_drawn_by_fan_out(kind: type[nn.Conv3d]) -> None:
    layer = kind(20, 30, 3)
    initialize(nn.Sequential(layer), seed=0)
    outputs = 30 * layer.weight[0, 0].numel()
    assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / outputs), rel=0.1)
    assert layer.bias is not None and not layer.bias.any()


def test_an_embedding_is_drawn_and_keeps_its_padding() -> None:
    layer = nn.Embedding(50, 20, padding_idx=3)
    initialize(nn.Sequential(layer), seed=0)
    assert float(layer.weight.detach().std()) == pytest.approx(1, rel=0.1)
    assert not layer.weight[3].any()


class Small(nn.Module):
    """A trunk that holds a parameter and a buffer itself."""

    feature_dim, memory_format = 3, torch.contiguous_format

    def __init__(self, *, persistent: bool = True) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.full((1, 200), torch.nan))
        self.register_buffer("places", torch.full((2, 3), torch.nan), persistent=persistent)

    def blocks_by_stage(self) -> list[list[nn.Module]]:
        return []

    def zero_init_norms(self) -> list[nn.Module]:
        return []


class Says(Small):
    def initial_value(self, name: str, normal: Tensor) -> Tensor:
        return 0.02 * normal if name == "token" else torch.arange(6.0).view(2, 3)


def test_what_a_trunk_holds_itself_starts_as_it_says() -> None:
    one, other = nn.ModuleDict({"trunk": Says()}), nn.ModuleDict({"trunk": Says()})
    initialize(one, seed=0), initialize(other, seed=1)  # type: ignore[func-returns-value]
    first, second = one["trunk"], other["trunk"]
    assert float(first.token.std()) == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(first.token, second.token)
    assert first.places.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_kind_without_a_rule_is_refused() -> None:
    attention = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(
        UserError, match=r"initialise in_proj_bias, in_proj_weight of 0, a MultiheadAttention: g"
    ):
        initialize(attention, seed=0)
    with pytest.raises(
        UserError, match="initialise places, token of trunk, a Small: give that class a method"
    ):
        initialize(nn.ModuleDict({"trunk": Small()}), seed=0)
    with pytest.raises(UserError, match=r"trunk holds places, which .* with persistent=True"):
        initialize(nn.ModuleDict({"trunk": Says(persistent=False)}), seed=0)
