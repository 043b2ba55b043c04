"""Words and bytes between a crawler and its checkers."""

import io
import os

import pytest

from ingest.image.channel import SHARED_BYTES, Channel


@pytest.fixture
def memory():
    descriptor = os.memfd_create("images")
    os.ftruncate(descriptor, SHARED_BYTES)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize(
    ("sizes", "in_memory"),
    [
        ([], True),
        ([0], True),
        ([3, 0, 70_000], True),
        ([SHARED_BYTES - 4], True),
        ([SHARED_BYTES - 3], False),
        ([SHARED_BYTES // 2, 0, SHARED_BYTES // 2], False),
    ],
)
def test_parts_arrive_through_memory_if_they_fit_and_else_through_the_pipe(memory, sizes, in_memory):
    parts = [os.urandom(size) for size in sizes]
    pipe = io.BytesIO()
    here = Channel(io.BytesIO(), pipe, memory)
    here.mark = 7
    here.send({"words": [1, None]}, parts)
    assert (len(pipe.getvalue()) < 1_000) == in_memory
    there = Channel(io.BytesIO(pipe.getvalue()), io.BytesIO(), memory)
    assert there.receive() == ({"words": [1, None]}, parts)
    assert there.mark == 7
    with pytest.raises(EOFError):
        there.receive()
