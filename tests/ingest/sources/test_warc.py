"""Images in web archives: each found once, read from its own offset, in bounds whatever the file says."""

import gzip
import os
import re
import tarfile
import zlib

import pyarrow.parquet as pq
import pytest
from archives import archive, coded, record, response
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from ingest.dataset.open import sealed_units
from ingest.problem import PROBLEMS
from ingest.sources.opening import open_images
from ingest.sources.tar import TarSource
from ingest.sources.tar_bytes import TarError, Unpacked
from ingest.sources.warc import WarcSource, is_warc

MAX = 1 << 20
INFO = record("warcinfo", "", b"software: test\r\n", content_type="application/warc-fields")


@pytest.fixture(scope="module")
def picture(encode, scene):
    return encode(scene(1), "JPEG")


def read(path, max_bytes=MAX):
    source = WarcSource(path)
    items = list(source.items())
    data = list(source.read(items, max_bytes=max_bytes))
    source.close()
    return [(item.path.decode("latin-1"), each) for item, each in zip(items, data, strict=True)]


@pytest.mark.parametrize("compression", ["gzip", "lz4", "zstd", "plain"])
def test_image_responses_are_found_by_type_or_content(tmp_path, picture, compression):
    records = [
        INFO,
        record("request", "http://a.example/1.jpg", b"GET / HTTP/1.1\r\n\r\n"),
        response("http://a.example/1.jpg", picture, "image/jpeg"),
        response("http://a.example/page", b"<img src=1.jpg>"),
        response("http://a.example/lies", picture, "text/html"),
        response("http://a.example/not", b"no picture", "image/png; x=y"),
        response("http://a.example/404", picture, "image/jpeg", status="404 Not Found"),
        record("revisit", "http://a.example/again", b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n"),
        record("resource", "http://a.example/resource", picture, content_type="image/jpeg"),
        record("response", "dns:a.example", b"1.2.3.4", content_type="text/dns"),
        record("response", "<http://a.example/old>", b"HTTP/1.0 200\r\n\r\n" + picture),
        record("response", "http://a.example/none", b""),
    ]
    path = archive(tmp_path / "w.warc.gz", records, compression)
    kept = [("http://a.example/" + name, picture) for name in ("1.jpg", "lies")]
    rest = [("http://a.example/" + name, picture) for name in ("resource", "old")]
    assert read(path) == [*kept, ("http://a.example/not", b"no picture"), *rest]
    source = open_images(str(path))
    items = list(source.items())
    last = list(source.read([items[-1], items[0]], max_bytes=MAX))
    assert last == [picture, picture]


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "chunked", "identity"])
def test_D4_codings_are_undone_in_bounds(tmp_path, picture, coding):
    header = "Transfer-Encoding" if coding == "chunked" else "Content-Encoding"
    body = picture if coding == "identity" else coded(picture, coding)
    records = [response("http://a.example/", body, "image/jpeg", headers=f"{header}: {coding}\r\n")]
    path = archive(tmp_path / "w.warc.gz", records)
    assert read(path) == [("http://a.example/", picture)]
    assert read(path, max_bytes=len(picture) - 1) == [("http://a.example/", PROBLEMS["too_many_bytes"])]


def test_crawlers_that_decode_and_leave_the_header(tmp_path, picture):
    headers = "Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n"
    path = archive(tmp_path / "w.warc.gz", [response("http://a/", picture, "image/jpeg", headers=headers)])
    assert read(path) == [("http://a/", picture)]


def test_D4_bombs_are_rejected_without_being_unpacked(tmp_path):
    bomb = zlib.compress(zlib.compress(bytes(1 << 26)))
    headers = "Content-Encoding: deflate, deflate\r\n"
    records = [response("http://a/", bomb, "image/png", headers=headers)]
    assert read(archive(tmp_path / "w.warc", records, "plain")) == [("http://a/", PROBLEMS["too_many_bytes"])]


def test_D4_what_is_damaged_is_a_row_and_what_follows_is_read(tmp_path, picture):
    records = [response(f"http://a/{number}", picture, "image/jpeg") for number in range(4)]
    path = archive(tmp_path / "w.warc.gz", records)
    whole = path.read_bytes()
    third = len(gzip.compress(records[0], mtime=0)) * 2
    first = [(f"http://a/{number}", picture) for number in range(2)]
    path.write_bytes(whole[: third + 10] + b"\xff" * 40 + whole[third + 50 :])
    assert read(path) == [*first, ("", PROBLEMS["warc_damaged"]), ("http://a/3", picture)]
    path.write_bytes(whole[: third + 400])
    assert read(path)[:2] == first
    assert read(path)[2:] == [("http://a/2", PROBLEMS["warc_truncated"])]


