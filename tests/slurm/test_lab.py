"""The lab itself: what the other tests here take for granted of a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from lab import NAMESPACES, PREFIX, SlurmLab, wait_until

pytestmark = pytest.mark.slurm

# Writes a line for each start and signal, so that a test can wait for them. On USR2 it requeues itself: SLURM
# does not restart a job that ends by itself while it is being preempted.
WAITING_JOB = """#!/bin/sh
echo "start ${SLURM_RESTART_COUNT:-0} $SLURMD_NODENAME" >> "$1"
trap 'echo USR2 >> "$1"; scontrol requeue "$SLURM_JOB_ID"' USR2
trap 'echo TERM >> "$1"; exit 0' TERM
while :; do sleep 0.2; done
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "job.sh").write_text(WAITING_JOB)
    return tmp_path / "job.sh"


def submit(slurm: SlurmLab, *arguments: str | Path) -> str:
    return slurm.run("sbatch", "--parsable", "--output=/dev/null", *arguments).stdout.strip()


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def lines(journal: Path) -> list[str]:
    return journal.read_text().splitlines() if journal.exists() else []


def test_srun_runs_on_three_nodes_that_have_names_and_gpus_of_their_own(slurm: SlurmLab) -> None:
    show = 'echo "$(hostname) $CUDA_VISIBLE_DEVICES"'
    answer = slurm.run("srun", "--nodes=3", "--ntasks-per-node=1", "--gres=gpu:2", "sh", "-c", show)
    assert sorted(answer.stdout.splitlines()) == ["node0 0,1", "node1 0,1", "node2 0,1"]
    # Nodes find each other by name, as ranks do.
    assert slurm.in_node(1, ["getent", "hosts", "node0"]).stdout.split() == ["10.91.5.10", "node0"]
    assert slurm.run("sacct", check=False).returncode != 0


def test_a_requeued_job_runs_again(slurm: SlurmLab, script: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    job = submit(slurm, "--requeue", script, journal)
    wait_until(lambda: lines(journal), "the job starts")
    slurm.run("scontrol", "requeue", job)
    wait_until(lambda: "start 1" in journal.read_text(), "the job starts again")
    assert slurm.job(job)["Restarts"] == "1"


def test_a_job_of_high_takes_the_place_of_one_of_main_which_runs_again(
    slurm: SlurmLab, script: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    job = submit(slurm, "--requeue", "--nodes=4", "--exclusive", "--signal=B:USR2@60", script, journal)
    wait_until(lambda: lines(journal), "the job starts")
    slurm.run("srun", "--partition=high", "--nodes=4", "--exclusive", "true")
    assert lines(journal)[1:3] == ["USR2", "TERM"]
    wait_until(lambda: "start 1" in journal.read_text(), "the job starts again")
    assert slurm.job(job)["Restarts"] == "1"


@pytest.mark.slow
def test_jobs_of_a_killed_and_of_a_cut_off_node_run_elsewhere_and_both_nodes_come_back(
    slurm: SlurmLab, script: Path, tmp_path: Path
) -> None:
    killed, cut = tmp_path / "killed", tmp_path / "cut"
    for journal in (killed, cut):
        submit(slurm, "--requeue", "--exclusive", script, journal)
    wait_until(lambda: lines(killed) and lines(cut), "the jobs start")
    assert lines(killed) + lines(cut) == ["start 0 node0", "start 0 node1"]
    slurm.kill_node(0)
    slurm.cut_node(1)
    assert slurm.node_pids(0) == []
    assert slurm.node_pids(1) != []
    wait_until(lambda: len(lines(killed)) == len(lines(cut)) == 2, "the jobs start again", 60)
    assert {lines(killed)[1], lines(cut)[1]} == {"start 1 node2", "start 1 node3"}
    slurm.heal_node(1)
    slurm.start_node(0)
    slurm.run("scancel", "--user=root")
    slurm.wait_idle()


def test_stop_leaves_nothing_and_start_clears_what_a_killed_lab_left(slurm: SlurmLab, tmp_path: Path) -> None:
    pids = [pid for node in range(slurm.nodes) for pid in slurm.node_pids(node)]
    before = time.monotonic()
    slurm.stop()
    assert time.monotonic() - before < 5
    assert not [pid for pid in pids if runs(pid)]
    assert not list(NAMESPACES.glob(f"{PREFIX}-*"))
    assert not Path("/sys/class/net", PREFIX).exists()

    die = "import os, pathlib, lab; lab.SlurmLab(pathlib.Path.cwd()).start(); os.kill(os.getpid(), 9)"
    killed = subprocess.run(
        [sys.executable, "-c", die],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert list(NAMESPACES.glob(f"{PREFIX}-*"))

    before = time.monotonic()
    slurm.start()
    assert time.monotonic() - before < 5
    assert slurm.run("squeue", "--noheader").stdout == ""


def test_accounting_remembers(slurm_with_accounting: SlurmLab) -> None:
    job = submit(slurm_with_accounting, "--wrap=true")
    show = ("sacct", "--allocations", "--noheader", "--parsable2", "--format=State", f"--jobs={job}")
    wait_until(lambda: slurm_with_accounting.run(*show).stdout.split() == ["COMPLETED"], "sacct knows")
