"""Small files of folders that anybody may have made; and folders that only their user enters."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.host import private_folder
from cluster.small_file import read_small


def test_only_a_regular_file_of_a_bounded_size_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_small(path, most=5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_small(path, most=4)
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(OSError, match="no regular file"):
            read_small(tmp_path / name)
    with pytest.raises(OSError, match="no regular file"):
        read_small(Path("/dev/zero"))


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_secrets_are_their_owner_s_and_all_else_follows_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "secret", "x", private=True)
        write_atomically(tmp_path / "result", "x")
        (tmp_path / "open").write_text("x")
        (tmp_path / "open").chmod(0o666)
        write_atomically(tmp_path / "open", "x", private=True)  # in place of one that all may read
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"secret": 0o600, "open": 0o600, "result": 0o666 & ~mask}


def test_S1_a_link_that_somebody_laid_is_not_written_through(tmp_path: Path) -> None:
    import socket

    (tmp_path / "mine").write_text("precious")
    (tmp_path / f".x.{socket.gethostname()}.{os.getpid()}").symlink_to(tmp_path / "mine")
    write_atomically(tmp_path / "x", "new")
    assert (tmp_path / "mine").read_text() == "precious"
    assert (tmp_path / "x").read_text() == "new"
    assert not (tmp_path / "x").is_symlink()


def test_a_private_folder_is_refused_where_somebody_was_before(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = private_folder(tmp_path / "made")
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == 0o700
    assert private_folder(made) == made
    (tmp_path / "open").mkdir()
    (tmp_path / "link").symlink_to(made)
    (tmp_path / "file").touch()
    for name in ("open", "link", "file"):
        with pytest.raises(UserError, match="is to be a folder that only you can enter"):
            private_folder(tmp_path / name)
