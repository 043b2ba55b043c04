"""Lists of files: paths relative to the list, as data sets come with them."""

import pytest

from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import open_dataset
from ingest.dataset.plan_record import SourceKind
from ingest.image.check import Treatment
from ingest.plan.settings import CrawlSettings
from ingest.sources.opening import open_listing
from ingest.sources.url_list import Columns


def kind_of(path, text):
    path.write_text(text)
    return open_listing(str(path), Columns()).kind


def test_D2_the_files_of_a_list_are_read_from_beside_it(tmp_path, scene):
    for number, name in enumerate(("a/1.png", "b/2 ü.png", "elsewhere/3.png")):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        scene(number).save(tmp_path / "set" / name)
    (tmp_path / "set" / "list").mkdir()
    (tmp_path / "set" / "list" / "l.csv").write_text(
        "file_name,label,caption\n"
        "../a/1.png,cat,one\n"
        "../b/2 ü.png,dog,two\n"
        f"{tmp_path}/set/elsewhere/3.png,cat,three\n"
        f"file://{tmp_path}/set/a/1.png,cat,again\n"
        "../gone.png,dog,four\n"
        "../a,dog,five\n"
    )
    report = crawl_shards(
        [str(tmp_path / "set" / "list" / "l.csv")],
        tmp_path / "out",
        CrawlSettings(treatment=Treatment(phash=False)),
        workers=1,
        progress=lambda counts: None,
    )
    assert report.counts.kept == 4
    assert (report.counts.rejected, report.counts.failed) == ({"not_a_file": 1}, {"file_missing": 1})
    rows = open_dataset(tmp_path / "out").kept_rows(0, ["url", "labels", "caption"]).to_pylist()
    assert [(row["labels"], row["caption"]) for row in rows] == [
        (["cat"], "one"),
        (["dog"], "two"),
        (["cat"], "three"),
        (["cat"], "again"),
    ]
    assert rows[1]["url"] == "l.csv/../b/2 ü.png"


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("l.csv", "path\nnowhere.jpg\n", SourceKind.FILES),
        ("l.csv", "image,label\nthere.jpg,x\ngone.jpg,x\n", SourceKind.FILES),
        ("l.csv", "image,label\ngone.jpg,x\n", SourceKind.URLS),
        ("l.csv", "path\nhttps://example.org/1.jpg\n", SourceKind.URLS),
        ("l.csv", "url\nthere.jpg\nhttps://example.org/1.jpg\n", SourceKind.URLS),
        ("l.txt", "there.jpg\n", SourceKind.FILES),
        ("l.txt", "file://[x\nthere.jpg\n", SourceKind.FILES),
        ("l.txt", "example.org/there.jpg\n", SourceKind.URLS),
        ("l.jsonl", '{"file_name": "there.jpg"}\n', SourceKind.FILES),
    ],
)
def test_a_list_is_of_files_if_they_are_there_or_are_called_paths(tmp_path, name, text, kind):
    (tmp_path / "there.jpg").write_bytes(b"")
    assert kind_of(tmp_path / name, text) == kind


def test_a_list_from_elsewhere_names_no_files_of_ours(tmp_path):
    (tmp_path / "there.jpg").write_bytes(b"")
    (tmp_path / "l.csv").write_text("path\nthere.jpg\n")
    assert open_listing(f"file://{tmp_path}/l.csv", Columns()).kind == SourceKind.URLS
