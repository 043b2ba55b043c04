"""The trunks for clips and for sound are those of AVID's code."""

from __future__ import annotations

import pytest
import torch

from pipeline.models.audio_convnet import AudioConvNet
from pipeline.models.r2plus1d import R2Plus1D
from pipeline.models.trunk import build_trunk, declared
from pipeline.recipe.trunk import Architecture


@pytest.mark.parametrize(
    ("section", "parameters"),
    [
        ({"name": "r2plus1d_10"}, 7_015_616),
        ({"name": "r2plus1d_18"}, 15_379_136),
        ({"name": "r2plus1d_34"}, 28_861_632),
        ({"name": "conv2d_10"}, 4_725_696),
    ],
)
def test_trunks_have_the_parameters_of_the_originals(section: dict[str, object], parameters: int) -> None:
    with torch.device("meta"):
        trunk = build_trunk(Architecture.model_validate(section))
        assert sum(each.numel() for each in trunk.parameters()) == parameters
    assert declared(trunk).feature_dim == 512
    assert all(layer.bias is None for layer in trunk.modules() if isinstance(layer, torch.nn.Conv3d))


def test_maps_are_those_that_a_linear_probe_is_put_on() -> None:
    """Those of 64 channels have 16 times as many."""
    video, audio = R2Plus1D(10, width=4), AudioConvNet(width=4)
    clip = {name: tuple(each.shape[1:]) for name, each in video.maps(torch.zeros(1, 3, 8, 224, 224)).items()}
    sound = {name: tuple(each.shape[1:]) for name, each in audio.maps(torch.zeros(1, 1, 200, 257)).items()}
    assert clip == {
        "conv2x": (4, 8, 56, 56),
        "conv3x": (8, 4, 28, 28),
        "conv4x": (16, 2, 14, 14),
        "conv5x": (32, 1, 7, 7),
    }
    assert sound == {
        "conv2x": (4, 50, 65),
        "conv3x": (8, 25, 33),
        "conv4x": (16, 13, 17),
        "conv5x": (32, 13, 17),
    }


def test_features_are_the_largest_of_the_last_map() -> None:
    for network, shape in (
        (R2Plus1D(10, width=4), (2, 3, 4, 32, 32)),
        (AudioConvNet(width=4), (2, 1, 40, 33)),
    ):
        x = torch.randn(shape)
        features, last = network.eval()(x), network.maps(x)["conv5x"]
        assert torch.equal(features, last.flatten(2).amax(2))


def test_low_resolution_keeps_maps_of_small_clips_and_short_sounds() -> None:
    video = build_trunk(Architecture(name="r2plus1d_10", stem="low_resolution", width=4))
    audio = build_trunk(Architecture(name="conv2d_10", stem="low_resolution", width=4))
    assert isinstance(video, R2Plus1D) and isinstance(audio, AudioConvNet)
    assert video.maps(torch.zeros(1, 3, 8, 112, 112))["conv5x"].shape == (1, 32, 1, 7, 7)
    assert audio.maps(torch.zeros(1, 1, 100, 129))["conv5x"].shape == (1, 32, 13, 17)