def test_what_changed_since_planning_is_not_taken_for_the_image(tmp_path, picture):
    path = archive(tmp_path / "w.warc.gz", [response(f"http://a/{n}", picture, "image/jpeg") for n in "ab"])
    items = list(WarcSource(path).items())
    archive(path, [response(f"http://a/{n}", picture, "image/jpeg") for n in "cd"])
    source = WarcSource(path)
    assert list(source.read(items, max_bytes=MAX)) == [PROBLEMS["warc_damaged"]] * 2
    path.unlink()
    assert list(WarcSource(path).read(items, max_bytes=MAX)) == [PROBLEMS["io_error"]] * 2


def test_problems_are_known_while_planning(tmp_path, picture):
    cut = response("http://a/cut", picture, "image/jpeg", extra="WARC-Truncated: length\r\n")
    path = archive(tmp_path / "w.warc.gz", [cut])
    assert read(path) == [("http://a/cut", PROBLEMS["response_truncated"])]
    records = [INFO] + [
        response(f"http://a/{number}", os.urandom(60_000), "image/png") for number in range(3)
    ]
    archive(path, records, "whole")
    assert {problem for _, problem in read(path)} == {PROBLEMS["warc_not_by_record"]}


def test_archives_are_told_from_other_files(tmp_path):
    path = tmp_path / "x"
    for data in (b"", b"WARC", b"GIF89a", gzip.compress(b"hello"), b"WARC/1.0\r\n" + b"x" * 100_000):
        path.write_bytes(data)
        assert not is_warc(path)
        with pytest.raises(UserError, match=r"nor a WARC file|is an image"):
            open_images(str(path))
    assert is_warc(archive(path, [INFO]))


@pytest.mark.parametrize("opener", [open, gzip.open])
def test_an_arc_is_refused_by_its_name(tmp_path, opener):
    with opener(tmp_path / "x.arc", "wb") as file:
        file.write(b"filedesc://x.arc 0.0.0.0 20080430204825 text/plain 76\n1 0 Internet Archive\n")
    with pytest.raises(UserError, match=r"is an ARC file.*warcio"):
        open_images(str(tmp_path / "x.arc"))


def test_a_crawl_of_an_archive_names_the_addresses(tmp_path, crawl, encode, scene):
    pictures = [encode(scene(number), "PNG") for number in range(5)]
    records = [response(f"http://a.example/{n}.png", data, "image/png") for n, data in enumerate(pictures)]
    path = archive(tmp_path / "w.warc.gz", [*records, response("http://a.example/x", b"text", "image/png")])
    report = crawl([path], tmp_path / "out", unit_rows=2)
    assert (report.counts.planned, report.counts.kept) == (6, 5)
    again = crawl([path], tmp_path / "again", unit_rows=2, workers=2)
    assert again.root == report.root
    metas = sealed_units(report.output, report.root)["meta"].to_pylist()
    rows = [row for meta in metas for row in pq.read_table(report.output / meta).to_pylist()]
    assert sorted(row["url"] for row in rows)[:2] == ["http://a.example/0.png", "http://a.example/1.png"]
    assert not any(row["labels"] for row in rows)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_D4_no_bytes_raise(tmp_path_factory, picture, data):
    path = tmp_path_factory.mktemp("w") / "w.warc"
    records = [INFO, response("http://a/", picture[:200], "image/jpeg", headers="Content-Encoding: gzip\r\n")]
    whole = archive(path, records, data.draw(st.sampled_from(["gzip", "lz4", "zstd", "plain"]))).read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    path.write_bytes(
        whole[:at] + data.draw(st.binary(max_size=20)) + whole[at + data.draw(st.integers(0, 20)) :]
    )
    is_warc(path)
    read(path)


@pytest.mark.parametrize("compression", ["gzip", "lz4", "zstd", "plain"])
def test_D4_the_next_record_is_found_behind_anything(tmp_path, picture, compression):
    records = [INFO, *(response(f"http://a/{number}", picture, "image/jpeg") for number in range(6))]
    each = [archive(tmp_path / "one", [one], compression).read_bytes() for one in records]
    path = tmp_path / "w.warc.gz"
    nothing = ("", PROBLEMS["warc_damaged"])
    right = [(f"http://a/{number}", picture) for number in range(6)]
    path.write_bytes(b"".join([*each[:3], bytes(300), *each[3:]]))
    assert read(path) == [*right[:2], nothing, *right[2:]]
    # The third image's record begins with other bytes, and the fifth's is damaged within.
    bad = each[3][:2] + b"?!" + each[3][4:]
    at = len(each[5]) // 2
    worse = each[5][:at] + bytes(byte ^ 0xFF for byte in each[5][at : at + 9]) + each[5][at + 9 :]
    path.write_bytes(b"".join([*each[:3], bad, each[4], worse, each[6]]))
    found = read(path)
    assert [pair for pair in found if pair[1] == picture] == [right[0], right[1], right[3], right[5]]
    assert len(found) <= 7
    # Nothing is there at all but the last.
    path.write_bytes(b"".join([each[0], bytes(1000), each[6]]))
    assert read(path) == [nothing, right[5]]


