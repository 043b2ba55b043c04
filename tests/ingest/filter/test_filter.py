"""Views by conditions, lists and other views: what stays, and what is told of what does not."""

import gzip
from contextlib import nullcontext
from functools import partial

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sealed_rows import seal_rows

from cluster.errors import UserError
from cluster.map.processes import processes
from ingest.dataset.keys import key_of
from ingest.dataset.open import open_dataset
from ingest.dataset.view import read_view, write_view
from ingest.filter import filter as filtering
from ingest.filter import sample_columns, sample_list
from ingest.filter.filter import Dropped, Filter, filter_view
from ingest.filter.sample_list import read_sample_list

EXTRA = pa.schema([pa.field("lang", pa.string()), pa.field("score", pa.float64())])
UNITS = [
    [
        {"width": 64, "height": 64, "lang": "en", "score": 0.5, "labels": ["cat"]},
        {"width": 640, "height": 64, "lang": "de", "score": 0.9, "labels": ["dog", "pet"]},
        {"width": 64, "height": 64, "score": 0.1},
    ],
    [
        {"width": 256, "height": 300, "lang": "en", "url": "https://Example.com:443/a%2db.jpg?x=1#top"},
        {"width": 256, "height": 300, "lang": "en", "score": 0.7, "url": "pictures/cat/1.jpg"},
    ],
]


@pytest.fixture
def dataset(tmp_path):
    seal_rows(tmp_path / "out", UNITS, extra=EXTRA)
    return tmp_path / "out"


def run(path, name, workers=1, **wanted):
    with processes(workers) as map_tasks:
        return filter_view(path, name, Filter(**wanted), map_tasks=map_tasks)


def kept_keys(path, view):
    opened = open_dataset(path, view=view)
    return [key for index in range(len(opened.units)) for key in opened.unit_keys(index).tolist()]


def test_conditions_are_all_asked_and_nulls_are_counted(dataset):
    report = run(dataset, "good", where=("aspect <= 3", "lang = en", "score >= 0.6"))
    assert kept_keys(dataset, "good") == [100_001]
    assert (report.samples, report.kept) == (5, 1)
    assert report.steps == (
        Dropped(step="where aspect <= 3", dropped=1, null=0),
        Dropped(step="where lang = en", dropped=1, null=1),
        Dropped(step="where score >= 0.6", dropped=2, null=1),
    )


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    limits=st.lists(st.tuples(st.sampled_from(["width", "height", "size"]), st.integers(0, 700)), max_size=4)
)
def test_any_conditions_keep_what_each_lets_through(tmp_path_factory, limits):
    path = tmp_path_factory.mktemp("filter") / "out"
    seal_rows(path, UNITS, extra=EXTRA)
    report = run(path, "v", where=tuple(f"{column} >= {limit}" for column, limit in limits))
    fits = [
        all({"size": 3}.get(column, row.get(column)) >= limit for column, limit in limits)
        for unit in UNITS
        for row in unit
    ]
    keys = [key_of(unit, slot) for unit, rows in enumerate(UNITS) for slot in range(len(rows))]
    wanted = [key for key, fit in zip(keys, fits, strict=True) if fit]
    assert (kept_keys(path, "v") if report.kept else []) == wanted
    assert report.kept + sum(step.dropped for step in report.steps) == report.samples == 5


def test_unknown_columns_and_wrong_types_are_told_before_anything_is_done(dataset):
    with pytest.raises(
        UserError, match=r"no column widht; it has aspect, caption, format, height, http_status, label, "
    ):
        run(dataset, "v", where=("widht > 3",))
    with pytest.raises(UserError, match="no column widht; it has"):
        run(dataset, "v", where=("width > 3 or not widht > 3",))
    with pytest.raises(UserError, match="a number, with 'wide'"):
        run(dataset, "v", where=("width > wide",))
    assert not (dataset / "views").exists()


def test_removal_by_key_and_by_any_spelling_of_a_url(dataset, tmp_path):
    (tmp_path / "takedown.txt").write_text(
        "0000000000001\n\n  https://example.com/a-b.jpg?x=1 \nHTTPS://EXAMPLE.org:443/0/0.jpg\n"
        "https://example.org/none.jpg\nhttps://example.org/none.jpg\n0000900000000\npictures/cat/1.jpg\n"
    )
    report = run(dataset, "v", remove=(str(tmp_path / "takedown.txt"),))
    assert kept_keys(dataset, "v") == [2]
    listed = report.lists[0]
    assert (listed.lines, listed.unmatched) == (7, 3)
    assert listed.named == ("0000900000000", "https://example.org/none.jpg")
    assert report.steps == (Dropped(step=f"remove {tmp_path / 'takedown.txt'}", dropped=4, null=0),)


