"""Lanes in turn: all requests, each lane's in order, and none waits for another lane's slow sites."""

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from ingest.crawl import lanes as module
from ingest.crawl.lanes import MOST_AT_A_TIME, WINDOW, Lanes


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def lane(name, count, rows=1):
    return ([(name, number)] * rows for number in range(count))


@given(
    sizes=st.lists(st.integers(0, 30), max_size=12),
    late=st.lists(st.booleans(), min_size=1),
    idle=st.booleans(),
)
def test_all_requests_come_each_lane_in_order_whenever_outcomes_come(sizes, late, idle):
    clock, under_way, found, step = Clock(), [], defaultdict(list), 0
    lanes = Lanes((lane(name, size) for name, size in enumerate(sizes)), is_idle=lambda: idle, clock=clock)
    for turn in lanes:
        step, clock.now = step + 1, clock.now + 0.1
        if turn is not None:
            found[turn[1][0][0]].append(turn[1][0][1])
            under_way.append(turn[0])
        assert turn is not None or under_way  # nobody waits for nothing
        if under_way and (turn is None or late[step % len(late)]):
            under_way.pop(0).known -= 1
    assert found == {name: list(range(size)) for name, size in enumerate(sizes) if size}


def test_a_lane_whose_site_does_not_answer_stops_no_other():
    clock = Clock()
    made = Lanes([lane("stuck", 10**6), *(lane(n, 50) for n in range(6))], is_idle=lambda: True, clock=clock)
    turns, done, under_way = iter(made), set(), []
    for turn in turns:
        clock.now += 0.01
        if turn is not None and turn[1][0][0] == "stuck":
            under_way.append(turn[0])
        elif turn is not None:
            turn[0].known -= 1
            done.add(turn[1][0])
        if len(done) == 300:
            break
    # The lane has had its share of the URLs that are known at a time, and no more.
    assert under_way[0].known <= WINDOW // 2


def test_no_further_lane_is_begun_while_all_connections_are_busy():
    clock, idle, begun = Clock(), False, set()
    lanes = Lanes([lane(n, 10**6) for n in range(500)], is_idle=lambda: idle, clock=clock)
    turns = iter(lanes)

    def look(turns_taken):
        for _ in range(turns_taken):
            clock.now += 0.05
            if (turn := next(turns)) is not None:
                begun.add(turn[1][0][0])
        return len(begun)

    assert look(5 * WINDOW // 4) == 1
    idle = True
    # One more now and then: what the one before has adds to what is under way only a moment later.
    first = look(10)
    assert 2 <= first <= 4
    assert look(30_000) == MOST_AT_A_TIME
    assert sum(each.known for each in lanes._open) <= WINDOW


def test_rows_that_wait_for_their_shard_hold_their_own_lane_up_only(monkeypatch):
    monkeypatch.setattr(module, "_WAITING_ROWS", 40)
    lanes = Lanes([lane("held", 1000), lane("free", 200)], is_idle=lambda: True, clock=(clock := Clock()))
    taken = defaultdict(int)
    for turn in lanes:
        clock.now += 0.1
        if turn is None:
            continue
        (here, [(name, _)]) = turn
        taken[name] += 1
        if name == "held" and taken[name] > 1:  # the first of them has no outcome, and the others wait for it
            here.known, here.waiting = here.known - 1, here.waiting + 1
        elif name == "free":
            here.known -= 1
            if taken[name] == 200:
                break
    assert taken["held"] <= 41
