"""From what the ranks of a preflight found to a verdict on every node. Pure: reports in, verdicts out."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from cluster.preflight.report import CHECKS, Report
from cluster.site import Thresholds

Reasons = Iterator[tuple[str, str]]  # of nodes and what is wrong with them


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether one node is fit, or why it is not.

    Attributes:
        node: its name, or words for one that never told it.
        named: whether it is a name.
        ranks: that were, or should have been, there.
        reasons: in words, with numbers; none means fit.
        unchecked: checks that some of its ranks did not come to, for want of other nodes.
        measured: the worst over its ranks, by name and unit.
        interface: of the network, by which its ranks meet the others; empty if that is left to gloo.
    """

    node: str
    named: bool
    ranks: tuple[int, ...]
    reasons: tuple[str, ...]
    unchecked: tuple[str, ...]
    measured: dict[str, float] = field(default_factory=dict)
    interface: str = ""

    @property
    def fit(self) -> bool:
        """Whether nothing is wrong with it, as far as it could be checked."""
        return not self.reasons


def judge(
    reports: Sequence[Report],
    *,
    nodes: int,
    ranks_per_node: int,
    thresholds: Thresholds | None = None,
    names: Sequence[str] = (),
) -> list[Verdict]:
    """A verdict on every node, in the order of ranks.

    Args:
        reports: of the ranks that wrote one.
        nodes, ranks_per_node: that there should be.
        thresholds: what counts as fit.
        names: all nodes in the order of ranks, where a scheduler knows: for those that never reported.
    """
    limits = thresholds or Thresholds()
    places = _places(reports, nodes, ranks_per_node, names)
    reasons: dict[str, list[str]] = defaultdict(list)
    for node, reason in _missing(reports, places, nodes * ranks_per_node):
        reasons[node].append(reason)
    for node, reason in _ended_badly(reports, others_to_blame=bool(reasons)):
        reasons[node].append(reason)
    for rule in (_devices, _slow_matmul, _disks, _clocks, _shared, _slow_in_node, _slow_links):
        for node, reason in rule(reports, limits):
            if reason not in reasons[node]:
                reasons[node].append(reason)
    by_node: dict[str, list[Report]] = defaultdict(list)
    for report in reports:
        by_node[report.node].append(report)
    known = {*by_node, *names}
    return [
        Verdict(
            node=node,
            named=node in known,
            ranks=tuple(ranks),
            reasons=tuple(reasons[node]),
            unchecked=tuple(
                check.name
                for check in CHECKS
                if len(by_node[node]) < len(ranks) or any(check.name not in r.done for r in by_node[node])
            ),
            measured=_measured(by_node[node]),
            interface=", ".join(sorted({report.interface for report in by_node[node]} - {""})),
        )
        for node, ranks in places.items()
    ]


