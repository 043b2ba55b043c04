"""Trunks of others as ours: what `trunk.init_from` may name.

A file of others is data and not a program: pickles are read with `weights_only` (S1). Wherever in it the
trunk stands, and whoever has named its tensors, it is found by the name of its first convolution: before that
stand names of a method, a wrapper or a checkpoint, such as `state_dict.module.encoder_q.`.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cluster.errors import UserError
from pipeline.distributed.sharded import copy_own_piece, named_tensors
from pipeline.models.trunk import build_trunk
from pipeline.recipe.trunk import Architecture
from pipeline.trunks.layouts import LAYOUTS, without_wrappers
from pipeline.trunks.tensor_file import not_finite, stem_in

logger = logging.getLogger(__name__)

_CLASSIFIERS = ("head.fc.", "fc.")
_COUNTS = ".num_batches_tracked"
# What follows the trunk that learns, in methods that have two.
_FOLLOWER = re.compile(r"momentum|teacher|target|ema|encoder_k|key")
_DEEPEST = 8  # of the dictionaries in a checkpoint
_SHOWN = 3  # differences in a message
# In a folder: ours, and those that timm and transformers write.
_IN_FOLDER = ("trunk.safetensors", "model.safetensors", "pytorch_model.bin")


def read_weights(section: Architecture) -> dict[str, Tensor]:
    """The tensors that `trunk.init_from` names, under our names, on the CPU, mapped from the file.

    It is the folder of an exported trunk, or a file, safetensors or a PyTorch checkpoint, that holds such a
    trunk under the names of timm, torchvision, transformers, VISSL or lightly, alone or within a method. Only
    the counts of batches that BatchNorm has seen may be missing.

    Raises:
        UserError: if there is no such file, if it holds more than tensors, or others than this trunk's.
        ValueError: if the section has no `init_from`.
    """
    if section.init_from is None:
        raise ValueError("this trunk starts from no file")
    path = init_file(section.init_from)
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if (stem := stem_in(tensors)) not in (None, section.stem):
        raise UserError(f"trunk.init_from: {path} has another stem than this trunk: set trunk.stem={stem}")
    with torch.device("meta"):
        expected = {name: list(tensor.shape) for name, tensor in build_trunk(section).state_dict().items()}
    weights = {name: tensors[there] for name, there in _find(tensors, list(expected), section, path).items()}
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
    if path.is_dir():
        path = next((path / name for name in _IN_FOLDER if (path / name).is_file()), path / _IN_FOLDER[0])
    if not path.is_file():
        raise UserError(
            f"trunk.init_from: there is no file {path}; give an exported trunk (`submit export`), or a "
            "file of weights, such as timm, torchvision, transformers and VISSL publish"
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
    tensors = dict(_tensors_in(saved))
    if not tensors:
        raise UserError(f"trunk.init_from: {path} holds no tensors under names: is it a checkpoint?")
    return tensors


def _tensors_in(saved: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """All tensors in dictionaries, one within another, by their names with dots between."""
    if isinstance(saved, Tensor):
        yield prefix.removesuffix("."), saved
    elif isinstance(saved, dict) and depth < _DEEPEST:
        for name, value in saved.items():
            yield from _tensors_in(value, f"{prefix}{name}.", depth + 1)


class _Candidate(NamedTuple):
    """What may be a trunk: what stands before its names, and the file's names by ours."""

    prefix: str
    names: Mapping[str, str]


def _find(
    tensors: Mapping[str, Tensor], expected: list[str], section: Architecture, path: Path
) -> dict[str, str]:
    """The file's names of the trunk's tensors, by ours; with those that look like a trunk's and are none of
    ours, and without the heads that stand beside it.

    Raises:
        UserError: if there is none, or there are several of which none is the one that learns.
    """
    clean: dict[str, str] = {}
    for name in tensors:
        clean.setdefault(without_wrappers(name), name)
    candidates = [
        _Candidate(
            prefix,
            {ours(name.removeprefix(prefix)): clean[name] for name in clean if name.startswith(prefix)},
        )
        for mark, ours in _namings(expected[0])
        for prefix in _before(mark, clean)
    ]
    needed = {name for name in expected if not name.endswith(_COUNTS)}
    whole: dict[str, _Candidate] = {}
    for each in candidates:
        if needed <= each.names.keys():
            whole.setdefault(each.prefix, each)
    if whole:
        names = _that_learns(list(whole.values()), tensors, needed, path).names
    else:
        names = max(
            (each.names for each in candidates), key=lambda each: len(needed & each.keys()), default={}
        )
    if len({name.partition(".")[0] for name in needed & names.keys()}) < 3:  # a stem is in any network
        raise UserError(
            f"trunk.init_from: {path} has other names than a {section.name}: {next(iter(tensors))} comes "
            f"first there, and here {expected[0]}; save its tensors under our names"
        )
    kinds = {_kind(name) for name in expected}
    return {
        name: there
        for name, there in names.items()
        if name in expected or (_kind(name) in kinds and not name.startswith(_CLASSIFIERS))
    }


def _namings(first: str) -> list[tuple[str, Callable[[str], str]]]:
    """Each with the name of the first convolution: our own, and those of others."""
    return [(first, lambda name: name), *((layout.mark, layout.ours) for layout in LAYOUTS)]


def _before(mark: str, names: Mapping[str, str]) -> list[str]:
    """What stands before a name wherever it is; and nothing, where it may be missing."""
    return ["", *(name.removesuffix(mark) for name in names if name.endswith(f".{mark}"))]


def _kind(name: str) -> str:
    """What a tensor's outermost module is called, without its number: of layer3.0.conv1.weight, layer."""
    return name.partition(".")[0].rstrip("0123456789")


def _that_learns(
    found: list[_Candidate], tensors: Mapping[str, Tensor], needed: set[str], path: Path
) -> _Candidate:
    learning = [each for each in found if not _FOLLOWER.search(each.prefix)] if len(found) > 1 else found
    first, *others = learning or found
    if learning and all(  # one network under two names
        torch.equal(tensors[first.names[name]], tensors[other.names[name]])
        for other in others
        for name in needed
    ):
        return first
    prefixes = ", ".join(each.prefix for each in found)
    raise UserError(f"trunk.init_from: {path} holds {len(found)} trunks, {prefixes}: save one of them alone")


def _check(
    weights: dict[str, Tensor], expected: Mapping[str, list[int]], section: Architecture, path: Path
) -> None:
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    wrong = [
        f"{name} is {found[name]} there and {shape} here"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    wrong += [f"it lacks {name}" for name in expected if name not in found and not name.endswith(_COUNTS)]
    wrong += [f"it has {name}, which is not known here" for name in found if name not in expected]
    if not wrong:
        return
    for each in wrong if len(wrong) > _SHOWN else ():
        logger.warning("trunk.init_from: %s: %s", path, each)
    more = f", and {len(wrong) - _SHOWN} more, each in the log" if len(wrong) > _SHOWN else ""
    raise UserError(
        f"trunk.init_from: {path} does not hold the tensors of {section.name}: {', '.join(wrong[:_SHOWN])}"
        f"{more}; set trunk.name to the architecture of that file, or give another file"
    )


def _line(error: Exception) -> str:
    """The first sentence of torch's long messages."""
    return " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
