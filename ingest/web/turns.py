"""What `host_queues.py` knows of hosts, of the addresses where they are, and of turns."""

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ingest.problem import Problem

Job = TypeVar("Job")


@dataclass(slots=True, eq=False, weakref_slot=True)
class Place:
    """An address; known as long as a host that is there.

    Attributes:
        active: requests under way.
        not_before: no request of a host with a Crawl-delay before this time.
        reserved: until when such hosts have been promised turns, one after another.
        waiters: hosts for which it was too busy, in order.
        called: such hosts that were sent to the ring since, where room is kept for them.
    """

    active: int = 0
    not_before: float = 0.0
    reserved: float = 0.0
    waiters: "OrderedDict[Host[Any], None] | None" = None
    called: int = 0


@dataclass(slots=True, eq=False)
class Host(Generic[Job]):
    """
    Attributes:
        active: requests under way.
        most: requests that may be under way together.
        interval: seconds between requests, from the beginning of one to that of the next.
        delay: of these, what hosts of one address keep together: its Crawl-delay.
        not_before: no request before this time.
        keys, places: its addresses.
        strikes: failures in a row.
        left_alone: seconds for which it was left alone last, if it has not answered since.
        refusal: what is said of its URLs until `refused_until`, instead of asking.
        listed: it is in the ring, in the heap of those that wait, or among a place's waiters.
        soon: next time it is listed in front.
        waits_at: whose waiter it is.
        called_by: whose it was, now that it is in the ring.
        last: when its latest request ended.
        held_back: seconds, up to `seen`, in which it had as many requests as it may have, or had to be waited
            for.
        requests: that have ended.
    """

    name: str
    most: int
    interval: float
    queue: deque[Job] | None = None
    active: int = 0
    delay: float = 0.0
    not_before: float = 0.0
    keys: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()
    strikes: int = 0
    left_alone: float = 0.0
    refusal: Problem | None = None
    refused_until: float = 0.0
    listed: bool = False
    soon: bool = False
    waits_at: Place | None = None
    called_by: Place | None = None
    last: float = 0.0
    held_back: float = 0.0
    seen: float = 0.0
    requests: int = 0


@dataclass(slots=True, eq=False)
class Turn(Generic[Job]):
    """A job whose time has come.

    Attributes:
        refusal: the host is left alone: do not ask. Otherwise `settle` and `done` must follow.
        places: where it counts.
    """

    host: Host[Job]
    job: Job
    refusal: Problem | None
    places: tuple[Place, ...] = ()

    @property
    def name(self) -> str:
        return self.host.name
