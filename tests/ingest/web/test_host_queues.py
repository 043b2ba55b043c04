"""Whose turn it is, on no clock: hosts take turns, and those with most to ask for come first."""

from collections import Counter

from ingest.web.host_limits import HostLimits
from ingest.web.host_queues import Hosts


def test_a_host_with_a_long_queue_has_all_its_turns_before_others_have_theirs() -> None:
    hosts: Hosts[int] = Hosts(HostLimits((), connections=3, rate=None), per_address=9, idle_limit=9)
    for name, jobs in (("small", 2), ("long", 40), ("other", 2)):
        for job in range(jobs):
            hosts.add(name, job, 0.0)
    turns = [turn for _ in range(7) if (turn := hosts.take(0.0)) is not None]
    assert [turn.name for turn in turns] == ["small", "long", "long", "long", "other", "small", "other"]
    for turn in turns:
        hosts.done(turn, 1.0)
    turns = [turn for _ in range(3) if (turn := hosts.take(1.0)) is not None]
    assert [turn.name for turn in turns] == ["long"] * 3


def test_neither_short_nor_long_queues_starve_while_there_are_more_long_ones_than_connections() -> None:
    hosts: Hosts[int] = Hosts(HostLimits((), connections=1, rate=None), per_address=9, idle_limit=9)
    for job in range(400):
        for name in ("one", "two", "three"):
            hosts.add(name, job, 0.0)
    for number in range(20):
        hosts.add(f"short {number}", 0, 0.0)
    asked = []
    for now in range(400):  # one connection
        turn = hosts.take(float(now))
        assert turn is not None
        asked.append(turn.name)
        hosts.done(turn, float(now))
    shorts = [place for place, name in enumerate(asked) if name.startswith("short")]
    assert len(shorts) == 20 and 150 < shorts[-1] < 200  # one of eight
    longs = Counter(asked[:160])
    assert min(longs[name] for name in ("one", "two", "three")) >= 40