def test_D4_a_body_shorter_than_it_is_said_to_be_loses_no_other(tmp_path, picture):
    records = [response(f"http://a/{number}", picture, "image/jpeg") for number in range(3)]
    records[0] = records[0].replace(b"Content-Length: ", b"Content-Length: 0", 1)
    length = len(records[0].split(b"\r\n\r\n", 1)[1]) - 4
    records[0] = records[0].replace(b"%d" % length, b"%d" % (length - 1), 1)
    found = read(archive(tmp_path / "w.warc.gz", records))
    assert found == [
        ("http://a/0", picture[:-1]),
        ("", PROBLEMS["warc_damaged"]),
        *((f"http://a/{number}", picture) for number in (1, 2)),
    ]


def lowered(one, names=b"content-length"):
    """A record in whose head these names are in lower case."""
    head, _, rest = one.partition(b"\r\n\r\n")
    head = re.sub(rb"(?im)^(%b)(?=:)" % names, lambda name: name[0].lower(), head)
    return head + b"\r\n\r\n" + rest


@pytest.mark.parametrize("compression", ["gzip", "plain"])
@pytest.mark.parametrize("names", [b"warc-type", b"content-length", b"warc-[a-z-]*|content-[a-z]*"])
def test_names_in_a_record_are_in_any_case(tmp_path, picture, compression, names):
    records = [INFO, *(response(f"http://a/{number}", picture, "image/jpeg") for number in range(3))]
    path = archive(tmp_path / "w.warc", [lowered(each, names) for each in records], compression)
    assert is_warc(path)
    assert read(path) == [(f"http://a/{number}", picture) for number in range(3)]


def test_D4_damage_in_records_with_names_in_any_case_is_a_row(tmp_path, picture):
    records = [lowered(response(f"http://a/{number}", picture, "image/jpeg")) for number in range(3)]
    packed = [gzip.compress(each, mtime=0) for each in records]
    right = [(f"http://a/{number}", picture) for number in range(3)]
    at = len(packed[1]) // 2
    path = tmp_path / "w.warc.gz"
    path.write_bytes(packed[0] + packed[1][:at] + b"\xff" * 60 + packed[1][at + 60 :] + packed[2])
    assert read(path) == [right[0], ("", PROBLEMS["warc_damaged"]), right[2]]
    for whole in (packed, records):
        path.write_bytes(whole[0] + whole[1][: len(whole[1]) // 2])
        assert read(path) == [right[0], ("", PROBLEMS["warc_truncated"])]
    # What is said to be longer than it is.
    path.write_bytes(packed[0] + gzip.compress(records[1][:-100], mtime=0) + packed[2])
    assert read(path) == [right[0], ("", PROBLEMS["warc_truncated"]), right[2]]


def test_an_archive_that_cannot_be_read_while_planning_is_nothing_to_retry(tmp_path, picture, monkeypatch):
    path = archive(tmp_path / "w.warc.gz", [response(f"http://a/{n}", picture, "image/jpeg") for n in "ab"])
    source = WarcSource(path)
    path.unlink()
    (item,) = source.items()
    tar = tmp_path / "t.tar"
    with tarfile.open(tar, "w") as out:
        out.addfile(tarfile.TarInfo("1.jpg"))
        out.addfile(tarfile.TarInfo("2.jpg"))
    at_most = Unpacked.at_most

    def broken(unpacked, offset, size):
        if offset:
            raise TarError("io_error")
        return at_most(unpacked, offset, size)

    monkeypatch.setattr(Unpacked, "at_most", broken)
    *_, last = TarSource(tar).items()
    for problem in (item.problem, last.problem):
        assert PROBLEMS[problem].reason == "archive_unreadable"
        assert not PROBLEMS[problem].retryable


def test_heads_with_short_line_ends_and_other_good_answers(tmp_path, picture):
    records = [response(f"http://a/{n}", picture, "image/jpeg", status=f"20{n} x") for n in (0, 3)]
    lf = b"HTTP/1.1 200 OK\nContent-Type: image/jpeg\nX-Robots-Tag: all\n\n" + picture
    path = archive(tmp_path / "w.warc.gz", [*records, record("response", "http://a/lf", lf)])
    assert read(path) == [(f"http://a/{name}", picture) for name in ("0", "3", "lf")]


def test_what_an_answer_asks_of_robots_is_heeded_as_when_it_is_fetched(tmp_path, picture):
    tag = "X-Robots-Tag: noai\r\n"
    path = archive(tmp_path / "w.warc.gz", [response("http://a/1", picture, "image/jpeg", headers=tag)])
    assert read(path) == [("http://a/1", PROBLEMS["x_robots_tag"])]
    assert [item.problem for item in WarcSource(path, heeded=frozenset()).items()] == [""]
