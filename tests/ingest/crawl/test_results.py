"""Whatever order things end in, they go on in the order of the plan, within the memory that is allowed; and
what was kept of them is taken up as it was, or not at all.
"""

import hashlib
import math
import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.crawl.results import Memory, Result, Results
from ingest.image.check import Checked

HEADER = b'{"plan":"a","unit":3}\n'


def result(row, data=b""):
    """Of a row with these bytes; every third is kept."""
    if row % 3:
        return Result(Checked(status="failed", reason=f"http_{row}"), True, 400 + row)
    digest = hashlib.sha256(data).hexdigest()
    columns = {"frames": row, "loudness_db": -1.5, "media": None, "video_codec": "ä"}
    verdict = Checked(
        status="kept", format="jpeg", width=row, height=1, sha256=digest, phash=2**64 - 1, columns=columns
    )
    return Result(verdict, http_status=200)


def data_of(row, size):
    return b"" if row % 3 else bytes([row]) * size


def results_of(rows, memory, path, **options):
    return Results(rows, memory, new_file=lambda: os.open(path, os.O_RDWR | os.O_CREAT), **options)


@settings(deadline=None)
@given(
    order=st.permutations(range(12)),
    sizes=st.lists(st.integers(0, 40), min_size=12, max_size=12),
    limit=st.integers(0, 6000),
    keep=st.integers(0, 12) | st.none(),
    killed=st.integers(0, 12),
)
def test_D1_the_order_of_arrival_changes_nothing_nor_does_a_kill(
    tmp_path_factory, order, sizes, limit, keep, killed
):
    memory, folder = Memory(limit), tmp_path_factory.mktemp("results")
    expected = [(result(row, data_of(row, sizes[row])), data_of(row, sizes[row])) for row in range(12)]
    results = results_of(12, memory, folder / "first", header=HEADER)
    handed_on = []
    for place, row in enumerate(order[:killed]):
        if place == keep:  # it has been open for a while
            results.keep(handed_on)
        handed_on += results.put(row, *expected[row])
        assert 0 <= memory.left <= limit
        assert results.next == len(handed_on)
    if results.keeps:  # another process goes on, in whatever order
        results.close()
        assert memory.left == limit
        results = results_of(12, memory, folder / "second", header=HEADER)
        found = list(results.load([os.open(folder / "first", os.O_RDONLY)]))
        there = {row: (expected[row][0], len(expected[row][1])) for row in order[:killed]}
        assert sorted(found, key=repr) == sorted(there.values(), key=repr)
        assert [row for row in range(12) if results.is_kept(row)] == sorted(order[:killed])
        handed_on = [due for row in sorted(order[:killed]) for due in results.take_up(row)]
    for row in order[killed:]:
        handed_on += results.put(row, *expected[row])
    assert handed_on == expected
    assert memory.left == limit
    results.close()


def kept(path):
    """Six rows in a file; where each record begins."""
    results, begins = results_of(9, Memory(0), path, header=HEADER), []
    results.keep(())
    for row in (4, 3, 8, 6, 5, 7):
        begins.append(path.stat().st_size if path.exists() else 0)
        assert list(results.put(row, result(row, data_of(row, 50)), data_of(row, 50))) == []
    results.close()
    return begins


def found_in(path, header=HEADER, rows=9):
    results = results_of(rows, Memory(0), path.with_name("other"), header=header)
    list(results.load([os.open(path, os.O_RDONLY)]))
    found = [row for row in range(rows) if results.is_kept(row)]
    results.close()
    return found


def test_what_was_torn_ends_what_is_believed_of_a_file(tmp_path):
    path = tmp_path / "a"
    begins = kept(path)
    whole = path.read_bytes()
    assert found_in(path) == [3, 4, 5, 6, 7, 8]
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        there = sum(end <= size for end in [*begins[1:], len(whole)])
        assert found_in(path) == sorted((4, 3, 8, 6, 5, 7)[:there])


