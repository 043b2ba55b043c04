"""The page of `ingest show`: self-contained, shows real pixels, and no name from the wild can act in it."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_web import MARKUP, crawl_small_web

from cluster.errors import UserError
from cluster.wording import visible
from ingest.dataset.view import write_view
from ingest.report.duplicate_groups import read_groups
from ingest.report.gallery import BINS, chart, show
from ingest.report.histogram import Histogram
from ingest.report.stats import count
from ingest.report.thumbnails import draw_positions

VOID = {"meta", "img", "br", "rect"}


class Page(HTMLParser):
    """Elements with their attributes, and the text that a reader sees."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self.open = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID or tag == "rect":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "title"):
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(dataset, *, view=None, samples=60, seed=0):
    stats = count(dataset, progress=lambda done, total: None)
    return show(str(dataset), stats, view=view, samples=samples, seed=seed).text


def pictures(page):
    return [
        Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,"))))
        for image in page.all("img")
    ]


@pytest.fixture
def hostile(tmp_path, scene, crawl):
    """Folders, files and a source whose names are markup, reverse text, or are no text at all."""
    source = tmp_path / "<b>source"
    label = source / "<script>alert('label')<"
    label.mkdir(parents=True)
    scene(0).save(label / "a.png")
    (label / "a.txt").write_text("<img src=x onerror=alert(2)>\u202ea caption")
    scene(1).save(source / '"><img src=x onerror=alert(1)>.png')
    for name in (
        b"<script>alert(1)<.jpg",
        b"\xe2\x80\xaegpj.exe",
        b"\xff\xfe{{ 7 * 7 }}",
        b"a\nb\x1b[31m\x07",
    ):
        (source / os.fsdecode(name)).write_text("no picture")
    crawl([source], tmp_path / "out")
    return tmp_path / "out"


def test_hostile_names_are_shown_and_cannot_act(hostile):
    html = page_of(hostile)
    page = Page(html)
    assert not page.open, "an element is left open"
    assert not {"script", "iframe", "object", "embed", "form", "base", "b2"} & {
        tag for tag, _ in page.elements
    }
    assert len(page.all("img")) == 2
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
    text = "".join(page.text)
    for shown in (
        "<b>source/<script>alert(1)<.jpg",
        "<script>alert('label')<",
        "\\u202egpj.exe",
        "<img src=x onerror=alert(2)>\\u202ea caption",
        "{{ 7 * 7 }}",
        "a\\nb\\x1b[31m\\x07",
    ):
        assert shown in text
    assert "\u202e" not in html
    assert "\x1b" not in html
    html.encode("utf-8")


