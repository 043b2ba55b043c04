"""What the watcher of a job makes of its end. SLURM's commands are scripts that answer as told."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cluster.errors import UserError
from cluster.job import Job, Resources, State
from cluster.local import LocalExecutor
from cluster.run.folder import RunFolder
from cluster.run.restarts import Cause, read_restarts
from cluster.run.status import Status
from cluster.slurm.executor import SlurmHandle
from cluster.slurm.status import current_status, settled_status, watcher_id
from cluster.slurm.watch import end_watch, look, set_watch
from cluster.submit import prepare

# The job is 7, its watcher 8, and what is submitted next 9.
SCRIPTS = {
    "scontrol": """case "$*" in
      ping) echo "Slurmctld(primary) at control is UP" ;;
      *config) echo "SelectType = select/cons_tres" ;;
      *partition*) echo "PartitionName=main Default=YES OverSubscribe=${SHARES:-NO}"
                   echo "PartitionName=gpu Default=NO OverSubscribe=EXCLUSIVE" ;;
      *) echo "JobId=7 JobState=$WORD Restarts=0" ;;
    esac""",
    "squeue": """case "$*" in
      *--name=*) [ -z "$QUEUED" ] || echo "$QUEUED" ;;
      *) [ -z "$WORD" ] || echo "7|$WORD|n0|None"; echo "$ROWS" ;;
    esac""",
    "sinfo": "echo n0 idle",
    "sacct": "true",
    "sbatch": """cat > "$TOLD.script"; echo "sbatch $*" >> "$TOLD"; echo 9""",
    "scancel": """[ -z "$DOWN" ] || { echo "$DOWN" >&2; exit 8; }
      echo "scancel $*" >> "$TOLD" """,
}


class Watched:
    """A run whose job, 7, SLURM has seen end, and whose script has written nothing of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.told, self._set = RunFolder.create(folder / "run"), folder / "told", monkeypatch.setenv
        job = Job(name="t", function="a:b", arguments={}, resources=Resources(), folder=self.run.path)
        self.run.write_job(job)
        (self.run.path / "site.yaml").write_text(yaml.safe_dump({}))
        (self.run.path / "slurm-job").write_text("7\n")
        (self.run.path / "slurm-watcher").write_text("8\n")
        status = Status(
            state=State.RUNNING,
            name="t",
            executor="slurm",
            id="7",
            ranks=1,
            attempt=1,
            submitted=1.0,
            started=time.time(),
            nodes="n0",
        )
        self.run.write_status(status)

    def says(self, word: str, **more: str) -> None:
        """What SLURM says of job 7, and of others."""
        for name, value in ({"WORD": word} | more).items():
            self._set(name, value)

    def asked(self) -> list[str]:
        """What SLURM was asked to do."""
        return self.told.read_text().splitlines() if self.told.exists() else []

    def looked(self) -> tuple[State, list[Cause], bool]:
        """What a watcher does: the run's state, why attempts ended, and whether it was submitted anew."""
        look(self.run, "7")
        anew = any("job.sbatch" in line for line in self.asked())
        return self.run.read_status().state, [restart.cause for restart in read_restarts(self.run)], anew


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in SCRIPTS.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    return Watched(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("word", "cause"),
    [
        ("FAILED", Cause.LOST),  # its batch script was killed
        ("NODE_FAIL", Cause.LOST),
        ("PREEMPTED", Cause.LOST),  # where PreemptMode is CANCEL
        ("TIMEOUT", Cause.OUT_OF_TIME),
    ],
)
def test_what_slurm_does_not_start_again_is_submitted_anew(watched: Watched, word: str, cause: Cause) -> None:
    watched.says(word)
    assert watched.looked() == (State.PENDING, [cause], True)
    status = watched.run.read_status()
    assert (status.id, watcher_id(watched.run)) == ("9", "9")
    # Once: this watcher's job is over, and another may look again.
    assert watched.looked()[1:] == ([cause], True)
    assert sum("job.sbatch" in line for line in watched.asked()) == 1


@pytest.mark.parametrize(
    ("word", "state"),
    [("CANCELLED", State.CANCELLED), ("COMPLETED", State.COMPLETED), ("", State.FAILED)],
)
def test_what_is_cancelled_done_or_forgotten_is_written_and_not_submitted(
    watched: Watched, word: str, state: State
) -> None:
    watched.says(word)
    assert watched.looked() == (state, [], False)


def test_a_cancelled_job_that_slurm_has_forgotten_stays_cancelled(watched: Watched) -> None:
    watched.says("")
    watched.run.request_cancel()
    assert watched.looked() == (State.CANCELLED, [], False)


@pytest.mark.parametrize(("word", "queued"), [("PENDING", ""), ("RUNNING", ""), ("FAILED", "9|of its name")])
def test_what_goes_on_is_not_submitted_a_second_time(watched: Watched, word: str, queued: str) -> None:
    watched.says(word, QUEUED=queued)
    assert watched.looked() == (State.RUNNING, [], False)


