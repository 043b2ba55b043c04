"""A trunk of another kind is a file and a row: a small ViT and a small video network, trained every way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_strategies import world_of
from tiny_training import make_dataset, make_recipe
from torch import Tensor, nn

from cluster.errors import UserError
from pipeline.distributed.sharded import named_tensors, whole
from pipeline.models.trunk import TRUNKS, Trunk, arrange_inputs, arrange_weights, choose_layout
from pipeline.parallel.activation_checkpointing import checkpoint_activations
from pipeline.parallel.batchnorm import CoupledBatchNorm
from pipeline.parallel.parallelize import compile_blocks
from pipeline.train.loop import forward_backward, gradient_norm, steps
from pipeline.train.metrics import Stopwatch
from pipeline.train.setup import set_up

Ranks = Callable[..., list[Any]]
Tensors = dict[str, Any]
WIDTH, PATCH, PLACES = 16, 4, 16


class ViT(nn.Module):
    """Patches, a class token and learned positions, and blocks in a ModuleList."""

    feature_dim, memory_format = WIDTH, torch.contiguous_format

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.empty(1, PLACES + 1, WIDTH))
        self.blocks = nn.ModuleList(AttentionBlock() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.norm(x[:, 0])
        return features

    def blocks_by_stage(self) -> list[nn.ModuleList]:
        return [self.blocks]

    def zero_init_norms(self) -> list[nn.Module]:
        return []

    def initial_value(self, name: str, normal: Tensor) -> Tensor:
        return 0.02 * normal


class AttentionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class Video(nn.Module):
    """Convolutions over time and space; a clip here is an image, cut into two frames from top to bottom."""

    feature_dim, memory_format = 12, torch.channels_last_3d

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False)
        self.first = nn.Sequential(VideoBlock(8, 8), VideoBlock(8, 12))
        self.last = VideoBlock(12, 12)

    def forward(self, images: Tensor) -> Tensor:
        clips = images.unflatten(2, (2, -1)).transpose(1, 2).transpose(1, 2)
        x = self.last(self.first(self.stem(clips)))
        features: Tensor = x.mean((2, 3, 4))
        return features

    def blocks_by_stage(self) -> list[Any]:
        return [self.first, [self.last]]

    def zero_init_norms(self) -> list[nn.Module]:
        return [self.last.norm2]


class VideoBlock(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(before, width, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.norm1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.norm2 = nn.BatchNorm3d(width)
        self.shortcut = nn.Identity() if before == width else nn.Conv3d(before, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


# With BatchNorm after the trunk some of its gradients would be nothing but rounding.
HEAD = {"hidden": [16], "output": 8, "batch_norm": False}
NETWORKS: dict[str, Callable[[], Any]] = {"vit": ViT, "video": Video}
WAYS: dict[str, dict[str, Any]] = {
    f"{strategy}-{checkpointing}": {
        "strategy": strategy,
        "activation_checkpointing": checkpointing,
        "precision": "fp64",
    }
    for strategy in ("ddp", "fsdp2")
    for checkpointing in ("none", "full")
}
# FairScale has no float64; its reentrant recomputation is another backward pass.
WAYS |= {
    f"fp32-{strategy}-{checkpointing}": {"strategy": strategy, "activation_checkpointing": checkpointing}
    for strategy, checkpointing in (("fsdp2", "none"), ("fairscale", "none"), ("fairscale", "full"))
}

# One rank recomputes with DDP, and FairScale without recomputation is its other half.
ON_RANKS = [way for way in WAYS if way not in ("ddp-full", "fp32-fairscale-none")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("tiny"))


def _one_step(
    group: dist.ProcessGroup | None, data: Path, folder: Path, ways: dict[str, dict[str, Any]]
) -> dict[str, Tensors]:
    """Loss, gradients and batch statistics of a step, for each network and way; and what was recomputed."""
    found: dict[str, Tensors] = {}
    with pytest.MonkeyPatch.context() as patch:
        for network, build in NETWORKS.items():
            patch.setitem(TRUNKS, "resnet18", lambda section, build=build: build())  # the row
            for way, section in ways.items():
                name = f"{network} {way}"
                train = {"steps": 3, "accumulate": 2} | section
                recipe = make_recipe(data, trunk={"name": "resnet18"}, train=train, method__head=HEAD)
                t = set_up(recipe, folder / name, world_of(group))
                step, batches = next(steps(t, Stopwatch()))
                counts = count_calls(t.method.trunk)
                terms, _ = forward_backward(t, batches, step + 5)
                found[name] = {"loss": float(terms["loss"]), "length": float(gradient_norm(t))}
                for key, tensor in named_tensors(t.method):
                    if tensor.grad is not None:
                        found[name][key] = whole(tensor.grad, tensor).numpy()
                    elif "running" in key or "num_batches" in key:
                        found[name][key] = tensor.numpy()
                # Two micro-batches of two sizes; every layer again, where it is recomputed.
                assert set(counts.values()) == {
                    8 if section.get("activation_checkpointing") == "full" else 4
                }, name
                coupled = [each for each in t.method.trunk.modules() if isinstance(each, CoupledBatchNorm)]
                assert len(coupled) == (6 if network == "video" else 0)
                if t.metrics is not None:
                    t.metrics.close()
    return found


def _on_ranks(group: dist.ProcessGroup, data: Path, folder: Path) -> tuple[dict[str, Tensors], list[str]]:
    """A step in every way; and what is said where a trunk that declares no blocks is to be sharded."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRUNKS, "resnet18", lambda section: NoBlocks())
        for strategy in ("fsdp2", "fairscale"):
            recipe = make_recipe(data, trunk={"name": "resnet18"}, train={"steps": 1, "strategy": strategy})
            with pytest.raises(UserError) as error:
                set_up(recipe, folder, world_of(group))
            said.append(str(error.value))
    return _one_step(group, data, folder, {way: WAYS[way] for way in ON_RANKS}), said


