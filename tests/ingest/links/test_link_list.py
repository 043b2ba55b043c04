"""Lists of image links: each address once, the first of the input, the same bytes however it was made."""

import json
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as pq
import pytest
from archives import archive, coded, record, response
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.errors import UserError
from ingest import cli
from ingest.links import link_list
from ingest.links.link_list import list_links
from ingest.links.wat import wat_page
from ingest.sources.url_list import Columns
from ingest.sources.url_listing import UrlListing
from ingest.web.opt_outs import OptOut


def listed(paths, output, **options):
    counts = list_links([str(path) for path in paths], output, workers=options.pop("workers", 1), **options)
    return counts, pq.read_table(output).to_pylist()


def page(number, images, **options):
    html = "".join(f"<img src='{image}' alt='{number}'>" for image in images)
    return response(f"http://site{number}.example/", html.encode(), **options)


def envelope(url, *, status="200", headers=None, head=None, links=()):
    html = {"Head": head or {}, "Links": list(links)}
    metadata = {"Response-Message": {"Status": status}, "Headers": headers or {}, "HTML-Metadata": html}
    about = {"WARC-Type": "response", "WARC-Target-URI": url}
    return {
        "Envelope": {
            "WARC-Header-Metadata": about,
            "Payload-Metadata": {"HTTP-Response-Metadata": metadata},
        }
    }


def wat(url, **options):
    text = json.dumps(envelope(url, **options)).encode()
    return record("metadata", url, text, content_type="application/json")


def test_rows_tell_the_image_its_text_and_its_page(tmp_path):
    html = b"<base href=/dir/><img src=a.jpg alt='A cat'><img src='/b.jpg#x'>"
    path = archive(tmp_path / "w.warc.gz", [response("http://Site.example:80/page", html)])
    counts, rows = listed([path], tmp_path / "urls.parquet")
    there = {"page_url": "http://site.example/page", "page_host": "site.example"}
    assert sorted(rows, key=lambda row: row["url"]) == [
        {"url": "http://site.example/b.jpg", "alt": "", **there},
        {"url": "http://site.example/dir/a.jpg", "alt": "A cat", **there},
    ]
    assert (counts.records, counts.pages, counts.found, counts.distinct, counts.hosts) == (1, 1, 2, 2, 1)


def test_one_address_in_many_spellings_is_told_once_where_it_came_first(tmp_path):
    spellings = ["http://A.example/~x", "http://a.example:80/%7ex", "http://a.example/y/../%7Ex#f"]
    paths = [
        archive(tmp_path / f"{number}.warc.gz", [page(number, [spelling])])
        for number, spelling in enumerate(spellings)
    ]
    for first in range(3):
        order = paths[first:] + paths[:first]
        counts, rows = listed(order, tmp_path / "urls.parquet")
        assert [row["alt"] for row in rows] == [str(first)]
        assert (counts.found, counts.distinct, counts.hosts) == (3, 1, 1)


@pytest.fixture
def many(tmp_path):
    """Seven archives of 2,000 links that overlap."""
    paths = []
    for number in range(7):
        pages = [
            page(
                number * 10 + part, [f"http://i{n % 50}.example/{n % 1500}.jpg" for n in range(at, at + 400)]
            )
            for part, at in enumerate(range(number * 100, number * 100 + 2000, 400))
        ]
        paths.append(archive(tmp_path / f"{number}.warc.gz", pages))
    return paths


@pytest.mark.slow
def test_D1_bytes_do_not_depend_on_workers_or_memory(tmp_path, many, monkeypatch):
    counts, rows = listed(many, tmp_path / "one.parquet")
    assert len({row["url"] for row in rows}) == len(rows) == counts.distinct == 1500
    two, _ = listed(many, tmp_path / "two.parquet", workers=2)
    assert two == counts
    monkeypatch.setattr(link_list, "_LARGEST_BUCKET", 40_000)
    monkeypatch.setattr(link_list, "_BATCH", 37)
    listed(many, tmp_path / "small.parquet")
    whole = (tmp_path / "one.parquet").read_bytes()
    assert (tmp_path / "two.parquet").read_bytes() == whole
    assert (tmp_path / "small.parquet").read_bytes() == whole
    assert sorted(each.name for each in tmp_path.glob("*p*")) == [
        "one.parquet",
        "small.parquet",
        "two.parquet",
    ]


