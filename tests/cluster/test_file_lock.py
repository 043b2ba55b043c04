"""Locks on files, and file systems that know none."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.errors import AlreadyRunning, UserError
from cluster.file_lock import lock_file
from cluster.preflight.exclusions import readmit
from cluster.ray.rank_worker import share_lock
from cluster.run.folder import RunFolder
from tests.without_locks import know_no_locks


def test_a_lock_is_had_by_one_or_shared_by_many_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("a+") as one, path.open("a+") as other:
        assert lock_file(one, path) and not lock_file(other, path) and not lock_file(other, path, shared=True)
        assert lock_file(one, path, shared=True) and lock_file(other, path, shared=True)
        assert not lock_file(one, path)
        one.close()
        assert lock_file(other, path)


# A launcher whose record is left as that of one that was killed.
LEAVE = """
import sys
from pathlib import Path
import pytest
from cluster.run.folder import RunFolder
from tests.without_locks import know_no_locks
folder = Path(sys.argv[1])
know_no_locks(pytest.MonkeyPatch(), folder)
lock = RunFolder(folder).lock(patience=0)
print((folder / "lock.held").read_text())
"""


def wait_until_gone(path: Path) -> None:
    deadline = time.monotonic() + 10
    while path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def without(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on a file system that knows no locks."""
    there = tmp_path / "without"
    there.mkdir()
    know_no_locks(monkeypatch, there, request.param)
    return there


def test_a_file_system_without_locks_has_another(without: Path) -> None:
    """It is inherited as the kernel's is: a rank holds it on when its launcher dies."""
    run = RunFolder(without)
    lock = run.lock(patience=0)
    with pytest.raises(AlreadyRunning, match="is going on already; `submit cancel"):
        run.lock(patience=0)
    rank = subprocess.Popen(["sleep", "60"], pass_fds=(lock.fileno(),))
    lock.close()
    with pytest.raises(AlreadyRunning):
        run.lock(patience=0.2)
    rank.kill()
    rank.wait()
    with run.lock(patience=10):
        assert (without / "lock.held").exists()
    for _ in range(2):  # waits for the first to be given back
        with pytest.raises(UserError, match="node1 is not excluded"):
            readmit(without, "node1")


def test_a_record_that_was_left_behind_is_taken_over_on_its_own_machine_only(without: Path) -> None:
    run, record = RunFolder(without), without / "lock.held"
    words = [sys.executable, "-c", LEAVE, str(without)]
    root = Path(__file__).parents[2]
    left = subprocess.run(words, check=True, capture_output=True, text=True, cwd=root).stdout
    assert json.loads(left)["host"] == socket.gethostname()
    for told in ({}, {"boot": "another", "lock": "gone 1"}):  # killed with its keeper; or with the machine
        record.write_text(json.dumps(json.loads(left) | told))
        run.lock(patience=5).close()
    wait_until_gone(record)
    for other, words in (
        ({"lock": "/another/tmp 1"}, f"; if nothing of it is left on this machine, remove {record}; `submit"),
        ({"host": "node7"}, f" on node7; if that machine is gone, remove {record}; `submit"),
    ):
        record.write_text(json.dumps(json.loads(left) | other))
        with pytest.raises(AlreadyRunning, match=f"is going on already{words}"):
            run.lock(patience=0)
    for text in ("", "[1]", '{"host": 1}', "x" * 10_000):  # by one that is just writing it; or not by us
        record.write_text(text)
        with pytest.raises(AlreadyRunning, match=f"; if {record} stays without a machine's name"):
            run.lock(patience=0)
    record.write_text(json.dumps(json.loads(left) | {"host": "\x1b[31mnode7"}))
    with pytest.raises(AlreadyRunning) as told:
        run.lock(patience=0)
    assert "\x1b" not in str(told.value)
    assert run.is_held()  # for all that one can tell


def test_a_lock_that_is_shared_is_the_kernels_or_none(without: Path) -> None:
    told = rf"^the file system of {re.escape(str(without))} knows no locks \(.*\): use a folder on one that"
    with pytest.raises(UserError, match=told):
        share_lock(RunFolder(without))
    with pytest.raises(UserError, match=told):
        RunFolder(without).lock(patience=0, of_kernel=True)


def test_a_disk_that_is_full_leaves_no_lock_that_nobody_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know_no_locks(monkeypatch, tmp_path)

    def full(descriptor: int, mode: str) -> None:
        os.close(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as context:
        context.setattr(os, "fdopen", full)
        with pytest.raises(OSError, match="No space left"):
            RunFolder(tmp_path).lock(patience=0)
    RunFolder(tmp_path).lock(patience=0).close()


def test_a_keeper_is_at_its_place_before_the_lock_is_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who ends at once, with all that it has begun, leaves no record: it has given the lock back before."""
    monkeypatch.setattr("cluster.file_lock._KEEPER", "import time; time.sleep(0.5)")
    know_no_locks(monkeypatch, tmp_path)
    begun = time.monotonic()
    RunFolder(tmp_path).lock(patience=0).close()
    assert time.monotonic() - begun > 0.4
