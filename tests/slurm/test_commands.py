"""Submitting, looking at and ending a run on SLURM, as its user does it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from lab import SlurmLab, wait_until
from training import Submitter

from cluster.job import State

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))
from tiny_training import make_dataset, make_values

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


@pytest.fixture
def submit(slurm: SlurmLab, tmp_path: Path) -> Submitter:
    return Submitter(slurm, tmp_path)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    values = make_values(make_dataset(tmp_path), train__steps=2_000)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "tiny.yaml")


def test_what_slurm_can_never_run_is_refused_before_anything_is_queued(
    slurm: SlurmLab, submit: Submitter, recipe: str
) -> None:
    answer = submit("pretrain", "--recipe", recipe, "--executor", "slurm", "--nodes", "6", check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("submit: SLURM would never run this job: ")
    assert "sinfo" in answer.stderr
    assert slurm.run("squeue", "--noheader").stdout == ""
    assert submit("list").stdout == "\n"  # and there is no run


def test_submitted_looked_at_cancelled_and_gone_on_with(
    slurm: SlurmLab, submit: Submitter, recipe: str, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    script = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
    submit.site(notify={"command": [sys.executable, "-c", script, str(told)]})
    words = ["pretrain", "--recipe", recipe, "--executor", "slurm", "--nodes", "2", "--run", "two"]
    script_text = submit(*words, "--dry-run").stdout
    assert "#SBATCH --nodes=2" in script_text
    assert submit("list").stdout == "\n"  # a dry run leaves nothing

    answer = submit(*words)
    job = (tmp_path / "runs" / "two" / "slurm-job").read_text().strip()
    assert f"slurm job {job}" in answer.stdout  # and it came back while the job goes on
    again = submit(*words, check=False)
    assert (again.returncode, f"going on already, on slurm as {job}" in again.stderr) == (2, True)

    run = submit.run("two")
    run.wait_for_steps(2, attempt=1)
    (found,) = json.loads(submit("status", "--json").stdout)
    assert (found["state"], found["id"], found["nodes"]) == ("running", job, "node[0-1]")
    assert found["progress"]["total_steps"] == 2_000
    slurm.run("scontrol", "suspend", job)
    assert "two is suspended" in submit("status", "two").stdout
    slurm.run("scontrol", "resume", job)
    assert "two [1] " not in submit("logs", "two").stdout
    assert submit("logs", "two", "--rank", "1").returncode == 0

    def is_cancelled() -> bool:  # by a look: on a busy machine SLURM kills the script before it can write so
        (seen,) = json.loads(submit("status", "--json").stdout)
        return bool(seen["state"] == State.CANCELLED)

    answer = submit("cancel", "two").stdout  # it waits for a minute, in which a busy machine may not save
    assert re.fullmatch(r"two is (cancelled|running; it was asked to end, and has not yet)\n", answer)
    wait_until(is_cancelled, "it has saved and ended")
    saved = run.rows()[-1]["step"]
    assert f"step-{saved:08d}" in submit("status", "two").stdout
    wait_until(lambda: told.is_file() and told.read_text(), "somebody is told")
    assert told.read_text().startswith("two is cancelled")
    slurm.wait_idle()

    source = (tmp_path / "runs" / "two" / "source" / "version.json").stat().st_mtime_ns
    submit("resume", "two")
    run.wait_for_steps(2, attempt=2)
    assert run.rows("timing")[saved]["time"] > run.status().submitted  # it went on from there
    assert (tmp_path / "runs" / "two" / "source" / "version.json").stat().st_mtime_ns == source
    slurm.run("scancel", run.status().id)

    wait_until(is_cancelled, "it is known to be cancelled")
    slurm.wait_idle()
    assert is_cancelled()  # and does not come back
    assert run.status().attempt == 2


def test_a_waiting_job_is_taken_out_of_the_queue(slurm: SlurmLab, submit: Submitter, recipe: str) -> None:
    slurm.run("sbatch", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 100")
    submit("pretrain", "--recipe", recipe, "--executor", "slurm", "--nodes", "2", "--run", "waits")
    found = json.loads(submit("status", "waits", "--json").stdout)
    assert found["state"] == "pending"
    slurm.run("scontrol", "uhold", found["id"])
    told = f"waits is pending (held: JobHeldUser, until `scontrol release {found['id']}`)"
    assert submit("status", "waits").stdout.splitlines()[-1] == told
    with slurm.silent_controller():
        told = submit("status", "waits").stdout.splitlines()[-1]
    assert re.fullmatch(r"waits is unknown since \d\d:\d\d: slurmctld does not answer", told)
    assert "waits is cancelled" in submit("cancel", "waits").stdout
    assert slurm.run("squeue", "--noheader", "--states=PENDING").stdout == ""


def test_a_crash_is_tried_three_times_and_then_told_with_rank_and_node(
    slurm: SlurmLab, submit: Submitter, recipe: str, tmp_path: Path
) -> None:
    """One rank ends without a word beside one that would have asked to be started again."""
    (tmp_path / "crash.py").write_text(
        "import os, time\n"
        "from cluster.rank.preempt import Preempted\n"
        "def run():\n"
        "    if os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), 11)\n"
        "    time.sleep(1)\n"
        "    raise Preempted('saved')\n"
    )
    job = {
        "name": "crash",
        "function": "crash:run",
        "arguments": {},
        "resources": {"nodes": 2},
        "folder": str(tmp_path / "runs" / "crash"),
    }
    code = (
        "import json, sys; from cluster.job import Job; from cluster.site import load_site; "
        "from cluster.submit import submit; "
        "from cluster.slurm.executor import SlurmExecutor; from pathlib import Path; "
        "from cluster.typed_json import parse_record; "
        "job = parse_record(Job, sys.argv[1], where='', remedy=''); "
        "h = submit(job, SlurmExecutor(load_site(sys.argv[2]))); "
        "(Path(job.folder) / 'source' / 'crash.py').write_text(Path('crash.py').read_text()); print(h.wait())"
    )
    answer = submit.python(code, json.dumps(job), str(submit.site()))
    assert answer.stdout.strip() == "failed"
    run = submit.run("crash")
    assert [str(restart.cause) for restart in run.restarts()] == ["crash"] * 3
    failure = run.status().failure
    assert failure is not None
    assert (failure.rank, failure.node, failure.type) == (1, "node1", "Killed")
    assert "Segmentation fault" in failure.message
    assert "3 attempts ended by crash without any checkpoint" in submit("status", "crash").stdout
