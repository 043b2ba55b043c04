"""Lists of URLs as people have them: formats, compressions, names of columns, and damage."""

import csv
import datetime
import errno
import gzip
import io
import json
import os
from contextlib import contextmanager

import aiohttp
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from ingest.labels.label_list import read_label_list
from ingest.links.archive import ArchiveCounts, archive_links
from ingest.sources.column_values import split_labels
from ingest.sources.expand import expand
from ingest.sources.opening import open_listing, refuse_unused
from ingest.sources.url_list import Columns, UrlList, list_format
from ingest.sources.url_listing import UrlListing
from ingest.web.opt_outs import ALL

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
        caption = "a cat, asleep" if kind == "tsv" else '"a cat, asleep"'
        text = tab.join(["URL", "TEXT", "hashtags", "score"]) + "\n"
        text += tab.join([ROWS[0]["url"], caption, "#cat #nap", "0.5"]) + "\n"
        text += tab.join([ROWS[1]["url"], "", "", ""]) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".zst":
        path.write_bytes(pa.compress(text.encode(), codec="zstd", asbytes=True))
    else:
        path.write_text(text)


def read_here(path, columns=None):
    """The list as its fenced process would read it, in this one."""
    kind, compression = list_format(str(path))

    @contextmanager
    def opened():
        with path.open("rb") as file:
            yield file if compression is None else pa.CompressedInputStream(file, compression)

    return UrlList(opened, str(path), kind, columns or Columns())


def rows(path, columns=None):
    return pa.concat_tables(read_here(path, columns).tables()).to_pylist()


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.csv", "a.csv.gz", "a.tsv", "a.tsv.zst", "a.jsonl", "a.ndjson.gz"]
)
def test_every_format_gives_the_same_rows_and_keeps_other_columns(tmp_path, name):
    write(tmp_path / name, list_format(name)[0])
    types = {} if name.endswith(".parquet") else {"score": "float"}
    assert rows(tmp_path / name, Columns(types=types)) == ROWS


def test_text_lists_skip_comments_and_keep_odd_bytes_visible(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"http://a.org/1\n\n# no\n  http://b.org/\xff \n"))
    assert [row["url"] for row in rows(tmp_path / "a.txt.gz")] == ["http://a.org/1", "http://b.org/\\xff"]


def test_a_byte_order_mark_is_no_part_of_a_url(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhttp://a/1\nhttp://a/2\n")
    assert [row["url"] for row in rows(tmp_path / "a.txt")] == ["http://a/1", "http://a/2"]


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl"])
def test_a_column_may_be_empty_at_first_and_have_odd_bytes_late(tmp_path, name, monkeypatch):
    monkeypatch.setattr("ingest.sources.text_blocks.BLOCK_BYTES", 1000)
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
    assert read_here(tmp_path / name).extra.field("by").type == pa.string()


def test_no_column_takes_the_name_of_another(tmp_path):
    (tmp_path / "a.csv").write_text("url,width,source_width\nhttp://a,1,2\n")
    (row,) = rows(tmp_path / "a.csv")
    assert (row["source_source_width"], row["source_width"]) == ("1", "2")
    (tmp_path / "b.csv").write_text("url,x,x\nhttp://a,1,2\n")
    with pytest.raises(UserError, match="several columns 'x': rename all but one"):
        UrlListing(str(tmp_path / "b.csv"), Columns())


def test_columns_can_be_named(tmp_path):
    pq.write_table(
        pa.table({"where": ["http://a"], "url": ["no"], "says": [b"\xff!"], "n": [1]}), tmp_path / "a.parquet"
    )
    columns = Columns(url="where", caption="says", labels="n")
    expected = {"url": "http://a", "caption": "\\xff!", "labels": ["1"], "source_url": "no"}
    found = rows(tmp_path / "a.parquet", columns)
    assert [{key: row[key] for key in expected} for row in found] == [expected]
    with pytest.raises(UserError, match=r"no column 'wher': give --url-column one of where, url"):
        UrlListing(str(tmp_path / "a.parquet"), Columns(url="wher"))


def test_a_list_without_urls_or_with_damage_is_one_sentence(tmp_path):
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column that is named like a URL, only a, b"):
        UrlListing(str(tmp_path / "a.parquet"), Columns())
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="damaged, or not parquet"):
        UrlListing(str(tmp_path / "b.parquet"), Columns())
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"url\nhttp://a\n" * 1000)[:-9])
    with pytest.raises(UserError, match=r"c\.csv\.gz is damaged"):
        rows(tmp_path / "c.csv.gz")
    (tmp_path / "d.jsonl").write_text("url\nhttp://a\n")
    with pytest.raises(UserError, match=r"d\.jsonl is not jsonl: line 1 is no row"):
        UrlListing(str(tmp_path / "d.jsonl"), Columns())
    with pytest.raises(UserError, match="cannot be opened"):
        UrlListing(str(tmp_path / "absent.csv"), Columns())


