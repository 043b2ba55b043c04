"""Preflight: a node that is broken, slow, cut off or dead is named, and only that one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from cluster.errors import UserError
from cluster.job import Handle, Job, Resources
from cluster.json_rows import read_rows
from cluster.local import LocalExecutor
from cluster.preflight.preflight import preflight
from cluster.preflight.report import Report
from cluster.preflight.verdict import Verdict
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from cluster.site import Thresholds

# Three ranks and other work share a few cores here: rates differ by a few times, and by 20 when it is meant.
LOOSE = Thresholds(matmul=0.2, all_reduce=0.05, link=0.05, run_gib=0.1, temporary_gib=0.1)

RANK_FUNCTIONS = """
import os, signal, time
from dataclasses import replace
from pathlib import Path
from cluster.preflight import report as check_report
from cluster.preflight import measure
from cluster.preflight import preflight
from cluster.site import Thresholds

RANK = int(os.environ["RANK"])
NODE = RANK // int(os.environ["TEST_RANKS_PER_NODE"])
os.environ["SLURMD_NODENAME"] = f"node{NODE}"
real = {name: getattr(measure, name) for name in dir(measure)}
measure.matmul_tflops = lambda device: real["matmul_tflops"](device, seconds=0.2)

def healthy(**arguments):
    preflight.run_checks(**arguments)

def something_wrong_everywhere(**arguments):
    measure.unseen_probes = lambda folder, digests: real["unseen_probes"](folder, digests, patience=1)
    measure.exchange_gb_per_s = lambda world, peer: (
        real["exchange_gb_per_s"](world, peer) / (1000 if 2 in (RANK, peer) else 1)
    )
    if NODE == 0:
        now = time.time
        time.time = lambda: now() + 30
    if NODE == 1:
        measure.write_probe = lambda folder, node: real["write_probe"](Path(folder, "elsewhere"), node)
    if NODE == 3:
        measure.matmul_tflops = lambda device: real["matmul_tflops"](device, seconds=0.2) / 20
    preflight.run_checks(**arguments)

def limit(**seconds):
    check_report.CHECKS = tuple(
        replace(each, seconds=seconds.get(each.name.split()[0], each.seconds)) for each in check_report.CHECKS
    )

def end_in_a_collective(number):
    def all_reduce(group, device):
        if NODE == 1:
            os.kill(os.getpid(), number)
        return real["all_reduce_gb_per_s"](group, device)
    measure.all_reduce_gb_per_s = all_reduce

def killed_on_node_1(**arguments):
    end_in_a_collective(signal.SIGKILL)
    preflight.run_checks(**arguments)

def frozen_on_node_1(**arguments):
    limit(**{"all-reduce": 8})
    end_in_a_collective(signal.SIGSTOP)
    preflight.run_checks(**arguments)

# The check before torch is loaded: the rank that fails it need not load it.
def hangs_alone_on_node_1(**arguments):
    limit(devices=4)
    if NODE == 1:
        measure.devices = lambda **which: time.sleep(60)
    preflight.run_checks(**arguments)

def raises_on_node_1(**arguments):
    def devices(**which):
        raise OSError(5, "Input/output error")
    if NODE == 1:
        measure.devices = devices
    preflight.run_checks(**arguments)

def fails_before_it_reports(**arguments):
    raise ValueError("no such module")