def to_json(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Plain values for `--json`."""
    return [asdict(verdict) | {"fit": verdict.fit} for verdict in verdicts]


def fitness_table(verdicts: Sequence[Verdict]) -> Table:
    """The verdicts as a table for a terminal; the numbers are the worst of each node."""
    table = Table(box=None, pad_edge=False)
    table.add_column("node", no_wrap=True)
    for title, _, _ in COLUMNS:
        table.add_column(title, justify="right")
    table.add_column("network")
    table.add_column("verdict")
    for verdict in verdicts:
        if not verdict.fit:
            words = Text("\n".join(verdict.reasons), style="red")
        elif verdict.unchecked:
            words = Text(f"fit so far; not checked: {', '.join(verdict.unchecked)}", style="yellow")
        else:
            words = Text("fit", style="green")
        numbers = [
            form.format(verdict.measured[key]) if key in verdict.measured else "-" for _, key, form in COLUMNS
        ]
        table.add_row(Text(verdict.node, style="bold"), *numbers, Text(verdict.interface or "-"), words)
    return table


COLUMNS = (
    ("matmul\nTFLOP/s", "matmul_tflops", "{:.3g}"),
    ("in node\nGB/s", "node_gb_per_s", "{:.3g}"),
    ("worst link\nGB/s", "link_gb_per_s", "{:.3g}"),
    ("across\nGB/s", "across_gb_per_s", "{:.3g}"),
    ("clock\nms", "clock_ms", "{:+.1f}"),
    ("disk\nGiB", "run_gib", "{:.0f}"),
)


def _measured(reports: Sequence[Report]) -> dict[str, float]:
    values: dict[str, list[float | None]] = {
        "matmul_tflops": [r.tflops for r in reports],
        "node_gb_per_s": [r.node_gb_per_s for r in reports],
        "link_gb_per_s": [rate for r in reports for rate in r.links.values()],
        "across_gb_per_s": [r.across_gb_per_s for r in reports],
        "clock_ms": [None if r.clock_offset is None else 1000 * r.clock_offset for r in reports],
        "run_gib": [None if r.disk is None else r.disk.run_gib for r in reports],
    }
    there = {key: [each for each in row if each is not None] for key, row in values.items()}
    return {key: min(row) for key, row in there.items() if row}


def _places(
    reports: Sequence[Report], nodes: int, ranks_per_node: int, names: Sequence[str]
) -> dict[str, list[int]]:
    """Every rank's node. One that did not report is where its neighbours of the same block are."""
    told = {report.rank: report.node for report in reports}
    places: dict[str, list[int]] = {}
    for rank in range(nodes * ranks_per_node):
        index = rank // ranks_per_node
        block = range(index * ranks_per_node, (index + 1) * ranks_per_node)
        neighbour = next((told[each] for each in block if each in told), None)
        words = names[index] if index < len(names) else f"node {index + 1} of {nodes}"
        places.setdefault(told.get(rank) or neighbour or words, []).append(rank)
    return places


def _missing(reports: Sequence[Report], places: dict[str, list[int]], ranks: int) -> Reasons:
    missing = set(range(ranks)) - {report.rank for report in reports}
    for node, there in places.items():
        if lost := [str(rank) for rank in there if rank in missing]:
            yield node, f"never reported: rank {', '.join(lost)}"


def _ended_badly(reports: Sequence[Report], *, others_to_blame: bool) -> Reasons:
    """Who did not finish by its own fault. A rank that waited in vain for another one is not to blame, as
    long as there is another one.
    """
    waited = []
    for report in (report for report in reports if report.ended != "finished"):
        last = f"after {report.done[-1]!r}" if report.done else "before it had done anything"
        by = f" by {report.interface}" if report.current.name == "joining" and report.interface else ""
        where = f"rank {report.rank}, in {report.current.name!r}{by}, {last}"
        # A GPU may fail in the middle of a collective too; the others then lose their connection.
        of_its_own = not report.current.together or "CUDA error" in report.error
        if report.ended is None:
            yield report.node, f"died or froze without a word: {where}"
        elif report.ended != "stopped" and of_its_own:
            yield report.node, f"{report.error}: {where}"
        else:
            waited.append((report, where))
            continue
        others_to_blame = True
    if others_to_blame or not waited:
        return
    # All wait for each other: those are to blame that others have got past.
    progress = {report.rank: (len(report.done), len(report.links)) for report in reports}
    behind = min(progress.values())
    for report, where in waited:
        if progress[report.rank] == behind:
            yield report.node, f"{report.error}: {where}; no other rank is further behind"


def _devices(reports: Sequence[Report], limits: Thresholds) -> Reasons:
    for report in reports:
        if (has := report.devices) is None:
            continue
        if has.found < has.expected:
            yield report.node, f"{has.found} GPUs found, {has.expected} expected"
        yield from ((report.node, fault) for fault in has.faults)
        if has.expected and has.found and has.free < limits.device_free:
            used = f"{has.free:.0%} of its memory is free ({has.free_gib:.0f} GiB)"
            yield report.node, f"the GPU of rank {report.rank} is in use: {used}"
        if not has.expected and has.free_gib < limits.memory_gib:
            yield report.node, f"{has.free_gib:.1f} GiB of memory free, {limits.memory_gib:g} needed"


def _slow_matmul(reports: Sequence[Report], limits: Thresholds) -> Reasons:
    rates = [(report, report.tflops) for report in reports if report.tflops is not None]
    median = statistics.median([rate for _, rate in rates]) if rates else 0.0
    for report, rate in rates:
        if rate < limits.matmul * median:
            share = f"{rate / median:.0%} of the median {median:.3g}"
            yield report.node, f"matmul of rank {report.rank}: {rate:.3g} TFLOP/s, {share}"


def _disks(reports: Sequence[Report], limits: Thresholds) -> Reasons:
    for report in reports:
        if report.disk is None:
            continue
        for free, needed, where in (
            (report.disk.run_gib, limits.run_gib, "where the runs are"),
            (report.disk.temporary_gib, limits.temporary_gib, "for temporary files"),
            (report.disk.shared_memory_gib, limits.shared_memory_gib, "of shared memory (/dev/shm)"),
        ):
            if free < needed:
                yield report.node, f"{free:.1f} GiB free {where}, {needed:g} needed"


def _clocks(reports: Sequence[Report], limits: Thresholds) -> Reasons:
    offsets = {report.node: report.clock_offset for report in reports if report.clock_offset is not None}
    # Rank 0 measures the others; with three nodes or more its own clock may turn out to be the odd one.
    right = statistics.median(offsets.values()) if len(offsets) > 2 else 0.0
    for node, offset in offsets.items():
        if abs(offset - right) > limits.clock_seconds:
            way = "ahead" if offset > right else "behind"
            yield node, f"clock is {abs(offset - right):.2f} s {way}, {limits.clock_seconds:g} s allowed"


def _shared(reports: Sequence[Report], limits: Thresholds) -> Reasons:
    """Whose files do not come out, who does not see those of others, and what that leaves unexplained."""
    unseen = {(report.node, node) for report in reports for node in report.unseen}
    half = (len({report.node for report in reports}) - 1) / 2
    readers, writers = defaultdict(set), defaultdict(set)
    for reader, writer in unseen:
        readers[writer].add(reader)
        writers[reader].add(writer)
    hidden = {node for node, others in readers.items() if len(others - {node}) > half or node in others}
    blind = {node for node, others in writers.items() if len(others - {node}) > half}
    for node in sorted(hidden):
        yield node, f"its file in the shared folder is not seen by {', '.join(sorted(readers[node]))}"
    for node, others in sorted(writers.items()):
        if node in blind or others - hidden:
            yield node, f"does not see the files of {', '.join(sorted(others))} in the shared folder"


def _slow_in_node(reports: Sequence[Report], limits: Thresholds) -> Reasons:
    rates: dict[str, list[float]] = defaultdict(list)
    for report in reports:
        if report.node_gb_per_s is not None:
            rates[report.node].append(report.node_gb_per_s)
    median = statistics.median([min(each) for each in rates.values()]) if rates else 0.0
    for node, each in rates.items():
        if min(each) < limits.all_reduce * median:
            share = f"{min(each) / median:.0%} of the median {median:.3g}"
            yield node, f"all-reduce in the node: {min(each):.3g} GB/s, {share}"


def _slow_links(reports: Sequence[Report], limits: Thresholds) -> Reasons:
    """A node is to blame for slow links if more than half of its own are: a single one has two ends."""
    links: dict[tuple[str, str], float] = {}
    for report in reports:
        for peer, rate in report.links.items():
            ends = (min(report.node, peer), max(report.node, peer))
            links[ends] = min(rate, links.get(ends, rate))
    if not links:
        return
    good = sorted(links.values())[len(links) * 3 // 4]
    least = max(limits.link * good, limits.link_gb_per_s)
    for node in {end for ends in links for end in ends}:
        mine = {ends: rate for ends, rate in links.items() if node in ends}
        slow = {b if a == node else a: rate for (a, b), rate in mine.items() if rate < least}
        if len(slow) > len(mine) / 2:
            rates = ", ".join(f"{rate:.3g} GB/s to {peer}" for peer, rate in sorted(slow.items()))
            yield node, f"slow links: {rates}; good ones reach {good:.3g}, {least:.3g} needed"