def test_row_groups_are_whole_whatever_the_buckets(tmp_path, many, monkeypatch):
    monkeypatch.setattr(link_list, "_ROW_GROUP", 400)
    listed(many, tmp_path / "urls.parquet")
    meta = pq.ParquetFile(tmp_path / "urls.parquet").metadata
    assert [meta.row_group(group).num_rows for group in range(meta.num_row_groups)] == [400, 400, 400, 300]


def test_pages_that_opt_out_are_left_out_and_counted(tmp_path):
    meta = b"<meta name=robots content='noimageindex'><img src=http://a.example/meta>"
    records = [
        response("http://a.example/1", meta),
        response(
            "http://a.example/2", b"<img src=header>", headers="x-robots-tag: a\r\nX-Robots-Tag: noai\r\n"
        ),
        wat(
            "http://a.example/3", headers={"X-ROBOTS-TAG": "noai"}, links=[{"path": "IMG@/src", "url": "wat"}]
        ),
        response("http://a.example/4", b"<img src=yes>", headers="X-Robots-Tag: noindex\r\n"),
    ]
    path = archive(tmp_path / "w.warc.gz", records)
    counts, rows = listed([path], tmp_path / "urls.parquet")
    assert [row["url"] for row in rows] == ["http://a.example/yes"]
    assert (counts.pages, counts.opted_out, counts.found) == (4, 3, 1)
    assert pq.read_schema(tmp_path / "urls.parquet").metadata[b"opt_outs"] == b"honoured"
    counts, rows = listed([path], tmp_path / "all.parquet", heeded=frozenset())
    assert (counts.opted_out, counts.left_out, counts.found, len(rows)) == (3, 0, 4, 4)
    assert pq.read_schema(tmp_path / "all.parquet").metadata[b"opt_outs"].startswith(b"ignored: ")


def test_each_way_to_opt_out_is_ignored_by_its_option(tmp_path):
    records = [
        response("http://a.example/1", b"<img src=1>", headers="X-Robots-Tag: noai\r\n"),
        response("http://a.example/2", b"<meta name=tdm-reservation content=1><img src=2>"),
        wat(
            "http://a.example/3",
            headers={"content-signal": "ai-train=no"},
            links=[{"path": "IMG@/src", "url": "3"}],
        ),
        response("http://a.example/4", b"<img src=4>", headers="Content-Usage: train-ai=n\r\n"),
    ]
    path, output = archive(tmp_path / "w.warc.gz", records), tmp_path / "urls.parquet"
    command = ["urls", str(path), "--output", str(output), "--workers", "1"]
    for number, opt_out in enumerate(OptOut, 1):
        done = CliRunner().invoke(cli.app(), [*command, opt_out.option])
        assert re.search(r"^opt-outs *3 pages left out, 1 listed all the same$", done.stdout, re.MULTILINE)
        assert pq.read_table(output)["url"].to_pylist() == [f"http://a.example/{number}"]
        assert pq.read_schema(output).metadata[b"opt_outs"] == b"ignored: " + opt_out.value.encode()
    CliRunner().invoke(cli.app(), [*command, "--ignore-opt-outs"])
    assert len(pq.read_table(output)) == 4


def test_only_answered_pages_of_the_web_are_read(tmp_path):
    html = b"<img src=http://a.example/%d>"
    records = [
        response("http://a.example/", html % 1, status="404 Not Found"),
        response("http://a.example/", html % 2, content_type="text/plain"),
        response("ftp://a.example/", html % 3),
        record("request", "http://a.example/", html % 4),
        record("conversion", "http://a.example/", html % 5, content_type="text/html"),
        wat("http://a.example/", status="404", links=[{"path": "IMG@/src", "url": "6"}]),
        record("metadata", "http://a.example/", b"{", content_type="application/json"),
        record("resource", "http://a.example/", html % 7, content_type="text/html; charset=utf-8"),
        response("http://a.example/", coded(html % 8, "gzip"), headers="Content-Encoding: gzip\r\n"),
    ]
    counts, rows = listed([archive(tmp_path / "w.warc.gz", records)], tmp_path / "urls.parquet")
    assert sorted(row["url"][-1] for row in rows) == ["7", "8"]
    assert (counts.records, counts.pages) == (9, 2)


