"""Lists that attack what reads them: each is a sentence, or rows with a reason; nothing crashes or hangs."""

import gzip
import io
import json
import os
import signal
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from ingest.fence import reader, reading
from ingest.fence.reading import read_fenced
from ingest.filter.sample_list import read_sample_list
from ingest.labels import label_list
from ingest.labels.label_list import read_label_list
from ingest.sources import url_listing
from ingest.sources.image_table import ImageTable, image_column
from ingest.sources.opening import open_listing
from ingest.sources.url_list import Columns

JPEG = b"\xff\xd8\xff\xe0"


def planned(path):
    """How many rows are planned of a list."""
    return sum(map(len, open_listing(str(path), Columns()).rows()))


def repeated(value, rows=100_000):
    """A column that says one long value once, and that all rows have it."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value]))


def nested(path, depth=200_000):
    path.write_bytes(b'{"url": "http://a/1", "key": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}\n")


def sixty_gigabytes(path):
    table = pa.table({name: repeated("http://a/" + 600_000 * "a") for name in ("url", "key", "label")})
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 4_000


def long_line(path):
    path.write_bytes(gzip.compress(b"url,key\n" + bytes(80 << 20), 1))


def many_columns(path):
    names = [f"c{number}" for number in range(200_000)]
    path.write_text(f"url,{','.join(names)}\nhttp://a/1{',1' * len(names)}\n")


def many_columns_of_parquet(path):
    pq.write_table(pa.table({"url": ["http://a/1"]} | {f"c{number}": [1] for number in range(5_000)}), path)


def empty_lines_without_end(path):
    path.write_bytes(pa.compress(b"\n" * (16 << 20), "zstd", asbytes=True) * 20)


def blank_lines_without_end(path):
    path.write_bytes(pa.compress((b" " * 1_023 + b"\n") * (16 << 10), "zstd", asbytes=True) * 20)


def rows_without_end(path):
    pq.write_table(pa.table({"url": repeated("http://a/" + "a" * 1_000, 1_000_000)}), path)


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("l.jsonl", nested, "crashes what reads it (SIGSEGV)"),
        ("l.json", nested, "crashes what reads it (SIGSEGV)"),
        ("l.parquet", sixty_gigabytes, "asks for more than 1.1 GB of memory"),
        ("l.csv.gz", long_line, "has a line of more than 64 MB"),
        ("l.csv", many_columns, "has 200,001 columns, and no list has more than 4,096"),
        ("l.parquet", many_columns_of_parquet, "has 5,001 columns"),
        ("l.txt.zst", empty_lines_without_end, "as no list does: if you trust it, write it anew"),
        ("l.parquet", rows_without_end, "as no list does: if you trust it, write it anew"),
    ],
)
def test_D4_a_list_that_attacks_is_a_sentence(tmp_path, name, make, sentence):
    make(tmp_path / name)
    with pytest.raises(UserError) as told:
        planned(tmp_path / name)
    assert sentence in str(told.value)
    assert name in str(told.value)
    assert len(str(told.value)) < 500
    (tmp_path / "good.txt").write_text("http://a/1\n")
    assert planned(tmp_path / "good.txt") == 1


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("l.parquet", sixty_gigabytes, "asks for more than 1.1 GB of memory"),
        ("l.csv.gz", long_line, "is damaged, or not csv"),
        ("l.txt.zst", blank_lines_without_end, "if you trust it, write it anew"),
    ],
)
def test_D4_so_is_one_of_labels(tmp_path, name, make, sentence):
    make(tmp_path / name)
    with pytest.raises(UserError) as told:
        read_label_list(str(tmp_path / name))
    assert sentence in str(told.value)
    assert len(str(told.value)) < 500


def test_D4_labels_in_json_are_read_an_item_at_a_time(tmp_path):
    """Outlines take most of COCO's file, and are of no use: 54 MB, and twenty times as much when parsed."""
    outline = ",".join(["[]"] * 50_000)
    items = ",".join(f'{{"image_id":{n},"category_id":1,"outline":[{outline}]}}' for n in range(360))
    images = ",".join(f'{{"id":{n},"file_name":"{n}.jpg"}}' for n in range(360))
    (tmp_path / "l.json").write_text(
        f'{{"annotations":[{items}],"images":[{images}],"categories":[{{"id":1,"name":"cat"}}]}}'
    )
    assert read_label_list(str(tmp_path / "l.json")).said["269.jpg"].labels == ("cat",)


def test_D4_a_list_of_more_images_than_fit_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(label_list, "_MOST_HELD", 2_000)
    (tmp_path / "l.txt").write_text("".join(f"{number} cat\n" for number in range(100)))
    with pytest.raises(UserError, match="names more than 15 images, which take too much memory"):
        read_label_list(str(tmp_path / "l.txt"))


def test_D4_so_is_one_of_images_with_more_labels_than_fit(tmp_path, monkeypatch):
    """What the rows of an image said together was held for each of them: 1,000 rows took 4 MB."""
    monkeypatch.setattr(label_list, "_MOST_HELD", 2_000)
    (tmp_path / "l.txt").write_text("".join(f"1 cat{number}\n" for number in range(200)))
    with pytest.raises(UserError, match="which take too much memory"):
        read_label_list(str(tmp_path / "l.txt"))


