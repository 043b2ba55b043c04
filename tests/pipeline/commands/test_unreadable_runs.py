"""One run that cannot be read is one line of `submit status`, and hides no other."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from pipeline.cli import app

GOOD = Status(
    state=State.COMPLETED, name="x", executor="local", id="local-1", ranks=1, attempt=1, submitted=1.0
)


def text(**changes: Any) -> bytes:
    return json.dumps(asdict(GOOD) | changes).encode()


def becomes_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, bytes | Callable[[Path], None]] = {
    "empty": b"",
    "cut off": text()[:40],
    "binary": b"\xff\xfe\x00",
    "nested without end": b"[" * 100_000,
    "no mapping": b"[1, 2]",
    "null": b"null",
    "nothing in it": b"{}",
    "a key is gone": text().replace(b'"ranks": 1, ', b""),
    "unknown state": text(state="paused"),
    "unknown executor": text(executor="moon"),
    "a number is a word": text(attempt="many"),
    "a failure is a list": text(failure=[1]),
    "a launcher without a host": text(launcher={"pid": 1}),
    "a folder": becomes_a_folder,
}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs, one of them to be damaged."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("a", "bad", "c"):
        RunFolder.create(tmp_path / name).write_status(GOOD)
    return tmp_path


def submit(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="submit")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_status_is_one_line(runs: Path, damage: str) -> None:
    path, done = runs / "bad" / "status.json", DAMAGES[damage]
    if callable(done):
        done(path)
    else:
        path.write_bytes(done)
    shown = submit("status", "--folder", runs)
    assert shown.exit_code == 0, shown.output
    rows = [row.split()[:2] for row in shown.stdout.splitlines()[1:]]
    assert rows == [["a", "completed"], ["bad", "unreadable"], ["c", "completed"]]
    (told,) = shown.stderr.splitlines()
    assert told.startswith(f"bad: {path} ")
    states = [run["state"] for run in json.loads(submit("status", "--folder", runs, "--json").stdout)]
    assert states == ["completed", "unreadable", "completed"]


@pytest.mark.parametrize("name", ["progress.json", "restarts.jsonl", "checkpoints/latest", "cancelled"])
def test_damage_elsewhere_in_the_folder_ends_nothing(runs: Path, name: str) -> None:
    path = runs / "bad" / name
    path.parent.mkdir(exist_ok=True)
    for damage in (b"\xff\xfe", b"[]\n", b'{"x": 1}\n'):
        path.write_bytes(damage)
        assert submit("status", "--folder", runs).exit_code == 0
    path.unlink()
    path.mkdir()
    assert submit("status", "--folder", runs).exit_code == 0


def test_what_later_code_writes_besides_is_ignored(runs: Path) -> None:
    (runs / "bad" / "status.json").write_bytes(text(spare_nodes=2, launcher=None))
    assert "unreadable" not in submit("status", "--folder", runs).stdout


def test_the_remedy_of_a_damaged_status_works(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is removed, and the run can be submitted again."""
    from cluster.job import Job, Resources
    from cluster.local import LocalExecutor
    from cluster.submit import submit as start

    run = RunFolder(runs / "bad")
    (run.path / "status.json").write_bytes(b"{")
    assert "remove that file" in submit("cancel", run.path).stderr
    (run.path / "status.json").unlink()
    job = Job(name="t", function="os:getcwd", arguments={}, resources=Resources(), folder=run.path)
    assert start(job, LocalExecutor()).wait() is State.COMPLETED


def test_a_state_that_nobody_tells_is_shown_with_the_reason(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = runs / "bad" / "status.json"
    path.write_bytes(text(state="running", executor="slurm", id="7"))
    os.utime(path, (0, 0))
    monkeypatch.setenv("PATH", str(runs))
    words = f"unknown since {time.strftime('%Y-%m-%d %H:%M', time.localtime(0))}: there is no SLURM on this"
    assert words in submit("status", "--folder", runs).stdout
    told = submit("status", "bad", "--folder", runs, "--state", "unknown").stdout
    assert told.splitlines()[-1].startswith(f"x is {words}")


def test_names_and_words_of_a_run_are_no_markup_and_move_no_cursor(runs: Path) -> None:
    RunFolder.create(runs / "[bold]").write_status(GOOD)
    RunFolder.create(runs / "two\nlines\x1b[2J").write_status(GOOD)
    hostile = "\x1b[2J[/red]"
    (runs / "bad" / "status.json").write_bytes(
        text(state="pending", launcher=None, reason=hostile, nodes=hostile)
    )
    restart = {"attempt": 1, "cause": "crash", "message": hostile, "node": hostile, "time": 1e300}
    (runs / "bad" / "restarts.jsonl").write_text(json.dumps(restart | {"checkpoint": hostile}) + "\n")
    latest = {"step": 1, "total_steps": 2, "warnings": [hostile]}
    (runs / "bad" / "progress.json").write_text(json.dumps(latest))
    shown = submit("status", "--folder", runs)
    assert shown.exit_code == 0
    assert "[bold]" in shown.stdout
    for words in (["status"], ["status", "bad"], ["list"]):
        told = submit(*words, "--folder", runs)
        assert told.exit_code == 0, told.exception
        assert "\x1b" not in told.output
    assert len(submit("list", "--folder", runs).stdout.splitlines()) == 5


def test_a_log_does_not_steer_a_terminal(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = "step 1\t\u2588 99 %\r\x1b]0;title\x07\x1b[2J\x9b31m\u202eend\n"
    RunFolder(runs / "a").log(0).write_bytes(log.encode())
    monkeypatch.setattr(
        "pipeline.commands.runs.sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True))
    )
    shown = submit("logs", "a", "--folder", runs).stdout_bytes.decode()
    assert "step 1\t\u2588 99 %" in shown
    assert shown.endswith("\\x1b]0;title\\x07\\x1b[2J\\x9b31m\\u202eend\n")


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "name", ["status.json", "progress.json", "restarts.jsonl", "lock", "logs/rank-0.log"]
)
def test_a_pipe_in_the_folder_keeps_nobody_waiting(runs: Path, name: str) -> None:
    ended = {"state": "failed", "failure": {"rank": 0, "type": "X", "message": "y"}}
    (runs / "bad" / "status.json").write_bytes(text(**ended))
    (runs / "bad" / name).unlink(missing_ok=True)
    os.mkfifo(runs / "bad" / name)
    shown = submit("status", "--folder", runs)
    assert shown.exit_code == 0
    assert [row.split()[0] for row in shown.stdout.splitlines()[1:]] == ["a", "bad", "c"]


def test_a_file_without_end_takes_no_memory(runs: Path) -> None:
    for name in ("status.json", "restarts.jsonl"):
        with (runs / "bad" / name).open("wb") as file:
            file.truncate(1 << 40)
        told = submit("status", "--folder", runs)
        assert told.exit_code == 0
        assert "it has more than" in told.stderr
        (runs / "bad" / "status.json").write_bytes(text())


def test_a_number_that_cannot_be_counted_with_is_one_line(runs: Path) -> None:
    going = {"state": "running", "executor": "slurm", "id": "7", "gpus": 10**400, "started": 1.0}
    (runs / "bad" / "status.json").write_bytes(text(**going))
    rows = [row.split()[:2] for row in submit("status", "--folder", runs).stdout.splitlines()[1:]]
    assert rows == [["a", "completed"], ["bad", "unreadable"], ["c", "completed"]]