def count_calls(trunk: nn.Module) -> dict[str, int]:
    """How often each layer within the trunk's blocks is called from now on."""
    counts: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def called(*_: Any) -> None:
            counts[name] = counts.get(name, 0) + 1

        return called

    for name, layer in trunk.named_modules():
        inside = name.startswith(("blocks.", "first.", "last."))
        if inside and isinstance(layer, nn.Linear | nn.Conv3d):
            layer.register_forward_pre_hook(count(name))
    return counts


@pytest.mark.slow
def test_T1_T2_T4_trunks_of_other_kinds_train_alike_on_any_ranks_and_strategy(
    data: Path, tmp_path: Path, run_on_ranks: Ranks
) -> None:
    alone = _one_step(None, data, tmp_path / "alone", {way: WAYS[way] for way in ("ddp-none", "ddp-full")})
    found, said = zip(*run_on_ranks(2, _on_ranks, data, tmp_path / "ranks"), strict=True)
    for each in said[0] + said[1]:
        assert each.startswith("train.strategy works on the blocks of a trunk, and NoBlocks declares none")
        assert each.endswith("set train.strategy: ddp")
    for everyone in (alone, *found):
        for name, values in everyone.items():
            network, way = name.split()
            wide = not way.startswith("fp32")
            expected = alone[f"{network} ddp-none"] if wide else everyone[f"{network} fp32-fsdp2-none"]
            assert values.keys() == expected.keys()
            assert sum(key.startswith("trunk.") for key in values) > 20
            for key, value in values.items():
                scale = np.abs(expected[key]).max()
                difference = np.abs(value - expected[key]).max()
                assert difference <= (1e-10 if wide else 1e-4) * scale, (name, key)


