"""Locks on files, and file systems that know none."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.file_lock import lock_file
from cluster.preflight.exclusions import readmit
from cluster.ray.rank_worker import share_lock
from cluster.run.folder import RunFolder


def test_a_lock_is_had_by_one_or_shared_by_many_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("a+") as one, path.open("a+") as other:
        assert lock_file(one, path) and not lock_file(other, path) and not lock_file(other, path, shared=True)
        assert lock_file(one, path, shared=True) and lock_file(other, path, shared=True)
        assert not lock_file(one, path)
        one.close()
        assert lock_file(other, path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize(
    "lock",
    [
        lambda folder: RunFolder(folder).lock(patience=0),
        lambda folder: share_lock(RunFolder(folder)),
        lambda folder: readmit(folder, "node1"),
    ],
)
def test_a_file_system_without_locks_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, lock: Callable[[Path], object]
) -> None:
    (tmp_path / "lock").touch()

    def refuse(file: object, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    told = rf"^the file system of {re.escape(str(tmp_path))} knows no locks \(.*\): use a folder on one that"
    with pytest.raises(UserError, match=told):
        lock(tmp_path)
    assert RunFolder(tmp_path).is_held()  # for all that one can tell