def test_a_sample_that_is_named_twice_leaves_no_line_over(dataset, tmp_path):
    pairs = {
        "key": ["0000000000001", "0000000000002"],
        "url": [f"https://example.org/0/{n}.jpg" for n in (1, 2)],
    }
    pq.write_table(pa.table(pairs), tmp_path / "list.parquet")
    report = run(dataset, "v", remove=(str(tmp_path / "list.parquet"),))
    assert (report.kept, report.lists[0].lines, report.lists[0].unmatched) == (3, 4, 0)


def test_a_list_may_begin_with_a_byte_order_mark(dataset, tmp_path):
    (tmp_path / "list.txt").write_text("https://example.org/0/1.jpg\n", encoding="utf-8-sig")
    report = run(dataset, "v", remove=(str(tmp_path / "list.txt"),))
    assert (report.kept, report.lists[0].unmatched) == (4, 0)


def test_a_list_is_read_once(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(filtering, "ROWS_PER_TASK", 1)
    (tmp_path / "list.txt").write_text("0000000000001\n0000000100000\n")
    with processes(1) as map_tasks:
        report = filter_view(
            dataset,
            "v",
            Filter(remove=(str(tmp_path / "list.txt"),)),
            map_tasks=map_tasks,
            progress=lambda done, total: (tmp_path / "list.txt").write_text("0000000000000\n"),
        )
    assert kept_keys(dataset, "v") == [0, 2, 100_001]
    assert report.lists[0].unmatched == 0


def test_an_address_is_not_taken_for_another(dataset, tmp_path):
    (tmp_path / "list.txt").write_text(
        "https://example.com/a-b.jpg\nhttps://example.com/A-b.jpg?x=1\nexample.com/a-b.jpg?x=1\n1\n"
    )
    report = run(dataset, "v", remove=(str(tmp_path / "list.txt"),))
    assert (report.kept, report.lists[0].unmatched) == (5, 4)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_lists_with_columns(dataset, tmp_path, suffix):
    table = pa.table(
        {
            "url": ["https://example.org/0/2.jpg", None, "https://example.org/x"],
            "key": ["0000000000000", "0000000100000", None],
            "why": ["asked", "asked", "asked"],
        }
    )
    path = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        options = pyarrow.csv.WriteOptions(delimiter="\t" if suffix == "tsv" else ",")
        pyarrow.csv.write_csv(table, path, options)
    report = run(dataset, "v", remove=(str(path),))
    assert kept_keys(dataset, "v") == [1, 100_001]
    assert (report.lists[0].lines, report.lists[0].unmatched) == (4, 1)


def test_what_dedup_lists_can_be_removed(dataset, tmp_path):
    pq.write_table(
        pa.table({"key": pa.array([1, 100_000], pa.uint64()), "winner": [0, 0]}), tmp_path / "d.parquet"
    )
    run(dataset, "v", remove=(str(tmp_path / "d.parquet"),))
    assert kept_keys(dataset, "v") == [0, 2, 100_001]


def test_a_filter_that_keeps_nothing_leaves_the_name_to_the_right_one(dataset):
    report = run(dataset, "cats", where=("label = Cat",))
    assert (report.samples, report.kept) == (5, 0)
    assert run(dataset, "cats", where=("label = cat",)).kept == 1
    assert kept_keys(dataset, "cats") == [0]


def test_keep_only_what_is_listed(dataset, tmp_path):
    (tmp_path / "pick.txt").write_text("0000000000001\nhttps://example.org/0/2.jpg\n0000000000001\n")
    report = run(dataset, "v", keep=(str(tmp_path / "pick.txt"),))
    assert kept_keys(dataset, "v") == [1, 2]
    assert (report.lists[0].lines, report.lists[0].unmatched) == (3, 0)


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("none.txt", None, "cannot be read: No such file"),
        ("bad.parquet", b"no parquet", "cannot be read"),
        ("bad.csv", b"", "cannot be read"),
        ("bad.csv", b"a,b\n1,2\n", "neither a column key nor a column url: it has a, b"),
        ("bad.CSV", b"key\ncat\n", "has 'cat' in its column key"),
        ("bad.csv", b"key\n-1\n", "has '-1' in its column key"),
        ("bad.txt", "0000000000001".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("bad.tar", b"1.jpg\0\xff\xd8", "is no text: give .txt"),
        ("bad.csv.gz", gzip.compress(b"key\n1\n", mtime=0), "is no text: give .txt"),
        ("bad.jsonl", b'{"key": 1}\n', "give .txt, .csv, .tsv or .parquet"),
    ],
)
def test_lists_that_are_none_are_told(tmp_path, name, data, sentence):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        read_sample_list(tmp_path / name)