"""


class SimulatedNodes:
    """The local executor with all nodes on this machine; the ranks call themselves by different names."""

    name, site = "local", None

    def refuse_impossible(self, job: Job) -> None:
        pass

    def start(self, job: Job, run: RunFolder, pending: Status, lock: IO[str]) -> Handle:
        wants = job.resources
        here = replace(job, resources=replace(wants, nodes=1, ranks_per_node=wants.ranks))
        return LocalExecutor().start(here, run, pending, lock)


@pytest.fixture(autouse=True)
def rank_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "preflight_functions.py").write_text(RANK_FUNCTIONS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TEST_RANKS_PER_NODE", "1")


def look(tmp_path: Path, function: str, *, nodes: int = 3, ranks_per_node: int = 1) -> dict[str, Verdict]:
    verdicts = preflight(
        SimulatedNodes(),
        Resources(nodes=nodes, ranks_per_node=ranks_per_node, cpus_per_rank=1),
        tmp_path / "run",
        thresholds=LOOSE,
        function=f"preflight_functions:{function}",
    )
    assert [verdict.node for verdict in verdicts] == [f"node{index}" for index in range(nodes)]
    return {verdict.node: verdict for verdict in verdicts}


def reasons(verdicts: Mapping[str, Verdict]) -> dict[str, tuple[str, ...]]:
    return {node: verdict.reasons for node, verdict in verdicts.items() if not verdict.fit}


@pytest.mark.slow
def test_nodes_that_are_well_are_fit_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of one node reduce among themselves, too; a report of an earlier job does not count."""
    stale = tmp_path / "run" / "preflight" / "rank-7.jsonl"
    stale.parent.mkdir(parents=True)
    stale.write_text(Report(rank=7, node="gone").model_dump_json() + "\n")
    monkeypatch.setenv("TEST_RANKS_PER_NODE", "2")
    started = time.monotonic()
    verdicts = look(tmp_path, "healthy", nodes=2, ranks_per_node=2)
    assert reasons(verdicts) == {}
    assert time.monotonic() - started < 90
    assert [verdict.ranks for verdict in verdicts.values()] == [(0, 1), (2, 3)]
    rates = ("matmul_tflops", "node_gb_per_s", "link_gb_per_s", "across_gb_per_s")
    for verdict in verdicts.values():
        assert verdict.unchecked == ()
        assert min(verdict.measured[key] for key in rates) > 0
        assert abs(verdict.measured["clock_ms"]) < 500
    folder = tmp_path / "run" / "preflight"
    assert sorted(path.name for path in folder.iterdir()) == [f"rank-{rank}.jsonl" for rank in range(4)]
    first, *_, report = read_rows(folder / "rank-3.jsonl")
    assert (first["done"], report["ended"]) == ([], "finished")
    assert list(report["links"]) == ["node0"]


@pytest.mark.slow
def test_every_node_is_told_what_is_wrong_with_it(tmp_path: Path) -> None:
    (tmp_path / "run" / "preflight" / "elsewhere").mkdir(parents=True)
    found = reasons(look(tmp_path, "something_wrong_everywhere", nodes=4))
    assert [len(each) for each in found.values()] == [1, 1, 1, 1]
    assert found["node0"][0] == "clock is 30.00 s ahead, 0.5 s allowed"
    assert found["node1"][0].startswith("its file in the shared folder is not seen by node0, node1, node2")
    assert found["node2"][0].startswith("slow links: ")
    assert found["node3"][0].startswith("matmul of rank 3: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "told"),
    [
        (
            "killed_on_node_1",
            "died or froze without a word: rank 1, in 'all-reduce across nodes', after 'links'",
        ),
        (
            "frozen_on_node_1",
            "died or froze without a word: rank 1, in 'all-reduce across nodes', after 'links'",
        ),
        ("hangs_alone_on_node_1", "did not end in 4 s: rank 1, in 'devices', after 'signing in'"),
        (
            "raises_on_node_1",
            "OSError: [Errno 5] Input/output error: rank 1, in 'devices', after 'signing in'",
        ),
    ],
)
def test_the_node_that_ends_early_is_named_with_its_check(tmp_path: Path, function: str, told: str) -> None:
    started = time.monotonic()
    verdicts = look(tmp_path, function, nodes=3 if function == "killed_on_node_1" else 2)
    assert time.monotonic() - started < 60
    assert reasons(verdicts) == {"node1": (told,)}
    assert "all-reduce across nodes" in verdicts["node0"].unchecked


def test_a_job_that_never_reports_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"before any rank reported: rank . of 3 .*failed first: ValueError"):
        look(tmp_path, "fails_before_it_reports")
