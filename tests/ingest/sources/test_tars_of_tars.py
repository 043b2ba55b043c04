"""Tars of tars, as ImageNet comes: one level of them is opened."""

import gzip
import io
import tarfile

import pytest

from ingest.crawl.crawl import crawl_shards
from ingest.crawl.index import index_tars
from ingest.dataset.open import open_dataset
from ingest.image.check import Treatment
from ingest.plan.settings import CrawlSettings
from ingest.sources.tar import TarSource


def tar_of(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def written(path, *members):
    path.write_bytes(tar_of(*members))
    return path


def listed(path):
    return [(item.path.decode(), item.labels, item.problem) for item in TarSource(path).items()]


def read(path):
    source = TarSource(path)
    return list(source.read(list(source.items()), max_bytes=1 << 20))


IMAGENET = [
    ("n01440764.tar", tar_of(("n01440764_0.JPEG", b"zero"), ("n01440764_1.JPEG", b"one"))),
    ("n01443537.tar", tar_of(("n01443537_0.JPEG", b"two" * 400))),
]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_the_label_of_an_image_is_the_name_of_its_tar(tmp_path, pack):
    path = written(tmp_path / "ILSVRC2012_img_train.tar", *IMAGENET)
    path.write_bytes(pack(path.read_bytes()))
    assert listed(path) == [
        ("n01440764/n01440764_0.JPEG", ("n01440764",), ""),
        ("n01440764/n01440764_1.JPEG", ("n01440764",), ""),
        ("n01443537/n01443537_0.JPEG", ("n01443537",), ""),
    ]
    assert read(path) == [b"zero", b"one", b"two" * 400]


def test_tars_in_folders_and_folders_in_tars(tmp_path):
    inner = tar_of(("1.jpg", b"a"), ("1.cls", b"seven"), ("black/2.jpg", b"b"), (".hidden", b"c"))
    path = written(tmp_path / "x.tar", ("train/cat.tar", inner), ("3.jpg", b"d"))
    assert listed(path) == [
        ("train/cat/1.jpg", ("seven",), ""),
        ("train/cat/black/2.jpg", ("train",), ""),
        ("3.jpg", (), ""),
    ]


def test_one_level_is_opened_and_what_is_none_is_an_attempt(tmp_path):
    deep = tar_of(("b.tar", tar_of(("1.jpg", b"a"))))
    path = written(tmp_path / "x.tar", ("a.tar", deep), ("text.tar", b"no tar"), ("bare.tar", tar_of()))
    assert [name for name, _, _ in listed(path)] == ["a/b.tar", "text.tar", "bare.tar"]


def test_damage_in_one_tar_is_its_own_row_and_the_next_is_read(tmp_path):
    cut = IMAGENET[0][1][:1300]  # in the header of the second member
    beyond = bytearray(tar_of(("1.jpg", b"a" * 512)))
    beyond[124:136] = b"00000777777\0"  # a member that claims to be larger than its tar
    beyond[148:156] = b" " * 8
    beyond[148:156] = b"%06o\0 " % sum(beyond[:512])
    garbled = bytearray(IMAGENET[0][1])
    garbled[1024:1030] = b"\xff" * 6
    path = written(
        tmp_path / "x.tar",
        *[("cut.tar", cut), ("beyond.tar", bytes(beyond)), ("garbled.tar", bytes(garbled)), IMAGENET[1]],
    )
    assert listed(path) == [
        ("cut/n01440764_0.JPEG", ("cut",), ""),
        ("cut.tar", (), "tar_truncated"),
        ("beyond.tar", (), "tar_truncated"),
        ("garbled/n01440764_0.JPEG", ("garbled",), ""),
        ("garbled.tar", (), "tar_damaged"),
        ("n01443537/n01443537_0.JPEG", ("n01443537",), ""),
    ]


def test_they_are_crawled_and_indexed_where_they_lie(tmp_path, scene, encode):
    data = [encode(scene(n), "PNG") for n in range(2)]
    path = written(tmp_path / "x.tar", *((f"n{n}.tar", tar_of((f"{n}.png", data[n]))) for n in range(2)))
    settings = CrawlSettings(treatment=Treatment(phash=False))
    quiet = {"workers": 1, "progress": lambda counts: None}
    crawl_shards([str(path)], tmp_path / "copied", settings, **quiet)
    index_tars([str(path)], tmp_path / "indexed", settings, **quiet)
    for output in ("copied", "indexed"):
        opened = open_dataset(tmp_path / output)
        assert [opened.vocabulary.names[code] for code in opened.unit_labels(0).codes] == ["n0", "n1"]
        rows = opened.unit_rows(0)
        assert [opened.read_shard(0, int(row["offset"]), int(row["size"])) for row in rows] == data
