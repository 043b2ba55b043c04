"""Where ranks of one machine meet, if the run's file system knows no locks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from cluster.rank.torch_dist import _store_on_this_machine
from tests.without_locks import know_no_locks


def test_the_file_is_on_a_disk_of_the_machine_where_the_runs_own_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, own = tmp_path / "run", tmp_path / "own"
    run.mkdir()
    own.mkdir()
    monkeypatch.setenv("SUBMIT_STORE", str(run / "store.0"))
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    assert Path(_store_on_this_machine(1, None).path) == run / "store.0"
    know_no_locks(monkeypatch, run)
    first, second = (_store_on_this_machine(1, None).path for _ in range(2))
    assert first == second  # all ranks find it
    assert Path(first).is_relative_to(own)
    monkeypatch.setenv("MASTER_PORT", "20001")  # of another start
    assert _store_on_this_machine(1, None).path != first