def test_no_byte_of_a_file_can_be_another_without_being_seen(tmp_path):
    path = tmp_path / "a"
    kept(path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        results = results_of(9, Memory(0), path.with_name("other"), header=HEADER)
        for found, _ in results.load([os.open(path, os.O_RDONLY)]):
            row = found.http_status - 400 if found.verdict.status == "failed" else found.verdict.width
            assert found == result(row, data_of(row, 50))
        assert sum(map(results.is_kept, range(9))) < 6
        results.close()


def test_results_of_other_work_and_of_rows_that_are_not_are_not_taken_up(tmp_path):
    kept(tmp_path / "a")
    assert found_in(tmp_path / "a", header=HEADER.replace(b"3", b"4")) == []
    assert found_in(tmp_path / "a", rows=6) == [3, 4, 5]
    (tmp_path / "empty").write_bytes(b"")
    assert found_in(tmp_path / "empty") == []


@pytest.mark.parametrize("size", [2**30 + 1, 2**63])
def test_D4_a_record_that_says_it_is_huge_is_no_record(tmp_path, size):
    path = tmp_path / "a"
    kept(path)
    data = bytearray(path.read_bytes())
    data[8:16] = size.to_bytes(8, "little")
    path.write_bytes(data)
    os.truncate(path, 2**31)
    assert found_in(path) == []


@pytest.mark.parametrize(
    "said",
    [
        {"format": "exe"},
        {"format": None},
        {"width": None},
        {"height": None},
        {"columns": {"url": "http://example.org/"}},
        {"columns": {"media": 1}},
        {"columns": {"frames": -1}},
        {"columns": {"frames": "many"}},
    ],
)
def test_D4_what_no_row_can_say_is_not_taken_up(tmp_path, said):
    true = result(3, b"x")
    forged = true._replace(verdict=replace(true.verdict, **said))
    results = results_of(9, Memory(0), tmp_path / "b", header=HEADER)
    results.keep(())
    assert list(results.put(3, forged, b"x")) == []
    results.close()
    assert found_in(tmp_path / "b") == []


def test_the_first_of_two_results_of_a_row_counts(tmp_path):
    for name in ("a", "b", "c"):
        results = results_of(4, Memory(0), tmp_path / name, header=HEADER)
        results.keep(())
        verdict = Checked(status="failed", reason=name, columns={"loudness_db": -math.inf})
        assert list(results.put(2, Result(verdict), b"")) == []
        results.close()
    results = results_of(4, Memory(0), tmp_path / "d", header=HEADER)
    files = [os.open(tmp_path / name, os.O_RDONLY) for name in "cab"]
    found = list(results.load(files, lasts=lambda result: result.verdict.reason != "c"))
    assert [each.verdict.reason for each, _ in found] == ["a"]
    assert found[0][0].verdict.columns == {"loudness_db": -math.inf}
    results.close()


def test_files_of_no_use_are_let_go_at_once(tmp_path):
    kept(tmp_path / "a")
    (tmp_path / "empty").write_bytes(b"")
    files = [os.open(tmp_path / name, os.O_RDONLY) for name in ("empty", "a", "a")]
    results = results_of(9, Memory(0), tmp_path / "b", header=HEADER)
    assert len(list(results.load(files))) == 6
    for descriptor in (files[0], files[2]):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    assert list(results.take_up(3)) == []
    for row in (0, 1, 2):
        due = list(results.put(row, result(row, data_of(row, 50)), data_of(row, 50)))
    assert due == [(result(row, data_of(row, 50)), data_of(row, 50)) for row in (2, 3)]
    results.close()


def test_what_waits_is_let_go_when_a_unit_is_given_up(tmp_path):
    memory = Memory(2000)
    results = results_of(4, memory, tmp_path / "a")
    for row in (3, 2):  # the first in memory, the second in a file
        assert list(results.put(row, result(row, b"x"), b"x" * 100)) == []
    assert memory.left == 2000 - 1024 - 100
    results.close()
    assert memory.left == 2000
