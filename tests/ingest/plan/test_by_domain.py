"""URLs of one site come together, each once, and memory does not decide the order."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.plan import by_domain as grouping
from ingest.plan.by_domain import ByDomain
from ingest.plan.cut_into_units import rechunked, taking_turns
from ingest.web.domain import domain_hashes, registrable_domain

HOSTS = st.sampled_from(
    ["a.com", "img.a.com", "A.com:8080", "b.co.uk", "x.b.co.uk", "u.github.io", "1.2.3.4", "[::1]"]
)
URLS = st.builds(lambda host, path: f"https://{host}/{path}", HOSTS, st.integers(0, 5)) | st.text(max_size=8)


def grouped(urls, *, known=(), size=3):
    with ByDomain() as rows, ByDomain() as seen:
        for start in range(0, len(urls), size):
            part = urls[start : start + size]
            rows.add(pa.table({"url": pa.array(part, pa.string()), "row": range(start, start + len(part))}))
        if known:
            seen.add(pa.table({"url": pa.array(known, pa.string())}))
        tables = list(rows.tables(seen if known else None))
        return [(row["url"], row["row"]) for table in tables for row in table.to_pylist()], rows.repeated


@settings(max_examples=30, deadline=None)
@given(
    urls=st.lists(URLS, min_size=1, max_size=30), known=st.lists(URLS, max_size=5), size=st.integers(1, 40)
)
def test_D1_sites_are_together_in_their_order_and_urls_come_once(urls, known, size):
    rows, repeated = grouped(urls, known=known, size=size)
    assert rows == grouped(urls, known=known, size=7)[0]
    first = {url: number for number, url in reversed(list(enumerate(urls)))}
    assert dict(rows) == {url: row for url, row in first.items() if url not in known}
    assert repeated == len(urls) - len(first)
    hashes = domain_hashes(pa.chunked_array([pa.array([url for url, _ in rows], pa.string())])).tolist()
    assert hashes == sorted(hashes)
    for before, after in zip(
        zip(hashes, rows, strict=True), list(zip(hashes, rows, strict=True))[1:], strict=False
    ):
        assert before[0] < after[0] or before[1][1] < after[1][1]


def test_rows_on_disk_come_back_as_those_in_memory(monkeypatch):
    urls = [f"http://site{number % 17}.org/{number % 90}" for number in range(200)]
    in_memory = grouped(urls)
    monkeypatch.setattr(grouping, "_MEMORY", 500)
    assert grouped(urls) == in_memory


@pytest.mark.slow
@pytest.mark.parametrize("memory", [500, 1 << 30], ids=["on disk", "in memory"])
def test_D1_large_parts_are_split_and_the_order_stays(monkeypatch, memory):
    # Of many sites, those whose hashes begin with the same two bytes, so that their parts are split twice.
    begins = domain_hashes(pa.chunked_array([[f"http://{n}.org/" for n in range(1000)]])) >> np.uint64(48)
    _, which, counts = np.unique(begins, return_inverse=True, return_counts=True)
    alike = np.flatnonzero(counts[which] > 1).tolist()
    assert alike
    sites = [*alike, *(n for n in range(150) if n not in alike)]
    urls = [f"http://{sites[n % len(sites)]}.org/{n % (2 * len(sites))}" for n in range(3 * len(sites))]
    known = urls[::7]
    whole = grouped(urls, known=known, size=100)
    monkeypatch.setattr(grouping, "_LARGEST_BUCKET", 5)
    monkeypatch.setattr(grouping, "_MEMORY", memory)
    assert grouped(urls, known=known, size=100) == whole
    with ByDomain() as rows:
        rows.add(pa.table({"url": urls}))
        assert max(map(len, rows.tables())) <= 5


@pytest.mark.parametrize(
    ("host", "domain"),
    [
        ("img.b.co.uk", "b.co.uk"),
        ("u.github.io", "u.github.io"),
        ("localhost", "localhost"),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_registrable_domains(host, domain):
    assert registrable_domain(host) == domain


@given(sizes=st.lists(st.integers(0, 10), max_size=8), rows=st.integers(1, 7))
def test_rechunking_keeps_every_row_in_place(sizes, rows):
    numbers = iter(range(1000))
    tables = [pa.table({"n": pa.array([next(numbers) for _ in range(size)], pa.int64())}) for size in sizes]
    chunks = [chunk["n"].to_pylist() for chunk in rechunked(tables, rows)]
    assert [n for chunk in chunks for n in chunk] == list(range(sum(sizes)))
    assert all(len(chunk) == rows for chunk in chunks[:-1])
    assert not chunks or 1 <= len(chunks[-1]) <= rows


@settings(deadline=None)  # the first one reads the list of public suffixes
@given(urls=st.lists(URLS, max_size=40))
def test_sites_take_turns(urls):
    paths = pa.array([url.encode() for url in urls], pa.binary())
    rows = taking_turns(pa.table({"path": paths, "row": pa.array(range(len(urls)), pa.int64())})).to_pylist()
    assert sorted(row["row"] for row in rows) == list(range(len(urls)))
    hashes = domain_hashes(pa.chunked_array([pa.array(urls, pa.string())])).tolist()
    seen, turns = {}, []
    for row in rows:
        assert urls[row["row"]].encode() == row["path"]
        turns.append(seen.get(hashes[row["row"]], 0))
        seen[hashes[row["row"]]] = turns[-1] + 1
    assert turns == sorted(turns)
    for site in set(hashes):  # within a site the order stays
        mine = [row["row"] for row in rows if hashes[row["row"]] == site]
        assert mine == sorted(mine)
