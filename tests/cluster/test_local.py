"""The local executor: ranks as processes, their errors, signals and deaths."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.errors import UserError
from cluster.job import Job, Resources, State
from cluster.local import LocalExecutor
from cluster.run.folder import RunFolder
from cluster.run.status import Status, explain, raise_unless_completed
from cluster.submit import submit
from cluster.typed_json import parse_record

RANK_FUNCTIONS = """
import json, os, resource, signal, subprocess, sys, time
from pathlib import Path
from cluster.errors import UserError
from cluster.rank.preempt import Preempted, PreemptionFlag
from cluster.run.folder import RunFolder

RANK = int(os.environ["RANK"])

def save_environment(folder):
    Path(folder, f"env-{RANK}.json").write_text(
        json.dumps({**os.environ, "PWD": os.getcwd(), "FILES": resource.getrlimit(resource.RLIMIT_NOFILE)})
    )
    print(f"hello from {RANK}")

def fail_on_rank_1(how):
    if RANK == 1:
        if how == "user_error":
            raise UserError("data.root is empty: crawl something into it")
        if how == "denied":
            raise PermissionError(13, "get is not permitted (AccessDenied)", "s3://bucket/tar")
        if how == "exception":
            raise ValueError("boom")
        if how == "exit":
            os._exit(7)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)

def work_until_asked_to_stop(folder):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with PreemptionFlag(RunFolder(Path(folder))) as flag:
        Path(folder, f"ready-{RANK}").write_text(f"{os.getpid()} {child.pid}")
        while not flag.requested:
            time.sleep(0.01)
    raise Preempted("saved")

def reduce_and_list_ports(folder):
    import psutil, torch
    from cluster.rank.torch_dist import distributed
    with distributed("cpu") as world:
        total = torch.tensor([world.rank + 1.0])
        torch.distributed.all_reduce(total)
        gathered = world.gather(world.rank)
        here = [each for each in psutil.Process().net_connections("inet") if each.status == "LISTEN"]
    seen = {"total": total.item(), "gathered": gathered, "open": [each.laddr.ip for each in here]}
    Path(folder, f"seen-{RANK}.json").write_text(json.dumps(seen))

def fail_when_done(folder):
    if RANK == 0:
        RunFolder(Path(folder)).mark_done()
    while not Path(folder, "done.0").exists():
        time.sleep(0.01)
    raise ValueError("too late")

def never_stop(folder):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(folder, f"ready-{RANK}").write_text(f"{os.getpid()}")
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def rank_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rank_functions.py").write_text(RANK_FUNCTIONS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def make_job(run: Path, function: str, *, ranks: int = 2, nodes: int = 1, **arguments: Any) -> Job:
    return Job(
        name="test",
        function=f"rank_functions:{function}",
        arguments=arguments,
        resources=Resources(nodes=nodes, ranks_per_node=ranks),
        folder=run,
    )


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def launch(job: Job) -> subprocess.Popen[bytes]:
    """A launcher of its own process, as on the command line."""
    code = (
        "import sys; from pathlib import Path; from cluster.job import Job;"
        "from cluster.local import LocalExecutor;"
        "from cluster.submit import submit; from cluster.typed_json import read_record;"
        "job = read_record(Job, Path(sys.argv[1]), remedy='');"
        "print(submit(job, LocalExecutor(stream=sys.stdout)).wait())"
    )
    job.folder.mkdir(parents=True, exist_ok=True)
    described = job.folder.parent / "submitted.json"
    described.write_text(job.to_json())
    return subprocess.Popen([sys.executable, "-c", code, str(described)], stdout=subprocess.PIPE)