@pytest.mark.parametrize(("build", "dimensions"), [(ViT, 4), (Video, 5)])
def test_weights_and_inputs_are_laid_out_as_a_trunk_declares(build: type[Any], dimensions: int) -> None:
    trunk = build()
    arrange_weights(trunk)
    arrange_inputs(trunk)
    assert isinstance(trunk, Trunk)
    large = [weight for weight in trunk.parameters() if weight.ndim == dimensions]
    assert large and all(weight.is_contiguous(memory_format=trunk.memory_format) for weight in large)
    seen: list[Tensor] = []
    trunk.forward = seen.append
    permuted = torch.channels_last if build is ViT else torch.contiguous_format
    trunk(torch.zeros(2, 3, *[6] * (dimensions - 2)).contiguous(memory_format=permuted))
    assert seen[0].is_contiguous(memory_format=trunk.memory_format)


def test_a_recipe_chooses_another_layout_and_none_changes_a_number(data: Path, tmp_path: Path) -> None:
    found: dict[bool | None, Tensors] = {}
    for chosen in (None, True, False):
        train = {"steps": 3, "precision": "fp64", "channels_last": chosen}
        t = set_up(make_recipe(data, train=train, method__head=HEAD), tmp_path / str(chosen), world_of(None))
        weight = next(each for each in t.method.trunk.parameters() if each.ndim == 4 and each.shape[1] > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last) == (chosen is not False)
        step, batches = next(steps(t, Stopwatch()))
        terms, _ = forward_backward(t, batches, step)
        gradients = {name: each.grad for name, each in named_tensors(t.method) if each.grad is not None}
        found[chosen] = {"loss": terms["loss"].detach(), **gradients}
        if t.metrics is not None:
            t.metrics.close()
    for values in found.values():
        for name, expected in found[None].items():
            torch.testing.assert_close(values[name], expected, rtol=1e-9, atol=1e-12)


def test_a_layout_is_that_of_the_trunks_own_dimensions() -> None:
    for build, chosen, layout in [
        (ViT, True, torch.channels_last),
        (Video, True, torch.channels_last_3d),
        (Video, False, torch.contiguous_format),
        (Video, None, torch.channels_last_3d),
    ]:
        trunk: Any = build()
        choose_layout(trunk, channels_last=chosen)
        assert trunk.memory_format == layout


def test_blocks_in_a_list_are_compiled_one_by_one_and_recomputed_around_it() -> None:
    trunk = ViT()
    for parameter in trunk.parameters():
        nn.init.normal_(parameter, std=0.1)
    compiled: list[Any] = []

    def compile_(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def run(x: Tensor) -> Any:
            compiled.append(function)
            return function(x)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile_)
        compile_blocks(trunk)
    checkpoint_activations(trunk, "full")
    trunk(torch.randn(2, 3, 16, 16)).sum().backward()
    assert [compiled.count(function) for function in dict.fromkeys(compiled)] == [2, 2, 2]


class NoBlocks(Video):
    def blocks_by_stage(self) -> list[Any]:
        return [[]]


class Undeclared(nn.Module):
    feature_dim = 3


class Loops(Video):
    """It calls the blocks of a stage, not the stage."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.first:
            x = block(x)
        return x


class Drops(ViT):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].mlp.append(nn.Dropout(0.1))


def test_what_a_trunk_leaves_out_is_said() -> None:
    with pytest.raises(
        UserError, match=r"^train\.activation_checkpointing works .* NoBlocks declares none .*: none$"
    ):
        checkpoint_activations(NoBlocks(), "full")
    with pytest.raises(UserError, match=r"^train\.compile works .* NoBlocks declares none .*: false$"):
        compile_blocks(NoBlocks())
    with pytest.raises(UserError, match=r"declares no memory_format, blocks_by_stage, zero_init_norms; see"):
        checkpoint_activations(Undeclared(), "full")
    with pytest.raises(UserError, match="has runs of several blocks, and ViT calls its blocks one by one"):
        checkpoint_activations(ViT(), ((1, 3),))
    with pytest.raises(
        UserError, match=r"recomputes mlp\.3 of a AttentionBlock, a Dropout that would draw anew"
    ):
        checkpoint_activations(Drops(), "full")
    loops = Loops()
    checkpoint_activations(loops, "full")
    with pytest.raises(UserError, match=r"had no effect: Loops declares an nn\.Sequential"):
        loops(torch.randn(2, 3, 2, 8, 8))
