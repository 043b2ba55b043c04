"""Deduplication as jobs of SLURM: the same view as at home, and tasks that outlive what does them."""

import random
import sys
import time
from pathlib import Path

import pytest
from lab import SlurmLab, wait_until

from cluster.errors import UserError
from cluster.executors import status_of
from cluster.job import State
from cluster.map.on_slurm import on_slurm
from cluster.map.processes import processes
from cluster.map.tasks import MapTasks
from cluster.run.folder import list_runs
from cluster.run.restarts import read_restarts
from cluster.site import Site
from ingest.dedup import tasks as dedup_tasks
from ingest.dedup.dedup import dedup

sys.path.insert(0, str(Path(__file__).parents[1] / "ingest"))
from sealed_rows import seal_rows

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

BASE = 0x0F1E2D3C4B5A6978


@pytest.fixture(autouse=True)
def on_the_login_machine(slurm: SlurmLab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()


def jobs(folder: Path, parts: int) -> MapTasks:
    site = Site(cpus_per_rank=1, signal_seconds=30)
    return on_slurm(site, name="test", parts=parts, runs=folder / "runs", scratch=Path("scratch"))


def test_D1_C1_a_view_made_on_slurm_equals_one_made_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(3)
    units = [
        [
            {"data": b"%d" % rng.randrange(60), "phash": BASE ^ (1 << rng.randrange(40)) ^ rng.randrange(16)}
            for _ in range(8)
        ]
        for _ in range(6)
    ]
    for name in ("here", "slurm"):
        seal_rows(tmp_path / name, units)
    seal_rows(tmp_path / "eval", [units[3][:2]])
    monkeypatch.setattr(dedup_tasks, "ROWS_PER_TASK", 16)
    monkeypatch.setattr("ingest.dedup.dedup.ROWS_PER_PARTITION", 10)
    with processes(1) as here:
        expected = dedup("here", "clean", radius=3, against=["eval"], map_tasks=here)
    there = jobs(tmp_path, 2)
    report = dedup("slurm", "clean", radius=3, against=["eval"], scratch=Path("scratch"), map_tasks=there)
    assert report == expected
    assert min(report.exact, report.near, report.evaluation) > 0
    for file in ("clean.parquet", "clean.duplicates.parquet"):
        views = [(tmp_path / name / "views" / file).read_bytes() for name in ("here", "slurm")]
        assert views[0] == views[1]
    assert list((tmp_path / "scratch").iterdir()) == []
    assert len(list_runs(tmp_path / "runs")) == 4


def test_a_requeued_job_and_a_lost_node_leave_no_task_undone(slurm: SlurmLab, tmp_path: Path) -> None:
    seconds = [1.0, 1.1, 6.0, 6.1, 1.2, 1.3]
    answers = jobs(tmp_path, 2)(time.sleep, seconds)
    assert next(answers) is None
    first, second = list_runs(tmp_path / "runs")
    wait_until(lambda: len(list((tmp_path / "scratch").glob("*/answer-*.json"))) >= 2, "both have begun")
    slurm.run("scontrol", "requeue", (first.path / "slurm-job").read_text().strip())
    wait_until(first.requeue_mark(0).exists, "the first job has stopped as it was asked to")
    node = second.read_status().nodes
    assert node is not None
    slurm.kill_node(int(node.removeprefix("node")))
    assert list(answers) == [None] * 5
    assert [str(restart.cause) for restart in read_restarts(first)] == ["preempted"]
    assert [str(restart.cause) for restart in read_restarts(second)] == ["lost"]


def test_jobs_end_with_who_waits_for_them(tmp_path: Path) -> None:
    answers = jobs(tmp_path, 2)(time.sleep, [0.1, 60.0])
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    waiting = list_runs(tmp_path / "runs")[1]
    wait_until(lambda: status_of(waiting).state is State.CANCELLED, "the other was called off", 60)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_a_task_says_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test-.*-sleep-1-of-1: .*must be non-negative"):
        list(jobs(tmp_path, 1)(time.sleep, [-1.0]))
