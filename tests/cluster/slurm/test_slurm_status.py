"""What is known of a run on SLURM when nobody could write it down. SLURM's commands are scripts."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from cluster.errors import AlreadyRunning, Refused, UserError
from cluster.executors import Look, cancel, status_of
from cluster.job import Job, Resources, State
from cluster.run.folder import RunFolder, list_runs
from cluster.run.restarts import Cause, Restart, add_restart, read_restarts, spent
from cluster.run.status import Status, why
from cluster.site import Site
from cluster.slurm import state as slurm_state
from cluster.slurm import status as slurm_status
from cluster.slurm.executor import SlurmExecutor, SlurmHandle
from cluster.slurm.script import job_name
from cluster.slurm.state import LOOK_PATIENCE
from cluster.slurm.status import current_status, settled_status
from cluster.submit import submit

SQUEUE = """#!/bin/sh
echo "squeue $*" >> "$ANSWERS/asked"
case "$*" in *--name=*) cat "$ANSWERS/queue";; *) cat "$ANSWERS/jobs";; esac
"""
SCONTROL = """#!/bin/sh
echo "scontrol $*" >> "$ANSWERS/asked"
if [ -f "$ANSWERS/hangs" ]; then sleep 60; fi
if [ -f "$ANSWERS/down" ]; then echo "Slurmctld(primary) at control is DOWN"; exit 1; fi
echo "Slurmctld(primary) at control is UP"
"""
SACCT = """#!/bin/sh
echo "sacct $*" >> "$ANSWERS/asked"
[ ! -f "$ANSWERS/accounting" ] || cat "$ANSWERS/accounting"
"""
SBATCH = """#!/bin/sh
if [ "$1" = --test-only ]; then
  cat > "$ANSWERS/tested"; [ -f "$ANSWERS/impossible" ] || exit 0
  cat "$ANSWERS/impossible" >&2; exit 1
fi
[ -f "$ANSWERS/refusal" ] && { cat "$ANSWERS/refusal" >&2; exit 1; }
[ -f "$ANSWERS/wrapper" ] && cat "$ANSWERS/wrapper"
echo 8
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that was handed to sbatch, which has not answered."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (
        ("squeue", SQUEUE),
        ("scontrol", SCONTROL),
        ("sbatch", SBATCH),
        ("sacct", SACCT),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("ANSWERS", str(tmp_path))
    (tmp_path / "queue").touch()
    (tmp_path / "jobs").touch()
    run = RunFolder.create(tmp_path / "run")
    run.write_job(job(run))
    run.write_status(
        Status(state=State.PENDING, name="t", executor="slurm", id="", ranks=1, attempt=0, submitted=1.0)
    )
    return run


def job(run: RunFolder) -> Job:
    return Job(name="t", function="a:b", arguments={}, resources=Resources(), folder=run.path)


def test_a_job_whose_id_nobody_wrote_down_is_found_by_its_name(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "queue").write_text(f"7|{job_name(job(run))}\n")
    (tmp_path / "jobs").write_text("7|RUNNING|n0|None\n")
    looked = current_status(run)
    assert (looked.id, looked.state) == ("7", State.RUNNING)
    assert SlurmHandle(run).id == ""  # a look writes nothing
    assert SlurmHandle(run).state() is State.RUNNING  # to whoever waits for it
    assert SlurmHandle(run).id == "7"
    with pytest.raises(AlreadyRunning, match="on slurm as 7"):
        submit(job(run), SlurmExecutor(Site()))


def test_a_job_that_never_came_into_the_queue_has_failed(run: RunFolder) -> None:
    with contextlib.closing(run.lock()):  # somebody is submitting it
        assert current_status(run).state is State.PENDING
    status = current_status(run)
    assert status.state is State.FAILED
    assert status.failure is not None
    assert "never came into SLURM's queue" in status.failure.message
    assert run.read_status().state is State.PENDING
    assert settled_status(run).state is State.FAILED
    assert run.read_status().state is State.FAILED
    submit(job(run), SlurmExecutor(Site()))
    assert SlurmHandle(run).id == "8"


def test_an_end_that_nobody_wrote_down_is_written_before_the_next_submission(
    run: RunFolder, tmp_path: Path
) -> None:
    (run.path / "slurm-job").write_text("6\n")
    (tmp_path / "jobs").write_text("6|NODE_FAIL|n0|None\n")
    told = tmp_path / "told"
    (run.path / "site.yaml").write_text(f"notify: {{command: [sh, -c, 'cat >> {told}']}}\n")
    submit(job(run), SlurmExecutor(Site()))
    assert "node_fail" in told.read_text()
    assert run.read_status().state is State.PENDING


