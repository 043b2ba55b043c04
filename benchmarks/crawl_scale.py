"""Claim: a crawl of any size ends when politeness and connections let it, within a tenth.

    python benchmarks/crawl_scale.py [--rows 10000000] [--crawlers 1 16 64] [--per-host 2 16] [--lanes 8]

The real lanes and host queues on a virtual clock, without a network. Sites have rows by Zipf's law (a tenth
as many sites as rows), answer after 50 ms to 20 s (a median of 0.3), and each tenth one never does. Of each
division one crawler is looked at, with 256 connections; of plans too large for that, `--lanes` whole lanes
with their share of its connections. Prints when 50, 90, 99 and 100 % of its rows are done, each over its
ideal: all connections busy, and no site faster than politeness lets it; and what is open at most.
"""

from __future__ import annotations

import argparse
import heapq
import math
import time
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
from numpy.typing import NDArray

from ingest.crawl.divide import divide
from ingest.crawl.lanes import WINDOW, Lane, Lanes
from ingest.plan.by_lane import lane_of, lanes_for, share_of
from ingest.web.host_limits import HostLimits
from ingest.web.host_queues import STRIKES, Hosts
from ingest.web.turns import Turn

UNIT_ROWS, CONNECTIONS, DEADLINE_S, DEAD = 16_384, 256, 20.0, 0.1
SHARES = (0.5, 0.9, 0.99, 1.0)
LARGEST = 12_000_000  # rows that are gone through
Job = tuple[Lane[list["Row"]], "Row"]
Row = tuple[int, int, int]  # unit, its place in the unit, site


