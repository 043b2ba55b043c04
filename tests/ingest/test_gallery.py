"""The page of `ingest show`: self-contained, shows real pixels, and no name from the wild can act in it."""

import base64
import io
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ingest.gallery import BINS, chart, show
from ingest.histogram import Histogram
from ingest.stats import count
from ingest.thumbnails import draw_positions
from ingest.wording import visible

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
    return show(str(dataset), stats, view=view, samples=samples, seed=seed)


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


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=200), st.sampled_from([1, 8]))
def test_every_value_is_in_one_bar(values, cell):
    histogram = Histogram(cell=cell)
    histogram.add(np.array(values, np.int64))
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