def test_a_slow_look_does_not_end_what_was_submitted_since(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sacct takes its time, and the run is submitted again meanwhile."""
    (run.path / "slurm-job").write_text("6\n")
    again = Status(state=State.PENDING, name="t", executor="slurm", id="8", ranks=1, attempt=0, submitted=2.0)

    def ask(ids: set[str]) -> slurm_state.Answer:
        run.write_status(again)
        waits = slurm_state.Seen(state=State.PENDING, word="PENDING")
        return slurm_state.Answer(asked=frozenset(ids), seen={"8": waits} if "8" in ids else {})

    monkeypatch.setattr(slurm_status, "ask", ask)
    settled_status(run)
    assert run.read_status() == again


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("known", ["6", ""])
def test_a_look_at_an_end_that_nobody_wrote_tells_of_it_and_leaves_no_trace(
    run: RunFolder, tmp_path: Path, known: str
) -> None:
    """Neither a file nor the command of a site file that anybody may have written."""
    if known:
        (run.path / "slurm-job").write_text(f"{known}\n")
    told = tmp_path / "told"
    (run.path / "site.yaml").write_text(f"notify: {{command: [sh, -c, 'touch {told}']}}\n")
    before = contents(run.path)
    assert status_of(run).state is State.FAILED
    assert contents(run.path) == before
    assert not told.exists()
    with pytest.raises(UserError, match="is not running: it is failed"):
        cancel(run)  # who is to act on it has it written down
    assert run.read_status().state is State.FAILED
    assert told.exists()


def going(folder: Path, number: int) -> RunFolder:
    """A run that says of itself that it is running, as a job of that number."""
    run = RunFolder.create(folder / f"r{number}")
    run.write_status(
        Status(
            state=State.RUNNING,
            name=f"r{number}",
            executor="slurm",
            id=str(number),
            ranks=1,
            attempt=1,
            submitted=1.0,
            started=1.0,
            gpus=1,
        )
    )
    return run


def told(folder: Path) -> dict[str, str]:
    """What a look at all runs has to say of each, in a sentence."""
    look = Look(list_runs(folder))
    return {run.path.name: why(look.status(run)) for run in list_runs(folder)}


def questions(tmp_path: Path) -> list[str]:
    asked = tmp_path / "asked"
    words = [line.split()[:2] for line in asked.read_text().splitlines()] if asked.exists() else []
    return [" ".join(line) if line[0] == "scontrol" else line[0] for line in words]


@pytest.mark.usefixtures("run")  # for its SLURM
def test_a_look_asks_once_about_all_runs_and_the_accounting_about_those_that_are_forgotten(
    tmp_path: Path,
) -> None:
    runs = [going(tmp_path / "runs", number) for number in (10, 11, 12, 13, 14)]
    runs[0].write_status(replace(runs[0].read_status(), state=State.COMPLETED))
    rows = ["11|RUNNING|n0|None", "12|PENDING||Resources", "99|RUNNING|n1|None"]
    (tmp_path / "jobs").write_text("\n".join(rows) + "\n")
    # That 14 runs is what the accounting believes of a job whose end it has missed.
    (tmp_path / "accounting").write_text("13|CANCELLED by 1000|n3\n14|RUNNING|n4\n")
    found = told(tmp_path / "runs")
    assert [found[f"r{number}"] for number in (10, 11, 12)] == [
        "r10 is completed",
        "r11 is running",
        "r12 is pending (Resources)",
    ]
    assert found["r13"].startswith("SLURM ended job 13 as CANCELLED")
    assert found["r14"].startswith("SLURM knows no job 14 any more")
    assert questions(tmp_path) == ["scontrol ping", "squeue", "sacct"]
    asked = (tmp_path / "asked").read_text()
    assert "--jobs=11,12,13,14\n" in asked
    assert "--jobs=13,14\n" in asked


@pytest.mark.usefixtures("run")
def test_a_run_that_has_ended_is_not_asked_about(tmp_path: Path) -> None:
    run = going(tmp_path / "runs", 10)
    run.write_status(replace(run.read_status(), state=State.COMPLETED))
    told(tmp_path / "runs")
    assert questions(tmp_path) == []


@pytest.mark.slow
@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("how", ["down", "hangs"])
def test_with_a_silent_controller_runs_are_unknown_since_their_last_sign_and_it_is_waited_for_once(
    tmp_path: Path, how: str
) -> None:
    (tmp_path / how).touch()
    today = datetime.now().replace(hour=0, minute=4)
    for number in range(10, 30):
        run = going(tmp_path / "runs", number)
        sign = today.timestamp() - 24 * 3600 * (number > 10)
        os.utime(run.path / "status.json", (sign, sign))
    nameless = RunFolder.create(tmp_path / "runs" / "nameless")
    nameless.write_job(job(nameless))
    nameless.write_status(replace(going(tmp_path, 9).read_status(), id="", name="nameless"))
    before = contents(tmp_path / "runs")
    began = time.monotonic()
    found = told(tmp_path / "runs")
    assert time.monotonic() - began < 10 * LOOK_PATIENCE
    assert contents(tmp_path / "runs") == before
    assert questions(tmp_path) == ["scontrol ping"]
    assert found["r10"] == "r10 is unknown since 00:04: slurmctld does not answer"
    yesterday = f"{today - timedelta(days=1):%Y-%m-%d}"
    assert found["r11"] == f"r11 is unknown since {yesterday} 00:04: slurmctld does not answer"
    assert found["nameless"].startswith("nameless is unknown since")
    run = RunFolder(tmp_path / "runs" / "r10")
    hours = status_of(run).until_now().gpu_hours  # it is not known to have run since
    assert hours == pytest.approx((today.timestamp() - 1.0) / 3600, abs=0.1)


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("SUSPENDED|n0|None", "suspended"),
        ("PENDING||JobHeldUser", "pending (held: JobHeldUser, until `scontrol release 10`)"),
        ("REQUEUE_HOLD||None", "pending (held: REQUEUE_HOLD, until `scontrol release 10`)"),
        ("PENDING||Dependency", "pending (Dependency)"),
    ],
)
def test_a_job_that_is_suspended_or_held_is_told_as_such(tmp_path: Path, row: str, words: str) -> None:
    going(tmp_path / "runs", 10)
    (tmp_path / "jobs").write_text(f"10|{row}\n")
    assert told(tmp_path / "runs") == {"r10": f"r10 is {words}"}


@pytest.mark.parametrize("hostile", ["--user=me", "6 7", "6,7", "../6"])
def test_S1_an_id_that_is_none_reaches_no_command(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, hostile: str
) -> None:
    monkeypatch.setattr(slurm_state, "call", lambda *words, **options: pytest.fail(f"{words}"))
    (run.path / "slurm-job").write_text(f"{hostile}\n")
    for status in (run.read_status(), replace(run.read_status(), id=hostile)):
        run.write_status(status)
        for act in (status_of, cancel):
            with pytest.raises(UserError, match="is no id of a SLURM job"):
                act(run)


def test_what_holds_the_site_s_environment_is_for_its_owner_alone(run: RunFolder) -> None:
    submit(job(run), SlurmExecutor(Site(environment={"TOKEN": "secret"})))
    holders = [path for path in run.path.iterdir() if path.is_file() and b"secret" in path.read_bytes()]
    assert sorted(path.name for path in holders) == ["job.sbatch", "site.yaml"]
    assert {path.stat().st_mode & 0o777 for path in holders} == {0o600}
    assert (run.path / "job.json").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_a_job_that_slurm_refuses_leaves_the_run_as_it_was(run: RunFolder, tmp_path: Path) -> None:
    ended = replace(run.read_status(), state=State.TIMEOUT, id="6", attempt=3)
    run.write_status(ended)
    (tmp_path / "refusal").write_text("sbatch: error: Batch job submission failed: Job violates accounting\n")
    with pytest.raises(Refused, match="SLURM refused t: Batch job submission failed: Job violates"):
        submit(job(run), SlurmExecutor(Site()))
    assert run.read_status() == ended
    (tmp_path / "refusal").unlink()
    submit(job(run), SlurmExecutor(Site()))
    assert (run.read_status().state, run.read_status().attempt) == (State.PENDING, 3)


def test_a_wrapper_of_sbatch_may_say_more_than_the_id(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "wrapper").write_text("This job will be charged to vision (7 of 12 hours left).\n")
    assert submit(job(run), SlurmExecutor(Site())).id == "8"


def test_a_run_whose_damaged_status_was_removed_has_all_its_tries(run: RunFolder) -> None:
    for attempt in (1, 2, 3):
        add_restart(run, Restart(attempt=attempt, cause=Cause.CRASH, message="boom"))
    (run.path / "status.json").write_text("{")
    with pytest.raises(UserError, match=r"is damaged: .* remove that file and give the command that started"):
        submit(job(run), SlurmExecutor(Site()))
    (run.path / "status.json").unlink()
    submit(job(run), SlurmExecutor(Site()))
    status = run.read_status()
    assert (status.attempt, status.first_attempt) == (3, 3)
    assert spent(read_restarts(run), job(run), since=status.first_attempt) is None


def test_what_slurm_could_never_run_is_told_with_what_was_asked_for(run: RunFolder, tmp_path: Path) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in run.path.iterdir())
    (tmp_path / "impossible").write_text("sbatch: error: Requested node configuration is not available\n")
    with pytest.raises(UserError, match=r"not available; see `sinfo` .*asked for was .*--nodes=1"):
        submit(job(run), SlurmExecutor(Site()))
    assert "#SBATCH --nodes=1" in (tmp_path / "tested").read_text()
    assert sorted((path.name, path.stat().st_mtime_ns) for path in run.path.iterdir()) == before


@pytest.mark.usefixtures("run")
def test_who_waits_for_a_run_goes_on_waiting_when_the_controller_is_down(tmp_path: Path) -> None:
    (tmp_path / "down").touch()
    run = going(tmp_path / "runs", 10)
    assert settled_status(run).state is State.UNKNOWN
    assert not SlurmHandle(run).state().ended
    assert run.read_status().state is State.RUNNING  # "unknown" is written nowhere
    with pytest.raises(AlreadyRunning, match=r"may be going on, on slurm as 10: r10 is unknown since"):
        submit(job(run), SlurmExecutor(Site()))
