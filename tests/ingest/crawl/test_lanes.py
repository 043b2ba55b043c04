"""Lanes in turn: all requests, each lane's in order, and none waits for another lane's slow sites."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.crawl import lanes as module
from ingest.crawl.lanes import MOST_AT_A_TIME, WINDOW, Lanes


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def lane(name, count, hosts=10**9):
    """Requests of one row, in turn for so many hosts of the lane."""
    return ([(name, number, number % hosts)] for number in range(count))


def lanes_of(lanes, *, per_host=2, is_idle=lambda: True, is_full=lambda: False, clock, rows=0):
    return Lanes(
        ((rows, requests) for requests in lanes),
        host_of=lambda request: request[0][::2],
        per_host=per_host if callable(per_host) else lambda host: per_host,
        is_idle=is_idle,
        is_full=is_full,
        clock=clock,
    )


def end(turn, *, written=True):
    """The outcome of a request is there, and its row is written."""
    lane, request = turn
    lane.ended(request, request[0][::2])
    lane.ahead -= written


@given(
    sizes=st.lists(st.integers(0, 200), max_size=8),
    hosts=st.integers(1, 4),
    late=st.lists(st.booleans(), min_size=1),
    idle=st.booleans(),
    full=st.booleans(),
)
def test_all_requests_come_each_host_in_order_whenever_outcomes_come(sizes, hosts, late, idle, full):
    clock, under_way, found, step = Clock(), [], defaultdict(list), 0
    lanes = lanes_of(
        (lane(name, size, hosts) for name, size in enumerate(sizes)),
        is_idle=lambda: idle,
        is_full=lambda: full,
        clock=clock,
    )
    for turn in lanes:
        step, clock.now = step + 1, clock.now + 0.1
        if turn is not None:
            name, number, host = turn[1][0]
            found[name, host].append(number)
            under_way.append(turn)
        assert turn is not None or under_way  # nobody waits for nothing
        if under_way and (turn is None or late[step % len(late)]):
            end(under_way.pop(0))
    assert not under_way or all(turn[0].known for turn in under_way)
    expected = {
        (name, host): list(range(host, size, hosts))
        for name, size in enumerate(sizes)
        for host in range(hosts)
    }
    assert found == {key: numbers for key, numbers in expected.items() if numbers}


def test_a_host_that_does_not_answer_stops_no_other_of_its_lane():
    done, stuck = 0, 0
    lanes = lanes_of([lane("a", 20_000, 2)], clock=Clock())
    for turn in lanes:
        if turn is None:
            break
        if turn[1][0][2] == 1:
            stuck += 1
        else:
            end(turn)
            done += 1
    assert stuck == 64  # it knows so many, and the others are put aside
    assert done == 10_000
    assert lanes.left() == {("a", 1): 10_000 - 64}


def test_of_what_waits_the_rest_is_expected_as_sites_take_turns_in_proportion():
    lanes = lanes_of([lane("a", 100_000, 2)], rows=100_000, clock=Clock())
    for turn in lanes:
        if turn is None:  # so many rows wait for their place
            break
        if turn[1][0][2] == 0:
            end(turn, written=False)
    assert lanes.left() == {("a", 1): 50_000 - 64}


def known_of_one_host(per_host, requests):
    """How many requests are given out until there are none but by outcomes, and the turns."""
    turns = iter(lanes_of([iter(requests)], per_host=per_host, clock=Clock()))
    return list(iter(lambda: next(turns), None)), turns


def test_a_host_that_may_be_asked_more_at_a_time_has_as_many_requests():
    for per_host in (2, 16, 100):
        given_out, _ = known_of_one_host(per_host, lane("a", 5000, 1))
        assert len(given_out) >= max(64, 2 * per_host)


def test_what_was_put_aside_for_a_request_of_many_rows_comes_all_at_once():
    video = [("a", 0, 0)] * 500
    (turn,), turns = known_of_one_host(2, [video, *lane("a", 1000, 1)])
    turn[0].ended(turn[1], ("a", 0))
    assert len(list(iter(lambda: next(turns), None))) == 64


def test_what_is_fetched_ahead_of_a_slow_host_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_AHEAD", 1000)
    taken = 0
    for turn in lanes_of([lane("a", 20_000, 2)], clock=Clock()):
        if turn is None:
            break
        if turn[1][0][2] == 0:
            end(turn, written=False)
            taken += 1
    assert taken == 251


def test_all_lanes_together_are_no_further_ahead_than_there_is_room(monkeypatch):
    """The first one was alone, and might have taken all."""
    monkeypatch.setattr(module, "_AHEAD", 1000)
    clock, ahead = Clock(), {}
    for turn in lanes_of([lane(n, 20_000, 2) for n in range(9)], clock=clock):
        clock.now += 0.1
        if turn is not None:
            ahead[turn[1][0][0]] = turn[0].ahead
            if turn[1][0][2] == 0:
                end(turn, written=False)
        elif len(ahead) == 9:
            break
    assert 900 < sum(ahead.values()) <= 1000 + len(ahead)


def test_while_the_disk_is_full_nothing_is_begun_but_by_a_lane_that_waits_for_nothing():
    lanes = lanes_of([lane(n, 100, 3) for n in range(5)], is_full=lambda: True, clock=Clock())
    given_out = [turn for turn, _ in zip(lanes, range(50), strict=False) if turn is not None]
    assert [turn[1][0] for turn in given_out] == [(0, 0, 0)]


def test_a_lane_that_stands_still_stops_no_other():
    clock, done, stuck = Clock(), set(), 0
    for turn in lanes_of([lane("stuck", 10**6), *(lane(n, 50) for n in range(6))], clock=clock):
        clock.now += 0.01
        if turn is not None and turn[1][0][0] == "stuck":
            stuck += 1
        elif turn is not None:
            end(turn)
            done.add(turn[1][0])
        if len(done) == 300:
            break
    assert stuck <= WINDOW


def test_the_longest_lanes_are_begun_first():
    """The largest sites are in these, and decide when all is over."""
    begun: list[int] = []
    lanes = Lanes(
        ((rows, lane(rows, rows)) for rows in (50, 900, 20, 300)),
        host_of=lambda request: request[0][::2],
        per_host=lambda host: 1,
        is_idle=lambda: True,
        clock=Clock(),
    )
    for turn in filter(None, lanes):
        end(turn)
        if turn[1][0][0] not in begun:
            begun.append(turn[1][0][0])
    assert begun == [900, 300, 50, 20]


@pytest.mark.slow
def test_no_further_lane_is_begun_while_all_connections_are_busy():
    clock, idle, begun = Clock(), False, set()
    lanes = lanes_of([lane(n, 10**6) for n in range(500)], is_idle=lambda: idle, clock=clock)
    turns = iter(lanes)

    def look(turns_taken):
        for _ in range(turns_taken):
            clock.now += 0.05
            if (turn := next(turns)) is not None:
                begun.add(turn[1][0][0])
        return len(begun)

    assert look(2 * WINDOW) == 1
    idle = True
    # One more now and then: what the one before has adds to what is under way only a moment later.
    assert 2 <= look(10) <= 4
    assert look(2 * WINDOW) == MOST_AT_A_TIME
