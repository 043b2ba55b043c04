"""Whose turn it is, on no clock: hosts take turns, and those with most to ask for come first."""

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
