"""What the batch script makes of how its ranks ended. SLURM's commands are scripts that answer as told."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.host import node_name
from cluster.job import Job, Resources, State, Task
from cluster.run.folder import RunFolder
from cluster.run.restarts import Cause, read_restarts
from cluster.run.status import Failure, Status, why
from cluster.slurm import again, finish
from cluster.slurm import batch as slurm_batch
from cluster.slurm.batch import begin, end
from cluster.slurm.script import NOTHING_TO_DO
from cluster.slurm.state import Seen, from_controller

SCONTROL = """#!/bin/sh
case "$1" in
  requeue)
    if [ -n "$SILENT" ] && mkdir "$ASKED.before" 2>/dev/null; then
      echo "Unexpected message received for job 7" >&2; exit 1
    fi
    [ -z "$REFUSED" ] || { echo "$REFUSED" >&2; exit 1; }; echo "$2" >> "$ASKED" ;;
  update) echo "$*" >> "$ASKED" ;;
  *) echo "JobId=7 JobState=${WORD:-RUNNING} Restarts=0 StartTime=$START TimeLimit=$LIMIT EndTime=$START" ;;
esac
"""
SBATCH = """#!/bin/sh
echo "sbatch $*" >> "$ASKED"
[ -z "$NO_SBATCH" ] || { echo "$NO_SBATCH" >&2; exit 1; }
echo 8
"""
SQUEUE = """#!/bin/sh
echo "9|afterok:7(unfulfilled),singleton(unfulfilled)"
echo "10|afterok:77(unfulfilled)"
"""


class Batch:
    """A run whose job 7 is in its first start, with what lies in its folder."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.run = RunFolder.create(folder / "run")
        self.asked = folder / "asked"
        job = Job(name="t", function="a:b", arguments={}, resources=Resources(nodes=2), folder=self.run.path)
        self.run.write_job(job)
        (self.run.path / "site.yaml").write_text(yaml.safe_dump({}))
        status = Status(
            state=State.RUNNING,
            name="t",
            executor="slurm",
            id="7",
            ranks=2,
            attempt=1,
            submitted=0.0,
            started=time.time(),
            nodes="n[0-1]",
        )
        self.run.write_status(replace(status, **changes))

    def error(
        self, rank: int, kind: str = "ValueError", *, user_error: bool = False, by_peer: bool = False
    ) -> None:
        name = "hang-n1" if kind == "Hang" else f"rank-{rank}"
        failure = Failure(rank=rank, type=kind, message="boom", user_error=user_error, by_peer=by_peer)
        self.run.write_error(name, failure)

    def log(self, *lines: str) -> None:
        text = "\n".join(["2026-01-01 00:00:00,000 slurm attempt 1 on n[0-1]", *lines, ""])
        (self.run.path / "logs" / "slurm.log").write_text(text)

    def verdict(self) -> tuple[str, list[str], bool]:
        """The run's state, why its attempts ended, and whether SLURM was asked to start it again."""
        causes = [str(restart.cause) for restart in read_restarts(self.run)]
        return str(self.run.read_status().state), causes, self.asked.exists()


@pytest.fixture
def batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Batch:
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "scontrol": SCONTROL,
        "sbatch": SBATCH,
        "squeue": SQUEUE,
        "sinfo": '#!/bin/sh\necho "$NODES"\n',
    }
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for name, value in {
        "PATH": f"{tools}:/usr/bin:/bin",
        "ASKED": str(tmp_path / "asked"),
        "LIMIT": "UNLIMITED",
        "START": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "NODES": "n0 alloc",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[0-1]",
        "SUBMIT_START": "0",
    }.items():
        monkeypatch.setenv(name, value)
    return Batch(tmp_path)


def test_ranks_that_end_well_complete_the_run(batch: Batch) -> None:
    assert end(batch.run, status=0, stopped=False) == 0
    assert batch.verdict() == ("completed", [], False)


