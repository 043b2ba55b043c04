"""Features on disk: a safetensors file that ranks fill together, each its own rows, and that is mapped when
it is read. However many rows there are, no process holds more of them than it has in hand.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from cluster.errors import UserError
from pipeline.recipe.stages import FeaturePrecision

_NAMES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_MOST_HEADER = 100_000_000  # bytes, as the format has it


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of N samples, in dataset order.

    `x` (N, D), float32, or float16 or bfloat16 as it was written: of a file it is the mapped file, which
    cannot be written to, and is better read in chunks (`pipeline.transfer.rows`). `y` int64 (N,), an index
    into `classes` (sorted names, of labels or of sets of labels: see `pipeline.transfer.labels`); `keys`
    int64 (N,) sample keys; where several windows of a sample have rows of their own, these repeat.
    """

    x: Tensor
    y: Tensor
    keys: Tensor
    classes: tuple[str, ...]


class FeatureWriter:
    """Fills a file of features. Several processes may each fill their own rows of one path: all give the same
    arguments, and the bytes are those of a single one.

    Args:
        y, keys, classes: as in `Features`; of all rows.
        dim: D.
        heading: write what is not `x`, too: one of the processes has to.
    """

    def __init__(
        self,
        path: Path,
        *,
        y: Tensor,
        keys: Tensor,
        classes: Sequence[str],
        dim: int,
        precision: FeaturePrecision = "fp32",
        heading: bool = True,
    ) -> None:
        self._path, self._rows, self._dim = path, len(y), dim
        self._dtype = _DTYPES[_NAMES[precision]]
        head = _header(len(y), dim, _NAMES[precision], classes)
        small = b"".join(part.to(torch.int64).contiguous().numpy().tobytes() for part in (y, keys))
        self._start = len(head) + len(small)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        # No mapping: machines that share a folder would overwrite each other's rows where these share a page.
        os.ftruncate(self._file, self._start + len(y) * dim * self._dtype.itemsize)
        if heading:
            self._write(head + small, 0)

    def write(self, first: int, x: Tensor) -> None:
        """Rows from `first` on: (n, D), on any device.

        Raises:
            UserError: if a number is too large for the precision.
        """
        if x.shape[1] != self._dim or not 0 <= first <= self._rows - len(x):
            raise ValueError(f"{tuple(x.shape)} at row {first} is no part of ({self._rows}, {self._dim})")
        written = rounded(x, self._dtype, self._path)
        data = written.cpu().contiguous().view(torch.uint8).numpy()
        self._write(data.tobytes(), self._start + first * self._dim * self._dtype.itemsize)

    def _write(self, data: bytes, offset: int) -> None:
        left = memoryview(data)
        while left:
            written = os.pwrite(self._file, left, offset)
            left, offset = left[written:], offset + written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._file)
        finally:
            os.close(self._file)


def rounded(x: Tensor, dtype: torch.dtype, path: Path) -> Tensor:
    """Features in the precision in which a file is to have them.

    Raises:
        UserError: if a number is too large for it.
    """
    written = x.to(dtype)
    if dtype == torch.float16 and not torch.equal(written.isfinite(), x.isfinite()):
        raise UserError(
            f"{path.name}: features up to {float(x.abs().max()):.3g} do not fit into fp16, which ends at "
            "65504: choose the precision bf16 or fp32"
        )
    return written


def _header(rows: int, dim: int, dtype: str, classes: Sequence[str]) -> bytes:
    """`x` comes last, so that what comes before is of multiples of 8 bytes, and every tensor lies even."""
    small, itemsize = 8 * rows, _DTYPES[dtype].itemsize
    parts = {
        "__metadata__": {str(index): name for index, name in enumerate(classes)},
        "y": {"dtype": "I64", "shape": [rows], "data_offsets": [0, small]},
        "keys": {"dtype": "I64", "shape": [rows], "data_offsets": [small, 2 * small]},
        "x": {
            "dtype": dtype,
            "shape": [rows, dim],
            "data_offsets": [2 * small, 2 * small + rows * dim * itemsize],
        },
    }
    return safetensors_header(parts)


def safetensors_header(parts: Mapping[str, Any]) -> bytes:
    """The beginning of a safetensors file, of a multiple of 8 bytes: what `parts` says of its tensors."""
    text = json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def save_features(features: Features, path: Path) -> None:
    """Write features that are in memory, in float32."""
    dim = features.x.shape[1]
    with FeatureWriter(path, y=features.y, keys=features.keys, classes=features.classes, dim=dim) as file:
        file.write(0, features.x)


def load_features(path: Path) -> Features:
    """Map a file of features.

    Raises:
        UserError: if it is something else, or not whole.
    """
    try:
        return _map(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} holds no features ({error}): remove it and submit the graph again, which makes it anew"
        ) from error


def _map(path: Path) -> Features:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MOST_HEADER):
            raise ValueError("it has no header of safetensors")
        header = json.loads(file.read(length))
    names = header.get("__metadata__") or {}
    classes = tuple(names[str(index)] for index in range(len(names)))
    start = 8 + length
    end = start + max(header[name]["data_offsets"][1] for name in ("x", "y", "keys"))
    if end != size:
        raise ValueError(f"it has {size} bytes of {end}")
    mapped = np.memmap(path, np.uint8, mode="r")
    with warnings.catch_warnings():
        # Of a tensor that cannot be written to: a mapping that can be would have to fit into memory.
        warnings.simplefilter("ignore", UserWarning)
        data = torch.from_numpy(mapped)[start:]
    x, y, keys = (_tensor(data, header[name]) for name in ("x", "y", "keys"))
    if not (x.ndim == 2 and y.shape == keys.shape == x.shape[:1] and y.dtype == keys.dtype == torch.int64):
        raise ValueError("its tensors do not fit together")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(classes):
        raise ValueError("it has labels without a name")
    return Features(x=x, y=y.clone(), keys=keys.clone(), classes=classes)


def _tensor(data: Tensor, said: dict[str, Any]) -> Tensor:
    (begin, end), dtype, shape = said["data_offsets"], _DTYPES[said["dtype"]], said["shape"]
    if not 0 <= begin <= end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("its header contradicts itself")
    return data[begin:end].view(dtype).reshape(shape)
