"""Weights in several files, as transformers writes large models: read as one, and no other file for them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster.errors import UserError
from pipeline.models.trunk import build_trunk
from pipeline.parallel.initialize import initialize
from pipeline.recipe.trunk import Architecture
from pipeline.trunks.interop import read_weights
from pipeline.trunks.layouts import TRANSFORMERS_RESNET
from pipeline.trunks.weight_files import digest_of, init_file

SUFFIXES = {"model.safetensors": "safetensors", "pytorch_model.bin": "bin"}


@cache
def weights() -> dict[str, Tensor]:
    network = build_trunk(Architecture(name="resnet18"))
    initialize(network, seed=0)
    return dict(network.state_dict())


def in_parts(folder: Path, name: str, count: int = 3) -> dict[str, str]:
    """A folder of transformers' with a ResNet in parts; which of them each tensor is in."""
    tensors = {theirs: weights()[ours] for ours, theirs in TRANSFORMERS_RESNET.theirs(weights()).items()}
    stem, suffix = name.split(".")
    parts = [f"{stem}-{number + 1:05}-of-{count:05}.{suffix}" for number in range(count)]
    listed = {tensor: parts[number % count] for number, tensor in enumerate(tensors)}
    for part in parts:
        held = {tensor: tensors[tensor].clone() for tensor in tensors if listed[tensor] == part}
        if suffix == "safetensors":
            save_file(held, folder / part)
        else:
            torch.save(held, folder / part)
    write_index(folder, name, listed)
    return listed


def write_index(folder: Path, name: str, listed: dict[str, str]) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": listed}
    (folder / f"{name}.index.json").write_text(json.dumps(index))


def read(path: Path) -> dict[str, Tensor]:
    return read_weights(Architecture(name="resnet18", init_from=str(path)))


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", SUFFIXES)
@pytest.mark.parametrize("given", ["folder", "index"])
def test_a_trunk_in_parts_is_the_trunk(name: str, given: str, tmp_path: Path) -> None:
    in_parts(tmp_path, name)
    found = read(tmp_path if given == "folder" else tmp_path / f"{name}.index.json")
    expected = weights()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[tensor], value) for tensor, value in expected.items())


def test_parts_that_are_not_there_are_named(tmp_path: Path) -> None:
    in_parts(tmp_path, "model.safetensors")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    told = refused(tmp_path)
    assert "1 of the 3 files that" in told
    assert "such as model-00002-of-00003.safetensors: copy them there" in told


def test_a_tensor_that_its_part_lacks_is_named(tmp_path: Path) -> None:
    listed = in_parts(tmp_path, "model.safetensors")
    first = next(iter(listed))
    write_index(tmp_path, "model.safetensors", listed | {first: "model-00002-of-00003.safetensors"})
    assert f"says that {first} is in model-00002-of-00003.safetensors, and it is not" in refused(tmp_path)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/part.bin", "x.index.json"])
def test_S1_an_index_names_files_of_its_own_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    listed = in_parts(folder, "model.safetensors")
    save_file(weights(), tmp_path / "other.safetensors")
    write_index(folder, "model.safetensors", listed | {"fc.weight": name})
    assert f"lists {name!r}, which is no file of weights in its own folder" in refused(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"weight_map": {"a": 3}}', "{" * 100_000, '{"weight_map": {"a": ".."}}']
)
def test_what_is_no_index_is_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "trunk.init_from: " in refused(tmp_path)


def test_the_digest_of_parts_is_of_all_their_bytes(tmp_path: Path) -> None:
    in_parts(tmp_path, "pytorch_model.bin")
    before = digest_of(init_file(str(tmp_path)))
    part = tmp_path / "pytorch_model-00003-of-00003.bin"
    part.write_bytes(part.read_bytes() + b"x")
    assert digest_of(init_file(str(tmp_path))) != before
