"""What was counted when units were made is what there is to count, and nobody has to believe it."""

import hashlib
import io
import json
import os
import shutil
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingest.dataset.commit import commit, read_commit
from ingest.dataset.layout import counts_name
from ingest.dataset.open import sealed_units
from ingest.dataset.records import FileRecord
from ingest.dataset.seal import seal
from ingest.dataset.shard import InPlaceWriter
from ingest.dataset.unit_counts import COUNTS_SCHEMA, counts_bytes, read_counts
from ingest.image.check import Checked
from ingest.report import stats
from ingest.report.card import dataset_card
from ingest.report.gallery import show
from ingest.report.stats import count
from ingest.store.open import open_store

EXTRA = pa.schema([pa.field("split", pa.string()), pa.field("<i>", pa.int64())])
FINGERPRINT = "f" * 64


def silent(done, total):
    pass


ROW = st.fixed_dictionaries(
    {
        "status": st.sampled_from(["kept", "kept", "rejected", "failed"]),
        "reason": st.sampled_from(["one", "two", ""]),
        "retryable": st.booleans(),
        "http_status": st.sampled_from([None, 200, 404]),
        "url": st.sampled_from(
            ["https://A.example/1", "http://b.example:80/2", "folder/3", "s3://bucket/4", "", "https:///"]
        ),
        "format": st.sampled_from(["jpeg", "png"]),
        "width": st.integers(1, 20_000),
        "height": st.integers(1, 20_000),
        "size": st.integers(0, 2**40),
        "labels": st.lists(st.sampled_from(["a", "\u202e", "ü"]), max_size=3),
        "split": st.sampled_from([None, "train", "val"]),
    }
)


def make(path, units):
    store = open_store(path)
    store.prepare()
    tar = FileRecord(name="pool.tar", bytes=5, sha256="0" * 64)
    for number, rows in enumerate(units):
        with InPlaceWriter(store, number, shard=tar, extra=EXTRA) as writer:
            for row in rows:
                kept = row["status"] == "kept"
                verdict = Checked(
                    status=row["status"],
                    reason="" if kept else row["reason"],
                    sha256="0" * 64 if kept else None,
                    **({name: row[name] for name in ("format", "width", "height")} if kept else {}),
                )
                writer.add(
                    verdict,
                    Sized(row["size"]),
                    offset=0,
                    url=row["url"],
                    labels=row["labels"],
                    retryable=row["retryable"] and row["status"] == "failed",
                    http_status=row["http_status"],
                    extra={"split": row["split"]},
                )
            commit(store, writer.publish(generation=0, fingerprint=FINGERPRINT))
    return seal(store, dict.fromkeys(range(len(units)), FINGERPRINT))


class Sized(bytes):
    """Nothing, as large as asked."""

    def __new__(cls, size):
        made = super().__new__(cls)
        made.size = size
        return made

    def __len__(self):
        return self.size


