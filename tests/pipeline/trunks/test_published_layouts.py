"""Files of weights as others publish them: their keys, exactly, start our trunks.

No file is downloaded: the names are written down here, apart from the tables that are tested, as the authors'
code makes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster.errors import UserError
from pipeline.models.trunk import build_trunk
from pipeline.recipe.trunk import Architecture
from pipeline.trunks.interop import read_weights

Tensors = dict[str, Tensor]
HEAD = {"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}
PROJECTOR = {"0.weight": torch.zeros(2, 2), "1.weight": torch.zeros(2), "3.weight": torch.zeros(2, 2)}


@cache
def resnet18() -> Tensors:
    network = build_trunk(Architecture(name="resnet18"))
    generator = torch.Generator().manual_seed(0)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return dict(network.state_dict())


@cache
def regnet() -> Tensors:
    network = build_trunk(Architecture(name="regnety_tiny"))
    generator = torch.Generator().manual_seed(0)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return dict(network.state_dict())


def behind(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def other(tensors: Mapping[str, Tensor]) -> Tensors:
    """What a follower holds."""
    return {name: -tensor for name, tensor in tensors.items()}


def renamed(tensors: Tensors, *changes: tuple[str, str]) -> Tensors:
    found = {}
    for name, tensor in tensors.items():
        for pattern, to in changes:
            name = re.sub(pattern, to, name)  # noqa: PLW2901
        found[name] = tensor
    return found


def in_sequential(tensors: Tensors, first: int) -> Tensors:
    """`nn.Sequential(*children)`: convolution, norm, and the stages from `first` on."""
    return {
        re.sub(
            r"^(conv1|bn1|layer(\d))\.",
            lambda found: f"{int(found[2]) - 1 + first}." if found[2] else f"{int(found[1] == 'bn1')}.",
            name,
        ): tensor
        for name, tensor in tensors.items()
    }


def transformers_resnet(tensors: Tensors) -> Tensors:
    stages = {f"layer{n}": f"encoder.stages.{n - 1}.layers" for n in range(1, 5)}
    found = {}
    for name, tensor in tensors.items():
        stage, _, rest = name.partition(".")
        if stage in stages:
            block, part, *more = rest.split(".")
            if part == "downsample":
                part = "shortcut." + ("convolution", "normalization")[int(more.pop(0))]
            else:
                kind = "convolution" if part.startswith("conv") else "normalization"
                part = f"layer.{int(part[-1]) - 1}.{kind}"
            found[".".join([stages[stage], block, part, *more])] = tensor
        else:
            kind = "convolution" if stage == "conv1" else "normalization"
            found[f"embedder.embedder.{kind}.{rest}"] = tensor
    return found


def of_regnet(tensors: Tensors, *, stem: tuple[str, str], block: str, parts: Mapping[str, str]) -> Tensors:
    """`block` has the numbers of a stage, counted from 0, of the next, and of a block, counted from 0."""
    found = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module.startswith("stem."):
            found[f"{stem[module == 'stem.bn']}.{leaf}"] = tensor
        else:
            stage, number, part = module.split(".", 2)
            at = block.format(int(stage[1:]) - 1, int(stage[1:]), int(number[1:]) - 1)
            found[f"{at}.{parts[part]}.{leaf}"] = tensor
    return found


def torchvision_regnet(tensors: Tensors) -> Tensors:
    parts = {
        f"conv{n}.{kind}": f"f.{'abc'[n - 1]}.{i}" for n in (1, 2, 3) for i, kind in enumerate(("conv", "bn"))
    }
    parts |= {"se.fc1": "f.se.fc1", "se.fc2": "f.se.fc2"}
    parts |= {"downsample.conv": "proj.0", "downsample.bn": "proj.1"}
    return of_regnet(
        tensors, stem=("stem.0", "stem.1"), block="trunk_output.block{1}.block{1}-{2}", parts=parts
    )


def transformers_regnet(tensors: Tensors) -> Tensors:
    kinds = {"conv": "convolution", "bn": "normalization"}
    places = {"conv1": "layer.0", "conv2": "layer.1", "conv3": "layer.3", "downsample": "shortcut"}
    parts = {f"{a}.{kind}": f"{b}.{kinds[kind]}" for a, b in places.items() for kind in kinds}
    parts |= {"se.fc1": "layer.2.attention.0", "se.fc2": "layer.2.attention.2"}
    stem = ("embedder.embedder.convolution", "embedder.embedder.normalization")
    return of_regnet(tensors, stem=stem, block="encoder.stages.{0}.layers.{2}", parts=parts)


def vissl_resnet(tensors: Tensors) -> dict[str, Any]:
    model = {"trunk": behind("_feature_blocks.", tensors), "heads": behind("0.clf.", PROJECTOR)}
    return {"phase_idx": 1, "classy_state_dict": {"base_model": {"model": model, "meters": {}}}}


RESNETS: dict[str, Callable[[Tensors], Any]] = {
    # facebookresearch/swav: swav_800ep_pretrain.pth.tar, and checkpoints of main_swav.py.
    "SwAV": lambda t: behind(
        "module.", t | behind("projection_head.", PROJECTOR) | {"prototypes.weight": t["bn1.bias"]}
    ),
    "SwAV's own checkpoint": lambda t: {
        "epoch": 3,
        "state_dict": behind("module.", t | behind("projection_head.", PROJECTOR)),
        "optimizer": {"state": {0: {"momentum_buffer": t["conv1.weight"]}}, "param_groups": [{"lr": 1.0}]},
    },
    # facebookresearch/barlowtwins: resnet50.pth, and checkpoint.pth.
    "Barlow Twins": lambda t: t,
    "Barlow Twins' checkpoint": lambda t: {
        "epoch": 9,
        "model": behind("module.backbone.", t)
        | behind("module.projector.", PROJECTOR)
        | behind("module.bn.", {"running_mean": t["bn1.bias"]}),
        "optimizer": {"state": {}},
    },
    # lucidrains/byol-pytorch, the usual one: DeepMind's own files are pickles of JAX, and are refused.
    "BYOL": lambda t: (
        behind("online_encoder.net.", t | HEAD)
        | behind("online_encoder.projector.", PROJECTOR)
        | behind("target_encoder.net.", other(t) | HEAD)
    ),
    "BYOL with its network beside": lambda t: (
        behind("net.", t | HEAD)
        | behind("online_encoder.net.", t | HEAD)
        | behind("target_encoder.net.", other(t) | HEAD)
    ),
    # facebookresearch/dino: dino_resnet50_pretrain.pth, and what main_dino.py saves of student and teacher.
    "DINO": lambda t: t,
    "DINO's networks": lambda t: {
        "student": behind("module.backbone.", t) | behind("module.head.mlp.", PROJECTOR),
        "teacher": behind("backbone.", other(t)) | behind("head.mlp.", PROJECTOR),
        "epoch": 100,
    },
    # facebookresearch/moco: moco_v2_800ep_pretrain.pth.tar; and moco-v3's r-50-1000ep.pth.tar.
    "MoCo v2": lambda t: {
        "epoch": 800,
        "arch": "resnet50",
        "state_dict": behind("module.encoder_q.", t | behind("fc.", PROJECTOR))
        | behind("module.encoder_k.", other(t) | behind("fc.", PROJECTOR))
        | {"module.queue": torch.zeros(2, 4), "module.queue_ptr": torch.zeros(1)},
    },
    "MoCo v3": lambda t: {
        "state_dict": behind("module.base_encoder.", t | behind("fc.", PROJECTOR))
        | behind("module.momentum_encoder.", other(t) | behind("fc.", PROJECTOR))
        | behind("module.predictor.", PROJECTOR)
    },
    # lightly: torchvision's children in an nn.Sequential; its own ResNet, whose shortcuts are called so.
    "lightly": lambda t: {
        "state_dict": behind("backbone.", in_sequential(t, 4))
        | behind("projection_head.layers.", PROJECTOR)
        | behind("backbone_momentum.", other(in_sequential(t, 4))),
        "loops": {},
    },
    "lightly's own ResNet": lambda t: behind(
        "backbone.", in_sequential(renamed(t, (r"downsample", "shortcut")), 2)
    ),
    "lightly's own ResNet by name": lambda t: renamed(t, (r"downsample", "shortcut")),
    # vturrisi/solo-learn, now and before its trunks were called backbones.
    "solo-learn": lambda t: {
        "state_dict": behind("backbone.", t)
        | behind("projector.", PROJECTOR)
        | behind("momentum_backbone.", other(t))
        | {"classifier.weight": torch.zeros(2, 2)}
    },
    "solo-learn, older": lambda t: {"state_dict": behind("encoder.", t) | behind("projector.", PROJECTOR)},
    "torchvision": lambda t: t | HEAD,
    "transformers": lambda t: behind("resnet.", transformers_resnet(t)) | behind("classifier.1.", HEAD),
    "transformers' base model": transformers_resnet,
    "VISSL": vissl_resnet,
    "compiled, in FSDP": lambda t: behind(
        "_orig_mod.",
        renamed(t, (r"^(layer\d\.\d)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.")),
    ),
}
REGNETS: dict[str, Callable[[Tensors], Any]] = {
    "torchvision": lambda t: torchvision_regnet(t) | HEAD,
    "torchvision's in DDP": lambda t: {"model": behind("module.", torchvision_regnet(t) | HEAD)},
    # facebook/regnet-y-320-seer and -in1k.
    "transformers": lambda t: behind("regnet.", transformers_regnet(t)) | behind("classifier.1.", HEAD),
    "transformers' base model": transformers_regnet,
    "timm": lambda t: t | behind("head.", HEAD),
}
EVERY = [("resnet18", name) for name in RESNETS] + [("regnety_tiny", name) for name in REGNETS]


@pytest.fixture(scope="module", params=EVERY, ids=lambda each: f"{each[1]}, {each[0]}")
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Architecture, Tensors]:
    trunk, name = request.param
    tensors = resnet18() if trunk == "resnet18" else regnet()
    path = tmp_path_factory.mktemp("published") / "weights.pth"
    torch.save((RESNETS if trunk == "resnet18" else REGNETS)[name](tensors), path)
    return Architecture.model_validate({"name": trunk, "init_from": str(path)}), tensors


def test_a_published_file_starts_the_trunk_that_learns(published: tuple[Architecture, Tensors]) -> None:
    section, tensors = published
    found = read_weights(section)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_transformers_or_timm_is_read(tmp_path: Path, name: str) -> None:
    tensors = regnet()
    theirs = transformers_regnet(tensors)
    save_file(theirs, tmp_path / name) if name.endswith("safetensors") else torch.save(
        theirs, tmp_path / name
    )
    found = read_weights(Architecture.model_validate({"name": "regnety_tiny", "init_from": str(tmp_path)}))
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_every_key_that_does_not_fit_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = transformers_resnet(resnet18())
    lost = [name for name in tensors if ".stages.2." in name and "num_batches" not in name]
    for name in lost:
        del tensors[name]
    tensors["encoder.stages.3.layers.2.layer.0.convolution.weight"] = torch.zeros(1)
    torch.save(tensors, tmp_path / "w.pth")
    section = Architecture.model_validate({"name": "resnet18", "init_from": str(tmp_path / "w.pth")})
    with pytest.raises(
        UserError, match=rf"it lacks layer3\.0\.conv1\.weight.*, and {len(lost) - 2} more, each in"
    ):
        read_weights(section)
    assert len(caplog.records) == len(lost) + 1
    assert "it has layer4.2.conv1.weight, which is not known here" in caplog.text


def test_two_trunks_that_both_learn_are_refused(tmp_path: Path) -> None:
    tensors = resnet18()
    torch.save(behind("left.", tensors) | behind("right.", other(tensors)), tmp_path / "w.pth")
    section = Architecture.model_validate({"name": "resnet18", "init_from": str(tmp_path / "w.pth")})
    with pytest.raises(UserError, match=r"holds 2 trunks, left\., right\.: save one of them alone"):
        read_weights(section)


IMAGES = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("library", "name", "ours"),
    [
        ("torchvision", "resnet50", "resnet50"),
        ("torchvision", "regnet_y_400mf", "regnety_400mf"),
        ("transformers", "ResNet", "resnet50"),
        ("transformers", "RegNet", "regnety_400mf"),
    ],
)
@torch.no_grad()
def test_where_the_library_is_installed_its_model_gives_equal_features_here(
    library: str, name: str, ours: str, tmp_path: Path
) -> None:
    module = pytest.importorskip(library)
    if library == "torchvision":
        theirs = getattr(module.models, name)()
        theirs.fc = nn.Identity()
    else:
        sizes = {"depths": [1, 3, 6, 6], "hidden_sizes": [48, 104, 208, 440], "groups_width": 8}
        config = getattr(module, f"{name}Config")(**(sizes if name == "RegNet" else {}))
        theirs = getattr(module, f"{name}Model")(config)
    for tensor_name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point() and "running_var" not in tensor_name:
            tensor.add_(torch.randn_like(tensor), alpha=0.02)
    theirs = theirs.double().eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    section = Architecture.model_validate({"name": ours, "init_from": str(tmp_path / "w.pth")})
    here = build_trunk(section).double().eval()
    here.load_state_dict(read_weights(section))
    features = theirs(IMAGES)
    features = features if library == "torchvision" else features.pooler_output.flatten(1)
    assert float(features.std()) > 1e-4
    torch.testing.assert_close(here(IMAGES), features, rtol=1e-9, atol=1e-11)