def pids_of(folder: Path, ranks: int = 2) -> list[int]:
    files = [folder / f"ready-{rank}" for rank in range(ranks)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(pid) for file in files for pid in file.read_text().split()]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_C1_a_job_survives_its_trip_through_json(tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", "save_environment", folder="x", nested={"a": [1, 2.5, None]})
    assert parse_record(Job, job.to_json(), where="", remedy="") == job


def test_every_rank_knows_its_place_and_rank_0_is_heard(tmp_path: Path) -> None:
    stream = io.StringIO()
    begun = tmp_path / "where it was submitted first"
    begun.mkdir()
    job = replace(make_job(tmp_path / "run", "save_environment", folder=str(tmp_path)), directory=begun)
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(few, most - 1), most))
    assert submit(job, LocalExecutor(stream=stream, gpus=("3", "5"))).wait() is State.COMPLETED
    environments = [json.loads((tmp_path / f"env-{rank}.json").read_text()) for rank in range(2)]
    assert [e["RANK"] for e in environments] == ["0", "1"]
    assert {e["WORLD_SIZE"] for e in environments} == {"2"}
    assert {e["PWD"] for e in environments} == {str(begun)}
    assert [e["FILES"] for e in environments] == [[most, most]] * 2
    assert {e["CUDA_VISIBLE_DEVICES"] for e in environments} == {"3,5"}
    assert len({e["MASTER_PORT"] for e in environments}) == 1
    cores = len(os.sched_getaffinity(0))
    assert environments[0]["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", str(max(1, cores // 2)))
    assert environments[0]["MALLOC_MMAP_THRESHOLD_"] == "1073741824"
    assert environments[0]["GOMP_SPINCOUNT"] == os.environ.get("GOMP_SPINCOUNT", "1000")
    assert stream.getvalue() == "hello from 0\n"
    run = RunFolder.open(job.folder)
    assert run.tail(1) == ["hello from 1"]
    assert run.status().state is State.COMPLETED
    assert run.status().attempt == 1
    assert run.read_job() == job
    begun.rmdir()
    submit(job, LocalExecutor()).wait()
    assert run.read_job().directory == Path.cwd()


@pytest.mark.slow
def test_S1_ranks_of_one_machine_cannot_be_reached_from_another(tmp_path: Path) -> None:
    """torch's own store is a port that is open to everybody, and what ranks gather is unpickled."""
    job = make_job(tmp_path / "run", "reduce_and_list_ports", folder=str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "store.0").write_text("what an attempt before has left")
    assert submit(job, LocalExecutor()).wait() is State.COMPLETED
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert [(each["total"], each["gathered"]) for each in seen] == [(3.0, [0, 1])] * 2
    assert {address for each in seen for address in each["open"]} == {"127.0.0.1"}
    assert not [*(tmp_path / "run").glob("store.*")]


@pytest.mark.parametrize(
    ("how", "told", "raised"),
    [
        ("exception", "rank 1 of 2 failed first: ValueError: boom", RuntimeError),
        ("killed", "rank 1 of 2 failed first: Killed: killed by SIGKILL (out of memory?)", RuntimeError),
        ("exit", "rank 1 of 2 failed first: Exit: ended with status 7 without a word", RuntimeError),
        ("user_error", "data.root is empty: crawl something into it", UserError),
        (
            "denied",
            "cannot read or write s3://bucket/tar: get is not permitted (AccessDenied); mend that, then run "
            "the same command again",
            UserError,
        ),
    ],
)
def test_the_first_failing_rank_is_reported_and_the_others_end(
    tmp_path: Path, how: str, told: str, raised: type[Exception]
) -> None:
    started = time.monotonic()
    job = make_job(tmp_path / "run", "fail_on_rank_1", how=how)
    assert submit(job, LocalExecutor()).wait() is State.FAILED
    assert time.monotonic() - started < 20  # rank 0 would have slept for 60
    run = RunFolder.open(job.folder)
    assert explain(run.status()).splitlines()[0] == told
    with pytest.raises(raised, match=re.escape(told)):
        raise_unless_completed(run.status())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_signals_to_the_launcher_become_a_request_to_save(tmp_path: Path, number: signal.Signals) -> None:
    job = make_job(tmp_path / "run", "work_until_asked_to_stop", folder=str(tmp_path))
    launcher = launch(job)
    pids = pids_of(tmp_path)
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=20)
    assert output.decode().splitlines()[-1] == "preempted"
    status = RunFolder.open(job.folder).status()
    assert status.state is State.PREEMPTED
    assert "give the same command again" in explain(status)
    assert all(gone(pid) for pid in pids)  # the ranks' own children too


def test_a_killed_launcher_leaves_no_orphan_and_no_false_status(tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", "work_until_asked_to_stop", folder=str(tmp_path))
    launcher = launch(job)
    pids = pids_of(tmp_path)
    run = RunFolder.open(job.folder)
    assert run.status().state is State.RUNNING
    launcher.kill()
    launcher.wait()
    assert run.read_status().state is State.RUNNING  # what the file still says
    assert run.status().state is State.FAILED
    assert "the launcher is gone" in explain(run.status())
    wait_until(lambda: all(gone(pid) for pid in pids), seconds=5)
    again = submit(make_job(job.folder, "save_environment", folder=str(tmp_path)), LocalExecutor())
    assert again.wait() is State.COMPLETED
    assert run.status().attempt == 2


def test_a_second_ctrl_c_ends_ranks_that_do_not_listen(tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", "never_stop", folder=str(tmp_path))
    launcher = launch(job)
    pids = pids_of(tmp_path)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.2)
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=20)
    assert RunFolder.open(job.folder).status().state is State.PREEMPTED
    assert all(gone(pid) for pid in pids)


def test_cancel_ends_a_run_and_says_so(tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", "work_until_asked_to_stop", folder=str(tmp_path))
    launcher = launch(job)
    pids_of(tmp_path)
    run = RunFolder.open(job.folder)
    run.cancel()
    launcher.communicate(timeout=20)
    assert run.status().state is State.CANCELLED
    with pytest.raises(UserError, match="is not running: it is cancelled"):
        run.cancel()


def test_an_end_that_could_not_be_written_is_written_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = submit(make_job(tmp_path / "run", "save_environment", folder=str(tmp_path)), LocalExecutor())
    write = RunFolder.write_status
    tries: list[Status] = []

    def write_at_the_second_try(run: RunFolder, status: Status) -> None:
        tries.append(status)
        if len(tries) == 1:
            raise OSError(116, "Stale file handle")
        write(run, status)

    monkeypatch.setattr(RunFolder, "write_status", write_at_the_second_try)
    with pytest.raises(OSError, match="Stale"):
        handle.wait()
    assert handle.wait() is State.COMPLETED
    assert RunFolder(tmp_path / "run").read_status().state is State.COMPLETED


def test_one_run_has_one_launcher(tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", "work_until_asked_to_stop", folder=str(tmp_path))
    handle = submit(job, LocalExecutor())
    pids_of(tmp_path)
    with pytest.raises(UserError, match="is going on already"):
        submit(job, LocalExecutor())
    handle.cancel()
    assert handle.wait() is State.CANCELLED


def test_jobs_can_be_waited_for_in_a_thread(tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", "save_environment", ranks=1, folder=str(tmp_path))
    states: list[State] = []
    thread = threading.Thread(target=lambda: states.append(submit(job, LocalExecutor()).wait()))
    thread.start()
    thread.join()
    assert states == [State.COMPLETED]


def test_more_nodes_than_one_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--executor slurm or ray"):
        submit(make_job(tmp_path / "run", "save_environment", nodes=2), LocalExecutor())
    assert not (tmp_path / "run").exists()


def test_a_rank_that_fails_when_the_work_is_done_is_told_and_the_run_is_complete(tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", "fail_when_done", folder=str(tmp_path / "run"))
    assert submit(job, LocalExecutor()).wait() is State.COMPLETED
    status = RunFolder(job.folder).status()
    assert status.failure is not None
    assert status.failure.message == "too late"
