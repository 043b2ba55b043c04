"""Tars that others made for WebDataset: what belongs to an image goes into its row, and nothing is lost."""

import gzip
import io
import json
import tarfile
from itertools import pairwise

import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.dataset.open import open_dataset, sealed_units
from ingest.plan.freeze import freeze
from ingest.plan.plan import items_of
from ingest.plan.settings import CrawlSettings
from ingest.sources import companions
from ingest.sources.companions import LARGEST_COMPANION, MOST_LABELS, joined, member_of
from ingest.sources.opening import open_listing
from ingest.sources.source import Item
from ingest.sources.tar import TarSource
from ingest.sources.url_list import Columns
from ingest.store.posix import PosixStore

KINDS = ["jpg", "txt", "json", "cls", "caption", "label", "npy", "left.png", ""]


def archive(path, members, *, opener=open):
    with opener(path, "wb") as file, tarfile.open(fileobj=file, mode="w|") as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def listed(path):
    return {item.path.decode(): item for item in TarSource(path).items()}


def member(path, text=b"", offset=0):
    return member_of(Item(path.encode(), offset=offset), lambda item: text)


def rows_of(output):
    metas = sealed_units(output, open_dataset(output).root)["meta"].to_pylist()
    return [row for meta in metas for row in pq.read_table(output / meta).to_pylist()]


def test_a_webdataset_keeps_captions_labels_and_urls(tmp_path, scene, encode, crawl):
    pictures = [encode(scene(number), "PNG") for number in range(5)]
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as out:
        for number, data in enumerate(pictures):
            said = {"url": f"http://a.example/{number}", "width": 48, "tags": ["b", "a"]}
            out.write({"__key__": f"{number:03}", "png": data, "txt": f"Café {number}\n", "json": said})
        out.write({"__key__": "100", "jpg": b"no picture", "cls": 7})
        out.write({"__key__": "101", "txt": "of nothing"})
    crawl([tmp_path / "x.tar"], tmp_path / "out", unit_rows=4)
    rows = rows_of(tmp_path / "out")
    assert [row["url"] for row in rows] == [
        *(f"x.tar/{number:03}.png" for number in range(5)),
        "x.tar/100.jpg",
        "x.tar/101.txt",
    ]
    assert [row["caption"] for row in rows] == [*(f"Café {number}" for number in range(5)), None, None]
    assert [row["source_url"] for row in rows[:5]] == [f"http://a.example/{number}" for number in range(5)]
    assert json.loads(rows[3]["json"]) == {"width": 48, "tags": ["b", "a"]}
    assert (rows[5]["reason"], rows[5]["labels"]) == ("not_an_image", ["7"])
    assert rows[6]["reason"] == "not_an_image"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        pytest.param({"txt": b" a dog \n"}, ("a dog", (), {}), id="txt"),
        pytest.param({"caption": b"a cat", "txt": b""}, ("a cat", (), {}), id="an empty caption is none"),
        pytest.param({"cls": b"12"}, (None, ("12",), {}), id="cls"),
        pytest.param({"label": b"#sky #sea"}, (None, ("sky", "sea"), {}), id="hashtags"),
        pytest.param({"TXT": b"loud"}, ("loud", (), {}), id="capital letters"),
        pytest.param({"txt": b"caf\xe9"}, ("caf\\xe9", (), {}), id="no UTF-8"),
        pytest.param({"json": b'{"text": "t", "labels": [3, "b"]}'}, ("t", ("3", "b"), {}), id="json"),
        pytest.param({"json": b'{"hashtags": "#a #b"}'}, (None, ("a", "b"), {}), id="json hashtags"),
        pytest.param(
            {"txt": b"said", "cls": b"1", "json": b'{"caption": "said", "alt": "other", "label": "2"}'},
            ("said", ("1",), {"json": '{"alt": "other", "label": "2"}'}),
            id="members count more than json, which keeps what differs",
        ),
        pytest.param(
            {"json": b'{"url": "http://x/", "b": 1, "a": "\\ud83d"}'},
            (None, (), {"source_url": "http://x/", "json": '{"a": "\\ud83d", "b": 1}'}),
            id="half a character",
        ),
        pytest.param({"json": b"[1, 2"}, (None, (), {"json": "[1, 2"}), id="no JSON"),
        pytest.param(
            {"json": b'{"caption": 5, "url": []}'},
            (None, (), {"json": '{"caption": 5, "url": []}'}),
            id="other types",
        ),
    ],
)
def test_what_companions_say(tmp_path, members, expected):
    path = archive(tmp_path / "x.tar", [("7.jpg", b"image"), *((f"7.{k}", d) for k, d in members.items())])
    (item,) = listed(path).values()
    assert (item.path, item.caption, item.labels, dict(item.extra)) == (b"7.jpg", *expected)


