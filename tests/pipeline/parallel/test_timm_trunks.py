"""Models of timm's as trunks: a ConvNeXt and a ViT train alike every way. Only where timm is installed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_strategies import world_of
from tiny_training import make_dataset, make_recipe
from torch import nn

from cluster.errors import UserError
from pipeline.data.evaluation import Preprocessing
from pipeline.distributed.sharded import named_tensors, whole
from pipeline.models.classifier import Classifier, LinearHead
from pipeline.models.timm_trunk import own_name, timm_trunk
from pipeline.models.trunk import Trunk, build_trunk, declared
from pipeline.parallel.initialize import initialize
from pipeline.plan.step_count import count_step
from pipeline.recipe.trunk import Architecture
from pipeline.train.loop import forward_backward, gradient_norm, pretrain, steps
from pipeline.train.metrics import Stopwatch
from pipeline.train.setup import set_up
from pipeline.trunks.classifier import ClassifierSpec, load_classifier, save_classifier
from pipeline.trunks.export import export_trunk
from pipeline.trunks.files import load_trunk
from pipeline.trunks.formats import save_as
from pipeline.trunks.interop import read_weights

timm = pytest.importorskip("timm")

# timm's own smallest. A ViT's positions are interpolated in float32 where images have another size than 160,
# and equal to that precision only.
SIZES = {"test_convnext": (64, 32), "test_vit": (160, 160)}
HEAD = {"hidden": [16], "output": 8, "batch_norm": False}
WAYS: dict[str, dict[str, Any]] = {
    f"{strategy}-{checkpointing}{'-compiled' if compiled else ''}": {
        "strategy": strategy,
        "activation_checkpointing": checkpointing,
        "precision": "fp64",
        "compile": compiled,
    }
    for strategy in ("ddp", "fsdp2")
    for checkpointing in ("none", "full")
    for compiled in (False, True)
}


def recipe_of(model: str, data: Path, **changes: Any) -> Any:
    large, small = SIZES[model]
    recipe = make_recipe(data, trunk={"name": f"timm/{model}"}, method__head=HEAD, **changes)
    crops = (
        recipe.data.crops[0].model_copy(update={"size": large}),
        recipe.data.crops[1].model_copy(update={"size": small}),
    )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"crops": crops})})


def _one_step(
    group: dist.ProcessGroup | None, data: Path, folder: Path, ways: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Loss and gradients of a step, for each model and way."""
    found: dict[str, dict[str, Any]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        for model in SIZES:
            for way, section in ways.items():
                t = set_up(
                    recipe_of(model, data, train={"steps": 3} | section),
                    folder / model / way,
                    world_of(group),
                )
                step, batches = next(steps(t, Stopwatch()))
                terms, _ = forward_backward(t, batches, step + 5)
                values = {"loss": float(terms["loss"]), "length": float(gradient_norm(t))}
                for key, tensor in named_tensors(t.method):
                    if tensor.grad is not None:
                        values[key] = whole(tensor.grad, tensor).numpy()
                found[f"{model} {way}"] = values
                if t.metrics is not None:
                    t.metrics.close()
    return found


@pytest.mark.slow
def test_T1_T2_T4_a_convnext_and_a_vit_train_alike_on_any_ranks_and_strategy(
    tmp_path: Path, run_on_ranks: Callable[..., list[Any]]
) -> None:
    data = make_dataset(tmp_path / "tiny")
    few = {way: WAYS[way] for way in ("ddp-none", "ddp-full", "ddp-full-compiled")}
    alone = _one_step(None, data, tmp_path / "alone", few)
    for everyone in (alone, *run_on_ranks(2, _one_step, data, tmp_path / "ranks", WAYS)):
        for name, values in everyone.items():
            expected = alone[f"{name.split()[0]} ddp-none"]
            assert values.keys() == expected.keys()
            assert sum(key.startswith("trunk.") for key in values) > 60
            for key, value in values.items():
                scale = np.abs(expected[key]).max()
                assert np.abs(value - expected[key]).max() <= 1e-10 * scale, (name, key)


@pytest.mark.parametrize("model", SIZES)
def test_a_model_of_timms_declares_what_a_trunk_does(model: str) -> None:
    trunk = timm_trunk(f"timm/{model}")
    assert isinstance(trunk, Trunk) and trunk.feature_dim == 64
    depths = [len(list(stage)) for stage in trunk.blocks_by_stage()]
    assert depths == ([1, 2, 4, 2] if model == "test_convnext" else [6])
    layout = torch.channels_last if model == "test_convnext" else torch.contiguous_format
    assert trunk.memory_format == layout
    initialize(nn.ModuleDict({"trunk": trunk}), seed=3)
    again = copy.deepcopy(trunk)  # as a teacher is made
    initialize(nn.ModuleDict({"trunk": again}), seed=4)
    name, arguments = own_name(f"timm/{model}")
    theirs = timm.create_model(name, num_classes=0, **arguments)
    theirs.load_state_dict(trunk.state_dict(), strict=True)  # its tensors have timm's names
    for size in (32, 160):
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        assert torch.equal(trunk.eval()(images), theirs.eval()(images))
        assert float((trunk(images) - again.eval()(images)).abs().max()) > 1e-3
    with torch.device("meta"):
        assert declared(build_trunk(Architecture(name=f"timm/{model}"))).feature_dim == 64


def test_weights_of_timms_come_in_and_a_trained_trunk_goes_out(tmp_path: Path) -> None:
    data = make_dataset(tmp_path)
    theirs = timm.create_model("test_convnext")
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    trunk = {"name": "timm/test_convnext", "init_from": str(tmp_path / "weights.safetensors")}
    found = read_weights(Architecture.model_validate(trunk))
    assert torch.equal(
        found["stages.3.blocks.1.mlp.fc2.bias"], theirs.state_dict()["stages.3.blocks.1.mlp.fc2.bias"]
    )
    assert not any(name.startswith("head.fc") for name in found)
    recipe = recipe_of("test_convnext", data, train={"steps": 2})
    pretrain(recipe, tmp_path / "run")
    spec = export_trunk(tmp_path / "run", tmp_path / "out")
    ours = load_trunk(tmp_path / "out")
    save_as("timm", ours.network, spec, tmp_path / "timm")
    elsewhere = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(elsewhere(images), ours(images))
    with pytest.raises(UserError, match="transformers has no timm/test_convnext"):
        save_as("transformers", ours.network, spec, tmp_path / "no")


@pytest.mark.parametrize("model", SIZES)
def test_what_a_step_takes_is_counted_without_computing_it(model: str, tmp_path: Path) -> None:
    recipe = recipe_of(model, tmp_path, train={"steps": 2})
    counted = count_step(recipe, rank_rows=4)
    assert counted.trunk == sum(each.numel() for each in timm_trunk(f"timm/{model}").parameters())
    assert counted.forward_flops > 1e6 and counted.passes == len(set(SIZES[model]))


@pytest.mark.parametrize("model", SIZES)
def test_a_classifier_is_a_checkpoint_of_timms(model: str, tmp_path: Path) -> None:
    section = Architecture(name=f"timm/{model}")
    network = Classifier(build_trunk(section), LinearHead(64, 3)).eval()
    view = Preprocessing(image_size=160, resize=160, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    spec = ClassifierSpec(architecture=section, preprocessing=view, feature_dim=64, classes=("a", "b", "c"))
    nn.init.normal_(network.head.weight)
    save_classifier(network.state_dict(), spec, tmp_path)
    name, arguments = own_name(section.name)
    theirs = timm.create_model(
        name, num_classes=3, checkpoint_path=str(tmp_path / "classifier.safetensors"), **arguments
    ).eval()
    images = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(theirs(images), load_classifier(tmp_path)(images))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("timm/convnext_tinny", r"has no such model; did you mean timm/convnext_tin"),
        ("timm/xyz", r"has no such model; see its list_models"),
        ("timm/swin_tiny_patch4_window7_224", r"a WindowAttention, holds relative_position_bias_table"),
    ],
)
def test_what_is_no_trunk_is_said(name: str, told: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=told):
        build_trunk(Architecture(name=name))
