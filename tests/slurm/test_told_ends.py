"""Whatever ends a job on SLURM, its run goes on or has ended, and somebody knows why."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from lab import SlurmLab, wait_until
from training import Submitter, Training

from cluster.run.restarts import Cause

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

# Ranks without PyTorch: what is tested is around them.
RANK = """
import os, time
from pathlib import Path
from cluster.rank.preempt import Preempted, PreemptionFlag
from cluster.run.folder import RunFolder

def run(folder, deaf):
    run = RunFolder(Path(folder))
    with PreemptionFlag(run) as flag:
        Path(folder, f"began-{os.environ['SLURM_JOB_ID']}.{os.environ['SUBMIT_START']}").touch()
        while not Path(folder, "finish").exists():
            time.sleep(0.1)
            if flag.requested and not deaf:
                run.mark_requeue()
                raise Preempted("saved")
"""
SUBMIT = """
import sys
from dataclasses import replace
from pathlib import Path
from cluster.job import Job, Resources
from cluster.site import load_site
from cluster.slurm.executor import SlurmExecutor
from cluster.submit import submit
for name in sys.argv[2:]:
    folder = Path("runs", name).absolute()
    arguments = {"folder": str(folder), "deaf": name == "slow"}
    job = Job(name=name, function="told:run", arguments=arguments, resources=Resources(), folder=folder)
    handle = submit(job, SlurmExecutor(load_site(sys.argv[1]), watched=True))
    (folder / "source" / "told.py").write_text(Path("told.py").read_text())
"""


@pytest.fixture
def submit(slurm: SlurmLab, tmp_path: Path) -> Submitter:
    (tmp_path / "told.py").write_text(RANK)
    return Submitter(slurm, tmp_path)


def job_of(run: Training) -> str:
    return (run.path / "slurm-job").read_text().strip()


def wait_for_start(run: Training, number: int) -> None:
    wait_until(
        lambda: len(list(run.path.glob("began-*"))) >= number and run.status().attempt >= number,
        f"start {number} of {run.path.name}",
        60,
        pause=0.1,
    )


def kill_batch_script(slurm: SlurmLab, job: str) -> None:
    for node in range(slurm.nodes):
        for pid in slurm.node_pids(node):
            command = Path("/proc", str(pid), "cmdline")
            with contextlib.suppress(FileNotFoundError):  # it has ended
                if f"job{int(job):05d}/slurm_script" in command.read_text():
                    os.kill(pid, signal.SIGKILL)
                    return
    raise AssertionError(f"job {job} has no batch script")


def test_runs_go_on_whatever_ends_their_jobs_and_end_when_somebody_ends_them(
    slurm: SlurmLab, submit: Submitter, tmp_path: Path
) -> None:
    names = ("killed", "hung-up", "step", "refused", "slow", "ended")
    submit.python(SUBMIT, str(submit.site()), *names)
    runs = {name: submit.run(name) for name in names}
    for run in runs.values():
        wait_for_start(run, 1)
    jobs = {name: job_of(run) for name, run in runs.items()}
    watchers = slurm.run("squeue", "--noheader", "--format=%j").stdout
    assert watchers.count("watch-") == len(names)

    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 2))
    slurm.run("scontrol", "update", f"JobId={jobs['slow']}", f"EndTime={soon}")
    kill_batch_script(slurm, jobs["killed"])
    slurm.run("scancel", "--signal=HUP", "--full", jobs["hung-up"])
    slurm.run("scancel", f"{jobs['step']}.0", check=False)  # it may say that the step has gone: it has
    slurm.run("scontrol", "update", f"JobId={jobs['refused']}", "Requeue=0")
    wish = ["--kill-on-invalid-dep=yes", f"--dependency=afterok:{jobs['refused']}", "--output=/dev/null"]
    slurm.run("sbatch", *wish, "--wrap", f"touch {tmp_path}/after")
    slurm.run("scancel", "--signal=TERM", jobs["refused"])
    slurm.run("scancel", jobs["ended"])

    going = [run for name, run in runs.items() if name != "ended"]
    for run in going:
        wait_for_start(run, 2)
        (run.path / "finish").touch()
    for run in going:
        run.wait("completed", 60)
    wait_until((tmp_path / "after").exists, "what waited for the refused job has run")
    causes = {run.path.name: [restart.cause for restart in run.restarts()] for run in going}
    assert causes == {
        "killed": [Cause.PREEMPTED],  # its ranks were asked to end, and had saved
        "hung-up": [Cause.LOST],
        "step": [Cause.LOST],
        "refused": [Cause.PREEMPTED],
        "slow": [Cause.OUT_OF_TIME],
    }
    # Submitted anew where SLURM does not start it again, and only there.
    assert {name for name, run in runs.items() if job_of(run) != jobs[name]} == {"killed", "refused"}
    (found,) = json.loads(submit("status", "--state", "cancelled", "--json").stdout)
    assert (found["run"], found["attempt"]) == ("ended", 1)
    wait_until(lambda: slurm.run("squeue", "--noheader").stdout == "", "nobody is watched any more")
