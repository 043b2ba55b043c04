"""A file of tensors that is written for others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.atomic_file import replacing
from cluster.errors import UserError
from pipeline.recipe.trunk import Architecture

_MARK = "stem.is_"
_TIMMS = "imagenet"  # the stem that models of timm's have


def write_tensors(tensors: Mapping[str, Tensor], path: Path, *, architecture: Architecture | None) -> None:
    """Write tensors as safetensors, readable for whom the umask says.

    A trunk whose stem is not timm's has tensors of the same names and shapes, and computes something else:
    timm refuses such a file for a tensor that its model has not.

    Raises:
        UserError: if a number is not finite.
    """
    if (broken := not_finite(tensors)) is not None:
        raise UserError(
            f"{broken} holds numbers that are not finite: such a network is not written to {path}"
        )
    named = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777  # safetensors makes files that only their owner may read
        save_file(named | _mark(architecture), temporary)
        temporary.chmod(mode)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, mapped; without the mark of a stem, as files from before it are.

    Raises:
        OSError, SafetensorError: if it cannot be read.
    """
    tensors = load_file(path)
    stem_in(tensors)
    return tensors


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds something else than finite numbers."""
    return next(
        (
            name
            for name, tensor in tensors.items()
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        ),
        None,
    )


def stem_in(tensors: dict[str, Tensor]) -> str | None:
    """The stem that a file was marked with, if it was; the mark is taken out."""
    for name in tensors:
        if name.startswith(_MARK):
            del tensors[name]
            return name.removeprefix(_MARK)
    return None


def _mark(architecture: Architecture | None) -> dict[str, Tensor]:
    if architecture is None or architecture.stem == _TIMMS:
        return {}
    return {f"{_MARK}{architecture.stem}": torch.ones(1)}
