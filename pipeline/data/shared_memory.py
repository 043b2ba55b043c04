"""Tensors from process to process through shared memory that is used again.

The first touch of a page of shared memory costs a kernel more than filling it, so that fresh memory for each
batch, torch's way, bounds all workers together. Here a few buffers go round: a value's tensors are copied
into one, the rest is pickled around them, and the receiver's tensors lie in the buffer. When the last of them
is dropped the buffer is free again; to keep them for long only makes the sender fall back to fresh memory.
"""

import io
import pickle
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64


@dataclass(frozen=True)
class Parcel:
    """A value whose tensors lie in buffer number `slot`."""

    slot: int
    data: bytes


class Buffers:
    """Some shared buffers of equal size; a worker process that is started with them has the same memory."""

    def __init__(self, *, count: int, size: int) -> None:
        self._tensors = [torch.empty(size, dtype=torch.uint8) for _ in range(count)]
        for tensor in self._tensors:
            tensor.share_memory_()  # type: ignore[no-untyped-call]

    def pack(self, value: object, slot: int) -> Parcel:
        """Copy the value's tensors into a buffer; those that do not fit are pickled with the rest."""
        data = io.BytesIO()
        _Packer(data, self._tensors[slot]).dump(value)
        return Parcel(slot, data.getvalue())

    def unpack(self, parcel: Parcel, free: deque[int]) -> Any:
        """The value; its slot is appended to `free` when its last tensor is gone."""
        # A new array at each call, held by the tensors made from it: its life is the slot's use.
        lease = self._tensors[parcel.slot].numpy()
        weakref.finalize(lease, free.append, parcel.slot)
        return _Unpacker(io.BytesIO(parcel.data), lease).load()


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, buffer: Tensor) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._buffer = buffer
        self._used = 0

    def persistent_id(self, value: object) -> tuple[object, ...] | None:
        if not isinstance(value, Tensor):
            return None
        size, start = value.numel() * value.element_size(), self._used
        if start + size > len(self._buffer):
            return None
        if value.storage_offset() or value.untyped_storage().nbytes() != size:
            value = value.clone(memory_format=torch.contiguous_format)
        # The memory of a dense tensor is copied as it lies, whatever the strides.
        flat = value.as_strided((value.numel(),), (1,), 0)
        self._buffer[start : start + size] = flat.view(torch.uint8)
        self._used = -(-(start + size) // _ALIGNMENT) * _ALIGNMENT
        return start, value.dtype, tuple(value.shape), value.stride()


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, lease: Any) -> None:
        super().__init__(file)
        self._lease = lease

    def persistent_load(self, place: Any) -> Tensor:
        start, dtype, shape, stride = place
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self._lease, dtype=dtype, count=count, offset=start)
        return flat.as_strided(shape, stride)
