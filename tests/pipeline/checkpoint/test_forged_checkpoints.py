"""S1: a checkpoint of somebody else's, with a manifest that agrees, runs nothing and ends in a sentence."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from cluster.errors import UserError
from pipeline.checkpoint.files import read_tensors
from pipeline.checkpoint.metadata import TensorReader
from pipeline.checkpoint.writer import digest
from tests.pipeline.checkpoint.test_checkpoint import advance, checkpoints, make

ROOT = Path(__file__).parents[3]
NAME = "method.unused"


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._proof),)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Metadata]:
    """A checkpoint, and its metadata as torch reads it."""
    method, optimizer = make(0)
    advance(method, optimizer, 1)
    checkpoint = checkpoints(tmp_path / "run", method, optimizer).save(1, {})
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())  # noqa: S301 -- it is ours
    return checkpoint, metadata


def publish(checkpoint: Path, metadata: object) -> None:
    data = metadata if isinstance(metadata, bytes) else pickle.dumps(metadata)
    (checkpoint / ".metadata").write_bytes(data)
    names = [path.name for path in checkpoint.iterdir() if path.name != "manifest.json"]
    manifest = {"files": {name: digest(checkpoint / name) for name in names}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def add_file(checkpoint: Path, metadata: Metadata, data: bytes) -> None:
    """Have the metadata say that a tensor lies in a file that holds these bytes."""
    (checkpoint / "__9_0.distcp").write_bytes(data)
    place(metadata, "__9_0.distcp", length=len(data))


def place(metadata: Metadata, path: str, **changes: Any) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == NAME)
    metadata.storage_data[index] = _StorageInfo(**{"relative_path": path, "offset": 0, "length": 1} | changes)


def torch_saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def runs_at_once(checkpoint: Path, metadata: Metadata, proof: Path) -> object:
    return Runs(proof)


def runs_aside(checkpoint: Path, metadata: Metadata, proof: Path) -> object:
    metadata.planner_data = {"harmless": Runs(proof)}
    return metadata


def runs_by_an_old_pickle(checkpoint: Path, metadata: Metadata, proof: Path) -> object:
    return b"cposix\nsystem\n(Vtouch " + str(proof).encode() + b"\ntR."


def changes_a_class(checkpoint: Path, metadata: Metadata, proof: Path) -> object:
    """BUILD with a class in place of an object would set the class's attributes."""
    return (
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93"
        b"N}\x8c\x0c__setstate__\x8c\x01xs\x86b."
    )


def no_tensor(checkpoint: Path, metadata: Metadata, proof: Path) -> object:
    """torch unpickles what is said to be no tensor without any bounds."""
    add_file(checkpoint, metadata, torch_saved(Runs(proof)))
    index = next(index for index in metadata.storage_data if index.fqn == NAME)
    metadata.storage_data[MetadataIndex(NAME)] = metadata.storage_data.pop(index)
    metadata.state_dict_metadata[NAME] = BytesStorageMetadata()
    return metadata


def a_tensor_that_runs(checkpoint: Path, metadata: Metadata, proof: Path) -> object:
    add_file(checkpoint, metadata, torch_saved(Runs(proof)))
    return metadata


def a_tensor_of_another_shape(checkpoint: Path, metadata: Metadata, proof: Path) -> object:
    add_file(checkpoint, metadata, torch_saved(torch.zeros(1)))
    return metadata


def another_thing_than_a_tensor(checkpoint: Path, metadata: Metadata, proof: Path) -> object:
    add_file(checkpoint, metadata, torch_saved({"a": 1}))
    return metadata


def a_file_elsewhere(checkpoint: Path, metadata: Metadata, proof: Path) -> object:
    proof.with_name("secret").write_bytes(torch_saved(torch.ones(2)))
    place(metadata, "../../../secret", length=10_000)
    return metadata


def beyond_the_end(checkpoint: Path, metadata: Metadata, proof: Path) -> object:
    place(metadata, "__0_0.distcp", length=1 << 40)
    return metadata


def through_a_transform(checkpoint: Path, metadata: Metadata, proof: Path) -> object:
    place(metadata, "__0_0.distcp", transform_descriptors=["zstd"])
    return metadata


