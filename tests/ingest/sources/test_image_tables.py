"""Parquet with the images in it, as Hugging Face's hub has them: a file, a folder of parts, a pattern."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from ingest.dataset.open import open_dataset, sealed_units
from ingest.image.check import Treatment
from ingest.sources import opening
from ingest.sources.expand import expand
from ingest.sources.image_listing import ImageListing
from ingest.sources.image_table import ImageTable, image_column
from ingest.sources.opening import open_listing
from ingest.sources.url_list import Columns
from ingest.sources.url_listing import UrlListing

SEEN = Columns()
JPEG = b"\xff\xd8\xff\xe0 and so on"
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def huggingface(**features):
    return {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}} | features}})}


def written(path, metadata=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=3)
    return path


def images(count, path="{}.jpg"):
    return pa.array(
        [{"bytes": JPEG + bytes([n]), "path": path and path.format(n)} for n in range(count)], STRUCT
    )


def items(path, columns=SEEN):
    listing = open_listing(str(path), columns)
    assert isinstance(listing, ImageListing)
    return [row for table in listing.rows() for row in table.to_pylist()]


def opened(path):
    return ImageTable(str(path), image_column(str(path)), SEEN)


def test_images_labels_and_their_names_come_from_the_table(tmp_path):
    names = {"_type": "ClassLabel", "names": ["tench", "goldfish, Carassius"]}
    path = written(
        tmp_path / "train-00000-of-00001.parquet",
        huggingface(label=names),
        image=images(4),
        label=pa.array([1, 0, -1, None]),
        text=pa.array(["a", None, "c", "d"]),
        stars=pa.array([1, 2, 3, 4]),
        mask=images(4),
    )
    rows = items(path)
    assert [row["labels"] for row in rows] == [["goldfish, Carassius"], ["tench"], [], []]
    assert [row["path"] for row in rows] == [b"0.jpg", b"1.jpg", b"2.jpg", b"3.jpg"]
    assert [row["caption"] for row in rows] == ["a", None, "c", "d"]
    assert [(row["stars"], row["split"]) for row in rows] == [(n, "train") for n in (1, 2, 3, 4)]
    assert "mask" not in rows[0]


@pytest.mark.parametrize(
    ("labels", "feature", "expected"),
    [
        (pa.array([[0, 1], []]), {"feature": {"_type": "ClassLabel", "names": ["x", "y"]}}, [["x", "y"], []]),
        (pa.array([[0, 1], []]), [{"_type": "ClassLabel", "names": ["x", "y"]}], [["x", "y"], []]),
        (pa.array([0, 7]), {"_type": "ClassLabel", "names": ["x", "y"]}, [["x"], ["7"]]),
        (pa.array([0, 7]), None, [["0"], ["7"]]),
        (pa.array(["a, b", "c"]).dictionary_encode(), None, [["a, b"], ["c"]]),
    ],
)
def test_labels_of_every_kind(tmp_path, labels, feature, expected):
    metadata = None if feature is None else huggingface(label=feature)
    path = written(tmp_path / "t.parquet", metadata, image=images(2), label=labels)
    assert [row["labels"] for row in items(path)] == expected


@pytest.mark.parametrize(
    "metadata", [{"huggingface": "{"}, {"huggingface": "[]"}, {"huggingface": '{"info": 1}'}]
)
def test_unsound_metadata_is_none(tmp_path, metadata):
    path = written(tmp_path / "t.parquet", metadata, image=images(1), label=pa.array([5]))
    assert [row["labels"] for row in items(path)] == [["5"]]


def test_a_column_of_classes_is_found_whatever_it_is_called_and_others_are_named(tmp_path):
    kinds = {
        "fine": {"_type": "ClassLabel", "names": ["oak", "pine"]},
        "coarse": {"_type": "ClassLabel", "names": ["tree"]},
    }
    path = written(
        tmp_path / "t.parquet",
        huggingface(**kinds),
        img=images(2),
        fine=pa.array([1, 0]),
        coarse=pa.array([0, 0]),
    )
    assert [(row["labels"], row["coarse"]) for row in items(path)] == [(["pine"], "tree"), (["oak"], "tree")]
    chosen = items(path, Columns(labels="coarse"))
    assert [(row["labels"], row["fine"]) for row in chosen] == [(["tree"], "pine"), (["tree"], "oak")]


def test_plain_bytes_are_images_if_they_begin_like_them(tmp_path):
    pictures = written(tmp_path / "p.parquet", image=pa.array([None, JPEG]), label=pa.array([0, 1]))
    assert image_column(str(pictures)) == "image"
    assert [row["path"] for row in items(pictures)] == [b"0", b"1"]
    urls = written(tmp_path / "u.parquet", image=pa.array([b"https://a.org/1.jpg"]))
    assert isinstance(open_listing(str(urls), SEEN), UrlListing)
    assert image_column(str(written(tmp_path / "x.parquet", url=pa.array(["x"])))) is None
    other = written(tmp_path / "o.parquet", image=pa.array(["x"]), scan=pa.array([JPEG]))
    assert image_column(str(other)) == "scan"
    assert image_column(str(other), chosen="image") is None


@pytest.mark.slow
def test_bytes_are_read_in_any_order_and_what_has_none_has_a_reason(tmp_path):
    values = [{"bytes": JPEG + bytes([n]), "path": None} for n in range(40)]
    values[5] = {"bytes": None, "path": "elsewhere.jpg"}
    values[6] = None
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": pa.array(values, STRUCT)}), path, row_group_size=20)
    table = opened(path)
    everything = list(table.items())
    assert len(everything) == 40
    chosen = [everything[n] for n in (0, 1, 38, 25, 5, 6, 19, 20, 2)]
    read = list(table.read(chosen, max_bytes=100))
    assert [data[-1] if isinstance(data, bytes) else data.reason for data in read] == [
        0, 1, 38, 25, "no_image_bytes", "no_image_bytes", 19, 20, 2,
    ]  # fmt: skip
    assert [data.reason for data in table.read(everything[:1], max_bytes=3)] == ["too_many_bytes"]
    table.close()


def test_a_damaged_row_group_is_rows_with_a_reason(tmp_path):
    path = written(tmp_path / "t.parquet", image=images(6), label=pa.array(range(6)))
    chunk = pq.read_metadata(path).row_group(0).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    table = opened(path)
    read = list(table.read(list(table.items()), max_bytes=100))
    assert [data[-1] if isinstance(data, bytes) else data.reason for data in read] == [
        *["table_damaged"] * 3, 3, 4, 5,
    ]  # fmt: skip


def test_a_folder_of_parts_is_its_parts_and_a_folder_of_images_is_not(tmp_path):
    for name in (
        "part-00000.snappy.parquet",
        "_SUCCESS",
        ".part-0.crc",
        "README.md",
        "LICENSE",
        "data/part-00001.parquet",
    ):
        (tmp_path / "t.parquet" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t.parquet" / name).write_bytes(b"")
    folder = tmp_path / "t.parquet"
    assert expand(str(folder)) == [
        str(folder / "part-00000.snappy.parquet"),
        str(folder / "data" / "part-00001.parquet"),
    ]
    (folder / "data" / "x.jpg").write_bytes(b"")
    assert expand(str(folder)) == [str(folder)]
    (tmp_path / "bare").mkdir()
    assert expand(str(tmp_path / "bare")) == [str(tmp_path / "bare")]
    assert expand("s3://bucket/x.parquet") == ["s3://bucket/x.parquet"]


@pytest.mark.slow
def test_D2_a_folder_of_tables_is_crawled_whole_and_again_alike(tmp_path, scene, encode, crawl):
    names = huggingface(label={"_type": "ClassLabel", "names": ["cat", "dog"]})
    pictures = [encode(scene(n), "PNG") for n in range(4)]
    for number, split in enumerate(("train", "test")):
        part = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(pictures[2 * number :][:2])]
        written(
            tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet",
            names,
            image=pa.array([*part, {"bytes": b"no picture", "path": None}], STRUCT),
            label=pa.array([0, 1, 1]),
        )
    (tmp_path / "hub" / "README.md").write_text("a card")
    reports = [
        crawl([tmp_path / "hub"], tmp_path / f"out{n}", treatment=Treatment(phash=False)) for n in range(2)
    ]
    assert reports[0].root == reports[1].root
    assert (reports[0].counts.kept, reports[0].counts.rejected) == (4, {"not_an_image": 2})
    data = open_dataset(tmp_path / "out0")
    rows = data.kept_rows(0, ["url", "labels", "split"]).to_pylist()
    assert [(row["url"].rpartition("/")[2], row["labels"], row["split"]) for row in rows] == [
        ("0.png", ["cat"], "test"),
        ("1.png", ["dog"], "test"),
        ("0.png", ["cat"], "train"),
        ("1.png", ["dog"], "train"),
    ]
    assert sealed_units(tmp_path / "out0", data.root)["rows"].to_pylist() == [6]
    row = data.unit_rows(0)[0]
    assert data.read_shard(0, int(row["offset"]), int(row["size"])) == pictures[2]


def test_a_link_to_a_table_keeps_its_name(tmp_path, scene, encode, crawl):
    """As in the cache of Hugging Face's hub, whose files are links to digests."""
    picture = pa.array([{"bytes": encode(scene(0), "PNG"), "path": None}], STRUCT)
    written(tmp_path / "blobs" / "0123abcd", image=picture)
    link = tmp_path / "hub" / "train-00000-of-00001.parquet"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "blobs" / "0123abcd")
    crawl([link], tmp_path / "out", treatment=Treatment(phash=False))
    rows = open_dataset(tmp_path / "out").kept_rows(0, ["url", "split"]).to_pylist()
    assert [(row["url"], row["split"]) for row in rows] == [("train-00000-of-00001.parquet/0", "train")]


def test_a_table_that_is_read_by_a_key_in_its_url_alone_is_refused(monkeypatch):
    def opened(place):
        if "?" not in place:
            raise FileNotFoundError(place)
        return io.BytesIO()

    monkeypatch.setattr(opening, "open_file", opened)
    monkeypatch.setattr(opening, "image_column", lambda place, column: "image")
    with pytest.raises(UserError, match=r"https://host/t\.parquet can be read only with the query"):
        open_listing("https://host/t.parquet?sig=1", SEEN)