def test_only_members_that_follow_each_other_are_joined(tmp_path):
    names = ["a/1.txt", "a/1.jpg", "b/1.txt", "a/2.jpg", "a/3.jpg", "a/2.txt", "a/4.x.jpg", "a/4.x.txt"]
    found = listed(archive(tmp_path / "x.tar", [(name, name.encode()) for name in names]))
    assert list(found) == ["a/1.jpg", "b/1.txt", "a/2.jpg", "a/3.jpg", "a/2.txt", "a/4.x.jpg", "a/4.x.txt"]
    assert {name: item.caption for name, item in found.items() if item.caption} == {"a/1.jpg": "a/1.txt"}
    assert found["a/1.jpg"].labels == ("a",)


def test_images_of_one_sample_share_its_companions_and_a_repeated_name_begins_another(tmp_path):
    members = [("1.left.jpg", b"l"), ("1.right.jpg", b"r"), ("1.txt", b"both")]
    members += [("2.jpg", b"x"), ("2.txt", b"first"), ("2.jpg", b"y"), ("2.txt", b"second")]
    items = list(TarSource(archive(tmp_path / "x.tar", members)).items())
    assert [item.caption for item in items] == ["both", "both", "first", "second"]


@pytest.mark.parametrize("opener", [open, gzip.open])
def test_a_tar_without_companions_makes_the_same_dataset_as_before(tmp_path, folder, crawl, opener):
    source = folder(count=4)
    files = [(str(p.relative_to(source)), p.read_bytes()) for p in sorted(source.rglob("*.*"))]
    path = archive(tmp_path / "x.tar", files, opener=opener)
    crawl([path], tmp_path / "out")
    crawl([source], tmp_path / "reference")
    assert [{**row, "url": ""} for row in rows_of(tmp_path / "out")] == [
        {**row, "url": ""} for row in rows_of(tmp_path / "reference")
    ]


def test_D1_another_caption_is_another_plan(tmp_path):
    plans = []
    for caption in (b"one", b"two"):
        path = archive(tmp_path / "x.tar", [("1.jpg", b"image"), ("1.txt", caption)])
        store = PosixStore(tmp_path / caption.decode())
        plans.append(
            freeze(store, [open_listing(str(path), Columns())], CrawlSettings(), listed=lambda items: None)
        )
    assert plans[0].fingerprint != plans[1].fingerprint


def test_columns_of_tars_and_folders_lie_side_by_side(tmp_path, folder, crawl, scene, encode):
    members = [("1.jpg", encode(scene(1), "JPEG")), ("1.json", b'{"url": "http://x/1"}')]
    crawl([folder(count=2), archive(tmp_path / "x.tar", members)], tmp_path / "out")
    assert [row["source_url"] for row in rows_of(tmp_path / "out")] == [None, None, None, "http://x/1"]
    assert "json" not in rows_of(tmp_path / "out")[0]


