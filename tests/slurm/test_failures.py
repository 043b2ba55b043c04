"""T3, C1: whatever befalls a training on SLURM, its numbers are those of an undisturbed one."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import yaml
from lab import SlurmLab
from training import Submitter, Training

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))
from tiny_training import SHALLOW, make_dataset, make_values

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

# Of four nodes: none has to be used again. SLURM tells a node that comes back to end the job that was lost
# there, and means whatever has that number now.
RANKS = 2


@pytest.fixture
def submit(slurm: SlurmLab, tmp_path: Path) -> Submitter:
    return Submitter(slurm, tmp_path)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    # As many steps as a quick machine takes while SLURM makes room for another job.
    values = make_values(make_dataset(tmp_path), trunk=SHALLOW, train__steps=240)
    values["run"]["hang_seconds"] = 15.0
    values["data"]["batch_size"] = 12  # 1, 2, 3 and 4 ranks divide it
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "tiny.yaml"


def undisturbed(submit: Submitter, recipe: Path) -> Training:
    """The same training on this machine."""
    submit(
        "pretrain", "--recipe", str(recipe), "--executor", "local", "--ranks", str(RANKS), "--run", "local"
    )
    return submit.run("local")


def last_node(slurm: SlurmLab, run: Training) -> int:
    """A node of the run that is not the one of its batch script."""
    nodes = run.status().nodes
    assert nodes is not None
    return int(slurm.run("scontrol", "show", "hostnames", nodes).stdout.split()[-1].removeprefix("node"))


def rank_on(slurm: SlurmLab, node: int) -> psutil.Process:
    """The rank that runs on a node."""
    for pid in slurm.node_pids(node):
        process = psutil.Process(pid)
        if "cluster.rank" in process.cmdline():
            return process
    raise AssertionError(f"no rank runs on node{node}")


def test_T3_C1_preemption_requeue_lost_node_cut_network_and_hang_change_no_number(
    slurm: SlurmLab, submit: Submitter, recipe: Path
) -> None:
    expected = undisturbed(submit, recipe)
    submit(
        "pretrain", "--recipe", str(recipe), "--executor", "slurm", "--nodes", str(RANKS), "--run", "slurm"
    )
    run = submit.run("slurm")
    job = (run.path / "slurm-job").read_text().strip()

    run.wait_for_steps(3, attempt=1)
    slurm.run("srun", "--partition=high", "--nodes=4", "--exclusive", "true", timeout=120)

    run.wait_for_steps(3, attempt=2)
    slurm.run("scontrol", "requeue", job)

    run.wait_for_steps(3, attempt=3)
    killed = last_node(slurm, run)
    slurm.kill_node(killed)

    run.wait_for_steps(3, attempt=4)
    cut = last_node(slurm, run)
    slurm.cut_node(cut)

    run.wait_for_steps(3, attempt=5)
    # Not healed yet: when a node comes back, SLURM ends what is left there of the job, and more.
    stopped = last_node(slurm, run)
    rank_on(slurm, stopped).suspend()

    run.wait_for_steps(3, attempt=6)
    run.wait("completed", 180)
    assert run.rows() == expected.rows()
    assert [str(restart.cause) for restart in run.restarts()] == [
        "preempted",
        "preempted",
        "lost",
        "lost",
        "hang",
    ]
