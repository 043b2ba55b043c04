"""RegNetY: the published widths, depths and parameter counts, and a forward pass of each kind of stem."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.models.regnet import PRESETS, RegNet, widths_and_depths
from pipeline.models.trunk import build_trunk
from pipeline.recipe.trunk import NAMES, Architecture, RegNetParameters

# Stage widths and depths, and millions of parameters with a head of 1000 classes, as in timm's results.
# Up to 32GF: Radosavovic et al., 2020. 64GF: timm's `regnety_640`, transformers' `regnet-y-640-seer`. 128GF,
# 256GF and 10B: VISSL's configs/config/pretrain/{swav,seer}/models/regnet*.yaml, whose heads begin with 7392,
# 10444 and 28280. (What ClassyVision registers as `regnet_y_64gf` and `regnet_y_256gf`, of 2976 and 5088
# features, are not SEER's.) 10B has no count but "10 billion": the figure is a sum over its widths.
PUBLISHED: dict[str, tuple[tuple[int, ...], tuple[int, ...], float]] = {
    "regnety_200mf": ((24, 56, 152, 368), (1, 1, 4, 7), 3.16),
    "regnety_400mf": ((48, 104, 208, 440), (1, 3, 6, 6), 4.34),
    "regnety_600mf": ((48, 112, 256, 608), (1, 3, 7, 4), 6.06),
    "regnety_800mf": ((64, 128, 320, 768), (1, 3, 8, 2), 6.26),
    "regnety_1_6gf": ((48, 120, 336, 888), (2, 6, 17, 2), 11.20),
    "regnety_3_2gf": ((72, 216, 576, 1512), (2, 5, 13, 1), 19.44),
    "regnety_4gf": ((128, 192, 512, 1088), (2, 6, 12, 2), 20.65),
    "regnety_6_4gf": ((144, 288, 576, 1296), (2, 7, 14, 2), 30.58),
    "regnety_8gf": ((168, 448, 896, 2016), (2, 4, 10, 1), 39.18),
    "regnety_12gf": ((224, 448, 896, 2240), (2, 5, 11, 1), 51.82),
    "regnety_16gf": ((224, 448, 1232, 3024), (2, 4, 11, 1), 83.59),
    "regnety_32gf": ((232, 696, 1392, 3712), (2, 5, 12, 1), 145.05),
    "regnety_64gf": ((328, 984, 1968, 4920), (2, 5, 12, 1), 281.38),
    "regnety_128gf": ((528, 1056, 2904, 7392), (2, 7, 17, 1), 644.81),
    "regnety_256gf": ((746, 1492, 4103, 10444), (2, 7, 17, 1), 1282.60),
    "regnety_10b": ((2020, 4040, 11110, 28280), (2, 7, 17, 1), 9352.2),
}
# Millions of parameters as SEER's README prints them (vissl/projects/SEER): the trunk, with a head of d x d
# and d x 128. Its 250M for 64GF and 1.5B for 256GF fit no head that is known; the paper of 2021 gives 1.3B
# for the latter, which is the trunk.
WITH_SMALL_HEAD = {"regnety_32gf": 156, "regnety_128gf": 693, "regnety_10b": 10_000}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def by_hand(widths: tuple[int, ...], depths: tuple[int, ...], group_width: int) -> int:
    """Parameters of a trunk, from its published widths and nothing of ours."""
    total, before = 32 * 27 + 64, 32
    for width, depth in zip(widths, depths, strict=True):
        total += before * width + 2 * width  # the shortcut
        for block in range(depth):
            entering = before if block == 0 else width
            squeezed = round(entering / 4)
            total += entering * width + 9 * width * min(group_width, width) + width * width + 6 * width
            total += 2 * width * squeezed + squeezed + width
        before = width
    return total


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    widths, depths, millions = PUBLISHED[name]
    assert widths_and_depths(PRESETS[name]) == (widths, depths)
    with torch.device("meta"):
        trunk = build_trunk(Architecture.model_validate({"name": name}))
        head = nn.Linear(trunk.feature_dim, 1000)
    assert trunk.feature_dim == widths[-1]
    assert (count(trunk) + count(head)) / 1e6 == pytest.approx(
        millions, abs=0.1 if millions > 9000 else 0.006
    )
    assert count(trunk) == by_hand(widths, depths, PRESETS[name].group_width)
    if name in WITH_SMALL_HEAD:
        last = widths[-1]
        total = (count(trunk) + last * (last + 1) + 128 * (last + 1)) / 1e6
        digits = 0 if total < 1000 else -3
        assert round(total, digits) == WITH_SMALL_HEAD[name]


def test_every_name_of_the_recipe_is_built() -> None:
    explicit = {"depth": 3, "w_0": 16, "w_a": 8.0, "w_m": 2.0, "group_width": 8}
    with torch.device("meta"):
        for name in NAMES:
            values = {"name": name, "regnet": explicit if name == "regnet_y" else None}
            assert build_trunk(Architecture.model_validate(values)).feature_dim > 0


def test_tiny_is_tiny() -> None:
    trunk = RegNet(PRESETS["regnety_tiny"], stem="imagenet")
    assert len(trunk.blocks_by_stage()) == 4
    assert count(trunk) <= 100_000


@given(
    depth=st.integers(1, 30),
    w_0=st.integers(8, 300),
    w_a=st.floats(1.0, 300.0),
    w_m=st.floats(1.3, 3.0),
    group_width=st.integers(1, 400),
)
def test_widths_rise_and_groups_divide_them(
    depth: int, w_0: int, w_a: float, w_m: float, group_width: int
) -> None:
    parameters = RegNetParameters(depth=depth, w_0=w_0, w_a=w_a, w_m=w_m, group_width=group_width)
    widths, depths = widths_and_depths(parameters)
    assert sum(depths) == depth
    assert list(widths) == sorted(widths) and widths[0] > 0
    assert all(width % min(group_width, width) == 0 for width in widths)


@pytest.mark.parametrize(("stem", "last"), [("imagenet", 2), ("low_resolution", 4)])
def test_stems_keep_or_halve_the_resolution(stem: str, last: int) -> None:
    trunk = build_trunk(Architecture.model_validate({"name": "regnety_tiny", "stem": stem}))
    sizes: list[int] = []
    trunk.get_submodule("s4").register_forward_hook(lambda *found: sizes.append(found[-1].shape[-1]))
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    features = trunk.to(memory_format=torch.channels_last)(images)
    assert features.shape == (2, trunk.feature_dim)
    assert sizes == [last]


@pytest.mark.parametrize("name", ["regnety_tiny", "regnety_200mf", "regnety_800mf", "resnet18", "resnet50"])
def test_every_parameter_of_a_trunk_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    trunk = build_trunk(Architecture.model_validate({"name": name, "stem": "low_resolution"}))
    (trunk(torch.randn(2, 3, 16, 16)) * torch.randn(trunk.feature_dim)).sum().backward()
    for parameter_name, parameter in trunk.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), parameter_name
        assert bool(parameter.grad.any()), parameter_name


def test_features_are_float32_from_bfloat16_arithmetic_and_float64_from_float64() -> None:
    trunk = build_trunk(Architecture.model_validate({"name": "regnety_tiny"}))
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trunk(images).dtype == torch.float32
    assert trunk.double()(images.double()).dtype == torch.float64


def test_channels_last_changes_nothing_beyond_rounding() -> None:
    trunk = build_trunk(
        Architecture.model_validate({"name": "regnety_tiny", "stem": "low_resolution"})
    ).double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    plain = trunk(images)
    trunk = trunk.to(memory_format=torch.channels_last)
    permuted = trunk(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(permuted, plain, rtol=1e-10, atol=1e-12)


def test_the_squeeze_is_a_quarter_of_the_input_width() -> None:
    trunk = RegNet(PRESETS["regnety_200mf"], stem="imagenet")
    squeezed = [trunk.get_submodule(f"s{stage}.b1.se.fc1").weight.shape[0] for stage in (1, 2, 3, 4)]
    assert squeezed == [8, 6, 14, 38]
