"""Trunks of others as ours: timm's names, and those of VISSL's SEER checkpoints.

Tensors have the same shapes and meaning everywhere; only their names differ. Ours are timm's (torchvision's
for a ResNet), so an exported `trunk.safetensors` is a checkpoint of timm's model with `num_classes=0`. VISSL
wraps ClassyVision's AnyNet: `_feature_blocks.res2.block1-0.f.a.0.weight` is our `s1.b1.conv1.conv.weight`;
its FSDP trunks, such as SEER-10B, have a further level, `res2.block1-part0.block1-0`.

A file of others is data and not a program: pickles are read with `weights_only` (S1).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cluster.errors import UserError
from pipeline.distributed.sharded import copy_own_piece, named_tensors
from pipeline.models.trunk import build_trunk
from pipeline.recipe.trunk import Architecture
from pipeline.trunks.tensor_file import not_finite, stem_in

_IN_VISSL_BLOCK = {
    "f.a.0": "conv1.conv",
    "f.a.1": "conv1.bn",
    "f.b.0": "conv2.conv",
    "f.b.1": "conv2.bn",
    "f.se.excitation.0": "se.fc1",
    "f.se.excitation.2": "se.fc2",
    "f.c": "conv3.conv",
    "f.final_bn": "conv3.bn",
    "proj": "downsample.conv",
    "bn": "downsample.bn",
}
_IN_VISSL_STEM = {"0": "conv", "1": "bn"}

_VISSL_BLOCK = re.compile(r"_feature_blocks\.res\d+\.(?:block\d+-part\d+\.)?block(\d+)-(\d+)\.(.+)\.(\w+)")
_VISSL_STEM = re.compile(r"_feature_blocks\.conv1\.stem\.([01])\.(\w+)")

_CLASSIFIERS = ("head.fc.", "fc.")
_COUNTS = ".num_batches_tracked"
# What follows the trunk that learns, in methods that have two.
_FOLLOWER = re.compile(r"momentum|teacher|target|ema|encoder_k|key")
_IN_TRUNK = re.compile(r"(stem|s\d+|conv\d+|bn\d+|layer\d+)\.")


def from_vissl(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A trunk of VISSL's, sharded or not, under our names; names that are no RegNetY's stay as they are."""
    return {_our_name(name): tensor for name, tensor in tensors.items()}


def from_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model of timm's (or a ResNet of torchvision's) under our names: its own, without the classifier."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_CLASSIFIERS)}


def read_weights(section: Architecture) -> dict[str, Tensor]:
    """The tensors that `trunk.init_from` names, under our names, on the CPU, mapped from the file.

    It is the folder of an exported trunk, or a file: safetensors, a PyTorch checkpoint of timm's, or one of
    VISSL's. Only the counts of batches that BatchNorm has seen may be missing.

    Raises:
        UserError: if there is no such file, if it holds more than tensors, or others than this trunk's.
        ValueError: if the section has no `init_from`.
    """
    if section.init_from is None:
        raise ValueError("this trunk starts from no file")
    path = init_file(section.init_from)
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    with torch.device("meta"):
        expected = {name: list(tensor.shape) for name, tensor in build_trunk(section).state_dict().items()}
    theirs = any(name.startswith("_feature_blocks.") for name in tensors)
    weights = from_vissl(tensors) if theirs else from_timm(_inside(tensors, list(expected), path))
    _check(weights, expected, section, path)
    if (broken := not_finite(weights)) is not None:
        raise UserError(
            f"trunk.init_from: {broken} of {path} holds numbers that are not finite: give another file"
        )
    return weights


def init_file(init_from: str) -> Path:
    """The file of weights that `trunk.init_from` means.

    Raises:
        UserError: if there is none.
    """
    path = Path(init_from)
    path = path / "trunk.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"trunk.init_from: there is no file {path}; give an exported trunk (`submit export`), or a "
            "checkpoint of timm's or VISSL's"
        )
    return path


