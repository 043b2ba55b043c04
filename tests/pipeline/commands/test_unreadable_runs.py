"""One run that cannot be read is one line of `submit status`, and hides no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
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


def test_names_and_words_of_a_run_are_no_markup_and_move_no_cursor(runs: Path) -> None:
    RunFolder.create(runs / "[bold]").write_status(GOOD)
    (runs / "bad" / "status.json").write_bytes(text(state="pending", launcher=None, reason="\x1b[2J[/red]"))
    shown = submit("status", "--folder", runs)
    assert shown.exit_code == 0
    assert "[bold]" in shown.stdout
    assert "\x1b" not in shown.stdout
