"""A dataset's captions become tags."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from captioned import CLASSES, captioned

from cluster.errors import UserError
from ingest.dataset.open import Dataset, open_dataset
from ingest.dataset.view import write_view
from pipeline.data.tags import Tags, open_tags
from pipeline.hashtags import make_tags as making
from pipeline.hashtags.make_tags import make_tags
from pipeline.recipe.stages import HashtagsRecipe
from pipeline.report.tags import tags_page

Made = Callable[..., Tags]


def tags_and_labels(tags: Tags, dataset: Dataset) -> list[tuple[list[str], str]]:
    """Of each tagged image, its tags and its true label."""
    seen = dataset.through(tags.tagged)
    return [
        ([tags.names[code] for code in of_unit.of(row)], labels[row][0])
        for unit in range(len(seen.units))
        for of_unit, labels in [
            (tags.unit_labels(seen, unit), seen.kept_rows(unit, ["labels"])["labels"].to_pylist())
        ]
        for row in range(len(of_unit))
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_without_noise_tags_are_the_classes_and_images_without_text_have_none(
    dataset: Path, tmp_path: Path, made: Made
) -> None:
    opened = open_dataset(dataset)
    tags = made(opened, tmp_path / "tags")
    assert sorted(tags.names) == sorted(CLASSES)
    found = tags_and_labels(tags, opened)
    assert len(found) == tags.vocabulary.tagged == 52
    assert all(names == [label] for names, label in found)
    counts = [tag.count for tag in tags.vocabulary.tags]
    assert counts == sorted(counts, reverse=True)
    assert {tag.nouns[0]: tag.count for tag in tags.vocabulary.tags} == Counter(label for _, label in found)


def test_the_more_captions_lie_the_fewer_tags_are_right(tmp_path: Path, made: Made) -> None:
    right = []
    for noise in (0.0, 0.2, 0.5, 0.9):
        opened = open_dataset(captioned(tmp_path / str(noise), noise=noise))
        found = tags_and_labels(made(opened, tmp_path / f"tags-{noise}"), opened)
        right.append(sum(names == [label] for names, label in found) / len(found))
    assert right == pytest.approx([1.0, 0.8, 0.5, 0.1])


def find_task(dataset: Dataset, found: Path, unit: int) -> making.FindTask:
    where = {"path": dataset.path, "root": dataset.root, "view": None, "unit_index": unit}
    recipe = HashtagsRecipe()
    return making.FindTask(
        **where, read=recipe.read, kinds=recipe.kinds, found=str(found / f"{unit:08d}.parquet")
    )


@pytest.mark.slow
def test_tags_are_the_same_bytes_from_any_number_of_processes_and_after_an_interruption(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Made
) -> None:
    opened = open_dataset(dataset)
    made(opened, tmp_path / "one")
    made(opened, tmp_path / "two", workers=2)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(making, "encode", lambda task: (_ for _ in ()).throw(KeyboardInterrupt))
        made(opened, tmp_path / "broken")
    (found,) = (tmp_path / "broken").glob("found-*")
    (found / "00000002.parquet").write_bytes(b"")  # as a power cut may leave it
    making.find(find_task(opened, found, 2))
    with monkeypatch.context() as patched:  # what was found is not looked for again
        patched.setattr(making, "Tagger", None)
        made(opened, tmp_path / "broken")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == files_of(tmp_path / "broken")
    assert len(files_of(tmp_path / "one")) == 2 + 4


def test_rare_and_surplus_synsets_are_left_out_and_images_with_nothing_else_have_no_tag(
    dataset: Path, tmp_path: Path, made: Made
) -> None:
    opened = open_dataset(dataset)
    three = made(opened, tmp_path / "three", max_tags=3)
    assert [tag.index for tag in three.vocabulary.tags] == [0, 1, 2]
    assert three.vocabulary.tagged == 39
    with pytest.raises(
        UserError, match=r"name 4 things, 0 of them in .*min_images=99.*: min_images=13 would"
    ):
        make_tags(opened, HashtagsRecipe(min_images=99), tmp_path, map_tasks=map)
    with pytest.raises(UserError, match=r"name 0 things.*read=\[caption,labels\]"):
        make_tags(opened, HashtagsRecipe(kinds=("feeling",)), tmp_path, map_tasks=map)


def test_only_what_is_wanted_becomes_a_tag(dataset: Path, tmp_path: Path, made: Made) -> None:
    opened = open_dataset(dataset)
    two = made(opened, tmp_path / "two", only=["Brown_Bears", "n02121620", "n00000000", "giraffe"])
    assert sorted(two.names) == ["brown bear", "cat"]
    assert two.vocabulary.tagged == 26
    with pytest.raises(
        UserError, match=r"only: 'brwon bear' is no noun of WordNet, and no synset such as n0"
    ):
        made(opened, tmp_path / "none", only=["cat", "brwon bear"])


def test_labels_are_read_when_they_are_asked_for(dataset: Path, tmp_path: Path, made: Made) -> None:
    opened = open_dataset(dataset)
    assert made(opened, tmp_path / "labels", read=("labels",)).vocabulary.tagged == 60
    both = made(opened, tmp_path / "both", read=("caption", "labels"))
    assert all(names == [label] for names, label in tags_and_labels(both, opened))


def test_of_a_view_only_its_images_are_tagged(dataset: Path, tmp_path: Path, made: Made) -> None:
    own = tmp_path / "data"
    shutil.copytree(dataset, own)
    whole = open_dataset(own)
    keeps = {
        int(unit): np.arange(count) % 2 == 0 for unit, count in zip(whole.units, whole.counts, strict=True)
    }
    write_view(own, "half", root=whole.root, keeps=keeps)
    half = open_dataset(own, view="half")
    tags = made(half, tmp_path / "tags", view="half")
    found = tags_and_labels(tags, half)
    assert tags.vocabulary.images == len(half) == 32
    assert len(found) == tags.vocabulary.tagged > 20
    assert all(names == [label] for names, label in found)


@pytest.mark.parametrize("name", ["tags.json", "units.parquet", "units/00000001.parquet"])
@pytest.mark.parametrize("harm", ["lost", "changed"])
def test_damaged_tags_are_a_sentence(dataset: Path, tmp_path: Path, name: str, harm: str, made: Made) -> None:
    opened = open_dataset(dataset)
    made(opened, tmp_path)
    path = tmp_path / name
    path.unlink() if harm == "lost" else path.write_bytes(path.read_bytes()[:-9] + b"garbage!}")
    with pytest.raises(UserError, match=r"submit hashtags|make the tags anew in another folder"):
        tags_and_labels(open_tags(tmp_path), opened)


def test_the_page_shows_each_tag_with_its_count_and_pictures_of_its_own(
    dataset: Path, tmp_path: Path, made: Made
) -> None:
    opened = open_dataset(dataset)
    tags = made(opened, tmp_path)
    page = tags_page(opened, tags)
    assert page.count('src="data:image/jpeg') == 16
    assert all(f"<h3>{name}</h3>" in page and page.count(f'alt="{name} ') == 4 for name in CLASSES)
    few = tags_page(opened, tags, shown=2, pictures=1)
    assert few.count("<h3>") == few.count('src="data:image/jpeg') == 2
    assert all(name in few for name in CLASSES)
