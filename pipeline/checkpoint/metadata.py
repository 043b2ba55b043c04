"""A checkpoint's `.metadata`, read as data: no name in it is looked up, and nothing in it is called (S1).

torch.distributed.checkpoint pickles it, and a pickle can run anything. The manifest is no proof: who forges
the one writes the other. Here the dozen names that such a file has stand for plain records, and torch's
metadata is made anew from what they hold: tensors only, and only in the checkpoint's own files. For torch's
reader does what the metadata says: it unpickles what is said to be no tensor, and opens any path.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

from cluster.errors import UserError
from pipeline.checkpoint.writer import alone_on_purpose, cause, vouched


class TensorReader:
    """Reads the tensors of a checkpoint that agrees with its manifest.

    Attributes:
        tensors: what there is of each, by name.

    Raises:
        UserError: if its metadata is no description of tensors in its own files.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._reader = _Reader(checkpoint)
        self.tensors: dict[str, TensorStorageMetadata] = self._reader.known.state_dict_metadata  # type: ignore[assignment]

    def room(self, name: str) -> Tensor:
        """Memory for a whole tensor."""
        entry = self.tensors[name]
        return torch.empty(entry.size, dtype=entry.properties.dtype)

    def load(self, into: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
        """Fill tensors by name; with a group, all of its ranks together, each its own pieces.

        Raises:
            UserError: if what is in the files is not what the metadata says.
        """
        try:
            with alone_on_purpose():
                load(into, storage_reader=self._reader, process_group=group, no_dist=group is None)
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            runs = isinstance(first, pickle.UnpicklingError)  # torch's own words say how to run it
            why = "they hold more than tensors, which could run code" if runs else cause(error)
            raise UserError(
                f"the files of checkpoint {self._checkpoint} are not what its list of tensors says ({why}): "
                "use another checkpoint"
            ) from error


class _Reader(FileSystemReader):
    """torch's, which would unpickle the metadata at each call."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self.known = _read(checkpoint)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.known


class _Record:
    """What a class of torch's stands for: the arguments that it was to be called with, and the state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Whole(_Record): ...


class _Entry(_Record): ...


class _Properties(_Record): ...


class _Chunk(_Record): ...


class _Index(_Record): ...


class _Place(_Record): ...


_METADATA = "torch.distributed.checkpoint.metadata"
_MEANINGS: dict[tuple[str, str], type] = {
    (_METADATA, "Metadata"): _Whole,
    (_METADATA, "TensorStorageMetadata"): _Entry,
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "ChunkStorageMetadata"): _Chunk,
    (_METADATA, "MetadataIndex"): _Index,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Place,
    ("torch", "Size"): tuple,
    # Of no use to us.
    (_METADATA, "StorageMeta"): _Record,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    ("pathlib", "PosixPath"): _Record,
    ("pathlib._local", "PosixPath"): _Record,
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) in _MEANINGS:
            return _MEANINGS[module, name]
        raise _ForgedError(f"it names {module}.{name}")


class _ForgedError(Exception):
    """This is not what torch writes of tensors."""


def _read(checkpoint: Path) -> Metadata:
    try:
        data = (checkpoint / ".metadata").read_bytes()
        files = {name: _a(entry["bytes"], int) for name, entry in vouched(checkpoint).items()}
        return _made_anew(_Unpickler(io.BytesIO(data)).load(), files)
    except Exception as error:  # a forged pickle fails in any way
        what = str(error) if isinstance(error, _ForgedError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{checkpoint / '.metadata'} is not a checkpoint's list of tensors ({what[:200]!r}): it was not "
            "read further, for such a file can be made to run code; use a checkpoint from whom you trust"
        ) from error


def _made_anew(found: Any, files: Mapping[str, int]) -> Metadata:
    """Args: files: bytes of each of the checkpoint's own files."""
    state = _state(found, _Whole)
    entries = {
        _a(name, str): _entry(name, entry) for name, entry in _a(state["state_dict_metadata"], dict).items()
    }
    claimed = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in entries.values())
    if claimed > sum(files.values()):
        raise _ForgedError(f"its tensors have {claimed} bytes, and its files {sum(files.values())}")
    return Metadata(
        state_dict_metadata=dict(entries),
        storage_data={
            _index(index): _place(place, files) for index, place in _a(state["storage_data"], dict).items()
        },
        storage_meta=StorageMeta(),
    )


def _entry(name: str, found: Any) -> TensorStorageMetadata:
    if not isinstance(found, _Entry):
        raise _ForgedError(f"{name} is no tensor")
    state = _state(found, _Entry)
    properties = _a(state["properties"], _Properties)
    size = _size(state["size"])
    chunks = [_chunk(chunk, size) for chunk in _a(state["chunks"], list)]
    dtype = _a(_a(properties.state, tuple)[0], torch.dtype)
    return TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=size, chunks=chunks)


def _chunk(found: Any, size: torch.Size) -> ChunkStorageMetadata:
    state = _state(found, _Chunk)
    offsets, sizes = _size(state["offsets"]), _size(state["sizes"])
    for offset, length, whole in zip(offsets, sizes, size, strict=True):
        if offset + length > whole:
            raise _ForgedError("a piece is larger than its tensor")
    return ChunkStorageMetadata(offsets=offsets, sizes=sizes)


def _index(found: Any) -> MetadataIndex:
    state = _state(found, _Index)
    offset, index = state.get("offset"), state.get("index")
    return MetadataIndex(
        _a(state["fqn"], str),
        None if offset is None else _size(offset),
        None if index is None else _a(index, int),
    )


def _place(found: Any, files: Mapping[str, int]) -> _StorageInfo:
    state = _state(found, _Place)
    path, offset, length = _a(state["relative_path"], str), _a(state["offset"], int), _a(state["length"], int)
    if path not in files:
        raise _ForgedError(f"a tensor lies in {path}, which the manifest does not name")
    if not 0 <= offset <= offset + length <= files[path] or state.get("transform_descriptors"):
        raise _ForgedError(f"no tensor can lie at {offset} of {path}")
    return _StorageInfo(path, offset, length)


def _size(found: Any) -> torch.Size:
    numbers = _a(found, tuple)
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers):
        raise _ForgedError(f"{numbers!r:.100} is no shape")
    return torch.Size(numbers)


def _state(found: Any, kind: type[_Record]) -> dict[str, Any]:
    state: dict[str, Any] = _a(_a(found, kind).state, dict)
    return state


def _a(found: Any, kind: type) -> Any:
    if type(found) is not kind:
        raise _ForgedError(f"a {type(found).__name__} is where a {kind.__name__} should be")
    return found