def answer(path, **how):
    return count(path, progress=silent, **how).as_json()


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    units=st.lists(st.lists(ROW, min_size=1, max_size=12), min_size=1, max_size=4), missing=st.integers(0, 15)
)
def test_what_is_added_up_is_what_there_is_to_count(tmp_path, units, missing):
    path = tmp_path / "out"
    shutil.rmtree(path, ignore_errors=True)
    make(path, units)
    files = sorted(path.glob("counts/*/*"))
    assert len(files) == len(units)
    found = answer(path)
    for number, file in enumerate(files):
        if missing >> number & 1:
            file.unlink()
    assert answer(path) == found

    rows = [row for unit in units for row in unit]
    kept = [row for row in rows if row["status"] == "kept"]
    lost = Counter((row["status"], row["reason"] or "no reason given") for row in rows if row not in kept)
    assert {(each["status"], each["reason"]): each["count"] for each in found["reasons"]} == lost
    assert found["retryable"] == sum(row["retryable"] and row["status"] == "failed" for row in rows)
    assert (found["planned"], found["kept"]) == (len(rows), len(kept))
    assert found["http_statuses"] == Counter(str(row["http_status"]) for row in rows if row["http_status"])
    assert found["formats"] == Counter(row["format"] for row in kept)
    assert found["labels"] == Counter(label for row in kept for label in row["labels"])
    assert found["labelled"] == sum(bool(row["labels"]) for row in kept)
    assert found["many_labels"] == sum(len(row["labels"]) > 1 for row in kept)
    assert found["splits"] == Counter(row["split"] for row in kept if row["split"])
    assert found["columns"] == ["<i>", "split"]
    assert found["bytes"]["images"] == sum(row["size"] for row in kept)
    assert found["width"]["min"] == min((row["width"] for row in kept), default=0)
    assert found["short_side"]["max"] == max((min(row["width"], row["height"]) for row in kept), default=0)
    hosts = {"https://A.example/1": "a.example", "http://b.example:80/2": "b.example"}
    attempts = Counter(hosts[row["url"]] for row in rows if row["url"] in hosts)
    assert {each["host"]: each["attempts"] for each in found["hosts"]["most_attempts"]} == attempts


@pytest.fixture
def dataset(tmp_path):
    """Two units, and how their numbers are counted."""
    common = {"reason": "one", "retryable": False, "http_status": 200, "url": "https://a.example/1"}
    common |= {"format": "jpeg", "width": 640, "height": 480, "size": 1000, "labels": ["a"], "split": "train"}
    units = [
        [common | {"status": status, "width": width} for status in ["kept"] * 4 + ["failed"] * 2]
        for width in (640, 800)
    ]
    path = tmp_path / "out"
    root = make(path, units)
    found = answer(path)
    assert found["kept"] == 8
    return path, root, found


def test_no_row_is_read_where_counts_are(dataset):
    path, _, found = dataset
    shutil.rmtree(path / "meta")
    assert answer(path) == found


def forged(path, lines):
    """A file that is whole and of unit 0, with these lines."""
    unit = sealed_units(path, dataset_root(path)).to_pylist()[0]
    data = io.BytesIO()
    pq.write_table(lines, data, store_schema=False)
    data = data.getvalue()
    return data + hashlib.sha256(unit["meta_sha256"] + data).digest()


def dataset_root(path):
    return json.loads((path / "DATASET.json").read_text())["sealed"]


def lines_of(path):
    unit = sealed_units(path, dataset_root(path)).to_pylist()[0]
    (counts,) = read_counts(open_store(path), [unit])
    return counts.lines


def changed(lines, column, value):
    """The first line with another value in a column."""
    values = lines[column].to_pylist()
    field = lines.schema.field(column).with_nullable(value is None)
    return lines.set_column(
        lines.column_names.index(column), field, pa.array([value, *values[1:]], field.type)
    )


def no_utf8(lines):
    names = pa.array([b"\xff", *(name.encode() for name in lines["name"].to_pylist()[1:])]).view(pa.string())
    return lines.set_column(1, COUNTS_SCHEMA.field("name"), names)


FORGED = {
    "more kept": lambda lines: pa.concat_tables(
        [lines, lines.filter(pa.compute.equal(lines["what"], "status kept"))]
    ),
    "another status": lambda lines: pa.table([["status x"], [""], [0], [False], [1]], schema=COUNTS_SCHEMA),
    "nothing": lambda lines: lines.slice(0, 0),
    "another schema": lambda lines: lines.rename_columns(["what", "name", "value", "retryable", "number"]),
    "a null": lambda lines: changed(lines, "name", None),
    "less than none": lambda lines: changed(lines, "count", -1),
    "more than fits": lambda lines: changed(lines, "count", 2**62),
    "a value beyond all": lambda lines: changed(lines, "value", 2**62),
    "no text": no_utf8,
}


