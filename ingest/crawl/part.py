"""A part of a crawl: some of a plan's units, made by one crawler, as a rank of a job or a call on Ray.

Units are the checkpoint. What a part has committed stays, whatever becomes of it, and so does what it has
fetched for others (`ingest.crawl.kept`); a part that starts again makes what is missing. So it ends at once
when it is asked to.
"""

import heapq
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, pairwise
from pathlib import Path
from types import FrameType
from typing import Any, Self

from cluster.atomic_file import write_atomically
from cluster.output_trouble import writing
from cluster.rank.preempt import STOP_SIGNALS, Preempted
from cluster.run.folder import RunFolder
from cluster.typed_json import read_record
from ingest.crawl.crawl import seal_plan
from ingest.crawl.make_units import crawl_units
from ingest.dataset.commit import read_commits
from ingest.plan.plan import Plan, read_plans
from ingest.progress.counts import Counts, Progress
from ingest.progress.pace import Pace, what_waits
from ingest.store.open import open_store
from ingest.web.host_limits import HostLimit
from ingest.web.host_queues import MOST_SLOW
from ingest.web.opt_outs import OptOut
from ingest.web.settings import FetchSettings

CRAWL_RANK = f"{__name__}:crawl_rank"
CRAWL_CALL = f"{__name__}:crawl_call"
_REPORT_EVERY_S = 1.0
# What no part adds to.
_OF_PLAN = ("planned", "merged", "known", "over_per_site", "units", "slowest_hosts")


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one crawler is given.

    Attributes:
        output: the dataset's folder, absolute, or its URL.
        generation: of the plan.
        units: ascending.
        fetch: how its URLs are fetched.
        workers: its checking processes.
    """

    output: str
    generation: int
    units: Sequence[int]
    fetch: FetchSettings
    workers: int

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back; units as ranges, for there may be a million."""
        breaks = [unit for before, unit in pairwise(self.units) if unit != before + 1]
        firsts = [*self.units[:1], *breaks]
        lasts = [before for before, unit in pairwise(self.units) if unit != before + 1] + [*self.units[-1:]]
        ranges = [[first, last + 1] for first, last in zip(firsts, lasts, strict=True)]
        fetch = asdict(self.fetch) | {"heeded": sorted(self.fetch.heeded)}
        return vars(self) | {"fetch": fetch, "units": ranges}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        fetch = values["fetch"] | {
            **{name: tuple(values["fetch"][name]) for name in ("allow_private", "deny_network")},
            "host_limits": tuple(HostLimit(**limit) for limit in values["fetch"]["host_limits"]),
            "heeded": frozenset(map(OptOut, values["fetch"]["heeded"])),
        }
        units = list(chain.from_iterable(range(first, stop) for first, stop in values["units"]))
        return cls(**{**values, "fetch": FetchSettings(**fetch), "units": units})


def crawl_rank(parts: Sequence[Mapping[str, Any]], folder: str) -> None:
    """One rank of a job: makes the part of its number. Whichever rank, of whichever job, ends last, seals.

    Args:
        parts: one for each rank, as `Part.to_json` made them.
        folder: of the job; `counts-{rank}.json` in it tells how far the part is.
    """
    rank = int(os.environ["RANK"])
    part = Part.from_json(parts[rank])
    report = _Report(Path(folder), rank)
    with _ended_at_once_when_asked(report) as progress:
        plan, counts = _crawl(part, progress, report.begin)
        report.write(counts)
        if _is_whole(plan, part):
            seal_plan(plan)


def crawl_call(values: Mapping[str, Any]) -> dict[str, Any]:
    """A call on Ray: makes a part, and returns its counts as JSON."""
    _, counts = _crawl(Part.from_json(values), lambda counts: None, lambda rows: None)
    return counts_json(counts)


def counts_json(counts: Counts) -> dict[str, Any]:
    """Plain values that `counts_from_json` reads back, without what is waited for at the moment."""
    # Not asdict, which does not know how a Counter is made.
    plain = {k: dict(v) if isinstance(v, Counter) else v for k, v in vars(counts).items()}
    del plain["slowest_hosts"]
    return plain


def counts_from_json(values: Mapping[str, Any]) -> Counts:
    """The counts that `counts_json` wrote."""
    plain: dict[str, Any] = {k: Counter(v) if isinstance(v, dict) else v for k, v in values.items()}
    return Counts(**plain)