def test_wat_tells_the_same_as_the_page():
    links = [
        {"path": "IMG@/src", "url": "a.jpg", "alt": "A"},
        {"path": "IMG@/srcset", "url": "b.jpg 1x, c.jpg 2x"},
        {"path": "IMG@/data-src", "url": "d.jpg"},
        {"path": "SOURCE@/srcset", "url": "e.jpg 9w"},
        {"path": "SOURCE@/srcset", "url": "no.jpg 9w"},
        {"path": "SOURCE@/src", "url": "no.mp4"},
        {"path": "IMG@/src", "url": "data:image/gif,x", "alt": "E"},
        {"path": "SOURCE@/srcset", "url": "no.jpg 9w"},
        {"path": "IMG@/src", "url": "h.jpg", "alt": "H"},
        {"path": "A@/href", "url": "no.jpg"},
        "no",
        {"path": 5, "url": {}},
    ]
    head = {
        "Base": "/dir/",
        "Metas": [{"property": "og:image", "content": "f.jpg"}],
        "Link": [{"rel": "image_src", "url": "g.jpg"}],
    }
    url, page = wat_page(json.dumps(envelope("http://a.example/", head=head, links=links)).encode())
    assert url == "http://a.example/"
    assert [(link.url[-5:], link.alt) for link in page.links] == [
        ("f.jpg", ""),
        ("g.jpg", ""),
        ("a.jpg", "A"),
        ("c.jpg", ""),
        ("d.jpg", ""),
        ("e.jpg", "E"),
        ("h.jpg", "H"),
    ]
    assert all(link.url.startswith("http://a.example/dir/") for link in page.links)


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(st.sampled_from(["Head", "Links", "Metas", "Link", "url", "path", "Base"]), below)
    ),
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(JSONS, JSONS, st.binary(max_size=50))
def test_D4_no_metadata_raises(first, second, data):
    wat_page(data)
    whole = envelope("http://a.example/", headers=first)
    whole["Envelope"]["Payload-Metadata"]["HTTP-Response-Metadata"]["HTML-Metadata"] = second
    wat_page(json.dumps(whole).encode())
    wat_page(json.dumps({"Envelope": first}).encode())


def test_D4_deep_metadata_and_lone_surrogates(tmp_path):
    assert wat_page(b'{"Envelope":' * 100_000) is None
    assert wat_page(b"[" * 1_000_000) is None
    odd = wat("http://a.example/", links=[{"path": "IMG@/src", "url": "\ud800.jpg", "alt": "\udc00x"}])
    _, rows = listed([archive(tmp_path / "w.warc.gz", [odd])], tmp_path / "urls.parquet")
    assert [(row["url"], row["alt"]) for row in rows] == [("http://a.example/%3F.jpg", "x")]


def test_a_damaged_archive_keeps_what_was_read_and_is_told(tmp_path):
    path = archive(tmp_path / "bad.warc.gz", [page(n, [f"http://a.example/{n}"]) for n in range(3)])
    path.write_bytes(path.read_bytes()[:-60])
    good = archive(tmp_path / "good.warc.gz", [page(9, ["http://a.example/9"])])
    text = tmp_path / "text.warc"
    text.write_text("no archive")
    counts, rows = listed([path, text, good], tmp_path / "urls.parquet")
    assert sorted(row["url"][-1] for row in rows) == ["0", "1", "9"]
    assert counts.damaged == {
        str(path): "it ends within a record",
        str(text): "it is damaged, or no WARC",
    }