class Web:
    """Sites: rows and seconds for an answer of each, (n,), and the lanes' order."""

    def __init__(self, rows: int, *, lanes: int | None, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        sites = rows // 10
        ranks = np.arange(1, sites + 1, dtype=np.float64)
        self.lanes = lanes_for(rows, UNIT_ROWS)
        domains = rng.integers(0, 1 << 64, sites, dtype=np.uint64)
        sizes = np.maximum(np.round(rows / ranks / np.sum(1 / ranks)), 1).astype(np.int64)
        lane = lane_of(domains, self.lanes)
        if lanes is not None:
            kept = lane < lanes
            domains, sizes, lane = domains[kept], sizes[kept], lane[kept]
        self.sizes, self.lane = sizes, lane
        self.seconds = np.clip(rng.lognormal(math.log(0.3), 1, len(sizes)), 0.05, DEADLINE_S)
        self.dead = rng.random(len(sizes)) < DEAD
        self._domains = domains

    def units(self, lane: int) -> list[NDArray[np.int64]]:
        """The sites of the rows of each unit of a lane, in order."""
        here = np.flatnonzero(self.lane == lane)
        sites = np.repeat(here, self.sizes[here])
        starts = np.repeat(np.cumsum(self.sizes[here]) - self.sizes[here], self.sizes[here])
        place = (np.arange(len(sites)) - starts + 1 - share_of(self._domains[sites])) / self.sizes[sites]
        ordered = sites[np.argsort(place, kind="stable")]
        return [ordered[at : at + UNIT_ROWS] for at in range(0, len(ordered), UNIT_ROWS)]

    def ideal(self, lanes: NDArray[np.bool_], *, per_host: int, connections: int) -> list[float]:
        """Seconds until each of SHARES is done, of a crawl that ends as soon as it can.

        All connections are busy, and sites have come equally far, but for those that politeness holds back:
        the end is the later one of their own and of all others'. (Half of all rows could be there earlier, if
        sites that answer fast came first: the end, which slow ones decide, would be later.)
        """
        sizes, dead = self.sizes[lanes], self.dead[lanes]
        # Of a site that never answers, a few are waited for, with those under way when that is clear.
        asked = np.where(dead, np.minimum(sizes, STRIKES + per_host - 1), sizes)
        seconds = np.where(dead, DEADLINE_S, self.seconds[lanes])
        own = np.maximum(asked / per_host, 1) * seconds

        def busy(progress: NDArray[np.float64]) -> float:
            return float((np.minimum(progress * sizes, asked) * seconds).sum())

        def done(at: float) -> float:
            most = np.minimum(at / own, 1)
            far = _least(lambda far: busy(np.minimum(far, most)) >= connections * at, 1.0)
            return float((np.minimum(far, most) * sizes).sum())

        longest, rows = float(np.maximum(own.max(), busy(np.ones(len(sizes))))), int(sizes.sum())
        return [_least(lambda at, least=share * rows - 0.5: done(at) >= least, longest) for share in SHARES]


def _least(holds: Callable[[float], bool], most: float) -> float:
    """The least number that this holds for, which is no larger than `most`."""
    low, high = 0.0, most
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def crawl(  # noqa: PLR0915 -- one loop over what happens
    web: Web, lanes: list[int], *, per_host: int, connections: int
) -> tuple[list[float], int, int]:
    """Seconds until each of SHARES was done, units open at most, and rows waiting at most."""
    now, active, numbers = 0.0, 0, count()
    units: dict[int, tuple[bytearray, list[int]]] = {}

    def requests(lane: int) -> Iterator[list[Row]]:
        for number, sites in enumerate(web.units(lane)):
            units[lane << 32 | number] = bytearray(len(sites)), [0]
            for row, site in enumerate(sites.tolist()):
                yield [(lane << 32 | number, row, site)]

    turns = iter(
        Lanes(
            ((int(web.sizes[web.lane == lane].sum()), requests(lane)) for lane in lanes),
            host_of=lambda request: request[0][2],
            per_host=lambda site: per_host,
            is_idle=lambda: active < connections,
            clock=lambda: now,
        )
    )
    more, outstanding, done, waiting, most_open, most_waiting = True, 0, 0, 0, 0, 0
    total = int(web.sizes[np.isin(web.lane, lanes)].sum())
    hosts: Hosts[Job] = Hosts(
        HostLimits((), connections=per_host, rate=None), per_address=32, idle_limit=connections
    )
    marks = [math.ceil(share * total) for share in SHARES]
    events: list[tuple[float, int, Turn[Job]]] = []
    found: list[float] = []

    def finish(job: Job) -> None:
        nonlocal outstanding, done, waiting, most_waiting
        lane, (unit, row, site) = job
        outstanding, done, waiting = outstanding - 1, done + 1, waiting + 1
        lane.ended([job[1]], site)
        there, following = units[unit]
        there[row] = 1
        while following[0] < len(there) and there[following[0]]:
            following[0] += 1
            lane.ahead, waiting = lane.ahead - 1, waiting - 1
        if following[0] == len(there):
            del units[unit]
        most_waiting = max(most_waiting, waiting)
        while len(found) < len(marks) and done >= marks[len(found)]:
            found.append(now)

    while done < total:
        while more and outstanding < WINDOW:
            try:
                turn = next(turns)
            except StopIteration:
                more = False
                break
            if turn is None:
                break
            lane, [row] = turn
            outstanding += 1
            hosts.add(str(row[2]), (lane, row), now)
        most_open = max(most_open, len(units))
        while active < connections:
            taken = hosts.take(now)
            if taken is None:
                break
            if taken.refusal is not None:
                finish(taken.job)
                continue
            site = taken.job[1][2]
            if hosts.settle(taken, (taken.name,), now):
                active += 1
                takes = DEADLINE_S if web.dead[site] else float(web.seconds[site])
                heapq.heappush(events, (now + takes, next(numbers), taken))
        times = [events[0][0]] if events else []
        times += [when] if (when := hosts.next_time()) is not None else []
        times += [now + 0.25] if more and outstanding < WINDOW else []
        now = max(now, min(times)) if times else now
        while events and events[0][0] <= now:
            _, _, ended = heapq.heappop(events)
            active -= 1
            (hosts.strike if web.dead[ended.job[1][2]] else lambda name, when: hosts.answered(name))(
                ended.name, now
            )
            hosts.done(ended, now)
            finish(ended.job)
    return found, most_open, most_waiting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=float, default=1e7)
    parser.add_argument("--crawlers", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--per-host", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--lanes", type=int, help="look at so many of a crawler's lanes")
    options = parser.parse_args()
    web = Web(int(options.rows), lanes=options.lanes)
    print(
        "| rows | crawlers | per host | hours | 50 % | 90 % | 99 % | 100 % | units open | waiting | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for crawlers in options.crawlers:
        parts = divide([[lane] for lane in range(web.lanes)], crawlers)
        part = parts[len(parts) // 2] if options.lanes is None else parts[0]
        mine = part if options.lanes is None else list(range(min(options.lanes, len(part))))
        connections = max(round(CONNECTIONS * len(mine) / len(part)), 1)
        for per_host in options.per_host:
            start = time.process_time()
            chosen = np.isin(web.lane, mine)
            ideal = web.ideal(chosen, per_host=per_host, connections=connections)
            found, opened, waiting = crawl(web, mine, per_host=per_host, connections=connections)
            over = " | ".join(f"{took / best:.2f}" for took, best in zip(found, ideal, strict=True))
            took = time.process_time() - start
            print(
                f"| {options.rows:.0e} | {crawlers} | {per_host} | {found[-1] / 3600:.1f} | {over} "
                f"| {opened} | {waiting} | {took:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