def test_what_its_script_has_told_is_left_as_it_is(watched: Watched) -> None:
    watched.says("FAILED")
    done = watched.run.read_status().stopped(State.FAILED)
    watched.run.write_status(done)
    look(watched.run, "7")
    assert watched.run.read_status() == done
    watched.run.write_status(replace(done, state=State.RUNNING, ended=None, id="9"))  # submitted by somebody
    assert watched.looked() == (State.RUNNING, [], False)
    watched.run.write_status(replace(done, state=State.RUNNING, ended=None, id="", executor="local"))
    assert watched.looked() == (State.RUNNING, [], False)


def test_a_budget_is_one_whoever_spends_it(watched: Watched) -> None:
    watched.says("TIMEOUT")
    for attempt in (1, 2, 3):
        status = replace(
            watched.run.read_status(), state=State.RUNNING, id="7", attempt=attempt, started=time.time()
        )
        watched.run.write_status(status)
        look(watched.run, "7")
    assert watched.run.read_status().state is State.FAILED
    assert sum("job.sbatch" in line for line in watched.asked()) == 2


def test_a_job_that_could_never_begin_is_not_submitted_for_ever(watched: Watched) -> None:
    watched.says("FAILED")
    watched.run.write_status(replace(watched.run.read_status(), started=None, state=State.PENDING, attempt=0))
    assert watched.looked() == (State.FAILED, [], False)


def test_a_look_leaves_an_end_to_the_watcher_while_there_is_one(watched: Watched) -> None:
    watched.says("FAILED", ROWS="8|PENDING|n0|Priority")
    status = settled_status(watched.run)
    assert (status.state, "job 8 sees to it" in status.reason) == (State.PENDING, True)
    watched.says("FAILED", ROWS="8|COMPLETED|n0|None")
    assert current_status(watched.run).state is State.FAILED


def test_a_watcher_is_small_waits_for_the_end_and_needs_no_node_of_its_own(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"constraint": "h100", "sbatch": {"gres": "gpu:8", "exclusive": True}, "inherit": ["TOLD"]}
    (watched.run.path / "site.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.setenv("OF_A_LOGIN_SHELL", "1")
    set_watch(watched.run, "7")
    script = watched.told.with_suffix(".script").read_text().splitlines()
    exported = next(line for line in script if line.startswith("#SBATCH --export="))
    assert {"PATH", "TOLD"} <= set(exported.partition("export=")[2].split(","))
    assert "OF_A_LOGIN_SHELL" not in exported
    assert {"#SBATCH --dependency=afterany:7", "#SBATCH --ntasks=1", "#SBATCH --mem=500M"} <= set(script)
    assert not any(word in line for word in ("gpu", "exclusive", "h100") for line in script)
    assert watcher_id(watched.run) == "9"
    end_watch(watched.run)
    assert watched.asked()[-1] == "scancel 9"
    (watched.run.path / "site.yaml").write_text(yaml.safe_dump({"partition": "gpu"}))
    set_watch(watched.run, "7")
    assert watcher_id(watched.run) == ""
    assert "partition gpu gives whole nodes" in watched.run.unwatched.read_text()
    cpu = {"partition": "cpu", "account": "small", "constraint": "slow", "sbatch": {"reservation": "r1"}}
    (watched.run.path / "site.yaml").write_text(yaml.safe_dump({"partition": "gpu", "cpu": cpu}))
    set_watch(watched.run, "7")
    script = watched.told.with_suffix(".script").read_text().splitlines()
    assert {"#SBATCH --partition=cpu", "#SBATCH --account=small", "#SBATCH --ntasks=1"} <= set(script)
    assert {"#SBATCH --constraint=slow", "#SBATCH --reservation=r1"} <= set(script)
    assert not watched.run.unwatched.exists()


def test_a_cancel_that_slurm_does_not_hear_has_not_happened(watched: Watched) -> None:
    watched.says("RUNNING", DOWN="Unable to contact slurm controller (connect failure)")
    with pytest.raises(UserError, match=r"not cancelled: SLURM does not cancel job 7: .*contact slurm"):
        SlurmHandle(watched.run).cancel()
    assert not watched.run.cancel_requested()


def test_a_cancelled_job_that_waits_has_no_watcher_any_more(watched: Watched) -> None:
    watched.says("PENDING")
    SlurmHandle(watched.run).cancel()
    assert watched.asked() == ["scancel 7", "scancel 8"]
    assert watched.run.read_status().state is State.CANCELLED


def test_that_an_earlier_job_was_unwatched_is_not_said_of_a_run_that_starts_elsewhere(
    watched: Watched,
) -> None:
    watched.run.unwatched.write_text("no job looks how job 7 ends")
    prepare(watched.run, watched.run.read_job(), LocalExecutor(), None, snapshot=None)
    assert not watched.run.unwatched.exists()
