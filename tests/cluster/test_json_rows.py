"""Files of rows: whole rows from either end, and from the end without reading the rest."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis.strategies import binary, booleans, integers, lists

from cluster import json_rows
from cluster.errors import UserError
from cluster.json_rows import last_row, lines_from_end, read_rows

ROWS = [{"step": step, "loss": 1 / step, "skipped": [{"keys": [2**63, step]}]} for step in range(1, 4)]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def bytes_read() -> int:
    """By this process so far, from files and pipes."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_rows_are_as_they_were_written_without_one_that_is_being_written(tmp_path: Path) -> None:
    path = write(tmp_path / "rows", "".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 4}')
    assert list(read_rows(path)) == ROWS
    assert last_row(path) == ROWS[-1]
    assert last_row(path, up_to_step=2) == ROWS[1]
    assert last_row(path, up_to_step=0) is None
    assert list(read_rows(write(tmp_path / "none", ""))) == []


@given(
    lines=lists(binary(max_size=9).map(lambda line: line.replace(b"\n", b"\r"))),
    torn=booleans(),
    block=integers(1, 12),
)
def test_lines_from_the_end_are_the_lines_wherever_blocks_begin(
    lines: list[bytes], torn: bool, block: int
) -> None:
    whole = [line + b"\n" for line in lines]
    with tempfile.NamedTemporaryFile() as file, mock.patch.object(json_rows, "_BLOCK", block):
        file.write(b"".join(whole) + b"{" * torn)
        file.flush()
        found = list(lines_from_end(Path(file.name)))
    assert [line for _, line in found] == whole[::-1]
    assert [end for end, _ in found] == [len(b"".join(whole[:n])) for n in range(len(whole), 0, -1)]


def test_the_end_costs_the_same_however_long_the_file_is(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"".join(b'{"step": %d}\n' % step for step in range(500_000)))
    before = bytes_read()
    assert last_row(path, up_to_step=499_990) == {"step": 499_990}
    assert bytes_read() - before < 100_000


def test_rows_are_not_all_held_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b'{"step": 1, "loss": 2.5}\n' * 20_000)
    tracemalloc.start()
    assert sum(row["step"] for row in read_rows(path)) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300_000


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "[]", "", "\0\0"])
def test_a_damaged_row_is_named_with_a_way_out(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "rows", f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=r"line 2 of .*rows is damaged: it is not a JSON object; remove that"):
        list(read_rows(path))
    with pytest.raises(UserError, match=r"a line near the end of .*rows is damaged: .*; remove that line"):
        last_row(path)