def huge(checkpoint: Path, metadata: Metadata, proof: Path) -> object:
    metadata.state_dict_metadata[NAME].size = torch.Size([1 << 40])  # type: ignore[union-attr]
    return metadata


def a_piece_beside_its_tensor(checkpoint: Path, metadata: Metadata, proof: Path) -> object:
    metadata.state_dict_metadata[NAME].chunks[0].offsets = torch.Size([7])  # type: ignore[union-attr]
    return metadata


def nothing_at_all(checkpoint: Path, metadata: Metadata, proof: Path) -> object:
    return b""


FORGERIES = [
    runs_at_once,
    runs_aside,
    runs_by_an_old_pickle,
    changes_a_class,
    no_tensor,
    a_tensor_that_runs,
    a_tensor_of_another_shape,
    another_thing_than_a_tensor,
    a_file_elsewhere,
    beyond_the_end,
    through_a_transform,
    huge,
    a_piece_beside_its_tensor,
    nothing_at_all,
]


def resume(checkpoint: Path) -> None:
    checkpoints(checkpoint.parents[1], *make(1)).load()


@pytest.mark.parametrize("read", [lambda checkpoint: read_tensors(checkpoint, prefix=""), resume])
@pytest.mark.parametrize("forge", FORGERIES)
def test_S1_a_forged_checkpoint_runs_nothing_and_ends_in_a_sentence(
    saved: tuple[Path, Metadata],
    tmp_path: Path,
    forge: Callable[[Path, Metadata, Path], object],
    read: Callable[[Path], object],
) -> None:
    checkpoint, metadata = saved
    proof = tmp_path / "it-ran"
    publish(checkpoint, forge(checkpoint, metadata, proof))

    with pytest.raises(UserError) as caught:
        read(checkpoint)

    assert not proof.exists()
    sentence = str(caught.value)
    assert str(checkpoint) in sentence and "\n" not in sentence and len(sentence) < 600


def test_S1_the_forgeries_would_run_in_torch(saved: tuple[Path, Metadata], tmp_path: Path) -> None:
    """Or the test above proves nothing."""
    checkpoint, metadata = saved
    for number, forge in enumerate([runs_at_once, runs_aside, runs_by_an_old_pickle]):
        proof = tmp_path / f"proof-{number}"
        forged = forge(checkpoint, metadata, proof)
        pickle.loads(forged if isinstance(forged, bytes) else pickle.dumps(forged))  # noqa: S301
        assert proof.exists()


def test_a_manifest_names_only_files_of_its_folder(saved: tuple[Path, Metadata]) -> None:
    checkpoint, metadata = saved
    publish(checkpoint, metadata)
    read_tensors(checkpoint, prefix="")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for wrong in ({"../../x": {"bytes": 0, "sha256": ""}}, ["x"], {".metadata": 3}):
        (checkpoint / "manifest.json").write_text(json.dumps({"files": wrong}))
        with pytest.raises(UserError, match="is broken: "):
            read_tensors(checkpoint, prefix="")
    (checkpoint / "manifest.json").write_text('{"files":' + "[" * 100_000)
    with pytest.raises(UserError, match="is broken: its manifest cannot be read"):
        read_tensors(checkpoint, prefix="")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    read_tensors(checkpoint, prefix="")


def test_the_metadata_is_made_anew_as_it_was(saved: tuple[Path, Metadata]) -> None:
    checkpoint, metadata = saved
    publish(checkpoint, metadata)
    reader = TensorReader(checkpoint)
    assert reader.tensors == metadata.state_dict_metadata
    assert reader._reader.known.storage_data == metadata.storage_data


def calls(name: str) -> Iterator[tuple[Path, ast.Call]]:
    """Where the product calls something of this name."""
    for package in ("cluster", "ingest", "pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            if re.search(rf"\b{name}\(", text := path.read_text()):
                for node in ast.walk(ast.parse(text)):
                    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name):
                        yield path, node


def test_S1_every_file_of_torchs_is_read_as_data() -> None:
    for path, call in calls("torch.load"):
        assert {word.arg: ast.unparse(word.value) for word in call.keywords}["weights_only"] == "True", path
    for path, call in calls("np.load"):
        assert "allow_pickle=True" not in ast.unparse(call), path
    # Its subclass there reads no pickle.
    assert not list(calls("FileSystemReader"))