def test_the_identity_is_that_of_the_bytes_and_of_the_columns_used(tmp_path):
    write(tmp_path / "a.csv", "csv")
    one = UrlListing(str(tmp_path / "a.csv"), Columns()).describe(print)
    assert one == UrlListing(str(tmp_path / "a.csv"), Columns()).describe(print)
    assert one != UrlListing(str(tmp_path / "a.csv"), Columns(caption="URL")).describe(print)
    with (tmp_path / "a.csv").open("a") as file:
        file.write("http://c.org,,,\n")
    assert one.sha256 != UrlListing(str(tmp_path / "a.csv"), Columns()).describe(print).sha256


def test_patterns_name_lists_in_order(tmp_path):
    for name in ("b.csv", "a.csv", "c.txt"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/*.csv") == [f"{tmp_path}/a.csv", f"{tmp_path}/b.csv"]
    assert expand("s3://bucket/a.csv") == ["s3://bucket/a.csv"]
    with pytest.raises(UserError, match="no file matches"):
        expand(f"{tmp_path}/*.tsv")
    for wrong in ("https://[x/y.csv", "file://[x", "s3://[x/*.csv"):
        with pytest.raises(UserError, match="is no URL"):
            expand(wrong)


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


def planned(path, columns=None):
    """The rows that are planned: the URL, the problem, and the caption of each."""
    tables = list(read_here(path, columns).rows())
    return [
        (row["path"].decode(), row["problem"], row.get("caption"))
        for table in tables
        for row in table.to_pylist()
    ]


def captions(path, columns=None):
    return [caption for _, _, caption in planned(path, columns)]


HOSTILE = [
    'a 12" record',
    '"Sunset" by the sea',
    '"unbalanced start',
    "then 5' 11\" tall",
    '"whole"',
    "back\\slash",
    "NA",
    "null",
    "000",
    "1",
    "true",
    "2020-01-02",
    "18446744073709551615",
    "0001",
    "1e5",
    "\u200d\u200c",
]


def test_captions_of_a_tsv_stay_as_they_are_whatever_quotes_are_in_them(tmp_path):
    text = "url\tcaption\n" + "".join(f"http://a/{n}\t{caption}\n" for n, caption in enumerate(HOSTILE))
    (tmp_path / "a.tsv").write_text(text)
    assert captions(tmp_path / "a.tsv") == HOSTILE


def test_a_tsv_whose_quotes_enclose_values_is_read_as_one(tmp_path):
    with (tmp_path / "a.tsv").open("w") as file:
        csv.writer(file, delimiter="\t").writerows([("url", "caption"), *enumerate(["a\tb", *HOSTILE])])
    assert captions(tmp_path / "a.tsv") == ["a\tb", *HOSTILE]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("block", [40, 100, 8 << 20])
def test_what_csv_writers_write_is_what_is_read(tmp_path, quoting, block, monkeypatch):
    monkeypatch.setattr("ingest.sources.text_blocks.BLOCK_BYTES", block)
    texts = [*HOSTILE, "two\nlines, and\n\nmore", 'end "', '"', "a,b", "c:\\", 'c:\\"', "\r\n"]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file, quoting=quoting).writerows([("url", "caption"), *enumerate(texts)])
    assert captions(tmp_path / "a.csv") == texts


def test_quotes_behind_backslashes_end_no_value(tmp_path):
    texts = [*(text.replace("\\", "") for text in HOSTILE), 'so "he" said', 'at the end "', "a, b\nc"]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        dialect = {"doublequote": False, "escapechar": "\\", "quoting": csv.QUOTE_ALL}
        csv.writer(file, **dialect).writerows([("url", "caption"), *enumerate(texts)])
    assert captions(tmp_path / "a.csv") == texts


def test_a_quote_without_an_end_swallows_no_rows(tmp_path, monkeypatch):
    lines = [f"http://a/{n},plain {n}" for n in range(3000)]
    lines[100] = 'http://a/100,"Untitled'
    lines[2900] = 'http://a/2900,"Untitled'
    for name in ("a.csv", "a.tsv"):
        text = "\n".join(["url,caption", *lines]).replace(",", "\t" if name == "a.tsv" else ",")
        (tmp_path / name).write_text(text)
        found = planned(tmp_path / name)
        assert [url for url, _, _ in found] == [f"http://a/{n}" for n in range(3000)]
        assert found[100][2] == found[2900][2] == '"Untitled'


def test_D2_a_line_that_is_no_row_is_one_with_a_reason_and_the_others_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.sources.text_blocks.BLOCK_BYTES", 30)
    text = "url,caption\nhttp://a/1,x\nhttp://a/2,x,y,z\nhttp://a/3\n\nhttp://a/4,\xe9\n"
    (tmp_path / "a.csv").write_text(text)
    assert sorted(planned(tmp_path / "a.csv")) == [
        ("a.csv line 3", "malformed_row", None),
        ("a.csv line 4", "malformed_row", None),
        ("http://a/1", "", "x"),
        ("http://a/4", "", "é"),
    ]
    lines = ['{"url":"http://a/1","caption":"\\ud83d x"}', "[1]", "{", "", '{"url":"http://a/2","caption":2}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert sorted(planned(tmp_path / "a.jsonl")) == [
        ("a.jsonl line 2", "malformed_row", None),
        ("a.jsonl line 3", "malformed_row", None),
        ("http://a/1", "", "\\ud83d x"),
        ("http://a/2", "", "2"),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_that_are_no_rows_are_named_by_their_numbers(tmp_path, monkeypatch, end):
    monkeypatch.setattr("ingest.sources.text_blocks.BLOCK_BYTES", 30)
    text = 'url,caption\nhttp://a/1,x\nhttp://a/2,x\n\n\n"http://a/3","x\ny"\nhttp://a/4\nhttp://a/5,x\nhttp://a/6\n'
    (tmp_path / "a.csv").write_bytes(text.replace("\n", end).encode())
    odd = [url for url, problem, _ in planned(tmp_path / "a.csv") if problem]
    assert odd == ["a.csv line 8", "a.csv line 10"]


def test_D2_a_row_without_a_url_is_one_with_a_reason(tmp_path):
    pq.write_table(
        pa.table({"url": ["http://a", None, " ", ""], "caption": list("abcd")}), tmp_path / "a.parquet"
    )
    rest = [(f"a.parquet row {n}", "no_url", "abcd"[n - 1]) for n in (2, 3, 4)]
    assert planned(tmp_path / "a.parquet") == [("http://a", "", "a"), *rest]


@pytest.mark.parametrize("form", ["lines", "array", "long array"])
def test_values_of_json_stay_what_they_are(tmp_path, form, monkeypatch):
    if form == "long array":
        monkeypatch.setattr("ingest.sources.text_blocks.BLOCK_BYTES", 7)
    values = [{"url": f"http://a/{n}", "caption": text, "id": 2**64 + n} for n, text in enumerate(HOSTILE)]
    values[0] |= {"few": 7, "on": True, "when": "2020-01-02 03:04", "tags": ["é", "0001", "2020-01-02"]}
    text = "\n".join(map(json.dumps, values)) if form == "lines" else json.dumps(values, ensure_ascii=False)
    (tmp_path / "a.json").write_text(text)
    found = rows(tmp_path / "a.json")
    assert [row["caption"] for row in found] == HOSTILE
    assert [row["id"] for row in found] == [str(2**64 + n) for n in range(len(HOSTILE))]
    assert found[0]["labels"] == ["é", "0001", "2020-01-02"]
    assert (found[0]["few"], found[0]["on"], found[0]["when"]) == ("7", "true", "2020-01-02 03:04")


def test_a_column_has_the_type_that_is_said_and_other_values_are_a_reason(tmp_path):
    (tmp_path / "a.csv").write_text(
        "url,n,day\nhttp://a,0012,2020-01-02\nhttp://b,x,\nhttp://c,,2020-02-30\n"
    )
    columns = Columns(types={"n": "int", "day": "date"})
    assert [row["n"] for row in rows(tmp_path / "a.csv", columns)] == [12, None, None]
    assert rows(tmp_path / "a.csv", columns)[0]["day"] == datetime.date(2020, 1, 2)
    assert [each[1] for each in planned(tmp_path / "a.csv", columns)] == [
        "",
        "misread_value",
        "misread_value",
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.jsonl"])
def test_other_encodings_of_unicode_are_read(tmp_path, encoding, name, monkeypatch):
    monkeypatch.setattr("ingest.sources.text_blocks.BLOCK_BYTES", 5)
    first, line = {
        "a.csv": ("url,caption\n", "{},é\U0001f600\n"),
        "a.tsv": ("url\tcaption\n", "{}\té\U0001f600\n"),
        "a.txt": ("", "{}\n"),
        "a.jsonl": ("", '{{"url": "{}"}}\n'),
    }[name]
    text = first + "".join(line.format(f"http://a/{n}") for n in range(3))
    (tmp_path / name).write_bytes(text.encode(encoding))
    found = rows(tmp_path / name)
    assert [row["url"] for row in found] == [f"http://a/{n}" for n in range(3)]
    assert found[0]["caption"] in ("é\U0001f600", None)


def test_a_list_without_a_header_loses_no_row(tmp_path):
    (tmp_path / "a.tsv").write_text("a cat\thttp://a/1\na dog\thttp://a/2\n")
    with pytest.raises(UserError, match=r"no header.*--columns column1,url"):
        UrlListing(str(tmp_path / "a.tsv"), Columns())
    with pytest.raises(UserError, match="no header"):
        UrlListing(str(tmp_path / "a.tsv"), Columns(url="http://a/1"))
    named = Columns(names=("caption", "url"))
    assert planned(tmp_path / "a.tsv", named) == [("http://a/1", "", "a cat"), ("http://a/2", "", "a dog")]
    with pytest.raises(UserError, match=r"a\.tsv has 2 values in its first line, and --columns names 1"):
        UrlListing(str(tmp_path / "a.tsv"), Columns(names=("url",)))


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_csv_with_another_delimiter_is_read(tmp_path, delimiter):
    (tmp_path / "a.csv").write_text(f"url{delimiter}caption\nhttp://a{delimiter}a, b\n")
    assert planned(tmp_path / "a.csv") == [("http://a", "", "a, b")]


def test_names_and_passwords_are_not_kept(tmp_path):
    text = "http://me:secret@a.org/1\nHTTPS://u@b.org\nhttp://c.org/@x\nhttp://d.org/?a=b@c\n"
    (tmp_path / "a.txt").write_text(text)
    found = [url for url, _, _ in planned(tmp_path / "a.txt")]
    assert found == ["http://a.org/1", "HTTPS://b.org", "http://c.org/@x", "http://d.org/?a=b@c"]


def test_a_column_that_comes_late_is_told_with_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.sources.text_blocks.BLOCK_BYTES", 1000)
    lines = ['{"url": "http://a"}'] * 200 + ['{"url": "http://a", "late": 1}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl has a column 'late' from row 201 on"):
        rows(tmp_path / "a.jsonl")


def test_what_is_no_gzip_is_a_sentence_every_time(tmp_path):
    (tmp_path / "a.csv.gz").write_text("url,caption\nhttp://a,x\n")
    for _ in range(5):
        with pytest.raises(UserError, match=r"a\.csv\.gz is damaged"):
            UrlListing(str(tmp_path / "a.csv.gz"), Columns())


def test_formats_are_seen_from_the_path_of_a_url():
    assert list_format("https://host/a.parquet?download=true#x") == ("parquet", None)
    assert list_format("https://host/a.csv.gz?X-Amz-Signature=a/b.c") == ("csv", "gzip")
    assert list_format("https://host/a?name=b.csv") is None


def test_a_folder_of_lists_is_its_lists_and_a_folder_of_images_is_itself(tmp_path):
    spark = tmp_path / "spark.parquet"
    spark.mkdir()
    for name in (
        "_SUCCESS",
        ".part-0.parquet.crc",
        "part-1.snappy.parquet",
        "part-0.snappy.parquet",
        "README.md",
    ):
        (spark / name).touch()
    assert expand(str(spark)) == [f"{spark}/part-{n}.snappy.parquet" for n in (0, 1)]
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    (hub / "data" / "train-0.parquet").touch()
    (hub / "dataset_infos.json").touch()
    assert expand(str(hub)) == [f"{hub}/data/train-0.parquet"]
    (hub / "data" / "b.csv").touch()
    with pytest.raises(UserError, match="several kinds, csv and parquet"):
        expand(str(hub))
    (hub / "data" / "a.jpg").touch()
    assert expand(str(hub)) == [str(hub)]


def test_a_folder_of_lists_that_cannot_be_read_everywhere_is_told(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "part-0.csv").touch()
    scandir = os.scandir

    def forbidden(path):  # to root, too
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(UserError, match="closed cannot be read, and may hold lists"):
        expand(str(tmp_path))
    (tmp_path / "1.jpg").touch()  # then it is a folder of images, in which there is a row for it
    assert expand(str(tmp_path)) == [str(tmp_path)]


def test_what_lies_elsewhere_and_cannot_be_read_is_a_sentence(monkeypatch):
    class Cut(io.BytesIO):
        def read(self, size=-1):
            raise aiohttp.ClientPayloadError("Response payload is not completed")

    class Elsewhere:
        def open(self):
            return Cut(bytes(100))

    monkeypatch.setattr(fsspec, "open", lambda *a, **k: Elsewhere())
    with pytest.raises(UserError, match=r"http://h/a\.csv cannot be read.*payload is not completed"):
        open_listing("http://h/a.csv", Columns())
    with pytest.raises(UserError, match=r"http://h/a\.parquet cannot be read.*payload is not completed"):
        open_listing("http://h/a.parquet", Columns())
    with pytest.raises(UserError, match=r"--labels http://h/a\.csv cannot be read.*payload is not completed"):
        read_label_list("http://h/a.csv")


@pytest.mark.parametrize(
    ("place", "columns", "option"),
    [
        ("a.tar", Columns(names=("url",)), "--columns is of lists in .csv or .tsv,"),
        ("a.parquet", Columns(types={"id": "int"}), "--column-type is of lists in .csv or .tsv or .json"),
        ("https://h/a.txt?download=true", Columns(url="u"), "--url-column"),
        ("a.warc.gz", Columns(caption="c"), "--caption-column"),
        ("s3://b/a.tar", Columns(labels="l"), "--label-column"),
    ],
)
def test_what_is_said_of_columns_has_to_be_of_use(place, columns, option):
    with pytest.raises(UserError, match=option):
        refuse_unused(columns, [place])
    refuse_unused(columns, [place, "https://h/a.csv.gz?download=true"])


def test_a_server_that_does_not_answer_is_a_sentence():
    with pytest.raises(
        UserError, match=r"/a\.csv cannot be opened: not there, or its server does not answer"
    ):
        UrlListing("http://127.0.0.1:1/a.csv", Columns())


def test_a_bucket_without_credentials_is_a_sentence(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(UserError, match=r"no credentials for s3://any-bucket: set AWS_ACCESS_KEY_ID"):
        UrlListing("s3://any-bucket/a.parquet", Columns())
    with pytest.raises(UserError, match=r"no credentials for s3://any-bucket: set AWS_ACCESS_KEY_ID"):
        list(archive_links("s3://any-bucket/a.warc.gz", ArchiveCounts(), heeded=ALL))
