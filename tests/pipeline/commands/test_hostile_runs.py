"""Run folders that others have made: looking at them does nothing, and going on with them is refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from cluster.host import Process
from cluster.job import Job, Resources, import_function
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from ingest.crawl.part import CRAWL_RANK
from pipeline.cli import app
from pipeline.commands.pretrain import RESUMABLE


def submit(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="submit")


def make_status(**changes: Any) -> Status:
    values: dict[str, Any] = {
        "state": "running",
        "name": "x",
        "executor": "local",
        "id": "7",
        "ranks": 1,
        "attempt": 1,
        "submitted": 1.0,
    }
    return Status(**(values | changes))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs, with one whose every file would have something done; SLURM knows no job."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("RAY_ADDRESS", "SUBMIT_CLUSTER", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (
        ("squeue", ""),
        ("sacct", ""),
        ("scontrol", "echo 'Slurmctld(primary) at control is UP'"),
        ("scancel", f"touch {tmp_path}/done-scancel"),
        ("sbatch", f"touch {tmp_path}/done-sbatch"),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    run = RunFolder.create(tmp_path / "runs" / "theirs")
    run.write_status(make_status())
    run.log(0).write_text("a log\n")
    job = {"command": ["touch", f"{tmp_path}/done-job"]}
    (run.path / "job.json").write_text(
        Job(
            name="x", function="subprocess:run", arguments=job, resources=Resources(), folder=run.path
        ).to_json()
    )
    site = {"notify": {"command": ["touch", f"{tmp_path}/done-notify"]}, "ray_address": "127.0.0.1:1"}
    (run.path / "site.yaml").write_text(yaml.safe_dump(site))
    (run.path / "recipe.yaml").write_text("{}")
    return tmp_path / "runs"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Somebody who waits to be joined."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)  # who has joined is in its queue already
        yield server


def never_asked(listener: socket.socket) -> bool:
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return True
    return False


def everything(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    paths = [folder, *sorted(folder.rglob("*"))]
    return {
        str(path): (
            path.stat().st_mtime_ns,
            path.stat().st_mode,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in paths
    }


def ray_record(run: Path, address: str, *, own: bool) -> None:
    record = {"address": address, "cluster": address, "own": own, "directory": "/"}
    (run / "ray.json").write_text(json.dumps(record))


LOOKS = (["status"], ["status", "theirs"], ["status", "--json"], ["logs", "theirs"], ["list"])


@pytest.mark.parametrize("executor", ["local", "slurm", "ray", "a Ray of its own"])
def test_S1_a_look_runs_nothing_writes_nothing_and_joins_nothing(
    runs: Path, executor: str, listener: socket.socket
) -> None:
    run = RunFolder(runs / "theirs")
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    ray_record(run.path, address, own=executor == "a Ray of its own")
    launcher = Process(host=socket.gethostname(), pid=1, started="0@long-ago")
    name = executor if executor in ("local", "slurm") else "ray"
    run.write_status(make_status(executor=name, launcher=launcher if executor == "local" else None))
    before = everything(runs)
    for words in LOOKS:
        told = submit(*words, "--folder", runs)
        assert told.exit_code == 0, (words, told.output, told.exception)
    assert everything(runs) == before
    assert never_asked(listener)
    assert not [*runs.parent.glob("done-*")]
    state = json.loads(submit("status", "--folder", runs, "--json").stdout)[0]["state"]
    assert state == ("unknown" if executor == "ray" else "failed")


def test_a_look_joins_the_ray_that_the_user_names_and_no_other(
    runs: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.ray import connect

    joined = []
    monkeypatch.setattr(connect, "join", lambda address, namespace: joined.append(address) or 1 / 0)
    run = RunFolder(runs / "theirs")
    run.write_status(make_status(executor="ray"))
    ray_record(run.path, f"127.0.0.1:{listener.getsockname()[1]}", own=False)
    monkeypatch.setenv("RAY_ADDRESS", "mine:1")
    submit("status", "--folder", runs)
    monkeypatch.delenv("RAY_ADDRESS")
    (runs.parent / "mine.yaml").write_text("ray_address: mine:2\n")
    monkeypatch.setenv("SUBMIT_CLUSTER", str(runs.parent / "mine.yaml"))
    submit("status", "--folder", runs)
    assert joined == ["mine:1", "mine:2"]


@pytest.mark.parametrize(
    ("executor", "name"),
    [
        ("local", "status.json"),
        ("slurm", "slurm-job"),
        ("slurm", "job.json"),
        ("ray", "site.yaml"),
        ("ray", "ray.json"),
    ],
)
def test_S1_a_run_that_others_may_write_is_neither_gone_on_with_nor_cancelled(
    runs: Path, executor: str, name: str, listener: socket.socket
) -> None:
    run = RunFolder(runs / "theirs")
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        launcher = Process(host=socket.gethostname(), pid=sleeper.pid, started=str(started_of(sleeper.pid)))
        run.write_status(make_status(executor=executor, launcher=launcher))
        (run.path / "slurm-job").write_text("7\n")
        ray_record(run.path, f"127.0.0.1:{listener.getsockname()[1]}", own=False)
        (run.path / name).chmod(0o666)
        for words in ["resume"], ["cancel"]:
            told = submit(*words, run.path)
            assert told.exit_code == 2, told.output
            assert f"{run.path / name} may be written by everybody" in told.stderr
        assert not [*runs.parent.glob("done-*")]
        assert never_asked(listener)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def started_of(pid: int) -> str | None:
    from cluster.host import _start_time

    return _start_time(pid)


@pytest.mark.parametrize(
    "function",
    ["subprocess:run", "os:system", "cluster.map.on_slurm:task_rank", "cluster.slurm.command:call"],
)
@pytest.mark.parametrize("trust", [[], ["--trust"]])
def test_S1_job_json_names_no_function_but_those_that_the_product_submits(
    runs: Path, function: str, trust: list[str]
) -> None:
    run = RunFolder(runs / "theirs")
    run.write_status(make_status(state="preempted"))
    text = (run.path / "job.json").read_text()
    (run.path / "job.json").write_text(text.replace("subprocess:run", function))
    before = everything(runs)
    told = submit("resume", run.path, *trust)
    assert told.exit_code == 2, told.output
    assert f"names {function}, which is no job that goes on where it was stopped" in told.stderr
    assert everything(runs) == before
    assert not [*runs.parent.glob("done-*")]


def test_S1_a_job_of_another_folder_writes_nothing_there(runs: Path) -> None:
    run, mine = RunFolder(runs / "theirs"), RunFolder.create(runs / "mine")
    mine.write_status(make_status(state="completed"))
    run.write_status(make_status(state="preempted"))
    job = json.loads((run.path / "job.json").read_text())
    (run.path / "job.json").write_text(json.dumps(job | {"function": RESUMABLE[0], "folder": str(mine.path)}))
    before = everything(runs)
    told = submit("resume", run.path)
    assert told.exit_code == 2, told.output
    assert f"is of the run in {mine.path}" in told.stderr
    assert everything(runs) == before


def test_S1_the_folder_that_is_named_is_the_run_whatever_its_job_says(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.commands import pretrain

    started: list[Job] = []
    monkeypatch.setattr(pretrain, "launch", lambda job, *_, **__: started.append(job))
    run, mine = RunFolder(runs / "theirs"), RunFolder.create(runs / "mine")
    run.write_status(make_status(state="preempted"))
    job = json.loads((run.path / "job.json").read_text())
    theirs = {"function": RESUMABLE[0], "folder": str(mine.path), "arguments": {"folder": str(mine.path)}}
    (run.path / "job.json").write_text(json.dumps(job | theirs))
    (runs / "latest").symlink_to(run.path)  # which may lead to another run by the time that the job starts
    for named in (run.path, runs / "latest"):
        assert submit("resume", named).exit_code == 0
    assert [(job.folder, job.arguments["folder"]) for job in started] == [(run.path, str(run.path))] * 2


@pytest.mark.slow  # imports torch
def test_the_jobs_that_can_be_gone_on_with_are_there() -> None:
    assert CRAWL_RANK in RESUMABLE
    assert all(callable(import_function(name)) for name in RESUMABLE)


@pytest.mark.parametrize("words", [["export", "RUN", "out"], ["evaluate", "RUN"]])
def test_S1_a_checkpoint_that_others_may_write_is_not_opened(runs: Path, words: list[str]) -> None:
    checkpoint = runs / "theirs" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint / ".metadata").chmod(0o666)
    places = [runs / "theirs", *([checkpoint] if words[0] == "export" else [])]
    for place in places:
        told = submit(*(str(place) if word == "RUN" else word for word in words))
        assert told.exit_code == 2, told.output
        assert f"{checkpoint / '.metadata'} may be written by everybody" in told.stderr


def test_S1_nothing_is_put_on_a_timetable_where_others_may_write(runs: Path) -> None:
    (runs / "schedules").mkdir()
    (runs / "schedules").chmod(0o777)
    words = ["schedule", "evals", "--run", "theirs", "--every", "0 2 * * *", "--folder", runs]
    told = submit(*words)
    assert told.exit_code == 2
    assert f"{runs / 'schedules'} may be written by everybody" in told.stderr
    assert not [*runs.parent.glob("done-*")]


@pytest.mark.parametrize("row", [{}, {"step": "x", "loss": 1}, {"step": 1, "loss": "<b>"}, {"step": 10**400}])
def test_a_damaged_metric_ends_a_comparison_in_a_sentence(runs: Path, row: dict[str, Any]) -> None:
    from cluster.typed_yaml import load_recipe
    from pipeline.recipe.pretrain import PretrainRecipe

    recipe = load_recipe(PretrainRecipe, "demo", kind="pretrain")
    for name in ("theirs", "other"):
        (runs / name).mkdir(exist_ok=True)
        (runs / name / "status.json").write_text(json.dumps(asdict(make_status())))
        (runs / name / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        (runs / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    told = submit("compare", runs / "theirs", runs / "other", "--out", runs.parent / "page.html")
    assert told.exit_code == 2, (told.output, told.exception)
    assert len(told.stderr.splitlines()) == 1
    good = {"step": 1, "loss": 1.0, "rankme": -1, "knn": 10**400, "embedding_std": float("nan")}
    for name in ("theirs", "other"):
        (runs / name / "metrics.jsonl").write_text(json.dumps(good) + "\n")
    told = submit("compare", runs / "theirs", runs / "other", "--out", runs.parent / "page.html")
    assert told.exit_code == 0, (told.output, told.exception)
