"""Texts, labels and JSON beside images of a folder, and metadata files, belong to the images."""

import json
import os

import pytest

from cluster.errors import UserError
from ingest.dataset.open import open_dataset
from ingest.image.check import Treatment
from ingest.sources import folder_metadata
from ingest.sources.folder import FolderSource


def written(root, **contents):
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def items(root):
    return {item.path.decode(): item for item in FolderSource(root).items()}


def test_companions_are_in_the_rows_of_their_images_as_those_of_tars_are(tmp_path):
    root = written(
        tmp_path / "set",
        **{
            "cat/1.jpg": "image",
            "cat/1.json": '{"text": "two cats", "stars": 5, "url": "https://a.org/1"}',
            "cat/2.jpg": "image",
            "cat/2.txt": "a cat\n",
            "cat/2.cls": "7",
            "cat/3.jpg": "image",
            "cat/readme.txt": "of no image",
        },
    )
    found = items(root)
    assert list(found) == ["cat/1.jpg", "cat/2.jpg", "cat/3.jpg", "cat/readme.txt"]
    first, second, third, _ = found.values()
    assert (first.caption, first.labels) == ("two cats", ("cat",))
    assert first.extra == {"source_url": "https://a.org/1", "json": '{"stars": 5}'}
    assert (second.caption, second.labels, third.caption, third.labels) == ("a cat", ("7",), None, ("cat",))


def test_what_is_no_file_is_no_companion(tmp_path):
    root = written(tmp_path / "set", **{"1.jpg": "image", "2.jpg": "image"})
    os.mkfifo(root / "1.txt")
    (tmp_path / "secret").write_text("key")
    (root / "2.txt").symlink_to(tmp_path / "secret")
    found = items(root)
    assert [(item.caption, item.problem) for item in found.values()] == [
        (None, ""), (None, "not_a_file"), (None, ""), (None, "link_outside"),
    ]  # fmt: skip


METADATA = {
    "metadata.csv": "file_name,text,label,stars\n"
    "1.jpg,one,cat,5\n./sub/2.jpg,two,dog,\ngone.jpg,three,cat,\n",
    "metadata.jsonl": "\n".join(
        [
            json.dumps({"file_name": "1.jpg", "text": "one", "label": "cat", "stars": "5"}),
            json.dumps({"file_name": "sub/2.jpg", "text": "two", "label": "dog", "stars": None}),
            json.dumps({"file_name": "gone.jpg", "text": "three", "label": "cat"}),
        ]
    ),
}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", METADATA)
def test_metadata_says_of_every_image_below_it_what_it_is(tmp_path, name, encoding):
    root = written(
        tmp_path / "set",
        **{"a/1.jpg": "i", "a/sub/2.jpg": "i", "a/sub/3.jpg": "i", "1.jpg": "i"},
    )
    (root / "a" / name).write_text(METADATA[name], encoding)
    found = {
        path: (item.caption, item.labels, item.extra.get("json"), item.problem)
        for path, item in items(root).items()
    }
    assert found == {
        "1.jpg": (None, (), None, ""),
        "a/1.jpg": ("one", ("cat",), '{"stars": "5"}', ""),
        "a/sub/2.jpg": ("two", ("dog",), None, ""),
        "a/sub/3.jpg": (None, ("a",), None, ""),
        "a/gone.jpg": ("three", ("cat",), None, "file_missing"),
    }


def test_a_nearer_file_of_metadata_counts(tmp_path):
    root = written(
        tmp_path / "set",
        **{
            "metadata.csv": "file_name,text\na/1.jpg,far\na/2.jpg,far\n",
            "a/metadata.csv": "file_name,text\n1.jpg,near\n",
            "a/1.jpg": "i",
            "a/2.jpg": "i",
        },
    )
    found = [(item.path, item.caption) for item in FolderSource(root).items()]
    assert found == [(b"a/1.jpg", "near"), (b"a/2.jpg", "far")]


def test_a_companion_takes_nothing_from_what_metadata_says(tmp_path):
    root = written(
        tmp_path / "set",
        **{
            "metadata.csv": "file_name,text,label,stars\n1.jpg,one,cat,5\n2.jpg,two,dog,4\n",
            "1.jpg": "i",
            "1.cls": "lion",
            "2.jpg": "i",
            "2.txt": "another two",
        },
    )
    first, second = items(root).values()
    assert (first.caption, first.labels, first.extra) == ("one", ("lion",), {"json": '{"stars": "5"}'})
    assert (second.caption, second.labels) == ("another two", ("dog",))
    assert second.extra == {"json": '{"stars": "4"}'}


def test_another_file_that_is_called_so_is_an_attempt(tmp_path):
    root = written(tmp_path / "set", **{"metadata.csv": "camera,lens\na,b\n", "1.jpg": "i"})
    assert list(items(root)) == ["1.jpg", "metadata.csv"]


@pytest.mark.parametrize(("name", "content"), [("metadata.csv", 'file_name\n"a'), ("metadata.jsonl", "{")])
def test_damaged_metadata_is_a_sentence(tmp_path, name, content):
    with pytest.raises(
        UserError, match=rf"/set/a/{name} cannot be read \(.*\): mend it, or give it another name"
    ):
        items(written(tmp_path / "set", **{f"a/{name}": content}))


def test_D1_a_folder_and_its_companions_reach_the_rows(tmp_path, folder, crawl):
    source = folder(count=2)
    (source / "cat" / "000.txt").write_text("a caption")
    reports = [crawl([source], tmp_path / name, treatment=Treatment(phash=False)) for name in ("a", "b")]
    assert reports[0].root == reports[1].root
    assert reports[0].counts.planned == 3
    assert [row["caption"] for row in open_dataset(tmp_path / "a").kept_rows(0).to_pylist()] == [
        "a caption",
        None,
    ]


def test_D4_metadata_that_says_too_much_is_a_sentence_with_that_of_folders_above(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_metadata, "_MOST_HELD", 3_000)
    for folder in ("set", "set/a"):
        (tmp_path / folder).mkdir()
        rows = [json.dumps({"file_name": f"{n}.jpg", "text": "x" * 100}) for n in range(5)]
        (tmp_path / folder / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"set/a/metadata\.jsonl says too much to be held in memory"):
        list(FolderSource(tmp_path / "set").items())


def test_D4_nested_metadata_is_a_sentence(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": ' + "[" * 200_000)
    with pytest.raises(UserError, match=r"metadata\.jsonl cannot be read"):
        list(FolderSource(tmp_path).items())
