"""Weights that others publish pass to our names, and a run starts from any of them."""

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_training import make_dataset, make_recipe
from torch import Tensor, nn

from cluster.errors import UserError
from cluster.rank.torch_dist import World
from pipeline.checkpoint.files import latest, read_tensors
from pipeline.data.evaluation import Preprocessing
from pipeline.distributed.sharded import named_tensors, whole
from pipeline.models.regnet import PRESETS, widths_and_depths
from pipeline.models.trunk import build_trunk
from pipeline.recipe.trunk import Architecture
from pipeline.train.loop import pretrain
from pipeline.train.setup import set_up
from pipeline.trunks.export import export_trunk
from pipeline.trunks.files import TrunkSpec, load_trunk, save_trunk
from pipeline.trunks.interop import read_weights, warm_start
from pipeline.trunks.layouts import LAYOUTS as NAMINGS
from pipeline.trunks.layouts import without_wrappers

TINY = Architecture(name="regnety_tiny")


# VISSL's trunk, written from its `RegNet` and `RegNetFSDP` (vissl/models/trunks/regnet.py, regnet_fsdp.py)
# and from ClassyVision's `AnyNet` and `SqueezeAndExcitationLayer` (classy_vision/models): the names of their
# modules, and their arithmetic.
class VisslSqueeze(nn.Module):
    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(width, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, width, 1), nn.Sigmoid()]
        self.excitation = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excitation(F.adaptive_avg_pool2d(x, 1))


class VisslTransform(nn.Sequential):
    def __init__(self, before: int, width: int, stride: int, group_width: int) -> None:
        super().__init__()
        groups = width // group_width
        self.a = nn.Sequential(nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        grouped = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.b = nn.Sequential(grouped, nn.BatchNorm2d(width), nn.ReLU())
        self.se = VisslSqueeze(width, round(0.25 * before))
        self.c = nn.Conv2d(width, width, 1, bias=False)
        self.final_bn = nn.BatchNorm2d(width)


class VisslBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int, group_width: int) -> None:
        super().__init__()
        if stride != 1 or before != width:
            self.proj = nn.Conv2d(before, width, 1, stride=stride, bias=False)
            self.bn = nn.BatchNorm2d(width)
        self.f = VisslTransform(before, width, stride, group_width)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.bn(self.proj(x)) if hasattr(self, "proj") else x
        return F.relu(shortcut + self.f(x))


