"""What is known of a run on SLURM when nobody could write it down. SLURM's commands are scripts."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import AlreadyRunning, Refused, UserError
from cluster.executors import cancel, status_of
from cluster.job import Job, Resources, State
from cluster.run.folder import RunFolder
from cluster.run.restarts import Cause, Restart, add_restart, read_restarts, spent
from cluster.run.status import Status
from cluster.site import Site
from cluster.slurm import state as slurm_state
from cluster.slurm import status as slurm_status
from cluster.slurm.executor import SlurmExecutor, SlurmHandle
from cluster.slurm.status import current_status, settled_status
from cluster.submit import submit

SQUEUE = """#!/bin/sh
cat "$ANSWERS/queue"
"""
SCONTROL = """#!/bin/sh
[ -f "$ANSWERS/$4" ] && { cat "$ANSWERS/$4"; exit 0; }
echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1
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
        ("sacct", "#!/bin/sh\n"),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("ANSWERS", str(tmp_path))
    (tmp_path / "queue").write_text("")
    run = RunFolder.create(tmp_path / "run")
    run.write_job(job(run))
    run.write_status(
        Status(state=State.PENDING, name="t", executor="slurm", id="", ranks=1, attempt=0, submitted=1.0)
    )
    return run


def job(run: RunFolder) -> Job:
    return Job(name="t", function="a:b", arguments={}, resources=Resources(), folder=run.path)


def test_a_job_whose_id_nobody_wrote_down_is_found_by_its_name(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "queue").write_text("7\n")
    (tmp_path / "7").write_text("JobId=7 JobState=RUNNING NodeList=n0\n")
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
    (tmp_path / "6").write_text("JobId=6 JobState=NODE_FAIL NodeList=n0\n")
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

    def find_state(job_id: str) -> slurm_state.Seen | None:
        run.write_status(again)
        return None if job_id == "6" else slurm_state.Seen(state=State.PENDING, word="PENDING")

    monkeypatch.setattr(slurm_status, "find_state", find_state)
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
