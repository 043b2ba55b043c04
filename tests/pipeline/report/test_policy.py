"""Pages ask for nothing from elsewhere, whatever was put into a run: their own policy forbids it."""

import re
from pathlib import Path

import pytest

import ingest.report
from pipeline.report import page

FOLDER = Path(page.__file__).parent
TEMPLATES = sorted(path.name for path in FOLDER.glob("*.html"))
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">')


def test_S1_all_pages_have_the_gallery_s_policy() -> None:
    gallery = (Path(ingest.report.__file__).parent / "gallery.html").read_text()
    policy = page.environment().get_template("policy.html")
    for plays, said in (({}, ""), ({"plays": True}, " media-src data:;")):
        found = POLICY.findall(re.sub(r"{%.*%} media-src data:;{% endif %}", said, gallery))
        assert POLICY.findall(policy.render(**plays)) == found
        assert len(found) == 1


def test_S1_all_pages_have_it_before_anything_that_it_forbids() -> None:
    before, _, _ = (FOLDER / "base.html").read_text().partition('{% include "policy.html" %}')
    assert set(re.findall(r"<(\w+)", before.partition("<!doctype html>")[2])) == {"html", "head", "meta"}
    begun = {name for name in TEMPLATES if re.search(r"<(html|head|body)\b", (FOLDER / name).read_text())}
    assert begun == {"base.html"}
    pages = {
        name for name in TEMPLATES if (FOLDER / name).read_text().startswith('{% extends "base.html" %}')
    }
    assert pages == {
        *("cifar10.html", "classifiers.html", "clips.html", "compare.html", "figures.html", "report.html"),
        *("run.html", "tags.html"),
    }


@pytest.mark.parametrize("name", TEMPLATES)
def test_S1_a_page_keeps_to_it(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert not re.search(r"<script|<link|<iframe|<form|\son\w+=|url\(|@import|[\w\s)]\|\s*safe", text)
    sources = re.findall(r'src="([^"]*)"', text)
    assert all(
        source.startswith("{{ ")
        and source.endswith((".picture }}", "picture }}", ".original }}", ".video }}"))
        for source in sources
    )
