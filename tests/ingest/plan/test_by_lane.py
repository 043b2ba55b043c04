"""URLs in lanes: each once, all of a site in one lane, its rows in their order and spread over all of it."""

from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from ingest.dataset.schema import SPAN_COLUMNS
from ingest.plan import by_lane
from ingest.plan.by_lane import MOST_LANES, ByLane, lanes_for
from ingest.plan.cut_into_units import in_lanes, rechunked, with_url
from ingest.web.domain import domain_hashes, registrable_domain

HOSTS = st.sampled_from(
    ["a.com", "img.a.com", "A.com:8080", "b.co.uk", "x.b.co.uk", "u.github.io", "1.2.3.4", "[::1]"]
)
URLS = st.builds(lambda host, path: f"https://{host}/{path}", HOSTS, st.integers(0, 5)) | st.text(max_size=8)


def lanes_of(urls, *, known=(), size=3, unit_rows=2, per_site=None):
    """Rows as (URL, place in the list), by lanes; and how many were repeated, and known."""
    with ByLane(per_site=per_site) as rows:
        for start in range(0, len(urls), size):
            part = urls[start : start + size]
            columns = {"url": pa.array(part, pa.string()), "file": pa.nulls(len(part), pa.string())}
            rows.add(pa.table(columns | {"u": columns["url"], "row": range(start, start + len(part))}))
        if known:
            rows.add_known(pa.chunked_array([pa.array(known, pa.string())]))
        found = defaultdict(list)
        for lane, table in rows.lanes(unit_rows):
            found[lane] += [(row["u"], row["row"]) for row in table.to_pylist()]
        assert list(found) == sorted(found)
        return dict(found), rows.repeated, rows.known


def site_hashes(urls):
    return domain_hashes(pa.chunked_array([pa.array(urls, pa.string())])).tolist()


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    urls=st.lists(URLS, min_size=1, max_size=30), known=st.lists(URLS, max_size=5), size=st.integers(1, 40)
)
def test_D1_each_url_comes_once_and_a_site_is_in_one_lane_in_its_order(urls, known, size):
    lanes, repeated, left_out = lanes_of(urls, known=known, size=size)
    assert (lanes, repeated, left_out) == lanes_of(urls, known=known, size=7)
    rows = [row for lane in lanes.values() for row in lane]
    first = {url: number for number, url in reversed(list(enumerate(urls)))}
    assert dict(rows) == {url: row for url, row in first.items() if url not in known}
    assert len(rows) == len(dict(rows))
    assert (repeated, left_out) == (len(urls) - len(first), len(set(first) & set(known)))
    assert all(lane < lanes_for(len(rows), 2) for lane in lanes)
    lanes_of_site = defaultdict(set)
    for lane, inside in lanes.items():
        by_site = defaultdict(list)
        for hashed, (_, number) in zip(site_hashes([url for url, _ in inside]), inside, strict=True):
            lanes_of_site[hashed].add(lane)
            by_site[hashed].append(number)
        assert all(numbers == sorted(numbers) for numbers in by_site.values())
    assert all(len(lanes) == 1 for lanes in lanes_of_site.values())


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    urls=st.lists(URLS, min_size=1, max_size=30),
    known=st.lists(URLS, max_size=5),
    most=st.integers(1, 4),
    size=st.integers(1, 40),
)
def test_D1_of_a_site_the_first_rows_are_planned_and_those_that_are_known_count(urls, known, most, size):
    urls = [*urls, None, None]
    lanes, repeated, left_out = lanes_of(urls, known=known, size=size, per_site=most)
    everything, *counted = lanes_of(urls, known=known, size=size)
    assert [repeated, left_out] == counted
    rows = sorted((number, url) for lane in everything.values() for url, number in lane)
    there = Counter(site_hashes(list(set(known))))
    no_site, expected = site_hashes([""])[0], []
    for (number, url), site in zip(rows, site_hashes([url or "" for _, url in rows]), strict=True):
        there[site] += 1
        if site == no_site or there[site] <= most:
            expected.append((number, url))
    assert sorted((number, url) for lane in lanes.values() for url, number in lane) == expected
    assert all(lane < lanes_for(len(expected), 2) for lane in lanes)


def test_sites_take_turns_in_proportion():
    sizes = {"large.org": 300, "small.org": 30, "other.com": 60, **{f"one{n}.net": 1 for n in range(200)}}
    urls = [f"http://{host}/{n}" for host, rows in sizes.items() for n in range(rows)]
    (lane,), *_ = lanes_of(urls, size=1000, unit_rows=1000)[0].values(), None
    tenth = len(lane) / 10
    for host in ("large.org", "small.org", "other.com"):
        places = [place for place, (url, _) in enumerate(lane) if f"//{host}/" in url]
        for part in range(10):
            here = sum(part * tenth <= place < (part + 1) * tenth for place in places)
            assert abs(here - sizes[host] / 10) <= max(0.1 * sizes[host], 2) / 2
    # Those of one image are not all at one place.
    halves = Counter(place < len(lane) / 2 for place, (url, _) in enumerate(lane) if "//one" in url)
    assert min(halves.values()) > 60


def test_how_many_lanes_there_are_follows_from_the_rows():
    assert [lanes_for(rows, 10) for rows in (0, 1, 40, 41, 80, 81)] == [1, 1, 1, 2, 2, 3]
    assert lanes_for(10**9, 10) == MOST_LANES


