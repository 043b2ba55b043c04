"""Lists of URLs as people have them: formats, compressions, names of columns, and damage."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from ingest.sources.url_list import Columns, UrlList, expand, list_format, split_labels

ROWS = [
    {"url": "http://a.org/1.jpg", "caption": "a cat, asleep", "labels": ["cat", "nap"], "score": 0.5},
    {"url": "http://b.org/2.jpg", "caption": None, "labels": [], "score": None},
]


def write(path, kind):
    columns = {"URL": [row["url"] for row in ROWS], "TEXT": [row["caption"] for row in ROWS]}
    score = [row["score"] for row in ROWS]
    if kind == "parquet":
        labels = pa.array([row["labels"] for row in ROWS])
        pq.write_table(pa.table(columns | {"hashtags": labels, "score": score}), path)
        return
    if kind == "jsonl":
        rows = [
            {"URL": r["url"], "TEXT": r["caption"], "tags": r["labels"], "score": r["score"]} for r in ROWS
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        tab = "\t" if kind == "tsv" else ","
        caption = '"a cat, asleep"'
        text = tab.join(["URL", "TEXT", "hashtags", "score"]) + "\n"
        text += tab.join([ROWS[0]["url"], caption, "#cat #nap", "0.5"]) + "\n"
        text += tab.join([ROWS[1]["url"], "", "", ""]) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".zst":
        path.write_bytes(pa.compress(text.encode(), codec="zstd", asbytes=True))
    else:
        path.write_text(text)


def rows(path, columns=None):
    return pa.concat_tables(UrlList(str(path), columns or Columns()).tables()).to_pylist()


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.csv", "a.csv.gz", "a.tsv", "a.tsv.zst", "a.jsonl", "a.ndjson.gz"]
)
def test_every_format_gives_the_same_rows_and_keeps_other_columns(tmp_path, name):
    write(tmp_path / name, list_format(name)[0])
    assert rows(tmp_path / name) == ROWS


def test_text_lists_skip_comments_and_keep_odd_bytes_visible(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"http://a.org/1\n\n# no\n  http://b.org/\xff \n"))
    assert [row["url"] for row in rows(tmp_path / "a.txt.gz")] == ["http://a.org/1", "http://b.org/\\xff"]


def test_a_byte_order_mark_is_no_part_of_a_url(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhttp://a/1\nhttp://a/2\n")
    assert [row["url"] for row in rows(tmp_path / "a.txt")] == ["http://a/1", "http://a/2"]


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl"])
def test_a_column_may_be_empty_at_first_and_have_odd_bytes_late(tmp_path, name, monkeypatch):
    monkeypatch.setattr("ingest.sources.url_list._BLOCK_BYTES", 1000)
    if name == "a.jsonl":
        early = [b'{"url":"http://a","text":null,"tags":[],"by":"me"}'] * 100
        late = b'{"url":"http://b","text":"sky","tags":["x"],"by":"you"}'
    else:
        early = [b"url,text,tags,by", *[b"http://a,,,me"] * 100]
        late = b"http://b,sky,x,caf\xe9"
    data = b"\n".join([*early, late, b""])
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    last = {"url": "http://b", "caption": "sky", "labels": ["x"]}
    found = rows(tmp_path / name)
    assert len(found) == 101
    assert found[-1] == last | {"by": "you" if name == "a.jsonl" else "caf\\xe9"}
    assert UrlList(str(tmp_path / name), Columns()).extra.field("by").type == pa.string()


def test_a_column_that_changes_its_type_late_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.sources.url_list._BLOCK_BYTES", 1000)
    (tmp_path / "a.csv").write_text("url,id\n" + "http://a,1\n" * 200 + "http://a,x\n")
    with pytest.raises(UserError, match="changes its type, after the first 8 MB: make the list Parquet"):
        rows(tmp_path / "a.csv")


def test_no_column_takes_the_name_of_another(tmp_path):
    (tmp_path / "a.csv").write_text("url,width,source_width\nhttp://a,1,2\n")
    (row,) = rows(tmp_path / "a.csv")
    assert (row["source_source_width"], row["source_width"]) == (1, 2)
    (tmp_path / "b.csv").write_text("url,x,x\nhttp://a,1,2\n")
    with pytest.raises(UserError, match="several columns 'x': rename all but one"):
        UrlList(str(tmp_path / "b.csv"), Columns())


def test_columns_can_be_named(tmp_path):
    pq.write_table(
        pa.table({"where": ["http://a"], "url": ["no"], "says": [b"\xff!"], "n": [1]}), tmp_path / "a.parquet"
    )
    columns = Columns(url="where", caption="says", labels="n")
    expected = {"url": "http://a", "caption": "\\xff!", "labels": ["1"], "source_url": "no"}
    found = rows(tmp_path / "a.parquet", columns)
    assert [{key: row[key] for key in expected} for row in found] == [expected]
    with pytest.raises(UserError, match=r"no column 'wher': give --url-column one of where, url"):
        UrlList(str(tmp_path / "a.parquet"), Columns(url="wher"))


def test_a_list_without_urls_or_with_damage_is_one_sentence(tmp_path):
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column that is named like a URL, only a, b"):
        UrlList(str(tmp_path / "a.parquet"), Columns())
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="damaged, or not parquet"):
        UrlList(str(tmp_path / "b.parquet"), Columns())
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"url\nhttp://a\n" * 1000)[:-9])
    with pytest.raises(UserError, match=r"c\.csv\.gz is damaged"):
        rows(tmp_path / "c.csv.gz")
    with pytest.raises(UserError, match="cannot be opened"):
        UrlList(str(tmp_path / "absent.csv"), Columns())


def test_the_identity_is_that_of_the_bytes_and_of_the_columns_used(tmp_path):
    write(tmp_path / "a.csv", "csv")
    one = UrlList(str(tmp_path / "a.csv"), Columns()).describe(print)
    assert one == UrlList(str(tmp_path / "a.csv"), Columns()).describe(print)
    assert one != UrlList(str(tmp_path / "a.csv"), Columns(caption="URL")).describe(print)
    with (tmp_path / "a.csv").open("a") as file:
        file.write("http://c.org,,,\n")
    assert one.sha256 != UrlList(str(tmp_path / "a.csv"), Columns()).describe(print).sha256


def test_patterns_name_lists_in_order(tmp_path):
    for name in ("b.csv", "a.csv", "c.txt"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/*.csv") == [f"{tmp_path}/a.csv", f"{tmp_path}/b.csv"]
    assert expand("s3://bucket/a.csv") == ["s3://bucket/a.csv"]
    with pytest.raises(UserError, match="no file matches"):
        expand(f"{tmp_path}/*.tsv")


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (None, []),
        ("#sky #sea", ["sky", "sea"]),
        ("#a#b,#c", ["a", "b", "c"]),
        ("golden retriever, dog", ["golden retriever", "dog"]),
        ("# #", []),
    ],
)
def test_labels_in_a_text(text, labels):
    assert split_labels(text) == labels
