"""Run folders that cannot be written are one sentence, whichever command writes there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from typer.testing import CliRunner, Result

from cluster.host import Process
from cluster.job import Job, Resources, State
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from pipeline.cli import app
from pipeline.commands.pretrain import RESUMABLE
from tests.full_disk import files_end_at


def make_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that goes on, and one that was stopped."""
    site = folder / "site.yaml"
    site.write_text("executor: local\n")
    monkeypatch.setenv("SUBMIT_CLUSTER", str(site))
    status = Status(
        state=State.RUNNING,
        name="x",
        executor="local",
        id="local-1",
        ranks=1,
        attempt=1,
        submitted=1.0,
        launcher=Process.current(),
    )
    RunFolder.create(folder / "runs" / "goes-on").write_status(status)
    stopped = RunFolder.create(folder / "runs" / "stopped")
    stopped.write_status(status.stopped(State.PREEMPTED))
    stopped.write_job(
        Job(name="x", function=RESUMABLE[0], arguments={}, resources=Resources(), folder=stopped.path)
    )
    return folder / "runs"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_runs(tmp_path, monkeypatch)


@pytest.fixture
def readable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same where this user may only read."""
    with TemporaryDirectory() as folder:  # nobody else may come near the folders of tests
        found = make_runs(Path(folder), monkeypatch)
        (found / "goes-on" / "logs" / "rank-0.log").write_text("step 1/6\n")
        folders, user = [Path(folder), *found.glob("**/")], os.geteuid()
        for each in folders:
            each.chmod(0o555)
        os.seteuid(65534 if user == 0 else user)  # root may do everything
        try:
            yield found
        finally:
            os.seteuid(user)
            for each in folders:
                each.chmod(0o755)


def submit(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="submit")


@pytest.mark.parametrize("words", [("cancel", "goes-on"), ("resume", "stopped"), ("preflight",)])
def test_a_full_disk_is_one_sentence(runs: Path, words: tuple[str, ...]) -> None:
    with files_end_at(0):
        done = submit(*words, "--folder", runs)
    assert done.exit_code == 2, done.output
    (told,) = done.stderr.splitlines()
    assert told.startswith(f"submit: cannot write {runs}/")
    assert told.endswith("file too large; mend that, then run the same command again")


@pytest.mark.parametrize("words", [("cancel", "goes-on"), ("resume", "stopped"), ("preflight",)])
def test_what_may_only_be_read_is_not_changed_in_one_sentence(readable: Path, words: tuple[str, ...]) -> None:
    done = submit(*words, "--folder", readable)
    assert done.exit_code == 2, done.output
    assert re.fullmatch(
        rf"submit: cannot read or write {readable}/\S+: permission denied; mend that, .*\n", done.stderr
    )


@pytest.mark.parametrize("words", [("status",), ("status", "stopped"), ("logs", "goes-on"), ("list",)])
def test_what_may_only_be_read_is_looked_at(readable: Path, words: tuple[str, ...]) -> None:
    done = submit(*words, "--folder", readable)
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    assert re.search("goes-on|stopped|step 1/6", done.stdout)


@pytest.mark.parametrize("words", [("preflight",), ("preflight", "--readmit", "node1")])
def test_a_file_where_a_folder_must_be_is_named(runs: Path, words: tuple[str, ...]) -> None:
    (runs / "file").touch()
    done = submit(*words, "--folder", runs / "file" / "below")
    assert done.exit_code == 2, done.output
    (told,) = done.stderr.splitlines()
    assert str(runs / "file") in told
    assert told.endswith("not a directory; mend that, then run the same command again")
