"""Pages ask for nothing from elsewhere, whatever was put into a run: their own policy forbids it."""

import re
from pathlib import Path

import pytest

import ingest.report
from pipeline.report import page

FOLDER = Path(page.__file__).parent
PAGES = [path.name for path in sorted(FOLDER.glob("*.html")) if "<!doctype html>" in path.read_text()]
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">')


def test_S1_all_pages_have_the_gallery_s_policy() -> None:
    gallery = (Path(ingest.report.__file__).parent / "gallery.html").read_text()
    policy = page.environment().get_template("policy.html")
    for plays, said in (({}, ""), ({"plays": True}, " media-src data:;")):
        found = POLICY.findall(re.sub(r"{%.*%} media-src data:;{% endif %}", said, gallery))
        assert POLICY.findall(policy.render(**plays)) == found
        assert len(found) == 1
    assert [
        *("cifar10.html", "classifiers.html", "clips.html", "compare.html", "figures.html", "report.html"),
        *("run.html", "tags.html"),
    ] == PAGES


@pytest.mark.parametrize("name", PAGES)
def test_S1_a_page_has_its_policy_before_anything_that_it_forbids_and_keeps_to_it(name: str) -> None:
    text = (FOLDER / name).read_text()
    before, _, after = text.partition('{% include "policy.html" %}')
    assert set(re.findall(r"<(\w+)", before.partition("<!doctype html>")[2])) == {"html", "head", "meta"}
    assert not re.search(r"<script|<link|<iframe|<form|\son\w+=|url\(|@import|[\w\s)]\|\s*safe", after)
    sources = re.findall(r'src="([^"]*)"', after)
    assert all(
        source.startswith("{{ ")
        and source.endswith((".picture }}", "picture }}", ".original }}", "player.video }}"))
        for source in sources
    )
