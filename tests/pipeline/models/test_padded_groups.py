"""The benchmark's experiment with padded groups computes what the published shapes compute."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from pipeline.models.regnet import RegNet
from pipeline.recipe.trunk import RegNetParameters

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from padded_groups import pad_groups


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_padded_groups_change_neither_features_nor_gradients_nor_the_state(
    memory_format: torch.memory_format,
) -> None:
    torch.manual_seed(0)
    parameters = RegNetParameters(depth=4, w_0=16, w_a=12.0, w_m=1.5, group_width=5)
    plain = RegNet(parameters, stem="low_resolution").double().to(memory_format=memory_format)
    padded = copy.deepcopy(plain)
    assert pad_groups(padded) == 4
    assert {k: v.shape for k, v in padded.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64).to(memory_format=memory_format)
    features = [trunk(images) for trunk in (plain, padded)]
    torch.testing.assert_close(features[1], features[0], rtol=1e-11, atol=1e-11)
    for each in features:
        each.square().sum().backward()
    for (name, ours), theirs in zip(padded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=name)
