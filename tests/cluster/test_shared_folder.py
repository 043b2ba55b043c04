"""What another machine has written, and this one does not see yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import shared_folder
from cluster.shared_folder import appears


def test_a_file_is_looked_for_in_a_folder_that_is_listed_anew_until_it_is_there_or_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "receipt.json"
    before = tmp_path.stat().st_mtime_ns
    monkeypatch.setattr(shared_folder, "PATIENCE", 60.0)
    monkeypatch.setattr("time.sleep", lambda seconds: written.touch())
    assert appears(written)
    assert tmp_path.stat().st_mtime_ns > before
    assert [path.name for path in tmp_path.iterdir()] == ["receipt.json"]
    monkeypatch.setattr(shared_folder, "PATIENCE", 0.0)
    assert not appears(tmp_path / "another")
    assert not appears(tmp_path / "gone" / "another")