class VisslTrunk(nn.Module):
    """`parts`: the blocks at which each stage of a sharded trunk is cut; None for a trunk that is not."""

    def __init__(self, name: str, *, parts: list[list[int]] | None = None) -> None:
        super().__init__()
        widths, depths = widths_and_depths(PRESETS[name])
        stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        )
        blocks: dict[str, nn.Module] = {"conv1": nn.Sequential()}
        blocks["conv1"].add_module("stem", stem)
        before = 32
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            container = blocks[f"res{stage + 1}"] = nn.Sequential()
            ends = [depth] if parts is None else [*parts[stage - 1], depth]
            for number in range(depth):
                first = number == 0
                stride, group_width = 2 if first else 1, min(PRESETS[name].group_width, width)
                block = VisslBlock(before if first else width, width, stride, group_width)
                target = container
                if parts is not None:
                    part = f"block{stage}-part{sum(end <= number for end in ends)}"
                    if part not in dict(container.named_children()):
                        container.add_module(part, nn.Sequential())
                    target = container.get_submodule(part)
                target.add_module(f"block{stage}-{number}", block)
            before = width
        self._feature_blocks = nn.ModuleDict(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self._feature_blocks.values():
            x = block(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def from_vissl(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {NAMINGS[0].ours(without_wrappers(name)): tensor for name, tensor in tensors.items()}


def from_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.fc.")}


def randomise(network: Any) -> Any:
    """Weights and running statistics of which no two are alike, and features that are not all zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif tensor.ndim > 1:
                fan_in = tensor[0].numel()
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan_in**0.5)
            else:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network.double().eval()


def ours(name: str, weights: dict[str, Tensor]) -> nn.Module:
    network = build_trunk(Architecture.model_validate({"name": name})).double().eval()
    network.load_state_dict(weights, strict=True)
    return network


IMAGES = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LAYOUTS = [
    ("regnety_tiny", None),
    ("regnety_200mf", None),
    ("regnety_200mf", [[], [], [1, 3], [2, 7]]),
]


@pytest.mark.parametrize(("name", "parts"), LAYOUTS)
@torch.no_grad()
def test_a_trunk_of_vissl_gives_equal_features_here(name: str, parts: list[list[int]] | None) -> None:
    theirs = randomise(VisslTrunk(name, parts=parts))
    features = theirs(IMAGES)
    assert float(features.std()) > 0.01
    here = ours(name, from_vissl(theirs.state_dict()))
    torch.testing.assert_close(here(IMAGES), features, rtol=1e-10, atol=1e-12)


# Names in VISSL's released checkpoints, as the converters of timm (timm/models/regnet.py) and of transformers
# (models/regnet/convert_regnet_seer_10b_to_pytorch.py) read them.
@pytest.mark.parametrize(
    ("theirs", "here"),
    [
        ("_feature_blocks.conv1.stem.0.weight", "stem.conv.weight"),
        ("_feature_blocks.conv1.stem.1.running_var", "stem.bn.running_var"),
        ("_feature_blocks.res2.block1-0.proj.weight", "s1.b1.downsample.conv.weight"),
        ("_feature_blocks.res2.block1-0.bn.num_batches_tracked", "s1.b1.downsample.bn.num_batches_tracked"),
        ("_feature_blocks.res3.block2-6.f.a.0.weight", "s2.b7.conv1.conv.weight"),
        ("_feature_blocks.res4.block3-16.f.b.1.bias", "s3.b17.conv2.bn.bias"),
        ("_feature_blocks.res4.block3-part1.block3-16.f.se.excitation.2.bias", "s3.b17.se.fc2.bias"),
        ("_feature_blocks.res5.block4-part0.block4-0.f.c.weight", "s4.b1.conv3.conv.weight"),
        ("_feature_blocks.res5.block4-0.f.final_bn.running_mean", "s4.b1.conv3.bn.running_mean"),
    ],
)
def test_names_of_released_checkpoints(theirs: str, here: str) -> None:
    assert list(from_vissl({theirs: torch.zeros(1)})) == [here]


def timm_shapes(widths: Iterable[int], depths: Iterable[int], group_width: int) -> dict[str, tuple[int, ...]]:
    """A RegNetY of timm's, as its `RegNet`, `Bottleneck`, `ConvNormAct` and `SEModule` name its tensors."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_norm(name: str, *shape: int) -> None:
        shapes[f"{name}.conv.weight"] = shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = shape[:1]
        shapes[f"{name}.bn.num_batches_tracked"] = ()

    conv_norm("stem", 32, 3, 3, 3)
    before = 32
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
        for block in range(1, depth + 1):
            name, squeezed = f"s{stage}.b{block}", round(before / 4)
            conv_norm(f"{name}.conv1", width, before, 1, 1)
            conv_norm(f"{name}.conv2", width, min(group_width, width), 3, 3)
            shapes[f"{name}.se.fc1.weight"], shapes[f"{name}.se.fc1.bias"] = (
                (squeezed, width, 1, 1),
                (squeezed,),
            )
            shapes[f"{name}.se.fc2.weight"], shapes[f"{name}.se.fc2.bias"] = (width, squeezed, 1, 1), (width,)
            conv_norm(f"{name}.conv3", width, width, 1, 1)
            if block == 1:
                conv_norm(f"{name}.downsample", width, before, 1, 1)
            before = width
    shapes["head.fc.weight"], shapes["head.fc.bias"] = (1000, before), (1000,)
    return shapes


@pytest.mark.parametrize(
    ("name", "widths", "depths", "group_width"),
    [
        ("regnety_16gf", (224, 448, 1232, 3024), (2, 4, 11, 1), 112),
        ("regnety_128gf", (528, 1056, 2904, 7392), (2, 7, 17, 1), 264),
        ("regnety_256gf", (746, 1492, 4103, 10444), (2, 7, 17, 1), 373),
    ],
)
def test_names_and_shapes_are_those_of_timm_but_for_the_classifier(
    name: str, widths: tuple[int, ...], depths: tuple[int, ...], group_width: int
) -> None:
    with torch.device("meta"):
        tensors = {key: torch.empty(shape) for key, shape in timm_shapes(widths, depths, group_width).items()}
        here = build_trunk(Architecture.model_validate({"name": name})).state_dict()
    weights = from_timm(tensors)
    assert {key: value.shape for key, value in weights.items()} == {
        key: value.shape for key, value in here.items()
    }


@torch.no_grad()
def test_a_model_of_timm_gives_equal_features_here_and_the_other_way_round() -> None:
    timm = pytest.importorskip("timm")
    theirs = randomise(timm.create_model("regnety_002"))
    here = ours("regnety_200mf", from_timm(theirs.state_dict()))
    pooled = theirs.forward_features(IMAGES).mean((2, 3))
    torch.testing.assert_close(here(IMAGES), pooled, rtol=1e-10, atol=1e-12)
    headless = timm.create_model("regnety_002", num_classes=0).double().eval()
    headless.load_state_dict(here.state_dict(), strict=True)
    torch.testing.assert_close(headless(IMAGES), pooled, rtol=1e-10, atol=1e-12)


def tiny_weights() -> dict[str, Tensor]:
    return dict(randomise(build_trunk(TINY)).float().state_dict())


def as_vissl(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tiny trunk's tensors under the names of VISSL's."""
    theirs = VisslTrunk("regnety_tiny").state_dict()
    return {name: weights[here] for name, here in zip(theirs, from_vissl(theirs), strict=True)}


def write(kind: str, folder: Path) -> Path:
    """The tiny trunk as a file of every kind that a run may start from."""
    weights, classifier = (
        tiny_weights(),
        {"head.fc.weight": torch.zeros(10, 5), "head.fc.bias": torch.zeros(10)},
    )
    path = folder / f"weights.{'safetensors' if kind == 'timm safetensors' else 'pth'}"
    match kind:
        case "ours":
            network = build_trunk(TINY)
            network.load_state_dict(weights)
            view = Preprocessing(image_size=16, resize=16, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
            spec = TrunkSpec(architecture=TINY, preprocessing=view, feature_dim=network.feature_dim)
            save_trunk(network, spec, folder / "trunk")
            return folder / "trunk"
        case "timm safetensors":
            save_file(weights | classifier, path)
        case "timm checkpoint":
            torch.save({"state_dict": weights | classifier, "epoch": 3, "arch": "regnety"}, path)
        case "flat, without counts, before zip":
            few = {name: value for name, value in weights.items() if "num_batches" not in name}
            torch.save(few, path, _use_new_zipfile_serialization=False)
        case "vissl":
            model = {"trunk": as_vissl(weights), "heads": {"0.projection_head.0.weight": torch.zeros(2, 2)}}
            saved = {
                "iteration": 244_000,
                "classy_state_dict": {"base_model": {"model": model, "meters": {}}},
            }
            torch.save(saved, path)
        case _:
            raise ValueError(kind)
    return path


KINDS = ["ours", "timm safetensors", "timm checkpoint", "flat, without counts, before zip", "vissl"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_starts_a_trunk(kind: str, tmp_path: Path) -> None:
    section = TINY.model_copy(update={"init_from": str(write(kind, tmp_path))})
    network = build_trunk(section)
    warm_start(network, read_weights(section))
    for name, tensor in network.state_dict().items():
        if "num_batches" not in name or "counts" not in kind:
            assert torch.equal(tensor, tiny_weights()[name]), name


class Bomb:
    """A pickle that runs something when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def told(section: Architecture) -> str:
    with pytest.raises(UserError) as error:
        read_weights(section)
    message = str(error.value)
    assert message.startswith("trunk.init_from: ") and "\n" not in message and len(message) < 500
    return message


def test_S1_a_checkpoint_that_holds_more_than_tensors_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "hostile.torch"
    section = TINY.model_copy(update={"init_from": str(path)})
    for hostile in (Bomb(mark), argparse.Namespace(lr=0.1)):
        for zipped in (True, False):
            saved = {"state_dict": tiny_weights(), "args": hostile}
            torch.save(saved, path, _use_new_zipfile_serialization=zipped)
            assert "holds more than tensors" in told(section) and "as safetensors" in told(section)
    assert not mark.exists()


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    section = TINY.model_copy(update={"init_from": str(path)})
    assert f"there is no file {path}" in told(section)
    weights = tiny_weights()
    save_file(weights, path)
    other = section.model_copy(update={"name": "regnety_200mf"})
    assert re.search(
        r"not hold the tensors of regnety_200mf: s1\.\S+ is \[16, .* there and \[24, .* here, and \d+ more",
        told(other),
    )
    save_file({name: value for name, value in weights.items() if name != "s2.b1.se.fc1.bias"}, path)
    assert "regnety_tiny: it lacks s2.b1.se.fc1.bias; set" in told(section)
    save_file(weights | {"s9.b1.conv1.conv.weight": torch.zeros(1)}, path)
    assert "it has s9.b1.conv1.conv.weight, which is not known here; set" in told(section)
    path.write_bytes(path.read_bytes()[:1000])
    assert "is not a safetensors file" in told(section)
    broken = section.model_copy(update={"init_from": str(tmp_path / "broken.pth")})
    torch.save({"state_dict": weights}, tmp_path / "broken.pth")
    (tmp_path / "broken.pth").write_bytes((tmp_path / "broken.pth").read_bytes()[:5000])
    assert "checkpoint" in told(broken)
    torch.save({"epoch": 3}, tmp_path / "broken.pth")
    assert "holds no tensors under names" in told(broken)


def test_a_run_starts_from_the_file_once_and_goes_on_without_it(tmp_path: Path) -> None:
    data = make_dataset(tmp_path)
    path = write("vissl", tmp_path)
    changes: dict[str, Any] = {"trunk": {"name": "regnety_tiny", "init_from": str(path)}}
    changes["optim"] = {"name": "sgd", "lr": 1e-12, "momentum": 0.0}  # what it starts from stays

    changes["run"] = {"workers": 0, "device": "cpu", "checkpoint_every_steps": 2}
    recipe = make_recipe(data, train={"steps": 4}, **changes)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain(recipe, whole)
    expected = tiny_weights()
    for step in (2, 4):
        trunk = read_tensors(whole / f"checkpoints/step-{step:08d}", prefix="trunk.")
        for name, tensor in trunk.items():
            if "running" not in name and "num_batches" not in name:
                torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-9)
        assert int(trunk["stem.bn.num_batches_tracked"]) > 7
    warm = json.loads((whole / "init_from.json").read_text())
    assert warm["path"] == str(path) and len(warm["sha256"]) == 64

    # As if it had been stopped after two steps; then the file goes away.
    cut.mkdir()
    shutil.copytree(whole, cut, dirs_exist_ok=True)
    shutil.rmtree(cut / "checkpoints/step-00000004")
    (cut / "checkpoints/latest").write_text("step-00000002\n")
    path.unlink()
    pretrain(recipe, cut)
    one, other = (read_tensors(latest(run) or run, prefix="") for run in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())

    spec = export_trunk(cut, tmp_path / "exported")
    assert spec.architecture == TINY and spec.provenance["init_from"] == warm["sha256"]
    assert load_trunk(tmp_path / "exported").feature_dim == spec.feature_dim
    with pytest.raises(UserError, match=r"trunk\.init_from: there is no file"):
        pretrain(recipe, tmp_path / "new")
    assert not (tmp_path / "new").exists()  # what cannot begin claims no folder


def _started(group: Any, data: Path, folder: Path, strategy: str, path: Path) -> dict[str, Any]:
    """The trunk that a run on these ranks starts from, put together."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    cpu = torch.device("cpu")
    world = World(rank=rank, size=size, local_rank=rank, device=cpu, group=group, control=group)
    trunk = {"name": "regnety_tiny", "init_from": str(path)}
    recipe = make_recipe(data, trunk=trunk, train={"steps": 4, "strategy": strategy})
    method = set_up(recipe, folder, world).method
    return {name: whole(tensor.detach(), tensor).numpy() for name, tensor in named_tensors(method.trunk)}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fairscale"])
def test_every_strategy_starts_from_the_same_weights(
    strategy: str, tmp_path: Path, run_on_ranks: Callable[..., list[Any]]
) -> None:
    data, path = make_dataset(tmp_path), write("vissl", tmp_path)
    expected = tiny_weights()
    for found in run_on_ranks(2, _started, data, tmp_path / "run", strategy, path):
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(torch.from_numpy(tensor), expected[name]), name


@pytest.mark.parametrize(
    "prefix", ["module.", "module.backbone.", "module.encoder.", "_orig_mod.", "backbone.", "encoder_q."]
)
def test_a_trunk_behind_a_prefix_is_found_and_heads_are_left_out(prefix: str, tmp_path: Path) -> None:
    section = Architecture.model_validate({"name": "resnet18", "init_from": str(tmp_path / "c.pth")})
    tensors = build_trunk(section).state_dict()
    beside = {f"{prefix}fc.0.weight": torch.ones(2, 2), "module.projection_head.0.weight": torch.ones(2)}
    follower = {f"momentum_{prefix}{name}": -tensor for name, tensor in tensors.items()}
    saved = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": saved | beside | follower, "epoch": 1}, tmp_path / "c.pth")
    found = read_weights(section)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_larger_trunk_behind_a_prefix_is_another(tmp_path: Path) -> None:
    section = Architecture.model_validate({"name": "resnet18", "init_from": str(tmp_path / "c.pth")})
    tensors = {f"module.{name}": tensor for name, tensor in build_trunk(section).state_dict().items()}
    torch.save(tensors | {"module.layer1.2.conv1.weight": torch.ones(1)}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"it has layer1\.2\.conv1\.weight, which is not known here"):
        read_weights(section)


def test_weights_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    section = Architecture.model_validate({"name": "resnet18", "init_from": str(tmp_path / "c.pth")})
    tensors = build_trunk(section).state_dict()
    for changed, told in [
        (tensors | {"bn1.weight": tensors["bn1.weight"] * torch.nan}, r"bn1\.weight of .* not finite"),
        ({f"x_{name}": tensor for name, tensor in tensors.items()}, "save its tensors under our names"),
        (tensors | {"stem.is_low_resolution": torch.ones(1)}, r"set trunk\.stem=low_resolution"),
    ]:
        torch.save(changed, tmp_path / "c.pth")
        with pytest.raises(UserError, match=told):
            read_weights(section)
