"""`submit export --format`: folders that timm, transformers and ONNX's runtime read, with equal features.

The libraries are not among what the tests need: where one is missing, what it would read is held to what
`trunk.init_from` reads, and to the configuration that it asks for.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from cluster.errors import UserError
from pipeline.cli import app
from pipeline.data.evaluation import Preprocessing
from pipeline.models.regnet import PRESETS
from pipeline.models.trunk import build_trunk, declared
from pipeline.recipe.trunk import Architecture
from pipeline.trunks import formats
from pipeline.trunks.files import ExportedTrunk, Pixels, TrunkSpec, load_trunk, save_trunk
from pipeline.trunks.formats import Format, _timm_name, _write_onnx, save_as
from pipeline.trunks.interop import read_weights

VIEW = Preprocessing(image_size=56, resize=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
REGNET = {"depth": 5, "w_0": 16, "w_a": 12.0, "w_m": 1.5, "group_width": 8}
TRUNKS: dict[str, dict[str, Any]] = {
    "resnet18": {"name": "resnet18"},
    "resnet50": {"name": "resnet50"},
    "regnety_200mf": {"name": "regnety_200mf"},
    "regnet_y": {"name": "regnet_y", "regnet": REGNET},
}


def trunk_of(**section: Any) -> ExportedTrunk:
    """With weights and statistics of which no two are alike."""
    architecture = Architecture.model_validate(section)
    network = build_trunk(architecture)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(noise.abs() if name.endswith("running_var") else noise, alpha=0.02)
    spec = TrunkSpec(architecture=architecture, preprocessing=VIEW, feature_dim=declared(network).feature_dim)
    return ExportedTrunk(network, spec).eval()


@pytest.fixture(params=list(TRUNKS))
def trunk(request: pytest.FixtureRequest) -> ExportedTrunk:
    return trunk_of(**TRUNKS[request.param])


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def same(features: Tensor, trunk: ExportedTrunk, inputs: Tensor) -> None:
    expected = trunk(inputs).detach()
    assert float(expected.std()) > 1e-4
    torch.testing.assert_close(features, expected, rtol=2e-4, atol=1e-5)  # float32, in another order


@pytest.mark.parametrize("format_", ["timm", "transformers"])
def test_a_folder_comes_back_by_init_from_and_has_a_card(
    trunk: ExportedTrunk, tmp_path: Path, format_: Format
) -> None:
    save_as(format_, trunk.network, trunk.spec, tmp_path)
    architecture = trunk.spec.architecture
    assert isinstance(architecture, Architecture)
    found = read_weights(architecture.model_copy(update={"init_from": str(tmp_path)}))
    expected = trunk.network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    card = (tmp_path / "README.md").read_text()
    assert f"library_name: {format_}\n" in card and "path/of/this/folder" in card
    config = json.loads((tmp_path / "config.json").read_text())
    if format_ == "timm":
        assert config["pretrained_cfg"]["input_size"] == [3, 56, 56]
        assert config["pretrained_cfg"]["crop_pct"] == 0.875
        assert config["num_features"] == trunk.feature_dim and config["num_classes"] == 0
    else:
        assert config["hidden_sizes"][-1] == trunk.feature_dim
        shown = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert shown["size"] == {"shortest_edge": 64} and shown["resample"] == 3


def test_names_of_timm() -> None:
    names = {name: _timm_name(Architecture.model_validate({"name": name})) for name in PRESETS}
    assert {name: found[0] for name, found in names.items() if not found[1]} == {
        "regnety_200mf": "regnety_002",
        "regnety_400mf": "regnety_004",
        "regnety_600mf": "regnety_006",
        "regnety_800mf": "regnety_008",
        "regnety_1_6gf": "regnety_016",
        "regnety_3_2gf": "regnety_032",
        "regnety_4gf": "regnety_040",
        "regnety_6_4gf": "regnety_064",
        "regnety_8gf": "regnety_080",
        "regnety_12gf": "regnety_120",
        "regnety_16gf": "regnety_160",
        "regnety_32gf": "regnety_320",
        "regnety_64gf": "regnety_640",
        "regnety_128gf": "regnety_1280",
        "regnety_256gf": "regnety_2560",
    }
    ours = PRESETS["regnety_10b"]
    assert names["regnety_10b"][1]["depth"] == ours.depth and names["regnety_10b"][1]["w0"] == ours.w_0


def test_timm_makes_the_model_of_the_folder(trunk: ExportedTrunk, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    save_as("timm", trunk.network, trunk.spec, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    same(model(images()).detach(), trunk, images())
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["input_size"]) == (3, 56, 56) and tuple(data["mean"]) == VIEW.mean
    assert data["interpolation"] == "bicubic" and data["crop_pct"] == 0.875


def test_transformers_makes_the_model_of_the_folder(trunk: ExportedTrunk, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_as("transformers", trunk.network, trunk.spec, tmp_path)
    model, loaded = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loaded[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loaded
    same(model.eval()(images()).pooler_output.flatten(1).detach(), trunk, images())
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8)
    picture = Image.fromarray(pixels).resize((140, 180), Image.Resampling.BICUBIC)
    theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
    # They round after resizing, and cut a box of whole pixels.
    assert float((theirs - trunk.preprocess(picture)).abs().mean()) < 0.05


def test_the_runtime_of_onnx_gives_equal_features_for_batches_of_any_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    for number, section in enumerate([*TRUNKS.values(), {"name": "resnet18", "stem": "low_resolution"}]):
        trunk, out = trunk_of(**section), tmp_path / str(number)
        save_as("onnx", trunk.network, trunk.spec, out)
        session = runtime.InferenceSession(str(out / "trunk.onnx"))
        for count in (1, 5):
            (features,) = session.run(None, {"inputs": images(count).numpy()})
            same(torch.from_numpy(features), trunk, images(count))
        assert TrunkSpec.model_validate_json((out / "trunk.json").read_text()) == trunk.spec


class Program:
    """What torch's exporter returns."""

    def __init__(self, text: str) -> None:
        self._text = text

    def save(self, path: str, *, external_data: bool) -> None:
        Path(path).write_text(self._text)
        if external_data:
            Path(f"{path}.data").write_text(self._text)


