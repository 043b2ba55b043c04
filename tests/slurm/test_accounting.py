"""Where there is accounting, an end is still known when the controller has forgotten the job."""

from __future__ import annotations

import pytest
from lab import SlurmLab, wait_until

from cluster.job import State
from cluster.slurm.state import ask, from_accounting

pytestmark = pytest.mark.slurm


def test_sacct_tells_how_a_job_ended(
    slurm_with_accounting: SlurmLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = slurm_with_accounting
    for name, value in lab.environment.items():
        monkeypatch.setenv(name, value)
    ends = {"exit 0": State.COMPLETED, "exit 3": State.FAILED, "sleep 100": State.CANCELLED}
    jobs = {
        lab.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", command).stdout.strip(): state
        for command, state in ends.items()
    }
    cancelled = next(job for job, state in jobs.items() if state is State.CANCELLED)
    lab.wait_for_job(cancelled, "RUNNING")
    lab.run("scancel", cancelled)

    def known() -> bool:
        return {job: one.state for job, one in from_accounting(jobs).items()} == jobs

    wait_until(known, "sacct knows the three ends")
    assert not ask(["999999"]).seen  # a job that nobody knows