def test_archives_are_read_over_http(tmp_path):
    (tmp_path / "served").mkdir()
    archive(tmp_path / "served" / "w.warc.gz", [page(1, ["http://a.example/1"])])
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        counts, rows = listed([address + "w.warc.gz", address + "none"], tmp_path / "urls.parquet")
        server.shutdown()
    assert [row["url"] for row in rows] == ["http://a.example/1"]
    told = "it cannot be read: not there, or its server does not answer"
    assert counts.damaged == {address + "none": told}


def test_a_list_that_is_called_csv_is_one_and_texts_are_what_pages_say(tmp_path):
    alt = 'a "b", \u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f468\u200d\U0001f469'
    html = f"<img src='http://a.example/1' alt='{alt}'>".encode()
    path = archive(tmp_path / "w.warc.gz", [response("http://site.example/", html)])
    list_links([str(path)], tmp_path / "urls.csv", workers=1)
    (table,) = UrlListing(str(tmp_path / "urls.csv"), Columns()).rows()
    (row,) = table.to_pylist()
    assert (row["path"], row["caption"]) == (b"http://a.example/1", alt)
    assert (row["page_url"], row["page_host"]) == ("http://site.example/", "site.example")


def test_D4_what_is_damaged_costs_its_pages_only(tmp_path):
    pages = [page(number, [f"http://a.example/{number}"]) for number in range(3)]
    whole = archive(tmp_path / "w.warc", pages, "plain").read_bytes()
    (tmp_path / "w.warc").write_bytes(whole.replace(b"WARC/1.0", b"WORC/1.0", 2).replace(b"WORC", b"WARC", 1))
    counts, rows = listed([tmp_path / "w.warc"], tmp_path / "urls.parquet")
    assert sorted(row["url"] for row in rows) == ["http://a.example/0", "http://a.example/2"]
    assert list(counts.damaged.values()) == ["it is damaged, or no WARC"]


def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path):
    text = tmp_path / "text.warc"
    text.write_text("no archive")
    good = archive(tmp_path / "good.warc.gz", [page(9, ["http://a.example/9"])])
    output = tmp_path / "urls.parquet"
    for names, place, sentence in (
        ([text], output, "no record could be read: .*text.warc: it is damaged, or no WARC"),
        ([tmp_path / "none"], output, "there is no file"),
        ([tmp_path], output, r"is a folder: name the files in it, such as .*/\*.warc.gz"),
        (["none://x"], output, "none://x cannot be opened"),
        ([], output, "name at least one"),
        ([good], tmp_path, "must name a file"),
        ([good], tmp_path / "urls.json", "must end in .parquet or .csv"),
        ([good], tmp_path / "no" / "urls.parquet", "must name a file"),
    ):
        with pytest.raises(UserError, match=sentence):
            listed(names, place)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["good.warc.gz", "text.warc"]


def test_command_prints_a_summary_or_json(tmp_path):
    path = archive(tmp_path / "w.warc.gz", [page(n, ["http://a.example/1"]) for n in range(2)])
    bad = tmp_path / "bad\x1b.warc"
    bad.write_bytes(b"x")
    arguments = ["urls", str(path), str(bad), "--output", str(tmp_path / "urls.parquet"), "--workers", "1"]
    done = CliRunner().invoke(cli.app(), arguments)
    assert done.exit_code == 0, done.output
    assert "read      2 records in 2 files" in done.stdout
    assert "images    2\ndistinct  1 URL from the pages of 1 host\ndamaged   1 file\n" in done.stdout
    assert "bad\\x1b.warc: it is damaged, or no WARC" in done.stdout
    arguments[1] = str(tmp_path / "w*.warc.gz")
    answer = json.loads(CliRunner().invoke(cli.app(), [*arguments, "--json"]).stdout)
    assert (answer["pages"], answer["distinct"], list(answer["damaged"])) == (2, 1, [str(bad)])
    empty = archive(tmp_path / "w.warc.gz", [page(0, [])])
    nothing = CliRunner().invoke(cli.app(), ["urls", str(empty), *arguments[3:]])
    assert (nothing.exit_code, "Nothing was found" in nothing.stdout) == (1, True)
