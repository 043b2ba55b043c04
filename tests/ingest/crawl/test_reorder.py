"""Whatever order things end in, they go on in the order of the plan, within the memory that is allowed."""

from hypothesis import given
from hypothesis import strategies as st

from ingest.crawl.reorder import Memory, Reorder


@given(
    order=st.permutations(range(12)),
    sizes=st.lists(st.integers(0, 40), min_size=12, max_size=12),
    limit=st.integers(0, 100),
)
def test_D1_the_order_of_arrival_changes_nothing(order, sizes, limit):
    memory = Memory(limit)
    reorder = Reorder[str](memory)
    handed_on = []
    for index in order:
        data = bytes([index]) * sizes[index]
        handed_on += reorder.put(index, f"item {index}", data)
        assert 0 <= memory.left <= limit
        assert reorder.next == len(handed_on)
    assert handed_on == [(f"item {index}", bytes([index]) * sizes[index]) for index in range(12)]
    assert memory.left == limit
    reorder.close()


def test_what_waits_is_let_go_when_a_unit_is_given_up():
    memory = Memory(10)
    reorder = Reorder[None](memory)
    for index, size in ((3, 8), (2, 8)):  # the first in memory, the second in a file
        assert list(reorder.put(index, None, b"x" * size)) == []
    assert memory.left == 2
    reorder.close()
    assert memory.left == 10
