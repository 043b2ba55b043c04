"""The judgement on nodes, from reports that no real node needs to write, and what follows from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.errors import UserError
from cluster.preflight.exclusions import exclude, excluded_nodes, exclusions, readmit
from cluster.preflight.measure import faults_in, link_rounds, unseen_probes, write_probe
from cluster.preflight.report import CHECKS, Devices, Disk, Report, read_reports
from cluster.preflight.verdict import Verdict, fitness_table, judge, to_json
from cluster.site import Thresholds, load_site


def well(rank: int, **changes: Any) -> Report:
    """What a healthy rank of a node of its own reports."""
    names = {"done": [check.name for check in CHECKS], "ended": "finished", "clock_offset": 0.001}
    disk = Disk(run_gib=500, temporary_gib=100, shared_memory_gib=64)
    devices = Devices(expected=8, found=8, name="H200", free=0.99, free_gib=139, cores=16)
    rest = {"disk": disk, "devices": devices, "tflops": 700.0, "across_gb_per_s": 40.0}
    return Report(**{"rank": rank, "node": f"node{rank}", **names, **rest, **changes})


def verdict_on(reports: list[Report], *, nodes: int, **more: Any) -> dict[str, tuple[str, ...]]:
    return {v.node: v.reasons for v in judge(reports, nodes=nodes, ranks_per_node=1, **more) if not v.fit}


def ring(nodes: int, rates: Mapping[tuple[int, int], float]) -> list[Report]:
    pairs = {pair: rates.get(pair, 40.0) for each in link_rounds(nodes) for pair in each}
    return [
        well(n, links={f"node{sum(pair) - n}": rate for pair, rate in pairs.items() if n in pair})
        for n in range(nodes)
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tflops": 500.0}, "matmul of rank 2: 500 TFLOP/s, 71% of the median 700"),
        ({"clock_offset": -2.5}, "clock is 2.50 s behind, 0.5 s allowed"),
        (
            {"disk": Disk(run_gib=3, temporary_gib=100, shared_memory_gib=64)},
            "3.0 GiB free where the runs are, 20 needed",
        ),
        (
            {"disk": Disk(run_gib=500, temporary_gib=1, shared_memory_gib=64)},
            "1.0 GiB free for temporary files, 2 needed",
        ),
        (
            {"disk": Disk(run_gib=500, temporary_gib=100, shared_memory_gib=0.0625)},
            "0.1 GiB free of shared memory (/dev/shm), 1 needed",
        ),
        (
            {"devices": Devices(expected=8, found=7, name="H200", free=0.99, free_gib=139, cores=16)},
            "7 GPUs found, 8 expected",
        ),
        (
            {"devices": Devices(expected=8, found=8, name="H200", free=0.5, free_gib=70, cores=16)},
            "the GPU of rank 2 is in use: 50% of its memory is free (70 GiB)",
        ),
        ({"unseen": ["node0", "node1", "node3"]}, "does not see the files of node0, node1, node3 in the"),
        ({"unseen": ["node1"]}, "does not see the files of node1 in the shared folder"),
    ],
)
def test_a_bad_number_is_told(changes: dict[str, Any], told: str) -> None:
    assert verdict_on([well(rank) for rank in range(4)], nodes=4) == {}
    found = verdict_on([well(rank, **(changes if rank == 2 else {})) for rank in range(4)], nodes=4)
    assert list(found) == ["node2"]
    assert len(found["node2"]) == 1
    assert found["node2"][0].startswith(told)


@pytest.mark.parametrize("nodes", [3, 4, 5, 8])
def test_a_slow_node_is_told_from_its_neighbours(nodes: int) -> None:
    assert verdict_on(ring(nodes, {}), nodes=nodes) == {}
    slow = {pair: 5.0 for each in link_rounds(nodes) for pair in each if 1 in pair}
    assert list(verdict_on(ring(nodes, slow), nodes=nodes)) == ["node1"]


def test_one_slow_link_blames_no_node_and_two_nodes_need_an_absolute_limit() -> None:
    assert verdict_on(ring(8, {(0, 1): 5.0}), nodes=8) == {}
    assert verdict_on(ring(2, {(0, 1): 5.0}), nodes=2) == {}
    found = verdict_on(ring(2, {(0, 1): 5.0}), nodes=2, thresholds=Thresholds(link_gb_per_s=20))
    assert found["node0"] == ("slow links: 5 GB/s to node1; good ones reach 5, 20 needed",)
    assert list(found) == ["node0", "node1"]


def test_slow_all_reduce_in_a_node_is_told() -> None:
    reports = [well(rank, node_gb_per_s=400.0 if rank else 100.0) for rank in range(4)]
    assert verdict_on(reports, nodes=4) == {
        "node0": ("all-reduce in the node: 100 GB/s, 25% of the median 400",)
    }


@pytest.mark.parametrize("nodes", range(1, 12))
def test_in_a_round_of_links_a_node_has_one_partner_and_nobody_is_left_out(nodes: int) -> None:
    rounds = link_rounds(nodes)
    for pairs in rounds:
        ends = [node for pair in pairs for node in pair]
        assert len(ends) == len(set(ends))
    pairs = [pair for each in rounds for pair in each]
    assert len(pairs) == len(set(pairs))
    assert all(
        sum(node in pair for pair in pairs) == min(4, nodes - 1) for node in range(nodes)
    )  # two neighbours on each side
    assert len(rounds) <= 7


def test_a_node_that_never_reported_has_its_name_if_anybody_knows_it() -> None:
    reports = [well(0), well(2)]
    names = ["node0", "gpu-17", "node2"]
    assert verdict_on(reports, nodes=3, names=names) == {"gpu-17": ("never reported: rank 1",)}
    verdicts = judge(reports, nodes=3, ranks_per_node=1)
    assert [(v.node, v.named) for v in verdicts] == [
        ("node0", True),
        ("node 2 of 3", False),
        ("node2", True),
    ]
    pair = [well(0, node="a"), well(1, node="a"), well(3, node="b")]
    found = {v.node: v.reasons for v in judge(pair, nodes=2, ranks_per_node=2)}
    assert found == {"a": (), "b": ("never reported: rank 2",)}


def unfinished(rank: int, checks: int, ended: str | None, error: str = "", **more: Any) -> Report:
    return well(rank, done=[check.name for check in CHECKS[:checks]], ended=ended, error=error, **more)


def test_who_waited_for_a_dead_rank_is_not_to_blame() -> None:
    joining = [check.name for check in CHECKS].index("joining")
    reports = [
        unfinished(0, joining, "overdue", "did not end in 40 s"),
        unfinished(1, joining, "failed", "RuntimeError: Connection closed by peer"),
        unfinished(2, joining, "stopped", "asked to end"),
        unfinished(3, joining, None),
    ]
    assert list(verdict_on(reports, nodes=4)) == ["node3"]
    gpu = unfinished(3, joining, "failed", "RuntimeError: CUDA error: uncorrectable ECC error")
    assert list(verdict_on([*reports[:3], gpu], nodes=4)) == ["node3"]


def test_when_all_wait_the_ones_furthest_behind_are_to_blame() -> None:
    overdue = ("overdue", "did not end in 40 s")
    links = len(CHECKS) - 2
    reports = [
        unfinished(0, links, *overdue, links={"node3": 40.0}),
        unfinished(1, links, *overdue),
        unfinished(2, links, *overdue),
        unfinished(3, links, *overdue, links={"node0": 40.0}),
    ]
    assert list(verdict_on(reports, nodes=4)) == ["node1", "node2"]


def test_who_cannot_join_is_told_with_its_network() -> None:
    joining = [check.name for check in CHECKS].index("joining")
    failed = [unfinished(rank, joining, "failed", "RuntimeError: no", interface="eth1") for rank in (0, 1)]
    (why,) = verdict_on(failed, nodes=2)["node0"]
    assert "in 'joining' by eth1, after" in why


def test_nvidia_smi_answers_become_words() -> None:
    assert faults_in("0, No\n1, Yes\n", "remapped_rows.failure") == [
        "GPU 1: memory rows could not be remapped"
    ]
    answer = "0, 0\n1, 3\n2, [N/A]\n"
    assert faults_in(answer, "ecc.errors.uncorrected.volatile.total") == [
        "GPU 1: uncorrectable memory errors since boot (3)"
    ]
    assert faults_in("0, Not Active\n", "clocks_throttle_reasons.hw_thermal_slowdown") == []


def test_a_probe_with_other_bytes_counts_as_unseen(tmp_path: Path) -> None:
    digests = {node: write_probe(tmp_path, node) for node in ("a", "b", "c")}
    assert write_probe(tmp_path, "a") == ""  # by another rank of that node
    assert unseen_probes(tmp_path, digests, patience=0)[0] == []
    (tmp_path / "probe-b.0").write_bytes(b"torn")
    (tmp_path / "probe-c.0").unlink()
    assert unseen_probes(tmp_path, digests, patience=0)[0] == ["b", "c"]


def test_verdicts_can_be_read_by_people_and_by_scripts() -> None:
    reports = [well(0), well(1, tflops=100.0), well(2, interface="ib0")]
    verdicts = judge(reports, nodes=4, ranks_per_node=1)
    console = Console(width=160, record=True, quiet=False)
    with console.capture() as captured:
        console.print(fitness_table(verdicts))
    text = captured.get()
    assert "matmul of rank 1: 100 TFLOP/s, 14% of the median 700" in text
    assert "node 4 of 4" in text
    assert "ib0" in text
    assert "never reported: rank 3" in text
    values = json.loads(json.dumps(to_json(verdicts)))
    assert [value["fit"] for value in values] == [True, False, True, False]


def bad(node: str, reason: str = "clock is 3 s ahead") -> Verdict:
    return Verdict(node=node, named=True, ranks=(0,), reasons=(reason,), unchecked=())


def good(nodes: int) -> list[Verdict]:
    return [replace(bad(f"good{index}"), reasons=()) for index in range(nodes)]


def test_failed_nodes_are_excluded_once_and_can_come_back(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert excluded_nodes(runs) == []
    assert exclude(runs, good(4)) == []
    assert exclude(runs, [bad("node3"), *good(7)]) == ["node3"]
    assert exclude(runs, [bad("node5"), *good(7)]) == ["node5"]
    assert exclude(runs, [bad("node3", "died"), *good(7)]) == ["node3"]
    assert excluded_nodes(runs) == ["node3", "node5"]
    assert [each.reasons for each in exclusions(runs)] == [("died",), ("clock is 3 s ahead",)]
    readmit(runs, "node3")
    assert excluded_nodes(runs) == ["node5"]
    with pytest.raises(UserError, match=r"node3 is not excluded in .*; excluded nodes: node5"):
        readmit(runs, "node3")


def test_a_node_without_a_name_is_not_written_down(tmp_path: Path) -> None:
    assert exclude(tmp_path, [replace(bad("node 2 of 3"), named=False), *good(7)]) == []
    assert excluded_nodes(tmp_path) == []


@pytest.mark.parametrize(
    ("failed", "of", "refused"),
    [(1, 1, True), (1, 2, False), (2, 2, True), (2, 7, True), (2, 8, False), (16, 64, False), (17, 64, True)],
)
def test_too_many_failures_exclude_nobody(tmp_path: Path, failed: int, of: int, refused: bool) -> None:
    verdicts = [*[bad(f"bad{index}") for index in range(failed)], *good(of - failed)]
    if not refused:
        assert len(exclude(tmp_path, verdicts)) == failed
        return
    with pytest.raises(UserError, match="too many to exclude: something common"):
        exclude(tmp_path, verdicts)
    assert excluded_nodes(tmp_path) == []


def test_a_damaged_list_of_exclusions_is_told_with_a_remedy_that_works(tmp_path: Path) -> None:
    assert exclude(tmp_path, [bad("node3", "slow"), *good(7)]) == ["node3"]
    path = tmp_path / "excluded-nodes.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(UserError, match=r"excluded-nodes\.json is damaged: .*; remove it"):
        exclusions(tmp_path)
    path.unlink()
    assert exclusions(tmp_path) == []


def test_what_counts_as_fit_is_a_part_of_the_site(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("preflight: {run_gib: 500, matmul: 0.5}\n")
    limits = load_site(str(tmp_path / "site.yaml")).preflight
    assert (limits.run_gib, limits.matmul, limits.link) == (500, 0.5, 0.6)
    (tmp_path / "site.yaml").write_text("preflight: {matmul: 80}\n")
    with pytest.raises(UserError, match=r"preflight\.matmul: .*less than or equal to 1"):
        load_site(str(tmp_path / "site.yaml"))


def test_a_report_is_its_last_whole_row(tmp_path: Path) -> None:
    rows = [well(0, done=[]), well(0, done=["signing in"])]
    text = "".join(row.model_dump_json() + "\n" for row in rows)
    (tmp_path / "rank-0.jsonl").write_text(text + text[:40])  # it died as it wrote the next one
    (tmp_path / "rank-1.jsonl").write_text(text[:40])
    assert read_reports(tmp_path) == rows[-1:]
