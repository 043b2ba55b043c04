"""Values through shared buffers: equal on the other side, and a buffer is used again only when it may be."""

import gc
from collections import deque
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pipeline.data.shared_memory import Buffers


@dataclass(frozen=True)
class Value:
    tensors: list[Tensor]
    name: str


STRANGE = [
    torch.arange(24.0).reshape(2, 3, 4),
    torch.arange(24, dtype=torch.uint8).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    torch.arange(24, dtype=torch.int64)[3:17:2],
    torch.arange(24, dtype=torch.int64)[3:17],
    torch.arange(4)[3:].expand(4),
    torch.zeros(0, 5),
    torch.tensor(7, dtype=torch.int16),
    torch.arange(3).expand(4, 3),
    torch.tensor([True, False]),
]


def test_tensors_of_every_kind_arrive_equal() -> None:
    buffers, free = Buffers(count=1, size=4_096), deque[int]()
    out = buffers.unpack(buffers.pack(Value(STRANGE, "name"), 0), free)
    assert out.name == "name"
    for ours, theirs in zip(out.tensors, STRANGE, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert out.tensors[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [0, 96, 128, 250])
def test_what_does_not_fit_arrives_too(size: int) -> None:
    buffers, free = Buffers(count=1, size=size), deque[int]()
    out = buffers.unpack(buffers.pack(Value(STRANGE, "name"), 0), free)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(out.tensors, STRANGE, strict=True))


@pytest.mark.slow
def test_a_slot_is_free_when_its_last_tensor_is_gone() -> None:
    buffers, free = Buffers(count=2, size=4_096), deque[int]()
    out = buffers.unpack(buffers.pack(Value(STRANGE, "name"), 1), free)
    gc.collect()
    assert not free
    view = out.tensors[0][1:, :2]
    del out
    gc.collect()
    assert not free
    del view  # at once: no cycle may keep it until the collector runs
    assert list(free) == [1]