@pytest.mark.parametrize(
    "how",
    ["gone", "empty", "cut off", "a bit", "another unit's", "a folder", "a pipe", "a device", *FORGED],
)
def test_counts_that_are_damaged_foreign_or_forged_are_counted_again(dataset, how):
    path, _, found = dataset
    first, second = sorted(path.glob("counts/*/*"))
    data = bytearray(first.read_bytes())
    lines = lines_of(path)
    first.unlink()
    if how == "a folder":
        first.mkdir()
    elif how == "a pipe":
        os.mkfifo(first)
    elif how == "a device":
        first.symlink_to("/dev/zero")
    elif how == "empty":
        first.touch()
    elif how == "cut off":
        first.write_bytes(data[:-1])
    elif how == "a bit":
        data[data.index(b"train")] ^= 1
        first.write_bytes(data)
    elif how == "another unit's":
        shutil.copy(second, first)
    elif how in FORGED:
        first.write_bytes(forged(path, FORGED[how](lines)))
    told = list(read_counts(open_store(path), sealed_units(path, dataset_root(path)).to_pylist()))
    assert [each is None for each in told] == [True, False]
    assert answer(path) == found


def test_what_only_looks_forged_is_taken(dataset):
    """That the forgeries above are refused for what is in them, and not for how they are made."""
    path, _, found = dataset
    first = min(path.glob("counts/*/*"))
    first.write_bytes(forged(path, lines_of(path)))
    shutil.rmtree(path / "meta")
    assert answer(path) == found


@pytest.mark.parametrize("what", ["nothing but attempts", "sizes that contradict each other", "markup"])
def test_lies_of_who_can_write_rows_too_are_shown_and_break_nothing(dataset, what):
    path, _, _ = dataset
    lines = lines_of(path)
    whats = lines["what"].to_pylist()
    attempts = pa.array([name.startswith("status ") for name in whats])
    values = [
        9_999_999 if name.startswith("least ") else value
        for name, value in zip(whats, lines["value"].to_pylist(), strict=True)
    ]
    forgery = {
        "nothing but attempts": lines.filter(attempts),
        "sizes that contradict each other": lines.set_column(
            2, COUNTS_SCHEMA.field("value"), pa.array(values)
        ),
        "markup": lines.set_column(1, COUNTS_SCHEMA.field("name"), pa.array(["<script>\u202e"] * len(lines))),
    }[what]
    first = min(path.glob("counts/*/*"))
    first.write_bytes(forged(path, forgery))
    for other in path.glob("counts/*/*"):
        other.unlink() if other != first else None
    found = count(path, progress=silent)
    assert found.kept == 8
    page = show(str(path), found, view=None, samples=0, seed=0).text
    assert "<script>" not in page
    assert "\u202e" not in page + dataset_card(str(path), found, name="x")


def test_D1_counts_are_a_function_of_the_unit_and_no_root_knows_them(dataset):
    path, root, _ = dataset
    store, unit = open_store(path), sealed_units(path, root).to_pylist()[0]
    file = path / counts_name(0, read_commit(store, 0).meta.sha256)
    (counts,) = read_counts(store, [unit])
    assert counts_bytes(counts, unit["meta_sha256"]) == file.read_bytes()
    shutil.rmtree(path / "counts")
    assert seal(store, dict.fromkeys(range(2), FINGERPRINT)) == root


def test_many_rows_without_counts_are_shared_out(dataset, monkeypatch):
    path, _, found = dataset
    shutil.rmtree(path / "counts")
    given = []

    def map_tasks(function, tasks):
        given.extend(tasks)
        return map(function, tasks)

    assert answer(path, map_tasks=map_tasks) == found
    assert not given, "a few rows are no work for a process of their own"
    monkeypatch.setattr(stats, "ROWS_PER_TASK", 5)
    assert answer(path, map_tasks=map_tasks) == found
    assert [len(task.metas) for task in given] == [1, 1]