@pytest.mark.parametrize("largest", [0, 1 << 30])
def test_an_onnx_file_is_never_found_half_written_or_beside_the_weights_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    trunk, path, replace = trunk_of(name="resnet18"), tmp_path / "trunk.onnx", Path.replace
    beside = [] if largest else ["trunk.onnx.data"]
    monkeypatch.setattr(formats, "_LARGEST_ONNX", largest)

    def write(text: str) -> None:
        monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Program(text))
        _write_onnx(trunk.network, trunk.spec, path)

    def found() -> dict[str, str]:
        return {each.name: each.read_text() for each in tmp_path.glob("trunk*")}

    def looked_at(source: Path, target: Path) -> Path:
        seen.append(found())
        return replace(source, target)

    write("old")
    assert found() == dict.fromkeys(["trunk.onnx", *beside], "old")
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", Mock(side_effect=OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            write("half")
    assert found() == dict.fromkeys(["trunk.onnx", *beside], "old")
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(Path, "replace", looked_at)
    write("new")
    assert seen == ([{"trunk.onnx": "old"}] if largest else [{beside[0]: "old"}, {beside[0]: "new"}])
    assert found() == dict.fromkeys(["trunk.onnx", *beside], "new")
    assert {each.name for each in tmp_path.iterdir()} == {"trunk.onnx", *beside}


def submit(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["export", *map(str, words)], prog_name="submit")
    return result.exit_code, result.stdout + result.stderr


def test_an_exported_trunk_is_written_once_more_and_nothing_is_overwritten(tmp_path: Path) -> None:
    trunk = trunk_of(name="regnety_200mf")
    save_trunk(trunk.network, trunk.spec, tmp_path / "trunk")
    words = [tmp_path / "trunk", tmp_path / "out", "--format", "transformers"]
    assert submit(*words) == (0, f"{tmp_path / 'out'}: regnety_200mf for transformers, 368 features\n")
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_trunk(tmp_path / "trunk").network.state_dict()["stem.conv.weight"]
    assert torch.equal(theirs["embedder.embedder.convolution.weight"], expected)
    status, told = submit(*words)
    assert status == 2 and "out already holds README.md: name another folder, or use --force" in told
    assert submit(*words, "--force")[0] == 0
    status, told = submit(*words, "--which", "teacher", "--force")
    assert status == 2 and "was exported already: leave --which and --interpolation out" in told
    status, told = submit(tmp_path / "trunk", tmp_path / "c", "--classifier", "--format", "timm")
    assert status == 2 and "leave --format out" in told


@pytest.mark.parametrize("format_", ["timm", "transformers"])
def test_what_another_library_has_not_is_refused_before_anything_is_written(
    tmp_path: Path, format_: Format
) -> None:
    for section, told in [
        ({"name": "resnet18", "stem": "low_resolution"}, "has no stem low_resolution, and would compute"),
        ({"name": "r2plus1d_10"}, f"{format_} has no r2plus1d_10: export it as onnx"),
    ]:
        trunk = trunk_of(**section)
        with pytest.raises(UserError, match=told):
            save_as(format_, trunk.network, trunk.spec, tmp_path / "out")
    pixels = TrunkSpec(architecture=Pixels(name="pixels"), preprocessing=VIEW, feature_dim=48)
    with pytest.raises(UserError, match="raw pixels are no network"):
        save_as(format_, torch.nn.Flatten(), pixels, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_onnx_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    trunk = trunk_of(name="regnety_200mf")
    with pytest.raises(UserError, match=r"--format onnx needs onnx and onnxscript: pip install '"):
        save_as("onnx", trunk.network, trunk.spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()
