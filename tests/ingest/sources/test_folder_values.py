"""Values in names of folders, as Hive and Spark write them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingest.dataset.open import open_dataset, sealed_units
from ingest.sources.expand import expand
from ingest.sources.folder_values import InValuedFolder, folder_values
from ingest.sources.opening import open_listing
from ingest.sources.url_list import Columns


def listings(folder):
    for place in expand(str(folder)):
        yield InValuedFolder(open_listing(place, Columns()), folder_values(str(folder), place))


def test_values_are_columns_of_text_as_pyarrow_and_spark_write_them(tmp_path):
    rows = pa.table(
        {
            "url": [f"http://h/{number}.jpg" for number in range(4)],
            "lang": ["en", "de", None, "en"],
            "day": ["a b/c=d", "0001", "0001", "a b/c=d"],
            "label": ["cat", "dog", None, "cat"],
            "width": ["1", "2", "2", "1"],
        }
    )
    pq.write_to_dataset(rows, tmp_path / "set", partition_cols=rows.column_names[1:])
    found, described = [], set()
    for listing in listings(tmp_path / "set"):
        found += [row for table in listing.rows() for row in table.to_pylist()]
        described.add(listing.describe(print).model_dump_json())
        assert listing.extra == pa.schema([(name, pa.string()) for name in ("lang", "day", "source_width")])
    told = [(*(row[name] for name in ("path", "lang", "day", "labels", "source_width")),) for row in found]
    assert sorted(told) == [
        (url.encode(), lang, day, [label] if label else [], width)
        for url, lang, day, label, width in zip(*rows.to_pydict().values(), strict=True)
    ]
    assert len(described) == 3  # what the folders say is a part of what a list is


def test_only_folders_below_the_one_that_was_named_say_something(tmp_path):
    place = f"{tmp_path}/lang=en/a=b/=x/day=1/part-0.parquet"
    assert folder_values(f"{tmp_path}/lang=en", place) == {"a": "b", "day": "1"}
    assert folder_values(place, place) == folder_values(f"{tmp_path}/*/*/*", place) == {}
    assert folder_values("s3://bucket/set/", "s3://bucket/set/day=2/a.csv") == {"day": "2"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "url,lang,label\nhttp://h/1,de,dog\n"),
        ("a.jsonl", '{"url": "http://h/1", "lang": "de", "label": "dog"}\n'),
        ("a.txt", "http://h/1\n"),
    ],
)
def test_what_a_folder_says_goes_before_what_its_list_says(tmp_path, name, text):
    (tmp_path / "lang=en" / "label=cat").mkdir(parents=True)
    (tmp_path / "lang=en" / "label=cat" / name).write_text(text)
    (listing,) = listings(tmp_path)
    (row,) = [row for table in listing.rows() for row in table.to_pylist()]
    assert (row["path"], row["lang"], row["labels"]) == (b"http://h/1", "en", ["cat"])
    assert listing.extra == pa.schema([("lang", pa.string())])


def test_images_of_tables_in_such_folders_are_crawled_with_them(tmp_path, scene, encode, crawl):
    for number, lang in enumerate(("en", "__HIVE_DEFAULT_PARTITION__")):
        (tmp_path / "set" / f"lang={lang}").mkdir(parents=True)
        table = pa.table({"image": [encode(scene(number), "PNG")]})
        pq.write_table(table, tmp_path / "set" / f"lang={lang}" / "part-0.parquet")
    crawl([tmp_path / "set"], tmp_path / "out")
    metas = sealed_units(tmp_path / "out", open_dataset(tmp_path / "out").root)["meta"].to_pylist()
    rows = [row for meta in metas for row in pq.read_table(tmp_path / "out" / meta).to_pylist()]
    assert sorted((row["status"], str(row["lang"])) for row in rows) == [("kept", "None"), ("kept", "en")]