def test_texts_are_read_in_blocks_of_lines(tmp_path, monkeypatch):
    texts = [b"\xef\xbb\xbf" + "0000000000001\r\n\n é\n0000000000002".encode(), b"a\xff\nb", b""]
    for text, found in zip(texts, [([1, 2], ["é"]), ([], ["a\\xff", "b"]), ([], [])], strict=True):
        for size in (1, 3, 5, 100):
            monkeypatch.setattr(sample_columns, "_BLOCK_BYTES", size + 3)
            (tmp_path / "l.txt").write_bytes(text)
            with (tmp_path / "l.txt").open("rb") as file:
                opened = partial(nullcontext, file)
                tables = list(sample_columns.rows(opened, location="l.txt"))
            keys = [int(key) for table in tables for key in table["key"].drop_null().to_pylist()]
            assert (keys, [u for t in tables for u in t["url"].drop_null().to_pylist()]) == found


def test_a_list_of_more_samples_than_fit_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_list, "_MOST_HELD", 2_000)
    (tmp_path / "l.txt").write_text("".join(f"{number:013d}\n" for number in range(100)))
    with pytest.raises(UserError, match="take too much memory"):
        read_sample_list(tmp_path / "l.txt")


@settings(max_examples=50, deadline=None)
@given(lines=st.lists(st.one_of(st.integers(0, 10**13 - 1).map("{:013d}".format), st.text(max_size=9))))
def test_every_line_of_a_text_stands_for_one_entry(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("list") / "list.txt"
    text = "\n".join(lines)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    listed = read_sample_list(path)
    there = path.read_bytes().decode("utf-8").splitlines()
    assert listed.lines.sum() == sum(bool(line.strip()) for line in there)
    assert len(listed.keys) + len(listed.urls) == len(listed.lines)


def test_views_intersect(dataset):
    run(dataset, "english", where=("lang = en",))
    run(dataset, "square", where=("aspect < 1.1",))
    report = run(dataset, "both", within=("english", "square"))
    assert kept_keys(dataset, "both") == [0]
    assert [step.dropped for step in report.steps] == [2, 2]
    with pytest.raises(UserError, match="has no view named none: it has both, english, square"):
        run(dataset, "v", within=("none",))


def test_a_view_with_rows_for_some_units_only(dataset):
    root = open_dataset(dataset).root
    write_view(
        dataset, "first", root=root, keeps={0: pa.array([True, False, True]).to_numpy(zero_copy_only=False)}
    )
    run(dataset, "v", within=("first",))
    assert kept_keys(dataset, "v") == [0, 2]
    assert read_view(dataset, "v", root=root).units.tolist() == [0, 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_D1_view_does_not_depend_on_tasks_or_workers(tmp_path, monkeypatch, workers):
    (tmp_path / "list.txt").write_text("0000000000001\nhttps://example.org/x\n")
    wanted = {"where": ("score > 0.2", "lang = en"), "remove": (str(tmp_path / "list.txt"),)}
    reports = []
    for name in ("one", "two"):
        seal_rows(tmp_path / name, UNITS, extra=EXTRA)
        reports.append(run(tmp_path / name, "v", workers=workers if name == "two" else 1, **wanted))
        monkeypatch.setattr(filtering, "ROWS_PER_TASK", 1)
    assert reports[0] == reports[1]
    views = [(tmp_path / name / "views" / "v.parquet").read_bytes() for name in ("one", "two")]
    assert views[0] == views[1]


def test_a_name_that_another_root_has_is_refused_before_any_work(dataset):
    write_view(dataset, "v", root="0" * 64, keeps={})

    def no_work(function, tasks):
        raise AssertionError("work was begun")

    with pytest.raises(UserError, match="view v was made for root 000000000000"):
        filter_view(dataset, "v", Filter(), map_tasks=no_work)


def test_a_published_view_is_never_replaced(dataset):
    run(dataset, "v", where=("lang = en",))
    run(dataset, "v", where=("lang in [en]",))
    with pytest.raises(UserError, match="another name"):
        run(dataset, "v", where=("lang = de",))


def test_a_column_that_a_generation_lacks_is_null_there(tmp_path):
    seal_rows(tmp_path / "out", UNITS, extra=EXTRA, old_units=1)
    report = run(tmp_path / "out", "v", where=("lang = en",))
    assert kept_keys(tmp_path / "out", "v") == [100_000, 100_001]
    assert report.steps == (Dropped(step="where lang = en", dropped=3, null=3),)


def test_filter_of_a_dataset_on_s3(bucket):
    seal_rows(f"{bucket}/out", UNITS, extra=EXTRA)
    run(f"{bucket}/out", "v", where=("lang = en",))
    assert kept_keys(f"{bucket}/out", "v") == [0, 100_000, 100_001]