def test_parts_of_one_file_stand_together_whatever_else_its_site_has():
    # Those of the third begin between two of the first.
    start, end = [0, 0, 10, 20, None, 10], [10, 10, 20, 30, None, 20]
    paths = [f"http://a.com/{n}.mp4".encode() for n in (1, 3, 1, 1, 2, 3)]
    paths, start, end = paths * 2, start * 2, end * 2  # what is repeated is left out
    rows = pa.table({"path": paths, "start_ms": start, "end_ms": end, "problem": [""] * 12})
    others = pa.table(
        {
            "path": [f"http://b.com/{n}".encode() for n in range(40)],
            "start_ms": pa.nulls(40, pa.int64()),
            "end_ms": pa.nulls(40, pa.int64()),
            "problem": [""] * 40,
        }
    )
    rows, others = (
        table.rename_columns(["path", *SPAN_COLUMNS.names, "problem"]) for table in (rows, others)
    )
    with ByLane() as urls:
        for start in range(0, 12, 5):  # also if they are added apart
            urls.add(with_url(rows.slice(start, 5)))
        urls.add(with_url(others))
        planned = [row["path"] for unit in in_lanes(urls, 100, []) for row in unit.to_pylist()]
        assert (urls.rows, urls.repeated) == (52, 6)
    assert sorted(set(planned)) == sorted({*paths, *others["path"].to_pylist()})
    for path in set(paths):
        places = [place for place, each in enumerate(planned) if each == path]
        assert places == list(range(places[0], places[0] + paths.count(path) // 2))


def test_turns_do_not_depend_on_batches():
    rng = np.random.default_rng(0)
    domain = np.sort(rng.integers(0, 6, 200).astype(np.uint64))
    file = np.cumsum(rng.random(200) < 0.6).astype(np.uint64)
    shared = rng.random(200) < 0.7
    places, whole = by_lane._Turns().of(domain, file, shared)
    for size in (1, 2, 3, 7, 199):
        turns = by_lane._Turns()
        parts = [
            turns.of(domain[at : at + size], file[at : at + size], shared[at : at + size])
            for at in range(0, 200, size)
        ]
        assert np.concatenate(parts, axis=1).tolist() == [places.tolist(), whole.tolist()]
    for site in range(6):
        mine = np.flatnonzero(domain == site)
        expected = [0]
        for row in range(1, len(mine)):
            at, before = mine[row], mine[row - 1]
            goes_on = shared[at] and file[at] == file[before]
            expected.append(expected[-1] if goes_on else row)
        assert places[mine].tolist() == list(range(len(mine)))
        assert whole[mine].tolist() == expected


def test_columns_come_back_as_they_were():
    kinds = [pa.timestamp("ns", "Europe/Berlin"), pa.date64(), pa.time32("s"), pa.time64("ns")]
    kinds += [pa.duration("ns"), pa.date32(), pa.uint8(), pa.float32(), pa.float64(), pa.int64()]
    columns = {
        str(kind): pa.array([0, 86_400_000 if kind == pa.date64() else 1, None], pa.int64())
        .cast(pa.int32() if kind in (pa.time32("s"), pa.date32()) else pa.int64())
        .cast(kind)
        for kind in kinds
    }
    columns |= {
        "half": pa.array(np.array([0.5, -1, np.inf], np.float16)),
        "nothing": pa.nulls(3),
        "Truth": [True, None, False],
        "truth": [None, True, False],
        "bytes": [b"\0\xff", b"", None],
        "text": ["a\0b", "", None],
        "'\"; DROP TABLE rows; --": [["a", ""], [], ["b"]],
    }
    table = pa.table(
        columns | {"path": [f"http://a.com/{n}".encode() for n in range(3)], "problem": [""] * 3}
    )
    with ByLane() as urls:
        urls.add(with_url(table))
        (unit,) = in_lanes(urls, 10, [])
    assert unit.schema == table.schema
    assert unit.equals(table)


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_skew(monkeypatch):
    monkeypatch.setattr(by_lane, "_MEMORY_MB", 128)
    rows = 300_000
    with ByLane() as urls:
        for start in range(0, rows, 50_000):
            texts = [f"http://s{n % 2 * n}.org/{n}?{'x' * 200}" for n in range(start, start + 50_000)]
            column = pa.array(texts, pa.string())
            urls.add(pa.table({"url": column, "file": pa.nulls(50_000, pa.string()), "path": column}))
        lengths = []
        assert sum(map(len, in_lanes(urls, 1000, lengths))) == rows  # of 70 MB of text, and more beside it
        assert sum(lengths) == pytest.approx(rows / 1000, rel=0.5)


def test_a_disk_that_is_full_is_told_with_its_folder(monkeypatch, tmp_path):
    import duckdb

    folder = tmp_path / "it's small"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with (
        ByLane() as urls,
        pytest.raises(UserError, match=rf"more room than there is in {folder}, .*TMPDIR.*\(No space\)$"),
    ):
        error = duckdb.IOException("No space\nPossible solutions:\n* Reducing the number of threads")
        monkeypatch.setattr(type(urls), "_number", lambda self, rows: (_ for _ in ()).throw(error))
        urls.add(pa.table({"url": ["http://a.com/1"], "file": pa.nulls(1, pa.string()), "n": [1]}))
        list(urls.lanes(10))


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
