"""Files of weights that others have written: one, or several that an index lists.

Such a file is data and not a program: pickles are read with `weights_only` (S1), and an index names files of
its own folder, or nothing.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cluster.errors import UserError
from cluster.small_file import read_small

_INDEX = ".index.json"
# In a folder: ours, and those that timm and transformers write.
_IN_FOLDER = (
    "trunk.safetensors",
    "model.safetensors",
    f"model.safetensors{_INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
)
_DEEPEST = 8  # of the dictionaries in a checkpoint


class _Index(BaseModel):
    """What transformers writes beside the parts of a large model: which of them each tensor is in."""

    weight_map: dict[str, str]


def init_file(init_from: str) -> Path:
    """The file of weights that `trunk.init_from` means, or the index of several.

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


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of those that an index lists, by their names there, on the CPU, mapped.

    Raises:
        UserError: if they cannot be read, hold more than tensors, or are not all there.
    """
    if not path.name.endswith(_INDEX):
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    listed = _weight_map(path)
    parts = {name: tensors_of(path.parent / name) for name in sorted(set(listed.values()))}
    if absent := next((name for name, part in listed.items() if name not in parts[part]), None):
        raise UserError(
            f"trunk.init_from: {path} says that {absent} is in {listed[absent]}, and it is not: get all "
            "files of the model anew"
        )
    return {name: parts[part][name] for name, part in listed.items()}


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's bytes; of an index, with those of the files that it lists behind it."""
    parts = sorted(set(_weight_map(path).values())) if path.name.endswith(_INDEX) else []
    digest = hashlib.sha256()
    for each in (path, *(path.parent / name for name in parts)):
        with each.open("rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
    return digest.hexdigest()


def _weight_map(path: Path) -> Mapping[str, str]:
    try:
        listed = _Index.model_validate_json(read_small(path)).weight_map
    except (OSError, ValidationError) as error:
        raise UserError(
            f"trunk.init_from: {path} is no index of files of weights ({_line(error)}); was it copied whole?"
        ) from error
    parts = sorted(set(listed.values()))
    if outside := [name for name in parts if Path(name).name != name or name.endswith(_INDEX)]:
        raise UserError(
            f"trunk.init_from: {path} lists {outside[0]!r}, which is no file of weights in its own folder: "
            "do not use it"
        )
    if missing := [name for name in parts if not (path.parent / name).is_file()]:
        raise UserError(
            f"trunk.init_from: {len(missing)} of the {len(parts)} files that {path} lists are not beside it, "
            f"such as {missing[0]}: copy them there"
        )
    return listed


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


def _line(error: Exception) -> str:
    """The first sentence of torch's long messages."""
    return " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