def read_report(folder: Path, rank: int) -> Counts:
    """How far a rank says that it is; nothing, if it has not begun."""
    path = _report_file(folder, rank)
    return (
        read_record(Counts, path, remedy="remove it: the crawler writes it anew")
        if path.exists()
        else Counts()
    )


def sum_into(total: Counts, parts: Sequence[Counts]) -> None:
    """Make `total` the sum of the parts; what is planned stays."""
    for field in fields(Counts):
        if field.name not in _OF_PLAN:
            values = [getattr(part, field.name) for part in parts]
            empty = Counter[str]() if field.name in ("rejected", "failed") else 0
            setattr(total, field.name, sum(values, empty))
    hosts = chain.from_iterable(part.slowest_hosts for part in parts)
    total.slowest_hosts = tuple(heapq.nlargest(MOST_SLOW, hosts, key=lambda host: host.seconds_left))


def _crawl(part: Part, progress: Progress, begin: Callable[[int], None]) -> tuple[Plan, Counts]:
    store = open_store(part.output)
    plan = read_plans(store)[part.generation]
    begin(sum(map(plan.rows_of, part.units)))
    counts = Counts()
    with writing(store.root):
        crawl_units(
            plan, part.units, fetch=part.fetch, workers=part.workers, progress=progress, counts=counts
        )
    return plan, counts


def _is_whole(plan: Plan, part: Part) -> bool:
    """Whether everybody is done. Asks first for the units after the part's own, which are likely to be under
    way: of a million units, most parts look at few.
    """
    after = part.units[-1] + 1
    others = chain(range(after, plan.units.stop), range(plan.units.start, after))
    return all(record is not None for _, record in read_commits(plan.store, others))


class _Report:
    """Writes down now and then how far a rank is, for whoever waits for it."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._due = 0.0
        self._marked = self._rows = 0
        self._pace = Pace(time.monotonic())
        (folder / "checkpoints").mkdir(exist_ok=True)

    def begin(self, rows: int) -> None:
        """So many attempts are the part's."""
        self._rows = rows
        self._pace = Pace(time.monotonic())

    def __call__(self, counts: Counts) -> None:
        if time.monotonic() >= self._due:
            self.write(counts)
            self._due = time.monotonic() + _REPORT_EVERY_S

    def write(self, counts: Counts) -> None:
        # A node that was cut off goes on: what it makes is right, but it asks sites a second time.
        RunFolder(self._folder).refuse_if_superseded()
        now = counts_json(counts) | {"slowest_hosts": [asdict(host) for host in counts.slowest_hosts]}
        write_atomically(_report_file(self._folder, self._rank), json.dumps(now))
        if self._rank == 0:  # of a run by itself
            self._tell(counts)
        if counts.units_done > self._marked:
            # A newer name is progress to whoever starts the job again, and renews its budget of restarts.
            mark = f"{counts.units_done} units of part {self._rank}\n"
            write_atomically(self._folder / "checkpoints" / "latest", mark)
            self._marked = counts.units_done

    def _tell(self, counts: Counts) -> None:
        """For `submit status`."""
        self._pace.note(counts, time.monotonic())
        left = self._pace.time_left(replace(counts, planned=self._rows))
        told = {
            "step": counts.done,
            "total_steps": self._rows,
            "images_per_second": self._pace.images_per_second,
            "seconds_left": left.seconds if left is not None else 0.0,
            "waits_for": what_waits(left.host) if left is not None and left.host is not None else "",
        }
        write_atomically(self._folder / "progress.json", json.dumps(told) + "\n")


def _report_file(folder: Path, rank: int) -> Path:
    return folder / f"counts-{rank}.json"


@contextmanager
def _ended_at_once_when_asked(report: Progress) -> Iterator[Progress]:
    """Within the block, SIGTERM and SIGUSR2 raise Preempted, with which a rank is started again for free."""
    asked = False
    message = "stopped where it was; the next start makes the units that are not committed"

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for each in STOP_SIGNALS:  # a second one must not disturb the cleaning up
            signal.signal(each, signal.SIG_IGN)
        raise Preempted(message)

    def progress(counts: Counts) -> None:
        if asked:  # raised where nothing could be raised, such as in a destructor
            raise Preempted(message)
        report(counts)

    previous = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield progress
    finally:
        if not asked:
            for number, handler in previous.items():
                signal.signal(number, handler)
