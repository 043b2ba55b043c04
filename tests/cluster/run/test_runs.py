"""Run folders: status, lists, logs."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.host import Process
from cluster.job import Job, Resources, State
from cluster.run.folder import RunFolder, list_runs
from cluster.run.status import Failure, Status


def make_status(**changes: object) -> Status:
    status = Status(
        state=State.RUNNING,
        name="mine",
        executor="local",
        id="local-1",
        ranks=2,
        attempt=1,
        submitted=1.0,
        launcher=Process.current(),
    )
    return replace(status, **changes)  # type: ignore[arg-type]


def test_a_status_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "mine")
    failure = Failure(rank=1, type="ValueError", message="boom", traceback="…", log_tail=("a", "b"))
    status = make_status(state=State.FAILED, ended=2.0, failure=failure)
    run.write_status(status)
    assert run.read_status() == status
    assert run.status() == status


def test_a_reader_never_sees_half_a_status(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "mine")
    run.write_status(make_status())
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            run.write_status(make_status(failure=Failure(rank=0, type="X", message="y" * 10_000)))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            run.read_status()
    finally:
        stop.set()
        writer.join()


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        stat = Path(f"/proc/{child.pid}/stat").read_text()
        assert stat
        here = Process.current()
        assert here.alive()
        assert not replace(here, started="1@another-boot").alive()
        assert not replace(here, pid=child.pid).alive()  # the child started later than this process
    finally:
        child.kill()
        child.wait()


def test_a_dead_launcher_elsewhere_cannot_be_judged(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "mine")
    elsewhere = Process(host="node7", pid=os.getpid(), started="1@x")
    run.write_status(make_status(launcher=elsewhere))
    assert run.status().state is State.RUNNING
    with pytest.raises(UserError, match="was started on node7"):
        run.cancel()
    run.write_status(make_status(launcher=replace(elsewhere, host=Process.current().host)))
    assert run.status().state is State.FAILED
    run.request_cancel()
    assert run.status().state is State.CANCELLED


def test_runs_are_listed_by_name(tmp_path: Path) -> None:
    for name in ("b", "a"):
        RunFolder.create(tmp_path / name).write_status(make_status(name=name))
    (tmp_path / "not-a-run").mkdir()
    assert [run.read_status().name for run in list_runs(tmp_path)] == ["a", "b"]
    assert list_runs(tmp_path / "nowhere") == []
    with pytest.raises(UserError, match="there is no run in"):
        RunFolder.open(tmp_path / "not-a-run")


@pytest.mark.slow
def test_a_log_is_followed_to_the_end_of_the_run(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "mine")
    run.write_status(make_status())
    run.log(0).write_text("first\n")
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.extend(run.follow(0, status=RunFolder.read_status)))
    reader.start()
    while not seen:
        time.sleep(0.01)
    with run.log(0).open("a") as log:
        log.write("last\n")
    run.write_status(make_status(state=State.COMPLETED))
    reader.join(timeout=10)
    assert "".join(seen) == "first\nlast\n"


def test_a_log_comes_in_pieces_however_long_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.run.folder.PIECE", 10)
    run = RunFolder.create(tmp_path / "mine")
    run.write_status(make_status(state=State.COMPLETED))
    text = "".join(f"step {step} é\n" for step in range(20))
    run.log(0).write_text(text)
    for pieces in (list(run.log_text(0)), list(run.follow(0, status=RunFolder.read_status))):
        assert "".join(pieces) == text
        assert max(map(len, pieces)) == 10


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        (None, "one\ntwo é\nthree\nhalf"),
        (1, "three\nhalf"),
        (2, "two é\nthree\nhalf"),
        (9, "one\ntwo é\nthree\nhalf"),
    ],
)
def test_the_last_lines_of_a_log_are_read_from_its_end(tmp_path: Path, lines: int | None, shown: str) -> None:
    run = RunFolder.create(tmp_path / "mine")
    run.write_status(make_status(state=State.COMPLETED))
    run.log(0).write_text("one\ntwo é\nthree\nhalf")
    assert "".join(run.log_text(0, lines=lines)) == shown
    assert "".join(run.follow(0, status=RunFolder.read_status, lines=lines)) == shown


def test_a_tail_is_a_few_lines_of_one_attempt(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "mine")
    assert run.tail(0) == []
    run.log(0).write_text("old\n" + "".join(f"{i}\n" for i in range(100)))
    assert run.tail(0, lines=2) == ["98", "99"]
    run.log(0).write_text("old\nnew\n")
    assert run.tail(0, start=4) == ["new"]


@pytest.mark.parametrize("name", ["", "a b", "../up", "-x"])
def test_a_jobs_name_is_safe_in_paths_and_commands(name: str) -> None:
    with pytest.raises(UserError, match="cannot be a job's name"):
        Job(name=name, function="a:b", arguments={}, resources=Resources(), folder=Path("x"))


def test_a_job_that_refuses_itself_is_told_with_its_file(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "mine")
    job = Job(name="mine", function="a:b", arguments={}, resources=Resources(), folder=run.path)
    (run.path / "job.json").write_text(job.to_json().replace('"mine"', '"../mine"'))
    with pytest.raises(
        UserError, match=r"job\.json is damaged: '\.\./mine' cannot be .*started the run again"
    ):
        run.read_job()


def test_an_atomic_write_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x.json", "1")
    write_atomically(tmp_path / "x.json", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "2"


def test_runs_are_listed_by_number_and_those_of_a_graph_with_them(tmp_path: Path) -> None:
    for name in ("run-10", "run-2", "demo/pretrain-1", "B"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "status.json").touch()
    found = [str(run.path.relative_to(tmp_path)) for run in list_runs(tmp_path)]
    assert found == ["B", "demo/pretrain-1", "run-2", "run-10"]


def test_a_run_is_listed_once_whatever_links_lead_to_it(tmp_path: Path) -> None:
    for name in ("run-1", "demo/train-1"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "status.json").touch()
    (tmp_path / "runs" / "all").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "a-copy").symlink_to("run-1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "status.json").touch()
    (tmp_path / "runs" / "borrowed").symlink_to(tmp_path / "elsewhere")
    found = [str(run.path.relative_to(tmp_path / "runs")) for run in list_runs(tmp_path / "runs")]
    assert found == ["borrowed", "demo/train-1", "run-1"]