@torch.no_grad()
def warm_start(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights that `read_weights` has found to fit into a trunk, in place, in the trunk's precision.

    Of a sharded trunk, this rank's pieces are filled.
    """
    for name, tensor in named_tensors(network):
        if name in weights:
            copy_own_piece(tensor, weights[name])


def _our_name(name: str) -> str:
    if found := _VISSL_STEM.fullmatch(name):
        part, tensor = found.groups()
        return f"stem.{_IN_VISSL_STEM[part]}.{tensor}"
    found = _VISSL_BLOCK.fullmatch(name)
    if found is None or found[3] not in _IN_VISSL_BLOCK:
        return name
    stage, block, part, tensor = int(found[1]), int(found[2]), found[3], found[4]
    return f"s{stage}.b{block + 1}.{_IN_VISSL_BLOCK[part]}.{tensor}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"trunk.init_from: {path} is not a safetensors file ({_line(error)}); was it copied whole?"
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        # Files from before torch 1.6 are no zip archives, and cannot be mapped.
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        raise UserError(
            f"trunk.init_from: {path} is no checkpoint, or holds more than tensors, and reading that could "
            f"run its code ({_line(error)}); where you trust it, save its tensors alone, as safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"trunk.init_from: {path} is not a PyTorch checkpoint ({_line(error)}); was it copied whole?"
        ) from error
    tensors = _trunk_in(saved)
    if tensors is None:
        raise UserError(
            f"trunk.init_from: {path} holds no trunk: neither names and tensors, nor those under "
            "`state_dict`, `model` or VISSL's `classy_state_dict`"
        )
    return tensors


def _trunk_in(saved: Any) -> dict[str, Tensor] | None:
    """The trunk's tensors in what timm, its relatives or VISSL save."""
    for path in (("classy_state_dict", "base_model", "model", "trunk"), ("state_dict",), ("model",), ()):
        found = saved
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict) and found and all(isinstance(value, Tensor) for value in found.values()):
            return found
    return None


def _inside(tensors: Mapping[str, Tensor], expected: list[str], path: Path) -> Mapping[str, Tensor]:
    """The trunk where its names stand behind a prefix, such as a wrapper's `module.` or a method's
    `backbone.`, without the heads that stand beside it; else all tensors as they are.

    Raises:
        UserError: if there are several of which none is the one that learns.
    """
    first = expected[0]
    found = [
        name.removesuffix(first)
        for name in tensors
        if name.endswith(f".{first}") and _has_all(tensors, expected, name.removesuffix(first))
    ]
    if first in tensors or not found:
        return tensors
    learning = [prefix for prefix in found if not _FOLLOWER.search(prefix)] if len(found) > 1 else found
    if len(learning) != 1:
        raise UserError(
            f"trunk.init_from: {path} holds {len(found)} trunks, {', '.join(found)}: save one of them alone"
        )
    weights = {
        name.removeprefix(learning[0]): tensor
        for name, tensor in tensors.items()
        if name.startswith(learning[0])
    }
    return {name: tensor for name, tensor in weights.items() if name in expected or _IN_TRUNK.match(name)}


def _has_all(tensors: Mapping[str, Tensor], expected: list[str], prefix: str) -> bool:
    return all(prefix + name in tensors for name in expected if not name.endswith(_COUNTS))


def _check(
    weights: dict[str, Tensor], expected: Mapping[str, list[int]], section: Architecture, path: Path
) -> None:
    if (stem := stem_in(weights)) not in (None, section.stem):
        raise UserError(f"trunk.init_from: {path} has another stem than this trunk: set trunk.stem={stem}")
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    wrong = [
        f"{name} is {found[name]} there and {shape} here"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    wrong += [f"it lacks {name}" for name in expected if name not in found and not name.endswith(_COUNTS)]
    wrong += [f"it has {name}, which is not known here" for name in found if name not in expected]
    if wrong and not found.keys() & expected.keys():
        raise UserError(
            f"trunk.init_from: {path} has other names than a {section.name}: {next(iter(found))} comes first "
            f"there, and here {next(iter(expected))}; save its tensors under our names"
        )
    if wrong:
        more = f", and {len(wrong) - 1} more differences" if len(wrong) > 1 else ""
        raise UserError(
            f"trunk.init_from: {path} does not hold the tensors of {section.name}: {wrong[0]}{more}; set "
            "trunk.name to the architecture of that file, or give another file"
        )


def _line(error: Exception) -> str:
    """The first sentence of torch's long messages."""
    return " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
