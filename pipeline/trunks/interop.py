"""Trunks of others as ours: what `trunk.init_from` may name.

Wherever in a file the trunk stands, and whoever has named its tensors, it is found by the name of its first
convolution: before that stand names of a method, a wrapper or a checkpoint, such as
`state_dict.module.encoder_q.`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cluster.errors import UserError
from pipeline.distributed.sharded import copy_own_piece, named_tensors
from pipeline.models.trunk import build_trunk
from pipeline.recipe.trunk import Architecture
from pipeline.trunks.layouts import LAYOUTS, without_wrappers
from pipeline.trunks.tensor_file import not_finite, stem_in
from pipeline.trunks.weight_files import init_file, tensors_of

logger = logging.getLogger(__name__)

_CLASSIFIERS = ("head.fc.", "fc.")
_COUNTS = ".num_batches_tracked"
# What follows the trunk that learns, in methods that have two.
_FOLLOWER = re.compile(r"momentum|teacher|target|ema|encoder_k|key")
_SHOWN = 3  # differences in a message


def read_weights(section: Architecture) -> dict[str, Tensor]:
    """The tensors that `trunk.init_from` names, under our names, on the CPU, mapped from the file.

    It is the folder of an exported trunk, or a file, see `pipeline.trunks.weight_files`, that holds such a
    trunk under the names of timm, torchvision, transformers, VISSL or lightly, alone or within a method. Only
    the counts of batches that BatchNorm has seen may be missing.

    Raises:
        UserError: if there is no such file, if it holds more than tensors, or others than this trunk's.
        ValueError: if the section has no `init_from`.
    """
    if section.init_from is None:
        raise ValueError("this trunk starts from no file")
    path = init_file(section.init_from)
    tensors = tensors_of(path)
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


@torch.no_grad()
def warm_start(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights that `read_weights` has found to fit into a trunk, in place, in the trunk's precision.

    Of a sharded trunk, this rank's pieces are filled.
    """
    for name, tensor in named_tensors(network):
        if name in weights:
            copy_own_piece(tensor, weights[name])


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