def test_page_needs_nothing_from_elsewhere(hostile):
    html = page_of(hostile)
    page = Page(html)
    policy = [
        meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert not page.all("link")
    assert all(anchor["href"].startswith("#") for anchor in page.all("a"))
    assert not re.search(r"url\(|@import|https?://", html)


def test_samples_are_the_datasets_pictures(tmp_path, scene, crawl):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(5):
        scene(number, 300, 200).save(source / f"{number}.png")
    crawl([source], tmp_path / "out", unit_rows=2)
    shown = pictures(Page(page_of(tmp_path / "out")))
    assert len(shown) == 5
    for number, picture in enumerate(shown):
        expected = np.asarray(scene(number, 300, 200), float)
        assert picture.size == (300, 200)
        assert np.abs(np.asarray(picture, float) - expected).mean() < 6, "JPEG of quality 80 and no more"


def test_thumbnails_are_small_and_keep_the_ratio(tmp_path, scene, crawl):
    source = tmp_path / "source"
    source.mkdir()
    scene(0, 2000, 1000).save(source / "wide.jpg")
    scene(1, 300, 1200).save(source / "tall.png")
    crawl([source], tmp_path / "out")
    assert [picture.size for picture in pictures(Page(page_of(tmp_path / "out")))] == [(60, 240), (480, 240)]


def test_seed_and_number_choose_the_samples(folder, crawl, tmp_path):
    crawl([folder(count=30)], tmp_path / "out", unit_rows=7)
    one, again, other = (page_of(tmp_path / "out", samples=8, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert len(Page(one).all("img")) == 8
    assert len(Page(page_of(tmp_path / "out", samples=0)).all("img")) == 0
    assert "8 of 30 images" in one
    assert "All 30 images" in page_of(tmp_path / "out")


@given(total=st.integers(0, 10**10), samples=st.integers(0, 50), seed=st.integers(0, 5))
def test_positions_are_distinct_and_in_range(total, samples, seed):
    positions = draw_positions(total, samples, seed)
    assert positions == sorted(set(positions))
    assert len(positions) == min(samples, total)
    assert all(0 <= position < total for position in positions)


def test_damaged_image_shows_as_damage_in_its_place(tmp_path, scene, crawl):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        scene(number, 24, 16).save(source / f"{number}.bmp")
    crawl([source], tmp_path / "out")
    shard = next((tmp_path / "out" / "shards").rglob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[512 + 200] ^= 1
    shard.write_bytes(data)
    page = Page(page_of(tmp_path / "out"))
    assert len(page.all("figure")) == 3
    assert len(page.all("img")) == 2
    assert "damaged: not the bytes that were kept" in "".join(page.text)
    assert "2 of 3 images; 1 that cannot be shown is damaged" in "".join(page.text)
    shard.unlink()
    assert "".join(Page(page_of(tmp_path / "out")).text).count("damaged: ") == 3


def test_page_of_a_dataset_without_one_image(tmp_path, crawl):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(60):
        (source / f"{number:02}.jpg").write_text("no picture")
    crawl([source], tmp_path / "out")
    text = "".join(Page(page_of(tmp_path / "out")).text)
    assert "Nothing was kept" in text
    assert "60 rejected: not_an_image" in text
    assert "and 10 more" in text


def test_page_of_a_dataset_copied_without_its_plan(folder, crawl, tmp_path):
    crawl([folder()], tmp_path / "out")
    (tmp_path / "out" / "plan" / "0" / "plan.json").unlink()
    assert "plan/0/plan.json" in "".join(Page(page_of(tmp_path / "out")).text)


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=200))
def test_every_value_is_in_one_bar(values):
    histogram = Histogram()
    found, times = np.unique(values, return_counts=True)
    histogram.add(found, times, smallest=min(values), largest=max(values), total=sum(values))
    drawn = chart("sizes", histogram, unit="px")
    assert sum(bar.count for bar in drawn.bars) == len(values)
    assert 1 <= len(drawn.bars) <= BINS
    assert max(bar.height for bar in drawn.bars) == 100
    assert 1 <= len(drawn.ticks) <= 3
    assert drawn.ticks[0] == f"{min(values):,} px"
    assert drawn.ticks[-1] == f"{max(values):,} px"


@given(st.text())
def test_visible_text_is_printable_and_leaves_printable_text_alone(text):
    assert visible(text).isprintable()
    if text.isprintable():
        assert visible(text) == text


def write_duplicates(path, name, rows, *, against=()):
    """The list that lies beside a view: rows of winner, key, distance, exact, evaluation."""
    columns = [[row[column] for row in sorted(rows)] for column in range(5)]
    schema = pa.schema(
        [("winner", pa.uint64()), ("key", pa.uint64()), ("distance", pa.uint8()), ("exact", pa.bool_()),
         ("evaluation", pa.uint16())],
        metadata={"root": "", "settings": json.dumps({"hamming": 3, "against": list(against)})},
    )  # fmt: skip
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    pq.write_table(pa.table(arrays, schema=schema), path / "views" / f"{name}.duplicates.parquet")


@pytest.fixture
def viewed(tmp_path, scene, crawl):
    """Ten pictures in units of four, and a view that keeps those with even numbers."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(10):
        scene(number, 300, 200).save(source / f"{number}.png")
    report = crawl([source], tmp_path / "out", unit_rows=4)
    keeps = {unit: np.arange(size) % 2 == 0 for unit, size in enumerate((4, 4, 2))}
    write_view(tmp_path / "out", "even", root=report.root, keeps=keeps)
    return tmp_path / "out"


def is_scene(picture, scene, number):
    return np.abs(np.asarray(picture, float) - np.asarray(scene(number, 300, 200), float)).mean() < 6


def test_view_shows_its_own_samples(viewed, scene):
    page = Page(page_of(viewed, view="even"))
    shown = pictures(page)
    assert [is_scene(picture, scene, 2 * place) for place, picture in enumerate(shown)] == [True] * 5
    text = "".join(page.text)
    assert "All 5 images in the view even" in text
    assert "keeps 5 of 10 images" in text
    assert "Duplicates" not in text


def test_duplicates_show_the_winner_beside_what_was_left_out_for_it(viewed, scene):
    rows = [(0, 1, 0, True, None), (0, 100_001, 1, False, None), (100_002, 200_001, 3, False, None)]
    write_duplicates(viewed, "even", rows)
    page = Page(page_of(viewed, view="even", samples=0))
    shown = pictures(page)
    assert [is_scene(picture, scene, n) for picture, n in zip(shown, (0, 1, 5, 6, 9), strict=True)] == (
        [True] * 5
    )
    text = "".join("".join(page.text).split())
    assert "3imagesin2groups." in text
    assert "stays0000000000000equalbytes00000000000011bitapart0000000100001" in text
    assert "stays00000001000023bitsapart0000000200001" in text
    assert "Duplicates" not in page_of(viewed), "without the view there are no groups"


def test_duplicates_of_evaluations_and_missing_samples_are_tiles_of_text(viewed):
    write_duplicates(
        viewed, "even", [(7, 1, 2, False, 1), (9_900_000, 3, 0, True, None)], against=["a" * 64, "b" * 64]
    )
    page = Page(page_of(viewed, view="even", samples=0))
    text = " ".join("".join(page.text).split())
    assert "an image of an evaluation root bbbbbbbbbbbb…" in text.replace("evaluationroot", "evaluation root")
    assert "not in this dataset" in text
    assert len(page.all("img")) == 2


def test_largest_groups_come_first_and_most_members_are_counted_not_shown(viewed):
    rows = [(winner, 200_001, 1, False, None) for winner in range(1000, 1100)]
    rows += [(2000, 200_000, 0, True, None)] * 500
    write_duplicates(viewed, "even", rows)
    groups = read_groups(viewed, "even", seed=0)
    assert (groups.groups, groups.dropped) == (101, 600)
    assert (groups.largest[0].winner, groups.largest[0].dropped) == (2000, 500)
    assert len(groups.largest[0].members) < 20
    drawn = [group.winner for group in groups.drawn]
    assert drawn == sorted(set(drawn) - {group.winner for group in groups.largest})
    assert drawn == [group.winner for group in read_groups(viewed, "even", seed=0).drawn]
    assert drawn != [group.winner for group in read_groups(viewed, "even", seed=1).drawn]
    assert "and 489 more" in " ".join("".join(Page(page_of(viewed, view="even")).text).split())


def test_damaged_list_of_duplicates_and_unknown_view_are_one_sentence(viewed):
    with pytest.raises(UserError, match="no view named odd: it has even"):
        page_of(viewed, view="odd")
    path = viewed / "views" / "even.duplicates.parquet"
    for data in (b"gone", (viewed / "views" / "even.parquet").read_bytes()):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"even\.duplicates\.parquet is not a list of duplicates"):
            page_of(viewed, view="even")


def test_what_was_not_fetched_is_shown_with_reason_url_and_answer(tmp_path):
    crawl_small_web(tmp_path)
    html = page_of(tmp_path / "web")
    page = Page(html)
    assert not {"script", "iframe"} & {tag for tag, _ in page.elements}
    text = " ".join("".join(page.text).split())
    assert "2 failed: http_404" in text
    assert f"/{visible(MARKUP)} HTTP 404" in text
    assert "1 failed: http_503 (1 may succeed later)" in text
    assert re.search(r"/private/8\.jpg (?!HTTP)", text), "nothing was answered, and no answer is shown"
    assert "3 hosts" in text
    assert "robots.txthonoured" in text
    assert "X-Robots-Taghonoured" in text
    assert "\u202e" not in html