def test_D4_long_texts_are_cut_and_make_small_units(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.plan.cut_into_units._CHUNK_BYTES", 5 * LARGEST_COMPANION)
    monkeypatch.setattr("ingest.sources.image_listing._BATCH", 2)
    long = "ü".encode() * LARGEST_COMPANION
    members = [(f"{n}.{kind}", data) for n in range(12) for kind, data in (("jpg", b"x"), ("txt", long))]
    source = open_listing(str(archive(tmp_path / "x.tar", members)), Columns())
    plan = freeze(PosixStore(tmp_path / "out"), [source], CrawlSettings(), listed=lambda items: None)
    assert [len(plan.table(unit)) for unit in plan.units] == [6, 6]
    assert all(item.caption == "ü" * (LARGEST_COMPANION // 2) for _, item in items_of(plan.table(0)))


def test_D4_few_long_texts_are_in_memory_at_a_time(tmp_path):
    members = [(f"{n}.{kind}", b"x" * 60_000) for n in range(400) for kind in ("jpg", "txt")]
    counts = [0]
    source = open_listing(str(archive(tmp_path / "x.tar", members)), Columns())
    plan = freeze(PosixStore(tmp_path / "out"), [source], CrawlSettings(), listed=counts.append)
    assert plan.rows == counts[-1] == 400
    assert max(after - before for before, after in pairwise(counts)) * 60_000 < 10_000_000


@pytest.mark.parametrize(
    ("kind", "text"),
    [("cls", b"ab," * 20_000), ("json", b'{"labels":[' + b"1000," * 12_000 + b"1]}")],
    ids=["text", "JSON"],
)
def test_D4_labels_without_end_are_cut(tmp_path, kind, text):
    path = archive(tmp_path / "x.tar", [("a.jpg", b"x"), (f"a.{kind}", text)])
    assert len(listed(path)["a.jpg"].labels) == MOST_LABELS


@pytest.mark.parametrize("depth", [50, 300, 900, 980, 990, 995, 1000, 2000, 30_000])
def test_D4_deep_json_is_text(tmp_path, depth):
    data = b'{"a": ' + b"[" * depth + b"]" * depth + b"}"
    (item,) = listed(archive(tmp_path / "x.tar", [("1.jpg", b"x"), ("1.json", data)])).values()
    assert item.extra["json"] == data.decode()


def test_D4_a_truncated_companion_has_a_row_of_its_own(tmp_path):
    path = archive(tmp_path / "x.tar", [("1.jpg", b"x"), ("1.txt", b"y" * 2000)])
    path.write_bytes(path.read_bytes()[:2100])
    items = list(TarSource(path).items())
    assert [(item.path, item.caption, item.problem) for item in items] == [
        (b"1.jpg", None, ""),
        (b"1.txt", None, ""),
        (b"", None, "tar_truncated"),
    ]


def test_D4_one_key_for_ever_is_held_in_bounds():
    held = 0

    def endless():
        nonlocal held
        for number in range(10_000):
            held += 1
            yield member(f"a.{number}.jpg")

    for number, _ in enumerate(joined(endless())):
        assert held - number <= companions._LARGEST_SAMPLE + 1
    assert number == 9_999


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c/a"]), st.sampled_from(KINDS)), max_size=25))
def test_D2_every_member_is_an_attempt_or_a_companion_of_one(names):
    members = [member(f"{key}.{kind}", b"said", offset=n) for n, (key, kind) in enumerate(names)]
    items = list(joined(members))
    places = {item.offset for item in items}
    assert len(places) == len(items)
    assert all(each.item.offset in places for each in members if each.text is None)
    for each in members:
        if each.item.offset not in places:
            key = each.item.path.partition(b".")[0]
            near = [item for item in items if abs(item.offset - each.item.offset) < len(KINDS)]
            assert any(item.path.startswith(key + b".") for item in near)


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=80)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.text() | st.sampled_from(["caption", "labels", "url", "hashtags"]), inner, max_size=4
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_D4_any_json_becomes_text_that_files_can_hold(data):
    (item,) = joined([member("1.jpg"), member("1.json", data)])
    for text in (item.caption or "", *item.labels, *item.extra.values()):
        assert len(text.encode()) <= 4 * LARGEST_COMPANION