def test_D4_what_is_made_of_a_list_buys_little_time():
    """Rows of two bytes, each with its reason, took 33 s of 26 MB."""
    account = reader._Account("l")
    account.add(packed=1 << 20, made=pa.table({"reason": pa.array([bytes(100 << 20)])}))
    left, _ = signal.setitimer(signal.ITIMER_PROF, 0)
    assert left < 10.5


def test_D4_voc_files_are_bounded(tmp_path):
    os.mkfifo(tmp_path / "cat_train.txt")
    with pytest.raises(UserError, match="it is no regular file"):
        read_label_list(str(tmp_path))
    (tmp_path / "cat_train.txt").unlink()
    for number in range(9):
        (tmp_path / f"cat{number}_train.txt").write_bytes(b"a 1\n" * (1 << 20))
    with pytest.raises(UserError, match="more than 32 MB"):
        read_label_list(str(tmp_path))


@pytest.mark.slow
def test_D4_so_is_one_of_samples(tmp_path):
    (tmp_path / "l.txt").write_bytes(b"a" * (80 << 20))
    with pytest.raises(UserError, match="has a line of more than 64 MB"):
        read_sample_list(tmp_path / "l.txt")
    sixty_gigabytes(tmp_path / "l.parquet")
    with pytest.raises(UserError, match=r"asks for more than 1\.1 GB of memory"):
        read_sample_list(tmp_path / "l.parquet")


@pytest.mark.slow
def test_D4_images_that_take_too_much_have_a_reason_and_those_behind_are_read(tmp_path):
    path = tmp_path / "t.parquet"
    bomb = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(16, np.int32)), pa.array([JPEG + bytes(120_000_000)])
    )
    good = pa.DictionaryArray.from_arrays(pa.array([0, 0], pa.int32()), pa.array([JPEG]))
    schema = pa.schema([("image", bomb.type)])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for images in (good, bomb, good):
            writer.write_table(pa.table([images], schema))
    table = ImageTable(str(path), "image", Columns())
    read = list(table.read(list(table.items()), max_bytes=1 << 20))
    table.close()
    assert [data if isinstance(data, bytes) else data.reason for data in read] == [
        *[JPEG] * 2,
        *["table_damaged"] * 16,
        *[JPEG] * 2,
    ]


def test_D4_a_table_whose_captions_take_too_much_is_a_sentence(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(
        pa.table({"image": pa.array([JPEG] * 4_096), "text": repeated("a" * 2_000_000, 4_096)}),
        path,
        compression="zstd",
    )
    assert image_column(str(path)) == "image"
    with pytest.raises(UserError, match=r"asks for more than 1\.1 GB of memory"):
        planned(path)


# Readers of a process that intruders have taken over.
TAKEN_OVER = """
import sys
import __main__
import pyarrow as pa

def endless(opened):
    __main__.SECONDS = 0.1
    with opened() as file:
        file.read()
    while True:
        pass

def _say(kind, size, data):
    sys.stdout.buffer.write(kind + size.to_bytes(8, "little") + data)
    sys.stdout.buffer.flush()
    yield pa.table({})

def no_table(opened):
    return _say(b"T", 16, b"0123456789abcdef")

def too_large(opened):
    return _say(b"T", 1 << 60, b"")

def lying(opened):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("x", pa.string())])) as stream:
        stream.write_table(pa.table({"x": ["a" * 300]}))
    data = sink.getvalue().to_pybytes()
    at = data.rindex(bytes(4) + (300).to_bytes(4, "little")) + 4
    return _say(b"T", len(data), data[:at] + (1 << 30).to_bytes(4, "little") + data[at + 4 :])

def no_end(opened):
    return _say(b"E", 200_000, b"[" * 200_000)

def another_file(opened):
    return _say(b"R", 77, bytes(16))
"""


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("endless", "takes more than 10 s of computing"),
        *((name, "(nonsense in place of rows)") for name in ("no_table", "too_large", "lying", "no_end")),
        ("another_file", "(nonsense in place of rows)"),
    ],
)
def test_D4_a_process_that_was_taken_over_is_a_sentence(name, sentence, tmp_path, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "taken_over.py").write_text(TAKEN_OVER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site-packages"))
    monkeypatch.setattr(reading, "_waiting", [])
    reader = types.SimpleNamespace(__module__="taken_over", __name__=name)
    with pytest.raises(UserError) as told:
        list(read_fenced(reader, [io.BytesIO(b"x")], {}, place="the list f"))
    assert sentence in str(told.value)
    assert reading._waiting == []


def test_one_process_reads_one_list_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_waiting", [])
    (tmp_path / "l.jsonl").write_text(json.dumps({"url": "http://a/1"}) + "\n")
    planned(tmp_path / "l.jsonl")
    monkeypatch.setattr(url_listing, "end_waiting", reading.end_waiting)
    (first,) = reading._waiting
    planned(tmp_path / "l.jsonl")
    assert reading._waiting == [first]
    first.end()  # by whatever hand: the next one is not told that its list is bad
    planned(tmp_path / "l.jsonl")
    assert reading._waiting != [first]
    rows = open_listing(str(tmp_path / "l.jsonl"), Columns()).rows()
    next(rows)
    rows.close()
    assert reading._waiting == []
    listing = open_listing(str(tmp_path / "l.jsonl"), Columns())
    assert len(reading._waiting) == 1
    listing.close()
    assert reading._waiting == []