def test_the_error_of_a_start_that_was_given_up_is_not_this_one_s(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBMIT_START", "4")
    batch.error(1)  # written late, by a node that was cut off
    monkeypatch.setenv("SUBMIT_START", "0")
    assert end(batch.run, status=0, stopped=False) == 0
    assert batch.verdict() == ("completed", [], False)


def test_ranks_that_saved_start_again(batch: Batch) -> None:
    batch.run.mark_requeue()
    batch.log("srun: error: n0: task 0: Exited with exit code 85", "srun: error: n1: task 1: Terminated")
    end(batch.run, status=143, stopped=True)
    assert batch.verdict() == ("pending", ["preempted"], True)


@pytest.mark.parametrize(
    ("limit", "cause"), [("00:02:00", "time_limit"), ("00:10:00", "preempted"), ("1-00:00:00", "preempted")]
)
def test_the_time_limit_has_its_own_name(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, limit: str, cause: str
) -> None:
    monkeypatch.setenv("LIMIT", limit)
    batch.run.mark_requeue()
    end(batch.run, status=85, stopped=False)
    assert batch.verdict() == ("pending", [cause], True)


def test_a_short_job_is_preempted_too(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three minutes SLURM asks it to stop in the second half, however long the site gives others."""
    monkeypatch.setenv("LIMIT", "00:03:00")
    batch.run.write_job(replace(batch.run.read_job(), resources=Resources(nodes=2, minutes=3)))
    batch.run.mark_requeue()
    end(batch.run, status=85, stopped=False)
    assert batch.verdict() == ("pending", ["preempted"], True)


def test_a_crash_beside_ranks_that_saved_is_a_crash(batch: Batch) -> None:
    batch.run.mark_requeue()
    batch.log(
        "srun: error: n1: task 1: Segmentation fault", "srun: error: n0: task 0: Exited with exit code 85"
    )
    end(batch.run, status=139, stopped=False)
    assert batch.verdict() == ("pending", ["crash"], True)
    restart = read_restarts(batch.run)[0]
    assert (restart.rank, restart.node, restart.message) == (1, "n1", "Killed: Segmentation fault")


def test_an_error_beside_the_mark_is_a_crash(batch: Batch) -> None:
    batch.run.mark_requeue()
    batch.error(1)
    end(batch.run, status=143, stopped=True)
    assert batch.verdict() == ("pending", ["crash"], True)


def test_a_signal_before_anybody_could_hear_it_is_no_crash(batch: Batch) -> None:
    batch.log("srun: error: n1: task 1: User defined signal 2")
    end(batch.run, status=140, stopped=False)
    assert batch.verdict() == ("pending", ["lost"], True)


def test_a_node_that_does_not_answer_goes_before_the_errors_of_its_peers(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODES", "n1 down*")
    batch.error(0, "RuntimeError")
    end(batch.run, status=143, stopped=True)
    assert batch.verdict() == ("pending", ["lost"], True)
    assert read_restarts(batch.run)[0].node == "n1"


def test_a_node_that_failed_is_named_as_slurm_says_it(batch: Batch) -> None:
    """Whatever else it says, and though the node is back."""
    batch.log(
        CANCEL.removesuffix("***") + "DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***",
        "srun: error: n1: task 1: Killed",
    )
    end(batch.run, status=137, stopped=False)
    assert batch.verdict() == ("pending", ["lost"], True)
    assert "due to node failure" in read_restarts(batch.run)[0].message


def test_a_hang_is_told_apart(batch: Batch) -> None:
    batch.error(1, "Hang")
    batch.error(0, "RuntimeError")
    end(batch.run, status=137, stopped=False)
    assert batch.verdict() == ("pending", ["hang"], True)


def test_what_the_user_has_to_mend_is_not_tried_again(batch: Batch) -> None:
    batch.error(0, "UserError", user_error=True)
    assert end(batch.run, status=2, stopped=False) == 1
    assert batch.verdict() == ("failed", ["crash"], False)
    failure = batch.run.read_status().failure
    assert failure is not None
    assert failure.user_error


def test_the_third_crash_is_the_last(batch: Batch) -> None:
    for attempt in (1, 2, 3):
        batch.run.write_status(
            replace(batch.run.read_status(), state=State.RUNNING, attempt=attempt, started=time.time())
        )
        batch.asked.unlink(missing_ok=True)
        batch.error(1)
        end(batch.run, status=1, stopped=False)
    assert batch.verdict() == ("failed", ["crash"] * 3, False)
    failure = batch.run.read_status().failure
    assert failure is not None
    assert failure.message.startswith("3 attempts ended by crash without any checkpoint")


def test_a_cancelled_run_ends(batch: Batch) -> None:
    batch.run.request_cancel()
    batch.run.mark_requeue()
    end(batch.run, status=85, stopped=False)
    assert batch.verdict() == ("cancelled", ["preempted"], False)


def test_a_start_that_was_given_up_writes_nothing(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    batch.run.write_status(replace(batch.run.read_status(), start=1))
    before = batch.run.read_status()
    with pytest.raises(RuntimeError, match="has taken this run over"):
        end(batch.run, status=1, stopped=False)
    assert (batch.run.read_status(), batch.verdict()[1:]) == (before, ([], False))


def test_begin_finds_nothing_to_do_in_a_complete_run(batch: Batch) -> None:
    batch.run.write_status(batch.run.read_status().stopped(State.COMPLETED))
    assert begin(batch.run) == NOTHING_TO_DO


@pytest.mark.parametrize(("marked", "cause"), [(True, Cause.PREEMPTED), (False, Cause.LOST)])
def test_begin_accounts_for_a_start_that_nobody_saw_end(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, *, marked: bool, cause: Cause
) -> None:
    if marked:
        batch.run.mark_requeue()
    monkeypatch.setenv("SUBMIT_START", "2")  # start 1 did not come as far as its `begin`
    assert begin(batch.run) == 0
    status = batch.run.read_status()
    assert (status.state, status.attempt, status.start) == (State.RUNNING, 2, 2)
    assert [restart.cause for restart in read_restarts(batch.run)] == [cause]
    assert not batch.run.requeue_mark(0).exists()


def test_begin_does_not_start_what_was_cancelled(batch: Batch) -> None:
    batch.run.request_cancel()
    assert begin(batch.run) == 1
    assert batch.verdict()[0] == "cancelled"


CANCEL = "slurmstepd: error: *** JOB 7 ON n0 CANCELLED AT 2026-01-01T00:00:00 ***"


@pytest.mark.parametrize(
    ("line", "state", "again"),
    [
        (CANCEL, "cancelled", False),
        (CANCEL.replace(" ***", " DUE TO PREEMPTION ***").replace("*** JOB", "*** JOB"), "pending", True),
        ("", "pending", True),
    ],
)
def test_what_somebody_cancels_does_not_come_back(batch: Batch, line: str, state: str, again: bool) -> None:
    batch.log(line)
    batch.run.requeue_mark(0).touch()
    end(batch.run, status=143, stopped=True)
    assert batch.verdict() == (state, ["preempted"], again)


def test_a_watcher_that_is_cancelled_does_not_cancel_its_run(batch: Batch) -> None:
    (batch.run.path / "slurm-watcher").write_text("8\n")
    batch.log(CANCEL.replace("JOB 7", "JOB 8"))
    batch.run.requeue_mark(0).touch()
    end(batch.run, status=143, stopped=True)
    assert batch.verdict() == ("pending", ["preempted"], True)


def test_a_cancel_of_an_earlier_attempt_does_not_count(batch: Batch) -> None:
    log = batch.run.path / "logs" / "slurm.log"
    log.write_text(f"2026-01-01 00:00:00,000 slurm attempt 1 on n0\n{CANCEL}\n2026 slurm attempt 2 on n0\n")
    batch.run.requeue_mark(0).touch()
    end(batch.run, status=143, stopped=True)
    assert batch.verdict() == ("pending", ["preempted"], True)


def test_a_rank_that_runs_out_of_memory_is_told_as_that(batch: Batch) -> None:
    batch.run.write_job(replace(batch.run.read_job(), max_crashes=1))
    batch.log("srun: error: n1: task 1: Out Of Memory")
    end(batch.run, status=1, stopped=False)
    status = batch.run.read_status()
    assert status.state is State.OUT_OF_MEMORY
    assert status.failure is not None
    assert (status.failure.rank, status.failure.node) == (1, "n1")


def test_a_killed_attempt_is_paid_for_until_its_last_sign_only(batch: Batch) -> None:
    """Eight GPUs for an hour; the next start comes sixty hours later."""
    now = time.time()
    status = replace(batch.run.read_status(), started=now - 61 * 3600, gpus=8)
    batch.run.write_status(status)
    batch.log()
    for path in (
        batch.run.path / "status.json",
        batch.run.path / "job.json",
        batch.run.path / "logs" / "slurm.log",
    ):
        os.utime(path, (now - 60 * 3600, now - 60 * 3600))
    begin(batch.run)
    after = batch.run.read_status()
    assert after.gpu_hours == pytest.approx(8, rel=1e-3)
    assert after.seconds == pytest.approx(3600, rel=1e-3)
    assert (batch.run.path / "slurm-job").read_text() == "7\n"


REFUSED = "Requested operation is presently disabled for job 7"


def test_a_refused_requeue_frees_the_nodes_at_once_and_another_job_goes_on(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSED", REFUSED)
    batch.run.mark_requeue()
    begun = time.monotonic()
    assert end(batch.run, status=85, stopped=False) == 1
    assert time.monotonic() - begun < again.PAUSE / 2
    asked = batch.asked.read_text().splitlines()
    # What waited for job 7 waits for job 8; what waits for another is left alone.
    assert asked == [
        f"sbatch --parsable --dependency=singleton {batch.run.path}/job.sbatch",
        "update JobId=9 Dependency=afterok:8,singleton",
    ]
    status = batch.run.read_status()
    assert (status.state, status.id, status.first_attempt) == (State.PENDING, "8", 0)
    assert (batch.run.path / "slurm-job").read_text() == "8\n"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert begin(batch.run) == 0
    assert (batch.run.read_status().attempt, len(read_restarts(batch.run))) == (2, 1)


def test_a_run_that_slurm_starts_in_no_way_ends_and_is_told(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSED", REFUSED)
    monkeypatch.setenv("NO_SBATCH", "sbatch: error: no submissions from here")
    batch.run.mark_requeue()
    end(batch.run, status=85, stopped=False)
    failure = batch.run.read_status().failure
    assert batch.verdict()[:2] == ("failed", ["preempted"])
    assert failure is not None
    assert REFUSED in failure.message
    assert "no submissions from here" in failure.message


def test_a_controller_that_cannot_be_reached_is_asked_again(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SILENT", "1")
    monkeypatch.setattr(again, "PAUSE", 0.01)
    batch.run.mark_requeue()
    end(batch.run, status=85, stopped=False)
    assert batch.verdict() == ("pending", ["preempted"], True)
    assert batch.asked.read_text() == "7\n"  # and nothing was submitted


def test_a_job_that_is_cancelled_while_slurm_is_asked_stays_so(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(job: str) -> Seen | None:
        monkeypatch.setenv("WORD", "CANCELLED")
        return from_controller(job)

    monkeypatch.setattr(again, "from_controller", ask)  # after the verdict
    batch.run.mark_requeue()
    end(batch.run, status=85, stopped=False)
    assert batch.verdict() == ("cancelled", ["preempted"], False)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "restarts.jsonl")


def test_a_full_disk_keeps_no_run_from_its_next_start(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bool] = []

    def after_the_start(*_: Any) -> None:
        started.append(batch.asked.exists())
        full()

    monkeypatch.setattr(finish, "DISK_PATIENCE", 0.0)
    monkeypatch.setattr(finish, "add_restart", after_the_start)
    monkeypatch.setattr(RunFolder, "write_status", after_the_start)
    batch.run.mark_requeue()
    assert end(batch.run, status=85, stopped=False) == 1
    assert started == [True, True]
    assert batch.asked.read_text() == "7\n"


@pytest.mark.parametrize("seconds", [0.1, 9.0])
def test_an_end_waits_for_room_on_the_disk_and_is_told_without(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    told: list[State] = []
    monkeypatch.setattr(finish, "DISK_PATIENCE", 0.3)
    monkeypatch.setattr(finish, "DISK_PAUSE", 0.05)
    monkeypatch.setattr(finish, "notify", lambda _, status: told.append(status.state))
    write, free_at = RunFolder.write_status, time.monotonic() + seconds

    def write_status(run: RunFolder, status: Status) -> None:
        if time.monotonic() < free_at:
            full()
        write(run, status)

    monkeypatch.setattr(RunFolder, "write_status", write_status)
    assert end(batch.run, status=0, stopped=False) == 0
    assert told == [State.COMPLETED]
    assert batch.run.read_status().state is (State.COMPLETED if seconds < 1 else State.RUNNING)


def test_a_start_on_a_full_disk_ends_with_its_sentence(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Status] = []
    monkeypatch.setattr(finish, "DISK_PATIENCE", 0.0)
    monkeypatch.setattr(finish, "notify", lambda _, status: told.append(status))
    monkeypatch.setattr(RunFolder, "write_status", full)
    assert begin(batch.run) == 1
    assert [status.state for status in told] == [State.FAILED]
    assert told[0].failure is not None
    assert told[0].failure.message.startswith("cannot write ")
    assert "no space left on device" in told[0].failure.message


def test_a_start_that_has_to_try_its_books_twice_is_one_attempt(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch.run.write_status(replace(batch.run.read_status(), state=State.PENDING, started=None))
    write, failed = slurm_batch.write_job_id, []

    def write_job_id(run: RunFolder, known: str) -> None:
        if not failed:
            failed.append(known)
            full()
        write(run, known)

    monkeypatch.setattr(finish, "DISK_PAUSE", 0.0)
    monkeypatch.setattr(slurm_batch, "write_job_id", write_job_id)
    assert begin(batch.run) == 0
    assert failed == ["7"]
    assert (batch.run.read_status().attempt, read_restarts(batch.run)) == (2, [])


STEP = "slurmstepd-n0: error: *** STEP 7.0 ON n0 CANCELLED AT 2026-01-01T00:00:00 ***"


@pytest.mark.parametrize(
    "lines",
    [
        # `scancel 7.0`
        ["srun: Job step aborted: Waiting up to 32 seconds for job step to finish.", STEP],
        # kill -9 of a slurmstepd
        [
            "srun: error: Aborting, io error and missing step on node 1",
            "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.",
        ],
        # scancel --signal=HUP --full 7
        ["srun: forcing job termination"],
    ],
)
def test_a_step_that_somebody_ends_is_no_crash(batch: Batch, lines: list[str]) -> None:
    """As it looked: nobody's exit comes before srun's word."""
    batch.log(*lines, "srun: error: n1: task 1: Killed")
    batch.error(0, "RuntimeError", by_peer=True)
    end(batch.run, status=137, stopped=False)
    assert batch.verdict() == ("pending", ["lost"], True)
    assert "ended from outside" in read_restarts(batch.run)[0].message


def test_a_step_that_srun_ends_because_of_a_rank_is_a_crash(batch: Batch) -> None:
    batch.log(
        "srun: error: n1: task 1: Bus error", STEP, "srun: Job step aborted: Waiting up to 32 seconds for it."
    )
    end(batch.run, status=135, stopped=False)
    assert read_restarts(batch.run)[0].cause is Cause.CRASH
    assert read_restarts(batch.run)[0].rank == 1


def test_time_that_is_over_before_anything_is_saved_has_its_name_and_its_budget(batch: Batch) -> None:
    for attempt in (1, 2, 3):
        status = replace(batch.run.read_status(), state=State.RUNNING, attempt=attempt, started=time.time())
        batch.run.write_status(status)
        batch.asked.unlink(missing_ok=True)
        batch.log(CANCEL.removesuffix("***") + "DUE TO TIME LIMIT ***")
        end(batch.run, status=143, stopped=True)
    assert batch.verdict() == ("failed", ["out_of_time"] * 3, False)
    failure = batch.run.read_status().failure
    assert failure is not None
    assert "its time was over before it could save" in failure.message


def test_a_clock_that_is_behind_blames_nobody(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 sees its connection break, by its own clock 150 s before rank 0 raised."""
    batch.error(0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 150)
    batch.error(1, "RuntimeError", by_peer=True)
    batch.log("srun: error: n1: task 1: Exited with exit code 1", "srun: error: n0: task 0: Terminated")
    end(batch.run, status=1, stopped=False)
    restart = read_restarts(batch.run)[0]
    assert (restart.cause, restart.rank, restart.message) == (Cause.CRASH, 0, "ValueError: boom")


def test_a_killed_rank_is_found_behind_the_broken_connection_of_another(batch: Batch) -> None:
    batch.error(0, "RuntimeError", by_peer=True)
    batch.log("srun: error: n0: task 0: Exited with exit code 1", "srun: error: n1: task 1: Killed")
    end(batch.run, status=137, stopped=False)
    restart = read_restarts(batch.run)[0]
    assert (restart.cause, restart.rank, restart.node) == (Cause.CRASH, 1, "n1")


def test_what_is_unknown_is_told_as_unknown(batch: Batch) -> None:
    batch.error(0, "RuntimeError", by_peer=True)
    batch.error(1, "RuntimeError", by_peer=True)
    end(batch.run, status=1, stopped=False)
    restart = read_restarts(batch.run)[0]
    assert (restart.cause, restart.rank) == (Cause.CRASH, None)
    assert "which ended first is unknown" in restart.message


def test_a_rank_that_fails_when_all_is_done_makes_no_failure_of_it(batch: Batch) -> None:
    batch.run.mark_done()
    batch.error(1)
    assert end(batch.run, status=1, stopped=False) == 0
    assert batch.verdict() == ("completed", [], False)
    status = batch.run.read_status()
    assert status.failure is not None
    assert why(status) == (
        f"t is completed; after its work was done, rank 1 of 2 on {node_name()} failed: ValueError: boom"
    )


def test_the_end_of_a_log_is_this_start_s(batch: Batch) -> None:
    log = batch.run.log(1)
    log.write_text("==== start 7.0\nof the first\n==== start 7.1\nof the second\n")
    assert batch.run.tail(1) == batch.run.tail(1, token="7.1") == ["of the second"]
    assert batch.run.tail(1, token="7.2") == []  # which ended before it could say anything


def test_a_requeue_names_the_task_and_never_the_array(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last task of an array has the array's number as its own."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert begin(batch.run) == 0
    assert batch.run.read_status().id == "7_3"
    batch.run.mark_requeue()
    end(batch.run, status=85, stopped=False)
    assert batch.asked.read_text() == "7_3\n"


def test_of_an_array_the_one_task_is_submitted_anew(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the array's script; and not in its name's turn, for that would be after all the others."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    batch.run.write_job(replace(batch.run.read_job(), task=Task(array="parts-0a", number=3)))
    assert begin(batch.run) == 0
    monkeypatch.setenv("REFUSED", REFUSED)
    batch.run.mark_requeue()
    end(batch.run, status=85, stopped=False)
    script = batch.run.path.parent / "parts-0a.sbatch"
    assert batch.asked.read_text() == f"sbatch --parsable --dependency=afterany:7_3 --array=3 {script}\n"
    assert batch.run.read_status().id == "8_3"
    assert (batch.run.path / "slurm-job").read_text() == "8_3\n"
